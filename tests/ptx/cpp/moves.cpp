// Moves, packing, parameters, special registers.
#include "lanewise.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

u64 load(Warp& warp, int32_t offset, int lane, uint32_t bytes) {
    return bytes == 8 ? warp.at<u64>(offset)[lane] : warp.at<u32>(offset)[lane];
}

void pack(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const int parts = instruction.count - 1;
    const u32 bits = 8 * instruction.size / parts;
    const u64 mask = ~u64(0) >> (64 - bits);
    u64 values[kLanes] = {};
    for (int part = 0; part < parts; ++part) {
        const u32* from = warp.operand<u32>(instruction, part + 1);
        for (int i = 0; i < kLanes; ++i) {
            values[i] |= (from[i] & mask) << part * bits;
        }
    }
    if (instruction.size == 8) {
        store(warp.operand<u64>(instruction, 0), values, lanes);
        return;
    }
    u32 narrow[kLanes];
    std::copy_n(values, kLanes, narrow);
    store(warp.operand<u32>(instruction, 0), narrow, lanes);
}

void unpack(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const int parts = instruction.count - 1;
    const u32 bits = 8 * instruction.size / parts;
    const u64 mask = ~u64(0) >> (64 - bits);
    u64 whole[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        whole[i] = load(warp, instruction.operands[parts], i, instruction.size);
    }
    for (int part = 0; part < parts; ++part) {
        if (instruction.operands[part] < 0) {
            continue;
        }
        u32 values[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            values[i] = static_cast<u32>(whole[i] >> part * bits & mask);
        }
        store(warp.operand<u32>(instruction, part), values, lanes);
    }
}

void parameter(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const Grid& grid = *warp.block->grid->launch;
    if (instruction.imm < 0 || instruction.imm + instruction.size > int64_t(grid.parameter_bytes)) {
        throw Fault(warp.place(instruction), text("parameter at %lld, there are %llu bytes", (long long)instruction.imm,
                                                  (unsigned long long)grid.parameter_bytes));
    }
    u64 value = 0;
    std::memcpy(&value, grid.parameters + instruction.imm, instruction.size);
    if (instruction.has(kSigned)) {
        const u32 above = 64 - 8 * instruction.size;
        value = static_cast<u64>(static_cast<int64_t>(value << above) >> above);
    }
    if (instruction.size == 8 || instruction.has(kWide)) {
        u64 values[kLanes];
        std::fill_n(values, kLanes, value);
        store(warp.operand<u64>(instruction, 0), values, lanes);
        return;
    }
    u32 values[kLanes];
    std::fill_n(values, kLanes, static_cast<u32>(value));
    store(warp.operand<u32>(instruction, 0), values, lanes);
}

void parameter_address(Warp& warp, const Instruction& instruction, Lanes lanes) {
    u64 values[kLanes];
    std::fill_n(values, kLanes, reinterpret_cast<u64>(warp.block->grid->launch->parameters) + instruction.imm);
    store(warp.operand<u64>(instruction, 0), values, lanes);
}

u64 special_value(const Warp& warp, int64_t which, int lane) {
    const Block& block = *warp.block;
    const GridRun& grid = *block.grid;
    const auto axis = [](const u32* values, int64_t base, int64_t which) { return values[which - base]; };
    u32 clusters[3];
    for (int i = 0; i < 3; ++i) {
        clusters[i] = grid.launch->blocks[i] / grid.launch->cluster[i];
    }
    switch (which) {
        case kTidX:
            return warp.id * kLanes + lane;
        case kTidY:
        case kTidZ:
            return 0;
        case kNtidX:
            return grid.launch->warps * kLanes;
        case kNtidY:
        case kNtidZ:
            return 1;
        case kCtaidX:
        case kCtaidY:
        case kCtaidZ:
            return axis(block.index, kCtaidX, which);
        case kNctaidX:
        case kNctaidY:
        case kNctaidZ:
            return axis(grid.launch->blocks, kNctaidX, which);
        case kLaneid:
            return lane;
        case kWarpid:
            return warp.id;
        case kNwarpid:
            return grid.launch->warps;
        case kClusterCtarank:
            return block.rank;
        case kClusterNctarank:
            return grid.cluster_blocks;
        case kClusterCtaidX:
        case kClusterCtaidY:
        case kClusterCtaidZ: {
            const int64_t i = which - kClusterCtaidX;
            return block.index[i] % grid.launch->cluster[i];
        }
        case kClusterNctaidX:
        case kClusterNctaidY:
        case kClusterNctaidZ:
            return axis(grid.launch->cluster, kClusterNctaidX, which);
        case kClusteridX:
        case kClusteridY:
        case kClusteridZ: {
            const int64_t i = which - kClusteridX;
            return block.index[i] / grid.launch->cluster[i];
        }
        case kNclusteridX:
        case kNclusteridY:
        case kNclusteridZ:
            return axis(clusters, kNclusteridX, which);
        case kIsExplicitCluster:
            return grid.uses_clusters();
        case kLanemaskEq:
            return 1u << lane;
        case kLanemaskLt:
            return (1u << lane) - 1;
        case kLanemaskLe:
            return ~u32(0) >> (31 - lane);
        case kLanemaskGt:
            return ~(~u32(0) >> (31 - lane));
        case kLanemaskGe:
            return ~((1u << lane) - 1);
        case kClock:
            return warp.machine->totals.executed;
        case kSmid:
            return block.home % std::max(warp.machine->settings.resident, 1u);
        case kGridid:
            return grid.number;
        default:
            throw Fault({0, grid.number}, text("special register %lld is unknown", (long long)which));
    }
}

void special(Warp& warp, const Instruction& instruction, Lanes lanes) {
    u64 values[kLanes];
    u32 narrow[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        values[i] = special_value(warp, instruction.imm, i);
        narrow[i] = static_cast<u32>(values[i]);
    }
    if (instruction.has(kWide)) {
        store(warp.operand<u64>(instruction, 0), values, lanes);
    } else {
        store(warp.operand<u32>(instruction, 0), narrow, lanes);
    }
}

void nothing(Warp&, const Instruction&, Lanes) {}

void give_turn_away(Warp& warp, const Instruction&, Lanes) { warp.turn_over = true; }

void trap(Warp& warp, const Instruction& instruction, Lanes) {
    throw Fault(warp.place(instruction), "trap: the program stopped itself");
}

}  // namespace

void add_moves(Ops& ops) {
    ops.add("mov.32", lanewise<u32(u32)>([](u32 a) { return a; }));
    ops.add("mov.64", lanewise<u64(u64)>([](u64 a) { return a; }));
    ops.add("pack", pack);
    ops.add("unpack", unpack);
    ops.add("param", parameter);
    ops.add("param.address", parameter_address);
    ops.add("special", special);
    ops.add("nop", nothing);
    ops.add("nanosleep", give_turn_away, Control::kYields);
    ops.add("trap", trap);
    ops.add("bra", nothing, Control::kBranch);
    ops.add("ret", nothing, Control::kReturn);
}

}  // namespace ptx

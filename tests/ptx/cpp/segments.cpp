// Where addresses lie, and what the bytes there hold.
#include <algorithm>

#include "memory.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

// How far from a range an address is still said to be behind or before it.
constexpr u64 kNear = 1 << 16;

std::string where(const Machine& machine, u64 address, u32 bytes) {
    for (const MemoryRange& range : machine.ranges) {
        if (address >= range.low && address < range.high + kNear) {
            return text("%llu bytes behind the end of a tensor of %llu bytes",
                        (unsigned long long)(address + bytes - range.high),
                        (unsigned long long)(range.high - range.low));
        }
        if (address < range.low && address + kNear > range.low) {
            return text("%llu bytes before a tensor of %llu bytes", (unsigned long long)(range.low - address),
                        (unsigned long long)(range.high - range.low));
        }
    }
    return "no tensor is near";
}

constexpr u64 kEachByte = 0x0101010101010101;

// Whether bytes of content are all kData; or, with the upper bits alone, kData or kNothing.
bool all_data(const uint8_t* content, u32 bytes, u64 bits = ~u64(0)) {
    u64 differs = 0;
    u32 i = 0;
    for (; i + 8 <= bytes; i += 8) {
        u64 word;
        std::memcpy(&word, content + i, sizeof word);
        differs |= word ^ kData * kEachByte;
    }
    for (; i < bytes; ++i) {
        differs |= content[i] ^ kData;
    }
    return (differs & bits) == 0;
}

}  // namespace

bool find_global(Warp& warp, const Instruction& instruction, u64 address, u32 bytes, const char* what,
                 Segment& segment) {
    Machine& machine = *warp.machine;
    const auto within = [&](const MemoryRange& range) {
        return address >= range.low && address + bytes <= range.high && address + bytes > address;
    };
    const MemoryRange* found = nullptr;
    if (instruction.last_range < machine.ranges.size() && within(machine.ranges[instruction.last_range])) {
        found = &machine.ranges[instruction.last_range];
    } else {
        const auto above = std::upper_bound(machine.ranges.begin(), machine.ranges.end(), address,
                                            [](u64 value, const MemoryRange& range) { return value < range.low; });
        if (above != machine.ranges.begin() && within(*(above - 1))) {
            found = &*(above - 1);
            instruction.last_range = static_cast<u32>(found - machine.ranges.data());
        }
    }
    if (!found) {
        machine.reports.add(Kind::kGlobalBounds, warp.place(instruction), {}, "global %s of %u bytes out of bounds: %s",
                            what, bytes, where(machine, address, bytes).c_str());
        return false;
    }
    segment = {reinterpret_cast<uint8_t*>(found->low), found->low, found->high - found->low, found->cells, nullptr};
    return true;
}

Block* shared_block(Warp& warp, const Instruction& instruction, u64 address, u32& offset) {
    const u64 above = address >> kRankBit;
    offset = static_cast<u32>(address & kOffsetMask);
    if (above == 0 || above == warp.block->rank + 1) {
        return warp.block;
    }
    Cluster& cluster = *warp.block->cluster;
    const u64 rank = above - 1;
    if (!instruction.has(kCluster) || rank >= cluster.blocks.size()) {
        warp.machine->reports.add(Kind::kSharedBounds, warp.place(instruction), {},
                                  rank < cluster.blocks.size() ? "an address of another block's shared memory: "
                                                                 ".shared::cluster is needed"
                                                               : "no address of shared memory");
        return nullptr;
    }
    Block* block = cluster.blocks[rank].get();
    if (block->live == 0) {
        warp.machine->reports.add(Kind::kCluster, warp.place(instruction), {},
                                  "shared memory of block %llu of the cluster, which has exited",
                                  (unsigned long long)rank);
        return nullptr;
    }
    return block;
}

u64 mapped(u32 rank, u64 offset) { return static_cast<u64>(rank + 1) << kRankBit | offset; }

bool find_shared(Warp& warp, const Instruction& instruction, u64 address, u32 bytes, const char* what,
                 Segment& segment) {
    u32 offset = 0;
    Block* block = shared_block(warp, instruction, address, offset);
    if (!block) {
        return false;
    }
    const u64 size = block->grid->launch->shared_bytes;
    if (offset + static_cast<u64>(bytes) > size) {
        warp.machine->reports.add(Kind::kSharedBounds, warp.place(instruction), {},
                                  "shared %s of %u bytes at %u out of bounds: there are %llu bytes", what, bytes,
                                  offset, (unsigned long long)size);
        return false;
    }
    segment = {block->shared.data(), address - offset, size, block->cells.cells(), block};
    return true;
}

void check_alignment(Warp& warp, const Instruction& instruction, const Segment& segment, u64 address, u32 bytes) {
    if (address & (std::min(bytes, 16u) - 1)) {
        const bool shared = segment.block != nullptr;
        warp.machine->reports.add(shared ? Kind::kSharedAlignment : Kind::kGlobalAlignment, warp.place(instruction), {},
                                  "misaligned %s access of %u bytes at ...%02llx", shared ? "shared" : "global", bytes,
                                  (unsigned long long)(address & 255));
    }
}

void check_content(Warp& warp, const Instruction& instruction, const Block& block, u64 offset, u32 bytes) {
    const uint8_t* content = block.content.data() + offset;
    if (all_data(content, bytes)) {
        return;
    }
    Reports& reports = warp.machine->reports;
    for (u32 i = 0; i < bytes; ++i) {
        if (content[i] == kNothing) {
            reports.add(Kind::kSharedUnwritten, warp.place(instruction), {}, "shared read of what nobody wrote");
            return;
        }
        if (content[i] == kInFlight) {
            const Cells cells = block.cells.cells();
            const Stamp written = warp.machine->settings.race ? cells.writes[(offset + i) / 2] : 0;
            const bool known = written != kSplit && number_of(written) >= warp.machine->first_number;
            const Place copy{known ? static_cast<u32>(warp.machine->accesses[number_of(written)].line) : 0,
                             known ? block.grid->number : -1};
            reports.add(Kind::kUnwaitedCopy, warp.place(instruction), copy,
                        "shared read of a copy that nobody waited for");
            return;
        }
        if (content[i] == kBarrierObject) {
            reports.add(Kind::kMbarrier, warp.place(instruction), {}, "shared read of an mbarrier");
            return;
        }
    }
}

void write_content(Warp& warp, const Instruction& instruction, Block& block, u64 offset, u32 bytes) {
    uint8_t* content = block.content.data() + offset;
    // The other contents have a bit above the lowest.
    if (!all_data(content, bytes, ~kEachByte)) {
        const bool flying = std::find(content, content + bytes, kInFlight) != content + bytes;
        warp.machine->reports.add(flying ? Kind::kUnwaitedCopy : Kind::kMbarrier, warp.place(instruction), {},
                                  flying ? "shared write over a copy that nobody waited for"
                                         : "shared write over an mbarrier that was not invalidated");
    }
    std::fill_n(content, bytes, kData);
}

}  // namespace ptx

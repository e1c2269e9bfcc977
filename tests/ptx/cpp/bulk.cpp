// Bulk copies: what they check, when they happen, who may know.
#include "bulk.h"

#include <algorithm>

#include "lanewise.h"
#include "mbarriers.h"
#include "memory.h"
#include "proxies.h"
#include "reductions.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

constexpr u32 kBulkUnit = 16;

const uint8_t* source_of(const BulkCopy& copy, const Piece& piece) {
    if (copy.source) {
        return copy.source->shared.data() + piece.other;
    }
    return reinterpret_cast<const uint8_t*>(piece.other);
}

// Moves the bytes of a load.
void land(Machine& machine, BulkCopy& copy, Mbarrier& mbarrier) {
    Block& block = *copy.block;
    Stamp written = 0;
    if (machine.settings.race) {
        const Agent by = agent(block.home, mbarrier.slot);
        const uint32_t number = machine.accesses.add(by, mbarrier.clock(), copy.instruction->line, kAsync);
        note_foreign(block, {number, by, mbarrier.clock()});
        written = stamp(number, kManyLanes);
    }
    for (const Piece& piece : copy.pieces) {
        uint8_t* to = block.shared.data() + piece.offset;
        if (piece.outside) {
            std::memcpy(to, copy.fill.data(), piece.bytes);
        } else {
            std::memcpy(to, source_of(copy, piece), piece.bytes);
        }
        std::fill_n(block.content.data() + piece.offset, piece.bytes, kData);
        if (machine.settings.race) {
            std::fill_n(block.cells.cells().writes + piece.offset / 2, (piece.bytes + 1) / 2, written);
        }
    }
    complete_bytes(machine, block, mbarrier, copy.bytes);
}

void check_load(Warp& warp, const BulkCopy& copy) {
    const Settings& settings = warp.machine->settings;
    Touch written(warp, *copy.instruction, copy.block->cells.cells(), copy.block, kAsync);
    AsyncRead shared_source(warp, *copy.instruction);
    for (const Piece& piece : copy.pieces) {
        if (settings.check) {
            write_content(warp, *copy.instruction, *copy.block, piece.offset, piece.bytes);
            std::fill_n(copy.block->content.data() + piece.offset, piece.bytes, kInFlight);
        }
        if (settings.race) {
            written.write(piece.offset, piece.bytes, static_cast<u32>(copy.lane), nullptr, nullptr);
        }
        if (piece.outside) {
            continue;
        }
        if (copy.source) {
            shared_source.issue(*copy.source, static_cast<u32>(piece.other), piece.bytes);
            continue;
        }
        Segment from;
        if (settings.race && find_global(warp, *copy.instruction, piece.other, piece.bytes, "read", from)) {
            Touch(warp, *copy.instruction, from.cells, nullptr, kAsync)
                .read(piece.other - from.base, piece.bytes, static_cast<u32>(copy.lane));
        }
    }
}

// Writes to global memory what a store has read.
void write_out(BulkCopy& copy) {
    if (copy.written) {
        return;
    }
    copy.written = true;
    for (const Piece& piece : copy.pieces) {
        uint8_t* to = reinterpret_cast<uint8_t*>(piece.other);
        const uint8_t* from = copy.block->shared.data() + piece.offset;
        reduce_bytes(copy.reduction, static_cast<TensorMapType>(copy.type), to, from, piece.bytes);
    }
}

void check_store(Warp& warp, const BulkCopy& copy) {
    AsyncRead read(warp, *copy.instruction);
    const uint8_t traits = copy.reduction == Reduction::kNone ? kAsync : kAsync | kAtomic;
    for (const Piece& piece : copy.pieces) {
        read.issue(*copy.block, piece.offset, piece.bytes);
        Segment to;
        if (warp.machine->settings.race &&
            find_global(warp, *copy.instruction, piece.other, piece.bytes, "write", to)) {
            Touch(warp, *copy.instruction, to.cells, nullptr, traits)
                .write(piece.other - to.base, piece.bytes, static_cast<u32>(copy.lane), nullptr, nullptr);
        }
    }
}

// The store has read its source.
void finish_read(Warp& warp, BulkQueue::Item& item) {
    if (item.read) {
        return;
    }
    item.read = true;
    AsyncRead read(warp, *item.copy.instruction);
    for (const Piece& piece : item.copy.pieces) {
        read.finish(*item.copy.block, piece.offset, piece.bytes, item.copy.issued, Kind::kUnfinishedCopy);
    }
    write_out(item.copy);
}

// What it wrote is an access of now, for those who synchronise with the one that waited.
void finish_write(Warp& warp, const BulkCopy& copy) {
    if (!warp.machine->settings.race) {
        return;
    }
    const uint8_t traits = copy.reduction == Reduction::kNone ? kAsync : kAsync | kAtomic;
    const u32 number = warp.number(*copy.instruction, traits);
    for (const Piece& piece : copy.pieces) {
        Segment to;
        if (find_global(warp, *copy.instruction, piece.other, piece.bytes, "write", to)) {
            std::fill_n(to.cells.writes + (piece.other - to.base) / 2, (piece.bytes + 1) / 2,
                        stamp(number, static_cast<u32>(copy.lane)));
        }
    }
}

// Bulk copies without a tensor: dst, src, bytes.
bool check_units(Warp& warp, const Instruction& instruction, u64 to, u64 from, u32 bytes) {
    if ((to | from | bytes) % kBulkUnit) {
        warp.machine->reports.add(Kind::kCopySize, warp.place(instruction), {},
                                  "cp.async.bulk: addresses and bytes (%u) must be multiples of 16", bytes);
        return false;
    }
    return true;
}

template <class F>
void for_lanes(Lanes lanes, F function) {
    for (; lanes; lanes &= lanes - 1) {
        function(__builtin_ctz(lanes));
    }
}

void copy_from_global(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        const u64 source = warp.operand<u64>(instruction, 1)[lane];
        const u32 bytes = warp.operand<u32>(instruction, 2)[lane];
        const u32 mask = instruction.operands[4] >= 0 ? warp.operand<u32>(instruction, 4)[lane] & 0xffff : 0;
        const u64 destination = warp.operand<u32>(instruction, 0)[lane];
        Segment from;
        if (!check_units(warp, instruction, destination, source, bytes) ||
            !find_global(warp, instruction, source, bytes, "read", from)) {
            return;
        }
        const u64 mbarrier = warp.operand<u32>(instruction, 3)[lane];
        for (const Destination& to : destinations(warp, instruction, destination, mbarrier, mask)) {
            BulkCopy copy{&instruction, to.block, {{to.offset, bytes, source}}, bytes, lane};
            copy.mbarrier = to.mbarrier;
            load_bulk(warp, std::move(copy));
        }
    });
}

void copy_between_blocks(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        const u32 source = warp.operand<u32>(instruction, 1)[lane];
        const u32 bytes = warp.operand<u32>(instruction, 2)[lane];
        const u64 destination = warp.operand<u32>(instruction, 0)[lane];
        if (!check_units(warp, instruction, destination, source, bytes)) {
            return;
        }
        const u64 mbarrier = warp.operand<u32>(instruction, 3)[lane];
        for (const Destination& to : destinations(warp, instruction, destination, mbarrier, 0)) {
            BulkCopy copy{&instruction, to.block, {{to.offset, bytes, source & kOffsetMask}}, bytes, lane};
            copy.mbarrier = to.mbarrier;
            copy.source = warp.block;
            load_bulk(warp, std::move(copy));
        }
    });
}

void copy_to_global(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        const u64 destination = warp.operand<u64>(instruction, 0)[lane];
        const u32 source = warp.operand<u32>(instruction, 1)[lane];
        const u32 bytes = warp.operand<u32>(instruction, 2)[lane];
        Segment to;
        if (check_units(warp, instruction, destination, source, bytes) &&
            find_global(warp, instruction, destination, bytes, "write", to)) {
            store_bulk(warp, {&instruction,
                              warp.block,
                              {{static_cast<u32>(source & kOffsetMask), bytes, destination}},
                              bytes,
                              lane});
        }
    });
}

void commit(Warp& warp, const Instruction&, Lanes lanes) {
    BulkQueue& queue = warp.bulk_copies;
    for (BulkQueue::Item& item : queue.items) {
        if (item.group < 0 && (lanes >> item.copy.lane & 1)) {
            item.group = queue.groups[item.copy.lane];
        }
    }
    for_lanes(lanes, [&](int lane) { ++queue.groups[lane]; });
}

void wait(Warp& warp, const Instruction& instruction, Lanes lanes) {
    BulkQueue& queue = warp.bulk_copies;
    auto keep = queue.items.begin();
    for (BulkQueue::Item& item : queue.items) {
        const int lane = item.copy.lane;
        const bool due = (lanes >> lane & 1) && item.group >= 0 && item.group < queue.groups[lane] - instruction.imm;
        if (due) {
            finish_read(warp, item);
        }
        if (due && !instruction.has(kRead)) {
            finish_write(warp, item.copy);
            continue;
        }
        if (&*keep != &item) {
            *keep = std::move(item);
        }
        ++keep;
    }
    queue.items.erase(keep, queue.items.end());
}

}  // namespace

std::vector<Destination> destinations(Warp& warp, const Instruction& instruction, u64 address, u64 mbarrier, u32 mask) {
    std::vector<Destination> result;
    u32 offset = 0, mbarrier_offset = 0;
    Block* block = shared_block(warp, instruction, address, offset);
    const Block* counting = shared_block(warp, instruction, mbarrier, mbarrier_offset);
    if (!block || !counting) {
        return result;
    }
    if (!mask) {
        if (block != counting) {
            throw Fault(warp.place(instruction), "a bulk copy's mbarrier must be in the block that it copies to");
        }
        return {{block, offset, mbarrier_offset}};
    }
    const auto& blocks = warp.block->cluster->blocks;
    for (u32 rank = 0; rank < blocks.size(); ++rank) {
        if (mask >> rank & 1) {
            result.push_back({blocks[rank].get(), offset, mbarrier_offset});
        }
    }
    return result;
}

void load_bulk(Warp& warp, BulkCopy copy) {
    Machine& machine = *warp.machine;
    for (const Piece& piece : copy.pieces) {
        if (piece.offset + static_cast<u64>(piece.bytes) > copy.block->shared.size()) {
            machine.reports.add(Kind::kSharedBounds, warp.place(*copy.instruction), {},
                                "bulk copy of %u bytes to %u out of bounds: there are %zu bytes", piece.bytes,
                                piece.offset, copy.block->shared.size());
            return;
        }
    }
    const auto found = copy.block->mbarriers.find(copy.mbarrier);
    if (found == copy.block->mbarriers.end()) {
        machine.reports.add(Kind::kMbarrier, warp.place(*copy.instruction), {},
                            "no mbarrier was initialised at the address that the copy names");
        return;
    }
    if (machine.settings.check) {
        check_load(warp, copy);
    }
    // Who waits already will not ask again.
    if (machine.happens_at_once() || !found->second.waiting.empty()) {
        land(machine, copy, found->second);
    } else {
        found->second.copies.push_back(std::move(copy));
    }
}

void store_bulk(Warp& warp, BulkCopy copy) {
    if (warp.machine->settings.check) {
        check_store(warp, copy);
    }
    // Whatever is written from now on has a number of its own.
    warp.block->fresh_from = warp.machine->accesses.next();
    copy.issued = {warp.block->fresh_from, warp.order.clock};
    if (warp.machine->happens_at_once()) {
        write_out(copy);
    }
    warp.bulk_copies.items.push_back({std::move(copy), -1});
}

void land_copies(Machine& machine, Mbarrier& mbarrier) {
    std::vector<BulkCopy> copies;
    copies.swap(mbarrier.copies);
    for (BulkCopy& copy : copies) {
        land(machine, copy, mbarrier);
    }
}

void finish_bulk_copies(Warp& warp) {
    for (BulkQueue::Item& item : warp.bulk_copies.items) {
        if (!item.read) {
            warp.machine->reports.add(Kind::kUnfinishedCopy, warp.place(*item.copy.instruction), {},
                                      "the warp exits before its bulk copy has read shared memory: "
                                      "cp.async.bulk.wait_group is missing");
        }
        finish_read(warp, item);
        finish_write(warp, item.copy);
    }
    warp.bulk_copies.clear();
}

void check_unfinished_loads(Warp& warp) {
    for (const auto& [offset, mbarrier] : warp.block->mbarriers) {
        for (const BulkCopy& copy : mbarrier.copies) {
            warp.machine->reports.add(Kind::kUnfinishedCopy, warp.place(*copy.instruction), {},
                                      "the block exits while a bulk copy to its shared memory is on its way");
        }
    }
}

void add_bulk_copies(Ops& ops) {
    ops.add("cp.async.bulk.shared.global", copy_from_global);
    ops.add("cp.async.bulk.shared.shared", copy_between_blocks);
    ops.add("cp.async.bulk.global.shared", copy_to_global);
    ops.add("cp.async.bulk.commit_group", commit);
    ops.add("cp.async.bulk.wait_group", wait);
}

}  // namespace ptx

// cp.async: copies of a thread from global to shared memory.
#include "async_copies.h"

#include <algorithm>
#include <optional>

#include "memory.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

void land(Warp& warp, Copy& copy) {
    if (copy.landed) {
        return;
    }
    copy.landed = true;
    const u32 size = copy.instruction->size;
    for (Lanes lanes = copy.lanes; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        uint8_t bytes[16] = {};
        std::memcpy(bytes, reinterpret_cast<const void*>(copy.source[lane]), copy.bytes[lane]);
        std::memcpy(warp.block->shared.data() + copy.destination[lane], bytes, size);
    }
}

// Marks what a copy wrote as done by the one with this stamp of lane 0.
template <class F>
void settle(Warp& warp, Copy& copy, F stamp_of) {
    land(warp, copy);
    const u32 size = copy.instruction->size;
    const Settings& settings = warp.machine->settings;
    const Cells& cells = warp.block->cells.cells();
    for (Lanes lanes = copy.lanes; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const u32 offset = copy.destination[lane];
        if (settings.check) {
            std::fill_n(warp.block->content.data() + offset, size, kData);
        }
        if (settings.race) {
            std::fill_n(cells.writes + offset / 2, size / 2, stamp_of(lane));
        }
    }
}

void settle_for_warp(Warp& warp, Copy& copy) {
    // The wait makes it an access of now.
    const u32 number = warp.machine->settings.race ? warp.number(*copy.instruction, kCopy) : 0;
    settle(warp, copy, [number](int lane) { return stamp(number, lane); });
}

// Lanes that copy nothing and only write zeros have no source.
u32 bytes_of(Warp& warp, const Instruction& instruction, int lane) {
    const bool ignored = instruction.operands[3] >= 0 && (*warp.operand<Lanes>(instruction, 3) >> lane & 1) != 0;
    if (ignored) {
        return 0;
    }
    const u32 bytes = instruction.operands[2] >= 0 ? warp.operand<u32>(instruction, 2)[lane] : instruction.size;
    if (bytes > instruction.size) {
        warp.machine->reports.add(Kind::kCopySize, warp.place(instruction), {}, "cp.async of %u bytes into %u", bytes,
                                  instruction.size);
        return instruction.size;
    }
    return bytes;
}

// Whether the lane's copy may happen; its source's segment, unless it has none.
bool check_copy(Warp& warp, const Instruction& instruction, const Copy& copy, int lane, u64 address, Segment& from) {
    const u32 bytes = copy.bytes[lane];
    Segment to;
    if (!find_shared(warp, instruction, address, instruction.size, "write", to) ||
        (bytes && !find_global(warp, instruction, copy.source[lane], bytes, "read", from))) {
        return false;
    }
    if (warp.machine->settings.check) {
        check_alignment(warp, instruction, to, address, instruction.size);
        if (bytes) {
            check_alignment(warp, instruction, from, copy.source[lane], instruction.size);
        }
        write_content(warp, instruction, *to.block, copy.destination[lane], instruction.size);
        std::fill_n(to.block->content.data() + copy.destination[lane], instruction.size, kInFlight);
    }
    return true;
}

void copy_async(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const u32* destinations = warp.operand<u32>(instruction, 0);
    const u64* sources = warp.operand<u64>(instruction, 1);
    warp.copies.copies.emplace_back();
    Copy& copy = warp.copies.copies.back();
    copy.instruction = &instruction;
    copy.landed = false;
    copy.lanes = 0;
    std::optional<Touch> written, read;
    if (warp.machine->settings.race) {
        written.emplace(warp, instruction, warp.block->cells.cells(), warp.block, kCopy);
    }
    for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const u64 address = destinations[lane] + static_cast<u32>(instruction.imm);
        copy.bytes[lane] = static_cast<uint8_t>(bytes_of(warp, instruction, lane));
        copy.source[lane] = sources[lane] + static_cast<u64>(instruction.imm2);
        copy.destination[lane] = static_cast<u32>(address & kOffsetMask);
        Segment from;
        if (!check_copy(warp, instruction, copy, lane, address, from)) {
            continue;
        }
        copy.lanes |= 1u << lane;
        if (!written) {
            continue;
        }
        written->write(copy.destination[lane], instruction.size, lane, nullptr, nullptr);
        if (copy.bytes[lane]) {
            if (!read || read->cells.writes != from.cells.writes) {
                read.emplace(warp, instruction, from.cells, nullptr, kCopy);
            }
            read->read(copy.source[lane] - from.base, copy.bytes[lane], lane);
        }
    }
    if (warp.machine->happens_at_once()) {
        land(warp, copy);
    }
}

void commit(Warp& warp, const Instruction&, Lanes) { warp.copies.groups.push_back(warp.copies.copies.size()); }

void settle_until(Warp& warp, size_t end) {
    CopyQueue& queue = warp.copies;
    for (; queue.first_copy < end; ++queue.first_copy) {
        settle_for_warp(warp, queue.copies[queue.first_copy]);
    }
    if (queue.empty() && queue.first_group == queue.groups.size()) {
        queue.clear();
    }
}

void wait_group(Warp& warp, const Instruction& instruction, Lanes) {
    CopyQueue& queue = warp.copies;
    while (queue.groups.size() - queue.first_group > static_cast<size_t>(instruction.imm)) {
        const size_t end = queue.groups[queue.first_group++];
        settle_until(warp, end);
    }
}

void wait_all(Warp& warp, const Instruction&, Lanes) { settle_all(warp); }

}  // namespace

void settle_all(Warp& warp) {
    warp.copies.first_group = warp.copies.groups.size();
    settle_until(warp, warp.copies.copies.size());
}

void settle_with(Warp& warp, Stamp written) {
    for (; !warp.copies.empty(); ++warp.copies.first_copy) {
        settle(warp, warp.copies.copies[warp.copies.first_copy], [written](int) { return written; });
    }
    warp.copies.clear();
}

void add_copies(Ops& ops) {
    ops.add("cp.async", copy_async);
    ops.add("cp.async.commit_group", commit);
    ops.add("cp.async.wait_group", wait_group);
    ops.add("cp.async.wait_all", wait_all);
}

}  // namespace ptx

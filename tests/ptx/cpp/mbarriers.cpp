// mbarrier: arrivals and bytes that a phase expects, and who waits for it.
#include "mbarriers.h"

#include <algorithm>

#include "async_copies.h"
#include "bulk.h"
#include "lanewise.h"
#include "memory.h"
#include "sync.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

constexpr u32 kMostCount = (1 << 20) - 1;

u64 address_of(Warp& warp, const Instruction& instruction, int operand, int lane) {
    return warp.operand<u32>(instruction, operand)[lane] + static_cast<u32>(instruction.imm);
}

void misuse(Warp& warp, const Instruction& instruction, const char* what) {
    warp.machine->reports.add(Kind::kMbarrier, warp.place(instruction), {}, "%s", what);
}

void complete_if_due(Machine& machine, Block& block, Mbarrier& mbarrier) {
    if (mbarrier.pending || mbarrier.bytes) {
        return;
    }
    // What its copies have written in this phase, its waiters know.
    Row& row = mbarrier.arrived.row(block.home);
    row.resize(std::max<size_t>(row.size(), mbarrier.slot + 1));
    row[mbarrier.slot].join({mbarrier.clock() + 1, 0, 0});
    mbarrier.released.join(mbarrier.arrived);
    std::vector<u32>& proxied = mbarrier.released_proxied;
    proxied.resize(std::max(proxied.size(), mbarrier.arrived_proxied.size()));
    for (size_t i = 0; i < mbarrier.arrived_proxied.size(); ++i) {
        proxied[i] = std::max(proxied[i], mbarrier.arrived_proxied[i]);
    }
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.expected;
    std::vector<Warp*> waiting;
    waiting.swap(mbarrier.waiting);
    for (Warp* warp : waiting) {
        machine.wake(*warp);
    }
}

template <class F>
void for_lanes(Lanes lanes, F function) {
    for (; lanes; lanes &= lanes - 1) {
        function(__builtin_ctz(lanes));
    }
}

void init(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        const u64 address = address_of(warp, instruction, 0, lane);
        const u32 count = warp.operand<u32>(instruction, 1)[lane];
        Segment segment;
        if (!find_shared(warp, instruction, address, kMbarrierBytes, "write", segment)) {
            return;
        }
        const u64 offset = address - segment.base;
        check_alignment(warp, instruction, segment, address, kMbarrierBytes);
        if (count == 0 || count > kMostCount) {
            misuse(warp, instruction, "mbarrier.init with a count that is not from 1 to 2^20 - 1");
        }
        write_content(warp, instruction, *segment.block, offset, kMbarrierBytes);
        std::fill_n(segment.block->content.data() + offset, kMbarrierBytes, kBarrierObject);
        if (warp.machine->settings.race) {
            Touch(warp, instruction, segment.cells, segment.block)
                .write(offset, kMbarrierBytes, lane, nullptr, nullptr);
        }
        if (segment.block->slots >= kSlots) {
            throw Fault(warp.place(instruction), "more mbarriers in a block than are modelled");
        }
        Mbarrier mbarrier;
        mbarrier.slot = segment.block->slots++;
        mbarrier.expected = mbarrier.pending = count;
        segment.block->mbarriers[static_cast<u32>(offset)] = std::move(mbarrier);
    });
}

void invalidate(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        const FoundMbarrier found = find_mbarrier(warp, instruction, address_of(warp, instruction, 0, lane), lane);
        if (!found.mbarrier) {
            return;
        }
        if (!found.mbarrier->waiting.empty() || !found.mbarrier->copies.empty()) {
            misuse(warp, instruction, "mbarrier.inval of one that is being waited for or has copies on their way");
        }
        const u32 offset = static_cast<u32>(address_of(warp, instruction, 0, lane) & kOffsetMask);
        std::fill_n(found.block->content.data() + offset, kMbarrierBytes, kNothing);
        found.block->mbarriers.erase(offset);
    });
}

// Bits 0 to 31: the phase; from 32 on: arrivals that were missing.
u64 state_of(const Mbarrier& mbarrier) { return static_cast<u64>(mbarrier.pending) << 32 | mbarrier.phase; }

enum class Arrival { kPlain, kDrop };

// expects: the last operand is bytes rather than a count.
template <Arrival kArrival, bool kExpects>
void arrive(Warp& warp, const Instruction& instruction, Lanes lanes) {
    u64 states[kLanes] = {};
    // One release of all lanes, since they arrive with one instruction.
    const bool releases = instruction.has(kRelease);
    const Rows mine = releases ? publish(warp, lanes) : Rows();
    for_lanes(lanes, [&](int lane) {
        const FoundMbarrier found = find_mbarrier(warp, instruction, address_of(warp, instruction, 1, lane), lane);
        if (!found.mbarrier) {
            return;
        }
        Mbarrier& mbarrier = *found.mbarrier;
        const u32 value = instruction.operands[2] >= 0 ? warp.operand<u32>(instruction, 2)[lane] : 1;
        const u32 count = kExpects ? 1 : value;
        states[lane] = state_of(mbarrier);
        mbarrier.bytes += kExpects ? value : 0;
        if (count > mbarrier.pending) {
            misuse(warp, instruction, "more arrivals than the mbarrier's phase expects");
        }
        mbarrier.pending -= std::min(count, mbarrier.pending);
        mbarrier.expected -= kArrival == Arrival::kDrop ? count : 0;
        if (releases) {
            mbarrier.arrived.join(mine);
            std::vector<u32>& proxied = mbarrier.arrived_proxied;
            proxied.resize(std::max(proxied.size(), warp.order.proxied.size()));
            for (size_t i = 0; found.block == warp.block && i < warp.order.proxied.size(); ++i) {
                proxied[i] = std::max(proxied[i], warp.order.proxied[i]);
            }
        }
        complete_if_due(*warp.machine, *found.block, mbarrier);
    });
    if (instruction.operands[0] >= 0) {
        store(warp.operand<u64>(instruction, 0), states, lanes);
    }
}

void expect(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        const FoundMbarrier found = find_mbarrier(warp, instruction, address_of(warp, instruction, 0, lane), lane);
        if (found.mbarrier) {
            found.mbarrier->bytes += warp.operand<u32>(instruction, 1)[lane];
        }
    });
}

void complete(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        const FoundMbarrier found = find_mbarrier(warp, instruction, address_of(warp, instruction, 0, lane), lane);
        if (found.mbarrier) {
            complete_bytes(*warp.machine, *found.block, *found.mbarrier, warp.operand<u32>(instruction, 1)[lane]);
        }
    });
}

bool is_complete(const Mbarrier& mbarrier, bool parity, u64 which) {
    return parity ? (mbarrier.phase & 1) != (which & 1) : mbarrier.phase != static_cast<u32>(which);
}

// try_wait blocks as long as none of its lanes' phases is complete; test_wait gives its turn away.
template <bool kBlocks, bool kParity>
void wait(Warp& warp, const Instruction& instruction, Lanes lanes) {
    warp.again = false;
    Lanes complete = 0;
    Mbarrier* missing = nullptr;
    // Lanes that wait for the same one learn the same at once: all of them, and so does the warp.
    const Mbarrier* common = nullptr;
    Lanes together = 0;
    const auto learn = [&] {
        if (together) {
            acquire(warp, together, common->released);
        }
        together = 0;
    };
    for_lanes(lanes, [&](int lane) {
        const FoundMbarrier found = find_mbarrier(warp, instruction, address_of(warp, instruction, 1, lane), lane);
        if (!found.mbarrier) {
            complete |= 1u << lane;
            return;
        }
        Mbarrier& mbarrier = *found.mbarrier;
        const u64 which = kParity ? warp.operand<u32>(instruction, 2)[lane] : warp.operand<u64>(instruction, 2)[lane];
        if (!is_complete(mbarrier, kParity, which)) {
            land_copies(*warp.machine, mbarrier);
        }
        if (!is_complete(mbarrier, kParity, which)) {
            missing = &mbarrier;
            return;
        }
        complete |= 1u << lane;
        if (instruction.has(kAcquire)) {
            if (common != &mbarrier) {
                learn();
            }
            common = &mbarrier;
            together |= 1u << lane;
            std::vector<u32>& proxied = warp.order.proxied;
            proxied.resize(std::max(proxied.size(), mbarrier.released_proxied.size()));
            for (size_t i = 0; found.block == warp.block && i < mbarrier.released_proxied.size(); ++i) {
                proxied[i] = std::max(proxied[i], mbarrier.released_proxied[i]);
            }
        }
    });
    learn();
    if (kBlocks && !complete) {
        warp.again = true;
        warp.state = State::kMbarrier;
        missing->waiting.push_back(&warp);
        return;
    }
    warp.turn_over = complete != lanes;
    store_predicate(warp, instruction, 0, complete, lanes);
}

void pending_count(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const u64* states = warp.operand<u64>(instruction, 1);
    u32 values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        values[i] = static_cast<u32>(states[i] >> 32);
    }
    store(warp.operand<u32>(instruction, 0), values, lanes);
}

// Arrives once the warp's cp.async so far are done, which is now. Unless .noinc, the phase expects one arrival more.
void arrive_after_copies(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        const FoundMbarrier found = find_mbarrier(warp, instruction, address_of(warp, instruction, 0, lane), lane);
        if (!found.mbarrier) {
            return;
        }
        Mbarrier& mbarrier = *found.mbarrier;
        if (warp.machine->settings.race) {
            const Agent by = agent(found.block->home, mbarrier.slot);
            const u32 number = warp.machine->accesses.add(by, mbarrier.clock(), instruction.line, kCopy);
            note_foreign(*warp.block, {number, by, mbarrier.clock()});
            settle_with(warp, stamp(number, kManyLanes));
        } else {
            settle_all(warp);
        }
        mbarrier.pending -= instruction.has(kNoIncrement) ? std::min(1u, mbarrier.pending) : 0;
        complete_if_due(*warp.machine, *found.block, mbarrier);
    });
}

}  // namespace

FoundMbarrier find_mbarrier(Warp& warp, const Instruction& instruction, u64 address, u32 lane) {
    u32 offset = 0;
    Block* block = shared_block(warp, instruction, address, offset);
    if (!block) {
        return {};
    }
    const auto at = block->mbarriers.find(offset);
    if (at == block->mbarriers.end()) {
        misuse(warp, instruction, "no mbarrier was initialised at this address");
        return {};
    }
    if (warp.machine->settings.race) {
        // Its initialisation must have been seen.
        Touch(warp, instruction, block->cells.cells(), block, kAtomic).read(offset, kMbarrierBytes, lane);
    }
    return {block, &at->second};
}

void complete_bytes(Machine& machine, Block& block, Mbarrier& mbarrier, u32 bytes) {
    mbarrier.bytes -= bytes;
    complete_if_due(machine, block, mbarrier);
}

void add_mbarriers(Ops& ops) {
    ops.add("mbarrier.init", init);
    ops.add("mbarrier.inval", invalidate);
    ops.add("mbarrier.arrive", arrive<Arrival::kPlain, false>);
    ops.add("mbarrier.arrive_drop", arrive<Arrival::kDrop, false>);
    ops.add("mbarrier.arrive.expect_tx", arrive<Arrival::kPlain, true>);
    ops.add("mbarrier.arrive_drop.expect_tx", arrive<Arrival::kDrop, true>);
    ops.add("mbarrier.expect_tx", expect);
    ops.add("mbarrier.complete_tx", complete);
    ops.add("mbarrier.test_wait", wait<false, false>, Control::kYields);
    ops.add("mbarrier.try_wait", wait<true, false>, Control::kYields);
    ops.add("mbarrier.test_wait.parity", wait<false, true>, Control::kYields);
    ops.add("mbarrier.try_wait.parity", wait<true, true>, Control::kYields);
    ops.add("mbarrier.pending_count", pending_count);
    ops.add("cp.async.mbarrier.arrive", arrive_after_copies);
}

}  // namespace ptx

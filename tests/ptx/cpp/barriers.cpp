// Named barriers of a block: bar.sync, bar.arrive, bar.red.
#include "barriers.h"

#include "lanewise.h"
#include "sync.h"

namespace ptx {
namespace {

NamedBarrier& named(Warp& warp, const Instruction& instruction, int operand) {
    const uint32_t id = warp.operand<uint32_t>(instruction, operand)[0];
    if (id >= kNamedBarriers) {
        throw Fault(warp.place(instruction), text("barrier %u: there are 16", id));
    }
    return warp.block->barriers[id];
}

// Counts a warp's threads at a barrier.
void arrive(Warp& warp, const Instruction& instruction, NamedBarrier& barrier, int count_operand) {
    const bool everybody = instruction.operands[count_operand] < 0;
    const uint32_t threads = everybody ? 0 : warp.operand<uint32_t>(instruction, count_operand)[0];
    if (!everybody && (threads % kLanes || threads == 0)) {
        throw Fault(warp.place(instruction), text("a barrier of %u threads: it must be a multiple of 32", threads));
    }
    if (barrier.arrived && (barrier.everybody != everybody || barrier.expected != threads)) {
        warp.machine->reports.add(Kind::kBarrierCount, warp.place(instruction),
                                  {barrier.line, warp.block->grid->number},
                                  "%u threads at a barrier at which others expect %u", threads, barrier.expected);
    }
    barrier.everybody = everybody;
    barrier.expected = threads;
    barrier.line = instruction.line;
    barrier.arrived += kLanes;
}

void finish(Block& block, NamedBarrier& barrier) {
    const bool everybody = barrier.waiting.size() == block.live;
    synchronise_block(barrier.waiting, everybody, &barrier.arrivals, &barrier.arrivals_proxied);
    for (Warp* warp : barrier.waiting) {
        warp->machine->wake(*warp);
    }
    barrier.arrived = barrier.expected = 0;
    barrier.waiting.clear();
    barrier.arrivals = View();
    barrier.arrivals_proxied.clear();
    barrier.votes = barrier.now;
    barrier.now = {};
}

void finish_if_complete(Block& block, NamedBarrier& barrier) {
    const uint32_t expected = barrier.everybody ? block.live * kLanes : barrier.expected;
    if (barrier.arrived && barrier.arrived >= expected) {
        finish(block, barrier);
    }
}

void wait_here(Warp& warp, const Instruction& instruction, NamedBarrier& barrier, int count_operand) {
    arrive(warp, instruction, barrier, count_operand);
    barrier.waiting.push_back(&warp);
    warp.state = State::kBarrier;
    finish_if_complete(*warp.block, barrier);
}

void sync(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "bar.sync");
    wait_here(warp, instruction, named(warp, instruction, 0), 1);
}

void arrive_only(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "bar.arrive");
    NamedBarrier& barrier = named(warp, instruction, 0);
    arrive(warp, instruction, barrier, 1);
    leave(warp, barrier.arrivals, barrier.arrivals_proxied);
    finish_if_complete(*warp.block, barrier);
}

enum class Vote { kCount, kAll, kAny };

// Executed twice: the warp votes and waits, then reads the result.
template <Vote kVote>
void reduce(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "bar.red");
    NamedBarrier& barrier = named(warp, instruction, 1);
    if (!warp.again) {
        const Lanes votes = load_predicate(warp, instruction, 3);
        barrier.now.count += __builtin_popcount(votes);
        barrier.now.all = barrier.now.all && votes == kAllLanes;
        barrier.now.any = barrier.now.any || votes != 0;
        warp.again = true;
        wait_here(warp, instruction, barrier, 2);
        return;
    }
    warp.again = false;
    if (kVote == Vote::kCount) {
        uint32_t values[kLanes];
        std::fill_n(values, kLanes, barrier.votes.count);
        store(warp.operand<uint32_t>(instruction, 0), values, lanes);
        return;
    }
    const bool result = kVote == Vote::kAll ? barrier.votes.all : barrier.votes.any;
    store_predicate(warp, instruction, 0, result ? kAllLanes : 0, lanes);
}

}  // namespace

void finish_barriers(Block& block) {
    for (NamedBarrier& barrier : block.barriers) {
        if (barrier.arrived && barrier.everybody) {
            finish_if_complete(block, barrier);
        }
    }
}

void reset_barriers(Block& block) {
    for (NamedBarrier& barrier : block.barriers) {
        barrier.arrived = barrier.expected = 0;
        barrier.waiting.clear();
        barrier.arrivals = View();
        barrier.arrivals_proxied.clear();
        barrier.now = {};
    }
}

void add_barriers(Ops& ops) {
    ops.add("bar.sync", sync, Control::kYields);
    ops.add("bar.arrive", arrive_only);
    ops.add("bar.red.popc", reduce<Vote::kCount>, Control::kYields);
    ops.add("bar.red.and", reduce<Vote::kAll>, Control::kYields);
    ops.add("bar.red.or", reduce<Vote::kAny>, Control::kYields);
}

}  // namespace ptx

// Happens-before: which accesses an agent may rely on, by vector clocks.
//
// Agents are warps, and mbarriers as those that complete copies. An agent's clock advances whenever others may learn
// what it has done so far. What lanes of a warp have done is known to each other after a barrier or bar.warp.sync.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"

namespace ptx {

// A block's number within the run in the upper bits, its warp's or mbarrier's in the lower ones.
using Agent = uint32_t;
constexpr int kSlotBits = 7;
constexpr uint32_t kSlots = 1 << kSlotBits;

constexpr Agent agent(uint32_t home, uint32_t slot) { return home << kSlotBits | slot; }
constexpr uint32_t home_of(Agent agent) { return agent >> kSlotBits; }
constexpr uint32_t slot_of(Agent agent) { return agent & (kSlots - 1); }

// How much of one agent is known: all accesses at clocks below `all`, and those of `lanes` up to `some` inclusive.
struct Seen {
    uint32_t all = 0, some = 0;
    Lanes lanes = 0;

    void join(const Seen& other) {
        all = all > other.all ? all : other.all;
        if (other.some == some) {
            lanes |= other.lanes;
        } else if (other.some > some) {
            some = other.some;
            lanes = other.lanes;
        }
    }
    // lane: -1 for any.
    bool covers(uint32_t clock, int lane) const {
        return clock < all || (clock <= some && (lane < 0 ? lanes != 0 : (lanes >> lane & 1) != 0));
    }
};

// What is known of the agents of one block.
using Row = std::vector<Seen>;
void join(Row& row, const Row& other);

// What is known of blocks, sorted by home.
struct Rows {
    std::vector<uint32_t> homes;
    std::vector<Row> rows;

    const Seen* find(Agent agent) const;
    Row& row(uint32_t home);
    void join(const Rows& other);
    void clear();
};

// What a warp knows: of its own block, and of others. Others' rows are shared until they change.
struct View {
    Row own;
    std::shared_ptr<const Rows> others;

    void join(const View& other);
    // Rows of any blocks; home: the own one.
    void join(const Rows& rows, uint32_t home);
    bool covers(Agent agent, uint32_t clock, int lane, uint32_t home) const;
};

// The clocks of one warp.
struct Order {
    uint32_t clock = 1;
    // clock at the last point where the warp's lanes were synchronised.
    uint32_t synchronised = 1;
    View view;
    // What only `acquirers` know, until the warp is synchronised; everything in view besides.
    View acquired;
    Lanes acquirers = 0;
    // What lanes have read by relaxed atomics: a fence turns it into knowledge.
    std::shared_ptr<Rows> unfenced;
    // What they had done by their last fence: their relaxed atomics publish it.
    std::shared_ptr<Rows> fenced;
    // Clocks of the block's warps up to which writes have passed fence.proxy.async.
    std::vector<uint32_t> proxied;
    // The last acquisition, which a loop that spins repeats.
    struct Acquired {
        uint64_t key = 0, version = 0;
        Lanes lanes = 0;
        bool acquires = false;

        bool operator==(const Acquired&) const = default;
    } last_acquired;

    void reset(uint32_t slots);
    const View& seen_by(int lane) const { return lane >= 0 && (acquirers >> lane & 1) ? acquired : view; }
};

}  // namespace ptx

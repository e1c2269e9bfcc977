// The state of a run: grids, blocks, warps.
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "accesses.h"
#include "copies.h"
#include "mbarrier.h"
#include "order.h"
#include "program.h"
#include "reports.h"
#include "wgmma_queue.h"

namespace ptx {

struct Block;
struct Cluster;
struct GridRun;
struct Machine;

enum class State : uint8_t { kRunning, kBarrier, kClusterBarrier, kDependency, kMbarrier, kDone };

// Lanes that diverged and wait for their turn. held: until others meet them, or cannot, since they stand before what
// only a whole warp can execute.
struct Path {
    uint32_t pc;
    Lanes lanes;
    bool held = false;
};

struct Warp {
    Block* block = nullptr;
    Machine* machine = nullptr;
    uint8_t* registers = nullptr;
    uint32_t id = 0, pc = 0;
    Lanes active = kAllLanes;
    State state = State::kRunning;
    // Set by a handler to let others go on.
    bool turn_over = false;
    // Set by a handler whose instruction is to be executed again once the warp is woken.
    bool again = false;
    std::vector<Path> paths;

    Order order;
    // Accesses below these numbers: of other warps to shared memory, by other lanes of this one, of earlier grids.
    uint32_t shared_floor = 0, lane_floor = 0, global_floor = 0;
    // Writes to shared memory below the first had passed fence.proxy.async when it executed its last one; of all warps,
    // below the second.
    uint32_t proxy_fenced = 0, proxy_floor = 0;
    // Blocks below this one are of grids that have completed, as far as this warp may know.
    uint32_t earliest_home = 0;

    struct Number {
        uint32_t line = 0, clock = 0, number = 0;
        uint8_t traits = 0;
    };
    std::array<Number, 64> numbers;

    // barrier.cluster: has arrived, and in which phase.
    bool cluster_arrived = false;
    uint32_t cluster_phase = 0;

    CopyQueue copies;
    BulkQueue bulk_copies;
    WgmmaQueue wgmma;

    template <class T>
    T* at(int32_t offset) {
        return reinterpret_cast<T*>(registers + offset);
    }
    template <class T>
    T* operand(const Instruction& instruction, int index) {
        return at<T>(instruction.operands[index]);
    }

    Agent agent() const;
    Place place(const Instruction& instruction) const;
    // The number of an access that it makes now; the same one for an instruction as long as nobody can tell the
    // difference.
    uint32_t number(const Instruction& instruction, uint8_t traits);
};

// What the bytes of shared memory hold.
enum Content : uint8_t { kNothing = 0, kData = 1, kInFlight = 2, kBarrierObject = 3 };

struct NamedBarrier {
    // Threads; 0 while nobody has arrived.
    uint32_t expected = 0, arrived = 0;
    uint32_t line = 0;
    bool everybody = false;
    std::vector<Warp*> waiting;
    // What those that only arrived know.
    View arrivals;
    std::vector<uint32_t> arrivals_proxied;
    // bar.red: votes so far, and those of the last time.
    struct Votes {
        uint32_t count = 0;
        bool all = true, any = false;
    } now, votes;
};
constexpr uint32_t kNamedBarriers = 16;

// An access that barriers of the block do not order by themselves.
struct ForeignAccess {
    uint32_t number;
    Agent agent;
    uint32_t clock;
};

struct Block {
    GridRun* grid = nullptr;
    Cluster* cluster = nullptr;
    // Number in the run, place in the grid, rank in the cluster.
    uint32_t home = 0, index[3] = {}, rank = 0;
    std::vector<uint8_t> shared;
    std::vector<uint8_t> content;
    CellMemory cells;
    std::vector<Warp> warps;
    std::unique_ptr<uint8_t[]> register_memory;
    size_t register_capacity = 0;
    uint32_t live = 0;
    bool launched_dependents = false;
    // Numbers below were given out before something that later accesses must be told apart from.
    uint32_t fresh_from = 0;
    std::array<NamedBarrier, kNamedBarriers> barriers;
    // Accesses to shared memory by others than its warps: by copies, by other blocks.
    std::vector<ForeignAccess> foreign;
    std::unordered_map<uint32_t, Mbarrier> mbarriers;
    uint32_t slots = 0;
};

inline void note_foreign(Block& block, const ForeignAccess& access) {
    if (block.foreign.empty() || block.foreign.back().number != access.number) {
        block.foreign.push_back(access);
    }
}

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    GridRun* grid = nullptr;
    uint32_t live_blocks = 0, live_warps = 0;
    // Of barrier.cluster: warps that have arrived in this phase, what they know, who waits.
    uint32_t arrived = 0, phase = 0;
    Rows known, completed;
    std::vector<Warp*> waiting;
};

struct GridRun {
    const Grid* launch = nullptr;
    int32_t number = 0;
    uint32_t blocks = 0, clusters = 0, cluster_blocks = 1;
    // Home of its first block. Accesses below these numbers, and blocks below this one, are of grids that are known to
    // have completed when it starts; of all earlier grids, below first_number.
    uint32_t first_home = 0, floor = 0, earliest_home = 0, first_number = 0;
    uint32_t next_cluster = 0, finished_blocks = 0, signalled_blocks = 0;
    bool started = false, completed = false;
    std::vector<uint32_t> order;

    const Program& program() const { return *launch->program; }
    bool uses_clusters() const { return cluster_blocks > 1; }
};

// What an atomic's address has been released with.
struct Released {
    Rows rows;
    // With .cta scope, by the block near_home.
    Rows near;
    uint32_t near_home = ~0u;
    // Changes with every release.
    uint64_t version = 0;
};

struct MemoryRange {
    uint64_t low, high;
    Cells cells;
};

struct Machine {
    Settings settings{};
    Totals totals{};
    Reports reports;
    Accesses accesses;

    std::vector<MemoryRange> ranges;
    CellMemory range_cells;
    std::unordered_map<uint64_t, Released> released;
    uint64_t releases = 0;

    std::vector<GridRun> grids;
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::unique_ptr<Block>> spare_blocks;
    std::vector<Warp*> runnable;
    // Blocks that are live; whether a grid may go on that could not before.
    uint32_t live_blocks = 0;
    bool grids_changed = false;
    uint32_t first_number = 0;
    uint64_t random_state = 0;

    uint64_t random() {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return random_state;
    }
    bool happens_at_once() {
        return settings.asynchronous == kAtOnce || (settings.asynchronous == kAtRandom && (random() >> 20 & 1) != 0);
    }
    // The warp whose turn it is; it is among the runnable ones.
    Warp* current = nullptr;

    void wake(Warp& warp) {
        warp.state = State::kRunning;
        if (&warp != current) {
            runnable.push_back(&warp);
        }
    }
};

inline Agent Warp::agent() const { return ptx::agent(block->home, id); }
inline Place Warp::place(const Instruction& instruction) const { return {instruction.line, block->grid->number}; }

inline uint32_t Warp::number(const Instruction& instruction, uint8_t traits) {
    Number& known = numbers[instruction.line % numbers.size()];
    if (known.line != instruction.line || known.clock != order.clock || known.traits != traits ||
        known.number < block->fresh_from) {
        known = {instruction.line, order.clock, machine->accesses.add(agent(), order.clock, instruction.line, traits),
                 traits};
    }
    return known.number;
}

// Refuses what only a whole warp can execute.
inline void require_whole_warp(const Warp& warp, const Instruction& instruction, Lanes lanes, const char* what) {
    if (lanes != kAllLanes) {
        throw Diverged(warp.place(instruction), std::string(what) + " in divergent code");
    }
}

// Lanes that a member mask names but that do not take part.
void check_members(Warp& warp, const Instruction& instruction, Lanes lanes, int mask_operand);

}  // namespace ptx

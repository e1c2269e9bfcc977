// The grids of a stream: when they may start, and what dependent launch does.
#include <algorithm>

#include "scheduler.h"

namespace ptx {
namespace {

constexpr uint32_t kMostWarps = 32;
constexpr uint32_t kMostHomes = 1u << (32 - kSlotBits);

void check_launch(const Machine& machine, const Grid& grid, int32_t number) {
    for (int i = 0; i < 3; ++i) {
        if (grid.blocks[i] == 0 || grid.cluster[i] == 0 || grid.blocks[i] % grid.cluster[i]) {
            throw Fault({0, number},
                        text("%u blocks in clusters of %u along axis %d", grid.blocks[i], grid.cluster[i], i));
        }
    }
    if (grid.warps == 0 || grid.warps > kMostWarps) {
        throw Fault({0, number}, text("%u warps in a block: 1 to %u are possible", grid.warps, kMostWarps));
    }
    const uint64_t blocks = static_cast<uint64_t>(grid.blocks[0]) * grid.blocks[1] * grid.blocks[2];
    if (grid.cooperative && blocks > machine.settings.resident) {
        throw Fault({0, number}, text("a cooperative grid of %llu blocks, of which %u can be resident",
                                      (unsigned long long)blocks, machine.settings.resident));
    }
}

bool all_completed_before(const Machine& machine, const GridRun& grid) {
    return std::all_of(machine.grids.begin(), machine.grids.begin() + grid.number,
                       [](const GridRun& earlier) { return earlier.completed; });
}

bool may_start(const Machine& machine, const GridRun& grid) {
    if (all_completed_before(machine, grid)) {
        return true;
    }
    const GridRun& previous = machine.grids[grid.number - 1];
    return grid.launch->early && previous.started && previous.signalled_blocks == previous.blocks;
}

// What a grid may rely on does not depend on how far the others have come: one that may start early knows no more than
// the one before it did.
void start(Machine& machine, GridRun& grid) {
    grid.started = true;
    grid.first_number = machine.accesses.next();
    if (grid.launch->early && grid.number > 0) {
        const GridRun& previous = machine.grids[grid.number - 1];
        grid.floor = previous.floor;
        grid.earliest_home = previous.earliest_home;
    } else {
        grid.floor = grid.first_number;
        grid.earliest_home = grid.first_home;
    }
}

void complete(Machine& machine, GridRun& grid) {
    grid.completed = true;
    for (const auto& cluster : machine.clusters) {
        for (const auto& block : cluster->blocks) {
            for (Warp& warp : block->warps) {
                if (warp.state == State::kDependency && all_completed_before(machine, *block->grid)) {
                    machine.wake(warp);
                }
            }
        }
    }
}

// Executed again when it has been woken.
void wait_for_dependencies(Warp& warp, const Instruction&, Lanes lanes) {
    const GridRun& grid = *warp.block->grid;
    warp.again = !all_completed_before(*warp.machine, grid);
    if (warp.again) {
        warp.state = State::kDependency;
        return;
    }
    if (lanes == warp.active && warp.paths.empty()) {
        warp.earliest_home = grid.first_home;
        warp.global_floor = std::max(warp.global_floor, grid.first_number);
    }
}

void launch_dependents(Warp& warp, const Instruction&, Lanes) {
    signal_dependents(*warp.block);
    warp.machine->grids_changed = true;
    // The next grid starts now rather than at the end of the turn.
    warp.turn_over = true;
}

}  // namespace

void start_grids(Machine& machine, const Grid* grids, int32_t grid_count) {
    uint64_t home = 0;
    machine.grids.clear();
    for (int32_t number = 0; number < grid_count; ++number) {
        const Grid& launch = grids[number];
        check_launch(machine, launch, number);
        GridRun grid;
        grid.launch = &launch;
        grid.number = number;
        grid.blocks = launch.blocks[0] * launch.blocks[1] * launch.blocks[2];
        grid.cluster_blocks = launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
        grid.clusters = grid.blocks / grid.cluster_blocks;
        grid.first_home = static_cast<uint32_t>(home);
        home += grid.blocks;
        if (home > kMostHomes) {
            throw Fault({0, number}, "too many blocks for one run");
        }
        grid.order.resize(grid.clusters);
        for (uint32_t i = 0; i < grid.clusters; ++i) {
            grid.order[i] = i;
        }
        for (uint32_t i = grid.clusters; machine.settings.seed && i > 1; --i) {
            std::swap(grid.order[i - 1], grid.order[machine.random() % i]);
        }
        machine.grids.push_back(std::move(grid));
    }
}

void advance_grids(Machine& machine) {
    machine.grids_changed = false;
    for (GridRun& grid : machine.grids) {
        if (!grid.started && may_start(machine, grid)) {
            start(machine, grid);
        }
        const auto fits = [&] {
            return machine.live_blocks == 0 || machine.live_blocks + grid.cluster_blocks <= machine.settings.resident;
        };
        while (grid.started && grid.next_cluster < grid.clusters && fits()) {
            start_cluster(machine, grid);
        }
        if (grid.started && !grid.completed && grid.finished_blocks == grid.blocks &&
            all_completed_before(machine, grid)) {
            complete(machine, grid);
        }
        if (!grid.started) {
            break;
        }
    }
}

void signal_dependents(Block& block) {
    if (!block.launched_dependents) {
        block.launched_dependents = true;
        ++block.grid->signalled_blocks;
    }
}

void add_grids(Ops& ops) {
    ops.add("griddepcontrol.wait", wait_for_dependencies, Control::kYields);
    ops.add("griddepcontrol.launch_dependents", launch_dependents, Control::kYields);
}

}  // namespace ptx

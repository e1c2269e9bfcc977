// Whose turn it is.
#pragma once

#include "machine.h"

namespace ptx {

// Runs all grids to their end. Faults, deadlocks and a budget used up are among the reports.
Status run(Machine& machine, const Grid* grids, int32_t grid_count);

// Blocks: beginning and end.
void start_cluster(Machine& machine, GridRun& grid);
void finish_warp(Warp& warp);
// Frees clusters whose blocks are all done.
void sweep_clusters(Machine& machine);

// Which grids have begun and completed.
void start_grids(Machine& machine, const Grid* grids, int32_t grid_count);
// Starts what may start. Wakes those that waited for a completion.
void advance_grids(Machine& machine);
void signal_dependents(Block& block);

}  // namespace ptx

// Bulk copies on their way.
#pragma once

#include "machine.h"

namespace ptx {

// Where a load goes to: the block of its address, or all that a multicast mask names.
struct Destination {
    Block* block;
    uint32_t offset, mbarrier;
};
std::vector<Destination> destinations(Warp& warp, const Instruction& instruction, uint64_t address, uint64_t mbarrier,
                                      uint32_t mask);

// Starts a copy from global memory, or from a block's shared memory, that an mbarrier counts.
void load_bulk(Warp& warp, BulkCopy copy);
// Starts one to global memory. Its pieces have been found within their tensors.
void store_bulk(Warp& warp, BulkCopy copy);

// Copies that an mbarrier counts come in.
void land_copies(Machine& machine, Mbarrier& mbarrier);
// At the end of a warp, and of a block's last one.
void finish_bulk_copies(Warp& warp);
void check_unfinished_loads(Warp& warp);

}  // namespace ptx

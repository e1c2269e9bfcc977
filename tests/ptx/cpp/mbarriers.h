// mbarrier objects as copies use them.
#pragma once

#include "machine.h"

namespace ptx {

constexpr uint32_t kMbarrierBytes = 8;

// The object at an address of shared memory, and its block. Null, and a report: there is none.
struct FoundMbarrier {
    Block* block = nullptr;
    Mbarrier* mbarrier = nullptr;
};
FoundMbarrier find_mbarrier(Warp& warp, const Instruction& instruction, uint64_t address, uint32_t lane);

// Bytes that were expected have come.
void complete_bytes(Machine& machine, Block& block, Mbarrier& mbarrier, uint32_t bytes);

}  // namespace ptx

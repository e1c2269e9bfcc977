// An mbarrier object, whose state is kept here rather than in the bytes of shared memory.
#pragma once

#include <cstdint>
#include <vector>

#include "copies.h"
#include "order.h"

namespace ptx {

struct Warp;

struct Mbarrier {
    // Its number as an agent of its block.
    uint32_t slot = 0;
    // Arrivals that a phase expects, and that are missing; bytes that are expected and have not come.
    uint32_t expected = 0, pending = 0;
    int64_t bytes = 0;
    // Phases that have completed.
    uint32_t phase = 0;
    // Those who arrived in this phase; those of the phases that have completed.
    Rows arrived, released;
    std::vector<uint32_t> arrived_proxied, released_proxied;
    std::vector<Warp*> waiting;
    std::vector<BulkCopy> copies;

    // The clock of what copies do in this phase.
    uint32_t clock() const { return phase + 1; }
};

}  // namespace ptx

// What the end of warps does to barriers of clusters.
#pragma once

#include "machine.h"

namespace ptx {

// Completes the phase of barrier.cluster if all warps that have not exited have arrived.
void finish_cluster_barrier(Cluster& cluster);

}  // namespace ptx

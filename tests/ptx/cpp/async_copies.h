// Completion of cp.async by others than its own waits.
#pragma once

#include "machine.h"

namespace ptx {

// At the end of a warp.
void settle_all(Warp& warp);
// cp.async.mbarrier.arrive: what was copied is known to those who know of this stamp.
void settle_with(Warp& warp, Stamp written);

}  // namespace ptx

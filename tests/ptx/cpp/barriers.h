// What ends and begins blocks does to their barriers.
#pragma once

#include "machine.h"

namespace ptx {

// A warp has exited: barriers for everybody expect one less.
void finish_barriers(Block& block);
void reset_barriers(Block& block);

}  // namespace ptx

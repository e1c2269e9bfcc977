// Which row functions this processor can run.
#pragma once

#include <vector>

#include "xr0/rows.h"

// Fastest first; the portable ones are always there, last.
inline std::vector<const xr0::RowFunctions*> usable_row_functions() {
    std::vector<const xr0::RowFunctions*> usable;
#ifdef XR0_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        usable.push_back(&xr0::kRowsAvx512);
    }
    if (__builtin_cpu_supports("avx2")) {
        usable.push_back(&xr0::kRowsAvx2);
    }
#endif
    usable.push_back(&xr0::kRowsPortable);
    return usable;
}

// The functions of xr0_engine._C: each checks its arguments (throwing ValueError) and launches an algorithm of xr0/.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>

void frame_to_patches(const pybind11::array& frame, pybind11::array out, int64_t patch_size,
                      int64_t temporal_patch_size, int64_t merge_size);

// The functions of xr0_engine._C: each checks its arguments (throwing ValueError) and launches an algorithm of xr0/.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

std::vector<std::string> instruction_sets();

void images_to_patches(const std::vector<pybind11::array>& frames,
                       const std::vector<std::pair<int64_t, int64_t>>& sizes, pybind11::array out, int64_t patch_size,
                       int64_t temporal_patch_size, int64_t merge_size, const std::vector<bool>& vertical_first,
                       bool bgr, int64_t threads, const std::optional<std::string>& instruction_set);

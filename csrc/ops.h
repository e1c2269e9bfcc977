// The functions of xr0_engine._C: each checks its arguments (throwing ValueError) and launches an algorithm of xr0/.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

std::vector<std::string> instruction_sets();

void images_to_patches(const std::vector<pybind11::array>& frames,
                       const std::vector<std::pair<int64_t, int64_t>>& sizes, pybind11::array out, int64_t patch_size,
                       int64_t temporal_patch_size, int64_t merge_size, const std::vector<bool>& vertical_first,
                       bool bgr, int64_t threads, const std::optional<std::string>& instruction_set);

std::optional<std::string> cuda_fault(int device);

pybind11::array_t<int32_t> resize_table(int64_t in, int64_t out);

// Address, (height, width), strides in bytes.
using DeviceFrame = std::tuple<std::uintptr_t, std::pair<int64_t, int64_t>, std::tuple<int64_t, int64_t, int64_t>>;
// Address of an int32 table, taps.
using DeviceTable = std::pair<std::uintptr_t, int64_t>;

void images_to_patches_cuda(const std::vector<DeviceFrame>& frames,
                            const std::vector<std::pair<int64_t, int64_t>>& sizes,
                            const std::vector<DeviceTable>& columns, const std::vector<DeviceTable>& rows,
                            std::uintptr_t out, const std::string& dtype, int64_t temporal_patch_size,
                            int64_t merge_size, const std::vector<bool>& vertical_first,
                            const std::vector<int64_t>& slices, bool bgr, int device, std::uintptr_t stream);

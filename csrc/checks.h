// Checks that the host's and the GPU's operators share. Each throws ValueError that names the argument and its value.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "xr0/patches.h"

// Far above any camera; keeps every index within 32 bits and every table small.
inline constexpr int64_t kMaxSide = 32768;
// Of the processor that the model was trained with.
inline constexpr int64_t kMaxAspect = 200;

inline std::string pair_of(int64_t height, int64_t width) {
    return "(" + std::to_string(height) + ", " + std::to_string(width) + ")";
}

inline void check_range(const char* name, int64_t value, int64_t max) {
    if (value < 1 || value > max) {
        throw pybind11::value_error(std::string(name) + ": expected 1 to " + std::to_string(max) + ", got " +
                                    std::to_string(value));
    }
}

// For arguments with one element per frame.
inline void check_count(const char* name, std::size_t count, std::size_t frames) {
    if (count != frames) {
        throw pybind11::value_error(std::string(name) + ": expected one for each of " + std::to_string(frames) +
                                    " frames, got " + std::to_string(count));
    }
}

inline void check_size(const std::string& name, int64_t height, int64_t width) {
    const auto [low, high] = std::minmax(height, width);
    if (low < 1 || high > kMaxSide) {
        throw pybind11::value_error(name + ": expected height and width of 1 to " + std::to_string(kMaxSide) +
                                    ", got " + pair_of(height, width));
    }
    if (high > kMaxAspect * low) {
        throw pybind11::value_error(name + ": expected an aspect ratio of at most " + std::to_string(kMaxAspect) +
                                    ", got height and width " + pair_of(height, width));
    }
}

inline void check_target(const std::string& name, int64_t height, int64_t width, int64_t block) {
    if (height % block != 0 || width % block != 0) {
        throw pybind11::value_error(name + ": expected multiples of patch_size * merge_size = " +
                                    std::to_string(block) + ", got " + pair_of(height, width));
    }
    check_size(name, height, width);
}

inline xr0::PatchLayout checked_layout(int64_t patch_size, int64_t temporal_patch_size, int64_t merge_size) {
    constexpr int64_t kMax = 1024;
    check_range("patch_size", patch_size, kMax);
    check_range("temporal_patch_size", temporal_patch_size, kMax);
    check_range("merge_size", merge_size, kMax);
    return {static_cast<int32_t>(patch_size), static_cast<int32_t>(temporal_patch_size),
            static_cast<int32_t>(merge_size)};
}

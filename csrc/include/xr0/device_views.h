// What the GPU is told about frames: passed to the kernel by value. All pointers are of the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "xr0/rows.h"

namespace xr0 {

// The patch size that the kernel is written for, the published one.
inline constexpr int kDevicePatch = 16;
inline constexpr int kMaxViews = 16;

struct DeviceAxis {
    const int32_t* first;    // [outputs]
    const int32_t* weights;  // [outputs][taps]
    int32_t taps;
};

// Strides are in bytes and may have any sign.
struct DeviceView {
    const uint8_t* pixels;
    std::ptrdiff_t row_stride;
    std::ptrdiff_t pixel_stride;
    std::ptrdiff_t channel_stride;
    DeviceAxis columns;
    DeviceAxis rows;
    int32_t height;
    int32_t width;
    int32_t patch_columns;
    // Of the launch's thread blocks: patches are counted once for each frame in them.
    int32_t first_block;
    int32_t first_patch;
    // Which temporal slices of its patches the frame fills.
    int32_t first_slice;
    int32_t slices;
    bool bgr;
    bool vertical_first;
};

struct DeviceViews {
    DeviceView view[kMaxViews];
    int32_t count;
    int32_t temporal;
    int32_t merge;
};

// Each returns what is wrong, nothing if all is well. stream: a cudaStream_t.
std::string cuda_fault(int device);
std::string cuda_memory_fault(const void* pointer, int device);
std::string launch_images_to_patches(const DeviceViews& views, int32_t blocks, void* out, Element element, int device,
                                     void* stream);

}  // namespace xr0

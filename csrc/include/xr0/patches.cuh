// Camera frames to patches on a GPU, all views in one launch: the same integers as on the host (xr0/patches.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "xr0/device_views.h"

namespace xr0 {

// A thread block makes one frame's part of a patch, a thread one pixel of it.
inline constexpr int kPatchThreads = kDevicePatch * kDevicePatch;
// Samples of the second pass that are in shared memory at a time: any scale works in the same space.
inline constexpr int kChunk = 32;

__device__ inline int round_and_clip_on_device(int sum) { return min(max(sum >> kFractionBits, 0), 255); }

// The division is correctly rounded, as on the host.
__device__ inline float normalised_on_device(int value) {
    return __fdiv_rn(__fsub_rn(__fdiv_rn(static_cast<float>(value), 255.0F), 0.5F), 0.5F);
}

__device__ inline void store(float* out, float value) { *out = value; }

// A number without its lowest bits, to the nearest, ties to even.
template <int kLowest>
__device__ inline uint32_t rounded_off_on_device(uint32_t number) {
    return (number + (1U << (kLowest - 1)) - 1U + ((number >> kLowest) & 1U)) >> kLowest;
}

__device__ inline void store(Bfloat16* out, float value) {
    out->bits = static_cast<uint16_t>(rounded_off_on_device<16>(__float_as_uint(value)));
}

// All values are normal numbers here, as on the host.
__device__ inline void store(Float16* out, float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t magnitude = rounded_off_on_device<13>(bits & 0x7fffffffU) - ((127U - 15U) << 10);
    out->bits = static_cast<uint16_t>(magnitude | ((bits >> 16) & 0x8000U));
}

// One of the two passes for the outputs of one patch.
struct Pass {
    DeviceAxis axis;
    int32_t size;           // samples
    std::ptrdiff_t stride;  // bytes from one sample to the next
    int32_t output;         // first output of the patch
};

// The patch's pixel (i, j), where i counts outputs of the first pass and j those of the second: its three channels.
__device__ inline void resize_pixel(const DeviceView& view, const Pass& first, const Pass& second, int i, int j,
                                    int (&sums)[kChannels]) {
    __shared__ uint8_t between[kChannels][kDevicePatch][kChunk];
    for (int& sum : sums) {
        sum = kHalf;
    }
    const int window = second.axis.first[second.output + j];
    const int32_t* const weights = second.axis.weights + (second.output + j) * second.axis.taps;
    const int begin = second.axis.first[second.output];
    const int end = min(second.axis.first[second.output + kDevicePatch - 1] + second.axis.taps, second.size);
    for (int chunk = begin; chunk < end; chunk += kChunk) {
        for (int task = threadIdx.x; task < kDevicePatch * kChunk; task += kPatchThreads) {
            // Neighbouring threads read neighbouring samples of the second axis.
            const int sample = chunk + task % kChunk;
            const int output = task / kChunk;
            if (sample < end) {
                const int start = first.axis.first[first.output + output];
                const int32_t* const weight = first.axis.weights + (first.output + output) * first.axis.taps;
                int partial[kChannels] = {kHalf, kHalf, kHalf};
                for (int tap = 0; tap < first.axis.taps; ++tap) {
                    // Behind the last sample all weights are zero.
                    const uint8_t* const pixel =
                        view.pixels + sample * second.stride + min(start + tap, first.size - 1) * first.stride;
                    for (int channel = 0; channel < kChannels; ++channel) {
                        partial[channel] += pixel[channel * view.channel_stride] * weight[tap];
                    }
                }
                for (int channel = 0; channel < kChannels; ++channel) {
                    between[channel][output][task % kChunk] =
                        static_cast<uint8_t>(round_and_clip_on_device(partial[channel]));
                }
            }
        }
        __syncthreads();
        for (int sample = max(window, chunk); sample < min(min(window + second.axis.taps, chunk + kChunk), end);
             ++sample) {
            for (int channel = 0; channel < kChannels; ++channel) {
                sums[channel] += between[channel][i][sample - chunk] * weights[sample - window];
            }
        }
        __syncthreads();
    }
}

// gridDim.x: patches of all views, each counted once for every frame in it. T: float, Bfloat16 or Float16.
template <typename T>
__global__ void __launch_bounds__(kPatchThreads) images_to_patches_kernel(const DeviceViews views, T* out) {
    int number = 0;
    while (number + 1 < views.count && static_cast<int>(blockIdx.x) >= views.view[number + 1].first_block) {
        ++number;
    }
    const DeviceView& view = views.view[number];
    const int index = static_cast<int>(blockIdx.x) - view.first_block;
    const int merge = views.merge;
    const int block = index / (merge * merge);
    const int blocks_per_row = view.patch_columns / merge;
    const int y0 = (block / blocks_per_row * merge + index / merge % merge) * kDevicePatch;
    const int x0 = (block % blocks_per_row * merge + index % merge) * kDevicePatch;
    const int y = threadIdx.x / kDevicePatch;
    const int x = threadIdx.x % kDevicePatch;

    const Pass columns{view.columns, view.width, view.pixel_stride, x0};
    const Pass rows{view.rows, view.height, view.row_stride, y0};
    int sums[kChannels];
    if (view.vertical_first) {
        resize_pixel(view, rows, columns, y, x, sums);
    } else {
        resize_pixel(view, columns, rows, x, y, sums);
    }
    T* const target =
        out + (static_cast<std::ptrdiff_t>(view.first_patch + index) * kChannels * views.temporal + view.first_slice) *
                  kPatchThreads;
    for (int channel = 0; channel < kChannels; ++channel) {
        const float value = normalised_on_device(round_and_clip_on_device(sums[channel]));
        T* const plane = target + (view.bgr ? kChannels - 1 - channel : channel) * views.temporal * kPatchThreads;
        for (int copy = 0; copy < view.slices; ++copy) {
            store(plane + copy * kPatchThreads + threadIdx.x, value);
        }
    }
}

}  // namespace xr0

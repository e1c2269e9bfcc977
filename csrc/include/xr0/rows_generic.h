// Row functions in plain C++, for the compiler to vectorise. Every file that includes this gets its own copy.
#pragma once

#include <cstring>

#include "xr0/rows.h"

namespace xr0 {
namespace {

inline uint8_t round_and_clip(int32_t sum) {
    const int32_t value = sum >> kFractionBits;
    return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

inline void horizontal_generic(const uint8_t* const* rows, const AxisView& axis, uint8_t* const* out,
                               std::ptrdiff_t plane) {
    for (int row = 0; row < kRowGroup; ++row) {
        const int32_t* weight = axis.weights;
        for (int32_t x = 0; x < axis.outputs; ++x, weight += axis.taps) {
            const uint8_t* sample = rows[row] + static_cast<std::ptrdiff_t>(axis.first[x]) * kChannels;
            int32_t sums[kChannels] = {kHalf, kHalf, kHalf};
            for (int32_t tap = 0; tap < axis.taps; ++tap, sample += kChannels) {
                for (int channel = 0; channel < kChannels; ++channel) {
                    sums[channel] += sample[channel] * weight[tap];
                }
            }
            for (int channel = 0; channel < kChannels; ++channel) {
                out[row][channel * plane + x] = round_and_clip(sums[channel]);
            }
        }
    }
}

inline void vertical_generic(const uint8_t* const* rows, const AxisView& axis, int32_t output, int32_t bytes,
                             uint8_t* out) {
    const int32_t* weights = axis.weights + static_cast<std::ptrdiff_t>(output) * axis.taps;
    for (int32_t start = 0; start < bytes; start += kPlaneStep) {
        int32_t sums[kPlaneStep];
        for (int32_t& sum : sums) {
            sum = kHalf;
        }
        for (int32_t tap = 0; tap < axis.taps; ++tap) {
            const uint8_t* const row = rows[tap] + start;
            for (int i = 0; i < kPlaneStep; ++i) {
                sums[i] += row[i] * weights[tap];
            }
        }
        for (int i = 0; i < kPlaneStep; ++i) {
            out[start + i] = round_and_clip(sums[i]);
        }
    }
}

// The arithmetic of the processor that the model was trained with, in float32: its i * (1.0 / 255.0) in double, rounded
// to float, equals the division for all 256 values.
inline float normalised(uint8_t value) { return (static_cast<float>(value) / 255.0F - 0.5F) / 0.5F; }

// The restriction lets the compiler vectorise.
inline void convert(const uint8_t* __restrict values, int32_t count, float* __restrict out) {
    for (int32_t i = 0; i < count; ++i) {
        out[i] = normalised(values[i]);
    }
}

// To the nearest bfloat16, ties to even; there is no NaN to look after.
inline void convert(const uint8_t* __restrict values, int32_t count, uint16_t* __restrict out) {
    for (int32_t i = 0; i < count; ++i) {
        const float value = normalised(values[i]);
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        out[i] = static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
    }
}

template <int kPatch, typename T>
inline void emit_patches(const uint8_t* const* rows, const EmitLayout& layout, T* out) {
    const std::ptrdiff_t patch = kPatch != 0 ? kPatch : layout.patch;
    const std::ptrdiff_t slice = patch * patch;
    const std::ptrdiff_t merge_row = std::ptrdiff_t{layout.merge} * kChannels * layout.temporal * slice;
    for (int32_t number = 0; number < layout.patches; ++number) {
        for (int channel = 0; channel < kChannels; ++channel) {
            const std::ptrdiff_t plane = layout.plane * (layout.bgr ? kChannels - 1 - channel : channel);
            for (std::ptrdiff_t row = 0; row < patch; ++row) {
                convert(rows[row] + plane + number * patch, static_cast<int32_t>(patch), out + row * patch);
            }
            const T* const first = out;
            for (int32_t copy = 1; copy < layout.temporal; ++copy) {
                out += slice;
                std::memcpy(out, first, static_cast<std::size_t>(slice) * sizeof(T));
            }
            out += slice;
        }
        if ((number + 1) % layout.merge == 0) {
            // The block's other rows lie in between.
            out += (layout.merge - 1) * merge_row;
        }
    }
}

// The published patch size is a constant to the compiler.
template <typename T>
inline void emit_generic(const uint8_t* const* rows, const EmitLayout& layout, T* out) {
    layout.patch == 16 ? emit_patches<16>(rows, layout, out) : emit_patches<0>(rows, layout, out);
}

}  // namespace
}  // namespace xr0

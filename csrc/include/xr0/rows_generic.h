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

// The arithmetic of the processor that the model was trained with, in float32: (value / 255 - 0.5) / 0.5, here doubled
// throughout. 1 / 255 is the sum of 2^-8k: the product with its first two terms is exact, so that the sum with the rest
// is rounded as the quotient would be, for all 256 values.
inline float normalised(int32_t value) {
    const auto x = static_cast<float>(value);
    return (x * 0x1.01p-7F + x * 0x1.0101p-23F) - 1.0F;
}

inline void store(float value, float& out) { out = value; }

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A number without its lowest bits, to the nearest, ties to even.
template <int kLowest>
inline uint32_t rounded_off(uint32_t number) {
    return (number + (1U << (kLowest - 1)) - 1U + ((number >> kLowest) & 1U)) >> kLowest;
}

// There is no NaN to look after.
inline void store(float value, Bfloat16& out) { out.bits = static_cast<uint16_t>(rounded_off<16>(bits_of(value))); }

// Nor any value that is no normal number here: none is nearer to zero than 1 / 255.
inline void store(float value, Float16& out) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = rounded_off<13>(bits & 0x7fffffffU) - ((127U - 15U) << 10);
    out.bits = static_cast<uint16_t>(magnitude | ((bits >> 16) & 0x8000U));
}

// The restriction lets the compiler vectorise.
template <typename T>
inline void convert(const uint8_t* __restrict values, std::ptrdiff_t count, T* __restrict out) {
    // A few single values in a row, as GCC would have it, are not found again as a vector.
#pragma GCC unroll 1
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        store(normalised(values[i]), out[i]);
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
                T* const values = out + row * patch;
                convert(rows[row] + plane + number * patch, patch, values);
                for (int32_t copy = 1; copy < layout.copies; ++copy) {
                    std::memcpy(values + copy * slice, values, static_cast<std::size_t>(patch) * sizeof(T));
                }
            }
            out += layout.temporal * slice;
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

// A resized camera frame to the vision tower's patches, in one pass (spec section 3.1).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace xr0 {

inline constexpr int kChannels = 3;

struct PatchLayout {
    int64_t patch_size;
    int64_t temporal_patch_size;
    int64_t merge_size;
};

// What each 8-bit value becomes: scaled in double, rounded to float, then normalised with mean and std 0.5 in float,
// each step rounded as the processor that the model was trained with rounds it.
inline std::array<float, 256> pixel_values() {
    std::array<float, 256> values{};
    for (int i = 0; i < 256; ++i) {
        const auto scaled = static_cast<float>(i * (1.0 / 255.0));
        values[i] = (scaled - 0.5F) / 0.5F;
    }
    return values;
}

// frame: height rows of width RGB pixels, row_stride bytes from one row to the next; pixels within a row are packed.
// out: height * width / patch_size^2 patches of (channel, temporal, row, column). The patches of one merge block follow
// each other; a still frame fills every temporal slice. height and width are multiples of patch_size * merge_size.
inline void frame_to_patches(const uint8_t* frame, std::ptrdiff_t row_stride, int64_t height, int64_t width,
                             const PatchLayout& layout, float* out) {
    static const std::array<float, 256> values = pixel_values();
    const auto [patch, temporal, merge] = layout;
    const int64_t block = patch * merge;
    const int64_t slice = patch * patch;
    for (int64_t block_y = 0; block_y < height; block_y += block) {
        for (int64_t block_x = 0; block_x < width; block_x += block) {
            for (int64_t y = block_y; y < block_y + block; y += patch) {
                for (int64_t x = block_x; x < block_x + block; x += patch) {
                    for (int channel = 0; channel < kChannels; ++channel) {
                        const float* first = out;
                        for (int64_t row = y; row < y + patch; ++row) {
                            const uint8_t* pixel = frame + row * row_stride + x * kChannels + channel;
                            for (int64_t column = 0; column < patch; ++column) {
                                *out++ = values[pixel[column * kChannels]];
                            }
                        }
                        for (int64_t copy = 1; copy < temporal; ++copy, out += slice) {
                            std::memcpy(out, first, static_cast<std::size_t>(slice) * sizeof(float));
                        }
                    }
                }
            }
        }
    }
}

}  // namespace xr0

// libFuzzer target: sizes, strides and layouts of image_to_patches. Every instruction set has to give the portable
// bits, and the sanitizers have to find nothing; buffers have exactly the bytes that the views need.
#include "xr0/patches.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace {

// Hands out numbers from the fuzzer's bytes, zero when they are used up.
class Input {
  public:
    Input(const uint8_t* data, std::size_t size) : data_(data), size_(size) {}

    int32_t number(int32_t low, int32_t high) {
        uint16_t value = 0;
        if (size_ >= sizeof value) {
            std::memcpy(&value, data_, sizeof value);
            data_ += sizeof value;
            size_ -= sizeof value;
        }
        return low + value % (high - low + 1);
    }

  private:
    const uint8_t* data_;
    std::size_t size_;
};

template <typename T>
void compare(const xr0::Frame& frame, const xr0::Resize& resize, const xr0::PatchLayout& layout,
             const xr0::Slices& slices) {
    const std::size_t values = std::size_t(resize.height) * resize.width / layout.slice() * layout.patch_dim();
    const auto patches = [&](const xr0::RowFunctions& functions) {
        std::vector<T> out(values);
        xr0::Scratch scratch;
        scratch.reserve(resize, layout);
        const int32_t blocks = resize.height / layout.block();
        // In two parts, as two threads would.
        xr0::image_to_patches(frame, resize, layout, slices, functions, 0, blocks / 2, scratch, out.data());
        xr0::image_to_patches(frame, resize, layout, slices, functions, blocks / 2, blocks, scratch, out.data());
        return out;
    };
    const std::vector<T> expected = patches(xr0::kRowsPortable);
    for (const xr0::RowFunctions* functions : usable_row_functions()) {
        if (std::memcmp(patches(*functions).data(), expected.data(), values * sizeof(T)) != 0) {
            std::abort();
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
    Input input(data, size);
    const int32_t height = input.number(1, 400);
    const int32_t width = input.number(1, 400);
    const xr0::PatchLayout layout{input.number(1, 20), input.number(1, 3), input.number(1, 3)};
    const int32_t new_height = layout.block() * input.number(1, 160 / layout.block() + 1);
    const int32_t new_width = layout.block() * input.number(1, 160 / layout.block() + 1);

    const std::ptrdiff_t gap = input.number(0, 9);
    const std::ptrdiff_t skip = input.number(0, 3);
    const bool upside_down = input.number(0, 1) == 1;
    const bool mirrored = input.number(0, 1) == 1;
    const bool reversed_channels = input.number(0, 1) == 1;
    const std::ptrdiff_t pixel = xr0::kChannels + skip;
    const std::ptrdiff_t row = (width - 1) * pixel + xr0::kChannels + gap;
    std::vector<uint8_t> buffer((height - 1) * row + (width - 1) * pixel + xr0::kChannels);
    uint32_t state = static_cast<uint32_t>(input.number(0, 0xffff));
    for (uint8_t& value : buffer) {
        state = state * 1664525U + 1013904223U;
        value = static_cast<uint8_t>(state >> 24);
    }
    const uint8_t* first = buffer.data() + (upside_down ? (height - 1) * row : 0) +
                           (mirrored ? (width - 1) * pixel : 0) + (reversed_channels ? xr0::kChannels - 1 : 0);
    const xr0::Frame frame{first,
                           height,
                           width,
                           upside_down ? -row : row,
                           mirrored ? -pixel : pixel,
                           reversed_channels ? -1 : 1,
                           input.number(0, 1) == 1};

    const xr0::Axis columns(width, new_width);
    const xr0::Axis rows(height, new_height);
    const xr0::Resize resize{columns.view(), rows.view(), new_height, new_width, input.number(0, 1) == 1};
    const auto element = static_cast<xr0::Element>(input.number(0, 2));
    // A still picture fills all slices, a video's frame its own.
    const int32_t own = input.number(-1, layout.temporal_patch_size - 1);
    const xr0::Slices slices = own < 0 ? xr0::Slices{0, layout.temporal_patch_size} : xr0::Slices{own, 1};
    switch (element) {
        case xr0::Element::kFloat32:
            compare<float>(frame, resize, layout, slices);
            break;
        case xr0::Element::kBfloat16:
            compare<xr0::Bfloat16>(frame, resize, layout, slices);
            break;
        case xr0::Element::kFloat16:
            compare<xr0::Float16>(frame, resize, layout, slices);
            break;
    }
    return 0;
}

// Camera frame to the vision tower's patches in one pass: resize, normalise, order (spec section 3.1).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "xr0/resample.h"
#include "xr0/rows.h"

namespace xr0 {

struct PatchLayout {
    int32_t patch_size;
    int32_t temporal_patch_size;
    int32_t merge_size;

    int32_t block() const { return patch_size * merge_size; }
    std::ptrdiff_t slice() const { return std::ptrdiff_t{patch_size} * patch_size; }
    std::ptrdiff_t patch_dim() const { return kChannels * temporal_patch_size * slice(); }
};

// Strides are in bytes and may have any sign. pixels points to the first channel of the first pixel.
struct Frame {
    const uint8_t* pixels;
    int32_t height;
    int32_t width;
    std::ptrdiff_t row_stride;
    std::ptrdiff_t pixel_stride;
    std::ptrdiff_t channel_stride;
    bool bgr;
};

struct Resize {
    AxisView columns;
    AxisView rows;
    int32_t height;
    int32_t width;
    // Which pass comes first decides what is rounded in between.
    bool vertical_first;
};

// What one thread needs to work on frames up to some size; made by who calls image_to_patches, which allocates nothing.
class Scratch {
  public:
    void reserve(const Resize& resize, const PatchLayout& layout) {
        const auto packed = (std::size_t(resize.columns.in) + resize.columns.taps) * kChannels + kRowSlack;
        packed_row_ = std::max(packed_row_, round_up(packed));
        plane_ = std::max(plane_, round_up(std::size_t(resize.columns.outputs)));
        taps_ = std::max(taps_, std::size_t(resize.rows.taps));
        packed_.resize(packed_row_ * kRowGroup);
        ring_.resize(ring_row() * (taps_ + kRowGroup));
        finished_ = std::size_t(layout.patch_size) + kRowGroup;
        planes_.resize(kChannels * plane_ * finished_);
        window_.resize(std::max(taps_, finished_));
    }

    std::ptrdiff_t plane() const { return static_cast<std::ptrdiff_t>(plane_); }
    // A group of rows of pixels, as long as the frame's.
    uint8_t* packed(int row) { return packed_.data() + packed_row_ * row; }
    // Rows after the first pass: those of one window and the next group.
    uint8_t* ring(int32_t row) { return ring_.data() + ring_row() * (std::size_t(row) % (taps_ + kRowGroup)); }
    // Finished rows: those of one row of patches and the next group. Three planes each, plane() bytes apart.
    uint8_t* planes(int32_t row) { return planes_.data() + kChannels * plane_ * (std::size_t(row) % finished_); }
    // Room for pointers to the rows of a window or of a patch.
    const uint8_t** window() { return window_.data(); }

  private:
    static std::size_t round_up(std::size_t bytes) { return (bytes + kPlaneStep - 1) / kPlaneStep * kPlaneStep; }
    std::size_t ring_row() const { return std::max(kChannels * plane_, packed_row_); }

    std::size_t packed_row_ = 0;
    std::size_t plane_ = 0;
    std::size_t taps_ = 0;
    std::size_t finished_ = 0;
    std::vector<uint8_t> packed_;
    std::vector<uint8_t> ring_;
    std::vector<uint8_t> planes_;
    std::vector<const uint8_t*> window_;
};

inline void copy_packed(const Frame& frame, int32_t row, uint8_t* out) {
    const uint8_t* pixel = frame.pixels + row * frame.row_stride;
    if (frame.pixel_stride == kChannels && frame.channel_stride == 1) {
        std::memcpy(out, pixel, static_cast<std::size_t>(frame.width) * kChannels);
        return;
    }
    for (int32_t x = 0; x < frame.width; ++x, pixel += frame.pixel_stride, out += kChannels) {
        for (int channel = 0; channel < kChannels; ++channel) {
            out[channel] = pixel[channel * frame.channel_stride];
        }
    }
}

// Makes the rows of the resized frame, from top to bottom.
class Resizer {
  public:
    Resizer(const Frame& frame, const Resize& resize, const RowFunctions& functions, int32_t first_row,
            Scratch& scratch)
        : frame_(frame),
          resize_(resize),
          functions_(functions),
          scratch_(scratch),
          group_(first_row),
          next_(resize.rows.first[first_row]) {}

    // Makes at least row y, into scratch.planes(y). Called for every row in turn.
    void make(int32_t y) {
        if (resize_.vertical_first) {
            if ((y - group_) % kRowGroup == 0) {
                make_group(y);
            }
            return;
        }
        window_over(y, &Resizer::resize_columns);
        const auto bytes = static_cast<int32_t>(kChannels * scratch_.plane());
        if (frame_.height == resize_.height) {
            // The pass would change nothing: each window has one weight, of one.
            std::memcpy(scratch_.planes(y), scratch_.ring(y), static_cast<std::size_t>(bytes));
            return;
        }
        functions_.vertical(scratch_.window(), resize_.rows, y, bytes, scratch_.planes(y));
    }

  private:
    // Rows of frames after the first pass, as many as the window of output row y needs.
    void window_over(int32_t y, void (Resizer::*make)()) {
        const int32_t first = resize_.rows.first[y];
        const int32_t taps = resize_.rows.taps;
        while (next_ < std::min(first + taps, frame_.height)) {
            (this->*make)();
        }
        for (int32_t tap = 0; tap < taps; ++tap) {
            // Behind the last row all weights are zero.
            scratch_.window()[tap] = scratch_.ring(std::min(first + tap, frame_.height - 1));
        }
    }

    void resize_columns() {
        const uint8_t* sources[kRowGroup];
        uint8_t* targets[kRowGroup];
        for (int i = 0; i < kRowGroup; ++i) {
            const int32_t row = std::min(next_ + i, frame_.height - 1);
            const int slot = row - next_;
            if (slot == i) {
                copy_packed(frame_, row, scratch_.packed(i));
            }
            sources[i] = scratch_.packed(slot);
            targets[i] = scratch_.ring(row);
        }
        functions_.horizontal(sources, resize_.columns, targets, scratch_.plane());
        next_ += kRowGroup;
    }

    void copy_row() {
        copy_packed(frame_, next_, scratch_.ring(next_));
        ++next_;
    }

    void make_group(int32_t y) {
        const uint8_t* sources[kRowGroup];
        uint8_t* targets[kRowGroup];
        const int32_t bytes = (frame_.width * kChannels + kPlaneStep - 1) / kPlaneStep * kPlaneStep;
        for (int i = 0; i < kRowGroup; ++i) {
            const int slot = std::min(y + i, resize_.height - 1) - y;
            if (slot == i) {
                window_over(y + i, &Resizer::copy_row);
                functions_.vertical(scratch_.window(), resize_.rows, y + i, bytes, scratch_.packed(i));
            }
            sources[i] = scratch_.packed(slot);
            targets[i] = scratch_.planes(y + slot);
        }
        functions_.horizontal(sources, resize_.columns, targets, scratch_.plane());
    }

    const Frame& frame_;
    const Resize& resize_;
    const RowFunctions& functions_;
    Scratch& scratch_;
    const int32_t group_;
    int32_t next_;
};

inline void emit(const RowFunctions& functions, const uint8_t* const* rows, const EmitLayout& layout, float* out) {
    functions.emit_float32(rows, layout, out);
}

inline void emit(const RowFunctions& functions, const uint8_t* const* rows, const EmitLayout& layout, Bfloat16* out) {
    functions.emit_bfloat16(rows, layout, out);
}

inline void emit(const RowFunctions& functions, const uint8_t* const* rows, const EmitLayout& layout, Float16* out) {
    functions.emit_float16(rows, layout, out);
}

// Which temporal slices of its patches a frame fills: a still picture all of them, a video's frame its own.
struct Slices {
    int32_t first;
    int32_t count;
};

// The patches of the rows of merge blocks begin to end - 1. out: all patches of the frame, each (channel, temporal,
// row, column); the patches of one merge block follow each other; nothing but the frame's slices is written. The new
// height and width are multiples of a merge block's. T: float, Bfloat16 or Float16.
template <typename T>
void image_to_patches(const Frame& frame, const Resize& resize, const PatchLayout& layout, const Slices& slices,
                      const RowFunctions& functions, int32_t begin, int32_t end, Scratch& scratch, T* out) {
    const int32_t patch = layout.patch_size;
    const int32_t merge = layout.merge_size;
    const EmitLayout emit_layout{resize.width / patch, patch,    layout.temporal_patch_size, slices.count, merge,
                                 scratch.plane(),      frame.bgr};
    out += slices.first * layout.slice();
    Resizer resizer(frame, resize, functions, begin * layout.block(), scratch);
    for (int32_t patch_row = begin * merge; patch_row < end * merge; ++patch_row) {
        for (int32_t y = patch_row * patch; y < (patch_row + 1) * patch; ++y) {
            resizer.make(y);
        }
        for (int32_t row = 0; row < patch; ++row) {
            scratch.window()[row] = scratch.planes(patch_row * patch + row);
        }
        const std::ptrdiff_t first_patch =
            std::ptrdiff_t{patch_row / merge} * merge * emit_layout.patches + patch_row % merge * merge;
        emit(functions, scratch.window(), emit_layout, out + first_patch * layout.patch_dim());
    }
}

}  // namespace xr0

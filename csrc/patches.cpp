#include "xr0/patches.h"

#include <cstdint>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace {

std::string shape_of(const py::array& array) {
    std::string text = "(";
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        text += (axis == 0 ? "" : ", ") + std::to_string(array.shape(axis));
    }
    return text + (array.ndim() == 1 ? ",)" : ")");
}

std::string describe(const py::array& array) {
    return static_cast<std::string>(py::str(array.dtype())) + " " + shape_of(array);
}

void check_layout(const xr0::PatchLayout& layout) {
    // The upper bound is far above any real model and keeps every product of these sizes within 64 bits.
    for (const auto& [name, value] :
         {std::pair{"patch_size", layout.patch_size}, std::pair{"temporal_patch_size", layout.temporal_patch_size},
          std::pair{"merge_size", layout.merge_size}}) {
        if (value < 1 || value > 1024) {
            throw py::value_error(std::string(name) + ": expected 1 to 1024, got " + std::to_string(value));
        }
    }
}

void check_frame(const py::array& frame, const xr0::PatchLayout& layout) {
    if (!py::isinstance<py::array_t<uint8_t>>(frame) || frame.ndim() != 3 || frame.shape(2) != xr0::kChannels) {
        throw py::value_error("frame: expected uint8 (height, width, 3), got " + describe(frame));
    }
    const int64_t block = layout.patch_size * layout.merge_size;
    if (frame.shape(0) == 0 || frame.shape(1) == 0 || frame.shape(0) % block != 0 || frame.shape(1) % block != 0) {
        throw py::value_error("frame: expected height and width to be positive multiples of " + std::to_string(block) +
                              ", got " + shape_of(frame));
    }
    if (frame.strides(1) != xr0::kChannels || frame.strides(2) != 1) {
        throw py::value_error("frame: expected packed pixels (strides (any, 3, 1)), got strides (" +
                              std::to_string(frame.strides(0)) + ", " + std::to_string(frame.strides(1)) + ", " +
                              std::to_string(frame.strides(2)) + ")");
    }
}

void check_out(const py::array& out, int64_t patches, int64_t patch_dim) {
    if (!py::isinstance<py::array_t<float>>(out) || out.ndim() != 2 || out.shape(0) != patches ||
        out.shape(1) != patch_dim) {
        throw py::value_error("out: expected float32 (" + std::to_string(patches) + ", " + std::to_string(patch_dim) +
                              "), got " + describe(out));
    }
    const bool aligned = reinterpret_cast<std::uintptr_t>(out.data()) % alignof(float) == 0;
    if ((out.flags() & py::array::c_style) == 0 || !aligned) {
        throw py::value_error("out: expected an aligned, C-contiguous array");
    }
    if (!out.writeable()) {
        throw py::value_error("out: expected a writable array, got a read-only one");
    }
}

}  // namespace

void frame_to_patches(const py::array& frame, py::array out, int64_t patch_size, int64_t temporal_patch_size,
                      int64_t merge_size) {
    const xr0::PatchLayout layout{patch_size, temporal_patch_size, merge_size};
    check_layout(layout);
    check_frame(frame, layout);
    const int64_t height = frame.shape(0);
    const int64_t width = frame.shape(1);
    const int64_t area = patch_size * patch_size;
    check_out(out, height * width / area, xr0::kChannels * temporal_patch_size * area);

    const auto* source = static_cast<const uint8_t*>(frame.data());
    const std::ptrdiff_t row_stride = frame.strides(0);
    auto* target = static_cast<float*>(out.mutable_data());
    const py::gil_scoped_release without_gil;
    xr0::frame_to_patches(source, row_stride, height, width, layout, target);
}

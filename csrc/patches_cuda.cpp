#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "axes.h"
#include "checks.h"
#include "ops.h"
#include "xr0/device_views.h"

namespace py = pybind11;

#ifndef XR0_CUDA
namespace xr0 {

std::string cuda_fault(int) { return "xr0_engine._C was built without CUDA: it needs nvcc and XR0_BUILD_CUDA=1"; }
std::string cuda_memory_fault(const void*, int) { return cuda_fault(0); }
std::string launch_images_to_patches(const DeviceViews&, int32_t, void*, Element, int, void*) { return cuda_fault(0); }

}  // namespace xr0
#endif

namespace {

void check_memory(const std::string& name, std::uintptr_t address, int device) {
    if (const std::string fault =
            address == 0 ? "it is null" : xr0::cuda_memory_fault(reinterpret_cast<const void*>(address), device);
        !fault.empty()) {
        throw py::value_error(name + ": expected memory of GPU " + std::to_string(device) + ", but " + fault);
    }
}

xr0::DeviceAxis checked_axis(const std::string& name, const DeviceTable& table, int64_t in, int64_t out, int device) {
    const int64_t taps = axis_for(static_cast<int32_t>(in), static_cast<int32_t>(out))->view().taps;
    if (table.second != taps) {
        throw py::value_error(name + ": expected " + std::to_string(taps) + " taps for " + std::to_string(in) + " to " +
                              std::to_string(out) + ", got " + std::to_string(table.second));
    }
    check_memory(name, table.first, device);
    const auto* first = reinterpret_cast<const int32_t*>(table.first);
    return {first, first + out, static_cast<int32_t>(taps)};
}

xr0::Element checked_element(const std::string& dtype) {
    if (dtype == "float32") {
        return xr0::Element::kFloat32;
    }
    if (dtype == "bfloat16") {
        return xr0::Element::kBfloat16;
    }
    if (dtype == "float16") {
        return xr0::Element::kFloat16;
    }
    throw py::value_error("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
}

// Frames that share patches stand together, their slices in order, and are resized to the same size.
void check_slices(const std::vector<int64_t>& slices, const std::vector<std::pair<int64_t, int64_t>>& sizes,
                  int64_t temporal) {
    int64_t next = 0;
    for (std::size_t i = 0; i < slices.size(); ++i) {
        const bool starts = next == 0 && (slices[i] == -1 || slices[i] == 0);
        if (!starts && (next == 0 || slices[i] != next || sizes[i] != sizes[i - 1])) {
            throw py::value_error("slices[" + std::to_string(i) + "]: expected " +
                                  (next == 0 ? "-1 or 0" : std::to_string(next) + " and the size of the frame before") +
                                  ", got " + std::to_string(slices[i]) + " and " +
                                  pair_of(sizes[i].first, sizes[i].second));
        }
        next = (slices[i] + 1) % temporal;
    }
    if (next != 0) {
        throw py::value_error("slices: expected all " + std::to_string(temporal) + " of a patch, got " +
                              std::to_string(next) + " for the last");
    }
}

}  // namespace

std::optional<std::string> cuda_fault(int device) {
    const std::string fault = xr0::cuda_fault(device);
    return fault.empty() ? std::nullopt : std::optional(fault);
}

py::array_t<int32_t> resize_table(int64_t in, int64_t out) {
    check_range("in_size", in, kMaxSide);
    check_range("out_size", out, kMaxSide);
    const auto axis = axis_for(static_cast<int32_t>(in), static_cast<int32_t>(out));
    const xr0::AxisView view = axis->view();
    py::array_t<int32_t> table(out * (1 + view.taps));
    int32_t* const first = table.mutable_data();
    std::copy_n(view.weights, out * view.taps, std::copy_n(view.first, out, first));
    return table;
}

void images_to_patches_cuda(const std::vector<DeviceFrame>& frames,
                            const std::vector<std::pair<int64_t, int64_t>>& sizes,
                            const std::vector<DeviceTable>& columns, const std::vector<DeviceTable>& rows,
                            std::uintptr_t out, const std::string& dtype, int64_t temporal_patch_size,
                            int64_t merge_size, const std::vector<bool>& vertical_first,
                            const std::vector<int64_t>& slices, bool bgr, int device, std::uintptr_t stream) {
    const xr0::Element element = checked_element(dtype);
    const xr0::PatchLayout layout = checked_layout(xr0::kDevicePatch, temporal_patch_size, merge_size);
    check_range("frames", static_cast<int64_t>(frames.size()), xr0::kMaxViews);
    check_count("sizes", sizes.size(), frames.size());
    check_count("columns", columns.size(), frames.size());
    check_count("rows", rows.size(), frames.size());
    check_count("vertical_first", vertical_first.size(), frames.size());
    check_count("slices", slices.size(), frames.size());
    for (std::size_t i = 0; i < frames.size(); ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        const auto& [height, width] = std::get<1>(frames[i]);
        check_size("frames" + at, height, width);
        check_target("sizes" + at, sizes[i].first, sizes[i].second, layout.block());
    }
    check_slices(slices, sizes, layout.temporal_patch_size);
    if (const std::string fault = device < 0 ? "it is negative" : xr0::cuda_fault(device); !fault.empty()) {
        throw std::runtime_error("GPU " + std::to_string(device) + " cannot be used: " + fault);
    }

    xr0::DeviceViews views{};
    int64_t blocks = 0;
    int64_t patches = 0;
    for (std::size_t i = 0; i < frames.size(); ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        const auto& [address, shape, strides] = frames[i];
        check_memory("frames" + at, address, device);
        xr0::DeviceView& view = views.view[i];
        view.pixels = reinterpret_cast<const uint8_t*>(address);
        std::tie(view.row_stride, view.pixel_stride, view.channel_stride) = strides;
        view.columns = checked_axis("columns" + at, columns[i], shape.second, sizes[i].second, device);
        view.rows = checked_axis("rows" + at, rows[i], shape.first, sizes[i].first, device);
        view.height = static_cast<int32_t>(shape.first);
        view.width = static_cast<int32_t>(shape.second);
        view.patch_columns = static_cast<int32_t>(sizes[i].second / layout.patch_size);
        view.first_block = static_cast<int32_t>(blocks);
        view.first_patch = static_cast<int32_t>(patches);
        view.first_slice = static_cast<int32_t>(std::max<int64_t>(slices[i], 0));
        view.slices = slices[i] < 0 ? layout.temporal_patch_size : 1;
        view.bgr = bgr;
        view.vertical_first = vertical_first[i];
        const int64_t covered = sizes[i].first * sizes[i].second / layout.slice();
        blocks += covered;
        if (view.first_slice + view.slices == layout.temporal_patch_size) {
            patches += covered;
        }
    }
    views.count = static_cast<int32_t>(frames.size());
    views.temporal = layout.temporal_patch_size;
    views.merge = layout.merge_size;
    check_memory("out", out, device);
    if (const std::string fault =
            xr0::launch_images_to_patches(views, static_cast<int32_t>(blocks), reinterpret_cast<void*>(out), element,
                                          device, reinterpret_cast<void*>(stream));
        !fault.empty()) {
        throw std::runtime_error("images_to_patches_cuda: " + fault);
    }
}

#include "xr0/patches.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "axes.h"
#include "checks.h"
#include "dispatch.h"
#include "ops.h"

namespace py = pybind11;

namespace {

constexpr int64_t kMaxThreads = 1024;

struct Job {
    xr0::Frame frame;
    xr0::Resize resize;
    std::shared_ptr<const xr0::Axis> columns;
    std::shared_ptr<const xr0::Axis> rows;
    xr0::Slices slices;
    int64_t first_patch;
    int32_t block_rows;
};

std::string describe(const py::array& array) {
    std::string text = static_cast<std::string>(py::str(array.dtype())) + " (";
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        text += (axis == 0 ? "" : ", ") + std::to_string(array.shape(axis));
    }
    return text + (array.ndim() == 1 ? ",)" : ")");
}

const xr0::RowFunctions& choose(const std::optional<std::string>& instruction_set) {
    const auto usable = usable_row_functions();
    if (!instruction_set) {
        return *usable.front();
    }
    std::string names;
    for (const xr0::RowFunctions* functions : usable) {
        if (*instruction_set == functions->name) {
            return *functions;
        }
        names += (names.empty() ? "" : ", ") + std::string(functions->name);
    }
    throw py::value_error("instruction_set: this processor has " + names + "; got '" + *instruction_set + "'");
}

// The first frame of a picture, which is (height, width, 3), or of a video's (temporal_patch_size, height, width, 3).
xr0::Frame checked_frame(const py::array& frame, const std::string& name, int64_t temporal, bool bgr) {
    const py::ssize_t time = frame.ndim() == 4 ? 1 : 0;
    if (!py::isinstance<py::array_t<uint8_t>>(frame) || frame.ndim() != 3 + time ||
        frame.shape(2 + time) != xr0::kChannels) {
        throw py::value_error(name + ": expected uint8 (height, width, 3), got " + describe(frame));
    }
    if (time == 1 && frame.shape(0) != temporal) {
        throw py::value_error(name + ": expected temporal_patch_size = " + std::to_string(temporal) + " frames, got " +
                              describe(frame));
    }
    check_size(name, frame.shape(time), frame.shape(time + 1));
    xr0::Frame checked{static_cast<const uint8_t*>(frame.data()),
                       static_cast<int32_t>(frame.shape(time)),
                       static_cast<int32_t>(frame.shape(time + 1)),
                       frame.strides(time),
                       frame.strides(time + 1),
                       frame.strides(time + 2),
                       bgr};
    if (checked.channel_stride == -1) {
        // A view with its channels reversed is as good as packed, read the other way round.
        checked.pixels -= xr0::kChannels - 1;
        checked.channel_stride = 1;
        checked.bgr = !bgr;
    }
    return checked;
}

std::optional<xr0::Element> element_of(const py::array& out) {
    if (py::isinstance<py::array_t<float>>(out)) {
        return xr0::Element::kFloat32;
    }
    if (py::isinstance<py::array_t<uint16_t>>(out)) {
        return xr0::Element::kBfloat16;
    }
    return out.dtype().equal(py::dtype("float16")) ? std::optional(xr0::Element::kFloat16) : std::nullopt;
}

xr0::Element checked_out(const py::array& out, int64_t patches, int64_t patch_dim) {
    const std::optional<xr0::Element> element = element_of(out);
    if (!element || out.ndim() != 2 || out.shape(0) != patches || out.shape(1) != patch_dim) {
        throw py::value_error("out: expected float32, float16, or uint16 for bfloat16, " + pair_of(patches, patch_dim) +
                              ", got " + describe(out));
    }
    const bool aligned = reinterpret_cast<std::uintptr_t>(out.data()) % out.itemsize() == 0;
    if ((out.flags() & py::array::c_style) == 0 || !aligned) {
        throw py::value_error("out: expected an aligned, C-contiguous array");
    }
    if (!out.writeable()) {
        throw py::value_error("out: expected a writable array, got a read-only one");
    }
    return *element;
}

// Rows of merge blocks begin to end - 1, counted through all jobs.
template <typename T>
void work(const std::vector<Job>& jobs, const xr0::PatchLayout& layout, const xr0::RowFunctions& functions,
          int64_t begin, int64_t end, xr0::Scratch& scratch, T* out) {
    int64_t start = 0;
    for (const Job& job : jobs) {
        const auto first = std::max<int64_t>(begin - start, 0);
        const auto last = std::min<int64_t>(end - start, job.block_rows);
        if (first < last) {
            xr0::image_to_patches(job.frame, job.resize, layout, job.slices, functions, static_cast<int32_t>(first),
                                  static_cast<int32_t>(last), scratch, out + job.first_patch * layout.patch_dim());
        }
        start += job.block_rows;
    }
}

struct JoinAll {
    std::vector<std::thread> threads;
    ~JoinAll() {
        for (std::thread& thread : threads) {
            thread.join();
        }
    }
};

template <typename T>
void work_on_threads(const std::vector<Job>& jobs, const xr0::PatchLayout& layout, const xr0::RowFunctions& functions,
                     int64_t threads, T* out) {
    int64_t total = 0;
    for (const Job& job : jobs) {
        total += job.block_rows;
    }
    threads = std::min(threads, total);
    std::vector<xr0::Scratch> scratch(static_cast<std::size_t>(threads));
    for (xr0::Scratch& own : scratch) {
        for (const Job& job : jobs) {
            own.reserve(job.resize, layout);
        }
    }
    JoinAll others;
    const auto part = [&](int64_t number) {
        work(jobs, layout, functions, total * number / threads, total * (number + 1) / threads, scratch[number], out);
    };
    for (int64_t number = 1; number < threads; ++number) {
        others.threads.emplace_back(part, number);
    }
    if (threads > 0) {
        part(0);
    }
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const xr0::RowFunctions* functions : usable_row_functions()) {
        names.emplace_back(functions->name);
    }
    return names;
}

void images_to_patches(const std::vector<py::array>& frames, const std::vector<std::pair<int64_t, int64_t>>& sizes,
                       py::array out, int64_t patch_size, int64_t temporal_patch_size, int64_t merge_size,
                       const std::vector<bool>& vertical_first, bool bgr, int64_t threads,
                       const std::optional<std::string>& instruction_set) {
    const xr0::PatchLayout layout = checked_layout(patch_size, temporal_patch_size, merge_size);
    check_range("threads", threads, kMaxThreads);
    const xr0::RowFunctions& functions = choose(instruction_set);
    check_count("sizes", sizes.size(), frames.size());
    if (!vertical_first.empty()) {
        check_count("vertical_first", vertical_first.size(), frames.size());
    }
    std::vector<Job> jobs;
    int64_t patches = 0;
    for (std::size_t i = 0; i < frames.size(); ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        const auto [height, width] = sizes[i];
        check_target("sizes" + at, height, width, layout.block());
        const int32_t temporal = layout.temporal_patch_size;
        Job job{checked_frame(frames[i], "frames" + at, temporal, bgr), {}, {}, {}, {0, temporal}, patches, 0};
        job.columns = axis_for(job.frame.width, static_cast<int32_t>(width));
        job.rows = axis_for(job.frame.height, static_cast<int32_t>(height));
        job.resize = {job.columns->view(), job.rows->view(), static_cast<int32_t>(height), static_cast<int32_t>(width),
                      !vertical_first.empty() && vertical_first[i]};
        job.block_rows = static_cast<int32_t>(height / layout.block());
        if (frames[i].ndim() == 4) {
            job.slices.count = 1;
            for (; job.slices.first + 1 < temporal; ++job.slices.first) {
                jobs.push_back(job);
                job.frame.pixels += frames[i].strides(0);
            }
        }
        jobs.push_back(std::move(job));
        patches += height * width / layout.slice();
    }
    const xr0::Element element = checked_out(out, patches, layout.patch_dim());

    void* const target = out.mutable_data();
    const py::gil_scoped_release without_gil;
    switch (element) {
        case xr0::Element::kFloat32:
            return work_on_threads(jobs, layout, functions, threads, static_cast<float*>(target));
        case xr0::Element::kBfloat16:
            return work_on_threads(jobs, layout, functions, threads, static_cast<xr0::Bfloat16*>(target));
        case xr0::Element::kFloat16:
            return work_on_threads(jobs, layout, functions, threads, static_cast<xr0::Float16*>(target));
    }
}

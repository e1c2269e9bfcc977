// The CUDA kernel on the CPU, a thread for each of its threads, against the host's algorithm: its indices and its order
// of reads and writes, not the GPU's arithmetic. C++20. Prints the number of cases; exit code 1 if one differs.
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct Index {
    int x;
};
thread_local Index threadIdx;
thread_local Index blockIdx;
std::barrier<> all_threads(256);

inline void __syncthreads() { all_threads.arrive_and_wait(); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
using std::max;
using std::min;

#include "xr0/patches.cuh"
#include "xr0/patches.h"

namespace {

constexpr int kCases = 30;

struct Image {
    std::vector<uint8_t> pixels;
    xr0::Axis columns;
    xr0::Axis rows;
};

template <typename T>
bool agrees(std::mt19937& random) {
    const auto number = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
    xr0::DeviceViews views{};
    views.count = number(1, 3);
    views.temporal = number(1, 2);
    views.merge = number(1, 2);
    const xr0::PatchLayout layout{xr0::kDevicePatch, views.temporal, views.merge};

    std::vector<Image> images;
    std::vector<xr0::Frame> frames;
    std::vector<xr0::Resize> resizes;
    std::vector<xr0::Slices> slices;
    int patches = 0;
    int blocks = 0;
    // Two frames each of the first views, one behind the other; then pictures.
    const int videos = layout.temporal_patch_size == 2 ? number(0, views.count) : 0;
    views.count += videos;
    for (int i = 0; i < views.count; ++i) {
        const bool second = i < 2 * videos && i % 2 == 1;
        slices.push_back(i < 2 * videos ? xr0::Slices{i % 2, 1} : xr0::Slices{0, layout.temporal_patch_size});
        const int height = number(1, 150), width = number(1, 150);
        const int new_height = second ? resizes.back().height : layout.block() * number(1, 2);
        const int new_width = second ? resizes.back().width : layout.block() * number(1, 2);
        images.push_back({std::vector<uint8_t>(height * width * 3), {width, new_width}, {height, new_height}});
        std::generate(images[i].pixels.begin(), images[i].pixels.end(), [&] { return number(0, 255); });
        const bool bgr = number(0, 1), vertical_first = number(0, 1), upside_down = number(0, 1);
        const uint8_t* const first = images[i].pixels.data() + (upside_down ? (height - 1) * width * 3 : 0);
        const std::ptrdiff_t row = upside_down ? -width * 3 : width * 3;
        const xr0::AxisView columns = images[i].columns.view(), rows = images[i].rows.view();
        frames.push_back({first, height, width, row, 3, 1, bgr});
        resizes.push_back({columns, rows, new_height, new_width, vertical_first});
        views.view[i] = {first,
                         row,
                         3,
                         1,
                         {columns.first, columns.weights, columns.taps},
                         {rows.first, rows.weights, rows.taps},
                         height,
                         width,
                         new_width / xr0::kDevicePatch,
                         blocks,
                         patches,
                         slices[i].first,
                         slices[i].count,
                         bgr,
                         vertical_first};
        const int covered = new_height * new_width / xr0::kPatchThreads;
        blocks += covered;
        patches += slices[i].first + slices[i].count == layout.temporal_patch_size ? covered : 0;
    }

    std::vector<T> expected(patches * layout.patch_dim(), T{1}), found(expected.size(), T{2});
    for (int i = 0; i < views.count; ++i) {
        xr0::Scratch scratch;
        scratch.reserve(resizes[i], layout);
        xr0::image_to_patches(frames[i], resizes[i], layout, slices[i], xr0::kRowsPortable, 0,
                              resizes[i].height / layout.block(), scratch,
                              expected.data() + views.view[i].first_patch * layout.patch_dim());
    }
    std::vector<std::thread> threads;
    for (int thread = 0; thread < xr0::kPatchThreads; ++thread) {
        threads.emplace_back([&, thread] {
            threadIdx.x = thread;
            for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
                xr0::images_to_patches_kernel(views, found.data());
                __syncthreads();
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    return std::memcmp(found.data(), expected.data(), found.size() * sizeof(T)) == 0;
}

}  // namespace

int main() {
    std::mt19937 random(0);
    for (int i = 0; i < kCases; ++i) {
        if (!(i % 3 == 0   ? agrees<float>(random)
              : i % 3 == 1 ? agrees<xr0::Bfloat16>(random)
                           : agrees<xr0::Float16>(random))) {
            std::printf("case %d differs\n", i);
            return 1;
        }
    }
    std::printf("%d cases\n", kCases);
    return 0;
}

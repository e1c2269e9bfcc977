// The resize tables of the last sizes: cameras keep theirs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "xr0/resample.h"

inline std::shared_ptr<const xr0::Axis> axis_for(int32_t in, int32_t out) {
    constexpr std::size_t kKept = 64;
    static std::mutex mutex;
    static std::map<std::pair<int32_t, int32_t>, std::shared_ptr<const xr0::Axis>> axes;
    const std::lock_guard lock(mutex);
    if (const auto found = axes.find({in, out}); found != axes.end()) {
        return found->second;
    }
    auto axis = std::make_shared<const xr0::Axis>(in, out);
    if (axes.size() >= kKept) {
        axes.clear();
    }
    axes.emplace(std::pair{in, out}, axis);
    return axis;
}

#include "reports.h"

#include <cstdio>

namespace ptx {
namespace {

constexpr size_t kMostReports = 1000;

constexpr const char* kNames[] = {
    "global-bounds", "global-alignment", "shared-bounds",   "shared-alignment", "shared-unwritten", "unwaited-copy",
    "global-race",   "dependency-race",  "shared-race",     "lane-race",        "lane-conflict",    "member-mask",
    "barrier-count", "copy-size",        "unfinished-copy", "wgmma-fence",      "wgmma-register",   "wgmma-operand",
    "proxy-fence",   "proxy-fence-copy", "mbarrier",        "tensor-map",       "cluster",          "register-count",
    "fault",         "budget",           "deadlock",
};
static_assert(sizeof kNames / sizeof kNames[0] == static_cast<size_t>(Kind::kKinds));

}  // namespace

const char* name_of(Kind kind) { return kNames[static_cast<size_t>(kind)]; }

std::string text(const char* format, ...) {
    char buffer[sizeof(Report::text)];
    va_list values;
    va_start(values, format);
    vsnprintf(buffer, sizeof buffer, format, values);
    va_end(values);
    return buffer;
}

void Reports::add(Kind kind, Place at, Place other, const char* format, ...) {
    const Key key{kind, at.line, other.line, at.grid, other.grid};
    if (const auto known = known_.find(key); known != known_.end()) {
        ++list_[known->second].count;
        return;
    }
    // What stops a run is never left out.
    if (list_.size() >= kMostReports && kind < Kind::kFault) {
        return;
    }
    known_.emplace(key, list_.size());
    Report report{static_cast<int32_t>(kind), at.grid, other.grid, at.line, other.line, 0, 1, {}};
    va_list values;
    va_start(values, format);
    vsnprintf(report.text, sizeof report.text, format, values);
    va_end(values);
    list_.push_back(report);
}

void Reports::clear() {
    known_.clear();
    list_.clear();
}

}  // namespace ptx

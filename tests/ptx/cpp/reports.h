// What a run found: each pair of lines once, with a count.
#pragma once

#include <cstdarg>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "abi.h"

namespace ptx {

// The order is that of machine_kind_name.
enum class Kind : int32_t {
    kGlobalBounds,
    kGlobalAlignment,
    kSharedBounds,
    kSharedAlignment,
    kSharedUnwritten,
    kUnwaitedCopy,
    kGlobalRace,
    kDependencyRace,
    kSharedRace,
    kLaneRace,
    kLaneConflict,
    kMemberMask,
    kBarrierCount,
    kCopySize,
    kUnfinishedCopy,
    kWgmmaFence,
    kWgmmaRegister,
    kWgmmaOperand,
    kProxyFence,
    kProxyFenceCopy,
    kMbarrier,
    kTensorMap,
    kCluster,
    kRegisterCount,
    kFault,
    kBudget,
    kDeadlock,
    kKinds,
};

const char* name_of(Kind kind);

// Where an access stands: the PTX line and the grid of the run, -1 for none.
struct Place {
    uint32_t line = 0;
    int32_t grid = -1;
};

// What a program cannot go on after.
class Fault : public std::runtime_error {
  public:
    Fault(Place place, const std::string& text) : std::runtime_error(text), place(place) {}
    Place place;
};

// Some lanes stand before what only a whole warp can execute. No fault as long as the others may still come to them.
class Diverged : public Fault {
    using Fault::Fault;
};

[[gnu::format(printf, 1, 2)]] std::string text(const char* format, ...);

class Reports {
  public:
    // format: of the text, which is made for the first of its kind only.
    [[gnu::format(printf, 5, 6)]] void add(Kind kind, Place at, Place other, const char* format, ...);
    void clear();
    const std::vector<Report>& list() const { return list_; }

  private:
    using Key = std::tuple<Kind, uint32_t, uint32_t, int32_t, int32_t>;

    std::map<Key, size_t> known_;
    std::vector<Report> list_;
};

}  // namespace ptx

// The accesses of a run by number, and what each two bytes of memory remember of theirs.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "order.h"

namespace ptx {

// An access's number and, in the lower bits, its lane.
using Stamp = uint32_t;
constexpr int kLaneBits = 6;
// Several lanes, or none in particular.
constexpr uint32_t kManyLanes = 63;
constexpr uint32_t kMostAccesses = (1u << (32 - kLaneBits)) - 2;
// Two bytes that are remembered one by one. Larger than every other stamp.
constexpr Stamp kSplit = 0xffffffff;

constexpr Stamp stamp(uint32_t number, uint32_t lane) { return number << kLaneBits | lane; }
constexpr uint32_t number_of(Stamp stamp) { return stamp >> kLaneBits; }
constexpr int lane_of(Stamp stamp) {
    return (stamp & kManyLanes) == kManyLanes ? -1 : static_cast<int>(stamp & kManyLanes);
}

enum Trait : uint8_t {
    kPlain = 0,
    kAtomic = 1,
    // cp.async, which is of the generic proxy.
    kCopy = 2,
    // Of the async proxy: bulk copies, wgmma.
    kAsync = 4,
    // Several accesses: `agent` is the number of the last one, `link` that of the others, `clock` how many.
    kSet = 8,
    // Of a set: they all wrote the same.
    kSameValue = 16,
};

struct Access {
    Agent agent;
    uint32_t clock;
    uint32_t line : 24, traits : 8;
    uint32_t link;
};

class Accesses {
  public:
    // Numbers go on from run to run, so that what memory remembers of earlier ones is older than the first. False: they
    // are used up, and all cells must be forgotten.
    bool start_run();
    void restart();
    uint32_t add(Agent agent, uint32_t clock, uint32_t line, uint8_t traits);
    // The accesses of `before` and `number`, the newer one. traits: of the set.
    uint32_t both(uint32_t before, uint32_t number, uint8_t traits);
    const Access& operator[](uint32_t number) const { return list_[number - base_]; }
    uint32_t next() const { return base_ + static_cast<uint32_t>(list_.size()); }

  private:
    struct Pair {
        uint32_t before = 0, number = 0, set = 0;
    };

    uint32_t append(const Access& access);
    uint32_t without_repeats(uint32_t set);

    std::vector<Access> list_;
    uint32_t base_ = 1;
    std::array<Pair, 256> pairs_;
};

// Stamps of the last write and the last reads of each two bytes; of each byte where those are kSplit.
struct Cells {
    Stamp *writes = nullptr, *reads = nullptr, *byte_writes = nullptr, *byte_reads = nullptr;

    Cells from(size_t cell) const {
        return {writes + cell, reads + cell, byte_writes + 2 * cell, byte_reads + 2 * cell};
    }
};

// Cells for so many bytes of memory, zero at first; the system gives them memory as they are touched.
class CellMemory {
  public:
    CellMemory() = default;
    ~CellMemory();
    CellMemory(const CellMemory&) = delete;
    CellMemory& operator=(const CellMemory&) = delete;

    void reserve(size_t bytes);
    void forget();
    const Cells& cells() const { return cells_; }

  private:
    size_t mapped() const;

    size_t bytes_ = 0;
    void* memory_ = nullptr;
    Cells cells_;
};

}  // namespace ptx

#include "accesses.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "reports.h"

namespace ptx {
namespace {

// A run may use up so many numbers at least before they are all taken.
constexpr uint32_t kReserved = kMostAccesses / 2;
// A set of more is searched for agents that it holds several times.
constexpr uint32_t kLongSet = 64;

}  // namespace

bool Accesses::start_run() {
    base_ = next();
    list_.clear();
    pairs_.fill(Pair());
    return base_ < kReserved;
}

void Accesses::restart() { base_ = 1; }

uint32_t Accesses::append(const Access& access) {
    const uint32_t number = next();
    if (number >= kMostAccesses) {
        throw Fault({},
                    "too many accesses to remember in one run: launch fewer grids at a time, or without race checks");
    }
    list_.push_back(access);
    return number;
}

uint32_t Accesses::add(Agent agent, uint32_t clock, uint32_t line, uint8_t traits) {
    return append({agent, clock, line, traits, 0});
}

uint32_t Accesses::both(uint32_t before, uint32_t number, uint8_t traits) {
    Pair& pair = pairs_[(before * 31 + number) % pairs_.size()];
    if (pair.before == before && pair.number == number) {
        return pair.set;
    }
    const Access& old = (*this)[before];
    const uint32_t length = old.traits & kSet ? old.clock + 1 : 2;
    uint32_t set = append({number, length, (*this)[number].line, traits, before});
    if (length > kLongSet) {
        set = without_repeats(set);
    }
    pair = {before, number, set};
    return set;
}

uint32_t Accesses::without_repeats(uint32_t set) {
    const uint8_t traits = (*this)[set].traits;
    std::vector<uint32_t> members;
    std::vector<Agent> agents;
    for (uint32_t at = set;;) {
        const Access access = (*this)[at];
        const uint32_t member = access.traits & kSet ? access.agent : at;
        const Agent agent = (*this)[member].agent;
        if (std::find(agents.begin(), agents.end(), agent) == agents.end()) {
            agents.push_back(agent);
            members.push_back(member);
        }
        if (!(access.traits & kSet)) {
            break;
        }
        at = access.link;
    }
    uint32_t all = members.back();
    for (auto member = members.rbegin() + 1; member != members.rend(); ++member) {
        // Counted anew, so that the next search comes after as many more.
        all = append({*member, 2, (*this)[*member].line, traits, all});
    }
    return all;
}

size_t CellMemory::mapped() const { return bytes_ / 2 * sizeof(Stamp) * 6; }

CellMemory::~CellMemory() {
    if (memory_) {
        munmap(memory_, mapped());
    }
}

void CellMemory::reserve(size_t bytes) {
    if (bytes <= bytes_) {
        return;
    }
    if (memory_) {
        munmap(memory_, mapped());
        memory_ = nullptr;
    }
    // One cell more than there are bytes' halves, and whole pages.
    bytes_ = (bytes + 2 + 4095) / 4096 * 4096;
    void* memory = mmap(nullptr, mapped(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        bytes_ = 0;
        throw std::bad_alloc();
    }
    memory_ = memory;
    Stamp* stamps = static_cast<Stamp*>(memory);
    const size_t count = bytes_ / 2;
    cells_ = {stamps, stamps + count, stamps + 2 * count, stamps + 4 * count};
}

void CellMemory::forget() {
    if (memory_) {
        madvise(memory_, mapped(), MADV_DONTNEED);
    }
}

}  // namespace ptx

#include "proxies.h"

#include <algorithm>

#include "memory.h"

namespace ptx {

AsyncRead::AsyncRead(Warp& warp, const Instruction& instruction)
    : warp_(warp),
      instruction_(instruction),
      touch_(warp, instruction, warp.block->cells.cells(), warp.block, kAsync) {}

template <class F>
void AsyncRead::for_writes_from(uint32_t offset, uint32_t bytes, Stamp floor, F function) const {
    const Stamp* writes = touch_.cells.writes + offset / 2;
    const uint32_t count = (offset % 2 + bytes + 1) / 2;
    Stamp newest = 0;
    for (uint32_t i = 0; i < count; ++i) {
        newest = std::max(newest, writes[i]);
    }
    for (uint32_t i = 0; newest >= floor && i < count; ++i) {
        if (writes[i] >= floor) {
            function(writes[i]);
        }
    }
}

bool AsyncRead::issue(Block& block, uint32_t offset, uint32_t bytes) {
    const Settings& settings = warp_.machine->settings;
    Segment segment;
    if (!find_shared(warp_, instruction_, offset, bytes, "read", segment)) {
        return false;
    }
    if (settings.check) {
        check_content(warp_, instruction_, block, offset, bytes);
    }
    if (settings.race) {
        touch_.read(offset, bytes, kManyLanes);
        for_writes_from(offset, bytes, stamp(warp_.proxy_floor, 0), [this](Stamp written) {
            if (written != checked_) {
                checked_ = written;
                check_proxy(written);
            }
        });
    }
    return true;
}

void AsyncRead::finish(Block& block, uint32_t offset, uint32_t bytes, const Issue& issued, Kind overwritten) {
    if (!warp_.machine->settings.race || offset + uint64_t(bytes) > block.shared.size()) {
        return;
    }
    for_writes_from(offset, bytes, stamp(issued.number, 0), [&](Stamp written) {
        // Bytes that were written one by one are not looked at.
        if (written != kSplit) {
            const Access writer = warp_.machine->accesses[number_of(written)];
            warp_.machine->reports.add(overwritten, warp_.place(instruction_), {writer.line, block.grid->number},
                                       "shared memory was overwritten while it was still being read");
        }
    });
    // Otherwise nobody can tell it from the read at the issue.
    if (warp_.order.clock != issued.clock) {
        touch_.read(offset, bytes, kManyLanes);
    }
}

bool AsyncRead::has_passed(Agent agent, uint32_t clock) const {
    const auto& proxied = warp_.order.proxied;
    return home_of(agent) == warp_.block->home && slot_of(agent) < proxied.size() && clock < proxied[slot_of(agent)];
}

void AsyncRead::check_proxy(Stamp written) {
    const Machine& machine = *warp_.machine;
    // Bytes that were written one by one are not looked at.
    if (written == kSplit || number_of(written) < machine.first_number) {
        return;
    }
    for (uint32_t at = number_of(written);;) {
        const Access& access = machine.accesses[at];
        const Access& member = access.traits & kSet ? machine.accesses[access.agent] : access;
        if (!(member.traits & kAsync) && !has_passed(member.agent, member.clock)) {
            const bool copy = member.traits & kCopy;
            warp_.machine->reports.add(copy ? Kind::kProxyFenceCopy : Kind::kProxyFence, warp_.place(instruction_),
                                       {member.line, warp_.block->grid->number},
                                       "read by the async proxy of what %s wrote, fence.proxy.async not between",
                                       copy ? "cp.async" : "the generic proxy");
            return;
        }
        if (!(access.traits & kSet)) {
            return;
        }
        at = access.link;
    }
}

}  // namespace ptx

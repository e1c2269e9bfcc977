// What passes between agents when they synchronise.
#pragma once

#include "machine.h"

namespace ptx {

// bar.warp.sync: what one lane has done or knows, all do.
void synchronise_warp(Warp& warp);

// What these lanes may publish: what they know and what they have done. Later accesses are not part of it.
Rows publish(Warp& warp, Lanes lanes);
void acquire(Warp& warp, Lanes lanes, const Rows& rows);

// Warps of a block at a barrier, everybody or some of them, and what others left who only arrived.
void synchronise_block(const std::vector<Warp*>& warps, bool everybody, const View* arrivals,
                       const std::vector<uint32_t>* arrivals_proxied);
// bar.arrive: leaves what the warp knows with a barrier.
void leave(Warp& warp, View& arrivals, std::vector<uint32_t>& proxied);

// Atomic accesses to what is known under a key, which is an address; with the instruction's ordering and scope.
void acquire_from(Warp& warp, const Instruction& instruction, Lanes lanes, uint64_t key);
// mine: what publish gave, or a fence before.
void release_to(Warp& warp, const Instruction& instruction, const Rows& mine, uint64_t key);
void fence(Warp& warp, Lanes lanes, bool acquires, bool releases);
// fence.proxy.async by all lanes that execute it.
void fence_proxy(Warp& warp);

// Keys of atomics on shared memory, which has addresses of its own.
constexpr uint64_t shared_key(uint32_t home, uint32_t offset) {
    return uint64_t(1) << 63 | static_cast<uint64_t>(home) << 24 | offset;
}

}  // namespace ptx

#include "sync.h"

namespace ptx {
namespace {

void join_proxied(std::vector<uint32_t>& clocks, const std::vector<uint32_t>& others) {
    clocks.resize(std::max(clocks.size(), others.size()));
    for (size_t i = 0; i < others.size(); ++i) {
        clocks[i] = std::max(clocks[i], others[i]);
    }
}

bool of_block_alone(const Warp& warp, const Instruction& instruction) {
    return instruction.has(kScopeBlock) || (instruction.has(kScopeCluster) && !warp.block->grid->uses_clusters());
}

// All accesses below are known to those who have met at a barrier for everybody, and know `all`.
uint32_t floor_of(Block& block, const View& all) {
    std::erase_if(block.foreign,
                  [&](const ForeignAccess& access) { return all.covers(access.agent, access.clock, -1, block.home); });
    uint32_t floor = block.warps.front().machine->accesses.next();
    for (const ForeignAccess& access : block.foreign) {
        floor = std::min(floor, access.number);
    }
    return floor;
}

// Rows of the own block alone.
Rows of_home(const Rows& rows, uint32_t home) {
    Rows result;
    for (size_t i = 0; i < rows.homes.size(); ++i) {
        if (rows.homes[i] == home) {
            result.row(home) = rows.rows[i];
        }
    }
    return result;
}

}  // namespace

void synchronise_warp(Warp& warp) {
    Order& order = warp.order;
    if (order.acquirers) {
        order.view.join(order.acquired);
        order.acquirers = 0;
    }
    order.synchronised = ++order.clock;
    order.view.own[warp.id].all = order.clock;
    warp.lane_floor = warp.machine->accesses.next();
}

Rows publish(Warp& warp, Lanes lanes) {
    Order& order = warp.order;
    const View& view = order.acquirers & lanes ? order.acquired : order.view;
    Rows rows = view.others ? *view.others : Rows();
    Row& own = rows.row(warp.block->home);
    join(own, view.own);
    own[warp.id] = {order.synchronised, order.clock, lanes};
    ++order.clock;
    return rows;
}

void acquire(Warp& warp, Lanes lanes, const Rows& rows) {
    Order& order = warp.order;
    if (lanes == kAllLanes) {
        order.view.join(rows, warp.block->home);
    }
    if (lanes != kAllLanes || order.acquirers) {
        order.acquired = order.acquirers ? order.acquired : order.view;
        order.acquired.join(rows, warp.block->home);
        order.acquirers |= lanes;
    }
}

void synchronise_block(const std::vector<Warp*>& warps, bool everybody, const View* arrivals,
                       const std::vector<uint32_t>* arrivals_proxied) {
    View all;
    if (arrivals) {
        all = *arrivals;
    }
    std::vector<uint32_t> proxied;
    if (arrivals_proxied) {
        proxied = *arrivals_proxied;
    }
    uint32_t fenced = warps.front()->proxy_fenced;
    for (Warp* warp : warps) {
        fenced = std::min(fenced, warp->proxy_fenced);
        synchronise_warp(*warp);
        all.join(warp->order.view);
        join_proxied(proxied, warp->order.proxied);
    }
    const uint32_t floor = everybody ? floor_of(*warps.front()->block, all) : 0;
    for (Warp* warp : warps) {
        warp->order.view = all;
        warp->order.proxied = proxied;
        if (everybody) {
            warp->shared_floor = floor;
            warp->proxy_floor = std::max(warp->proxy_floor, fenced);
        }
    }
}

void leave(Warp& warp, View& arrivals, std::vector<uint32_t>& proxied) {
    synchronise_warp(warp);
    arrivals.join(warp.order.view);
    join_proxied(proxied, warp.order.proxied);
}

void acquire_from(Warp& warp, const Instruction& instruction, Lanes lanes, uint64_t key) {
    const auto at = warp.machine->released.find(key);
    if (at == warp.machine->released.end()) {
        return;
    }
    Released& released = at->second;
    Order& order = warp.order;
    Order::Acquired now{key, released.version, lanes, instruction.has(kAcquire)};
    if (order.last_acquired == now) {
        return;
    }
    order.last_acquired = now;
    const uint32_t home = warp.block->home;
    Rows known = of_block_alone(warp, instruction) ? of_home(released.rows, home) : released.rows;
    if (released.near_home == home) {
        known.join(released.near);
    }
    if (instruction.has(kAcquire)) {
        acquire(warp, lanes, known);
        return;
    }
    order.unfenced = order.unfenced ? order.unfenced : std::make_shared<Rows>();
    order.unfenced->join(known);
}

void release_to(Warp& warp, const Instruction& instruction, const Rows& mine, uint64_t key) {
    Released& released = warp.machine->released[key];
    released.version = ++warp.machine->releases;
    if (!of_block_alone(warp, instruction)) {
        released.rows.join(mine);
        return;
    }
    if (released.near_home != warp.block->home) {
        released.near.clear();
        released.near_home = warp.block->home;
    }
    released.near.join(mine);
}

void fence(Warp& warp, Lanes lanes, bool acquires, bool releases) {
    Order& order = warp.order;
    if (acquires && order.unfenced) {
        acquire(warp, lanes, *order.unfenced);
        order.unfenced.reset();
    }
    if (releases) {
        order.fenced = std::make_shared<Rows>(publish(warp, lanes));
    }
}

void fence_proxy(Warp& warp) {
    Order& order = warp.order;
    // What this warp knows of others has happened, and what it has done itself.
    for (size_t slot = 0; slot < order.proxied.size(); ++slot) {
        order.proxied[slot] = std::max(order.proxied[slot], order.view.own[slot].all);
    }
    order.proxied[warp.id] = ++order.clock;
    warp.proxy_fenced = warp.machine->accesses.next();
    warp.proxy_floor = std::max(warp.proxy_floor, warp.shared_floor);
}

}  // namespace ptx

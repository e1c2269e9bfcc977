// Clusters of blocks: addresses of each other's shared memory, barrier.cluster; setmaxnreg.
#include "clusters.h"

#include "lanewise.h"
#include "memory.h"
#include "sync.h"

namespace ptx {
namespace {

using u32 = uint32_t;

void map_address(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const u32* addresses = warp.operand<u32>(instruction, 1);
    const u32* ranks = warp.operand<u32>(instruction, 2);
    u32 values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        values[i] = static_cast<u32>(mapped(ranks[i], addresses[i] & kOffsetMask));
        if ((lanes >> i & 1) && ranks[i] >= warp.block->grid->cluster_blocks) {
            throw Fault(warp.place(instruction),
                        text("mapa to block %u of a cluster of %u", ranks[i], warp.block->grid->cluster_blocks));
        }
    }
    store(warp.operand<u32>(instruction, 0), values, lanes);
}

void rank_of_address(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const u32* addresses = warp.operand<u32>(instruction, 1);
    u32 values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const u32 above = addresses[i] >> kRankBit;
        values[i] = above ? above - 1 : warp.block->rank;
    }
    store(warp.operand<u32>(instruction, 0), values, lanes);
}

void arrive(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "barrier.cluster.arrive");
    Cluster& cluster = *warp.block->cluster;
    if (warp.cluster_arrived) {
        throw Fault(warp.place(instruction), "barrier.cluster.arrive twice without a wait between");
    }
    warp.cluster_arrived = true;
    warp.cluster_phase = cluster.phase;
    if (instruction.has(kRelease)) {
        synchronise_warp(warp);
        cluster.known.join(publish(warp, lanes));
    }
    ++cluster.arrived;
    finish_cluster_barrier(cluster);
}

// Executed again when it has been woken.
void wait(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "barrier.cluster.wait");
    Cluster& cluster = *warp.block->cluster;
    if (!warp.cluster_arrived) {
        throw Fault(warp.place(instruction), "barrier.cluster.wait without an arrive before");
    }
    warp.again = cluster.phase == warp.cluster_phase;
    if (warp.again) {
        warp.state = State::kClusterBarrier;
        cluster.waiting.push_back(&warp);
        return;
    }
    warp.cluster_arrived = false;
    acquire(warp, lanes, cluster.completed);
    synchronise_warp(warp);
}

// Registers are not counted here.
void set_registers(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "setmaxnreg");
    if (instruction.imm % 8 || instruction.imm < 24 || instruction.imm > 256) {
        warp.machine->reports.add(Kind::kRegisterCount, warp.place(instruction), {},
                                  "setmaxnreg %lld: it must be a multiple of 8 from 24 to 256",
                                  (long long)instruction.imm);
    }
}

}  // namespace

void finish_cluster_barrier(Cluster& cluster) {
    if (cluster.arrived == 0 || cluster.arrived < cluster.live_warps) {
        return;
    }
    cluster.arrived = 0;
    ++cluster.phase;
    cluster.completed.join(cluster.known);
    std::vector<Warp*> waiting;
    waiting.swap(cluster.waiting);
    for (Warp* warp : waiting) {
        warp->machine->wake(*warp);
    }
}

void add_clusters(Ops& ops) {
    ops.add("mapa", map_address);
    ops.add("getctarank", rank_of_address);
    ops.add("barrier.cluster.arrive", arrive);
    ops.add("barrier.cluster.wait", wait, Control::kYields);
    ops.add("setmaxnreg", set_registers);
}

}  // namespace ptx

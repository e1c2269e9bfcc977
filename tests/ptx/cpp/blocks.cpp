// Blocks and clusters: how they begin and end.
#include <algorithm>

#include "async_copies.h"
#include "barriers.h"
#include "bulk.h"
#include "clusters.h"
#include "scheduler.h"
#include "wgmma.h"

namespace ptx {
namespace {

// Registers and shared memory before anybody writes them. Float32 -2.9e-16 and NaN.
constexpr int kRegisterPoison = 0xa5, kSharedPoison = 0xff;
constexpr size_t kRegisterAlignment = 64;

void place_registers(Block& block, const Program& program) {
    const size_t bytes = (program.register_bytes + kRegisterAlignment - 1) / kRegisterAlignment * kRegisterAlignment;
    const size_t needed = bytes * block.warps.size() + kRegisterAlignment;
    if (block.register_capacity < needed) {
        block.register_memory = std::make_unique_for_overwrite<uint8_t[]>(needed);
        block.register_capacity = needed;
    }
    const auto address = reinterpret_cast<uintptr_t>(block.register_memory.get());
    uint8_t* first =
        block.register_memory.get() + (kRegisterAlignment - address % kRegisterAlignment) % kRegisterAlignment;
    std::memset(first, kRegisterPoison, bytes * block.warps.size());
    for (Warp& warp : block.warps) {
        warp.registers = first + warp.id * bytes;
        for (const Constant& constant : program.constants) {
            if (constant.size == 8) {
                std::fill_n(warp.at<uint64_t>(static_cast<int32_t>(constant.offset)), kLanes, constant.value);
            } else {
                std::fill_n(warp.at<uint32_t>(static_cast<int32_t>(constant.offset)), constant.size ? kLanes : 1,
                            static_cast<uint32_t>(constant.value));
            }
        }
    }
}

void start_warp(Machine& machine, Block& block, uint32_t id) {
    Warp& warp = block.warps[id];
    const GridRun& grid = *block.grid;
    warp.block = &block;
    warp.machine = &machine;
    warp.id = id;
    warp.pc = 0;
    warp.active = kAllLanes;
    warp.state = State::kRunning;
    warp.again = false;
    warp.paths.clear();
    warp.order.reset(block.slots);
    warp.shared_floor = warp.lane_floor = machine.accesses.next();
    warp.proxy_fenced = warp.proxy_floor = warp.shared_floor;
    warp.global_floor = grid.floor;
    warp.earliest_home = grid.earliest_home;
    warp.numbers.fill({});
    warp.copies.clear();
    warp.bulk_copies.clear();
    warp.cluster_arrived = false;
    warp.wgmma.reset(grid.program().uses_wgmma ? grid.program().register_bytes / kRegisterPlace + 1 : 0);
    machine.runnable.push_back(&warp);
}

void start_block(Machine& machine, Block& block, Cluster& cluster, uint32_t number, uint32_t rank) {
    GridRun& grid = *cluster.grid;
    const Grid& launch = *grid.launch;
    block.grid = &grid;
    block.cluster = &cluster;
    block.home = grid.first_home + number;
    block.index[0] = number % launch.blocks[0];
    block.index[1] = number / launch.blocks[0] % launch.blocks[1];
    block.index[2] = number / launch.blocks[0] / launch.blocks[1];
    block.rank = rank;
    block.shared.assign(launch.shared_bytes, kSharedPoison);
    block.content.assign(launch.shared_bytes, kNothing);
    if (machine.settings.race) {
        block.cells.reserve(launch.shared_bytes);
    }
    block.live = launch.warps;
    block.launched_dependents = false;
    block.fresh_from = 0;
    block.slots = launch.warps;
    block.mbarriers.clear();
    block.foreign.clear();
    reset_barriers(block);
    block.warps.resize(launch.warps);
    for (uint32_t id = 0; id < launch.warps; ++id) {
        start_warp(machine, block, id);
    }
    place_registers(block, grid.program());
}

// The number of a block in its grid, from its cluster's and its own within that. Ranks go along x first.
uint32_t block_number(const Grid& launch, uint32_t cluster, uint32_t rank) {
    uint32_t number = 0, stride = 1;
    for (int i = 0; i < 3; ++i) {
        const uint32_t clusters = launch.blocks[i] / launch.cluster[i];
        number += stride * (cluster % clusters * launch.cluster[i] + rank % launch.cluster[i]);
        cluster /= clusters;
        rank /= launch.cluster[i];
        stride *= launch.blocks[i];
    }
    return number;
}

}  // namespace

void start_cluster(Machine& machine, GridRun& grid) {
    auto cluster = std::make_unique<Cluster>();
    cluster->grid = &grid;
    cluster->live_blocks = grid.cluster_blocks;
    cluster->live_warps = grid.cluster_blocks * grid.launch->warps;
    const uint32_t number = grid.order[grid.next_cluster++];
    for (uint32_t rank = 0; rank < grid.cluster_blocks; ++rank) {
        std::unique_ptr<Block> block;
        if (machine.spare_blocks.empty()) {
            block = std::make_unique<Block>();
        } else {
            block = std::move(machine.spare_blocks.back());
            machine.spare_blocks.pop_back();
        }
        start_block(machine, *block, *cluster, block_number(*grid.launch, number, rank), rank);
        cluster->blocks.push_back(std::move(block));
    }
    machine.live_blocks += grid.cluster_blocks;
    machine.clusters.push_back(std::move(cluster));
}

void finish_warp(Warp& warp) {
    Block& block = *warp.block;
    settle_all(warp);
    finish_bulk_copies(warp);
    warp.state = State::kDone;
    --block.live;
    --block.cluster->live_warps;
    if (warp.cluster_arrived && warp.cluster_phase == block.cluster->phase) {
        --block.cluster->arrived;
    }
    if (block.live) {
        finish_barriers(block);
    } else {
        check_unfinished_loads(warp);
        --block.cluster->live_blocks;
        signal_dependents(block);
        ++block.grid->finished_blocks;
    }
    finish_cluster_barrier(*block.cluster);
}

void sweep_clusters(Machine& machine) {
    for (size_t i = 0; i < machine.clusters.size();) {
        Cluster& cluster = *machine.clusters[i];
        if (cluster.live_blocks) {
            ++i;
            continue;
        }
        machine.live_blocks -= static_cast<uint32_t>(cluster.blocks.size());
        for (auto& block : cluster.blocks) {
            machine.spare_blocks.push_back(std::move(block));
        }
        machine.clusters.erase(machine.clusters.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

}  // namespace ptx

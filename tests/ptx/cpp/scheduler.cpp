#include "scheduler.h"

#include <algorithm>

#include "wgmma.h"

namespace ptx {
namespace {

// Diverged lanes go on from the lowest instruction, but for those that are held, and meet there.
void choose_path(Warp& warp) {
    std::vector<Path>& paths = warp.paths;
    for (size_t i = 0; i < paths.size();) {
        if (paths[i].pc == warp.pc) {
            warp.active |= paths[i].lanes;
            paths.erase(paths.begin() + static_cast<std::ptrdiff_t>(i));
        } else {
            ++i;
        }
    }
    Path* lowest = nullptr;
    for (Path& path : paths) {
        if (!path.held && path.pc < (lowest ? lowest->pc : warp.pc)) {
            lowest = &path;
        }
    }
    if (lowest) {
        std::swap(lowest->pc, warp.pc);
        std::swap(lowest->lanes, warp.active);
        choose_path(warp);
    }
}

// The lanes wait for the others, which go on: a compiler may put the place where all meet below that of a branch, and
// the lowest instruction is theirs then. False if all others wait as well, or have returned.
bool hold(Warp& warp) {
    for (size_t i = 0; i < warp.paths.size(); ++i) {
        if (!warp.paths[i].held) {
            std::swap(warp.paths[i].pc, warp.pc);
            std::swap(warp.paths[i].lanes, warp.active);
            warp.paths[i].held = true;
            return true;
        }
    }
    return false;
}

void branch(Warp& warp, const Instruction& instruction, Lanes taken) {
    const Lanes others = warp.active & ~taken;
    const auto target = static_cast<uint32_t>(instruction.target);
    if (!taken) {
        ++warp.pc;
    } else if (!others) {
        warp.pc = target;
    } else {
        warp.paths.push_back({target, taken});
        warp.active = others;
        ++warp.pc;
    }
}

// Lanes return; true if none is left.
bool all_returned(Warp& warp, Lanes lanes) {
    warp.active &= ~lanes;
    if (warp.active) {
        ++warp.pc;
        return false;
    }
    if (warp.paths.empty()) {
        return true;
    }
    warp.pc = warp.paths.back().pc;
    warp.active = warp.paths.back().lanes;
    warp.paths.pop_back();
    return false;
}

// False if its lanes are held instead.
bool execute(Warp& warp, const Instruction& instruction, Lanes lanes) {
    try {
        instruction.handler(warp, instruction, lanes);
    } catch (const Diverged&) {
        if (!hold(warp)) {
            throw;
        }
        return false;
    }
    return true;
}

// Executes until the warp has to wait, gives its turn away, or has used up its quantum at a branch.
void run_turn(Warp& warp, uint64_t quantum) {
    Machine& machine = *warp.machine;
    const Instruction* code = warp.block->grid->program().code.data();
    const bool check = machine.settings.check;
    uint64_t& total = machine.totals.executed;
    const uint64_t last = total + quantum;
    warp.turn_over = false;
    for (;;) {
        if (!warp.paths.empty()) {
            choose_path(warp);
        }
        const Instruction& instruction = code[warp.pc];
        Lanes lanes = warp.active;
        if (instruction.predicate >= 0) {
            const Lanes predicate = *warp.at<Lanes>(instruction.predicate);
            lanes &= instruction.negated ? ~predicate : predicate;
        }
        ++total;
        if (instruction.touches_wgmma && lanes && check) {
            check_wgmma_registers(warp, instruction);
        }
        switch (instruction.control) {
            case Control::kPlain:
            case Control::kWgmma:
                if (!lanes || execute(warp, instruction, lanes)) {
                    ++warp.pc;
                }
                continue;
            case Control::kBranch:
                branch(warp, instruction, lanes);
                if (total >= last) {
                    return;
                }
                continue;
            case Control::kReturn:
                if (lanes && !all_returned(warp, lanes)) {
                    continue;
                }
                if (lanes) {
                    finish_warp(warp);
                    return;
                }
                ++warp.pc;
                continue;
            case Control::kYields:
                if (lanes && !execute(warp, instruction, lanes)) {
                    continue;
                }
                warp.pc += warp.again ? 0 : 1;
                if (warp.state != State::kRunning || warp.turn_over) {
                    return;
                }
        }
    }
}

uint32_t line_of(const Warp& warp) {
    // A warp that waits stands behind its instruction, unless it executes it again.
    const uint32_t pc = warp.again || warp.pc == 0 ? warp.pc : warp.pc - 1;
    return warp.block->grid->program().code[pc].line;
}

void report_deadlock(Machine& machine) {
    std::string waiting;
    Place first;
    for (const auto& cluster : machine.clusters) {
        for (const auto& block : cluster->blocks) {
            for (const Warp& warp : block->warps) {
                if (warp.state == State::kDone) {
                    continue;
                }
                first = first.line ? first : Place{line_of(warp), block->grid->number};
                waiting += text(" block %u warp %u at line %u,", block->home - block->grid->first_home, warp.id,
                                line_of(warp));
            }
        }
    }
    machine.reports.add(Kind::kDeadlock, first, {}, "every warp waits:%s", waiting.c_str());
}

Status run_all(Machine& machine) {
    const uint64_t seed = machine.settings.seed, quantum = std::max<uint64_t>(machine.settings.quantum, 1);
    size_t turn = 0;
    while (!machine.runnable.empty()) {
        if (turn >= machine.runnable.size()) {
            turn = 0;
        }
        const size_t index = seed ? machine.random() % machine.runnable.size() : turn;
        Warp& warp = *machine.runnable[index];
        machine.current = &warp;
        run_turn(warp, seed ? 1 + machine.random() % quantum : quantum);
        machine.current = nullptr;
        if (machine.totals.executed > machine.settings.budget) {
            machine.reports.add(Kind::kBudget, {line_of(warp), warp.block->grid->number}, {},
                                "%llu instructions are used up: a loop that never ends?",
                                (unsigned long long)machine.settings.budget);
            return kBudget;
        }
        if (warp.state == State::kRunning) {
            turn = index + 1;
            continue;
        }
        machine.runnable[index] = machine.runnable.back();
        machine.runnable.pop_back();
        if (warp.state == State::kDone) {
            sweep_clusters(machine);
            advance_grids(machine);
        } else if (machine.grids_changed) {
            advance_grids(machine);
        }
    }
    if (!machine.clusters.empty()) {
        report_deadlock(machine);
        return kDeadlock;
    }
    return kFinished;
}

void clean_up(Machine& machine) {
    machine.runnable.clear();
    for (auto& cluster : machine.clusters) {
        for (auto& block : cluster->blocks) {
            machine.spare_blocks.push_back(std::move(block));
        }
    }
    machine.clusters.clear();
    machine.grids.clear();
    machine.released.clear();
}

}  // namespace

Status run(Machine& machine, const Grid* grids, int32_t grid_count) {
    Status status = kFault;
    try {
        start_grids(machine, grids, grid_count);
        advance_grids(machine);
        status = run_all(machine);
    } catch (const Fault& fault) {
        machine.reports.add(Kind::kFault, fault.place, {}, "%s", fault.what());
    }
    clean_up(machine);
    return status;
}

}  // namespace ptx

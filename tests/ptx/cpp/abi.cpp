// The functions of the contract.
#include "abi.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "machine.h"
#include "scheduler.h"
#include "wgmma.h"

namespace ptx {
namespace {

void load_ranges(Machine& machine, const Range* ranges, int32_t count) {
    machine.ranges.clear();
    size_t bytes = 0;
    for (int32_t i = 0; i < count; ++i) {
        machine.ranges.push_back({ranges[i].low, ranges[i].high, {}});
        // Each starts at a cell of its own.
        bytes += (ranges[i].high - ranges[i].low + 1) / 2 * 2;
    }
    std::sort(machine.ranges.begin(), machine.ranges.end(),
              [](const MemoryRange& a, const MemoryRange& b) { return a.low < b.low; });
    if (!machine.settings.race) {
        return;
    }
    machine.range_cells.reserve(bytes);
    size_t cell = 0;
    for (MemoryRange& range : machine.ranges) {
        range.cells = machine.range_cells.cells().from(cell);
        cell += (range.high - range.low + 1) / 2;
    }
}

void start_run(Machine& machine, const Settings& settings) {
    machine.settings = settings;
    machine.settings.race = settings.check && settings.race;
    machine.totals = {};
    machine.reports.clear();
    machine.random_state = settings.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
    machine.live_blocks = 0;
    if (!machine.accesses.start_run()) {
        machine.accesses.restart();
        machine.range_cells.forget();
        for (const auto& block : machine.spare_blocks) {
            block->cells.forget();
        }
    }
    machine.first_number = machine.accesses.next();
}

// Machines are kept for the next run, since it costs more than most runs to get their memory from the system.
std::vector<std::unique_ptr<Machine>> spare_machines;
std::mutex spare_machines_lock;

}  // namespace

extern "C" {

int32_t machine_op(const char* name) { return Ops::all().find(name); }

Program* program_new(const Record* records, int32_t count, const int32_t* pool, int32_t pool_count,
                     uint32_t register_bytes, const Constant* constants, int32_t constant_count) {
    auto* program = new Program();
    program->pool.assign(pool, pool + pool_count);
    program->constants.assign(constants, constants + constant_count);
    program->register_bytes = register_bytes;
    for (int32_t i = 0; i < count; ++i) {
        const Record& record = records[i];
        const Ops::Op& op = Ops::all().list().at(record.op);
        Instruction instruction;
        instruction.handler = op.handler;
        instruction.control = op.control;
        instruction.operands = program->pool.data() + record.first;
        instruction.imm = record.imm;
        instruction.imm2 = record.imm2;
        instruction.predicate = record.predicate;
        instruction.target = record.target;
        instruction.line = record.line;
        instruction.flags = record.flags;
        instruction.size = static_cast<uint16_t>(record.size);
        instruction.vec = static_cast<uint16_t>(record.vec);
        instruction.count = static_cast<uint16_t>(record.count);
        instruction.written = static_cast<uint16_t>(record.written);
        instruction.negated = record.negated != 0;
        program->code.push_back(instruction);
    }
    mark_wgmma_registers(*program);
    return program;
}

void program_free(Program* program) { delete program; }

Machine* machine_new() {
    const std::lock_guard lock(spare_machines_lock);
    if (spare_machines.empty()) {
        return new Machine();
    }
    Machine* machine = spare_machines.back().release();
    spare_machines.pop_back();
    return machine;
}

void machine_free(Machine* machine) {
    const std::lock_guard lock(spare_machines_lock);
    spare_machines.emplace_back(machine);
}

Status machine_run(Machine* machine, const Grid* grids, int32_t grid_count, const Range* ranges, int32_t range_count,
                   const Settings* settings, Totals* totals) {
    start_run(*machine, *settings);
    load_ranges(*machine, ranges, range_count);
    const Status status = run(*machine, grids, grid_count);
    *totals = machine->totals;
    return status;
}

int32_t machine_report_count(const Machine* machine) { return static_cast<int32_t>(machine->reports.list().size()); }
const Report* machine_reports(const Machine* machine) { return machine->reports.list().data(); }
const char* machine_kind_name(int32_t kind) {
    return kind >= 0 && kind < static_cast<int32_t>(Kind::kKinds) ? name_of(static_cast<Kind>(kind)) : nullptr;
}

}  // extern "C"

}  // namespace ptx

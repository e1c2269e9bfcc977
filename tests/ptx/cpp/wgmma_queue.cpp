// Issue and completion of wgmma, and what may be done to its registers meanwhile.
#include <algorithm>

#include "wgmma.h"

namespace ptx {
namespace {

using Product = WgmmaQueue::Product;

bool same_accumulators(const Instruction& a, const Instruction& b) {
    return a.handler == b.handler && a.imm == b.imm &&
           std::equal(a.operands, a.operands + accumulators(a), b.operands, b.operands + accumulators(b));
}

bool among(const int32_t* first, const int32_t* last, int32_t operand) {
    return std::find(first, last, operand) != last;
}

// Calls function(operand, is_written) for the registers that a wgmma owns while it is in flight.
template <class F>
void for_registers(const Instruction& instruction, F function) {
    const int sums = accumulators(instruction);
    for (int i = 0; i < sums; ++i) {
        function(instruction.operands[i], true);
    }
    for (int i = sums; instruction.has(kARegisters) && i < sums + kFactorRegisters; ++i) {
        function(instruction.operands[i], false);
    }
}

void report(Warp& warp, const Instruction& instruction, const Product& product, const char* what) {
    warp.machine->reports.add(Kind::kWgmmaRegister, warp.place(instruction), warp.place(*product.instruction),
                              "%s of a wgmma that was not waited for", what);
}

// A wgmma may add to the accumulators of one in flight if it has the same shape.
void check_own_registers(Warp& warp, const Instruction& instruction) {
    WgmmaQueue& queue = warp.wgmma;
    for_registers(instruction, [&](int32_t operand, bool) {
        if (queue.unfenced[operand / kRegisterPlace]) {
            warp.machine->reports.add(
                Kind::kWgmmaFence, warp.place(instruction), {},
                "registers of a wgmma were written since the last wgmma.fence, or there was none");
            return;
        }
    });
    for (const Product& product : queue.products) {
        if (same_accumulators(instruction, *product.instruction)) {
            continue;
        }
        for_registers(*product.instruction, [&](int32_t operand, bool is_written) {
            const int sums = accumulators(instruction);
            const bool touches =
                among(instruction.operands, instruction.operands + sums, operand) ||
                (is_written && instruction.has(kARegisters) &&
                 among(instruction.operands + sums, instruction.operands + sums + kFactorRegisters, operand));
            if (touches) {
                report(warp, instruction, product, is_written ? "accumulators" : "factors in registers");
            }
        });
    }
}

void run_all(Warp& warp) {
    for (Product& product : warp.wgmma.products) {
        if (!product.done) {
            product.done = true;
            product.multiply(warp, product);
        }
    }
}

}  // namespace

void issue_wgmma(Warp& warp, Product product, Lanes lanes) {
    const Instruction& instruction = *product.instruction;
    require_whole_warp(warp, instruction, lanes, "wgmma");
    warp.machine->totals.matrix_products += instruction.imm / 8;
    if (warp.machine->settings.check) {
        check_own_registers(warp, instruction);
    }
    int operand = accumulators(instruction);
    if (instruction.has(kARegisters)) {
        operand += kFactorRegisters;
    } else {
        product.a = warp.operand<uint64_t>(instruction, operand++)[0];
    }
    product.b = warp.operand<uint64_t>(instruction, operand++)[0];
    product.accumulate = instruction.operands[operand] < 0 || (*warp.operand<Lanes>(instruction, operand) & 1) != 0;
    check_factors(warp, product, false);
    // Whatever is written from now on has a number of its own.
    warp.block->fresh_from = warp.machine->accesses.next();
    product.issued = {warp.block->fresh_from, warp.order.clock};
    warp.wgmma.products.push_back(product);
    if (warp.machine->happens_at_once()) {
        run_all(warp);
    }
}

namespace {

void order_registers(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "wgmma.fence");
    std::fill(warp.wgmma.unfenced.begin(), warp.wgmma.unfenced.end(), 0);
}

void commit(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "wgmma.commit_group");
    warp.wgmma.groups.push_back(warp.wgmma.products.size());
}

void wait(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "wgmma.wait_group");
    WgmmaQueue& queue = warp.wgmma;
    const size_t open = static_cast<size_t>(instruction.imm);
    if (queue.groups.size() <= open) {
        return;
    }
    const size_t groups = queue.groups.size() - open;
    const size_t end = queue.groups[groups - 1];
    for (size_t i = 0; i < end; ++i) {
        Product& product = queue.products[i];
        if (!product.done) {
            product.done = true;
            product.multiply(warp, product);
        }
        check_factors(warp, product, true);
    }
    queue.products.erase(queue.products.begin(), queue.products.begin() + static_cast<std::ptrdiff_t>(end));
    queue.groups.erase(queue.groups.begin(), queue.groups.begin() + static_cast<std::ptrdiff_t>(groups));
    for (size_t& group : queue.groups) {
        group -= end;
    }
}

// Copies into places, and what they copy among the places from then on.
void follow_copies(Program& program, std::vector<bool>& places) {
    const Ops& ops = Ops::all();
    const Handler copy = ops.list()[static_cast<size_t>(ops.find("mov.32"))].handler;
    for (bool more = true; more;) {
        more = false;
        for (Instruction& instruction : program.code) {
            if (instruction.handler != copy || instruction.copies_to_wgmma ||
                !places[instruction.operands[0] / kRegisterPlace]) {
                continue;
            }
            const auto offset = static_cast<uint32_t>(instruction.operands[1]);
            if (std::none_of(program.constants.begin(), program.constants.end(),
                             [&](const Constant& constant) { return constant.offset == offset; })) {
                instruction.copies_to_wgmma = more = true;
                places[offset / kRegisterPlace] = true;
            }
        }
    }
}

}  // namespace

void mark_wgmma_registers(Program& program) {
    std::vector<bool> places(program.register_bytes / kRegisterPlace + 1);
    bool any = false;
    for (Instruction& instruction : program.code) {
        if (instruction.control != Control::kWgmma) {
            continue;
        }
        any = true;
        for_registers(instruction, [&](int32_t operand, bool) { places[operand / kRegisterPlace] = true; });
    }
    if (any) {
        follow_copies(program, places);
    }
    for (Instruction& instruction : program.code) {
        for (int i = 0; any && i < instruction.count; ++i) {
            const int32_t operand = instruction.operands[i];
            // Places of wgmma are never predicates'.
            if (operand >= 0 && places[operand / kRegisterPlace] && instruction.control != Control::kWgmma) {
                instruction.touches_wgmma = true;
            }
        }
    }
    program.uses_wgmma = any;
}

void check_wgmma_registers(Warp& warp, const Instruction& instruction) {
    WgmmaQueue& queue = warp.wgmma;
    for (int i = 0; i < instruction.written; ++i) {
        if (instruction.operands[i] >= 0) {
            // Copies are the compiler's names for a value: ptxas has it in the product's register from when it was
            // made.
            queue.unfenced[instruction.operands[i] / kRegisterPlace] =
                instruction.copies_to_wgmma ? queue.unfenced[instruction.operands[1] / kRegisterPlace] : 1;
        }
    }
    for (const Product& product : queue.products) {
        for_registers(*product.instruction, [&](int32_t operand, bool is_written) {
            const int32_t* operands = instruction.operands;
            const bool touches =
                among(operands, operands + (is_written ? instruction.count : instruction.written), operand);
            if (touches) {
                report(warp, instruction, product, is_written ? "accumulators" : "factors in registers");
            }
        });
    }
}

void add_wgmma_queue(Ops& ops) {
    ops.add("wgmma.fence", order_registers);
    ops.add("wgmma.commit_group", commit);
    ops.add("wgmma.wait_group", wait);
}

}  // namespace ptx

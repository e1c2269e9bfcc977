// wgmma: a warp's part in the products of its warpgroup, which happen at their wait.
#pragma once

#include "machine.h"

namespace ptx {

// The granularity at which registers are told apart.
constexpr int kRegisterPlace = 64;
constexpr int kFactorRegisters = 4;

// How many of an instruction's first operands are accumulators; registers of A follow if there are any.
inline int accumulators(const Instruction& instruction) { return instruction.written; }

// Marks the instructions of a program that touch registers of wgmma.
void mark_wgmma_registers(Program& program);
// Called before such an instruction.
void check_wgmma_registers(Warp& warp, const Instruction& instruction);

// product: without what its operands hold.
void issue_wgmma(Warp& warp, WgmmaQueue::Product product, Lanes lanes);
// Checks the factors in shared memory, when a product is issued and when it has been waited for.
void check_factors(Warp& warp, const WgmmaQueue::Product& product, bool finished);

}  // namespace ptx

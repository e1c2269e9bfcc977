// Reductions that bulk copies make in global memory.
#pragma once

#include <cstdint>

#include "abi.h"
#include "copies.h"

namespace ptx {

// to = to op from; kNone: to = from.
void reduce_bytes(Reduction reduction, TensorMapType type, uint8_t* to, const uint8_t* from, uint32_t bytes);
uint32_t element_bytes(TensorMapType type);
// Whether the type's NaN, in code, is what fills a load's elements outside the tensor.
bool nan_of(TensorMapType type, uint64_t& code);

}  // namespace ptx

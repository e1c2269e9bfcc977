// mma.sync: d = a b + c of 16 x 8 by a warp.
//
// The products of one instruction are summed in float32 from the lowest k on, each rounded once (fused), from zero;
// then the accumulator is added. The hardware's order and width are its own.
#include <string>
#include <type_traits>

#include "factors.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr int kM = 16, kN = kColumns;
constexpr int kHalf = 8;

// A register of all lanes is 8 rows of 16 bytes. Those of A: upper and lower rows, then the next columns; of B, whose
// rows are the columns of the product: the next k.
template <class Factor, int kK>
struct Operands {
    static constexpr int kBytes = kK * Factor::kBytes;
    static constexpr int kChunks = kBytes / kChunkBytes;
    static constexpr int kElements = kChunkBytes / Factor::kBytes;
    static_assert(kBytes % kChunkBytes == 0);
};

template <class Factor, int kK>
void load_a(Warp& warp, const Instruction& instruction, int first, typename Factor::Number (&a)[kM][kK]) {
    using Shape = Operands<Factor, kK>;
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        for (int half = 0; half < 2; ++half) {
            const uint8_t* rows = warp.operand<uint8_t>(instruction, first + 2 * chunk + half);
            for (int row = 0; row < kHalf; ++row) {
                decode_factors<Factor>(rows + row * kChunkBytes, kChunkBytes,
                                       &a[half * kHalf + row][chunk * Shape::kElements]);
            }
        }
    }
}

template <class Factor, int kK>
void load_b(Warp& warp, const Instruction& instruction, int first, typename Factor::Number (&b)[kK][kN]) {
    using Shape = Operands<Factor, kK>;
    using Number = typename Factor::Number;
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        Number columns[kN * Shape::kElements];
        decode_factors<Factor>(warp.operand<uint8_t>(instruction, first + chunk), kN * kChunkBytes, columns);
        for (int k = 0; k < Shape::kElements; ++k) {
            for (int n = 0; n < kN; ++n) {
                b[chunk * Shape::kElements + k][n] = columns[n * Shape::kElements + k];
            }
        }
    }
}

// Accumulators of 32 bits: lanes hold two columns of a row in two registers, then those of the lower half.
template <class T>
void load_c(Warp& warp, const Instruction& instruction, int first, T* c) {
    for (int half = 0; half < 2; ++half) {
        const T* even = warp.operand<T>(instruction, first + 2 * half);
        const T* odd = warp.operand<T>(instruction, first + 2 * half + 1);
        T* to = c + half * kHalf * kN;
        for (int lane = 0; lane < kLanes; ++lane) {
            to[2 * lane] = even[lane];
            to[2 * lane + 1] = odd[lane];
        }
    }
}

template <class T>
void store_d(Warp& warp, const Instruction& instruction, const T* d) {
    for (int half = 0; half < 2; ++half) {
        T* even = warp.operand<T>(instruction, 2 * half);
        T* odd = warp.operand<T>(instruction, 2 * half + 1);
        const T* from = d + half * kHalf * kN;
        for (int lane = 0; lane < kLanes; ++lane) {
            even[lane] = from[2 * lane];
            odd[lane] = from[2 * lane + 1];
        }
    }
}

// float16: two columns share a register, so that a register is half of the matrix, row by row.
void load_c_half(Warp& warp, const Instruction& instruction, int first, float* c) {
    for (int half = 0; half < 2; ++half) {
        const uint16_t* from = warp.operand<uint16_t>(instruction, first + half);
        for (int i = 0; i < kHalf * kN; ++i) {
            c[half * kHalf * kN + i] = from_half(from[i]);
        }
    }
}

void store_d_half(Warp& warp, const Instruction& instruction, const float* d) {
    for (int half = 0; half < 2; ++half) {
        uint16_t* to = warp.operand<uint16_t>(instruction, half);
        for (int i = 0; i < kHalf * kN; ++i) {
            to[i] = static_cast<uint16_t>(to_half(d[half * kHalf * kN + i]));
        }
    }
}

int32_t saturated(int64_t value) {
    return static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(value, INT32_MIN), INT32_MAX));
}

template <class A, class B, int kK, bool kHalfSums, bool kSaturates>
void multiply(Warp& warp, const Instruction& instruction, Lanes lanes) {
    using Number = typename A::Number;
    static_assert(std::is_same_v<Number, typename B::Number>);
    require_whole_warp(warp, instruction, lanes, "mma");
    ++warp.machine->totals.matrix_products;
    alignas(64) Number a[kM][kK], b[kK][kN], c[kM][kN];
    constexpr int kAccumulators = kHalfSums ? 2 : 4;
    constexpr int kARegisters = 2 * Operands<A, kK>::kChunks, kBRegisters = Operands<B, kK>::kChunks;
    load_a<A, kK>(warp, instruction, kAccumulators, a);
    load_b<B, kK>(warp, instruction, kAccumulators + kARegisters, b);
    constexpr int kC = kAccumulators + kARegisters + kBRegisters;
    if constexpr (kHalfSums) {
        load_c_half(warp, instruction, kC, c[0]);
    } else {
        load_c(warp, instruction, kC, c[0]);
    }
    for (int m = 0; m < kM; ++m) {
        Columns<Number> sums = {};
        for (int k = 0; k < kK; ++k) {
            sums = multiply_add(a[m][k], b[k], sums);
        }
        if constexpr (kSaturates) {
            for (int n = 0; n < kN; ++n) {
                c[m][n] = saturated(static_cast<int64_t>(sums[n]) + c[m][n]);
            }
        } else {
            sums = add(sums, load_columns<Number>(c[m]));
            std::memcpy(c[m], &sums, sizeof sums);
        }
    }
    if constexpr (kHalfSums) {
        store_d_half(warp, instruction, c[0]);
    } else {
        store_d(warp, instruction, c[0]);
    }
}

template <class A, class B, int kK>
void add_float(Ops& ops) {
    const std::string shape = "mma.m16n8k" + std::to_string(kK);
    const std::string factors = std::string(".") + A::kName + "." + B::kName;
    ops.add(shape + ".f32" + factors + ".f32", multiply<A, B, kK, false, false>);
    if constexpr (A::kBytes == 1 || std::is_same_v<A, HalfFactor>) {
        ops.add(shape + ".f16" + factors + ".f16", multiply<A, B, kK, true, false>);
    }
}

template <class A, class B, int kK>
void add_integer(Ops& ops) {
    const std::string name = "mma.m16n8k" + std::to_string(kK) + ".s32." + A::kName + "." + B::kName + ".s32";
    ops.add(name, multiply<A, B, kK, false, false>);
    ops.add(name + ".satfinite", multiply<A, B, kK, false, true>);
}

template <int kK>
void add_bytes(Ops& ops) {
    add_float<E4m3Factor, E4m3Factor, kK>(ops);
    add_float<E4m3Factor, E5m2Factor, kK>(ops);
    add_float<E5m2Factor, E4m3Factor, kK>(ops);
    add_float<E5m2Factor, E5m2Factor, kK>(ops);
    add_integer<S8Factor, S8Factor, kK>(ops);
    add_integer<S8Factor, U8Factor, kK>(ops);
    add_integer<U8Factor, S8Factor, kK>(ops);
    add_integer<U8Factor, U8Factor, kK>(ops);
}

}  // namespace

std::array<float, 256> decoded(const SmallFormat& format) {
    std::array<float, 256> values;
    for (uint32_t code = 0; code < values.size(); ++code) {
        values[code] = format.decode(code);
    }
    return values;
}

void add_matrix_products(Ops& ops) {
    add_float<Bfloat16Factor, Bfloat16Factor, 8>(ops);
    add_float<Bfloat16Factor, Bfloat16Factor, 16>(ops);
    add_float<HalfFactor, HalfFactor, 8>(ops);
    add_float<HalfFactor, HalfFactor, 16>(ops);
    add_float<Tf32Factor, Tf32Factor, 4>(ops);
    add_float<Tf32Factor, Tf32Factor, 8>(ops);
    add_bytes<16>(ops);
    add_bytes<32>(ops);
}

}  // namespace ptx

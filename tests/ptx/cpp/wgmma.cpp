// wgmma.mma_async: d = a b + d of 64 x n by four warps, of which each computes its own 16 rows.
//
// Sums are made as those of mma: in float32 from the lowest k on, from zero, then added to the accumulator.
#include "wgmma.h"

#include <algorithm>
#include <string>
#include <vector>

#include "factors.h"
#include "memory.h"
#include "proxies.h"
#include "wgmma_operands.h"

namespace ptx {
namespace {

using Product = WgmmaQueue::Product;

constexpr int kM = 16, kMostN = 256;
// Every shape has 32 bytes of K.
constexpr int kKBytes = 32;
constexpr int kLines = 8;

// Lines of an operand and their bytes, as MatrixDescriptor::chunk_offset has them.
struct Tile {
    MatrixDescriptor descriptor;
    bool transposed;
    int first_line, lines, first_byte, bytes;

    // function(byte within the tile's bytes, offset in shared memory)
    template <class F>
    void for_chunks(F function) const {
        for (int line = 0; line < lines; ++line) {
            for (int byte = 0; byte < bytes; byte += kChunkBytes) {
                function(line * bytes + byte,
                         descriptor.chunk_offset(first_line + line, first_byte + byte, transposed));
            }
        }
    }
};

Tile tile_of(uint64_t descriptor, bool transposed, int first_row, int rows, int element_bytes) {
    if (transposed) {
        return {MatrixDescriptor(descriptor), true, 0, kKBytes / element_bytes, first_row * element_bytes,
                rows * element_bytes};
    }
    return {MatrixDescriptor(descriptor), false, first_row, rows, 0, kKBytes};
}

Tile tile_a(const Warp& warp, const Product& product) {
    return tile_of(product.a, product.instruction->has(kATransposed), static_cast<int>(warp.id % 4) * kM, kM,
                   product.element_bytes);
}

Tile tile_b(const Product& product) {
    const Instruction& instruction = *product.instruction;
    return tile_of(product.b, instruction.has(kBTransposed), 0, static_cast<int>(instruction.imm),
                   product.element_bytes);
}

void read_tile(const Block& block, const Tile& tile, uint8_t* bytes) {
    tile.for_chunks([&](int at, uint32_t offset) {
        if (offset + kChunkBytes <= block.shared.size()) {
            std::memcpy(bytes + at, block.shared.data() + offset, kChunkBytes);
        } else {
            std::memset(bytes + at, 0xff, kChunkBytes);
        }
    });
}

// Numbers as matrix[k][row].
template <class Factor, class Number>
void decode_tile(const Tile& tile, const uint8_t* bytes, Number* matrix, int rows) {
    constexpr int kK = kKBytes / Factor::kBytes;
    Number line[kMostN > kK ? kMostN : kK];
    for (int i = 0; i < tile.lines; ++i) {
        decode_factors<Factor>(bytes + i * tile.bytes, tile.bytes, line);
        if (tile.transposed) {
            std::copy_n(line, rows, matrix + i * rows);
            continue;
        }
        for (int k = 0; k < kK; ++k) {
            matrix[k * rows + i] = line[k];
        }
    }
}

// The registers of A are those of mma: eight rows of 16 bytes each.
template <class Factor, class Number>
void decode_registers(Warp& warp, const Instruction& instruction, Number* matrix) {
    constexpr int kElements = kChunkBytes / Factor::kBytes;
    for (int i = 0; i < kFactorRegisters; ++i) {
        const uint8_t* rows = warp.operand<uint8_t>(instruction, accumulators(instruction) + i);
        for (int row = 0; row < kLines; ++row) {
            Number line[kElements];
            decode_factors<Factor>(rows + row * kChunkBytes, kChunkBytes, line);
            for (int k = 0; k < kElements; ++k) {
                matrix[(i / 2 * kElements + k) * kM + i % 2 * kLines + row] = line[k];
            }
        }
    }
}

// The four warps of a warpgroup decode the same B one behind the other.
template <class Factor>
const typename Factor::Number* decoded_b(const Block& block, const Tile& tile, int n) {
    using Number = typename Factor::Number;
    static thread_local std::vector<uint8_t> known;
    static thread_local Number matrix[kKBytes * kMostN];
    std::vector<uint8_t> bytes(tile.lines * tile.bytes + 1);
    read_tile(block, tile, bytes.data());
    bytes.back() = tile.transposed;
    if (bytes != known) {
        decode_tile<Factor>(tile, bytes.data(), matrix, n);
        known = std::move(bytes);
    }
    return matrix;
}

float sum(float a, float b) { return a + b; }
// Integers wrap.
int32_t sum(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }

// Eight columns of the accumulators, which lie in registers as those of mma do.
template <class Number>
void add_columns(Warp& warp, const Instruction& instruction, int eight, const Number (&products)[kM][kColumns],
                 bool accumulate) {
    for (int half = 0; half < 2; ++half) {
        const Number* from = products[half * kLines];
        for (int odd = 0; odd < 2; ++odd) {
            Number* to = warp.operand<Number>(instruction, 4 * eight + 2 * half + odd);
            for (int lane = 0; lane < kLanes; ++lane) {
                to[lane] = sum(accumulate ? to[lane] : Number(0), from[2 * lane + odd]);
            }
        }
    }
}

void add_half_columns(Warp& warp, const Instruction& instruction, int eight, const float (&products)[kM][kColumns],
                      bool accumulate) {
    for (int half = 0; half < 2; ++half) {
        const float* from = products[half * kLines];
        uint16_t* to = warp.operand<uint16_t>(instruction, 2 * eight + half);
        for (int i = 0; i < 2 * kLanes; ++i) {
            to[i] = static_cast<uint16_t>(to_half((accumulate ? from_half(to[i]) : 0.0f) + from[i]));
        }
    }
}

template <class A, class B, bool kHalfSums>
void multiply(Warp& warp, const Product& product) {
    using Number = typename A::Number;
    constexpr int kK = kKBytes / A::kBytes;
    const Instruction& instruction = *product.instruction;
    const int n = static_cast<int>(instruction.imm);
    alignas(64) Number a[kK * kM];
    if (instruction.has(kARegisters)) {
        decode_registers<A>(warp, instruction, a);
    } else {
        const Tile tile = tile_a(warp, product);
        uint8_t bytes[kM * kKBytes];
        read_tile(*warp.block, tile, bytes);
        decode_tile<A>(tile, bytes, a, kM);
    }
    if (instruction.has(kNegateA) != instruction.has(kNegateB)) {
        std::transform(a, a + kK * kM, a, [](Number value) { return -value; });
    }
    const Number* b = decoded_b<B>(*warp.block, tile_b(product), n);
    for (int eight = 0; eight < n / kColumns; ++eight) {
        alignas(64) Number products[kM][kColumns];
        for (int m = 0; m < kM; ++m) {
            Columns<Number> sums = {};
            for (int k = 0; k < kK; ++k) {
                sums = multiply_add(a[k * kM + m], b + k * n + eight * kColumns, sums);
            }
            std::memcpy(products[m], &sums, sizeof sums);
        }
        if constexpr (kHalfSums) {
            add_half_columns(warp, instruction, eight, products, product.accumulate);
        } else {
            add_columns(warp, instruction, eight, products, product.accumulate);
        }
    }
}

template <class A, class B, bool kHalfSums>
void issue(Warp& warp, const Instruction& instruction, Lanes lanes) {
    Product product;
    product.instruction = &instruction;
    product.multiply = multiply<A, B, kHalfSums>;
    product.element_bytes = A::kBytes;
    issue_wgmma(warp, product, lanes);
}

template <class A, class B>
void add_float(Ops& ops) {
    const std::string factors = std::string(".") + A::kName + "." + B::kName;
    ops.add("wgmma.f32" + factors, issue<A, B, false>, Control::kWgmma);
    if constexpr (A::kBytes == 1 || std::is_same_v<A, HalfFactor>) {
        ops.add("wgmma.f16" + factors, issue<A, B, true>, Control::kWgmma);
    }
}

template <class A, class B>
void add_integer(Ops& ops) {
    ops.add(std::string("wgmma.s32.") + A::kName + "." + B::kName, issue<A, B, false>, Control::kWgmma);
}

void check_tile(Warp& warp, AsyncRead& read, const Tile& tile, const Product& product, bool finished) {
    if (tile.descriptor.base_offset) {
        throw Fault(warp.place(*product.instruction), "a matrix descriptor with a base offset is not modelled");
    }
    // Chunks beside each other go together.
    uint32_t first = 0, bytes = 0;
    const auto check = [&] {
        if (finished && bytes) {
            read.finish(*warp.block, first, bytes, product.issued, Kind::kWgmmaOperand);
        } else if (bytes) {
            read.issue(*warp.block, first, bytes);
        }
    };
    tile.for_chunks([&](int, uint32_t offset) {
        if (bytes == kChunkBytes && (offset ^ first) == kChunkBytes) {
            first = std::min(first, offset);
            bytes += kChunkBytes;
            return;
        }
        check();
        first = offset;
        bytes = kChunkBytes;
    });
    check();
}

}  // namespace

void check_factors(Warp& warp, const Product& product, bool finished) {
    AsyncRead read(warp, *product.instruction);
    if (!product.instruction->has(kARegisters)) {
        check_tile(warp, read, tile_a(warp, product), product, finished);
    }
    check_tile(warp, read, tile_b(product), product, finished);
}

void add_warpgroup_products(Ops& ops) {
    add_float<Bfloat16Factor, Bfloat16Factor>(ops);
    add_float<HalfFactor, HalfFactor>(ops);
    add_float<Tf32Factor, Tf32Factor>(ops);
    add_float<E4m3Factor, E4m3Factor>(ops);
    add_float<E4m3Factor, E5m2Factor>(ops);
    add_float<E5m2Factor, E4m3Factor>(ops);
    add_float<E5m2Factor, E5m2Factor>(ops);
    add_integer<S8Factor, S8Factor>(ops);
    add_integer<S8Factor, U8Factor>(ops);
    add_integer<U8Factor, S8Factor>(ops);
    add_integer<U8Factor, U8Factor>(ops);
}

}  // namespace ptx

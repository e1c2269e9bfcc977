// Types of the tensor cores' factors: 16 bytes of them as float32 or int32.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#include "number_formats.h"

namespace ptx {

constexpr int kChunkBytes = 16;

// kBytes: of an element. Number: what they are multiplied as.
struct Bfloat16Factor {
    static constexpr int kBytes = 2;
    static constexpr const char* kName = "bf16";
    using Number = float;
    static float decode(uint16_t value) { return from_bfloat16(value); }
};
struct HalfFactor {
    static constexpr int kBytes = 2;
    static constexpr const char* kName = "f16";
    using Number = float;
    static float decode(uint16_t value) { return from_half(value); }
};
struct Tf32Factor {
    static constexpr int kBytes = 4;
    static constexpr const char* kName = "tf32";
    using Number = float;
    // The bits that tf32 has not are ignored.
    static float decode(uint32_t value) { return bits_of<float>(value & ~0x1fffu); }
};
// All values of an 8-bit format, by their codes.
std::array<float, 256> decoded(const SmallFormat& format);
struct E4m3Factor {
    static constexpr int kBytes = 1;
    static constexpr const char* kName = "e4m3";
    using Number = float;
    static float decode(uint8_t value) {
        static const std::array<float, 256> values = decoded(kE4m3);
        return values[value];
    }
};
struct E5m2Factor {
    static constexpr int kBytes = 1;
    static constexpr const char* kName = "e5m2";
    using Number = float;
    static float decode(uint8_t value) {
        static const std::array<float, 256> values = decoded(kE5m2);
        return values[value];
    }
};
struct S8Factor {
    static constexpr int kBytes = 1;
    static constexpr const char* kName = "s8";
    using Number = int32_t;
    static int32_t decode(uint8_t value) { return static_cast<int8_t>(value); }
};
struct U8Factor {
    static constexpr int kBytes = 1;
    static constexpr const char* kName = "u8";
    using Number = int32_t;
    static int32_t decode(uint8_t value) { return value; }
};

template <class Factor>
using Code =
    std::conditional_t<Factor::kBytes == 1, uint8_t, std::conditional_t<Factor::kBytes == 2, uint16_t, uint32_t>>;

// Elements of `bytes` bytes.
template <class Factor>
void decode_factors(const uint8_t* from, int bytes, typename Factor::Number* to) {
    for (int i = 0; i < bytes / Factor::kBytes; ++i) {
        Code<Factor> code;
        std::memcpy(&code, from + i * Factor::kBytes, sizeof code);
        to[i] = Factor::decode(code);
    }
}

// Eight columns of a product.
constexpr int kColumns = 8;
template <class Number>
using Columns [[gnu::vector_size(kColumns * sizeof(Number))]] = Number;

template <class Number>
Columns<Number> load_columns(const Number* from) {
    Columns<Number> columns;
    std::memcpy(&columns, from, sizeof columns);
    return columns;
}

// sums + factor * row, each with one rounding.
inline Columns<float> multiply_add(float factor, const float* row, Columns<float> sums) {
#if defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(_mm256_set1_ps(factor), _mm256_loadu_ps(row), sums);
#else
    for (int i = 0; i < kColumns; ++i) {
        sums[i] = __builtin_fmaf(factor, row[i], sums[i]);
    }
    return sums;
#endif
}

inline Columns<float> add(Columns<float> a, Columns<float> b) { return a + b; }
// Integers wrap.
inline Columns<int32_t> add(Columns<int32_t> a, Columns<int32_t> b) {
    return bits_of<Columns<int32_t>>(bits_of<Columns<uint32_t>>(a) + bits_of<Columns<uint32_t>>(b));
}
// Factors have 8 bits.
inline Columns<int32_t> multiply_add(int32_t factor, const int32_t* row, Columns<int32_t> sums) {
    return add(sums, factor * load_columns(row));
}

}  // namespace ptx

// Floats narrower than 32 bits, as loops over lanes can compute them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

template <class To, class From>
To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

constexpr uint32_t kSignBit = 0x80000000, kInfinity = 0x7f800000;
constexpr uint32_t kCanonicalNan = 0x7fffffff;

inline float ftz(float value) {
    const uint32_t bits = bits_of<uint32_t>(value);
    return (bits & kInfinity) == 0 ? bits_of<float>(bits & kSignBit) : value;
}

// The upper bits are ignored.
inline float from_bfloat16(uint32_t value) { return bits_of<float>(value << 16); }

inline float from_half(uint32_t value) {
    const uint32_t magnitude = (value & 0x7fff) << 13, sign = (value & 0x8000) << 16;
    // The exponents' biases differ by 112; the product is exact for subnormal values too.
    const float scaled = bits_of<float>(magnitude) * 0x1p112f;
    const uint32_t finite = bits_of<uint32_t>(scaled);
    const uint32_t special = magnitude | kInfinity;
    return bits_of<float>((magnitude >= 0x0f800000 ? special : finite) | sign);
}

inline uint32_t to_bfloat16(float value) {
    const uint32_t bits = bits_of<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & ~kSignBit) > kInfinity ? 0x7fff : rounded;
}

inline uint32_t to_bfloat16_rz(float value) {
    const uint32_t bits = bits_of<uint32_t>(value);
    return (bits & ~kSignBit) > kInfinity ? 0x7fff : bits >> 16;
}

inline uint32_t to_half(float value) {
    const uint32_t bits = bits_of<uint32_t>(value);
    const uint32_t magnitude = bits & ~kSignBit, sign = bits >> 16 & 0x8000;
    const uint32_t odd = magnitude >> 13 & 1;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
    // Adding 0.5 leaves the steps of a subnormal half in the lowest bits, rounded.
    const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t large = magnitude >= 0x477ff000 ? 0x7c00 : finite;
    return magnitude > kInfinity ? 0x7fff : large | sign;
}

inline uint32_t to_half_rz(float value) {
    const uint32_t bits = bits_of<uint32_t>(value);
    const uint32_t magnitude = bits & ~kSignBit, sign = bits >> 16 & 0x8000;
    if (magnitude > kInfinity) {
        return 0x7fff;
    }
    if (magnitude >= 0x47800000) {
        return sign | (magnitude == kInfinity ? 0x7c00 : 0x7bff);
    }
    if (magnitude < (113u << 23)) {
        return sign | static_cast<uint32_t>(bits_of<float>(magnitude) * 0x1p24f);
    }
    return sign | (magnitude - (112u << 23)) >> 13;
}

// For templates over both.
struct Bfloat16 {
    static constexpr const char* kName = "bf16";
    static float decode(uint32_t value) { return from_bfloat16(value); }
    static uint32_t encode(float value) { return to_bfloat16(value); }
    static uint32_t encode_rz(float value) { return to_bfloat16_rz(value); }
};
struct Half {
    static constexpr const char* kName = "f16";
    static float decode(uint32_t value) { return from_half(value); }
    static uint32_t encode(float value) { return to_half(value); }
    static uint32_t encode_rz(float value) { return to_half_rz(value); }
};

// tf32 has 10 bits of a float32's mantissa; the lower ones are zero.
inline uint32_t to_tf32(uint32_t bits, bool ties_to_even) {
    if ((bits & kInfinity) == kInfinity) {
        return bits & ~kSignBit & ~kInfinity ? kCanonicalNan : bits;
    }
    return (bits + 0xfff + (ties_to_even ? bits >> 13 & 1 : 1)) & ~0x1fffu;
}

// PTX's min and max: a NaN gives way to a number, -0 is less than +0.
template <class T>
T minimum(T a, T b) {
    const T smaller = a < b || (a == b && std::signbit(a)) ? a : b;
    return a != a ? b : b != b ? a : smaller;
}
template <class T>
T maximum(T a, T b) {
    const T larger = a > b || (a == b && !std::signbit(a)) ? a : b;
    return a != a ? b : b != b ? a : larger;
}

// A format of at most 8 bits. exponent, mantissa: their bits; bias: of the exponent.
// infinities: the highest exponent is for infinity and NaN; otherwise NaN, if there is one, has all bits set.
struct SmallFormat {
    int exponent, mantissa, bias;
    bool infinities, nan;

    int bits() const { return 1 + exponent + mantissa; }
    float largest() const;
    float decode(uint32_t code) const;
    // To the nearest, ties to even; what is too large becomes the largest. sign of zero is kept.
    uint32_t encode(float value) const;
};

constexpr SmallFormat kE4m3{4, 3, 7, false, true};
constexpr SmallFormat kE5m2{5, 2, 15, true, true};
constexpr SmallFormat kE3m2{3, 2, 3, false, false};
constexpr SmallFormat kE2m3{2, 3, 1, false, false};
constexpr SmallFormat kE2m1{2, 1, 1, false, false};

}  // namespace ptx

// Conversions from and to pairs of floats of at most 8 bits.
#include <string>

#include "lanewise.h"
#include "number_formats.h"

namespace ptx {
namespace {

using u32 = uint32_t;

// NaN stays.
float relu(float value) { return value < 0 ? 0.0f : value; }

struct E4m3 {
    static constexpr const char* kName = "e4m3x2";
    static constexpr const SmallFormat& kFormat = kE4m3;
};
struct E5m2 {
    static constexpr const char* kName = "e5m2x2";
    static constexpr const SmallFormat& kFormat = kE5m2;
};
struct E3m2 {
    static constexpr const char* kName = "e3m2x2";
    static constexpr const SmallFormat& kFormat = kE3m2;
};
struct E2m3 {
    static constexpr const char* kName = "e2m3x2";
    static constexpr const SmallFormat& kFormat = kE2m3;
};
struct E2m1 {
    static constexpr const char* kName = "e2m1x2";
    static constexpr const SmallFormat& kFormat = kE2m1;
};

// Two codes share 16 bits, or 8 if they have 4.
template <class Format>
constexpr int kStep = std::is_same_v<Format, E2m1> ? 4 : 8;

template <class Format, bool kRelu>
u32 encode(float upper, float lower) {
    const SmallFormat& format = Format::kFormat;
    return format.encode(kRelu ? relu(upper) : upper) << kStep<Format> | format.encode(kRelu ? relu(lower) : lower);
}

template <class Format, bool kRelu>
u32 decode(u32 codes) {
    const auto half = [](u32 code) {
        const float value = Format::kFormat.decode(code & ((1u << kStep<Format>)-1));
        return to_half(kRelu ? relu(value) : value);
    };
    return half(codes >> kStep<Format>) << 16 | half(codes);
}

template <class Format, bool kRelu>
void add_conversions(Ops& ops) {
    const std::string relu = kRelu ? ".relu" : "";
    const std::string prefix = "cvt.rn.satfinite" + relu + "." + Format::kName;
    ops.add(prefix + ".f32", lanewise<u32(float, float)>([](float a, float b) { return encode<Format, kRelu>(a, b); }));
    ops.add(prefix + ".f16x2",
            lanewise<u32(u32)>([](u32 a) { return encode<Format, kRelu>(from_half(a >> 16), from_half(a)); }));
    ops.add("cvt.rn" + relu + ".f16x2." + Format::kName,
            lanewise<u32(u32)>([](u32 a) { return decode<Format, kRelu>(a); }));
}

template <class Format>
void add_format(Ops& ops) {
    add_conversions<Format, false>(ops);
    add_conversions<Format, true>(ops);
}

// ue8m0 is a float32's exponent: a power of two from 2^-127, which is 0, to 2^127. Signs are lost.
u32 to_ue8m0(float value, bool up) {
    const u32 magnitude = bits_of<u32>(value) & ~kSignBit;
    if (magnitude > kInfinity) {
        return 255;
    }
    const u32 exponent = magnitude >> 23;
    // 2^-127 is a subnormal float32, with only its highest bit set.
    const bool between = exponent ? (magnitude & 0x7fffff) != 0 : magnitude > 0x400000;
    return std::min(exponent + (up && between ? 1 : 0), 254u);
}

u32 from_ue8m0(u32 code) {
    code &= 255;
    // As bfloat16.
    return code == 255 ? 0x7fff : code ? code << 7 : 0x40;
}

template <bool kUp>
void add_ue8m0(Ops& ops, const std::string& prefix) {
    ops.add(prefix + ".f32",
            lanewise<u32(float, float)>([](float a, float b) { return to_ue8m0(a, kUp) << 8 | to_ue8m0(b, kUp); }));
    ops.add(prefix + ".bf16x2", lanewise<u32(u32)>([](u32 a) {
                return to_ue8m0(from_bfloat16(a >> 16), kUp) << 8 | to_ue8m0(from_bfloat16(a), kUp);
            }));
}

}  // namespace

void add_packed_conversions(Ops& ops) {
    add_format<E4m3>(ops);
    add_format<E5m2>(ops);
    add_format<E3m2>(ops);
    add_format<E2m3>(ops);
    add_format<E2m1>(ops);
    add_ue8m0<false>(ops, "cvt.rz.satfinite.ue8m0x2");
    add_ue8m0<true>(ops, "cvt.rp.satfinite.ue8m0x2");
    ops.add("cvt.rn.bf16x2.ue8m0x2",
            lanewise<u32(u32)>([](u32 a) { return from_ue8m0(a >> 8) << 16 | from_ue8m0(a); }));
}

}  // namespace ptx

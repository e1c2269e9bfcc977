// Conversions among float formats of 16 bits and more.
#include <string>

#include "lanewise.h"
#include "number_formats.h"

namespace ptx {
namespace {

using u32 = uint32_t;

enum class Rounding { kNearest, kZero, kDown, kUp };

float to_float(double value, Rounding rounding) {
    const float nearest = static_cast<float>(value);
    const double error = static_cast<double>(nearest) - value;
    const bool lower = error > 0 && (rounding == Rounding::kDown || (rounding == Rounding::kZero && value > 0));
    const bool raise = error < 0 && (rounding == Rounding::kUp || (rounding == Rounding::kZero && value < 0));
    if (lower) {
        return std::nextafter(nearest, -bits_of<float>(kInfinity));
    }
    return raise ? std::nextafter(nearest, bits_of<float>(kInfinity)) : nearest;
}

// NaN stays, as the canonical one of the format.
float relu(float value) { return value < 0 || (value == 0 && std::signbit(value)) ? 0.0f : value; }

template <class Format, bool kZero, bool kRelu>
struct Encode {
    u32 operator()(float value) const {
        const float positive = kRelu ? relu(value) : value;
        return kZero ? Format::encode_rz(positive) : Format::encode(positive);
    }
};

template <class Format, bool kZero, bool kRelu>
void add_encodings(Ops& ops) {
    using Encoding = Encode<Format, kZero, kRelu>;
    const std::string prefix = std::string("cvt.") + (kZero ? "rz" : "rn") + (kRelu ? ".relu." : ".") + Format::kName;
    ops.add(prefix + ".f32", lanewise<u32(float)>(Encoding{}));
    ops.add(prefix + "x2.f32",
            lanewise<u32(float, float)>([](float a, float b) { return Encoding{}(a) << 16 | Encoding{}(b); }));
}

template <class Format>
void add_format(Ops& ops) {
    const std::string name = Format::kName;
    ops.add("cvt.f32." + name, lanewise<float(u32)>([](u32 a) { return Format::decode(a); }));
    ops.add("cvt.ftz.f32." + name, lanewise<float(u32)>([](u32 a) { return ftz(Format::decode(a)); }));
    ops.add("cvt.f64." + name, lanewise<double(u32)>([](u32 a) { return double(Format::decode(a)); }));
    add_encodings<Format, false, false>(ops);
    add_encodings<Format, false, true>(ops);
    add_encodings<Format, true, false>(ops);
    add_encodings<Format, true, true>(ops);
}

template <Rounding kRounding>
void add_from_double(Ops& ops, const std::string& name) {
    ops.add("cvt." + name + ".f32.f64", lanewise<float(double)>([](double a) { return to_float(a, kRounding); }));
    ops.add("cvt." + name + ".ftz.f32.f64",
            lanewise<float(double)>([](double a) { return ftz(to_float(a, kRounding)); }));
}

template <bool kEven>
void add_tf32(Ops& ops, const std::string& name) {
    ops.add("cvt." + name + ".tf32.f32", lanewise<u32(u32)>([](u32 a) { return to_tf32(a, kEven); }));
    ops.add("cvt." + name + ".relu.tf32.f32",
            lanewise<u32(u32)>([](u32 a) { return to_tf32(bits_of<u32>(relu(bits_of<float>(a))), kEven); }));
}

}  // namespace

void add_float_conversions(Ops& ops) {
    add_format<Half>(ops);
    add_format<Bfloat16>(ops);
    // From 16 bits to 16 bits float32 between loses nothing.
    ops.add("cvt.rn.bf16.f16", lanewise<u32(u32)>([](u32 a) { return to_bfloat16(from_half(a)); }));
    ops.add("cvt.rn.f16.bf16", lanewise<u32(u32)>([](u32 a) { return to_half(from_bfloat16(a)); }));
    ops.add("cvt.f64.f32", lanewise<double(float)>([](float a) { return double(a); }));
    ops.add("cvt.ftz.f64.f32", lanewise<double(float)>([](float a) { return double(ftz(a)); }));
    ops.add("cvt.ftz.f32.f32", lanewise<float(float)>([](float a) { return ftz(a); }));
    ops.add("cvt.sat.f32.f32", lanewise<float(float)>([](float a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; }));
    ops.add("cvt.ftz.sat.f32.f32",
            lanewise<float(float)>([](float a) { return ftz(a) > 0 ? std::min(a, 1.0f) : 0.0f; }));
    add_from_double<Rounding::kNearest>(ops, "rn");
    add_from_double<Rounding::kZero>(ops, "rz");
    add_from_double<Rounding::kDown>(ops, "rm");
    add_from_double<Rounding::kUp>(ops, "rp");
    add_tf32<false>(ops, "rna");
    add_tf32<true>(ops, "rn");
    ops.add("cvt.rz.tf32.f32", lanewise<u32(u32)>([](u32 a) { return a & ~0x1fffu; }));
}

}  // namespace ptx

// Arithmetic on float32 and float64. Approximate functions are computed in float64 and rounded once.
#include <string>

#include "lanewise.h"
#include "number_formats.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

float nan() { return bits_of<float>(kCanonicalNan); }

template <class F>
struct Flushing {
    float operator()(float a) const { return ftz(F{}(ftz(a))); }
    float operator()(float a, float b) const { return ftz(F{}(ftz(a), ftz(b))); }
    float operator()(float a, float b, float c) const { return ftz(F{}(ftz(a), ftz(b), ftz(c))); }
};

// Both with and without .ftz.
template <class Signature, class F>
void add_f32(Ops& ops, const std::string& name, F function) {
    ops.add(name + ".f32", lanewise<Signature>(function));
    ops.add(name + ".ftz.f32", lanewise<Signature>(Flushing<F>{}));
}

template <class F>
struct InDouble {
    float operator()(float a) const { return static_cast<float>(F{}(static_cast<double>(a))); }
};

template <class F>
void add_function(Ops& ops, const std::string& name, F) {
    add_f32<float(float)>(ops, name, InDouble<F>{});
}

void add_f64(Ops& ops) {
    using T = double;
    ops.add("add.f64", lanewise<T(T, T)>([](T a, T b) { return a + b; }));
    ops.add("sub.f64", lanewise<T(T, T)>([](T a, T b) { return a - b; }));
    ops.add("mul.f64", lanewise<T(T, T)>([](T a, T b) { return a * b; }));
    ops.add("div.f64", lanewise<T(T, T)>([](T a, T b) { return a / b; }));
    ops.add("fma.f64", lanewise<T(T, T, T)>([](T a, T b, T c) { return __builtin_fma(a, b, c); }));
    ops.add("neg.f64", lanewise<T(T)>([](T a) { return -a; }));
    ops.add("abs.f64", lanewise<T(T)>([](T a) { return std::fabs(a); }));
    ops.add("min.f64", lanewise<T(T, T)>([](T a, T b) { return minimum(a, b); }));
    ops.add("max.f64", lanewise<T(T, T)>([](T a, T b) { return maximum(a, b); }));
    ops.add("sqrt.f64", lanewise<T(T)>([](T a) { return std::sqrt(a); }));
    ops.add("rcp.f64", lanewise<T(T)>([](T a) { return 1.0 / a; }));
    ops.add("copysign.f64", lanewise<T(T, T)>([](T a, T b) { return std::copysign(b, a); }));
}

// Two float32 in a register of 64 bits.
template <class F>
u64 both_halves(F function, u64 a, u64 b, u64 c) {
    const auto part = [&](int shift) {
        return bits_of<u32>(function(bits_of<float>(u32(a >> shift)), bits_of<float>(u32(b >> shift)),
                                     bits_of<float>(u32(c >> shift))));
    };
    return u64(part(32)) << 32 | part(0);
}

template <class F>
constexpr Handler two_f32(F) {
    return lanewise<u64(u64, u64)>([](u64 a, u64 b) { return both_halves(F{}, a, b, 0); });
}

// One factor or summand is narrower.
template <class Narrow>
void add_mixed(Ops& ops) {
    const std::string type = Narrow::kName;
    ops.add("add.f32." + type, lanewise<float(u32, float)>([](u32 a, float c) { return Narrow::decode(a) + c; }));
    ops.add("sub.f32." + type, lanewise<float(u32, float)>([](u32 a, float c) { return Narrow::decode(a) - c; }));
    ops.add("fma.f32." + type, lanewise<float(u32, u32, float)>([](u32 a, u32 b, float c) {
                return __builtin_fmaf(Narrow::decode(a), Narrow::decode(b), c);
            }));
}

}  // namespace

void add_floats(Ops& ops) {
    using T = float;
    add_f32<T(T, T)>(ops, "add", [](T a, T b) { return a + b; });
    add_f32<T(T, T)>(ops, "sub", [](T a, T b) { return a - b; });
    add_f32<T(T, T)>(ops, "mul", [](T a, T b) { return a * b; });
    add_f32<T(T, T)>(ops, "div", [](T a, T b) { return a / b; });
    add_f32<T(T, T, T)>(ops, "fma", [](T a, T b, T c) { return __builtin_fmaf(a, b, c); });
    add_f32<T(T)>(ops, "neg", [](T a) { return bits_of<T>(bits_of<u32>(a) ^ kSignBit); });
    add_f32<T(T)>(ops, "abs", [](T a) { return bits_of<T>(bits_of<u32>(a) & ~kSignBit); });
    add_f32<T(T, T)>(ops, "copysign", [](T a, T b) { return std::copysign(b, a); });
    add_f32<T(T, T)>(ops, "min", [](T a, T b) { return minimum(a, b); });
    add_f32<T(T, T)>(ops, "max", [](T a, T b) { return maximum(a, b); });
    add_f32<T(T, T)>(ops, "min.NaN", [](T a, T b) { return a != a || b != b ? nan() : minimum(a, b); });
    add_f32<T(T, T)>(ops, "max.NaN", [](T a, T b) { return a != a || b != b ? nan() : maximum(a, b); });
    add_function(ops, "sqrt", [](double a) { return std::sqrt(a); });
    add_function(ops, "rsqrt", [](double a) { return 1.0 / std::sqrt(a); });
    add_function(ops, "rcp", [](double a) { return 1.0 / a; });
    add_function(ops, "ex2", [](double a) { return std::exp2(a); });
    add_function(ops, "lg2", [](double a) { return std::log2(a); });
    add_function(ops, "sin", [](double a) { return std::sin(a); });
    add_function(ops, "cos", [](double a) { return std::cos(a); });
    add_function(ops, "tanh", [](double a) { return std::tanh(a); });
    add_f64(ops);
    ops.add("add.f32x2", two_f32([](T a, T b, T) { return a + b; }));
    ops.add("sub.f32x2", two_f32([](T a, T b, T) { return a - b; }));
    ops.add("mul.f32x2", two_f32([](T a, T b, T) { return a * b; }));
    ops.add("fma.f32x2", lanewise<u64(u64, u64, u64)>([](u64 a, u64 b, u64 c) {
                return both_halves([](T x, T y, T z) { return __builtin_fmaf(x, y, z); }, a, b, c);
            }));
    add_mixed<Bfloat16>(ops);
    add_mixed<Half>(ops);
}

}  // namespace ptx

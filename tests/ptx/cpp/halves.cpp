// Arithmetic on float16 and bfloat16, alone and in pairs: each result is computed in float32 and rounded.
#include <string>

#include "lanewise.h"
#include "number_formats.h"

namespace ptx {
namespace {

using u32 = uint32_t;

template <class Format, class F>
struct Single {
    template <class... T>
    u32 operator()(T... values) const {
        return Format::encode(F{}(Format::decode(values)...));
    }
};
template <class Format, class F>
struct Pair {
    template <class... T>
    u32 operator()(T... values) const {
        return Single<Format, F>{}(values...) | Single<Format, F>{}((values >> 16)...) << 16;
    }
};

template <class Format, class Signature, class F>
void add_both(Ops& ops, const std::string& name, F) {
    ops.add(name + "." + Format::kName, lanewise<Signature>(Single<Format, F>{}));
    ops.add(name + "." + Format::kName + "x2", lanewise<Signature>(Pair<Format, F>{}));
}

// A product has 22 bits at most, so that a fused sum in float64 is rounded to float32 only where 29 bits decide.
float fused(float a, float b, float c) {
    const double product = static_cast<double>(a) * b;
    const double sum = product + c;
    // Rounding to odd keeps what is below the last bit in sight of the next rounding.
    const double error = std::fabs(product) > std::fabs(double(c)) ? (product - sum) + c : (c - sum) + product;
    uint64_t bits = bits_of<uint64_t>(sum);
    if (error != 0 && sum == sum && !(bits & 1) && std::isfinite(sum)) {
        bits += (error > 0) == (sum > 0) ? 1 : -1;
    }
    const double odd = bits_of<double>(bits);
    float nearest = static_cast<float>(odd);
    uint32_t narrow = bits_of<u32>(nearest);
    if (static_cast<double>(nearest) != odd && nearest == nearest && std::isfinite(nearest) && !(narrow & 1)) {
        narrow += (static_cast<double>(nearest) < odd) == (odd > 0) ? 1 : -1;
        nearest = bits_of<float>(narrow);
    }
    return nearest;
}

float nan() { return bits_of<float>(kCanonicalNan); }

template <class Format>
void add_arithmetic(Ops& ops) {
    using Unary = u32(u32);
    using Binary = u32(u32, u32);
    using Ternary = u32(u32, u32, u32);
    add_both<Format, Binary>(ops, "add", [](float a, float b) { return a + b; });
    add_both<Format, Binary>(ops, "sub", [](float a, float b) { return a - b; });
    add_both<Format, Binary>(ops, "mul", [](float a, float b) { return a * b; });
    add_both<Format, Ternary>(ops, "fma", [](float a, float b, float c) { return fused(a, b, c); });
    add_both<Format, Ternary>(ops, "fma.relu", [](float a, float b, float c) {
        const float sum = fused(a, b, c);
        return sum < 0 ? 0.0f : sum;
    });
    add_both<Format, Binary>(ops, "min", [](float a, float b) { return minimum(a, b); });
    add_both<Format, Binary>(ops, "max", [](float a, float b) { return maximum(a, b); });
    add_both<Format, Binary>(ops, "min.NaN", [](float a, float b) { return a != a || b != b ? nan() : minimum(a, b); });
    add_both<Format, Binary>(ops, "max.NaN", [](float a, float b) { return a != a || b != b ? nan() : maximum(a, b); });
    add_both<Format, Unary>(ops, "ex2", [](float a) { return float(std::exp2(double(a))); });
    add_both<Format, Unary>(ops, "tanh", [](float a) { return float(std::tanh(double(a))); });
    const std::string name = Format::kName;
    ops.add("neg." + name, lanewise<Unary>([](u32 a) { return a ^ 0x8000; }));
    ops.add("abs." + name, lanewise<Unary>([](u32 a) { return a & 0x7fff; }));
    ops.add("neg." + name + "x2", lanewise<Unary>([](u32 a) { return a ^ 0x80008000; }));
    ops.add("abs." + name + "x2", lanewise<Unary>([](u32 a) { return a & 0x7fff7fff; }));
}

}  // namespace

void add_halves(Ops& ops) {
    add_arithmetic<Half>(ops);
    add_arithmetic<Bfloat16>(ops);
}

}  // namespace ptx

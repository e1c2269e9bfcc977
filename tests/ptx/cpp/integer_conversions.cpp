// Conversions from and to integers.
#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#include "lanewise.h"
#include "number_formats.h"

namespace ptx {
namespace {

template <class T>
struct Integer {
    using Type = T;
    const char* name;
};

constexpr std::tuple kIntegers{Integer<int8_t>{"s8"},    Integer<uint8_t>{"u8"},  Integer<int16_t>{"s16"},
                               Integer<uint16_t>{"u16"}, Integer<int32_t>{"s32"}, Integer<uint32_t>{"u32"},
                               Integer<int64_t>{"s64"},  Integer<uint64_t>{"u64"}};

template <class F>
void for_integers(F function) {
    std::apply([&](auto... integer) { (function(integer), ...); }, kIntegers);
}

template <class D, class S>
D saturate(S value) {
    using Limits = std::numeric_limits<D>;
    if constexpr (std::is_signed_v<S>) {
        if (value < 0) {
            return std::is_signed_v<D> && static_cast<int64_t>(value) >= static_cast<int64_t>(Limits::min())
                       ? static_cast<D>(value)
                       : Limits::min();
        }
    }
    return static_cast<uint64_t>(value) <= static_cast<uint64_t>(Limits::max()) ? static_cast<D>(value) : Limits::max();
}

template <class D, class S>
void add_integer_pair(Ops& ops, const std::string& types) {
    ops.add("cvt." + types, lanewise<Register<D>(Register<S>)>([](Register<S> a) { return D(S(a)); }));
    ops.add("cvt.sat." + types, lanewise<Register<D>(Register<S>)>([](Register<S> a) { return saturate<D>(S(a)); }));
}

// What lies beyond the integers becomes the nearest of them, NaN 0. value: integral.
template <class D, class T>
D to_integer(T value) {
    using Limits = std::numeric_limits<D>;
    // One above the largest, which itself may be no float.
    const T above = std::ldexp(T(1), Limits::digits);
    if (!(value < above)) {
        return value != value ? D(0) : Limits::max();
    }
    return value < T(Limits::min()) ? Limits::min() : static_cast<D>(value);
}

struct ToNearest {
    static constexpr const char* kName = "rni";
    template <class T>
    static T round(T value) {
        return std::nearbyint(value);
    }
};
struct ToZero {
    static constexpr const char* kName = "rzi";
    template <class T>
    static T round(T value) {
        return std::trunc(value);
    }
};
struct Down {
    static constexpr const char* kName = "rmi";
    template <class T>
    static T round(T value) {
        return std::floor(value);
    }
};
struct Up {
    static constexpr const char* kName = "rpi";
    template <class T>
    static T round(T value) {
        return std::ceil(value);
    }
};

// Widened: the float type it is computed in; Lies: as it lies in a register.
template <class Format>
struct Narrow {
    using Widened = float;
    using Lies = uint32_t;
    static constexpr const char* kName = Format::kName;
    static float decode(Lies value) { return Format::decode(value); }
    static Lies encode(float value) { return Format::encode(value); }
};
struct Float32 {
    using Widened = float;
    using Lies = float;
    static constexpr const char* kName = "f32";
    static float decode(float value) { return value; }
    static float encode(float value) { return value; }
};
struct Flushed : Float32 {
    static constexpr const char* kName = "ftz";
    static float decode(float value) { return ftz(value); }
    static float encode(float value) { return ftz(value); }
};
struct Float64 {
    using Widened = double;
    using Lies = double;
    static constexpr const char* kName = "f64";
    static double decode(double value) { return value; }
    static double encode(double value) { return value; }
};

template <class Float, class Rounding>
void add_rounding(Ops& ops) {
    using Lies = typename Float::Lies;
    constexpr bool kFlushes = std::is_same_v<Float, Flushed>;
    const std::string prefix = std::string("cvt.") + Rounding::kName + (kFlushes ? ".ftz" : "");
    const std::string name = kFlushes ? "f32" : Float::kName;
    ops.add(prefix + "." + name + "." + name,
            lanewise<Lies(Lies)>([](Lies a) { return Float::encode(Rounding::round(Float::decode(a))); }));
    for_integers([&](auto integer) {
        using D = typename decltype(integer)::Type;
        // Integers are saturated either way.
        for (const char* saturated : {"", ".sat"}) {
            ops.add(prefix + saturated + "." + integer.name + "." + name, lanewise<Register<D>(Lies)>([](Lies a) {
                        return to_integer<D>(Rounding::round(Float::decode(a)));
                    }));
        }
    });
}

template <class Float>
void add_float(Ops& ops) {
    add_rounding<Float, ToNearest>(ops);
    add_rounding<Float, ToZero>(ops);
    add_rounding<Float, Down>(ops);
    add_rounding<Float, Up>(ops);
}

template <class Float>
void add_from_integers(Ops& ops) {
    for_integers([&](auto integer) {
        using S = typename decltype(integer)::Type;
        ops.add(std::string("cvt.rn.") + Float::kName + "." + integer.name,
                lanewise<typename Float::Lies(Register<S>)>(
                    [](Register<S> a) { return Float::encode(static_cast<typename Float::Widened>(S(a))); }));
    });
}

}  // namespace

void add_integer_conversions(Ops& ops) {
    for_integers([&](auto to) {
        for_integers([&](auto from) {
            add_integer_pair<typename decltype(to)::Type, typename decltype(from)::Type>(
                ops, std::string(to.name) + "." + from.name);
        });
    });
    add_float<Float32>(ops);
    add_float<Flushed>(ops);
    add_float<Float64>(ops);
    add_float<Narrow<Half>>(ops);
    add_float<Narrow<Bfloat16>>(ops);
    add_from_integers<Float32>(ops);
    add_from_integers<Float64>(ops);
    add_from_integers<Narrow<Half>>(ops);
    add_from_integers<Narrow<Bfloat16>>(ops);
}

}  // namespace ptx

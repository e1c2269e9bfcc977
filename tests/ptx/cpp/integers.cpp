// Integer arithmetic.
#include <limits>
#include <string>

#include "lanewise.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;
__extension__ typedef __int128 Wide;
__extension__ typedef unsigned __int128 UnsignedWide;

template <class T>
using Twice =
    std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                          std::conditional_t<std::is_signed_v<T>, Wide, UnsignedWide>>>;

// x / 0 has all bits set, and the smallest / -1 wraps, as on the hardware.
template <class T>
T divide(T x, T y) {
    if (y == 0) {
        return static_cast<T>(-1);
    }
    if constexpr (std::is_signed_v<T>) {
        if (y == -1) {
            return static_cast<T>(-static_cast<std::make_unsigned_t<T>>(x));
        }
    }
    return static_cast<T>(x / y);
}

template <class T>
T remainder(T x, T y) {
    if (y == 0) {
        return x;
    }
    if constexpr (std::is_signed_v<T>) {
        if (y == -1) {
            return 0;
        }
    }
    return static_cast<T>(x % y);
}

// Arithmetic that is the same for signed and unsigned values. T: unsigned.
template <class T>
void add_bits(Ops& ops, const std::string& bits) {
    using R = Register<T>;
    ops.add("add." + bits, lanewise<R(R, R)>([](R a, R b) { return T(a + b); }));
    ops.add("sub." + bits, lanewise<R(R, R)>([](R a, R b) { return T(a - b); }));
    ops.add("mul.lo." + bits, lanewise<R(R, R)>([](R a, R b) { return T(a * b); }));
    ops.add("mad.lo." + bits, lanewise<R(R, R, R)>([](R a, R b, R c) { return T(a * b + c); }));
    ops.add("and." + bits, lanewise<R(R, R)>([](R a, R b) { return a & b; }));
    ops.add("or." + bits, lanewise<R(R, R)>([](R a, R b) { return a | b; }));
    ops.add("xor." + bits, lanewise<R(R, R)>([](R a, R b) { return a ^ b; }));
    ops.add("not." + bits, lanewise<R(R)>([](R a) { return T(~a); }));
    ops.add("neg." + bits, lanewise<R(R)>([](R a) { return T(R(0) - a); }));
    ops.add("shl." + bits, lanewise<R(R, u32)>([](R a, u32 b) { return b < 8 * sizeof(T) ? T(a << b) : T(0); }));
}

template <class T>
void add_typed(Ops& ops, const std::string& type) {
    using R = Register<T>;
    constexpr u32 kBits = 8 * sizeof(T);
    ops.add("shr." + type, lanewise<R(R, u32)>([](R a, u32 b) {
                if constexpr (std::is_signed_v<T>) {
                    return T(T(a) >> (b < kBits ? b : kBits - 1));
                } else {
                    return b < kBits ? T(T(a) >> b) : T(0);
                }
            }));
    ops.add("mul.hi." + type,
            lanewise<R(R, R)>([](R a, R b) { return T((Twice<T>(T(a)) * Twice<T>(T(b))) >> kBits); }));
    ops.add("div." + type, lanewise<R(R, R)>([](R a, R b) { return divide(T(a), T(b)); }));
    ops.add("rem." + type, lanewise<R(R, R)>([](R a, R b) { return remainder(T(a), T(b)); }));
    ops.add("min." + type, lanewise<R(R, R)>([](R a, R b) { return T(a) < T(b) ? T(a) : T(b); }));
    ops.add("max." + type, lanewise<R(R, R)>([](R a, R b) { return T(a) > T(b) ? T(a) : T(b); }));
    if constexpr (std::is_signed_v<T>) {
        ops.add("abs." + type, lanewise<R(R)>([](R a) { return T(a) < 0 ? T(R(0) - a) : T(a); }));
    }
}

template <class T>
void add_wide(Ops& ops, const std::string& type) {
    using R = Register<T>;
    using D = Register<Twice<T>>;
    ops.add("mul.wide." + type, lanewise<D(R, R)>([](R a, R b) { return Twice<T>(T(a)) * Twice<T>(T(b)); }));
    ops.add("mad.wide." + type,
            lanewise<D(R, R, D)>([](R a, R b, D c) { return D(Twice<T>(T(a)) * Twice<T>(T(b))) + c; }));
}

template <class T>
void add_mad_high(Ops& ops, const std::string& type) {
    ops.add("mad.hi." + type,
            lanewise<u32(T, T, u32)>([](T a, T b, u32 c) { return u32((Twice<T>(a) * Twice<T>(b)) >> 32) + c; }));
}

template <class A, class B>
void add_dot(Ops& ops, const std::string& types) {
    ops.add("dp4a." + types, lanewise<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) {
                for (int byte = 0; byte < 4; ++byte) {
                    c += u32(int32_t(A(a >> 8 * byte)) * int32_t(B(b >> 8 * byte)));
                }
                return c;
            }));
}

}  // namespace

void add_integers(Ops& ops) {
    add_bits<uint16_t>(ops, "16");
    add_bits<uint32_t>(ops, "32");
    add_bits<uint64_t>(ops, "64");
    add_typed<int16_t>(ops, "s16");
    add_typed<uint16_t>(ops, "u16");
    add_typed<int32_t>(ops, "s32");
    add_typed<uint32_t>(ops, "u32");
    add_typed<int64_t>(ops, "s64");
    add_typed<uint64_t>(ops, "u64");
    add_wide<int16_t>(ops, "s16");
    add_wide<uint16_t>(ops, "u16");
    add_wide<int32_t>(ops, "s32");
    add_wide<uint32_t>(ops, "u32");
    add_mad_high<int32_t>(ops, "s32");
    add_mad_high<uint32_t>(ops, "u32");
    add_dot<int8_t, int8_t>(ops, "s32.s32");
    add_dot<int8_t, uint8_t>(ops, "s32.u32");
    add_dot<uint8_t, int8_t>(ops, "u32.s32");
    add_dot<uint8_t, uint8_t>(ops, "u32.u32");
}

}  // namespace ptx

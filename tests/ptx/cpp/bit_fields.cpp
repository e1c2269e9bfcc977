// Shuffling of bits within a lane.
#include <string>

#include "lanewise.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

// start, length: of which 8 bits count. Beyond the top, the field is filled with the sign.
template <class T>
Register<T> extract(Register<T> value, u32 start, u32 length) {
    constexpr u32 kBits = 8 * sizeof(T);
    using U = std::make_unsigned_t<T>;
    start &= 255;
    length &= 255;
    if (length == 0) {
        return 0;
    }
    constexpr bool kIsSigned = std::is_signed_v<T>;
    const u32 top = std::min(kBits - 1, start + length - 1);
    const bool sign = kIsSigned && (U(value) >> top & 1) != 0;
    const U shifted = start < kBits ? U(U(value) >> start) : U(0);
    const u32 known = start < kBits ? std::min(length, kBits - start) : 0;
    const U mask = known >= kBits ? ~U(0) : U((U(1) << known) - 1);
    return sign ? (shifted & mask) | U(~mask) : shifted & mask;
}

template <class T>
T insert(T value, T into, u32 start, u32 length) {
    constexpr u32 kBits = 8 * sizeof(T);
    start &= 255;
    length &= 255;
    if (start >= kBits || length == 0) {
        return into;
    }
    const u32 fits = std::min(length, kBits - start);
    const T mask = (fits >= kBits ? ~T(0) : (T(1) << fits) - 1) << start;
    return (into & ~mask) | (T(value << start) & mask);
}

u32 permute(u32 a, u32 b, u32 selectors) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 selector = selectors >> 4 * i & 15;
        const u32 byte = bytes >> 8 * (selector & 7) & 255;
        const u32 sign = byte & 128 ? 255 : 0;
        result |= (selector & 8 ? sign : byte) << 8 * i;
    }
    return result;
}

u32 funnel(u32 low, u32 high, u32 by, bool left) {
    const u64 both = u64(high) << 32 | low;
    return left ? u32(both << by >> 32) : u32(both >> by);
}

template <class T>
u32 leading_zeros(T value) {
    constexpr u32 kBits = 8 * sizeof(T);
    return value == 0 ? kBits : kBits == 64 ? __builtin_clzll(value) : __builtin_clz(u32(value));
}

template <class T>
T reversed(T value) {
    T result = 0;
    for (u32 bit = 0; bit < 8 * sizeof(T); ++bit) {
        result = T(result << 1) | (value >> bit & 1);
    }
    return result;
}

// The table's bit n is the result for a, b, c = the bits of n, from the highest.
void lop3(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const u32* a = warp.operand<u32>(instruction, 1);
    const u32* b = warp.operand<u32>(instruction, 2);
    const u32* c = warp.operand<u32>(instruction, 3);
    u32 terms[8];
    for (int n = 0; n < 8; ++n) {
        terms[n] = instruction.imm >> n & 1 ? ~u32(0) : 0;
    }
    u32 values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const u32 without_a =
            (~b[i] & ((~c[i] & terms[0]) | (c[i] & terms[1]))) | (b[i] & ((~c[i] & terms[2]) | (c[i] & terms[3])));
        const u32 with_a =
            (~b[i] & ((~c[i] & terms[4]) | (c[i] & terms[5]))) | (b[i] & ((~c[i] & terms[6]) | (c[i] & terms[7])));
        values[i] = (~a[i] & without_a) | (a[i] & with_a);
    }
    store(warp.operand<u32>(instruction, 0), values, lanes);
}

template <class T>
void add_fields(Ops& ops, const std::string& type) {
    using R = Register<T>;
    using U = std::make_unsigned_t<T>;
    ops.add("bfe." + type, lanewise<R(R, u32, u32)>([](R a, u32 b, u32 c) { return extract<T>(a, b, c); }));
    // The highest bit that differs from the sign; all ones if there is none.
    ops.add("bfind." + type, lanewise<u32(R)>([](R a) {
                const U value = std::is_signed_v<T> && T(a) < 0 ? U(~a) : U(a);
                return 8 * sizeof(T) - 1 - leading_zeros(value);
            }));
}

template <class T>
void add_counts(Ops& ops, const std::string& bits) {
    ops.add("popc." + bits, lanewise<u32(T)>([](T a) { return u32(__builtin_popcountll(a)); }));
    ops.add("clz." + bits, lanewise<u32(T)>([](T a) { return leading_zeros(a); }));
    ops.add("brev." + bits, lanewise<T(T)>([](T a) { return reversed(a); }));
    ops.add("bfi." + bits, lanewise<T(T, T, u32, u32)>([](T a, T b, u32 c, u32 d) { return insert(a, b, c, d); }));
}

}  // namespace

void add_bit_fields(Ops& ops) {
    add_fields<int32_t>(ops, "s32");
    add_fields<uint32_t>(ops, "u32");
    add_fields<int64_t>(ops, "s64");
    add_fields<uint64_t>(ops, "u64");
    add_counts<uint32_t>(ops, "32");
    add_counts<uint64_t>(ops, "64");
    ops.add("lop3.b32", lop3);
    ops.add("add.16x2",
            lanewise<u32(u32, u32)>([](u32 a, u32 b) { return ((a + b) & 0xffff) | ((a >> 16) + (b >> 16)) << 16; }));
    ops.add("prmt.b32", lanewise<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return permute(a, b, c); }));
    ops.add("shf.l.wrap.b32",
            lanewise<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return funnel(a, b, c & 31, true); }));
    ops.add("shf.r.wrap.b32",
            lanewise<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return funnel(a, b, c & 31, false); }));
    ops.add("shf.l.clamp.b32",
            lanewise<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return funnel(a, b, std::min(c, 32u), true); }));
    ops.add("shf.r.clamp.b32",
            lanewise<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return funnel(a, b, std::min(c, 32u), false); }));
}

}  // namespace ptx

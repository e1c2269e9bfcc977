#include "reductions.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "number_formats.h"

namespace ptx {
namespace {

template <class T>
struct Plain {
    using Code = T;
    using Value = T;
    static T decode(T code) { return code; }
    static T encode(T value) { return value; }
};
template <class Format>
struct Narrow {
    using Code = uint16_t;
    using Value = float;
    static float decode(uint16_t code) { return Format::decode(code); }
    static uint16_t encode(float value) { return static_cast<uint16_t>(Format::encode(value)); }
};

template <class T>
T combine(Reduction reduction, T a, T b) {
    if constexpr (std::is_integral_v<T>) {
        switch (reduction) {
            case Reduction::kAnd:
                return a & b;
            case Reduction::kOr:
                return a | b;
            case Reduction::kXor:
                return a ^ b;
            default:
                break;
        }
    }
    if constexpr (std::is_floating_point_v<T>) {
        if (reduction != Reduction::kAdd) {
            return reduction == Reduction::kMin ? minimum(a, b) : maximum(a, b);
        }
        return a + b;
    } else {
        if (reduction != Reduction::kAdd) {
            return reduction == Reduction::kMin ? std::min(a, b) : std::max(a, b);
        }
        return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
    }
}

template <class Type>
void reduce(Reduction reduction, uint8_t* to, const uint8_t* from, uint32_t bytes) {
    using Code = typename Type::Code;
    for (uint32_t i = 0; i < bytes; i += sizeof(Code)) {
        Code a, b;
        std::memcpy(&a, to + i, sizeof a);
        std::memcpy(&b, from + i, sizeof b);
        const Code result = Type::encode(combine(reduction, Type::decode(a), Type::decode(b)));
        std::memcpy(to + i, &result, sizeof result);
    }
}

}  // namespace

void reduce_bytes(Reduction reduction, TensorMapType type, uint8_t* to, const uint8_t* from, uint32_t bytes) {
    if (reduction == Reduction::kNone) {
        std::memcpy(to, from, bytes);
        return;
    }
    switch (type) {
        case kU8:
            return reduce<Plain<uint8_t>>(reduction, to, from, bytes);
        case kU16:
            return reduce<Plain<uint16_t>>(reduction, to, from, bytes);
        case kU32:
            return reduce<Plain<uint32_t>>(reduction, to, from, bytes);
        case kS32:
            return reduce<Plain<int32_t>>(reduction, to, from, bytes);
        case kU64:
            return reduce<Plain<uint64_t>>(reduction, to, from, bytes);
        case kS64:
            return reduce<Plain<int64_t>>(reduction, to, from, bytes);
        case kF16:
            return reduce<Narrow<Half>>(reduction, to, from, bytes);
        case kF32:
            return reduce<Plain<float>>(reduction, to, from, bytes);
        case kF64:
            return reduce<Plain<double>>(reduction, to, from, bytes);
        case kBF16:
            return reduce<Narrow<Bfloat16>>(reduction, to, from, bytes);
    }
}

uint32_t element_bytes(TensorMapType type) {
    switch (type) {
        case kU8:
            return 1;
        case kU16:
        case kF16:
        case kBF16:
            return 2;
        case kU32:
        case kS32:
        case kF32:
            return 4;
        default:
            return 8;
    }
}

bool nan_of(TensorMapType type, uint64_t& code) {
    switch (type) {
        case kF16:
        case kBF16:
            code = 0x7fff;
            return true;
        case kF32:
            code = kCanonicalNan;
            return true;
        case kF64:
            code = 0x7fffffffffffffff;
            return true;
        default:
            return false;
    }
}

}  // namespace ptx

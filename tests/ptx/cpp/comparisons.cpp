// Moves, selections, predicates, comparisons.
#include <string>

#include "lanewise.h"
#include "number_formats.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

struct Equal {
    template <class T>
    bool operator()(T a, T b) const {
        return a == b;
    }
};
// Ordered: false if one is NaN.
struct NotEqual {
    template <class T>
    bool operator()(T a, T b) const {
        return a < b || a > b;
    }
};
struct Less {
    template <class T>
    bool operator()(T a, T b) const {
        return a < b;
    }
};
struct LessEqual {
    template <class T>
    bool operator()(T a, T b) const {
        return a <= b;
    }
};
struct Greater {
    template <class T>
    bool operator()(T a, T b) const {
        return a > b;
    }
};
struct GreaterEqual {
    template <class T>
    bool operator()(T a, T b) const {
        return a >= b;
    }
};
struct Number {
    template <class T>
    bool operator()(T a, T b) const {
        return a == a && b == b;
    }
};
template <class F>
struct Not {
    template <class T>
    bool operator()(T a, T b) const {
        return !F{}(a, b);
    }
};

// How values of a type lie in registers and what they are.
template <class T>
struct Plain {
    using Lies = Register<T>;
    T operator()(Lies value) const { return static_cast<T>(value); }
};
template <class Format>
struct Narrow {
    using Lies = u32;
    float operator()(u32 value) const { return Format::decode(value); }
};
struct Flushed {
    using Lies = float;
    float operator()(float value) const { return ftz(value); }
};

template <class Type, class F>
void add_one(Ops& ops, const std::string& name, const std::string& type) {
    using Lies = typename Type::Lies;
    ops.add("setp." + name + "." + type, comparison<Lies>([](Lies a, Lies b) { return F{}(Type{}(a), Type{}(b)); }));
}

template <class Type>
void add_six(Ops& ops, const std::string& type) {
    add_one<Type, Equal>(ops, "eq", type);
    add_one<Type, NotEqual>(ops, "ne", type);
    add_one<Type, Less>(ops, "lt", type);
    add_one<Type, LessEqual>(ops, "le", type);
    add_one<Type, Greater>(ops, "gt", type);
    add_one<Type, GreaterEqual>(ops, "ge", type);
}

template <class Type>
void add_floats_of(Ops& ops, const std::string& type) {
    add_six<Type>(ops, type);
    // Unordered: true if one is NaN.
    add_one<Type, Not<NotEqual>>(ops, "equ", type);
    add_one<Type, Not<Equal>>(ops, "neu", type);
    add_one<Type, Not<GreaterEqual>>(ops, "ltu", type);
    add_one<Type, Not<Greater>>(ops, "leu", type);
    add_one<Type, Not<LessEqual>>(ops, "gtu", type);
    add_one<Type, Not<Less>>(ops, "geu", type);
    add_one<Type, Number>(ops, "num", type);
    add_one<Type, Not<Number>>(ops, "nan", type);
}

template <class F>
void predicates(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const Lanes a = load_predicate(warp, instruction, 1);
    const Lanes b = instruction.count > 2 ? load_predicate(warp, instruction, 2) : 0;
    store_predicate(warp, instruction, 0, F{}(a, b), lanes);
}

template <class F>
constexpr Handler on_predicates(F) {
    return &predicates<F>;
}

template <class T>
void select(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const T* a = warp.operand<T>(instruction, 1);
    const T* b = warp.operand<T>(instruction, 2);
    const Lanes chosen = load_predicate(warp, instruction, 3);
    T values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        values[i] = chosen >> i & 1 ? a[i] : b[i];
    }
    store(warp.operand<T>(instruction, 0), values, lanes);
}

}  // namespace

void add_comparisons(Ops& ops) {
    add_six<Plain<int16_t>>(ops, "s16");
    add_six<Plain<uint16_t>>(ops, "u16");
    add_six<Plain<int32_t>>(ops, "s32");
    add_six<Plain<uint32_t>>(ops, "u32");
    add_six<Plain<int64_t>>(ops, "s64");
    add_six<Plain<uint64_t>>(ops, "u64");
    add_floats_of<Narrow<Half>>(ops, "f16");
    add_floats_of<Narrow<Bfloat16>>(ops, "bf16");
    add_floats_of<Plain<float>>(ops, "f32");
    add_floats_of<Flushed>(ops, "ftz.f32");
    add_floats_of<Plain<double>>(ops, "f64");
    ops.add("selp.32", select<u32>);
    ops.add("selp.64", select<u64>);
    ops.add("mov.pred", on_predicates([](Lanes a, Lanes) { return a; }));
    ops.add("not.pred", on_predicates([](Lanes a, Lanes) { return ~a; }));
    ops.add("and.pred", on_predicates([](Lanes a, Lanes b) { return a & b; }));
    ops.add("or.pred", on_predicates([](Lanes a, Lanes b) { return a | b; }));
    ops.add("xor.pred", on_predicates([](Lanes a, Lanes b) { return a ^ b; }));
}

}  // namespace ptx

// Ops that do the same in every lane.
#pragma once

#include <algorithm>
#include <type_traits>

#include "machine.h"

namespace ptx {

template <class T>
void store(T* to, const T (&values)[kLanes], Lanes lanes) {
    if (lanes == kAllLanes) {
        std::copy_n(values, kLanes, to);
        return;
    }
    for (int i = 0; i < kLanes; ++i) {
        to[i] = lanes >> i & 1 ? values[i] : to[i];
    }
}

inline void store_predicate(Warp& warp, const Instruction& instruction, int index, Lanes values, Lanes lanes) {
    if (instruction.operands[index] >= 0) {
        Lanes* predicate = warp.operand<Lanes>(instruction, index);
        *predicate = (*predicate & ~lanes) | (values & lanes);
    }
}

inline Lanes load_predicate(Warp& warp, const Instruction& instruction, int index) {
    return *warp.operand<Lanes>(instruction, index);
}

namespace detail {

// The values are computed before any is stored, since a destination may take the place of a source.
template <class D, class F, class... S, size_t... I>
void run(Warp& warp, const Instruction& instruction, Lanes lanes, F function, std::index_sequence<I...>) {
    D values[kLanes];
    [&](const S*... sources) {
        for (int i = 0; i < kLanes; ++i) {
            values[i] = static_cast<D>(function(sources[i]...));
        }
    }(warp.operand<S>(instruction, I + 1)...);
    store(warp.operand<D>(instruction, 0), values, lanes);
}

template <class Signature, class F>
struct Lanewise;

template <class D, class... S, class F>
struct Lanewise<D(S...), F> {
    static void run(Warp& warp, const Instruction& instruction, Lanes lanes) {
        detail::run<D, F, S...>(warp, instruction, lanes, F{}, std::index_sequence_for<S...>{});
    }
};

template <class T, class F>
struct Comparison {
    static void run(Warp& warp, const Instruction& instruction, Lanes lanes) {
        const T* a = warp.operand<T>(instruction, 1);
        const T* b = warp.operand<T>(instruction, 2);
        Lanes result = 0;
        for (int i = 0; i < kLanes; ++i) {
            result |= static_cast<Lanes>(F{}(a[i], b[i])) << i;
        }
        store_predicate(warp, instruction, 0, result, lanes);
    }
};

}  // namespace detail

// Signature: types of destination and sources as they lie in registers, of 32 or 64 bits.
template <class Signature, class F>
constexpr Handler lanewise(F) {
    return &detail::Lanewise<Signature, F>::run;
}

// To a predicate. T: as it lies in registers.
template <class T, class F>
constexpr Handler comparison(F) {
    return &detail::Comparison<T, F>::run;
}

// How a value of type T lies in a register, and back.
template <class T>
using Register = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_same_v<T, double>, double, uint64_t>,
                                    std::conditional_t<std::is_same_v<T, float>, float, uint32_t>>;
template <class T>
constexpr T narrow(Register<T> value) {
    return static_cast<T>(value);
}
// Integers are extended by their sign.
template <class T>
constexpr Register<T> widen(T value) {
    return static_cast<Register<T>>(value);
}

}  // namespace ptx

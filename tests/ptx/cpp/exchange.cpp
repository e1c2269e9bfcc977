// Exchange among the lanes of a warp.
#include "lanewise.h"
#include "sync.h"

namespace ptx {

void check_members(Warp& warp, const Instruction& instruction, Lanes lanes, int mask_operand) {
    const uint32_t* masks = warp.operand<uint32_t>(instruction, mask_operand);
    Lanes named_by_all = kAllLanes;
    for (int i = 0; i < kLanes; ++i) {
        named_by_all &= masks[i];
    }
    if ((lanes & named_by_all) == kAllLanes) {
        return;
    }
    for (int i = 0; i < kLanes; ++i) {
        if (!(lanes >> i & 1) || !warp.machine->settings.check) {
            continue;
        }
        if (masks[i] & ~lanes) {
            warp.machine->reports.add(Kind::kMemberMask, warp.place(instruction), {},
                                      "member mask %08x names lanes that do not take part: %08x do", masks[i], lanes);
            return;
        }
        if (!(masks[i] >> i & 1)) {
            warp.machine->reports.add(Kind::kMemberMask, warp.place(instruction), {},
                                      "member mask %08x leaves out lane %d, which executes it", masks[i], i);
            return;
        }
    }
}

namespace {

using u32 = uint32_t;
using u64 = uint64_t;

enum ShuffleMode { kUp, kDown, kButterfly, kIndex };

// The lane that lane i reads from, -1 if it is out of the segment that c describes.
int shuffle_source(int64_t mode, int lane, u32 b, u32 c) {
    const int by = static_cast<int>(b & 31), clamp = static_cast<int>(c & 31), segment = static_cast<int>(c >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment);
    switch (mode) {
        case kUp:
            return lane - by >= last ? lane - by : -1;
        case kDown:
            return lane + by <= last ? lane + by : -1;
        case kButterfly:
            return (lane ^ by) <= last ? lane ^ by : -1;
        default: {
            const int source = (lane & segment) | (by & ~segment);
            return source <= last ? source : -1;
        }
    }
}

void shuffle(Warp& warp, const Instruction& instruction, Lanes lanes) {
    check_members(warp, instruction, lanes, 4);
    const u32* from = warp.operand<u32>(instruction, 1);
    const u32* b = warp.operand<u32>(instruction, 2);
    const u32* c = warp.operand<u32>(instruction, 3);
    u32 values[kLanes];
    Lanes inside = 0;
    for (int i = 0; i < kLanes; ++i) {
        const int source = shuffle_source(instruction.imm, i, b[i], c[i]);
        values[i] = from[source < 0 ? i : source];
        inside |= static_cast<Lanes>(source >= 0) << i;
    }
    store(warp.operand<u32>(instruction, 0), values, lanes);
    if (instruction.count > 5) {
        store_predicate(warp, instruction, 5, inside, lanes);
    }
}

void store_all(Warp& warp, const Instruction& instruction, u32 value, Lanes lanes) {
    u32 values[kLanes];
    std::fill_n(values, kLanes, value);
    store(warp.operand<u32>(instruction, 0), values, lanes);
}

void ballot(Warp& warp, const Instruction& instruction, Lanes lanes) {
    check_members(warp, instruction, lanes, 2);
    store_all(warp, instruction, load_predicate(warp, instruction, 1) & lanes, lanes);
}

template <class F>
void vote(Warp& warp, const Instruction& instruction, Lanes lanes) {
    check_members(warp, instruction, lanes, 2);
    const Lanes votes = load_predicate(warp, instruction, 1) & lanes;
    store_predicate(warp, instruction, 0, F{}(votes, lanes) ? kAllLanes : 0, lanes);
}

template <class F>
constexpr Handler vote_of(F) {
    return &vote<F>;
}

template <class T>
void match_any(Warp& warp, const Instruction& instruction, Lanes lanes) {
    check_members(warp, instruction, lanes, 2);
    const T* from = warp.operand<T>(instruction, 1);
    u32 values[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) {
            values[i] |= static_cast<u32>(from[i] == from[j]) << j;
        }
        values[i] &= lanes;
    }
    store(warp.operand<u32>(instruction, 0), values, lanes);
}

template <class T, class F>
void reduce(Warp& warp, const Instruction& instruction, Lanes lanes) {
    check_members(warp, instruction, lanes, 2);
    const u32* from = warp.operand<u32>(instruction, 1);
    T result = static_cast<T>(from[__builtin_ctz(lanes)]);
    for (Lanes rest = lanes & (lanes - 1); rest; rest &= rest - 1) {
        result = static_cast<T>(F{}(result, static_cast<T>(from[__builtin_ctz(rest)])));
    }
    store_all(warp, instruction, static_cast<u32>(result), lanes);
}

template <class T, class F>
constexpr Handler reduction(F) {
    return &reduce<T, F>;
}

void active_mask(Warp& warp, const Instruction& instruction, Lanes lanes) {
    store_all(warp, instruction, lanes, lanes);
}

// The lowest lane is elected.
void elect(Warp& warp, const Instruction& instruction, Lanes lanes) {
    check_members(warp, instruction, lanes, 2);
    const Lanes leader = lanes & -lanes;
    if (instruction.operands[0] >= 0) {
        store_all(warp, instruction, __builtin_ctz(lanes), lanes);
    }
    store_predicate(warp, instruction, 1, leader, lanes);
}

void synchronise(Warp& warp, const Instruction& instruction, Lanes lanes) {
    check_members(warp, instruction, lanes, 0);
    synchronise_warp(warp);
}

}  // namespace

void add_exchange(Ops& ops) {
    ops.add("shfl", shuffle);
    ops.add("vote.ballot", ballot);
    ops.add("vote.all", vote_of([](Lanes votes, Lanes lanes) { return votes == lanes; }));
    ops.add("vote.any", vote_of([](Lanes votes, Lanes) { return votes != 0; }));
    ops.add("vote.uni", vote_of([](Lanes votes, Lanes lanes) { return votes == 0 || votes == lanes; }));
    ops.add("match.any.32", match_any<u32>);
    ops.add("match.any.64", match_any<u64>);
    ops.add("activemask", active_mask);
    ops.add("redux.add.32", reduction<u32>([](u32 a, u32 b) { return a + b; }));
    ops.add("redux.and.32", reduction<u32>([](u32 a, u32 b) { return a & b; }));
    ops.add("redux.or.32", reduction<u32>([](u32 a, u32 b) { return a | b; }));
    ops.add("redux.xor.32", reduction<u32>([](u32 a, u32 b) { return a ^ b; }));
    ops.add("redux.min.s32", reduction<int32_t>([](int32_t a, int32_t b) { return std::min(a, b); }));
    ops.add("redux.max.s32", reduction<int32_t>([](int32_t a, int32_t b) { return std::max(a, b); }));
    ops.add("redux.min.u32", reduction<u32>([](u32 a, u32 b) { return std::min(a, b); }));
    ops.add("redux.max.u32", reduction<u32>([](u32 a, u32 b) { return std::max(a, b); }));
    ops.add("elect", elect);
    ops.add("bar.warp.sync", synchronise);
}

}  // namespace ptx

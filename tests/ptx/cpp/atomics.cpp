// Atomic operations, and loads and stores that are ordered: atom, red, ld.acquire, st.release.
#include <algorithm>
#include <string>

#include "lanewise.h"
#include "memory.h"
#include "number_formats.h"
#include "sync.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

// One element, as it lies in memory, zero-extended. operand_b: of cas alone.
using Change = u64 (*)(u64 before, u64 operand, u64 operand_b);

struct Atomic {
    Finder find;
    bool wide_address, reads, writes;
};

u64 element(Warp& warp, const Instruction& instruction, int index, int lane) {
    const int32_t offset = instruction.operands[index];
    const u64 value = instruction.size == 8 ? warp.at<u64>(offset)[lane] : warp.at<u32>(offset)[lane];
    return instruction.size >= 4 ? value : value & ((u64(1) << 8 * instruction.size) - 1);
}

// Whether the last write was a plain one: what an atomic reads of it carries no release.
bool last_write_plain(const Machine& machine, const Segment& segment, u64 offset) {
    const Stamp written = segment.cells.writes[offset / 2];
    return written == kSplit || number_of(written) < machine.first_number ||
           !(machine.accesses[number_of(written)].traits & (kAtomic | kSet));
}

template <Finder kFind, bool kReads, bool kWrites>
struct Executor {
    Warp& warp;
    const Instruction& instruction;
    Change change;
    // First operands: destinations, then the address, then values.
    int address_operand, values_operand;
    std::vector<u64> keys;

    void lane(int lane, u64 address, Lanes lanes) {
        const u32 bytes = instruction.size * instruction.vec;
        const Settings& settings = warp.machine->settings;
        Segment segment;
        if (!kFind(warp, instruction, address, bytes, kWrites ? "write" : "read", segment)) {
            return;
        }
        const u64 offset = address - segment.base;
        if (settings.check) {
            check_alignment(warp, instruction, segment, address, bytes);
            if (segment.block && (kReads || !kWrites)) {
                check_content(warp, instruction, *segment.block, offset, bytes);
            }
            if (segment.block && kWrites) {
                write_content(warp, instruction, *segment.block, offset, bytes);
            }
        }
        if (settings.race) {
            order(segment, offset, lane, bytes);
        }
        for (u32 i = 0; i < instruction.vec; ++i) {
            uint8_t* at = segment.memory + offset + i * instruction.size;
            u64 before = 0;
            std::memcpy(&before, at, instruction.size);
            if (kWrites) {
                const u64 operand = element(warp, instruction, values_operand + i, lane);
                const bool compares = instruction.count > values_operand + static_cast<int>(instruction.vec);
                const u64 other = compares ? element(warp, instruction, values_operand + 1, lane) : 0;
                const u64 after = change(before, operand, other);
                std::memcpy(at, &after, instruction.size);
            }
            if (i < instruction.written && instruction.operands[i] >= 0) {
                results[i][lane] = before;
            }
        }
        done |= 1u << lane;
        (void)lanes;
    }

    void order(const Segment& segment, u64 offset, int lane, u32 bytes) {
        const u64 key =
            segment.block ? shared_key(segment.block->home, static_cast<u32>(offset)) : segment.base + offset;
        if (last_write_plain(*warp.machine, segment, offset)) {
            warp.machine->released.erase(key);
        }
        // Its own access comes after what it acquires.
        if (kReads) {
            acquire_from(warp, instruction, 1u << lane, key);
        }
        Touch touch(warp, instruction, segment.cells, segment.block, kAtomic);
        if (kWrites) {
            touch.write(offset, bytes, lane, nullptr, nullptr);
        } else {
            touch.read(offset, bytes, lane);
        }
        keys.push_back(key);
    }

    u64 results[8][kLanes] = {};
    Lanes done = 0;
};

template <Finder kFind, bool kWideAddress, bool kReads, bool kWrites, Change kChange>
void atomic(Warp& warp, const Instruction& instruction, Lanes lanes) {
    const int address_operand = instruction.written;
    u64 addresses[kLanes];
    load_addresses(warp, instruction, address_operand, kWideAddress, addresses);
    Executor<kFind, kReads, kWrites> executor{warp, instruction, kChange, address_operand, address_operand + 1, {}};
    for (Lanes rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        executor.lane(lane, addresses[lane], lanes);
    }
    if (kWrites && !executor.keys.empty() && (instruction.has(kRelease) || warp.order.fenced)) {
        const Rows mine = instruction.has(kRelease) ? publish(warp, lanes) : *warp.order.fenced;
        for (const u64 key : executor.keys) {
            release_to(warp, instruction, mine, key);
        }
    }
    for (int i = 0; i < instruction.written; ++i) {
        if (instruction.operands[i] < 0) {
            continue;
        }
        if (instruction.size == 8) {
            store(warp.operand<u64>(instruction, i), executor.results[i], executor.done);
        } else {
            u32 narrow[kLanes];
            std::copy_n(executor.results[i], kLanes, narrow);
            store(warp.operand<u32>(instruction, i), narrow, executor.done);
        }
    }
    // Others get their turn, so that who waits for a value sees it change.
    warp.turn_over = true;
}

template <bool kReads, bool kWrites, Change kChange>
void add_spaces(Ops& ops, const std::string& name) {
    ops.add("atom.global." + name, atomic<find_global, true, kReads, kWrites, kChange>, Control::kYields);
    ops.add("atom.shared." + name, atomic<find_shared, false, kReads, kWrites, kChange>, Control::kYields);
}

template <Change kChange>
void add_change(Ops& ops, const std::string& name) {
    add_spaces<true, true, kChange>(ops, name);
}

u64 add(u64 a, u64 b, u64) { return a + b; }
u64 bit_and(u64 a, u64 b, u64) { return a & b; }
u64 bit_or(u64 a, u64 b, u64) { return a | b; }
u64 bit_xor(u64 a, u64 b, u64) { return a ^ b; }
u64 exchange(u64, u64 b, u64) { return b; }
u64 compare_and_swap(u64 a, u64 b, u64 c) { return a == b ? c : a; }
u64 increment(u64 a, u64 b, u64) { return a >= b ? 0 : a + 1; }
u64 decrement(u64 a, u64 b, u64) { return a == 0 || a > b ? b : a - 1; }

template <class T>
u64 smaller(u64 a, u64 b, u64) {
    return static_cast<std::make_unsigned_t<T>>(std::min(static_cast<T>(a), static_cast<T>(b)));
}
template <class T>
u64 larger(u64 a, u64 b, u64) {
    return static_cast<std::make_unsigned_t<T>>(std::max(static_cast<T>(a), static_cast<T>(b)));
}

// Global float32 sums flush nothing, as .global.add.f32 of the hardware does not either.
u64 add_f32(u64 a, u64 b, u64) {
    return bits_of<u32>(bits_of<float>(static_cast<u32>(a)) + bits_of<float>(static_cast<u32>(b)));
}
u64 add_f64(u64 a, u64 b, u64) { return bits_of<u64>(bits_of<double>(a) + bits_of<double>(b)); }

struct Sum {
    static float of(float a, float b) { return a + b; }
};
struct Smaller {
    static float of(float a, float b) { return minimum(a, b); }
};
struct Larger {
    static float of(float a, float b) { return maximum(a, b); }
};

template <class Format, class F>
u64 on_half(u64 a, u64 b, u64) {
    return Format::encode(F::of(Format::decode(static_cast<u32>(a)), Format::decode(static_cast<u32>(b))));
}
template <class Format, class F>
u64 on_pair(u64 a, u64 b, u64) {
    return on_half<Format, F>(a, b, 0) | on_half<Format, F>(a >> 16, b >> 16, 0) << 16;
}

template <class Format>
void add_halves_of(Ops& ops) {
    const std::string name = Format::kName;
    add_change<on_half<Format, Sum>>(ops, "add." + name);
    add_change<on_half<Format, Smaller>>(ops, "min." + name);
    add_change<on_half<Format, Larger>>(ops, "max." + name);
    add_change<on_pair<Format, Sum>>(ops, "add." + name + "x2");
    add_change<on_pair<Format, Smaller>>(ops, "min." + name + "x2");
    add_change<on_pair<Format, Larger>>(ops, "max." + name + "x2");
}

template <class T>
void add_integers_of(Ops& ops, const std::string& type) {
    add_change<add>(ops, "add." + type);
    add_change<smaller<T>>(ops, "min." + type);
    add_change<larger<T>>(ops, "max." + type);
}

void add_bits_of(Ops& ops, const std::string& type) {
    add_change<bit_and>(ops, "and." + type);
    add_change<bit_or>(ops, "or." + type);
    add_change<bit_xor>(ops, "xor." + type);
    add_change<exchange>(ops, "exch." + type);
}

void apply_fence(Warp& warp, const Instruction& instruction, Lanes lanes) {
    fence(warp, lanes, instruction.has(kAcquire), instruction.has(kRelease));
}

void apply_proxy_fence(Warp& warp, const Instruction&, Lanes) { fence_proxy(warp); }

}  // namespace

void add_atomics(Ops& ops) {
    add_integers_of<int32_t>(ops, "s32");
    add_integers_of<uint32_t>(ops, "u32");
    add_integers_of<int64_t>(ops, "s64");
    add_integers_of<uint64_t>(ops, "u64");
    add_change<increment>(ops, "inc.u32");
    add_change<decrement>(ops, "dec.u32");
    add_bits_of(ops, "b32");
    add_bits_of(ops, "b64");
    add_change<add_f32>(ops, "add.f32");
    add_change<add_f64>(ops, "add.f64");
    add_halves_of<Half>(ops);
    add_halves_of<Bfloat16>(ops);
    for (const char* type : {"b16", "b32", "b64"}) {
        add_change<compare_and_swap>(ops, std::string("cas.") + type);
    }
    for (const char* type : {"b8", "b16", "b32", "b64"}) {
        add_spaces<true, false, exchange>(ops, std::string("load.") + type);
        add_spaces<false, true, exchange>(ops, std::string("store.") + type);
    }
}

void add_fences(Ops& ops) {
    ops.add("fence", apply_fence);
    ops.add("fence.proxy.async", apply_proxy_fence);
}

}  // namespace ptx

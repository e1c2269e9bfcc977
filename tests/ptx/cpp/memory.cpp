// Loads and stores of a warp: which lanes go together, in which order, what they move.
#include "memory.h"

#include <algorithm>
#include <optional>

#include "lanewise.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

// Whether lanes follow each other without gaps, all of them.
bool is_row(const u64* addresses, u32 bytes) {
    bool row = true;
    for (int i = 1; i < kLanes; ++i) {
        row &= addresses[i] == addresses[0] + static_cast<u64>(i) * bytes;
    }
    return row;
}

// Lanes among these that lie within a segment.
Lanes lanes_within(const Segment& segment, Lanes lanes, const u64* addresses, u32 bytes) {
    const u64 last = segment.size - bytes;
    Lanes within = 0;
    for (int i = 0; i < kLanes; ++i) {
        within |= static_cast<Lanes>(addresses[i] - segment.base <= last) << i;
    }
    return within & lanes;
}

bool aligned(Lanes lanes, const u64* addresses, u32 bytes) {
    u64 bits = 0;
    for (int i = 0; i < kLanes; ++i) {
        bits |= lanes >> i & 1 ? addresses[i] : 0;
    }
    return (bits & (std::min(bytes, 16u) - 1)) == 0;
}

template <class F>
void for_lanes(Lanes lanes, F function) {
    for (; lanes; lanes &= lanes - 1) {
        function(__builtin_ctz(lanes));
    }
}

// Calls function(segment, lanes) for the lanes of each segment; lost(lane) for those of none.
template <class F, class G>
void for_segments(Warp& warp, const Instruction& instruction, Lanes lanes, const u64* addresses, u32 bytes, Finder find,
                  const char* what, F function, G lost) {
    while (lanes) {
        const int lane = __builtin_ctz(lanes);
        Segment segment;
        if (!find(warp, instruction, addresses[lane], bytes, what, segment)) {
            lost(lane);
            lanes &= lanes - 1;
            continue;
        }
        const Lanes here = lanes_within(segment, lanes, addresses, bytes);
        if (warp.machine->settings.check && !aligned(here, addresses, bytes)) {
            for_lanes(here, [&](int i) { check_alignment(warp, instruction, segment, addresses[i], bytes); });
        }
        function(segment, here);
        lanes &= ~here;
    }
}

// Copies of a constant number of bytes are moves.
void copy(uint8_t* to, const uint8_t* from, u32 bytes) {
    switch (bytes) {
        case 1:
            *to = *from;
            return;
        case 2:
            std::memcpy(to, from, 2);
            return;
        case 4:
            std::memcpy(to, from, 4);
            return;
        case 8:
            std::memcpy(to, from, 8);
            return;
        case 16:
            std::memcpy(to, from, 16);
            return;
        default:
            std::memcpy(to, from, bytes);
    }
}

// Lanes of one instruction that store different values to one address: which one stays is not defined. The last of them
// stays here; the others are returned.
Lanes check_conflicts(Warp& warp, const Instruction& instruction, Lanes lanes, const u64* addresses, u32 bytes,
                      const LaneBytes& data) {
    bool rising = true;
    for (int i = 1; i < kLanes; ++i) {
        rising &= addresses[i] >= addresses[i - 1] + bytes;
    }
    if (rising) {
        return 0;
    }
    Lanes lost = 0;
    for_lanes(lanes, [&](int i) {
        Lanes same = 0;
        for (int j = 0; j < kLanes; ++j) {
            same |= static_cast<Lanes>(addresses[j] == addresses[i]) << j;
        }
        same &= lanes & ~((2u << i) - 1);
        for_lanes(i == kLanes - 1 ? 0 : same, [&](int j) {
            if (std::memcmp(data.at + i * bytes, data.at + j * bytes, bytes) != 0) {
                warp.machine->reports.add(Kind::kLaneConflict, warp.place(instruction), {},
                                          "lanes %d and %d store different values at one address", i, j);
                lost |= 1u << i;
            }
        });
    });
    return lost;
}

template <class T, class Lies>
void to_bytes(const Lies* values, u32 vec, u32 element, LaneBytes& data) {
    T* to = reinterpret_cast<T*>(data.at) + element;
    for (int i = 0; i < kLanes; ++i) {
        to[i * vec] = static_cast<T>(values[i]);
    }
}

template <class T, class Lies>
void from_bytes(const LaneBytes& data, u32 vec, u32 element, Lies* to, Lanes lanes) {
    const T* from = reinterpret_cast<const T*>(data.at) + element;
    Lies values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        values[i] = static_cast<Lies>(from[i * vec]);
    }
    store(to, values, lanes);
}

// function(T()) for the integer type of so many bytes and this signedness.
template <class F>
void with_type(u32 size, bool is_signed, F function) {
    switch (size) {
        case 1:
            return is_signed ? function(int8_t()) : function(uint8_t());
        case 2:
            return is_signed ? function(int16_t()) : function(uint16_t());
        case 4:
            return is_signed ? function(int32_t()) : function(uint32_t());
        default:
            return function(uint64_t());
    }
}

}  // namespace

void read_lanes(Warp& warp, const Instruction& instruction, Lanes lanes, const u64* addresses, u32 bytes, Finder find,
                LaneBytes& data) {
    const Settings& settings = warp.machine->settings;
    const auto lost = [&](int lane) { std::memset(data.at + lane * bytes, 0xff, bytes); };
    const auto read = [&](const Segment& segment, Lanes here) {
        if (here == kAllLanes && is_row(addresses, bytes)) {
            const u64 offset = addresses[0] - segment.base;
            if (segment.block && settings.check) {
                check_content(warp, instruction, *segment.block, offset, kLanes * bytes);
            }
            if (settings.race) {
                Touch(warp, instruction, segment.cells, segment.block).read_row(offset, bytes);
            }
            std::memcpy(data.at, segment.memory + offset, kLanes * bytes);
            return;
        }
        if (segment.block && settings.check) {
            for_lanes(here, [&](int i) {
                check_content(warp, instruction, *segment.block, addresses[i] - segment.base, bytes);
            });
        }
        if (settings.race) {
            Touch touch(warp, instruction, segment.cells, segment.block);
            for_lanes(here, [&](int i) { touch.read(addresses[i] - segment.base, bytes, i); });
        }
        for_lanes(here,
                  [&](int i) { copy(data.at + i * bytes, segment.memory + (addresses[i] - segment.base), bytes); });
    };
    for_segments(warp, instruction, lanes, addresses, bytes, find, "read", read, lost);
}

void write_lanes(Warp& warp, const Instruction& instruction, Lanes lanes, const u64* addresses, u32 bytes, Finder find,
                 const LaneBytes& data) {
    const Settings& settings = warp.machine->settings;
    const auto lost = [](int) {};
    const auto write = [&](const Segment& segment, Lanes here) {
        if (here == kAllLanes && is_row(addresses, bytes)) {
            const u64 offset = addresses[0] - segment.base;
            if (segment.block && settings.check) {
                write_content(warp, instruction, *segment.block, offset, kLanes * bytes);
            }
            if (settings.race) {
                Touch(warp, instruction, segment.cells, segment.block)
                    .write_row(offset, bytes, segment.memory + offset, data.at);
            }
            std::memcpy(segment.memory + offset, data.at, kLanes * bytes);
            return;
        }
        if (settings.check) {
            here &= ~check_conflicts(warp, instruction, here, addresses, bytes, data);
            for_lanes(segment.block ? here : 0, [&](int i) {
                write_content(warp, instruction, *segment.block, addresses[i] - segment.base, bytes);
            });
        }
        std::optional<Touch> touch;
        if (settings.race) {
            touch.emplace(warp, instruction, segment.cells, segment.block);
        }
        for_lanes(here, [&](int i) {
            const u64 offset = addresses[i] - segment.base;
            if (touch) {
                touch->write(offset, bytes, i, segment.memory + offset, data.at + i * bytes);
            }
            copy(segment.memory + offset, data.at + i * bytes, bytes);
        });
    };
    for_segments(warp, instruction, lanes, addresses, bytes, find, "write", write, lost);
}

void load_addresses(Warp& warp, const Instruction& instruction, int operand, bool wide, u64* addresses) {
    if (wide) {
        const u64* from = warp.operand<u64>(instruction, operand);
        for (int i = 0; i < kLanes; ++i) {
            addresses[i] = from[i] + static_cast<u64>(instruction.imm);
        }
        return;
    }
    const u32* from = warp.operand<u32>(instruction, operand);
    for (int i = 0; i < kLanes; ++i) {
        addresses[i] = from[i] + static_cast<u32>(instruction.imm);
    }
}

void registers_to_bytes(Warp& warp, const Instruction& instruction, int first, LaneBytes& data) {
    const bool wide = instruction.size == 8 || instruction.has(kWide);
    for (u32 element = 0; element < instruction.vec; ++element) {
        with_type(instruction.size, false, [&](auto type) {
            using T = decltype(type);
            if (wide) {
                to_bytes<T>(warp.operand<u64>(instruction, first + element), instruction.vec, element, data);
            } else {
                to_bytes<T>(warp.operand<u32>(instruction, first + element), instruction.vec, element, data);
            }
        });
    }
}

void bytes_to_registers(Warp& warp, const Instruction& instruction, int first, Lanes lanes, const LaneBytes& data) {
    const bool wide = instruction.size == 8 || instruction.has(kWide);
    for (u32 element = 0; element < instruction.vec; ++element) {
        if (instruction.operands[first + element] < 0) {
            continue;
        }
        with_type(instruction.size, instruction.has(kSigned), [&](auto type) {
            using T = decltype(type);
            if (wide) {
                from_bytes<T>(data, instruction.vec, element, warp.operand<u64>(instruction, first + element), lanes);
            } else {
                from_bytes<T>(data, instruction.vec, element, warp.operand<u32>(instruction, first + element), lanes);
            }
        });
    }
}

}  // namespace ptx

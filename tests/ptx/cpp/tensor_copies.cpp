// cp.async.bulk.tensor: boxes of tensors that a tensor map describes (tile mode).
#include <string>

#include "bulk.h"
#include "memory.h"
#include "reductions.h"
#include "wgmma_operands.h"

namespace ptx {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

constexpr int kMostDimensions = 5;
constexpr u32 kUnit = 16;
// What shared memory of a box must be aligned to.
constexpr u32 kBoxAlignment = 128;

bool misuse(Warp& warp, const Instruction& instruction, const char* what) {
    warp.machine->reports.add(Kind::kTensorMap, warp.place(instruction), {}, "%s", what);
    return false;
}

// The map at an address of global memory or of the parameters.
bool load_map(Warp& warp, const Instruction& instruction, u64 address, TensorMap& map) {
    const Grid& launch = *warp.block->grid->launch;
    const u64 offset = address - reinterpret_cast<u64>(launch.parameters);
    const bool parameter = offset < launch.parameter_bytes && offset + sizeof map <= launch.parameter_bytes;
    Segment segment;
    if (!parameter && !find_global(warp, instruction, address, sizeof map, "read", segment)) {
        return false;
    }
    std::memcpy(&map, reinterpret_cast<const void*>(address), sizeof map);
    if (map.magic != kTensorMapMagic || map.dimensions == 0 || map.dimensions > kMostDimensions || map.type > kBF16 ||
        map.swizzle > 3) {
        return misuse(warp, instruction, "there is no tensor map at this address");
    }
    const u32 element = element_bytes(static_cast<TensorMapType>(map.type));
    const u32 row = map.box[0] * element;
    if (map.dimensions != instruction.vec) {
        return misuse(warp, instruction, "the tensor map has another number of dimensions");
    }
    if (map.address % kUnit || (map.element_strides[0] == 1 && row % kUnit)) {
        return misuse(warp, instruction,
                      "a tensor map's address, and the bytes of a box's row, must be multiples of 16");
    }
    if (map.swizzle && row > kUnit << map.swizzle) {
        return misuse(warp, instruction, "a row of the box is longer than the swizzle");
    }
    for (int i = 0; i < map.dimensions; ++i) {
        if (map.box[i] == 0 || map.box[i] > 256 || map.element_strides[i] == 0 || map.element_strides[i] > 8) {
            return misuse(warp, instruction, "a tensor map's box must be 1 to 256, its element strides 1 to 8");
        }
        if (i + 1 < map.dimensions && map.strides[i] % kUnit) {
            return misuse(warp, instruction, "a tensor map's strides must be multiples of 16 bytes");
        }
    }
    return true;
}

class Box {
  public:
    Box(const TensorMap& map, const int64_t* first)
        : map_(map), element_(element_bytes(static_cast<TensorMapType>(map.type))) {
        for (int i = 0; i < kMostDimensions; ++i) {
            const bool used = i < map.dimensions;
            first_[i] = used ? first[i] : 0;
            count_[i] = used ? (map.box[i] + map.element_strides[i] - 1u) / map.element_strides[i] : 1;
        }
    }

    u32 bytes() const {
        u32 bytes = element_;
        for (const u32 count : count_) {
            bytes *= count;
        }
        return bytes;
    }

    // Each 16 bytes of a row, or less at the tensor's edge, at an offset of shared memory.
    std::vector<Piece> pieces(u32 offset) const {
        std::vector<Piece> pieces;
        const u32 rows = bytes() / (count_[0] * element_);
        for (u32 row = 0; row < rows; ++row) {
            add_row(row, offset + row * count_[0] * element_, pieces);
        }
        return pieces;
    }

  private:
    void add_row(u32 row, u32 offset, std::vector<Piece>& pieces) const {
        u64 address = map_.address;
        bool inside = true;
        for (int i = 1; i < map_.dimensions; ++i) {
            const int64_t at = first_[i] + int64_t(row % count_[i]) * map_.element_strides[i];
            row /= count_[i];
            inside = inside && at >= 0 && at < int64_t(map_.sizes[i]);
            address += static_cast<u64>(at) * map_.strides[i - 1];
        }
        // Elements that follow each other may go together within the unit of swizzling.
        const u32 step = map_.element_strides[0] == 1 ? kUnit / element_ : 1;
        for (u32 first = 0; first < count_[0]; first += step) {
            u32 begin = first;
            const u32 end = std::min(first + step, count_[0]);
            while (begin < end) {
                const bool here = inside && holds(begin);
                u32 until = begin + 1;
                while (until < end && (inside && holds(until)) == here) {
                    ++until;
                }
                const int64_t column = first_[0] + int64_t(begin) * map_.element_strides[0];
                pieces.push_back({swizzled(offset + begin * element_), (until - begin) * element_,
                                  address + static_cast<u64>(column) * element_, !here});
                begin = until;
            }
        }
    }

    bool holds(u32 index) const {
        const int64_t column = first_[0] + int64_t(index) * map_.element_strides[0];
        return column >= 0 && column < int64_t(map_.sizes[0]);
    }

    u32 swizzled(u32 offset) const {
        const u32 bits = (1u << map_.swizzle) - 1;
        return offset ^ (offset >> 3 & bits << 4);
    }

    const TensorMap& map_;
    u32 element_;
    int64_t first_[kMostDimensions];
    u32 count_[kMostDimensions];
};

std::vector<uint8_t> fill_of(const TensorMap& map) {
    std::vector<uint8_t> fill(kUnit, 0);
    u64 code = 0;
    const auto type = static_cast<TensorMapType>(map.type);
    if (map.fill_nan && nan_of(type, code)) {
        for (u32 i = 0; i < kUnit; i += element_bytes(type)) {
            std::memcpy(fill.data() + i, &code, element_bytes(type));
        }
    }
    return fill;
}

// Pieces in the tensor must be in global memory that may be touched.
bool check_pieces(Warp& warp, const Instruction& instruction, const std::vector<Piece>& pieces, const char* what) {
    for (const Piece& piece : pieces) {
        Segment segment;
        if (!piece.outside && !find_global(warp, instruction, piece.other, piece.bytes, what, segment)) {
            return false;
        }
    }
    return true;
}

void coordinates(Warp& warp, const Instruction& instruction, int operand, int lane, int64_t* to) {
    for (int i = 0; i < instruction.vec; ++i) {
        to[i] = warp.operand<int32_t>(instruction, operand + i)[lane];
    }
}

void load(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        TensorMap map;
        if (!load_map(warp, instruction, warp.operand<u64>(instruction, 1)[lane], map)) {
            continue;
        }
        int64_t first[kMostDimensions];
        coordinates(warp, instruction, 4, lane, first);
        const Box box(map, first);
        const u32 mask = instruction.operands[3] >= 0 ? warp.operand<u32>(instruction, 3)[lane] & 0xffff : 0;
        const u64 mbarrier = warp.operand<u32>(instruction, 2)[lane];
        for (const Destination& to :
             destinations(warp, instruction, warp.operand<u32>(instruction, 0)[lane], mbarrier, mask)) {
            if (to.offset % kBoxAlignment) {
                misuse(warp, instruction, "shared memory of a box must be at a multiple of 128 bytes");
                continue;
            }
            BulkCopy copy{&instruction, to.block, box.pieces(to.offset), box.bytes(), lane};
            copy.fill = fill_of(map);
            copy.mbarrier = to.mbarrier;
            if (check_pieces(warp, instruction, copy.pieces, "read")) {
                load_bulk(warp, std::move(copy));
            }
        }
    }
}

template <Reduction kReduction>
void store(Warp& warp, const Instruction& instruction, Lanes lanes) {
    for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        TensorMap map;
        if (!load_map(warp, instruction, warp.operand<u64>(instruction, 0)[lane], map)) {
            continue;
        }
        int64_t first[kMostDimensions];
        coordinates(warp, instruction, 2, lane, first);
        const Box box(map, first);
        const u32 offset = warp.operand<u32>(instruction, 1)[lane] & kOffsetMask;
        if (offset % kBoxAlignment) {
            misuse(warp, instruction, "shared memory of a box must be at a multiple of 128 bytes");
            continue;
        }
        BulkCopy copy{&instruction, warp.block, box.pieces(offset), box.bytes(), lane};
        // What lies outside the tensor is not written.
        std::erase_if(copy.pieces, [](const Piece& piece) { return piece.outside; });
        copy.reduction = kReduction;
        copy.type = map.type;
        if (check_pieces(warp, instruction, copy.pieces, "write")) {
            store_bulk(warp, std::move(copy));
        }
    }
}

}  // namespace

void add_tensor_copies(Ops& ops) {
    const std::string reduce = "cp.reduce.async.bulk.tensor.";
    ops.add("cp.async.bulk.tensor.shared.global", load);
    ops.add("cp.async.bulk.tensor.global.shared", store<Reduction::kNone>);
    ops.add(reduce + "add", store<Reduction::kAdd>);
    ops.add(reduce + "min", store<Reduction::kMin>);
    ops.add(reduce + "max", store<Reduction::kMax>);
    ops.add(reduce + "and", store<Reduction::kAnd>);
    ops.add(reduce + "or", store<Reduction::kOr>);
    ops.add(reduce + "xor", store<Reduction::kXor>);
}

}  // namespace ptx

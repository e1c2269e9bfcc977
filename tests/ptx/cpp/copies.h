// Copies that are on their way.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace ptx {

struct Block;

// One cp.async of a warp. Lanes copy `bytes` of `size` and fill the rest with zeros.
struct Copy {
    const Instruction* instruction;
    Lanes lanes;
    uint32_t destination[kLanes];
    uint64_t source[kLanes];
    uint8_t bytes[kLanes];
    bool landed;
};

// A warp's cp.async in the order of issue. Groups are numbers of copies at which they end.
struct CopyQueue {
    std::vector<Copy> copies;
    std::vector<size_t> groups;
    // Those before are done.
    size_t first_copy = 0, first_group = 0;

    bool empty() const { return first_copy == copies.size(); }
    void clear() {
        copies.clear();
        groups.clear();
        first_copy = first_group = 0;
    }
};

// Bytes of shared memory and where they come from or go to: global memory, or an offset in another block's shared
// memory. outside: of the tensor, so that they come from nowhere.
struct Piece {
    uint32_t offset, bytes;
    uint64_t other;
    bool outside = false;
};

enum class Reduction : uint8_t { kNone, kAdd, kMin, kMax, kAnd, kOr, kXor };

// A bulk copy. block: whose shared memory its pieces are of; it is the destination of loads, the source of stores.
struct BulkCopy {
    const Instruction* instruction = nullptr;
    Block* block = nullptr;
    std::vector<Piece> pieces = {};
    uint32_t bytes = 0;
    int lane = 0;
    // Of what lies outside the tensor.
    std::vector<uint8_t> fill = {};
    // Loads: the mbarrier that counts them. Of shared to shared copies: the source's block.
    uint32_t mbarrier = 0;
    Block* source = nullptr;
    // Stores: how they change memory; elements' type as in TensorMapType.
    Reduction reduction = Reduction::kNone;
    uint8_t type = 0;
    Issue issued = {};
    bool written = false;
};

// A warp's bulk copies from shared to global memory. group: -1 before it is committed; each lane has groups of its own.
struct BulkQueue {
    struct Item {
        BulkCopy copy;
        int64_t group;
        bool read = false;
    };
    std::vector<Item> items;
    int64_t groups[kLanes] = {};

    void clear() {
        items.clear();
        for (int64_t& group : groups) {
            group = 0;
        }
    }
};

}  // namespace ptx

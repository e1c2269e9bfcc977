// Loads and stores of a warp's lanes, and their checks.
#pragma once

#include "machine.h"
#include "races.h"

namespace ptx {

// The most bytes that a lane loads or stores at once.
constexpr uint32_t kMostBytes = 32;

// A range of global memory, or a block's shared memory. base: the address of its first byte.
struct Segment {
    uint8_t* memory = nullptr;
    uint64_t base = 0, size = 0;
    Cells cells;
    Block* block = nullptr;
};

// Where an address lies. False, and a report: nowhere. what: "read" or "write".
bool find_global(Warp& warp, const Instruction& instruction, uint64_t address, uint32_t bytes, const char* what,
                 Segment& segment);
bool find_shared(Warp& warp, const Instruction& instruction, uint64_t address, uint32_t bytes, const char* what,
                 Segment& segment);
using Finder = decltype(&find_global);

// The block whose shared memory an address is of, and its offset there. Null: there is none, and a report.
Block* shared_block(Warp& warp, const Instruction& instruction, uint64_t address, uint32_t& offset);
constexpr int kRankBit = 24;
constexpr uint64_t kOffsetMask = (1u << kRankBit) - 1;
uint64_t mapped(uint32_t rank, uint64_t offset);

void check_alignment(Warp& warp, const Instruction& instruction, const Segment& segment, uint64_t address,
                     uint32_t bytes);
// Whether bytes of shared memory hold what a read may see.
void check_content(Warp& warp, const Instruction& instruction, const Block& block, uint64_t offset, uint32_t bytes);
// Marks bytes as written, by no copy that is in flight.
void write_content(Warp& warp, const Instruction& instruction, Block& block, uint64_t offset, uint32_t bytes);

// Bytes of each lane, one lane behind the other. A lane that may not read gets bytes 0xff.
struct LaneBytes {
    alignas(64) uint8_t at[kLanes * kMostBytes];
};

void read_lanes(Warp& warp, const Instruction& instruction, Lanes lanes, const uint64_t* addresses, uint32_t bytes,
                Finder find, LaneBytes& data);
void write_lanes(Warp& warp, const Instruction& instruction, Lanes lanes, const uint64_t* addresses, uint32_t bytes,
                 Finder find, const LaneBytes& data);

// Addresses of 32 or 64 bits in a register, with the instruction's offset.
void load_addresses(Warp& warp, const Instruction& instruction, int operand, bool wide, uint64_t* addresses);
// Elements of `vec` registers, from operand `first` on, that lie together in each lane's bytes.
void registers_to_bytes(Warp& warp, const Instruction& instruction, int first, LaneBytes& data);
void bytes_to_registers(Warp& warp, const Instruction& instruction, int first, Lanes lanes, const LaneBytes& data);

}  // namespace ptx

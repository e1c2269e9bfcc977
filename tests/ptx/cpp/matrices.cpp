// ldmatrix, stmatrix: 8 x 8 matrices of 16 bits, of which each lane's register holds two elements of a row.
#include "lanewise.h"
#include "memory.h"

namespace ptx {
namespace {

constexpr int kRows = 8;
constexpr uint32_t kRowBytes = 16;

struct Matrix {
    uint16_t at[kRows][kRows];

    Matrix transposed() const {
        Matrix result;
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kRows; ++column) {
                result.at[column][row] = at[row][column];
            }
        }
        return result;
    }
};

// A register of all lanes is a matrix, row by row.
static_assert(sizeof(Matrix) == kLanes * sizeof(uint32_t));

// Lanes give addresses of rows, those of the first matrix first.
Lanes addressing(const Instruction& instruction) {
    return instruction.vec == 4 ? kAllLanes : (1u << kRows * instruction.vec) - 1;
}

void load_matrices(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "ldmatrix");
    uint64_t addresses[kLanes];
    load_addresses(warp, instruction, instruction.vec, false, addresses);
    LaneBytes rows;
    read_lanes(warp, instruction, addressing(instruction), addresses, kRowBytes, find_shared, rows);
    for (int i = 0; i < instruction.vec; ++i) {
        Matrix matrix;
        std::memcpy(&matrix, rows.at + i * sizeof matrix, sizeof matrix);
        matrix = instruction.has(kTransposed) ? matrix.transposed() : matrix;
        std::memcpy(warp.operand<uint8_t>(instruction, i), &matrix, sizeof matrix);
    }
}

void store_matrices(Warp& warp, const Instruction& instruction, Lanes lanes) {
    require_whole_warp(warp, instruction, lanes, "stmatrix");
    uint64_t addresses[kLanes];
    load_addresses(warp, instruction, instruction.vec, false, addresses);
    LaneBytes rows;
    for (int i = 0; i < instruction.vec; ++i) {
        Matrix matrix;
        std::memcpy(&matrix, warp.operand<uint8_t>(instruction, i), sizeof matrix);
        matrix = instruction.has(kTransposed) ? matrix.transposed() : matrix;
        std::memcpy(rows.at + i * sizeof matrix, &matrix, sizeof matrix);
    }
    write_lanes(warp, instruction, addressing(instruction), addresses, kRowBytes, find_shared, rows);
}

}  // namespace

void add_matrices(Ops& ops) {
    ops.add("ldmatrix.m8n8.b16", load_matrices);
    ops.add("stmatrix.m8n8.b16", store_matrices);
}

}  // namespace ptx

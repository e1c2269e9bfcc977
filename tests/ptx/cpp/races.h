// Finds accesses that nothing orders.
#pragma once

#include <algorithm>
#include <cstdint>

#include "machine.h"

namespace ptx {

// One access of a warp's instruction. cells: where those of its memory begin.
struct Touch {
    Warp& warp;
    const Instruction& instruction;
    Cells cells;
    bool shared;
    uint8_t traits;
    // Stamps below are ordered before it.
    Stamp floor;
    uint32_t number;
    // An access that turned out to be ordered before it, whichever lane's it was.
    uint32_t ordered_number = 0;
    // What the last two stamps became together.
    Stamp joined_before = 0, joined_mine = 0, joined = 0;

    Touch(Warp& warp, const Instruction& instruction, const Cells& cells, Block* shared_of, uint8_t traits = kPlain);

    // offset, bytes: in the memory that the cells are of. lane: kManyLanes if it is none in particular.
    void read(size_t offset, size_t bytes, uint32_t lane) {
        const size_t cell = offset / 2;
        const Stamp mine = stamp(number, lane);
        if (bytes == kUsual && offset % 2 == 0 && usual<kUsual / 2>(cell, mine)) {
            std::fill_n(cells.reads + cell, kUsual / 2, mine);
        } else if (bytes == 2 * kUsual && offset % 2 == 0 && usual<kUsual>(cell, mine)) {
            std::fill_n(cells.reads + cell, kUsual, mine);
        } else {
            read_any(offset, bytes, lane);
        }
    }
    // before, after: what the bytes held and will hold. Null: unknown.
    void write(size_t offset, size_t bytes, uint32_t lane, const uint8_t* before, const uint8_t* after) {
        const size_t cell = offset / 2;
        const Stamp mine = stamp(number, lane);
        if (bytes == kUsual && offset % 2 == 0 && usual<kUsual / 2>(cell, mine)) {
            std::fill_n(cells.writes + cell, kUsual / 2, mine);
            std::fill_n(cells.reads + cell, kUsual / 2, 0);
        } else {
            write_any(offset, bytes, lane, before, after);
        }
    }
    // By all lanes, one behind the other.
    void read_row(size_t offset, size_t bytes);
    void write_row(size_t offset, size_t bytes, const uint8_t* before, const uint8_t* after);

  private:
    // Bytes of most accesses that are no rows: of copies, of matrices' rows.
    static constexpr size_t kUsual = 16;

    // quiet() of so many cells.
    template <size_t kCells>
    bool usual(size_t cell, Stamp mine) const {
        Stamp conflicts = 0;
        for (size_t i = 0; i < kCells; ++i) {
            const Stamp written = cells.writes[cell + i], read = cells.reads[cell + i];
            conflicts |= static_cast<Stamp>(written >= floor) | (static_cast<Stamp>(read >= floor) & (read != mine));
        }
        return conflicts == 0;
    }
    void read_any(size_t offset, size_t bytes, uint32_t lane);
    void write_any(size_t offset, size_t bytes, uint32_t lane, const uint8_t* before, const uint8_t* after);

    enum class Verdict { kOrdered, kLanes, kUnordered };

    bool quiet(size_t cell, size_t count, Stamp mine) const;
    bool quiet_row(size_t offset, size_t bytes) const;
    void split(size_t cell);
    void read_split(size_t cell, Stamp mine);
    void read_stamps(Stamp written, Stamp& reads, Stamp mine);
    void write_stamps(Stamp& written, Stamp& reads, Stamp mine, bool same);
    bool same_line(Stamp written) const;
    // Whether what happened before is ordered before it. Sets: all of them; those with a tolerated trait need not be.
    Verdict judge(Stamp earlier, Stamp mine);
    Verdict judge_all(Stamp earlier, Stamp mine, uint8_t tolerated, uint32_t& culprit);
    Verdict judge_set(uint32_t set, Stamp mine, uint8_t tolerated, uint32_t& culprit);
    void report(Verdict verdict, uint32_t culprit, const char* what, const char* earlier);
    // Both together, as a set of this kind.
    Stamp with(Stamp before, Stamp mine, uint8_t kind);
};

}  // namespace ptx

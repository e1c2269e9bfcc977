// Where the factors of wgmma lie in shared memory.
#pragma once

#include <cstdint>

namespace ptx {

// A matrix descriptor. leading, stride: bytes between repetitions of the layout's atom, see chunk_offset.
struct MatrixDescriptor {
    uint32_t start, leading, stride, base_offset, swizzle;

    explicit MatrixDescriptor(uint64_t bits)
        : start((bits & 0x3fff) << 4),
          leading((bits >> 16 & 0x3fff) << 4),
          stride((bits >> 32 & 0x3fff) << 4),
          base_offset(bits >> 49 & 7),
          swizzle(bits >> 62) {}

    // Bytes of a row of an atom.
    uint32_t width() const { return swizzle == 0 ? 16 : 256 >> swizzle; }

    // The 16 bytes that hold elements of line `line` from byte `byte` on. Lines are rows of M or N whose bytes go along
    // K, or, transposed, rows of K whose bytes go along M or N. Eight lines are an atom.
    uint32_t chunk_offset(uint32_t line, uint32_t byte, bool transposed) const {
        // Without swizzling, the roles of the two distances change where M or N is contiguous.
        const bool swapped = transposed && swizzle == 0;
        const uint32_t between_atoms = swapped ? leading : stride, along_line = swapped ? stride : leading;
        const uint32_t offset =
            start + line / 8 * between_atoms + line % 8 * width() + byte % width() + byte / width() * along_line;
        return swizzled(offset);
    }

    // Bits 4 and up are mixed with bits 7 and up: three of them for 128 bytes, two for 64, one for 32.
    uint32_t swizzled(uint32_t address) const {
        const uint32_t bits = swizzle == 0 ? 0 : 0xffu >> (4 + swizzle) & 7;
        return address ^ (address >> 3 & bits << 4);
    }
};

}  // namespace ptx

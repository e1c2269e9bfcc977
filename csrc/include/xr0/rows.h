// The work on rows that an image is turned into patches with, once for each instruction set; all give the same bits.
//
// Files that are compiled for one instruction set include this header and rows_generic.h alone, neither of which has
// functions that the linker may share: a shared one could be the copy that other processors cannot run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xr0 {

inline constexpr int kChannels = 3;
// Weights have this many fractional bits; with 8-bit samples and their overshoot, sums just fit 32 bits.
inline constexpr int kFractionBits = 32 - 8 - 2;
inline constexpr int32_t kHalf = int32_t{1} << (kFractionBits - 1);
// Windows are a multiple of this wide, filled up with zero weights: the dot product of bytes takes four.
inline constexpr int kTapStep = 4;
inline constexpr int kParts = 3;
// Outputs are computed in groups of this many; the last group is filled up with outputs that nobody reads.
inline constexpr int kOutputStep = 4;
// Input rows are resized in groups of this many. A group at the image's end names its last row more than once.
inline constexpr int kRowGroup = 4;
// A plane of a resized row has a multiple of this many bytes.
inline constexpr int kPlaneStep = 64;
// Bytes that may be read behind the last window of a row.
inline constexpr int kRowSlack = 16;

// What the values of patches are stored as. The bits of the two short ones; float itself is the third.
struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
enum class Element { kFloat32, kBfloat16, kFloat16 };

// One axis of a resize. The tables hold all outputs in order, padding included.
struct AxisView {
    int32_t in;
    int32_t outputs;         // rounded up to kOutputStep
    int32_t taps;            // width of every window, a multiple of kTapStep
    const int32_t* first;    // [outputs] first sample of the window, which may reach past the last sample
    const int32_t* weights;  // [outputs][taps]
    const int32_t* digits;   // [outputs][taps / 4][3]: four signed bytes each; number d counts 256^d
    // [outputs][taps / 4][kParts]: the signed lower 16 bits of the even two weights; those of the odd two; what is left
    // of all four over 65536, four signed bytes. Two such bytes times samples fit 16 bits: no two weights exceed 2.
    const int32_t* parts;
};

// Where the values of one row of patches go: out is [patch][channel][temporal][row][column], merge blocks together.
struct EmitLayout {
    int32_t patches;       // in the row
    int32_t patch;         // rows and columns of a patch
    int32_t temporal;      // slices of a patch
    int32_t copies;        // how many of them the row fills, from out's on
    int32_t merge;         // patches of a merge block that are in the row
    std::ptrdiff_t plane;  // bytes from one plane of a row to the next
    bool bgr;              // order of the planes
};

struct RowFunctions {
    const char* name;
    // rows: packed pixels. out: kChannels planes each, `plane` bytes apart.
    void (*horizontal)(const uint8_t* const* rows, const AxisView& axis, uint8_t* const* out, std::ptrdiff_t plane);
    // rows: those of the window of output number `output`; they and out have `bytes`, a multiple of kPlaneStep.
    void (*vertical)(const uint8_t* const* rows, const AxisView& axis, int32_t output, int32_t bytes, uint8_t* out);
    // rows: as many as a patch has, kChannels planes each. out: the first patch; written from front to back.
    void (*emit_float32)(const uint8_t* const* rows, const EmitLayout& layout, float* out);
    void (*emit_bfloat16)(const uint8_t* const* rows, const EmitLayout& layout, Bfloat16* out);
    void (*emit_float16)(const uint8_t* const* rows, const EmitLayout& layout, Float16* out);
};

extern const RowFunctions kRowsPortable;
#ifdef XR0_X86
extern const RowFunctions kRowsAvx2;
extern const RowFunctions kRowsAvx512;
#endif

}  // namespace xr0

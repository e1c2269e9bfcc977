// Compiled for AVX2. The weights' lower 16 bits multiply samples as 16-bit numbers, their upper bits as bytes.
#include <immintrin.h>

#include "xr0/rows_generic.h"

namespace xr0 {
namespace {

// Three of AxisView::parts, the same in every lane.
struct Weights {
    __m256i even, odd, upper;

    explicit Weights(const int32_t* parts)
        : even(_mm256_set1_epi32(parts[0])), odd(_mm256_set1_epi32(parts[1])), upper(_mm256_set1_epi32(parts[2])) {}
};

struct Sums {
    __m256i lower = _mm256_set1_epi32(kHalf);
    // Two 16-bit sums to a lane. They count 65536 times, so it is all the same where they wrap around.
    __m256i upper = _mm256_setzero_si256();

    // samples: four to a lane.
    void add(__m256i samples, const Weights& weights) {
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(samples, _mm256_set1_epi16(0xff)), weights.even);
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(samples, 8), weights.odd);
        lower = _mm256_add_epi32(lower, _mm256_add_epi32(even, odd));
        upper = _mm256_add_epi16(upper, _mm256_maddubs_epi16(samples, weights.upper));
    }

    __m256i rounded() const {
        const __m256i both = _mm256_madd_epi16(upper, _mm256_set1_epi16(1));
        return _mm256_srai_epi32(_mm256_add_epi32(lower, _mm256_slli_epi32(both, 16)), kFractionBits);
    }
};

// Packing with saturation is the clip.
inline __m256i packed(const __m256i (&sums)[4]) {
    return _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
}

inline __m256i load(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

inline __m256i load_two(const uint8_t* first, const uint8_t* second) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(second)), 1);
}

inline void store_planes(__m128i pixels, uint8_t* out, std::ptrdiff_t plane) {
    const int32_t four[] = {_mm_extract_epi32(pixels, 0), _mm_extract_epi32(pixels, 1), _mm_extract_epi32(pixels, 2)};
    for (int channel = 0; channel < kChannels; ++channel) {
        std::memcpy(out + channel * plane, &four[channel], sizeof four[channel]);
    }
}

// One 128-bit half of a register for each of two rows. kTaps: those of the axis, or 0 for any number.
template <int kTaps>
void horizontal_taps(const uint8_t* const* rows, const AxisView& axis, uint8_t* const* out, std::ptrdiff_t plane) {
    static_assert(kRowGroup == 4 && kOutputStep == 4);
    const __m256i by_channel =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
    const __m256i planar =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const int32_t taps = kTaps != 0 ? kTaps : axis.taps;
    const int32_t* parts = axis.parts;
    for (int32_t x = 0; x < axis.outputs; x += kOutputStep) {
        __m256i rounded[2][kOutputStep];
#pragma GCC unroll 4
        for (int i = 0; i < kOutputStep; ++i) {
            std::ptrdiff_t at = static_cast<std::ptrdiff_t>(axis.first[x + i]) * kChannels;
            Sums sums[2];
            for (int32_t tap = 0; tap < taps; tap += kTapStep, parts += kParts, at += kTapStep * kChannels) {
                const Weights weights(parts);
                sums[0].add(_mm256_shuffle_epi8(load_two(rows[0] + at, rows[1] + at), by_channel), weights);
                sums[1].add(_mm256_shuffle_epi8(load_two(rows[2] + at, rows[3] + at), by_channel), weights);
            }
            rounded[0][i] = sums[0].rounded();
            rounded[1][i] = sums[1].rounded();
        }
        for (int pair = 0; pair < 2; ++pair) {
            const __m256i pixels = _mm256_shuffle_epi8(packed(rounded[pair]), planar);
            store_planes(_mm256_castsi256_si128(pixels), out[2 * pair] + x, plane);
            store_planes(_mm256_extracti128_si256(pixels, 1), out[2 * pair + 1] + x, plane);
        }
    }
}

// The loop over a window is unrolled where an image is enlarged and where it is at most halved.
void horizontal(const uint8_t* const* rows, const AxisView& axis, uint8_t* const* out, std::ptrdiff_t plane) {
    const auto taps = axis.taps == 4 ? horizontal_taps<4> : axis.taps == 8 ? horizontal_taps<8> : horizontal_taps<0>;
    taps(rows, axis, out, plane);
}

void vertical(const uint8_t* const* rows, const AxisView& axis, int32_t output, int32_t bytes, uint8_t* out) {
    for (int32_t start = 0; start < bytes; start += 32) {
        const int32_t* parts = axis.parts + static_cast<std::ptrdiff_t>(output) * (axis.taps / kTapStep) * kParts;
        Sums sums[4];
        for (int32_t tap = 0; tap < axis.taps; tap += kTapStep, parts += kParts) {
            const __m256i a = load(rows[tap] + start);
            const __m256i b = load(rows[tap + 1] + start);
            const __m256i c = load(rows[tap + 2] + start);
            const __m256i d = load(rows[tap + 3] + start);
            const __m256i ab_low = _mm256_unpacklo_epi8(a, b);
            const __m256i ab_high = _mm256_unpackhi_epi8(a, b);
            const __m256i cd_low = _mm256_unpacklo_epi8(c, d);
            const __m256i cd_high = _mm256_unpackhi_epi8(c, d);
            const Weights weights(parts);
            sums[0].add(_mm256_unpacklo_epi16(ab_low, cd_low), weights);
            sums[1].add(_mm256_unpackhi_epi16(ab_low, cd_low), weights);
            sums[2].add(_mm256_unpacklo_epi16(ab_high, cd_high), weights);
            sums[3].add(_mm256_unpackhi_epi16(ab_high, cd_high), weights);
        }
        // Unpacking and packing both keep to 128-bit halves, so the bytes end where they began.
        const __m256i rounded[] = {sums[0].rounded(), sums[1].rounded(), sums[2].rounded(), sums[3].rounded()};
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + start), packed(rounded));
    }
}

}  // namespace

const RowFunctions kRowsAvx2{
    "avx2", horizontal, vertical, emit_generic<float>, emit_generic<Bfloat16>, emit_generic<Float16>};

}  // namespace xr0

// Compiled for AVX2. Samples and weights as pairs of 16-bit numbers: one multiply-add for each half of the weights.
#include <immintrin.h>

#include "xr0/rows_generic.h"

namespace xr0 {
namespace {

// Four pixels of two rows -> as 16-bit numbers, red, green and blue of the first two pixels (k = 0) or last two (k = 1)
// next to each other: (r0 r1) (g0 g1) (b0 b1) (0 0) in either half.
template <int k>
inline __m256i pixel_pairs(__m256i pixels) {
    constexpr char o = 6 * k;
    constexpr char z = -1;
    const __m128i order = _mm_setr_epi8(o, z, o + 3, z, o + 1, z, o + 4, z, o + 2, z, o + 5, z, z, z, z, z);
    return _mm256_shuffle_epi8(pixels, _mm256_broadcastsi128_si256(order));
}

struct Sums {
    __m256i low = _mm256_set1_epi32(kHalf);
    __m256i high = _mm256_setzero_si256();

    // halves: two 16-bit weights, their lower and then their higher halves.
    void add(__m256i pairs, const int32_t* halves) {
        low = _mm256_add_epi32(low, _mm256_madd_epi16(pairs, _mm256_set1_epi32(halves[0])));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(pairs, _mm256_set1_epi32(halves[1])));
    }

    __m256i rounded() const {
        return _mm256_srai_epi32(_mm256_add_epi32(low, _mm256_slli_epi32(high, 16)), kFractionBits);
    }
};

inline __m256i load_two(const uint8_t* first, const uint8_t* second) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(second)), 1);
}

inline void store_four(uint8_t* out, int32_t four) { std::memcpy(out, &four, sizeof four); }

void horizontal(const uint8_t* const* rows, const AxisView& axis, uint8_t* const* out, std::ptrdiff_t plane) {
    const __m256i planar =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int row = 0; row < kRowGroup; row += 2) {
        const int32_t* halves = axis.halves;
        for (int32_t x = 0; x < axis.outputs; x += kOutputStep) {
            Sums sums[kOutputStep];
#pragma GCC unroll 4
            for (int i = 0; i < kOutputStep; ++i) {
                std::ptrdiff_t at = static_cast<std::ptrdiff_t>(axis.first[x + i]) * kChannels;
                for (int32_t tap = 0; tap < axis.taps; tap += kTapStep, halves += 4, at += kTapStep * kChannels) {
                    const __m256i pixels = load_two(rows[row] + at, rows[row + 1] + at);
                    sums[i].add(pixel_pairs<0>(pixels), halves);
                    sums[i].add(pixel_pairs<1>(pixels), halves + 2);
                }
            }
            // Packing with saturation is the clip.
            const __m256i pixels =
                _mm256_shuffle_epi8(_mm256_packus_epi16(_mm256_packs_epi32(sums[0].rounded(), sums[1].rounded()),
                                                        _mm256_packs_epi32(sums[2].rounded(), sums[3].rounded())),
                                    planar);
            store_four(out[row] + x, _mm256_extract_epi32(pixels, 0));
            store_four(out[row] + plane + x, _mm256_extract_epi32(pixels, 1));
            store_four(out[row] + 2 * plane + x, _mm256_extract_epi32(pixels, 2));
            store_four(out[row + 1] + x, _mm256_extract_epi32(pixels, 4));
            store_four(out[row + 1] + plane + x, _mm256_extract_epi32(pixels, 5));
            store_four(out[row + 1] + 2 * plane + x, _mm256_extract_epi32(pixels, 6));
        }
    }
}

void vertical(const uint8_t* const* rows, const AxisView& axis, int32_t output, int32_t bytes, uint8_t* out) {
    const __m256i zero = _mm256_setzero_si256();
    for (int32_t start = 0; start < bytes; start += 32) {
        const int32_t* halves = axis.halves + static_cast<std::ptrdiff_t>(output) * axis.taps;
        Sums sums[4];
        for (int32_t tap = 0; tap < axis.taps; tap += 2, halves += 2) {
            const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[tap] + start));
            const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[tap + 1] + start));
            const __m256i low = _mm256_unpacklo_epi8(a, b);
            const __m256i high = _mm256_unpackhi_epi8(a, b);
            sums[0].add(_mm256_unpacklo_epi8(low, zero), halves);
            sums[1].add(_mm256_unpackhi_epi8(low, zero), halves);
            sums[2].add(_mm256_unpacklo_epi8(high, zero), halves);
            sums[3].add(_mm256_unpackhi_epi8(high, zero), halves);
        }
        // Unpacking and packing both keep to 128-bit halves, so the bytes end where they began.
        const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(sums[0].rounded(), sums[1].rounded()),
                                                   _mm256_packs_epi32(sums[2].rounded(), sums[3].rounded()));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + start), packed);
    }
}

}  // namespace

const RowFunctions kRowsAvx2{"avx2", horizontal, vertical, emit_generic<float>, emit_generic<uint16_t>};

}  // namespace xr0

// Compiled for AVX-512 with VNNI. The dot product of four samples with four signed bytes, once for each of the three
// base-256 digits of the weights.
#include <immintrin.h>

#include "xr0/rows_generic.h"

namespace xr0 {
namespace {

constexpr int kDigits = 3;

struct Sums {
    __m512i digit[kDigits] = {_mm512_set1_epi32(kHalf), _mm512_setzero_si512(), _mm512_setzero_si512()};

    // samples: four to a lane. digits: four signed bytes each.
    void add(__m512i samples, const int32_t* digits) {
        for (int i = 0; i < kDigits; ++i) {
            digit[i] = _mm512_dpbusd_epi32(digit[i], samples, _mm512_set1_epi32(digits[i]));
        }
    }

    __m512i rounded() const {
        const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(digit[1], 8), _mm512_slli_epi32(digit[2], 16));
        return _mm512_srai_epi32(_mm512_add_epi32(digit[0], high), kFractionBits);
    }
};

inline __m128i load(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

inline void store_planes(__m128i pixels, uint8_t* out, std::ptrdiff_t plane) {
    const int32_t four[] = {_mm_extract_epi32(pixels, 0), _mm_extract_epi32(pixels, 1), _mm_extract_epi32(pixels, 2)};
    for (int channel = 0; channel < kChannels; ++channel) {
        std::memcpy(out + channel * plane, &four[channel], sizeof four[channel]);
    }
}

// One 128-bit quarter of a register for each of the four rows.
void horizontal(const uint8_t* const* rows, const AxisView& axis, uint8_t* const* out, std::ptrdiff_t plane) {
    const __m512i by_channel =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
    const __m512i planar = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const int32_t* digits = axis.digits;
    for (int32_t x = 0; x < axis.outputs; x += kOutputStep) {
        Sums sums[kOutputStep];
#pragma GCC unroll 4
        for (int i = 0; i < kOutputStep; ++i) {
            std::ptrdiff_t at = static_cast<std::ptrdiff_t>(axis.first[x + i]) * kChannels;
            for (int32_t tap = 0; tap < axis.taps; tap += kTapStep, digits += kDigits, at += kTapStep * kChannels) {
                const __m256i upper =
                    _mm256_inserti128_si256(_mm256_castsi128_si256(load(rows[2] + at)), load(rows[3] + at), 1);
                const __m256i lower =
                    _mm256_inserti128_si256(_mm256_castsi128_si256(load(rows[0] + at)), load(rows[1] + at), 1);
                const __m512i pixels = _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
                sums[i].add(_mm512_shuffle_epi8(pixels, by_channel), digits);
            }
        }
        // Packing with saturation is the clip.
        const __m512i pixels =
            _mm512_shuffle_epi8(_mm512_packus_epi16(_mm512_packs_epi32(sums[0].rounded(), sums[1].rounded()),
                                                    _mm512_packs_epi32(sums[2].rounded(), sums[3].rounded())),
                                planar);
        store_planes(_mm512_extracti32x4_epi32(pixels, 0), out[0] + x, plane);
        store_planes(_mm512_extracti32x4_epi32(pixels, 1), out[1] + x, plane);
        store_planes(_mm512_extracti32x4_epi32(pixels, 2), out[2] + x, plane);
        store_planes(_mm512_extracti32x4_epi32(pixels, 3), out[3] + x, plane);
    }
}

void vertical(const uint8_t* const* rows, const AxisView& axis, int32_t output, int32_t bytes, uint8_t* out) {
    for (int32_t start = 0; start < bytes; start += 64) {
        const int32_t* digits = axis.digits + static_cast<std::ptrdiff_t>(output) * (axis.taps / kTapStep) * kDigits;
        Sums sums[4];
        for (int32_t tap = 0; tap < axis.taps; tap += kTapStep, digits += kDigits) {
            const __m512i a = _mm512_loadu_si512(rows[tap] + start);
            const __m512i b = _mm512_loadu_si512(rows[tap + 1] + start);
            const __m512i c = _mm512_loadu_si512(rows[tap + 2] + start);
            const __m512i d = _mm512_loadu_si512(rows[tap + 3] + start);
            const __m512i ab_low = _mm512_unpacklo_epi8(a, b);
            const __m512i ab_high = _mm512_unpackhi_epi8(a, b);
            const __m512i cd_low = _mm512_unpacklo_epi8(c, d);
            const __m512i cd_high = _mm512_unpackhi_epi8(c, d);
            sums[0].add(_mm512_unpacklo_epi16(ab_low, cd_low), digits);
            sums[1].add(_mm512_unpackhi_epi16(ab_low, cd_low), digits);
            sums[2].add(_mm512_unpacklo_epi16(ab_high, cd_high), digits);
            sums[3].add(_mm512_unpackhi_epi16(ab_high, cd_high), digits);
        }
        // Unpacking and packing both keep to 128-bit quarters, so the bytes end where they began.
        const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(sums[0].rounded(), sums[1].rounded()),
                                                   _mm512_packs_epi32(sums[2].rounded(), sums[3].rounded()));
        _mm512_storeu_si512(out + start, packed);
    }
}

}  // namespace

const RowFunctions kRowsAvx512{
    "avx512", horizontal, vertical, emit_generic<float>, emit_generic<Bfloat16>, emit_generic<Float16>};

}  // namespace xr0

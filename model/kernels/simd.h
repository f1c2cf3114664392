// Sixteen floats at a time: what AVX-512 does not bring along. Included after the target is chosen.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

namespace embedq {
namespace {

using bfloat16 = uint16_t;

inline __mmask16 first(long count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
inline __m512i widen(const bfloat16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512 load(const bfloat16* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(widen(from), 16)); }

// To the nearest, ties to even; NaN stays NaN.
inline __m256i round_to_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fffffff));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void store(bfloat16* to, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_to_bfloat16(x)); }

// Rows of sixteen 4-byte units to columns.
inline void transpose(const __m512i (&rows)[16], __m512i (&columns)[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // b[i + j]: columns j, j + 4, j + 8, j + 12 of rows i to i + 3
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i even_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        columns[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        columns[j + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        columns[j + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        columns[j + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

// to[k * step_stride + r] = rows[r][k] for r < count <= 16 and k < steps.
inline void interleave(const uint32_t* const* rows, long count, long steps, uint32_t* to, long step_stride) {
    for (long k = 0; k < steps; k += 16) {
        const __mmask16 here = first(steps - k);
        __m512i units[16], columns[16];
        for (long r = 0; r < 16; ++r)
            units[r] = r < count ? _mm512_maskz_loadu_epi32(here, rows[r] + k) : _mm512_setzero_si512();
        transpose(units, columns);
        const long width = steps - k < 16 ? steps - k : 16;
        for (long i = 0; i < width; ++i) _mm512_mask_storeu_epi32(to + (k + i) * step_stride, first(count), columns[i]);
    }
}

// e^x within a unit in the last place, 0 for what is too small, infinity for what is too large; NaN stays NaN.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-120.0f), x);  // in this order NaN stays NaN
    const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);  // Taylor: |rest| <= ln 2 / 2
    for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(sum, power);
}

// 1 / x within a unit in the last place or two, for x of ordinary size: a third of a division's time.
inline __m512 reciprocal(__m512 x) {
    const __m512 rough = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(rough, _mm512_fnmadd_ps(x, rough, _mm512_set1_ps(2.0f)));
}

// x * Phi(x), the exact GELU. Phi of the smaller side is erfc(t) / 2 = exp(-t^2) u P(u) / 2 with t = |x| / sqrt 2 and
// u = 1 / (1 + 0.3 t): the form of Abramowitz and Stegun 7.1.26 with P of degree 8, fitted to 2e-8 relative.
inline __m512 gelu(__m512 x) {
    const __m512 t = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.707106781f));
    const __m512 u = reciprocal(_mm512_fmadd_ps(t, _mm512_set1_ps(0.3f), _mm512_set1_ps(1.0f)));
    __m512 sum = _mm512_set1_ps(-0.12952272593975067f);
    for (const float coefficient : {0.48556238412857056f, -0.5122764110565186f, 0.5477181077003479f,
                                    -0.09464944154024124f, 0.21492552757263184f, 0.14833930134773254f,
                                    0.17071521282196045f, 0.1691880077123642f})
        sum = _mm512_fmadd_ps(sum, u, _mm512_set1_ps(coefficient));
    const __m512 decay = exponential(_mm512_fnmadd_ps(t, t, _mm512_setzero_ps()));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(decay, u), sum), _mm512_set1_ps(0.5f));
    const __mmask16 is_positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, is_positive, _mm512_set1_ps(1.0f), tail));
}

}  // namespace
}  // namespace embedq

// The inner loop of every matrix product here: a tile of 12 x 32 sums that stays in registers.
//
// Both operands come in 4-byte units along the summed dimension: one float, two bfloat16 or four bytes. The left one has
// row r of step k at a[r * RowStride + k * StepStride], the right one column c of step k at b[k * COLUMNS + c].
#pragma once

#include "simd.h"

namespace embedq {
namespace {

constexpr long ROWS = 12, COLUMNS = 32;

struct Float32 {
    using Element = float;
    using Sum = __m512;
    static constexpr long PER_UNIT = 1;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum step(Sum sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    // Sixteen columns of the rows that share a step, `stride` apart; the last step of an odd number is not whole.
    static __m512i units(const float* from, long, bool) { return _mm512_loadu_si512(from); }
    static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
};

#ifdef EMBEDQ_BFLOAT16
struct BFloat16 {
    using Element = bfloat16;
    using Sum = __m512;
    static constexpr long PER_UNIT = 2;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum step(Sum sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static __m512i units(const bfloat16* from, long stride, bool is_whole) {
        return is_whole ? _mm512_or_si512(widen(from), _mm512_slli_epi32(widen(from + stride), 16)) : widen(from);
    }
    static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
};
#endif

#ifdef EMBEDQ_INT8
struct Int8 {
    using Element = uint8_t;  // the left operand's; the right one's is int8_t
    using Sum = __m512i;
    static constexpr long PER_UNIT = 4;
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum step(Sum sum, __m512i a, __m512i b) {
        // The intrinsic costs half the speed under GCC 12, which copies every sum before it adds to it.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
};
#endif

template <class Kind, int R>
using Tile = typename Kind::Sum[R][2];

template <class Kind, int R, long RowStride, long StepStride>
inline __attribute__((always_inline)) void multiply_block(const uint32_t* a, const uint32_t* b, long steps, Tile<Kind, R>& sums) {
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Kind::zero();
    for (long k = 0; k < steps; ++k, a += StepStride, b += COLUMNS) {
        const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i x = _mm512_set1_epi32(static_cast<int>(a[r * RowStride]));
            sums[r][0] = Kind::step(sums[r][0], x, left);
            sums[r][1] = Kind::step(sums[r][1], x, right);
        }
    }
}

// Sums over at most this many steps are formed one after the other, then added up: the rounding error of a float sum
// grows with the length of its chain.
constexpr long CHAIN_STEPS = 256;

template <class Kind, int R, long RowStride, long StepStride>
inline __attribute__((always_inline)) void multiply(const uint32_t* a, const uint32_t* b, long steps, Tile<Kind, R>& sums) {
    const long first_steps = steps < CHAIN_STEPS ? steps : CHAIN_STEPS;
    multiply_block<Kind, R, RowStride, StepStride>(a, b, first_steps, sums);
    for (long done = first_steps; done < steps; done += CHAIN_STEPS) {
        Tile<Kind, R> total;
        for (int r = 0; r < R; ++r) total[r][0] = sums[r][0], total[r][1] = sums[r][1];
        const long more = steps - done < CHAIN_STEPS ? steps - done : CHAIN_STEPS;
        multiply_block<Kind, R, RowStride, StepStride>(a + done * StepStride, b + done * COLUMNS, more, sums);
        for (int r = 0; r < R; ++r) {
            sums[r][0] = Kind::add(sums[r][0], total[r][0]);
            sums[r][1] = Kind::add(sums[r][1], total[r][1]);
        }
    }
}

// Calls body.operator()<R>() for R = count, at least 1 and at most ROWS.
template <class Body>
inline void with_rows(long count, Body&& body) {
    switch (count) {
        case 1: return body.template operator()<1>();
        case 2: return body.template operator()<2>();
        case 3: return body.template operator()<3>();
        case 4: return body.template operator()<4>();
        case 5: return body.template operator()<5>();
        case 6: return body.template operator()<6>();
        case 7: return body.template operator()<7>();
        case 8: return body.template operator()<8>();
        case 9: return body.template operator()<9>();
        case 10: return body.template operator()<10>();
        case 11: return body.template operator()<11>();
        default: return body.template operator()<12>();
    }
}

}  // namespace
}  // namespace embedq

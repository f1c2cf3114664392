// y = x W^T + b, then nothing, GELU or the sum with a residual, while the tile is still in registers.
//
// A call first lays the rows of x out for the tiles (converting or quantizing them), then multiplies. Sizes must be
// multiples of COLUMNS.
#pragma once

#include <algorithm>

#include "team.h"
#include "tile.h"

extern "C" {

// What one call works on; the same struct in native.py.
struct EmbedqLinear {
    long in_features, out_features;
    const void* weight;         // packed: [out / 32][step][32] units
    const float* bias;          // (out,)
    const float* weight_scale;  // (out,), int8 only
    const int* weight_sum;      // (out,), int8 only: the sum of the quantized row
    const float* input_factor;  // (in,), int8 only: x is multiplied by it first; or null
};

enum EmbedqAfter { EMBEDQ_NOTHING, EMBEDQ_GELU, EMBEDQ_ADD };
}

namespace embedq {
namespace {

// Of packed weights a task goes through; so much stays in a core's second-level cache.
constexpr long CHUNK_BYTES = 384 << 10;
// Tiles of rows a task multiplies with such a chunk.
constexpr long GROUP_TILES = 8;
// Fewer tasks would leave threads waiting for the last one.
constexpr long MIN_TASKS = 32;

struct LeftOperand {
    uint32_t* units;  // [tile][step][12]
    float* scale;     // (rows,) int8 only
    int* zero;        // (rows,) int8 only: which byte is 0
};

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

template <class Kind>
long steps_of(const EmbedqLinear& linear) {
    return linear.in_features / Kind::PER_UNIT;
}

template <class Kind>
LeftOperand allocate(const EmbedqLinear& linear, long rows) {
    const long padded = ceil_div(rows, ROWS) * ROWS;
    auto* memory = static_cast<char*>(scratch(Scratch::shared, padded * (4 * steps_of<Kind>(linear) + 8)));
    auto* scale = reinterpret_cast<float*>(memory);
    auto* zero = reinterpret_cast<int*>(scale + padded);
    return {reinterpret_cast<uint32_t*>(zero + padded), scale, zero};
}

// One row of x as units; where it is such already, no copy is made.
template <class Kind, class In>
const uint32_t* as_units(Kind, const EmbedqLinear& linear, const In* x, uint32_t* row, LeftOperand, long) {
    using Element = typename Kind::Element;
    if constexpr (std::is_same_v<In, Element>) {
        return reinterpret_cast<const uint32_t*>(x);
    } else {
        auto* to = reinterpret_cast<Element*>(row);
        for (long k = 0; k < linear.in_features; k += 16) store(to + k, load(x + k));
        return row;
    }
}

#ifdef EMBEDQ_INT8
// byte = round(x / scale) + zero with scale and zero such that the row's range, which always holds 0, fills 0..255.
template <class In>
const uint32_t* as_units(Int8, const EmbedqLinear& linear, const In* x, uint32_t* row, LeftOperand left, long index) {
    const float* factor = linear.input_factor;
    const auto value = [=](long k) { return factor ? _mm512_mul_ps(load(x + k), load(factor + k)) : load(x + k); };
    __m512 lowest = _mm512_setzero_ps(), highest = _mm512_setzero_ps(), nothing = _mm512_setzero_ps();
    for (long k = 0; k < linear.in_features; k += 16) {
        lowest = _mm512_min_ps(lowest, value(k));
        highest = _mm512_max_ps(highest, value(k));
        nothing = _mm512_fmadd_ps(value(k), _mm512_setzero_ps(), nothing);  // NaN after NaN or infinity
    }
    const float low = _mm512_reduce_min_ps(lowest), range = _mm512_reduce_max_ps(highest) - low;
    const float scale = (range > 0 ? range / 255 : 1) + _mm512_reduce_add_ps(nothing);
    const int zero = _mm512_cvtsi512_si32(_mm512_cvtps_epi32(_mm512_set1_ps(-low / scale)));
    const __m512 inverse = _mm512_set1_ps(1 / scale);
    auto* to = reinterpret_cast<uint8_t*>(row);
    for (long k = 0; k < linear.in_features; k += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value(k), inverse));
        const __m512i shifted = _mm512_add_epi32(rounded, _mm512_set1_epi32(zero));
        const __m512i positive = _mm512_max_epi32(shifted, _mm512_setzero_si512());
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), _mm512_cvtusepi32_epi8(positive));
    }
    left.scale[index] = scale;
    left.zero[index] = zero;
    return row;
}
#endif

template <class Kind, class In>
void lay_out(const EmbedqLinear& linear, const In* x, long rows, LeftOperand left, int num_threads) {
    const long steps = steps_of<Kind>(linear);
    parallel(num_threads, ceil_div(rows, ROWS), [=, &linear](long tile) {
        auto* converted = static_cast<uint32_t*>(scratch(Scratch::own, 4 * steps * ROWS));
        const long count = std::min(ROWS, rows - tile * ROWS);
        const uint32_t* units[ROWS];
        for (long r = 0; r < count; ++r) {
            const long index = tile * ROWS + r;
            const In* row = x + index * linear.in_features;
            units[r] = as_units(Kind(), linear, row, converted + r * steps, left, index);
        }
        interleave(units, count, steps, left.units + tile * steps * ROWS, ROWS);
    });
}

template <class Kind>
inline __m512 as_float(typename Kind::Sum sum, const EmbedqLinear&, const LeftOperand&, long, long) {
    return sum;
}

#ifdef EMBEDQ_INT8
template <>
inline __m512 as_float<Int8>(__m512i sum, const EmbedqLinear& linear, const LeftOperand& left, long row, long column) {
    const __m512i of_zero = _mm512_mullo_epi32(_mm512_set1_epi32(left.zero[row]), _mm512_loadu_si512(linear.weight_sum + column));
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, of_zero));
    return _mm512_mul_ps(exact, _mm512_mul_ps(_mm512_set1_ps(left.scale[row]), load(linear.weight_scale + column)));
}
#endif

template <class Kind, class Out>
void multiply_rows(const EmbedqLinear& linear, LeftOperand left, long rows, EmbedqAfter after, const float* residual,
                   Out* y, int num_threads) {
    const long steps = steps_of<Kind>(linear), width = linear.out_features;
    const auto* weight = static_cast<const uint32_t*>(linear.weight);
    const long tiles = ceil_div(rows, ROWS), panels = width / COLUMNS;
    long chunk = std::clamp(CHUNK_BYTES / (4 * COLUMNS * steps), 1L, panels), group = std::min(GROUP_TILES, tiles);
    while (group > 1 && ceil_div(tiles, group) * ceil_div(panels, chunk) < MIN_TASKS) group = ceil_div(group, 2);
    while (chunk > 1 && ceil_div(tiles, group) * ceil_div(panels, chunk) < MIN_TASKS) chunk = ceil_div(chunk, 2);
    const long groups = ceil_div(tiles, group);
    parallel(num_threads, groups * ceil_div(panels, chunk), [=, &linear](long task) {
        const long first_panel = task / groups * chunk, last_panel = std::min(panels, first_panel + chunk);
        const long first_tile = task % groups * group, last_tile = std::min(tiles, first_tile + group);
        for (long panel = first_panel; panel < last_panel; ++panel) {
            for (long tile = first_tile; tile < last_tile; ++tile) {
                const long top = tile * ROWS, column = panel * COLUMNS;
                with_rows(rows - top, [&]<int R>() {
                    Tile<Kind, R> sums;
                    multiply<Kind, R, 1, ROWS>(left.units + tile * steps * ROWS, weight + column * steps, steps, sums);
                    for (int r = 0; r < R; ++r) {
                        for (int half = 0; half < 2; ++half) {
                            const long at = column + 16 * half, place = (top + r) * width + at;
                            __m512 value = as_float<Kind>(sums[r][half], linear, left, top + r, at);
                            value = _mm512_add_ps(value, load(linear.bias + at));
                            if (after == EMBEDQ_GELU) value = gelu(value);
                            if (after == EMBEDQ_ADD) value = _mm512_add_ps(value, load(residual + place));
                            store(y + place, value);
                        }
                    }
                });
            }
        }
    });
}

template <class Kind, class In, class Out>
void apply(const EmbedqLinear* linear, const In* x, long rows, EmbedqAfter after, const float* residual, Out* y,
           int num_threads) {
    if (rows == 0) return;
    const LeftOperand left = allocate<Kind>(*linear, rows);
    lay_out<Kind>(*linear, x, rows, left, num_threads);
    multiply_rows<Kind>(*linear, left, rows, after, residual, y, num_threads);
}

// For whoever knows the types at run time only. Gives 0, or 1 if memory ran out.
template <class Kind>
int apply_any(const EmbedqLinear* linear, const void* x, int x_is_bfloat16, long rows, EmbedqAfter after,
               const float* residual, void* y, int y_is_bfloat16, int num_threads) {
    const auto with = [=](const auto* from) {
        if (y_is_bfloat16)
            apply<Kind>(linear, from, rows, after, residual, static_cast<bfloat16*>(y), num_threads);
        else
            apply<Kind>(linear, from, rows, after, residual, static_cast<float*>(y), num_threads);
    };
    return status_of([&] {
        if (x_is_bfloat16)
            with(static_cast<const bfloat16*>(x));
        else
            with(static_cast<const float*>(x));
    });
}

// weight: (out, in) elements of the right operand, row after row.
template <class Kind>
void pack_weight(const uint32_t* weight, long out_features, long in_features, uint32_t* packed) {
    const long steps = in_features / Kind::PER_UNIT;
    for (long row = 0; row < out_features; ++row) {
        uint32_t* to = packed + row / COLUMNS * COLUMNS * steps + row % COLUMNS;
        for (long k = 0; k < steps; ++k) to[k * COLUMNS] = weight[row * steps + k];
    }
}

}  // namespace
}  // namespace embedq

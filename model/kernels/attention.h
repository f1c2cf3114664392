// softmax(Q K^T / sqrt(d) + bias) V for texts packed one after the other: no padding, no mask.
//
// A task is one head of one text: keys and values are laid out for the tiles once, then 12 queries at a time see them.
#pragma once

#include <cmath>
#include <limits>

#include "linear.h"

extern "C" {

// The same struct in native.py.
struct EmbedqAttention {
    long num_heads, head_dim;
    const float* bias;  // (heads, 2 * reach + 1): of key j for query i at j - i + reach
    long reach;
};
}

namespace embedq {
namespace {

// Tokens of the longest text; the same in native.py.
constexpr long MAX_KEYS = 1024;
// Units between two rows of probabilities: a constant, so that the inner loop needs one address for all rows. Not a
// multiple of 4 KiB, where all rows would fight for the same cache lines.
constexpr long PROBABILITY_STRIDE = MAX_KEYS + 16;

inline long round_up(long a, long b) { return ceil_div(a, b) * b; }

// Where one head of one text lies in qkv, and the room to work in.
template <class Kind>
struct Head {
    using Element = typename Kind::Element;

    const EmbedqAttention& attention;
    const Element* query;  // of the first token; the next token is `stride` elements on
    long stride, length, dim;
    const float* bias;
    uint32_t *keys, *values, *tile, *probabilities;
    float* scores;

    static unsigned long scratch_bytes(long length, long dim) {
        const long padded = round_up(length, COLUMNS);
        return 4ul * (2 * padded * dim + ROWS * dim + ROWS * PROBABILITY_STRIDE + ROWS * padded);
    }

    Head(const EmbedqAttention& attention, const Element* qkv, long start, long length, long head)
        : attention(attention), length(length), dim(attention.head_dim) {
        const long hidden = attention.num_heads * dim, padded = round_up(length, COLUMNS);
        stride = 3 * hidden;
        query = qkv + start * stride + head * dim;
        bias = attention.bias + head * (2 * attention.reach + 1) + attention.reach;
        keys = static_cast<uint32_t*>(scratch(Scratch::own, scratch_bytes(length, dim)));
        values = keys + padded * dim;
        tile = values + padded * dim;
        probabilities = tile + ROWS * dim;
        scores = reinterpret_cast<float*>(probabilities + ROWS * PROBABILITY_STRIDE);
    }

    long key_steps() const { return dim / Kind::PER_UNIT; }
    long value_steps() const { return ceil_div(length, Kind::PER_UNIT); }
    long width() const { return round_up(length, COLUMNS); }

    // [panel of 32 keys][step][32]; keys beyond the text give sums that nobody reads.
    void lay_out_keys() {
        const Element* key = query + attention.num_heads * dim;
        const long steps = key_steps();
        for (long j = 0; j < width(); j += 16) {
            const uint32_t* rows[16];
            for (long r = 0; r < 16; ++r)
                rows[r] = reinterpret_cast<const uint32_t*>(key + std::min(j + r, length - 1) * stride);
            interleave(rows, 16, steps, keys + j / COLUMNS * COLUMNS * steps + j % COLUMNS, COLUMNS);
        }
    }

    // [panel of 32 dimensions][step][32]
    void lay_out_values() {
        const Element* value = query + 2 * attention.num_heads * dim;
        const long steps = value_steps();
        for (long step = 0; step < steps; ++step) {
            for (long panel = 0; panel < dim / COLUMNS; ++panel) {
                uint32_t* to = values + (panel * steps + step) * COLUMNS;
                const Element* from = value + step * Kind::PER_UNIT * stride + panel * COLUMNS;
                const bool is_whole = (step + 1) * Kind::PER_UNIT <= length;
                _mm512_storeu_si512(to, Kind::units(from, stride, is_whole));
                _mm512_storeu_si512(to + 16, Kind::units(from + 16, stride, is_whole));
            }
        }
    }

    template <int R>
    void attend(long first_query, Element* context) {
        const uint32_t* rows[R];
        for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const uint32_t*>(query + (first_query + r) * stride);
        interleave(rows, R, key_steps(), tile, ROWS);
        score<R>();
        float sums[R];
        for (int r = 0; r < R; ++r) sums[r] = soften(first_query + r, scores + r * width(), probabilities + r * PROBABILITY_STRIDE);
        for (long panel = 0; panel < dim / COLUMNS; ++panel) {
            Tile<Kind, R> out;
            multiply<Kind, R, PROBABILITY_STRIDE, 1>(probabilities, values + panel * value_steps() * COLUMNS, value_steps(), out);
            for (int r = 0; r < R; ++r) {
                Element* to = context + (first_query + r) * attention.num_heads * dim + panel * COLUMNS;
                const __m512 factor = _mm512_set1_ps(1 / sums[r]);
                store(to, _mm512_mul_ps(out[r][0], factor));
                store(to + 16, _mm512_mul_ps(out[r][1], factor));
            }
        }
    }

    template <int R>
    void score() {
        for (long j = 0; j < width(); j += COLUMNS) {
            Tile<Kind, R> sums;
            multiply<Kind, R, 1, ROWS>(tile, keys + j * key_steps(), key_steps(), sums);
            for (int r = 0; r < R; ++r) {
                store(scores + r * width() + j, sums[r][0]);
                store(scores + r * width() + j + 16, sums[r][1]);
            }
        }
    }

    // e^(score - highest) of one query as elements; returns their sum.
    float soften(long i, float* score, uint32_t* to) {
        const __m512 scale = _mm512_set1_ps(1 / std::sqrt(static_cast<float>(dim)));
        const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512 highest = lowest;
        for (long j = 0; j < length; j += 16) {
            const __mmask16 here = first(length - j);
            const __m512 offset = _mm512_maskz_loadu_ps(here, bias - i + j);
            const __m512 value = _mm512_mask_fmadd_ps(load(score + j), here, scale, offset);
            store(score + j, value);
            highest = _mm512_mask_max_ps(highest, here, highest, value);
        }
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
        __m512 sum = _mm512_setzero_ps();
        for (long j = 0; j < length; j += 16) {
            const __mmask16 here = first(length - j);
            const __m512 value = _mm512_maskz_mov_ps(here, exponential(_mm512_sub_ps(load(score + j), top)));
            store(reinterpret_cast<Element*>(to) + j, value);
            sum = _mm512_add_ps(sum, value);
        }
        return _mm512_reduce_add_ps(sum);
    }
};

// qkv: (tokens, 3, heads, dim); context: (tokens, heads, dim). The texts with the most tokens come first, so the last
// tasks are short. Gives 0, or 1 if memory ran out.
template <class Kind>
int attend(const EmbedqAttention* attention, const typename Kind::Element* qkv, const long* starts, const long* lengths,
           long num_texts, typename Kind::Element* context, int num_threads) {
    const long hidden = attention->num_heads * attention->head_dim;
    auto attend_to_head = [=](long task) {
        const long text = task / attention->num_heads, index = task % attention->num_heads;
        Head<Kind> head(*attention, qkv, starts[text], lengths[text], index);
        head.lay_out_keys();
        head.lay_out_values();
        auto* to = context + starts[text] * hidden + index * attention->head_dim;
        for (long i = 0; i < head.length; i += ROWS)
            with_rows(head.length - i, [&]<int R>() { head.template attend<R>(i, to); });
    };
    return status_of([&] { parallel(num_threads, num_texts * attention->num_heads, attend_to_head); });
}

}  // namespace
}  // namespace embedq

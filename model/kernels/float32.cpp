// Float32 on any CPU with AVX-512.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "attention.h"

using namespace embedq;

extern "C" {

void embedq_float32_pack(const uint32_t* weight, long out_features, long in_features, uint32_t* packed) {
    pack_weight<Float32>(weight, out_features, in_features, packed);
}

int embedq_float32_linear(const EmbedqLinear* linear, const void* x, int x_is_bfloat16, long rows, EmbedqAfter after,
                           const float* residual, void* y, int y_is_bfloat16, int num_threads) {
    return apply_any<Float32>(linear, x, x_is_bfloat16, rows, after, residual, y, y_is_bfloat16, num_threads);
}

int embedq_float32_attention(const EmbedqAttention* attention, const float* qkv, const long* starts, const long* lengths,
                             long num_texts, float* context, int num_threads) {
    return attend<Float32>(attention, qkv, starts, lengths, num_texts, context, num_threads);
}

}

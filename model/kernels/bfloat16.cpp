// BFloat16 products, summed in float32, on a CPU with AVX512_BF16.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define EMBEDQ_BFLOAT16
#include "attention.h"

using namespace embedq;

extern "C" {

void embedq_bfloat16_pack(const uint32_t* weight, long out_features, long in_features, uint32_t* packed) {
    pack_weight<BFloat16>(weight, out_features, in_features, packed);
}

int embedq_bfloat16_linear(const EmbedqLinear* linear, const void* x, int x_is_bfloat16, long rows, EmbedqAfter after,
                           const float* residual, void* y, int y_is_bfloat16, int num_threads) {
    return apply_any<BFloat16>(linear, x, x_is_bfloat16, rows, after, residual, y, y_is_bfloat16, num_threads);
}

int embedq_bfloat16_attention(const EmbedqAttention* attention, const bfloat16* qkv, const long* starts,
                              const long* lengths, long num_texts, bfloat16* context, int num_threads) {
    return attend<BFloat16>(attention, qkv, starts, lengths, num_texts, context, num_threads);
}

}

// Unsigned by signed bytes, summed in int32, on a CPU with AVX512_VNNI.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#define EMBEDQ_INT8
#include "linear.h"

using namespace embedq;

extern "C" {

void embedq_int8_pack(const uint32_t* weight, long out_features, long in_features, uint32_t* packed) {
    pack_weight<Int8>(weight, out_features, in_features, packed);
}

int embedq_int8_linear(const EmbedqLinear* linear, const void* x, int x_is_bfloat16, long rows, EmbedqAfter after,
                        const float* residual, void* y, int y_is_bfloat16, int num_threads) {
    return apply_any<Int8>(linear, x, x_is_bfloat16, rows, after, residual, y, y_is_bfloat16, num_threads);
}

}

// attention: causal attention over a contiguous range of positions: the self-decoder's window (window = W), the
// Transformer and the `dense` routing mode (window = 0: all positions). For batch row r of position t and query head h,
// with g = h / (n_head/n_kv):
//
//   out[r][h] = sum_s p_s V_s[g],  p = softmax over s in (t - W, t] of ( q[r][h] . K_s[g] * scale )
//
// The cache already holds the rows of every position of the batch. Scores and sums in f32, stable softmax. A value that
// is not finite shows in the rows that attend to it, and in no other.
//
// With AMX, ops of CLSA_AMX_ROWS (matmul.h) rows and more over f16 and Q8_0 caches round q, k, v and p to bf16. A row
// of an op of few rows and the same row in an op of many then differ within that. Scratch: none that grows with the
// context.
#pragma once
#include "clsa.h"

#ifdef __cplusplus
extern "C" {
#endif

struct clsa_attention {
    struct clsa_batch batch;
    int32_t n_head, n_kv, d;
    int32_t window; // 0 = every position up to t
    float scale;    // 1/sqrt(d)
    const float *q; // [n_rows][n_head * d]
    float *out;     // [n_rows][n_head * d]
    struct clsa_rows k, v;
};

CLSA_OP(attention)
// F, BW, CD, DQ, VL, BF16 and AMX-BF16.
void clsa_attention_amx(const struct clsa_attention *p, int ith, int nth, void *scratch);

#ifdef __cplusplus
}
#endif

// attention: causal attention over a contiguous range of positions: the self-decoder's window (window = W), the
// Transformer and the `dense` routing mode (window = 0: all positions). For batch row r of position t and query head h,
// with g = h / (n_head/n_kv):
//
//   out[r][h] = sum_s p_s V_s[g],  p = softmax over s in (t - W, t] of ( q[r][h] . K_s[g] * scale )
//
// The cache already holds the rows of every position of the batch. Scores and sums in f32, stable softmax.
// Scratch: none that grows with the context.
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

#ifdef __cplusplus
}
#endif

// gather_attention: attention of every query head over the selected positions of its row only (model.md CROSS-DECODER):
//
//   out[r][h] = sum_{s in S[r]} p_s V_s[g],  p = softmax over S[r] of ( q[r][h] . K_s[g] * scale ),  g = h /
//   (n_head/n_kv)
//
// Each selected K and V row is read once per KV head, not once per query head. Scores and sums in f32, stable softmax.
#pragma once
#include "clsa.h"

#ifdef __cplusplus
extern "C" {
#endif

struct clsa_gather_attention {
    struct clsa_batch batch;
    int32_t n_head, n_kv, d;
    int32_t n_columns; // columns of `selected`
    float scale;
    const float *q; // [n_rows][n_head * d]
    float *out;     // [n_rows][n_head * d]
    struct clsa_rows k, v;
    const uint32_t *selected; // [n_rows][n_columns]
    const int32_t *count;     // [n_rows]
};

CLSA_OP(gather_attention)

#ifdef __cplusplus
}
#endif

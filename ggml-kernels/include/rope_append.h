// rope_append: what happens to q, k, v between their projections and attention (model.md, self-decoder and shared
// memory):
//
//   if q_norm: q[h] = RMS(q[h]; q_norm), k[h] = RMS(k[h]; k_norm)      per head, over d, in f32
//   q[h] = RoPE(q[h], t), k[h] = RoPE(k[h], t)                         pairs (j, j + n_rot/2) or, interleaved, (2j,
//   2j+1);
//                                                                      the d - n_rot last dimensions pass unchanged
//   K[t] = k, V[t] = v                                                 converted to the cache's type, round to nearest
//   even;
//                                                                      Q8_0: per 32 values, d = max|x|/127 as f16, q =
//                                                                      round(x/d)
//
// Each part is optional: q == NULL, v_cache.base == NULL, cos == NULL (no position encoding), q_norm == NULL.
// cos/sin: [n_rows][n_rot/2], of each batch row's own position.
#pragma once
#include "clsa.h"

#ifdef __cplusplus
extern "C" {
#endif

struct clsa_rope_append {
    struct clsa_batch batch;
    int32_t n_head, n_kv, d; // query heads, KV heads, head dim
    int32_t n_rot;           // rotated dimensions, even, <= d
    int32_t interleaved;     // pairs (2j, 2j+1)
    float eps;
    const float *q;      // [n_rows][n_head * d] in
    float *q_out;        // [n_rows][n_head * d] out, may equal q
    const float *k;      // [n_rows][n_kv * d]
    const float *v;      // [n_rows][n_kv * d]
    const float *q_norm; // [d]
    const float *k_norm; // [d]
    const float *cos, *sin;
    struct clsa_rows k_cache, v_cache;
};

CLSA_OP(rope_append)

#ifdef __cplusplus
}
#endif

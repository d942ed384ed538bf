// route: scoring and exact top-k, once per token (arXiv 2606.06467; model.md ROUTING):
//
//   I[s] = qidx[r] . Kidx[s]   for s <= t = pos[r]     f32 accumulation, no scale
//   S[r] = the k positions with the largest I; all of them while t + 1 <= k
//          order: score descending, equal scores take the lower position; -0 equals +0; a NaN score counts as -inf
//   block > 1: positions are pooled in blocks of `block` (the last one may be partial): the block's score is the mean
//   of its
//          I[s]; the k/block best blocks are taken whole (at least one)
//
// selected[r] holds S[r] as positions in ascending order, count[r] their number. Scratch is bounded: it does not grow
// with t.
#pragma once
#include "clsa.h"

#ifdef __cplusplus
extern "C" {
#endif

struct clsa_route {
    struct clsa_batch batch;
    int32_t d;         // d_idx
    int32_t k;         // positions to select; selected has this many columns (block mode: rounded up to whole blocks)
    int32_t block;     // 0 or 1: single positions
    int32_t n_columns; // columns of `selected`
    const float *q;    // [n_rows][d]
    struct clsa_rows keys;
    uint32_t *selected; // [n_rows][n_columns]
    int32_t *count;     // [n_rows]
};

// Scores alone: out[i] = q . Kidx[start + i], i < n, for one query of the sequence in `slot`. (Tests, benches,
// evaluation.)
struct clsa_score {
    struct clsa_batch batch; // slot tables; pos unused
    int32_t d, slot, start, n;
    const float *q; // [d]
    float *out;     // [n]
    struct clsa_rows keys;
};

// Exact top-k alone over n scores: the k best by (score descending, index ascending), written ascending by index.
// Thread 0 does it.
struct clsa_topk {
    const float *scores; // [n]
    int32_t n, k;
    uint32_t *selected; // [min(k, n)]
};

CLSA_OP(route)
CLSA_OP(score)
CLSA_OP(topk)

#ifdef __cplusplus
}
#endif

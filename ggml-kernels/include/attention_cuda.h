// How attention (attention.h) and gather_attention (gather_attention.h) run on a GPU.
//
// Decode: a block takes some of the positions (a split) of one row, one KV head and up to 8 of its query heads; what
// the splits of a row find is combined by the block that finishes last, always in the same order. Which split reads
// which positions depends only on the number of splits and of positions. Prefill: a block takes a tile of (row, query
// head of one KV head) pairs over all their positions.
#pragma once
#include "attention.h"
#include "gather_attention.h"
#include "rope_append.h"

#ifdef __cplusplus
extern "C" {
#endif

// Query heads of one KV head that a decode block takes, and the most splits.
#define CLSA_HEAD_TILE 8
#define CLSA_MAX_SPLITS 128

struct clsa_split {
    int32_t splits;    // blocks that share the positions of a row, 1..=CLSA_MAX_SPLITS
    int32_t head_tile; // query heads of a block, 1..=CLSA_HEAD_TILE
    float *partial;    // [n_rows * n_head][splits][d] weighted sums of values
    float *bounds;     // [n_rows * n_head][splits][2] largest score, sum of weights
    uint32_t *tickets; // [n_rows][n_kv * head tiles], zero between calls
};

struct clsa_attention_cuda {
    struct clsa_attention op;
    struct clsa_split split; // decode
    int32_t tokens;          // prefill: rows of a tile
    int32_t reserved;
};

// Prefill on compute capability 9.0, d 128, f16 caches: the queries come from their projection (rope_append.h; q_norm
// NULL: not normalised, cos NULL: not turned, else n_rot = d unless interleaved), and results go to `out_f16`, clamped
// to f16's range, when that is not NULL.
#define CLSA_PREFILL_HOPPER_ROWS 192 // (token, query head) rows of a block
#define CLSA_PREFILL_HOPPER_SHARED (3 * 2 * 64 * 128 * 2 + 12 * 16 + 1024)
struct clsa_prefill_cuda {
    struct clsa_attention op;
    const float *q_norm;    // [d]
    const float *cos, *sin; // [n_rows][n_rot/2]
    void *out_f16;          // [n_rows][n_head * d]
    float eps;
    int32_t n_rot, interleaved;
    int32_t tokens; // rows of a tile
};

// rope_append and attention of a decode batch in one launch: `append` takes q, k and v from their projections and
// writes the caches that `op` reads; op.q and append.q_out are not used. No two rows belong to the same sequence. The
// batch, and all rows of the caches but the appended ones, are read while the kernel's predecessors may still run.
struct clsa_append_attention_cuda {
    struct clsa_rope_append append;
    struct clsa_attention op;
    struct clsa_split split;
};

// The selected rows of K and V of one token, side by side, so that every cross layer reads the same lines: f16, or f32
// where the cache is f32.
struct clsa_gather_cuda {
    struct clsa_gather_attention op;
    uint8_t *k, *v; // [n_rows][n_columns][n_kv * d]
    int32_t k_type, v_type;
    // Whether another kernel has waited for the gathering, and let this launch start only then: the rows may be read
    // before the predecessors are done.
    int32_t settled, reserved;
    struct clsa_split split;
};

#ifdef __cplusplus
}
#endif

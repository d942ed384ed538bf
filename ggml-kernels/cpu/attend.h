// What attention and gather_attention have in common: their arguments, how keys are cut, and the layout of their
// scratch.
//
// The keys of a query row are cut into chunks whose boundaries depend on that row alone. Each chunk is a stable softmax
// of its own, taken over tiles in order; chunks are merged in order. So a row's result is the same bits whether one
// thread walks all its keys or many threads take a chunk each, and whether it stands alone or in a block of rows that
// share converted tiles.
#pragma once
#include "attention.h"
#include "gather_attention.h"
#include "team.h"

#define TILE 64       // keys of a tile, from multiples of TILE on
#define CHUNK_MIN 256 // keys of the shortest chunk
#define CHUNK_MAX_COUNT 18
#define BLOCK_ROWS 256 // (query row, head) pairs that share a converted tile

struct attend {
    struct clsa_batch batch;
    int32_t n_head, n_kv, d, window;
    float scale;
    const float *q;
    float *out;
    struct clsa_rows k, v;
    const uint32_t *selected; // NULL: the keys are positions, otherwise indices into a row of `selected`
    const int32_t *count;
    int32_t n_columns;
};

// Keys first <= s < end of a batch row.
struct range {
    int32_t first, end;
};

ALWAYS_INLINE struct range keys_of(const struct attend *a, int32_t r) {
    if (a->selected)
        return (struct range){0, a->count[r]};
    int32_t t = a->batch.pos[r];
    return (struct range){a->window > 0 && t >= a->window ? t - a->window + 1 : 0, t + 1};
}

// Length of the chunks of a range: a power of two, at least CHUNK_MIN, at most CHUNK_MAX_COUNT of them.
ALWAYS_INLINE int32_t chunk_length(struct range keys) {
    int32_t length = CHUNK_MIN;
    while ((int64_t)length * 16 < keys.end - keys.first)
        length *= 2;
    return length;
}

// Floats of the state of one (query row, head): its maximum, up to 16 partial sums, and d of the weighted sum, on cache
// lines.
#define STATE_SUM 16
#define STATE_OUT 32
ALWAYS_INLINE size_t state_floats(int32_t d) { return (size_t)d + STATE_OUT; }

// Pairs that one thread holds: a block of rows for one KV head, or one row for all.
ALWAYS_INLINE size_t block_pairs(int32_t n_head) { return (size_t)ROUND_UP(MAX(n_head, BLOCK_ROWS), 16); }

// Scratch of one thread: queries, running chunk, total, scores of a tile, the tile's K (twice) and V.
ALWAYS_INLINE size_t attend_thread_floats(int32_t n_head, int32_t d) {
    size_t pairs = block_pairs(n_head);
    return pairs * ((size_t)d + 2 * state_floats(d) + TILE) + 2 * (size_t)TILE * (size_t)d;
}

// Rows that are few enough to have their chunks spread over threads.
ALWAYS_INLINE int split_chunks(int32_t n_rows, int nth) { return nth > 1 && n_rows < 2 * nth; }

ALWAYS_INLINE size_t attend_scratch(int32_t n_rows, int32_t n_head, int32_t d, int nth) {
    size_t floats = (size_t)nth * attend_thread_floats(n_head, d);
    int32_t most = MIN(n_rows, 2 * nth - 1); // rows whose chunks may be spread
    if (nth > 1)
        floats += (size_t)most * CHUNK_MAX_COUNT * (size_t)n_head * state_floats(d);
    return CLSA_SYNC + 4 * floats;
}

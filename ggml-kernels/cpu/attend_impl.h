// Attention over positions or over a selection, for the vector operations of vec_<isa>.h. See attend.h for what makes
// results independent of threads and batch.
#include "attend.h"

#include "rows_impl.h"

#define PANEL (2 * VL) // keys of a register block; K tiles are stored [TILE / PANEL][d][PANEL]

// One thread's buffers. State p: [0] maximum (base 2), [1] sum, [16..] weighted sum of V.
struct work {
    float *q;             // [pairs][d], times scale * log2(e)
    float *chunk, *total; // [pairs][state_floats]
    float *s;             // [pairs][TILE]
    float *k, *v;         // K as panels, V as [TILE][d]
};

static struct work work_of(const struct attend *a, int ith, void *scratch) {
    size_t pairs = block_pairs(a->n_head), d = (size_t)a->d, state = state_floats(a->d);
    float *at = (float *)((char *)scratch + CLSA_SYNC) + (size_t)ith * attend_thread_floats(a->n_head, a->d);
    struct work w;
    w.q = at, at += pairs * d;
    w.chunk = at, at += pairs * state;
    w.total = at, at += pairs * state;
    w.s = at, at += pairs * TILE;
    w.k = at, at += TILE * d;
    w.v = at;
    return w;
}

ALWAYS_INLINE void transpose8(const float *in, size_t in_stride, float *out, size_t out_stride) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++)
        r[i] = _mm256_loadu_ps(in + i * in_stride);
    for (int i = 0; i < 8; i += 2)
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// Converts the K and V rows of KV head g, for keys from <= s < end of the tile at `tile`.
static void load_tile(const struct attend *a, struct work w, int32_t r, int32_t g, int32_t tile, int32_t from,
                      int32_t end) {
    const int32_t d = a->d, slot = a->batch.slot[r];
    const uint32_t *selected = a->selected ? a->selected + (size_t)r * a->n_columns : NULL;
    for (int32_t s = from; s < end; s++) {
        const uint8_t *row = clsa_row(&a->k, &a->batch, slot, selected ? (int32_t)selected[s] : s);
        row_to_f32(row, a->k.type, g * d, d, w.v + (size_t)(s - tile) * d);
    }
    for (int32_t i = (from - tile) / 8 * 8; i < end - tile; i += 8)
        for (int32_t j = 0; j < d; j += 8)
            transpose8(w.v + (size_t)i * d + j, (size_t)d,
                       w.k + (size_t)(i / PANEL * PANEL) * d + j * PANEL + i % PANEL, PANEL);
    for (int32_t s = from; s < end; s++) {
        const uint8_t *row = clsa_row(&a->v, &a->batch, slot, selected ? (int32_t)selected[s] : s);
        row_to_f32(row, a->v.type, g * d, d, w.v + (size_t)(s - tile) * d);
    }
}

// s[i][0..PANEL] = q[i] . k for n rows; the sum runs over dimensions in order.
ALWAYS_INLINE void scores(const int n, const float *q, const float *k, float *s, int32_t d) {
    vf acc[QK_ROWS][2];
#pragma clang loop unroll(full)
    for (int i = 0; i < n; i++)
        acc[i][0] = acc[i][1] = vf_set1(0);
    for (int32_t j = 0; j < d; j++) {
        vf k0 = vf_load(k + (size_t)j * PANEL), k1 = vf_load(k + (size_t)j * PANEL + VL);
#pragma clang loop unroll(full)
        for (int i = 0; i < n; i++) {
            vf x = vf_set1(q[(size_t)i * d + j]);
            acc[i][0] = vf_fma(x, k0, acc[i][0]);
            acc[i][1] = vf_fma(x, k1, acc[i][1]);
        }
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < n; i++)
        vf_store(s + (size_t)i * TILE, acc[i][0]), vf_store(s + (size_t)i * TILE + VL, acc[i][1]);
}

// o[i] = o[i] * alpha[i] + sum_s p[i][s] v[s] over `m` vectors of n rows; the sum runs over keys in order.
ALWAYS_INLINE void weigh(const int n, const int m, const float *p, const float *alpha, const float *v, size_t d,
                         int32_t from, int32_t end, float *o, size_t state) {
    vf acc[PV_ROWS][4];
#pragma clang loop unroll(full)
    for (int i = 0; i < n; i++)
#pragma clang loop unroll(full)
        for (int c = 0; c < m; c++)
            acc[i][c] = vf_mul(vf_load(o + i * state + c * VL), vf_set1(alpha[i]));
    for (int32_t s = from; s < end; s++) {
        vf x[4];
#pragma clang loop unroll(full)
        for (int c = 0; c < m; c++)
            x[c] = vf_load(v + (size_t)s * d + c * VL);
#pragma clang loop unroll(full)
        for (int i = 0; i < n; i++) {
            vf w = vf_set1(p[(size_t)i * TILE + s]);
#pragma clang loop unroll(full)
            for (int c = 0; c < m; c++)
                acc[i][c] = vf_fma(w, x[c], acc[i][c]);
        }
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < n; i++)
#pragma clang loop unroll(full)
        for (int c = 0; c < m; c++)
            vf_store(o + i * state + c * VL, acc[i][c]);
}

// Calls body(n) with a constant n = 1..6 (12), so that register blocks are unrolled.
#define CASE(n, body)                                                                                                  \
    case n:                                                                                                            \
        body(n);                                                                                                       \
        break;
#define WITH_CONSTANT(n, body)                                                                                         \
    switch (n) {                                                                                                       \
        CASE(1, body)                                                                                                  \
        CASE(2, body)                                                                                                  \
        CASE(3, body)                                                                                                  \
        CASE(4, body)                                                                                                  \
        CASE(5, body)                                                                                                  \
        CASE(6, body) CASE(7, body) CASE(8, body) CASE(9, body) CASE(10, body) CASE(11, body) CASE(12, body)           \
    }

static void scores_block(int n, const float *q, const float *k, float *s, int32_t d) {
#define BODY(n)                                                                                                        \
    if (n <= QK_ROWS)                                                                                                  \
    scores(n <= QK_ROWS ? n : 1, q, k, s, d)
    WITH_CONSTANT(n, BODY)
#undef BODY
}

static void weigh_block(int n, const float *p, const float *alpha, const float *v, int32_t d, int32_t from, int32_t end,
                        float *o) {
    const size_t state = state_floats(d), width = (size_t)d;
    int32_t j = 0;
#define BODY(n)                                                                                                        \
    if (n <= PV_ROWS) {                                                                                                \
        for (; j + 4 * VL <= d; j += 4 * VL)                                                                           \
            weigh(n <= PV_ROWS ? n : 1, 4, p, alpha, v + j, width, from, end, o + j, state);                           \
        for (; j + 2 * VL <= d; j += 2 * VL)                                                                           \
            weigh(n <= PV_ROWS ? n : 1, 2, p, alpha, v + j, width, from, end, o + j, state);                           \
        for (; j < d; j += VL)                                                                                         \
            weigh(n <= PV_ROWS ? n : 1, 1, p, alpha, v + j, width, from, end, o + j, state);                           \
    }
    WITH_CONSTANT(n, BODY)
#undef BODY
}

// One tile's scores of one pair become weights: masks keys outside of [first, end), raises the running maximum, adds to
// the sum. Returns the factor for what was summed so far.
static float soften(float *s, int32_t from, int32_t to, int32_t first, int32_t end, float *state) {
    vf max = vf_set1(-INFINITY), sum = vf_set1(0);
    if (first > from || end < to)
        for (int32_t i = from; i < to; i += VL)
            vf_store(s + i, vf_keep(vf_load(s + i), first - i, end - i));
    for (int32_t i = from; i < to; i += VL)
        max = vf_max(max, vf_load(s + i));
    float highest = vf_hmax(max), before = state[0], now = MAX(highest, before);
    state[0] = now;
    vf base = vf_set1(now == -INFINITY ? 0 : now);
    for (int32_t i = from; i < to; i += VL) {
        vf p = vf_exp2(vf_sub(vf_load(s + i), base));
        vf_store(s + i, p);
        sum = vf_add(sum, p);
    }
    float alpha = 1, one[VL];
    if (now != before)
        vf_store(one, vf_exp2(vf_set1(before - now))), alpha = one[0];
    state[1] = state[1] * alpha + vf_hsum(sum);
    return alpha;
}

static void state_clear(float *state, int32_t d) {
    memset(state, 0, 4 * state_floats(d));
    state[0] = -INFINITY;
}

// total += part, in the order of chunks; part becomes empty. A pair without keys so far has maximum -inf and sum 0.
static void state_merge(float *total, float *part, int32_t d) {
    float max = MAX(total[0], part[0]), base = max == -INFINITY ? 0 : max, factor[2 * VL];
    vf_store(factor, vf_exp2(vf_set1(total[0] - base)));
    vf_store(factor + VL, vf_exp2(vf_set1(part[0] - base)));
    vf a = vf_set1(factor[0]), b = vf_set1(factor[VL]);
    total[0] = max;
    total[1] = total[1] * factor[0] + part[1] * factor[VL];
    for (int32_t j = 16; j < d + 16; j += VL)
        vf_store(total + j, vf_fma(vf_load(part + j), b, vf_mul(vf_load(total + j), a)));
    state_clear(part, d);
}

static void state_finish(const float *state, float *out, int32_t d) {
    vf sum = vf_set1(1 / state[1]);
    for (int32_t j = 0; j < d; j += VL)
        vf_store(out + j, vf_mul(vf_load(state + 16 + j), sum));
}

// A piece of work: batch rows [row, row + n_rows) of one sequence, KV heads [g, g + n_g), keys within `keys`.
// n_rows > 1 only with n_g = 1. Pair i * group + h: row + i and head h of the group; with n_g > 1: head h of all.
struct piece {
    int32_t row, n_rows, g, n_g;
    struct range keys;
};

// Walks the piece's keys; leaves each pair's merged state in w.total.
static void attend_piece(const struct attend *a, struct work w, struct piece piece) {
    const int32_t d = a->d, group = a->n_head / a->n_kv, per_row = piece.n_g * group, pairs = piece.n_rows * per_row;
    const size_t state = state_floats(d);
    const float factor = a->scale * 1.44269504f;
    for (int32_t p = 0; p < pairs; p++) {
        const float *q = a->q + ((size_t)(piece.row + p / per_row) * a->n_head + piece.g * group + p % per_row) * d;
        for (int32_t j = 0; j < d; j += VL)
            vf_store(w.q + (size_t)p * d + j, vf_mul(vf_load(q + j), vf_set1(factor)));
        state_clear(w.chunk + p * state, d);
        state_clear(w.total + p * state, d);
    }
    for (int32_t tile = piece.keys.first / TILE * TILE; tile < piece.keys.end; tile += TILE) {
        const int32_t tile_from = MAX(tile, piece.keys.first), tile_end = MIN(tile + TILE, piece.keys.end);
        if (tile % CHUNK_MIN == 0)
            for (int32_t p = 0; p < pairs; p++)
                if (w.chunk[p * state] != -INFINITY || w.chunk[p * state + 1] != 0)
                    if (tile % chunk_length(keys_of(a, piece.row + p / per_row)) == 0)
                        state_merge(w.total + p * state, w.chunk + p * state, d);
        for (int32_t g = 0; g < piece.n_g; g++) {
            load_tile(a, w, piece.row, piece.g + g, tile, tile_from, tile_end);
            const int32_t step = QK_ROWS / PV_ROWS * PV_ROWS;
            for (int32_t p0 = g * group, last = piece.n_g > 1 ? p0 + group : pairs; p0 < last; p0 += step) {
                const int32_t n = MIN(step, last - p0);
                struct range hull = {tile_end, tile_from};
                for (int32_t i = (p0 / per_row); i <= (p0 + n - 1) / per_row; i++) {
                    struct range keys = keys_of(a, piece.row + i);
                    hull.first = MIN(hull.first, MAX(keys.first, tile_from));
                    hull.end = MAX(hull.end, MIN(keys.end, tile_end));
                }
                if (hull.first >= hull.end)
                    continue;
                const int32_t from = (hull.first - tile) / VL * VL, to = ROUND_UP(hull.end - tile, VL);
                for (int32_t i = from / PANEL * PANEL; i < to; i += PANEL)
                    scores_block(n, w.q + (size_t)p0 * d, w.k + (size_t)i * d, w.s + (size_t)p0 * TILE + i, d);
                float alpha[QK_ROWS];
                for (int32_t i = 0; i < n; i++) {
                    struct range keys = keys_of(a, piece.row + (p0 + i) / per_row);
                    alpha[i] = soften(w.s + (size_t)(p0 + i) * TILE, from, to, MAX(keys.first, tile_from) - tile,
                                      MIN(keys.end, tile_end) - tile, w.chunk + (p0 + i) * state);
                }
                for (int32_t i = 0; i < n; i += PV_ROWS)
                    weigh_block(MIN(PV_ROWS, n - i), w.s + (size_t)(p0 + i) * TILE, alpha + i, w.v, d,
                                hull.first - tile, hull.end - tile, w.chunk + (p0 + i) * state + 16);
            }
        }
    }
    for (int32_t p = 0; p < pairs; p++)
        state_merge(w.total + p * state, w.chunk + p * state, d);
}

// Rows in blocks that share tiles: a block holds consecutive rows of one sequence, a piece is a block and a KV head.
static void attend_blocks(const struct attend *a, struct work w, struct team *team, int nth) {
    const int32_t group = a->n_head / a->n_kv, n_rows = a->batch.n_rows;
    const int32_t fair = (int32_t)(((int64_t)n_rows * a->n_kv + 4 * nth - 1) / (4 * nth));
    const int32_t most = a->selected ? 1 : MAX(1, MIN(BLOCK_ROWS / group, fair));
    const uint32_t n_kv = (uint32_t)a->n_kv;
    int32_t row = 0;
    uint32_t block = 0, claimed;
    while ((claimed = team_claim(team)) / n_kv < (uint32_t)n_rows) {
        int32_t n = 0;
        for (;; row += n, block++) { // the block with that number, if there is one
            for (n = 0; row + n < n_rows && n < most && a->batch.slot[row + n] == a->batch.slot[row] &&
                        (n == 0 || a->batch.pos[row + n] > a->batch.pos[row + n - 1]);)
                n++;
            if (n == 0 || block == claimed / n_kv)
                break;
        }
        if (n == 0)
            break;
        struct piece piece = {
            row, n, (int32_t)(claimed % n_kv), 1, {keys_of(a, row).first, keys_of(a, row + n - 1).end}};
        attend_piece(a, w, piece);
        for (int32_t p = 0; p < n * group; p++) {
            size_t at = (size_t)(row + p / group) * a->n_head + piece.g * group + p % group;
            state_finish(w.total + p * state_floats(a->d), a->out + at * a->d, a->d);
        }
    }
}

// Few rows: a piece is a chunk of a row, for all KV heads or, to have work for all threads, for one. The last to arrive
// merges.
static void attend_chunks(const struct attend *a, struct work w, struct team *team, int nth, void *scratch) {
    const int32_t group = a->n_head / a->n_kv, n_rows = a->batch.n_rows;
    const size_t state = state_floats(a->d);
    float *parts = (float *)((char *)scratch + CLSA_SYNC) + (size_t)nth * attend_thread_floats(a->n_head, a->d);
    uint32_t total = 0, before = 0, claimed;
    for (int32_t r = 0; r < n_rows; r++) {
        struct range keys = keys_of(a, r);
        total += (uint32_t)((keys.end - 1) / chunk_length(keys) - keys.first / chunk_length(keys) + 1);
    }
    const int32_t n_parts = total >= 2 * (uint32_t)nth ? 1 : a->n_kv, n_g = a->n_kv / n_parts;
    int32_t r = 0;
    while ((claimed = team_claim(team)) < total * (uint32_t)n_parts) {
        struct range keys;
        int32_t length, first, n;
        for (;; r++, before += (uint32_t)(n * n_parts)) {
            keys = keys_of(a, r), length = chunk_length(keys), first = keys.first / length;
            n = (keys.end - 1) / length - first + 1;
            if (claimed < before + (uint32_t)(n * n_parts))
                break;
        }
        int32_t chunk = (int32_t)(claimed - before) / n_parts, part = (int32_t)(claimed - before) % n_parts;
        float *row_parts = parts + (size_t)r * CHUNK_MAX_COUNT * a->n_head * state;
        struct piece piece = {r,
                              1,
                              part * n_g,
                              n_g,
                              {MAX(keys.first, (first + chunk) * length), MIN(keys.end, (first + chunk + 1) * length)}};
        attend_piece(a, w, piece);
        memcpy(row_parts + ((size_t)chunk * a->n_head + part * n_g * group) * state, w.total,
               4 * (size_t)(n_g * group) * state);
        if (!team_arrive(team, (uint32_t)r, (uint32_t)(n * n_parts)))
            continue;
        for (int32_t h = 0; h < a->n_head; h++) {
            for (int32_t c = 1; c < n; c++)
                state_merge(row_parts + (size_t)h * state, row_parts + ((size_t)c * a->n_head + h) * state, a->d);
            state_finish(row_parts + (size_t)h * state, a->out + ((size_t)r * a->n_head + h) * a->d, a->d);
        }
    }
}

static void attend(const struct attend *a, int ith, int nth, void *scratch) {
    struct team *team = scratch;
    struct work w = work_of(a, ith, scratch);
    if (split_chunks(a->batch.n_rows, nth))
        attend_chunks(a, w, team, nth, scratch);
    else
        attend_blocks(a, w, team, nth);
    team_leave(team, nth);
}

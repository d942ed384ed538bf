// Attention over positions or over a selection, for the vector operations of vec_<isa>.h. See attend.h for what makes
// results independent of threads and batch.
#include "attend.h"

#include "rows_impl.h"

#define PANEL (2 * VL) // keys of a register block; K tiles are stored [TILE / PANEL][d][PANEL]

// One thread's buffers. The maximum of a state is that of the scores times log2(e).
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

// The tile's rows: those of keys outside of what the piece needs repeat a neighbour.
struct tile {
    const uint8_t *k[TILE], *v[TILE];
};

// Rows of keys tile + first .. tile + stop, of positions in order or of a selection.
static void find_cache_rows(const struct clsa_rows *cache, const struct clsa_batch *batch, int32_t slot,
                            const uint32_t *selected, int32_t tile, int32_t first, int32_t stop, const uint8_t **rows) {
    const int32_t length = cache->ring > 0 ? cache->ring : CLSA_PAGE; // rows that lie side by side
    for (int32_t i = first; i < stop;) {
        const int32_t pos = selected ? (int32_t)selected[tile + i] : tile + i;
        const int32_t n = selected ? 1 : MIN(length - pos % length, stop - i);
        const uint8_t *row = clsa_row(cache, batch, slot, pos);
        for (const int32_t end = i + n; i < end; row += cache->row_stride)
            rows[i++] = row;
    }
    for (int32_t i = 0; i < first; i++)
        rows[i] = rows[first];
    for (int32_t i = stop; i < TILE; i++)
        rows[i] = rows[stop - 1];
}

// The tile of keys tile .. tile + TILE, of which those from .. end are needed (at least one).
static void find_rows(const struct attend *a, int32_t r, int32_t tile, int32_t from, int32_t end, struct tile *rows) {
    const int32_t slot = a->batch.slot[r], first = MAX(from - tile, 0), stop = MIN(end - tile, TILE);
    const uint32_t *selected = a->selected ? a->selected + (size_t)r * a->n_columns : NULL;
    find_cache_rows(&a->k, &a->batch, slot, selected, tile, first, stop, rows->k);
    find_cache_rows(&a->v, &a->batch, slot, selected, tile, first, stop, rows->v);
}

// Asks for `bytes` bytes of a row, ahead of their use. Requests are spread over the work on the tile before: a burst of
// them would wait for each other.
ALWAYS_INLINE void prefetch(const uint8_t *row, size_t bytes) {
    for (size_t b = 0; b < bytes; b += 64)
        _mm_prefetch((const char *)row + b, _MM_HINT_T1);
}

// 8 x 8 values: out[j][i] = r[i][j].
ALWAYS_INLINE void transpose8(__m256 r[8], float *out, size_t stride) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 2)
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// Columns j..j+16 of 8 rows of f16, transposed before they are widened.
ALWAYS_INLINE void transpose8_f16(const uint8_t *const *rows, size_t at, float *out, size_t stride) {
    __m256i r[8], t[8];
    for (int i = 0; i < 8; i++)
        r[i] = _mm256_loadu_si256((const __m256i *)(rows[i] + at));
    for (int i = 0; i < 4; i++)
        t[2 * i] = _mm256_unpacklo_epi16(r[i], r[i + 4]), t[2 * i + 1] = _mm256_unpackhi_epi16(r[i], r[i + 4]);
    // t[2i]: columns 0..4 of rows i, i + 4; t[2i + 1]: columns 4..8. The upper lanes hold columns 8..16 likewise.
    for (int i = 0; i < 2; i++)
        for (int h = 0; h < 2; h++) {
            r[4 * h + 2 * i] = _mm256_unpacklo_epi16(t[2 * i + h], t[2 * i + 4 + h]);
            r[4 * h + 2 * i + 1] = _mm256_unpackhi_epi16(t[2 * i + h], t[2 * i + 4 + h]);
        }
    // r[4h + 2i + l]: columns 4h + 2l, + 1 of rows i, i + 2, i + 4, i + 6.
    for (int h = 0; h < 2; h++)
        for (int l = 0; l < 2; l++) {
            t[4 * h + 2 * l] = _mm256_unpacklo_epi16(r[4 * h + l], r[4 * h + 2 + l]);
            t[4 * h + 2 * l + 1] = _mm256_unpackhi_epi16(r[4 * h + l], r[4 * h + 2 + l]);
        }
    for (int j = 0; j < 8; j++) {
        _mm256_storeu_ps(out + j * stride, _mm256_cvtph_ps(_mm256_castsi256_si128(t[j])));
        _mm256_storeu_ps(out + (j + 8) * stride, _mm256_cvtph_ps(_mm256_extracti128_si256(t[j], 1)));
    }
}

// Columns j..j+16 of 8 rows of Q8_0.
ALWAYS_INLINE void transpose8_q8(const uint8_t *const *rows, size_t block, size_t in_block, float *out, size_t stride) {
    const size_t at = block * (CLSA_QK8_0 + 2);
    __m128i r[8], t[8];
    uint16_t scale[8];
    for (int i = 0; i < 8; i++) {
        r[i] = _mm_loadu_si128((const __m128i *)(rows[i] + at + 2 + in_block));
        memcpy(&scale[i], rows[i] + at, 2);
    }
    const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scale));
    for (int i = 0; i < 4; i++)
        t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 4]), t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 4]);
    for (int i = 0; i < 2; i++)
        for (int h = 0; h < 2; h++) {
            r[4 * h + 2 * i] = _mm_unpacklo_epi8(t[2 * i + h], t[2 * i + 4 + h]);
            r[4 * h + 2 * i + 1] = _mm_unpackhi_epi8(t[2 * i + h], t[2 * i + 4 + h]);
        }
    for (int h = 0; h < 2; h++)
        for (int l = 0; l < 2; l++) {
            t[4 * h + 2 * l] = _mm_unpacklo_epi8(r[4 * h + l], r[4 * h + 2 + l]);
            t[4 * h + 2 * l + 1] = _mm_unpackhi_epi8(r[4 * h + l], r[4 * h + 2 + l]);
        }
    for (int j = 0; j < 8; j++) {
        __m256i low = _mm256_cvtepi8_epi32(t[j]), high = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(t[j], t[j]));
        _mm256_storeu_ps(out + (2 * j) * stride, _mm256_mul_ps(scales, _mm256_cvtepi32_ps(low)));
        _mm256_storeu_ps(out + (2 * j + 1) * stride, _mm256_mul_ps(scales, _mm256_cvtepi32_ps(high)));
    }
}

// K of KV head g for the tile's keys from <= i < end, as panels: d x PANEL values each. Prefetches the next tile's, if
// there is one.
static void load_k(const struct attend *a, const struct tile *rows, const struct tile *next, int32_t g, int32_t from,
                   int32_t end, float *k) {
    const size_t d = (size_t)a->d, first = (size_t)g * d, bytes = clsa_type_bytes(a->k.type, d), at = (size_t)g * bytes;
    for (int32_t i = from / 8 * 8; i < end; i += 8) {
        const uint8_t *const *row = rows->k + i;
        for (int l = 0; l < 8; l++) {
            if (next)
                prefetch(next->k[i + l] + at, bytes);
            if (i + 8 < TILE)
                for (size_t b = 0; b < bytes; b += 64)
                    _mm_prefetch((const char *)row[8 + l] + at + b, _MM_HINT_T0);
        }
        float *out = k + (size_t)(i / PANEL) * PANEL * d + i % PANEL;
        if (a->k.type == CLSA_F16)
            for (size_t j = 0; j < d; j += 16)
                transpose8_f16(row, 2 * (first + j), out + j * PANEL, PANEL);
        if (a->k.type == CLSA_Q8_0)
            for (size_t j = 0; j < d; j += 16)
                transpose8_q8(row, (first + j) / CLSA_QK8_0, (first + j) % CLSA_QK8_0, out + j * PANEL, PANEL);
        if (a->k.type == CLSA_F32)
            for (size_t j = 0; j < d; j += 8) {
                __m256 r[8];
                for (int l = 0; l < 8; l++)
                    r[l] = _mm256_loadu_ps((const float *)row[l] + first + j);
                transpose8(r, out + j * PANEL, PANEL);
            }
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

// o[i] = o[i] * alpha[i] (nothing while that is 0) + sum_s p[i][s] v[s] over `m` vectors of n rows, from value j of the
// rows v[s] of the (constant) type on; the sum runs over keys in order. Prefetches the rows next[s] likewise, unless it
// is NULL.
ALWAYS_INLINE void weigh(const int n, const int m, const float *p, const float *alpha, const uint8_t *const *v,
                         const uint8_t *const *next, const int32_t type, int32_t j, int32_t from, int32_t end, float *o,
                         size_t state) {
    vf acc[PV_ROWS][PV_VECTORS];
#pragma clang loop unroll(full)
    for (int i = 0; i < n; i++)
#pragma clang loop unroll(full)
        for (int c = 0; c < m; c++)
            acc[i][c] = alpha[i] == 0 ? vf_set1(0) : vf_mul(vf_load(o + i * state + c * VL), vf_set1(alpha[i]));
    for (int32_t s = from; s < end; s++) {
        vf x[PV_VECTORS];
#pragma clang loop unroll(full)
        for (int c = 0; c < m; c++)
            x[c] = row_load(v[s], type, j + c * VL);
        if (next)
            prefetch(next[s] + clsa_type_bytes(type, (size_t)j), clsa_type_bytes(type, (size_t)(m * VL)));
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

static void scores_block(int n, const float *q, const float *k, float *s, int32_t d){
#define BODY(n)                                                                                                        \
    if (n <= QK_ROWS)                                                                                                  \
    scores(n <= QK_ROWS ? n : 1, q, k, s, d)
    WITH_CONSTANT(n, BODY)
#undef BODY
}

// All d values of n rows; `first` is where the KV head's values begin in the rows.
ALWAYS_INLINE void weigh_rows(const int n, const float *p, const float *alpha, const uint8_t *const *v,
                              const uint8_t *const *next, const int32_t type, int32_t first, int32_t d, int32_t from,
                              int32_t end, float *o) {
    const size_t state = state_floats(d);
    int32_t j = 0;
    for (; j + PV_VECTORS * VL <= d; j += PV_VECTORS * VL)
        weigh(n, PV_VECTORS, p, alpha, v, next, type, first + j, from, end, o + j, state);
    for (; j + PV_VECTORS / 2 * VL <= d; j += PV_VECTORS / 2 * VL)
        weigh(n, PV_VECTORS / 2, p, alpha, v, next, type, first + j, from, end, o + j, state);
    for (; j < d; j += VL)
        weigh(n, 1, p, alpha, v, next, type, first + j, from, end, o + j, state);
}

static void weigh_block(int n, const float *p, const float *alpha, const uint8_t *const *v, const uint8_t *const *next,
                        int32_t type, int32_t first, int32_t d, int32_t from, int32_t end, float *o) {
#define BODY(n)                                                                                                        \
    if (n <= PV_ROWS) {                                                                                                \
        if (type == CLSA_F32)                                                                                          \
            weigh_rows(n <= PV_ROWS ? n : 1, p, alpha, v, next, CLSA_F32, first, d, from, end, o);                     \
        else if (type == CLSA_F16)                                                                                     \
            weigh_rows(n <= PV_ROWS ? n : 1, p, alpha, v, next, CLSA_F16, first, d, from, end, o);                     \
        else                                                                                                           \
            weigh_rows(n <= PV_ROWS ? n : 1, p, alpha, v, next, CLSA_Q8_0, first, d, from, end, o);                    \
    }
    WITH_CONSTANT(n, BODY)
#undef BODY
}

// Whether no value of the rows v[from] .. v[end] is NaN or infinite: those times 0 are NaN.
static int all_finite(const uint8_t *const *v, int32_t type, int32_t first, int32_t d, int32_t from, int32_t end) {
    vf sum = vf_set1(0);
#define BODY(type)                                                                                                     \
    for (int32_t s = from; s < end; s++)                                                                               \
        for (int32_t j = 0; j < d; j += VL)                                                                            \
    sum = vf_fma(row_load(v[s], type, first + j), vf_set1(0), sum)
    WITH_TYPE(type, BODY)
#undef BODY
    return vf_hsum(sum) == 0;
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
    vf alpha = vf_set1(1);
    if (now != before)
        alpha = vf_exp2(vf_set1(before - now));
    vf_store(state + STATE_SUM, vf_fma(vf_load(state + STATE_SUM), alpha, sum));
    return vf_first(alpha);
}

// Without keys: the weighted sum is not read while the maximum is -inf.
ALWAYS_INLINE void state_clear(float *state) {
    state[0] = -INFINITY;
    vf_store(state + STATE_SUM, vf_set1(0));
}

// total += part, in the order of chunks; part becomes empty.
static void state_merge(float *total, float *part, int32_t d) {
    if (part[0] == -INFINITY)
        return;
    if (total[0] == -INFINITY) {
        memcpy(total, part, 4 * state_floats(d));
        return state_clear(part);
    }
    float max = MAX(total[0], part[0]);
    vf a = vf_exp2(vf_set1(total[0] - max)), b = vf_exp2(vf_set1(part[0] - max));
    total[0] = max;
    for (int32_t j = STATE_SUM; j < d + STATE_OUT; j += VL)
        vf_store(total + j, vf_fma(vf_load(part + j), b, vf_mul(vf_load(total + j), a)));
    state_clear(part);
}

// NaN where every score was -inf, as 0/0 is.
static void state_finish(const float *state, float *out, int32_t d) {
    vf factor = vf_set1(state[0] == -INFINITY ? NAN : 1 / vf_hsum(vf_load(state + STATE_SUM)));
    for (int32_t j = 0; j < d; j += VL)
        vf_store(out + j, vf_mul(vf_load(state + STATE_OUT + j), factor));
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
    const size_t state = state_floats(d), v_bytes = clsa_type_bytes(a->v.type, (size_t)d);
    const float factor = a->scale * 1.44269504f;
    // Values are converted once for many pairs, on the fly for few.
    const int direct = a->v.type == CLSA_F32 || (piece.n_g > 1 ? group : pairs) <= 2 * PV_ROWS;
    for (int32_t p = 0; p < pairs; p++) {
        const float *q = a->q + ((size_t)(piece.row + p / per_row) * a->n_head + piece.g * group + p % per_row) * d;
        for (int32_t j = 0; j < d; j += VL)
            vf_store(w.q + (size_t)p * d + j, vf_mul(vf_load(q + j), vf_set1(factor)));
        state_clear(w.chunk + p * state);
        state_clear(w.total + p * state);
    }
    struct tile tiles[2], *now = &tiles[0], *next = &tiles[1];
    const uint8_t *converted[TILE];
    for (int i = 0; i < TILE; i++)
        converted[i] = (const uint8_t *)(w.v + (size_t)i * d);
    int32_t tile = piece.keys.first / TILE * TILE;
    if (tile < piece.keys.end)
        find_rows(a, piece.row, tile, piece.keys.first, MIN(tile + TILE, piece.keys.end), now);
    for (; tile < piece.keys.end; tile += TILE) {
        const int32_t tile_from = MAX(tile, piece.keys.first), tile_end = MIN(tile + TILE, piece.keys.end);
        const int32_t ahead = MIN(TILE, piece.keys.end - tile - TILE); // keys of the next tile
        if (ahead > 0)
            find_rows(a, piece.row, tile + TILE, tile + TILE, tile + TILE + ahead, next);
        const struct tile *coming = ahead > 0 ? next : NULL;
        if (tile % CHUNK_MIN == 0)
            for (int32_t p = 0; p < pairs; p++)
                if (tile % chunk_length(keys_of(a, piece.row + p / per_row)) == 0)
                    state_merge(w.total + p * state, w.chunk + p * state, d);
        for (int32_t g = 0; g < piece.n_g; g++) {
            const int32_t p_first = g * group, p_end = piece.n_g > 1 ? p_first + group : pairs;
            int finite = -1;                             // not yet looked at
            const int once = p_end - p_first <= QK_ROWS; // a panel is used once: while it is in the first cache
            if (!once)
                load_k(a, now, coming, piece.g + g, tile_from - tile, tile_end - tile, w.k);
            if (!direct)
                for (int32_t i = tile_from - tile; i < tile_end - tile; i++) {
                    if (coming)
                        prefetch(coming->v[i] + (size_t)(piece.g + g) * v_bytes, v_bytes);
                    row_to_f32(now->v[i], a->v.type, (piece.g + g) * d, d, w.v + (size_t)i * d);
                }
            for (int32_t p0 = p_first; p0 < p_end; p0 += QK_ROWS) {
                const int32_t n = MIN(QK_ROWS, p_end - p0);
                struct range hull = {tile_end, tile_from};
                for (int32_t i = p0 / per_row; i <= (p0 + n - 1) / per_row; i++) {
                    struct range keys = keys_of(a, piece.row + i);
                    hull.first = MIN(hull.first, MAX(keys.first, tile_from));
                    hull.end = MAX(hull.end, MIN(keys.end, tile_end));
                }
                if (hull.first >= hull.end)
                    continue;
                const int32_t from = (hull.first - tile) / VL * VL, to = ROUND_UP(hull.end - tile, VL);
                for (int32_t i = from / PANEL * PANEL; i < to; i += PANEL) {
                    if (once)
                        load_k(a, now, coming, piece.g + g, MAX(i, from), MIN(i + PANEL, to), w.k);
                    scores_block(n, w.q + (size_t)p0 * d, w.k + (size_t)i * d, w.s + (size_t)p0 * TILE + i, d);
                }
                const uint8_t *const *v = direct ? now->v : converted;
                const int32_t type = direct ? a->v.type : CLSA_F32, first = direct ? (piece.g + g) * d : 0;
                float alpha[QK_ROWS];
                int apart = 0; // keys of some rows only, and a weight of 0 would not hide their values from the others
                for (int32_t i = 0; i < n; i++) {
                    struct range keys = keys_of(a, piece.row + (p0 + i) / per_row);
                    if (keys.first > hull.first || keys.end < hull.end) {
                        if (finite < 0)
                            finite = all_finite(v, type, first, d, tile_from - tile, tile_end - tile);
                        apart = !finite;
                    }
                    alpha[i] = soften(w.s + (size_t)(p0 + i) * TILE, from, to, MAX(keys.first, tile_from) - tile,
                                      MIN(keys.end, tile_end) - tile, w.chunk + (p0 + i) * state);
                }
                for (int32_t i = 0; i < n; i += apart ? 1 : PV_ROWS) {
                    struct range keys = hull;
                    if (apart) {
                        keys = keys_of(a, piece.row + (p0 + i) / per_row);
                        keys.first = MAX(keys.first, tile_from), keys.end = MIN(keys.end, tile_end);
                    }
                    weigh_block(apart ? 1 : MIN(PV_ROWS, n - i), w.s + (size_t)(p0 + i) * TILE, alpha + i, v,
                                direct && i == 0 && coming ? coming->v : NULL, type, first, d, keys.first - tile,
                                keys.end - tile, w.chunk + (p0 + i) * state + STATE_OUT);
                }
            }
        }
        struct tile *swap = now;
        now = next, next = swap;
    }
    for (int32_t p = 0; p < pairs; p++)
        state_merge(w.total + p * state, w.chunk + p * state, d);
}

typedef void piece_fn(const struct attend *a, struct work w, struct piece piece);

// Rows in blocks that share tiles: a block holds consecutive rows of one sequence, a piece is a block and a KV head
// (always, if `one_head`). `walk` does a piece.
static void attend_blocks(const struct attend *a, struct work w, struct team *team, int nth, piece_fn *walk,
                          int one_head) {
    const int32_t group = a->n_head / a->n_kv, n_rows = a->batch.n_rows;
    const int32_t fair = (int32_t)(((int64_t)n_rows * a->n_kv + 4 * nth - 1) / (4 * nth));
    const int32_t most = a->selected ? 1 : MAX(1, MIN(BLOCK_ROWS / group, fair));
    // A row that shares with none takes all its KV heads, so that whole cache rows are read.
    const int32_t n_g = most == 1 && !one_head ? a->n_kv : 1;
    const uint32_t parts = (uint32_t)(a->n_kv / n_g);
    int32_t row = 0;
    uint32_t block = 0, claimed;
    while ((claimed = team_claim(team)) / parts < (uint32_t)n_rows) {
        int32_t n = 0;
        for (;; row += n, block++) { // the block with that number, if there is one
            for (n = 0; row + n < n_rows && n < most && a->batch.slot[row + n] == a->batch.slot[row] &&
                        (n == 0 || a->batch.pos[row + n] > a->batch.pos[row + n - 1]);)
                n++;
            if (n == 0 || block == claimed / parts)
                break;
        }
        if (n == 0)
            break;
        struct piece piece = {
            row, n, (int32_t)(claimed % parts), n_g, {keys_of(a, row).first, keys_of(a, row + n - 1).end}};
        walk(a, w, piece);
        for (int32_t p = 0; p < n * n_g * group; p++) {
            size_t at = (size_t)(row + p / (n_g * group)) * a->n_head + piece.g * group + p % (n_g * group);
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
        attend_blocks(a, w, team, nth, attend_piece, 0);
    team_leave(team, nth);
}

// matmul.h with AVX-512 and VNNI.
//
// One row: the unpackers feed the dot products directly, so that each weight byte is read once and written nowhere.
// More rows: 16 outputs at a time are unpacked into a panel that stays in the L2 cache, and tiles of TILE rows are
// multiplied with it. Lane o of every vector is output o, so both ways do the same operations in the same order.
#include "matmul_unpack_avx512.h"

#define W 16
#define FLOAT_OUTS 4
#define FLOAT_ROWS 6
typedef __m512 V;
ALWAYS_INLINE V v_zero(void) { return _mm512_setzero_ps(); }
ALWAYS_INLINE V v_set1(float f) { return _mm512_set1_ps(f); }
ALWAYS_INLINE V v_load(const float *p) { return _mm512_loadu_ps(p); }
ALWAYS_INLINE void v_store(float *p, V v) { _mm512_storeu_ps(p, v); }
ALWAYS_INLINE V v_add(V a, V b) { return _mm512_add_ps(a, b); }
ALWAYS_INLINE V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
ALWAYS_INLINE V v_div(V a, V b) { return _mm512_div_ps(a, b); }
ALWAYS_INLINE V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE float v_sum(V v) {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
ALWAYS_INLINE V v_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
ALWAYS_INLINE V v_bf16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
// exp: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
ALWAYS_INLINE V v_exp(V x) {
    x = _mm512_min_ps(_mm512_set1_ps(128), _mm512_max_ps(_mm512_set1_ps(-128), x));
    const V n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), 8);
    V r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e400p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    V p = _mm512_set1_ps(0x1.6a2432p-10f);
    p = v_fma(p, r, v_set1(0x1.1239e2p-7f));
    p = v_fma(p, r, v_set1(0x1.5558f2p-5f));
    p = v_fma(p, r, v_set1(0x1.555492p-3f));
    p = v_fma(p, r, v_set1(0x1.fffffcp-2f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_set1(1.0f)));
    return _mm512_scalef_ps(p, n);
}
#include "matmul_vector.h"

// ---- Packing

// Form Q8 of row `row`.
static void pack_q8(const struct clsa_pack *p, const float *x, float inv, int row) {
    const struct q8_tile t = q8_tile_at(p->packed, p->n_rows, p->n_in, row);
    const int h = t.h, r = row % tile_rows(p->n_rows);
    for (int b = 0; b < p->n_in / 32; b++) {
        V v[2] = {v_load(x + 32 * b), v_load(x + 32 * b + 16)};
        if (p->norm)
            for (int i = 0; i < 2; i++)
                v[i] = v_mul(v_mul(v[i], v_set1(inv)), v_load(p->norm + 32 * b + 16 * i));
        // The integer order of absolute values is theirs, with NaN above all.
        const __m512i abs0 = _mm512_castps_si512(_mm512_abs_ps(v[0])), abs1 = _mm512_castps_si512(_mm512_abs_ps(v[1]));
        const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(abs0, abs1));
        float max, s;
        memcpy(&max, &bits, 4);
        s = max * (1.0f / 127);
        const int finite = bits < 0x7f800000;
        const V id = v_set1(finite && s > 0 ? 127.0f / max : 0);
        const __m128i q0 = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v_mul(v[0], id)));
        const __m128i q1 = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v_mul(v[1], id)));
        const __m256i q = _mm256_inserti128_si256(_mm256_castsi128_si256(q0), q1, 1);
        int32_t words[8], sums[8];
        _mm256_storeu_si256((__m256i *)words, q);
        _mm256_storeu_si256((__m256i *)sums, _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q));
        const int32_t lo = sums[0] + sums[1] + sums[2] + sums[3], hi = sums[4] + sums[5] + sums[6] + sums[7];
        for (int k = 0; k < 8; k++)
            memcpy(t.q + (((size_t)b * 8 + k) * h + r) * 4, &words[k], 4);
        if (!finite)
            s = NAN;
        t.s[b * h + r] = s;
        t.f[b * h + r] = s * (float)(lo + hi);
        t.i32[b * h + r] = -128 * (lo + hi);
        t.i16[(2 * b + 0) * h + r] = -32 * lo;
        t.i16[(2 * b + 1) * h + r] = -32 * hi;
    }
}

static void pack_rows(const struct clsa_pack *p, int from, int to) {
    for (int row = from; row < to; row++) {
        const float *x = p->x + (size_t)row * p->x_stride;
        const float inv = p->norm ? inverse_rms(x, p->n_in, p->eps) : 1;
        if (p->forms & CLSA_FORM_Q8)
            pack_q8(p, x, inv, row);
        if (p->forms & CLSA_FORM_F32)
            pack_f32(p, x, inv, f32_rows(p->packed, p->n_rows, p->n_in, p->forms) + row * F32_STRIDE(p->n_in));
    }
}

int32_t clsa_matmul_form_avx512vnni(int32_t type) { return mm_is_float(type) ? CLSA_FORM_F32 : CLSA_FORM_Q8; }

void clsa_pack_avx512vnni(const struct clsa_pack *p, int ith, int nth, void *scratch) {
    (void)scratch;
    pack_rows(p, (int)((int64_t)p->n_rows * ith / nth), (int)((int64_t)p->n_rows * (ith + 1) / nth));
}

// ---- A panel times a tile of h rows -> acc [h][16]

ALWAYS_INLINE void tile(const uint8_t *panel, const struct q8_tile *x, int nb, float *out, enum mm_kind kind, int h) {
    const int halves = kind == S16 || kind == M16 ? 2 : 1, deep = 8 / halves;
    const size_t record = panel_block(kind);
    __m512 acc[TILE];
#pragma clang loop unroll(full)
    for (int r = 0; r < h; r++)
        acc[r] = _mm512_setzero_ps();
    for (int b = 0; b < nb; b++) {
        const __m512i *w = (const __m512i *)(panel + (size_t)b * record);
        const float *scales = (const float *)(w + 8);
        const int8_t *q = x->q + (size_t)b * 32 * h;
        const float *xs = x->s + (size_t)b * h;
        const int32_t *i16 = x->i16 + (size_t)2 * b * h;
        __m512i dot[TILE];
        __m512 part[TILE];
#pragma clang loop unroll(full)
        for (int half = 0; half < halves; half++) {
#pragma clang loop unroll(full)
            for (int r = 0; r < h; r++)
                dot[r] = kind == S32   ? _mm512_set1_epi32(x->i32[(size_t)b * h + r])
                         : kind == S16 ? _mm512_set1_epi32(i16[half * h + r])
                                       : _mm512_setzero_si512();
#pragma clang loop unroll(full)
            for (int k = half * deep; k < (half + 1) * deep; k++) {
                const __m512i v = _mm512_load_si512(w + k);
#pragma clang loop unroll(full)
                for (int r = 0; r < h; r++) {
                    int32_t xk;
                    memcpy(&xk, q + (k * h + r) * 4, 4);
                    dot[r] = _mm512_dpbusd_epi32(dot[r], v, _mm512_set1_epi32(xk));
                }
            }
            if (halves == 2) {
                const __m512 s = _mm512_load_ps(scales + 16 * half);
                const __m512 m32 = kind == M16 ? _mm512_load_ps(scales + 16 * (2 + half)) : _mm512_setzero_ps();
#pragma clang loop unroll(full)
                for (int r = 0; r < h; r++) {
                    part[r] = half ? half_next(part[r], dot[r], s) : half_first(dot[r], s);
                    if (kind == M16)
                        part[r] = half_min(part[r], m32, i16[half * h + r]);
                    if (half)
                        acc[r] = fold_halves(acc[r], part[r], xs[r]);
                }
            }
        }
        if (halves == 1) {
            const __m512 s = _mm512_load_ps(scales), m = kind == M32 ? _mm512_load_ps(scales + 16) : s;
#pragma clang loop unroll(full)
            for (int r = 0; r < h; r++) {
                acc[r] = fold32(acc[r], dot[r], s, xs[r]);
                if (kind == M32)
                    acc[r] = fold_min(acc[r], m, x->f[(size_t)b * h + r]);
            }
        }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < h; r++)
        _mm512_storeu_ps(out + 16 * r, acc[r]);
}

typedef void tile_fn(const uint8_t *panel, const struct q8_tile *x, int nb, float *out);
#define MM_TILE(kind, h)                                                                                               \
    static void tile_##kind##_##h(const uint8_t *panel, const struct q8_tile *x, int nb, float *out) {                 \
        tile(panel, x, nb, out, kind, h);                                                                              \
    }
#define MM_TILES(kind)                                                                                                 \
    MM_TILE(kind, 1)                                                                                                   \
    MM_TILE(kind, 2)                                                                                                   \
    MM_TILE(kind, 3)                                                                                                   \
    MM_TILE(kind, 4)                                                                                                   \
    MM_TILE(kind, 5)                                                                                                   \
    MM_TILE(kind, 6)                                                                                                   \
    MM_TILE(kind, 7)                                                                                                   \
    MM_TILE(kind, 8)                                                                                                   \
    MM_TILE(kind, 9)                                                                                                   \
    MM_TILE(kind, 10)                                                                                                  \
    MM_TILE(kind, 11)                                                                                                  \
    MM_TILE(kind, 12)
MM_TILES(S32)
MM_TILES(M32)
MM_TILES(S16)
MM_TILES(M16)
#define MM_ROW(kind)                                                                                                   \
    {tile_##kind##_1, tile_##kind##_2, tile_##kind##_3, tile_##kind##_4,  tile_##kind##_5,  tile_##kind##_6,           \
     tile_##kind##_7, tile_##kind##_8, tile_##kind##_9, tile_##kind##_10, tile_##kind##_11, tile_##kind##_12},
static tile_fn *const tiles[4][TILE] = {MM_ROW(S32) MM_ROW(M32) MM_ROW(S16) MM_ROW(M16)};

// ---- Per type and layout: unpacking into a panel, and the products with 1 .. SINK_ROWS rows

#define MM_QUANTIZED(X)                                                                                                \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS)

typedef void unpack_fn(struct src w, int nb, struct sink *to);
#define MM_UNPACK(name, rows, packed)                                                                                  \
    static void name##_##rows##_##packed(struct src w, int nb, struct sink *to) {                                      \
        struct sink local = *to;                                                                                       \
        for (int r = 0; r < rows; r++)                                                                                 \
            local.acc[r] = _mm512_setzero_ps();                                                                        \
        unpack_##name(w, nb, &local, rows, packed);                                                                    \
        for (int r = 0; r < rows; r++)                                                                                 \
            to->acc[r] = local.acc[r];                                                                                 \
    }
#define MM_UNPACKERS(name)                                                                                             \
    MM_UNPACK(name, 0, 0)                                                                                              \
    MM_UNPACK(name, 1, 0)                                                                                              \
    MM_UNPACK(name, 2, 0)                                                                                              \
    MM_UNPACK(name, 3, 0)                                                                                              \
    MM_UNPACK(name, 4, 0)                                                                                              \
    MM_UNPACK(name, 0, 1)                                                                                              \
    MM_UNPACK(name, 1, 1)                                                                                              \
    MM_UNPACK(name, 2, 1)                                                                                              \
    MM_UNPACK(name, 3, 1)                                                                                              \
    MM_UNPACK(name, 4, 1)
MM_QUANTIZED(MM_UNPACKERS)

static unpack_fn *unpacker(int type, int packed, int rows) {
    switch (type) {
#define MM_CASE(name)                                                                                                  \
    case T_##name: {                                                                                                   \
        static unpack_fn *const table[2][SINK_ROWS + 1] = {                                                            \
            {name##_0_0, name##_1_0, name##_2_0, name##_3_0, name##_4_0},                                              \
            {name##_0_1, name##_1_1, name##_2_1, name##_3_1, name##_4_1}};                                             \
        return table[packed][rows];                                                                                    \
    }
        MM_QUANTIZED(MM_CASE)
#undef MM_CASE
    }
    return NULL;
}

// ---- The op

// The product of a group of one matrix with a tile of rows.
static void group_tile(const struct clsa_matrix *m, const struct group *g, int last, const struct clsa_matmul *p,
                       uint8_t *packed, int row, const uint8_t *panel, float *acc) {
    const int n_in = p->x.n_in, nb = n_in / 32, n_rows = p->x.n_rows, rows = MIN(tile_rows(n_rows), n_rows - row);
    if (mm_is_float(m->type)) {
        const float *x = f32_rows(packed, n_rows, n_in, p->x.forms) + row * F32_STRIDE(n_in);
        float_group(m->type, g->w, g->row_bytes, n_in, x, rows, acc);
        return;
    }
    const struct q8_tile x = q8_tile_at(packed, n_rows, n_in, row);
    if (panel) {
        tiles[mm_kind_of(m->type)][rows - 1](panel, &x, nb, acc);
        return;
    }
    struct sink to = {.x = x, .ahead = g->w + (last ? 0 : GROUP * g->row_bytes)};
    unpacker(m->type, g->packed, rows)((struct src){g->w, g->row_bytes}, nb, &to);
    for (int r = 0; r < rows; r++)
        _mm512_store_ps(acc + r * GROUP, to.acc[r]);
}

// Groups from .. to of `n_mat` matrices (two: gate and up) for all rows.
static void groups(const struct clsa_matmul *p, const struct clsa_matrix *mat, int n_mat, int from, int to,
                   uint8_t *packed, const struct mm_scratch *scratch) {
    const int n_rows = p->x.n_rows, n_in = p->x.n_in, nb = n_in / 32, direct = n_rows <= FEW_ROWS;
    const int most = tile_rows(n_rows);
    size_t size[2] = {0, 0};
    for (int m = 0; m < n_mat; m++)
        size[m] = mm_is_float(mat[m].type) ? GROUP * mm_row_bytes(mat[m].type, n_in)
                                           : (size_t)nb * panel_block(mm_kind_of(mat[m].type));
    const int at_once = (int)MAX(1, PANEL_BYTES / (size[0] + size[1]));
    for (int first = from; first < to; first += at_once) {
        const int count = MIN(at_once, to - first);
        for (int g = 0; g < count && !direct; g++)
            for (int m = 0; m < n_mat; m++)
                if (!mm_is_float(mat[m].type)) {
                    const struct group at = group_of(&mat[m], n_in, first + g, scratch->rows);
                    struct sink sink = {.panel = scratch->panel + (size_t)g * (size[0] + size[1]) + m * size[0]};
                    unpacker(mat[m].type, at.packed, 0)((struct src){at.w, at.row_bytes}, nb, &sink);
                }
        const int n_tiles = (n_rows + most - 1) / most;
        for (int i = 0; i < n_tiles * count; i++) {
            // Directly: all rows with a group while it is cached. With panels: all groups with a tile of rows.
            const int g = direct ? i / n_tiles : i % count, row = most * (direct ? i % n_tiles : i / count);
            const int rows = MIN(most, n_rows - row);
            _Alignas(64) float acc[2][TILE * GROUP];
            struct group at;
            for (int m = n_mat - 1; m >= 0; m--) {
                at = group_of(&mat[m], n_in, first + g, scratch->rows);
                const uint8_t *panel = scratch->panel + (size_t)g * (size[0] + size[1]) + m * size[0];
                group_tile(&mat[m], &at, first + g + 1 == to, p, packed, row, direct ? NULL : panel, acc[m]);
                close_up(&at, acc[m], rows);
            }
            if (n_mat == 2)
                swiglu(acc[0], acc[1], rows * GROUP);
            store_group(mat, &at, acc[0], row, rows, n_mat == 1);
        }
    }
}

void clsa_matmul_avx512vnni(const struct clsa_matmul *p, int ith, int nth, void *scratch_) {
    const struct mm_scratch scratch = mm_scratch_of(p, ith, scratch_);
    uint8_t *packed = p->x.packed;
    if (!packed) {
        struct clsa_pack own = p->x;
        own.packed = packed = scratch.packed;
        pack_rows(&own, 0, own.n_rows);
    }
    const int swiglu_pair = p->epilogue == CLSA_EPILOGUE_SWIGLU;
    const int64_t n = mm_groups(p);
    int from = (int)(n * ith / nth), to = (int)(n * (ith + 1) / nth);
    for (int m = 0; m < (swiglu_pair ? 1 : p->n_mat); m++) {
        const int mine = (p->mat[m].n_out + GROUP - 1) / GROUP;
        if (from < mine && to > 0)
            groups(p, p->mat + m, swiglu_pair ? 2 : 1, MAX(from, 0), MIN(to, mine), packed, &scratch);
        from -= mine, to -= mine;
    }
}

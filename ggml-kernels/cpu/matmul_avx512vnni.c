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
    const int h = t.h, r = row % TILE;
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
    // The order of blocks is the unpackers': halves 0 of four blocks, then their halves 1.
    for (int u = 0; u < nb * halves; u++) {
        const int b = halves == 1 ? u : u / 8 * 4 + u % 4, half = halves == 1 ? 0 : u / 4 % 2;
        const uint8_t *w = panel + (size_t)b * record;
        const int8_t *q = x->q + ((size_t)b * 8 + 4 * half) * h * 4;
        const float *xs = x->s + (size_t)b * h;
        __m512i dot[TILE];
#pragma clang loop unroll(full)
        for (int r = 0; r < h; r++)
            dot[r] = kind == S32   ? _mm512_set1_epi32(x->i32[(size_t)b * h + r])
                     : kind == S16 ? _mm512_set1_epi32(x->i16[((size_t)2 * b + half) * h + r])
                                   : _mm512_setzero_si512();
#pragma clang loop unroll(full)
        for (int k = 0; k < deep; k++) {
            const __m512i v = _mm512_load_si512((const __m512i *)w + 4 * half + k);
#pragma clang loop unroll(full)
            for (int r = 0; r < h; r++) {
                int32_t xk;
                memcpy(&xk, q + (k * h + r) * 4, 4);
                dot[r] = _mm512_dpbusd_epi32(dot[r], v, _mm512_set1_epi32(xk));
            }
        }
        const float *scales = (const float *)(w + 512);
        const __m512 s = _mm512_load_ps(scales + 16 * half);
        const __m512 m = kind == M32   ? _mm512_load_ps(scales + 16)
                         : kind == M16 ? _mm512_load_ps(scales + 16 * (2 + half))
                                       : _mm512_setzero_ps();
#pragma clang loop unroll(full)
        for (int r = 0; r < h; r++) {
            acc[r] = fold(acc[r], dot[r], s, xs[r]);
            if (kind == M32)
                acc[r] = _mm512_fnmadd_ps(m, _mm512_set1_ps(x->f[(size_t)b * h + r]), acc[r]);
            if (kind == M16) {
                const float sum = xs[r] * -0x1p-5f * (float)x->i16[((size_t)2 * b + half) * h + r];
                acc[r] = _mm512_fnmadd_ps(m, _mm512_set1_ps(sum), acc[r]);
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

// ---- Per type: unpacking into a panel, and the product with one row

#define MM_QUANTIZED(X)                                                                                                \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS)
#define MM_UNPACK(name)                                                                                                \
    static __attribute__((noinline)) void panel_##name(const uint8_t *w, size_t row_bytes, int nb, struct sink *to) {  \
        unpack_##name(w, row_bytes, nb, to, 0);                                                                        \
    }                                                                                                                  \
    static __attribute__((noinline)) void row_##name(const uint8_t *w, size_t row_bytes, int nb, struct sink *to) {    \
        struct sink local = *to;                                                                                       \
        local.acc[0] = _mm512_setzero_ps();                                                                            \
        unpack_##name(w, row_bytes, nb, &local, 1);                                                                    \
        to->acc[0] = local.acc[0];                                                                                     \
    }
MM_QUANTIZED(MM_UNPACK)

static void panel_of(int type, const struct group *g, int nb, uint8_t *panel) {
    struct sink to = {.panel = panel};
    switch (type) {
#define MM_CASE(name)                                                                                                  \
    case T_##name:                                                                                                     \
        panel_##name(g->w, g->row_bytes, nb, &to);                                                                     \
        break;
        MM_QUANTIZED(MM_CASE)
#undef MM_CASE
    }
}

static void row_of(int type, const struct group *g, int nb, struct sink *to) {
    switch (type) {
#define MM_CASE(name)                                                                                                  \
    case T_##name:                                                                                                     \
        row_##name(g->w, g->row_bytes, nb, to);                                                                        \
        break;
        MM_QUANTIZED(MM_CASE)
#undef MM_CASE
    }
}

// ---- The op

// Groups from .. to of `n_mat` matrices (two: gate and up) for all rows.
static void groups(const struct clsa_matmul *p, const struct clsa_matrix *mat, int n_mat, int from, int to,
                   uint8_t *packed, const struct mm_scratch *scratch) {
    const int n_rows = p->x.n_rows, n_in = p->x.n_in, nb = n_in / 32;
    size_t size[2] = {0, 0};
    for (int m = 0; m < n_mat; m++)
        size[m] = mm_is_float(mat[m].type) ? GROUP * mm_row_bytes(mat[m].type, n_in)
                                           : (size_t)nb * panel_block(mm_kind_of(mat[m].type));
    const int at_once = (int)MAX(1, PANEL_BYTES / (size[0] + size[1]));
    for (int first = from; first < to; first += at_once) {
        const int count = MIN(at_once, to - first);
        if (n_rows > 1)
            for (int g = 0; g < count; g++)
                for (int m = 0; m < n_mat; m++)
                    if (!mm_is_float(mat[m].type)) {
                        const struct group at = group_of(&mat[m], n_in, first + g, scratch->rows);
                        panel_of(mat[m].type, &at, nb, scratch->panel + (size_t)g * (size[0] + size[1]) + m * size[0]);
                    }
        for (int row = 0; row < n_rows; row += TILE) {
            const int rows = MIN(TILE, n_rows - row);
            const struct q8_tile x = q8_tile_at(packed, n_rows, n_in, row);
            const float *xf = f32_rows(packed, n_rows, n_in, p->x.forms) + row * F32_STRIDE(n_in);
            for (int g = 0; g < count; g++) {
                _Alignas(64) float acc[2][TILE * GROUP];
                struct group at;
                for (int m = n_mat - 1; m >= 0; m--) {
                    const int type = mat[m].type;
                    at = group_of(&mat[m], n_in, first + g, scratch->rows);
                    if (mm_is_float(type)) {
                        float_group(type, at.w, at.row_bytes, n_in, xf, rows, acc[m]);
                    } else if (n_rows == 1) {
                        const size_t next = first + g + 1 < to ? GROUP * at.row_bytes : 0;
                        struct sink sink = {.x = x, .ahead = at.w + next};
                        row_of(type, &at, nb, &sink);
                        _mm512_store_ps(acc[m], sink.acc[0]);
                    } else {
                        tiles[mm_kind_of(type)][rows - 1](
                            scratch->panel + (size_t)g * (size[0] + size[1]) + m * size[0], &x, nb, acc[m]);
                    }
                }
                if (n_mat == 2)
                    swiglu(acc[0], acc[1], rows * GROUP);
                store_group(mat, &at, acc[0], row, rows, n_mat == 1);
            }
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

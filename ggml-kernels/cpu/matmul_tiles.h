// The two forms of rows that tiles multiply, BF16 and I8: packing, and sums of 2 x 2 tiles of rows and outputs.
//
// A step is what one tile holds along the sum: 32 values in bf16, 64 in int8.
#pragma once
#include "amx.h"
#include "matmul_layout.h"
#include "matmul_vector.h"

// ---- Packing

// RMS(x; norm) of values i .. i + 16 of a row, or x as it is.
ALWAYS_INLINE V row_values(const float *x, const float *norm, float inv, int i) {
    const V v = v_load(x + i);
    return norm ? v_mul(v_mul(v, v_set1(inv)), v_load(norm + i)) : v;
}

// Row `row` of a tile in form BF16: steps of 32 values.
static void pack_bf16(const float *x, const float *norm, float inv, int n_in, uint8_t *tile, int row) {
    uint8_t *out = tile + row * 64;
    for (int i = 0; i < n_in; i += 32, out += AMX_BYTES) {
        const V lo = row_values(x, norm, inv, i), hi = row_values(x, norm, inv, i + 16);
        _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
    }
}

// Each lane and its partner: the sum in the even one, the difference in the odd one (where `odd` has a bit).
ALWAYS_INLINE V butterfly(V v, V partner, __mmask16 odd) {
    return v_fma(v, _mm512_mask_mov_ps(v_set1(1), odd, v_set1(-1)), partner);
}

// H v, H the Hadamard matrix of 64: H[i][j] = -1 to the number of bits that i and j share.
ALWAYS_INLINE void rotate_row(V v[4]) {
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
        V u = butterfly(v[k], _mm512_permute_ps(v[k], 0xb1), 0xaaaa);
        u = butterfly(u, _mm512_permute_ps(u, 0x4e), 0xcccc);
        u = butterfly(u, _mm512_shuffle_f32x4(u, u, 0xb1), 0xf0f0);
        v[k] = butterfly(u, _mm512_shuffle_f32x4(u, u, 0x4e), 0xff00);
    }
    const V a = v_add(v[0], v[1]), b = v_sub(v[0], v[1]), c = v_add(v[2], v[3]), d = v_sub(v[2], v[3]);
    v[0] = v_add(a, c), v[1] = v_add(b, d), v[2] = v_sub(a, c), v[3] = v_sub(b, d);
}

// Row `row` of block `b` of a tile in form I8, from its n <= 128 values (a multiple of 32).
ALWAYS_INLINE void pack_i8_values(const float *x, const float *norm, float inv, int n, struct i8_tile tile, int b,
                                  int row) {
    V v[8];
    __m512i most = _mm512_setzero_si512();
    const int steps = (n + 63) / 64;
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++)
        v[i] = 16 * i >= n ? v_zero()
               : norm      ? row_values(x, norm, inv * (1.0f / 64), 16 * i)
                           : v_mul(v_load(x + 16 * i), v_set1(1.0f / 64));
    rotate_row(v);
    rotate_row(v + 4);
    // The integer order of absolute values is theirs, with NaN above all.
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++)
        most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(v[i])));
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    float max;
    memcpy(&max, &bits, 4);
    const int finite = bits < 0x7f800000, tiny = max < I8_LEAST;
    const V by = v_set1(finite && !tiny ? 127.0f / max : 0);
    int8_t *q = tile.q + (size_t)(2 * b * AMX_BYTES + row * 64);
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++)
        if (i < 4 * steps)
            _mm_store_si128((__m128i *)(q + i / 4 * AMX_BYTES + i % 4 * 16),
                            _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v_mul(v[i], by))));
    tile.s[AMX_ROWS * b + row] = !finite ? NAN : tiny ? 0 : max * (1.0f / 127);
}

static void pack_i8_block(const float *x, const float *norm, float inv, int n, struct i8_tile tile, int b, int row) {
    if (n == I8_BLOCK)
        pack_i8_values(x, norm, inv, I8_BLOCK, tile, b, row);
    else
        pack_i8_values(x, norm, inv, n, tile, b, row);
}

static void pack_i8(const float *x, const float *norm, float inv, int n_in, uint8_t *tile, int row) {
    for (int b = 0; I8_BLOCK * b < n_in; b++)
        pack_i8_block(x + I8_BLOCK * b, norm ? norm + I8_BLOCK * b : NULL, inv, MIN(I8_BLOCK, n_in - I8_BLOCK * b),
                      i8_tile_of(tile, n_in), b, row);
}

// Zeros instead of a row.
static void clear_row(uint8_t *tile, int form, int n_in, int row) {
    const int steps = form == CLSA_FORM_I8 ? i8_steps(n_in) : n_in / 32;
    for (int step = 0; step < steps; step++)
        memset(tile + step * AMX_BYTES + row * 64, 0, 64);
    for (int b = 0; form == CLSA_FORM_I8 && I8_BLOCK * b < n_in; b++)
        i8_tile_of(tile, n_in).s[AMX_ROWS * b + row] = 0;
}

// ---- Products

// Steps by which tiles of x are asked for before they are loaded: past the L2 cache's latency.
#define X_AHEAD 2

// The sums of 2 x 2 tiles, [2 m + n]: where they start from (NULL: zero) and where they go, 16 rows of 16 f32 each.
struct sums {
    const float *from[4];
    float *to[4];
    size_t from_stride, to_stride; // bytes from row to row
};

// Two tiles of rows, or of weights: the first step of the first one, its scales (I8), and bytes from tile to tile.
struct tiles {
    const uint8_t *at;
    const float *s;
    size_t stride;
};

// What comes to the L2 cache meanwhile: lines first .. end of each step, `by` bytes behind it.
struct ahead {
    size_t by;
    int first, end;
};

// Loads a step into 4 and 5 (x) and 6 and 7 (weights), and asks for lines of x to come. All loads before the products:
// between them they would wait for the one before and hold up the next.
ALWAYS_INLINE void load_step(const struct tiles *x, const struct tiles *w, size_t at, const struct ahead *ahead, int m,
                             int n) {
    const uint8_t *xs = x->at + at, *ws = w->at + at;
    amx_load(6, ws, 64);
    amx_load(4, xs, 64);
    if (n > 1)
        amx_load(7, ws + w->stride, 64);
    if (m > 1)
        amx_load(5, xs + x->stride, 64);
    for (int line = 0; line < AMX_ROWS; line++) {
        _mm_prefetch((const char *)xs + X_AHEAD * AMX_BYTES + 64 * line, _MM_HINT_T0);
        if (m > 1)
            _mm_prefetch((const char *)xs + X_AHEAD * AMX_BYTES + x->stride + 64 * line, _MM_HINT_T0);
    }
    for (int line = ahead->first; line < ahead->end; line++) {
        _mm_prefetch((const char *)xs + ahead->by + 64 * line, _MM_HINT_T1);
        _mm_prefetch((const char *)xs + ahead->by + x->stride + 64 * line, _MM_HINT_T1);
    }
}

#define EACH_SUM(X, m, n) X(0, 1) X(1, n > 1) X(2, m > 1) X(3, m > 1 && n > 1)

// to[2 m + n] = from[2 m + n] + x tile m * weights tile n over `steps` steps, of bf16.
ALWAYS_INLINE void product_bf16(const struct tiles *x, const struct tiles *w, int steps, const struct ahead *ahead,
                                const struct sums *sums, int m, int n) {
#define MM_START(t, used)                                                                                              \
    if (used) {                                                                                                        \
        if (sums->from[t])                                                                                             \
            amx_load(t, sums->from[t], sums->from_stride);                                                             \
        else                                                                                                           \
            amx_zero(t);                                                                                               \
    }
    EACH_SUM(MM_START, m, n)
#undef MM_START
    for (size_t step = 0; step < (size_t)steps; step++) {
        load_step(x, w, step * AMX_BYTES, ahead, m, n);
#define MM_DOT(t, used)                                                                                                \
    if (used)                                                                                                          \
        amx_dot_bf16(t, 4 + t / 2, 6 + t % 2);
        EACH_SUM(MM_DOT, m, n)
#undef MM_DOT
    }
#define MM_STORE(t, used)                                                                                              \
    if (used)                                                                                                          \
        amx_store(t, sums->to[t], sums->to_stride);
    EACH_SUM(MM_STORE, m, n)
#undef MM_STORE
}

// Eighth `part` of the sums of block b, which are integers, to acc: half a tile, rows times outputs.
ALWAYS_INLINE void scale_part(float (*acc)[AMX_ROWS * GROUP], int32_t (*sums)[AMX_ROWS * GROUP], const struct tiles *x,
                              const struct tiles *w, size_t b, int part, int m, int n) {
    const int t = part / 2;
    if ((t / 2 && m == 1) || (t % 2 && n == 1))
        return;
    const float *xs = (const float *)((const uint8_t *)x->s + (size_t)(t / 2) * x->stride) + AMX_ROWS * b;
    const V ws = v_load((const float *)((const uint8_t *)w->s + (size_t)(t % 2) * w->stride) + GROUP * b);
#pragma clang loop unroll(full)
    for (int row = part % 2 * 8; row < part % 2 * 8 + 8; row++) {
        float *a = acc[t] + GROUP * row;
        v_store(a, v_fma(v_from32(i_load(sums[t] + GROUP * row)), v_mul(ws, v_set1(xs[row])), v_load(a)));
    }
}

// The same of int8: the integers of each block of two steps, times both scales, to sums in f32. They are converted
// between the products of the next block: the two hardly hinder each other.
ALWAYS_INLINE void product_i8(const struct tiles *x, const struct tiles *w, int steps, const struct ahead *ahead,
                              const struct sums *sums, int m, int n) {
    _Alignas(64) float acc[4][AMX_ROWS * GROUP];
    _Alignas(64) int32_t whole[2][4][AMX_ROWS * GROUP];
    for (int t = 0; t < 4; t++)
        for (size_t row = 0; row < AMX_ROWS; row++)
            v_store(acc[t] + GROUP * row,
                    sums->from[t] ? v_load((const float *)((const uint8_t *)sums->from[t] + row * sums->from_stride))
                                  : v_zero());
    const size_t blocks = ((size_t)steps + 1) / 2;
    for (size_t b = 0; b < blocks; b++) {
        int32_t(*now)[AMX_ROWS * GROUP] = whole[b % 2], (*last)[AMX_ROWS * GROUP] = whole[(b + 1) % 2];
        int part = b ? 0 : 8;
        amx_zero(0);
        amx_zero(1);
        amx_zero(2);
        amx_zero(3);
        for (size_t step = 2 * b; step < MIN(2 * b + 2, (size_t)steps); step++) {
            load_step(x, w, step * AMX_BYTES, ahead, m, n);
#define MM_DOT(t, used)                                                                                                \
    if (used)                                                                                                          \
        amx_dot_int8(t, 4 + t / 2, 6 + t % 2);                                                                         \
    if (part < 8)                                                                                                      \
        scale_part(acc, last, x, w, b - 1, part++, m, n);
            EACH_SUM(MM_DOT, m, n)
#undef MM_DOT
        }
        for (; part < 8; part++) // a last block of one step
            scale_part(acc, last, x, w, b - 1, part, m, n);
#define MM_STORE(t, used)                                                                                              \
    if (used)                                                                                                          \
        amx_store(t, now[t], 4 * GROUP);
        EACH_SUM(MM_STORE, m, n)
#undef MM_STORE
    }
    for (int part = 0; part < 8; part++)
        scale_part(acc, whole[(blocks - 1) % 2], x, w, blocks - 1, part, m, n);
#define MM_STORE(t, used)                                                                                              \
    for (size_t row = 0; used && row < AMX_ROWS; row++)                                                                \
        v_store((float *)((uint8_t *)sums->to[t] + row * sums->to_stride), v_load(acc[t] + GROUP * row));
    EACH_SUM(MM_STORE, m, n)
#undef MM_STORE
}

typedef void product_fn(const struct tiles *x, const struct tiles *w, int steps, const struct ahead *ahead,
                        const struct sums *sums);
#define MM_PRODUCT(form, m, n)                                                                                         \
    static void form##_##m##_##n(const struct tiles *x, const struct tiles *w, int steps, const struct ahead *ahead,   \
                                 const struct sums *sums) {                                                            \
        product_##form(x, w, steps, ahead, sums, m, n);                                                                \
    }
#define MM_PRODUCTS(form)                                                                                              \
    MM_PRODUCT(form, 1, 1)                                                                                             \
    MM_PRODUCT(form, 1, 2)                                                                                             \
    MM_PRODUCT(form, 2, 1)                                                                                             \
    MM_PRODUCT(form, 2, 2)                                                                                             \
    static product_fn *const form##_products[2][2] = {{form##_1_1, form##_1_2}, {form##_2_1, form##_2_2}};
MM_PRODUCTS(bf16)
MM_PRODUCTS(i8)

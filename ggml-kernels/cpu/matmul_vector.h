// The parts of matmul that are the same for every vector width: packing's RMS norm, float weights, the epilogue.
// Included once by each SIMD file after it has defined, for a vector V of W floats:
//   v_zero() v_set1(f) v_load(p) v_store(p, v) v_add v_mul v_div v_fma(a, b, c) = a * b + c, v_sum(v), v_exp(v),
//   v_f16(p), v_bf16(p): W values widened
#pragma once
#include "matmul_layout.h"

// 1 / sqrt(mean(x^2) + eps)
static float inverse_rms(const float *x, int n, float eps) {
    V sum[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int k = 0; k < 4; k++) {
            V v = v_load(x + i + k * W);
            sum[k] = v_fma(v, v, sum[k]);
        }
    float rest = 0;
    for (; i < n; i++)
        rest += x[i] * x[i];
    float total = v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3]))) + rest;
    return 1.0f / sqrtf(total / (float)n + eps);
}

// Form F32 of one row.
static void pack_f32(const struct clsa_pack *p, const float *x, float inv, float *out) {
    int i = 0, n = p->n_in;
    for (; i + W <= n; i += W) {
        V v = v_load(x + i);
        v_store(out + i, p->norm ? v_mul(v_mul(v, v_set1(inv)), v_load(p->norm + i)) : v);
    }
    for (; i < n; i++)
        out[i] = p->norm ? x[i] * inv * p->norm[i] : x[i];
    for (; i < (int)F32_STRIDE(n); i++)
        out[i] = 0;
}

// W weights from the k-th on; past the row's end, zeros.
ALWAYS_INLINE V weights(const uint8_t *row, int type, int k, int n) {
    _Alignas(64) uint8_t rest[64] = {0};
    const int size = type == T_F32 ? 4 : 2;
    const uint8_t *at = row + (size_t)k * size;
    if (k + W > n) {
        memcpy(rest, at, (size_t)((n - k) * size));
        at = rest;
    }
    return type == T_F32 ? v_load((const float *)at) : type == T_F16 ? v_f16(at) : v_bf16(at);
}

// outs x rows products; lane l of a vector sums values l, W + l, 2 W + l, ...
ALWAYS_INLINE void float_tile(const uint8_t *w, size_t row_bytes, int type, int n, const float *x, int outs, int rows,
                              float *acc) {
    V sum[8 * 8];
    const size_t stride = F32_STRIDE(n);
#pragma clang loop unroll(full)
    for (int i = 0; i < outs * rows; i++)
        sum[i] = v_zero();
    int k = 0;
#define MM_STEP                                                                                                        \
    V v[8];                                                                                                            \
    _Pragma("clang loop unroll(full)") for (int o = 0; o < outs; o++) v[o] = weights(w + o * row_bytes, type, k, n);   \
    _Pragma("clang loop unroll(full)") for (int r = 0; r < rows; r++) {                                                \
        V xr = v_load(x + r * stride + k);                                                                             \
        _Pragma("clang loop unroll(full)") for (int o = 0; o < outs; o++) sum[r * outs + o] =                          \
            v_fma(v[o], xr, sum[r * outs + o]);                                                                        \
    }
    for (; k + W <= n; k += W) {
        MM_STEP
    }
    if (k < n) {
        MM_STEP
    }
#undef MM_STEP
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
        for (int o = 0; o < outs; o++)
            acc[r * GROUP + o] = v_sum(sum[r * outs + o]);
}

// The products of a group of 16 outputs with `rows` rows, FLOAT_ROWS at a time.
#define MM_FLOAT_GROUP(name, T)                                                                                        \
    static void float_group_##name(const uint8_t *w, size_t row_bytes, int n, const float *x, int rows, float *acc) {  \
        for (int o = 0; o < GROUP; o += FLOAT_OUTS) {                                                                  \
            int r = 0;                                                                                                 \
            for (; r + FLOAT_ROWS <= rows; r += FLOAT_ROWS)                                                            \
                float_tile(w + o * row_bytes, row_bytes, T, n, x + r * F32_STRIDE(n), FLOAT_OUTS, FLOAT_ROWS,          \
                           acc + r * GROUP + o);                                                                       \
            for (; r + 2 <= rows; r += 2)                                                                              \
                float_tile(w + o * row_bytes, row_bytes, T, n, x + r * F32_STRIDE(n), FLOAT_OUTS, 2,                   \
                           acc + r * GROUP + o);                                                                       \
            for (; r < rows; r++)                                                                                      \
                float_tile(w + o * row_bytes, row_bytes, T, n, x + r * F32_STRIDE(n), FLOAT_OUTS, 1,                   \
                           acc + r * GROUP + o);                                                                       \
        }                                                                                                              \
    }
MM_FLOAT_GROUP(F32, T_F32)
MM_FLOAT_GROUP(F16, T_F16)
MM_FLOAT_GROUP(BF16, T_BF16)
#undef MM_FLOAT_GROUP

static void float_group(int type, const uint8_t *w, size_t row_bytes, int n, const float *x, int rows, float *acc) {
    if (type == T_F32)
        float_group_F32(w, row_bytes, n, x, rows, acc);
    else if (type == T_F16)
        float_group_F16(w, row_bytes, n, x, rows, acc);
    else
        float_group_BF16(w, row_bytes, n, x, rows, acc);
}

// silu(gate) * up, in place of gate.
static void swiglu(float *gate, const float *up, int n) {
    for (int i = 0; i < n; i += W) {
        V z = v_load(gate + i), e = v_exp(v_mul(z, v_set1(-1.0f)));
        v_store(gate + i, v_mul(v_div(z, v_add(v_set1(1.0f), e)), v_load(up + i)));
    }
}

// ---- Groups of 16 outputs of one matrix.
struct group {
    const uint8_t *w; // of 16 rows, row_bytes apart
    size_t row_bytes;
    int first, skip; // output of lane 0; lanes below skip belong to the group before
    int lanes;       // outputs of this group end here
    int packed;
};

// Group g of a matrix. The last one reaches back to have 16 rows; a matrix of fewer is copied to `rows`. Repacked
// matrices are whole groups.
static struct group group_of(const struct clsa_matrix *m, int n_in, int g, uint8_t *rows) {
    struct group at = {.row_bytes = mm_row_bytes(m->type, n_in), .lanes = GROUP};
    if (m->layout == CLSA_LAYOUT_GROUPS) {
        at.packed = 1;
        at.first = GROUP * g;
        at.lanes = MIN(GROUP, m->n_out - at.first);
        at.w = m->w + (size_t)at.first * at.row_bytes;
        return at;
    }
    at.first = MIN(GROUP * g, MAX(m->n_out - GROUP, 0));
    at.skip = GROUP * g - at.first;
    at.w = m->w + (size_t)at.first * at.row_bytes;
    if (m->n_out < GROUP) {
        at.lanes = m->n_out;
        for (int o = 0; o < GROUP; o++)
            memcpy(rows + (size_t)o * at.row_bytes, m->w + (size_t)MIN(o, m->n_out - 1) * at.row_bytes, at.row_bytes);
        at.w = rows;
    }
    return at;
}

// Moves the outputs of a group that reaches back to the front of their rows of acc [rows][16].
static void close_up(const struct group *g, float *acc, int rows) {
    for (int r = 0; g->skip > 0 && r < rows; r++)
        memmove(acc + r * GROUP, acc + r * GROUP + g->skip, sizeof(float) * (size_t)(GROUP - g->skip));
}

// acc [rows][16] -> y, from row `row` on.
static void store_group(const struct clsa_matrix *m, const struct group *g, const float *acc, int row, int rows,
                        int with_add) {
    const int first = g->first + g->skip, n = g->lanes - g->skip;
    for (int r = 0; r < rows; r++) {
        float *y = m->y + (size_t)(row + r) * m->y_stride + first;
        const float *a = acc + r * GROUP;
        const float *add = with_add && m->add ? m->add + (size_t)(row + r) * m->add_stride + first : NULL;
        if (n == GROUP) {
            for (int i = 0; i < GROUP; i += W)
                v_store(y + i, add ? v_add(v_load(add + i), v_load(a + i)) : v_load(a + i));
        } else {
            for (int i = 0; i < n; i++)
                y[i] = add ? add[i] + a[i] : a[i];
        }
    }
}

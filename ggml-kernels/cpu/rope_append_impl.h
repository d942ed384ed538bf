// RMSNorm, RoPE and the append to the cache, for the vector operations of vec_<isa>.h.
#include "rope_append.h"
#include <float.h>

// n values to a cached row, from value `from` on; both are multiples of 16, of 32 in Q8_0.
static void store_row(uint8_t *row, int32_t type, int32_t from, const float *x, int32_t n) {
    row += clsa_type_bytes(type, (size_t)from);
    if (type == CLSA_F32)
        memcpy(row, x, 4 * (size_t)n);
    if (type == CLSA_F16)
        for (int32_t j = 0; j < n; j += VL)
            vf_to_f16(row + 2 * j, vf_load(x + j));
    if (type == CLSA_Q8_0)
        for (int32_t j = 0; j < n; j += CLSA_QK8_0, row += CLSA_QK8_0 + 2) {
            vf max = vf_set1(0);
            for (int32_t l = 0; l < CLSA_QK8_0; l += VL)
                max = vf_max(max, vf_abs(vf_load(x + j + l)));
            float d = vf_hmax(max) / 127, inverse = d >= FLT_MIN ? 1 / d : 0;
            uint16_t half = (uint16_t)_cvtss_sh(d, _MM_FROUND_TO_NEAREST_INT);
            memcpy(row, &half, 2);
            for (int32_t l = 0; l < CLSA_QK8_0; l += VL)
                vf_to_i8(row + 2 + l, vf_mul(vf_load(x + j + l), vf_set1(inverse)));
        }
}

// One head: RMSNorm, then rotation. x and y may be the same.
static void head(const struct clsa_rope_append *p, const float *x, const float *norm, int32_t r, float *y) {
    const int32_t d = p->d, half = p->n_rot / 2;
    if (norm) {
        vf sum = vf_set1(0);
        for (int32_t j = 0; j < d; j += VL)
            sum = vf_fma(vf_load(x + j), vf_load(x + j), sum);
        vf factor = vf_set1(1 / sqrtf(vf_hsum(sum) / (float)d + p->eps));
        for (int32_t j = 0; j < d; j += VL)
            vf_store(y + j, vf_mul(vf_mul(vf_load(x + j), factor), vf_load(norm + j)));
    } else if (x != y) {
        memcpy(y, x, 4 * (size_t)d);
    }
    if (!p->cos)
        return;
    const float *cos = p->cos + (size_t)r * half, *sin = p->sin + (size_t)r * half;
    int32_t j = 0;
    for (; !p->interleaved && j + VL <= half; j += VL) {
        vf a = vf_load(y + j), b = vf_load(y + half + j), c = vf_load(cos + j), s = vf_load(sin + j);
        vf_store(y + j, vf_sub(vf_mul(a, c), vf_mul(b, s)));
        vf_store(y + half + j, vf_add(vf_mul(b, c), vf_mul(a, s)));
    }
    for (; j < half; j++) {
        int32_t i = p->interleaved ? 2 * j : j, l = p->interleaved ? 2 * j + 1 : j + half;
        float a = y[i], b = y[l];
        y[i] = a * cos[j] - b * sin[j];
        y[l] = b * cos[j] + a * sin[j];
    }
}

// Rows are dealt out evenly, whole: threads write apart. One row's heads are dealt out instead.
static void rope_append(const struct clsa_rope_append *p, int ith, int nth) {
    const int32_t d = p->d, n_q = p->q ? p->n_head : 0, n_k = p->k_cache.base ? p->n_kv : 0,
                  n_v = p->v_cache.base ? p->n_kv : 0;
    const int32_t heads = n_q + n_k + n_v;
    const int64_t items = (int64_t)p->batch.n_rows * heads;
    for (int64_t item = items * ith / nth, end = items * (ith + 1) / nth; item < end; item++) {
        const int32_t r = (int32_t)(item / heads), h = (int32_t)(item % heads), pos = p->batch.pos[r],
                      slot = p->batch.slot[r];
        float y[CLSA_MAX_D];
        if (h < n_q) {
            size_t at = ((size_t)r * n_q + h) * d;
            head(p, p->q + at, p->q_norm, r, p->q_out + at);
        } else if (h < n_q + n_k) {
            head(p, p->k + ((size_t)r * n_k + h - n_q) * d, p->k_norm, r, y);
            store_row(clsa_row(&p->k_cache, &p->batch, slot, pos), p->k_cache.type, (h - n_q) * d, y, d);
        } else {
            int32_t g = h - n_q - n_k;
            store_row(clsa_row(&p->v_cache, &p->batch, slot, pos), p->v_cache.type, g * d,
                      p->v + ((size_t)r * n_v + g) * d, d);
        }
    }
}

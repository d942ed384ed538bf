// rope_append.h, word for word.
#include "common.h"
#include "rope_append.h"
#include <float.h>

static void store(uint8_t *row, int32_t type, int32_t i, const float *x, int32_t n) {
    if (type == CLSA_F32)
        memcpy(row + 4 * (size_t)i, x, 4 * (size_t)n);
    if (type == CLSA_F16)
        for (int32_t j = 0; j < n; j++)
            ((uint16_t *)row)[i + j] = clsa_f32_to_f16(x[j]);
    if (type == CLSA_Q8_0)
        for (int32_t j = 0; j < n; j += CLSA_QK8_0) {
            uint8_t *block = row + (size_t)(i + j) / CLSA_QK8_0 * (CLSA_QK8_0 + 2);
            float max = 0;
            for (int32_t l = 0; l < CLSA_QK8_0; l++)
                max = fmaxf(max, fabsf(x[j + l]));
            float d = max / 127, inverse = d >= FLT_MIN ? 1 / d : 0;
            uint16_t half = clsa_f32_to_f16(d);
            memcpy(block, &half, 2);
            for (int32_t l = 0; l < CLSA_QK8_0; l++)
                block[2 + l] = (uint8_t)(int8_t)lrintf(x[j + l] * inverse);
        }
}

// One head: RMSNorm, then rotation. x and y may be the same.
static void head(const struct clsa_rope_append *p, const float *x, const float *norm, int32_t r, float *y) {
    float factor = 1;
    if (norm) {
        float sum = 0;
        for (int32_t j = 0; j < p->d; j++)
            sum += x[j] * x[j];
        factor = 1 / sqrtf(sum / (float)p->d + p->eps);
    }
    for (int32_t j = 0; j < p->d; j++)
        y[j] = norm ? x[j] * factor * norm[j] : x[j];
    int32_t half = p->n_rot / 2;
    for (int32_t j = 0; p->cos && j < half; j++) {
        int32_t a = p->interleaved ? 2 * j : j, b = p->interleaved ? 2 * j + 1 : j + half;
        float c = p->cos[(size_t)r * half + j], s = p->sin[(size_t)r * half + j], ya = y[a], yb = y[b];
        y[a] = ya * c - yb * s;
        y[b] = yb * c + ya * s;
    }
}

void clsa_rope_append_ref(const struct clsa_rope_append *p, int ith, int nth, void *scratch) {
    (void)scratch;
    const int32_t d = p->d, n_kv = p->n_kv;
    for (int32_t r = ith; r < p->batch.n_rows; r += nth) {
        int32_t pos = p->batch.pos[r], slot = p->batch.slot[r];
        for (int32_t h = 0; p->q && h < p->n_head; h++) {
            size_t at = ((size_t)r * p->n_head + h) * d;
            head(p, p->q + at, p->q_norm, r, p->q_out + at);
        }
        for (int32_t g = 0; p->k_cache.base && g < n_kv; g++) {
            float y[CLSA_MAX_D];
            head(p, p->k + ((size_t)r * n_kv + g) * d, p->k_norm, r, y);
            store(clsa_row(&p->k_cache, &p->batch, slot, pos), p->k_cache.type, g * d, y, d);
        }
        if (p->v_cache.base)
            store(clsa_row(&p->v_cache, &p->batch, slot, pos), p->v_cache.type, 0, p->v + (size_t)r * n_kv * d,
                  n_kv * d);
    }
}

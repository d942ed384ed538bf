// attention.h, word for word: two passes over the keys, nothing kept but one output row.
#include "attention.h"
#include "common.h"

static float score(const struct clsa_attention *p, const float *q, int32_t slot, int32_t s, int32_t g) {
    const uint8_t *row = clsa_row(&p->k, &p->batch, slot, s);
    float sum = 0;
    for (int32_t j = 0; j < p->d; j++)
        sum += q[j] * clsa_value(row, p->k.type, g * p->d + j);
    return sum * p->scale;
}

void clsa_attention_ref(const struct clsa_attention *p, int ith, int nth, void *scratch) {
    (void)scratch;
    for (int32_t item = ith; item < p->batch.n_rows * p->n_head; item += nth) {
        int32_t r = item / p->n_head, h = item % p->n_head, g = h / (p->n_head / p->n_kv);
        int32_t t = p->batch.pos[r], slot = p->batch.slot[r];
        int32_t first = p->window > 0 && t >= p->window ? t - p->window + 1 : 0;
        const float *q = p->q + (size_t)item * p->d;
        float *out = p->out + (size_t)item * p->d;
        float max = -INFINITY, sum = 0;
        for (int32_t s = first; s <= t; s++)
            max = fmaxf(max, score(p, q, slot, s, g));
        memset(out, 0, sizeof(float) * p->d);
        for (int32_t s = first; s <= t; s++) {
            const uint8_t *v = clsa_row(&p->v, &p->batch, slot, s);
            float e = expf(score(p, q, slot, s, g) - max);
            sum += e;
            for (int32_t j = 0; j < p->d; j++)
                out[j] += e * clsa_value(v, p->v.type, g * p->d + j);
        }
        for (int32_t j = 0; j < p->d; j++)
            out[j] /= sum;
    }
}

// route.h, word for word: a heap of the k best per row, its root the worst of them.
#include "common.h"
#include "route.h"
#include <stdlib.h>

struct candidate {
    float score;
    uint32_t pos;
};

// Whether a ranks below b: lower score, or equal score and higher position.
static int worse(struct candidate a, struct candidate b) {
    return a.score < b.score || (a.score == b.score && a.pos > b.pos);
}

static void sift(struct candidate *heap, int32_t n, int32_t i) {
    for (int32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && worse(heap[child + 1], heap[child]))
            child++;
        if (!worse(heap[child], heap[i]))
            return;
        struct candidate swap = heap[i];
        heap[i] = heap[child], heap[child] = swap;
    }
}

static int by_position(const void *a, const void *b) {
    uint32_t x = ((const struct candidate *)a)->pos, y = ((const struct candidate *)b)->pos;
    return (x > y) - (x < y);
}

// Offers candidate c, the n-th, to the k best.
static void offer(struct candidate *heap, int32_t k, int32_t n, struct candidate c) {
    if (isnan(c.score))
        c.score = -INFINITY;
    if (n < k)
        heap[n] = c;
    if (n == k - 1)
        for (int32_t i = k / 2; i-- > 0;)
            sift(heap, k, i);
    if (n >= k && worse(heap[0], c))
        heap[0] = c, sift(heap, k, 0);
}

static float score(const struct clsa_rows *keys, const struct clsa_batch *batch, int32_t slot, int32_t s,
                   const float *q, int32_t d) {
    const uint8_t *row = clsa_row(keys, batch, slot, s);
    float sum = 0;
    for (int32_t j = 0; j < d; j++)
        sum += q[j] * clsa_value(row, keys->type, j);
    return sum;
}

void clsa_route_ref(const struct clsa_route *p, int ith, int nth, void *scratch) {
    const int32_t block = MAX(p->block, 1), k = MAX(p->k / block, 1);
    struct candidate *heap = (struct candidate *)((char *)scratch + CLSA_SYNC) + (size_t)ith * k;
    for (int32_t r = ith; r < p->batch.n_rows; r += nth) {
        const int32_t n = p->batch.pos[r] + 1, n_blocks = (n + block - 1) / block;
        uint32_t *out = p->selected + (size_t)r * p->n_columns;
        int32_t count = 0;
        if (n <= p->k || n_blocks <= k) {
            for (; count < n; count++)
                out[count] = (uint32_t)count;
            p->count[r] = count;
            continue;
        }
        for (int32_t b = 0; b < n_blocks; b++) {
            float sum = 0;
            for (int32_t s = b * block; s < MIN((b + 1) * block, n); s++)
                sum += score(&p->keys, &p->batch, p->batch.slot[r], s, p->q + (size_t)r * p->d, p->d);
            offer(heap, k, b, (struct candidate){sum / (float)MIN(block, n - b * block), (uint32_t)b});
        }
        qsort(heap, (size_t)k, sizeof *heap, by_position);
        for (int32_t i = 0; i < k; i++)
            for (int32_t s = (int32_t)heap[i].pos * block; s < MIN(((int32_t)heap[i].pos + 1) * block, n); s++)
                out[count++] = (uint32_t)s;
        p->count[r] = count;
    }
}

void clsa_score_ref(const struct clsa_score *p, int ith, int nth, void *scratch) {
    (void)scratch;
    for (int32_t i = ith; i < p->n; i += nth)
        p->out[i] = score(&p->keys, &p->batch, p->slot, p->start + i, p->q, p->d);
}

void clsa_topk_ref(const struct clsa_topk *p, int ith, int nth, void *scratch) {
    (void)nth;
    if (ith != 0)
        return;
    const int32_t k = MIN(p->k, p->n);
    struct candidate *heap = (struct candidate *)((char *)scratch + CLSA_SYNC);
    for (int32_t i = 0; i < p->n && k > 0; i++)
        offer(heap, k, i, (struct candidate){p->scores[i], (uint32_t)i});
    qsort(heap, (size_t)k, sizeof *heap, by_position);
    for (int32_t i = 0; i < k; i++)
        p->selected[i] = heap[i].pos;
}

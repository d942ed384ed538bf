// How much scratch each op wants, for every instruction set.
#include "attend.h"
#include "rope_append.h"
#include "route.h"

size_t clsa_attention_scratch(const struct clsa_attention *p, int nth) {
    return attend_scratch(p->batch.n_rows, p->n_head, p->d, nth);
}

size_t clsa_gather_attention_scratch(const struct clsa_gather_attention *p, int nth) {
    return attend_scratch(p->batch.n_rows, p->n_head, p->d, nth);
}

size_t clsa_rope_append_scratch(const struct clsa_rope_append *p, int nth) {
    (void)p, (void)nth;
    return CLSA_SYNC;
}

size_t clsa_route_scratch(const struct clsa_route *p, int nth) {
    // Lists: a block of rows per thread, or (few rows) segments of rows, fewer than two per thread; and what is kept of
    // a segment.
    size_t n_rows = (size_t)p->batch.n_rows, n = (size_t)nth, block = MIN(ROUTE_ROWS, (n_rows + n - 1) / n);
    return CLSA_SYNC + MAX(n * block, 2 * n) * (candidates_bytes(p->k) + 64);
}

size_t clsa_score_scratch(const struct clsa_score *p, int nth) {
    (void)p, (void)nth;
    return CLSA_SYNC;
}

size_t clsa_topk_scratch(const struct clsa_topk *p, int nth) {
    (void)nth;
    return CLSA_SYNC + candidates_bytes(MIN(p->k, p->n));
}

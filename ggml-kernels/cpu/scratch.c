// How much scratch each op wants, for every instruction set.
#include "attention.h"
#include "common.h"
#include "gather_attention.h"
#include "rope_append.h"
#include "route.h"

size_t clsa_attention_scratch(const struct clsa_attention *p, int nth) {
    (void)p, (void)nth;
    return CLSA_SYNC;
}

size_t clsa_gather_attention_scratch(const struct clsa_gather_attention *p, int nth) {
    (void)p, (void)nth;
    return CLSA_SYNC;
}

size_t clsa_rope_append_scratch(const struct clsa_rope_append *p, int nth) {
    (void)p, (void)nth;
    return CLSA_SYNC;
}

size_t clsa_route_scratch(const struct clsa_route *p, int nth) {
    return CLSA_SYNC +
           2 * (size_t)nth * (size_t)MIN(p->batch.n_rows, ROUTE_ROWS) * candidates_bytes(MIN(p->k, p->n_columns));
}

size_t clsa_score_scratch(const struct clsa_score *p, int nth) {
    (void)p, (void)nth;
    return CLSA_SYNC;
}

size_t clsa_topk_scratch(const struct clsa_topk *p, int nth) {
    (void)nth;
    return CLSA_SYNC + candidates_bytes(MIN(p->k, p->n));
}

#include "vec_avx2.h"

#include "attend_impl.h"

void clsa_gather_attention_avx2(const struct clsa_gather_attention *p, int ith, int nth, void *scratch) {
    struct attend a = {p->batch, p->n_head, p->n_kv, p->d,        0,        p->scale,    p->q,
                       p->out,   p->k,      p->v,    p->selected, p->count, p->n_columns};
    attend(&a, ith, nth, scratch);
}

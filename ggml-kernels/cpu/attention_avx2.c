#include "vec_avx2.h"

#include "attend_impl.h"

void clsa_attention_avx2(const struct clsa_attention *p, int ith, int nth, void *scratch) {
    struct attend a = {p->batch, p->n_head, p->n_kv, p->d, p->window, p->scale, p->q,
                       p->out,   p->k,      p->v,    NULL, NULL,      0};
    attend(&a, ith, nth, scratch);
}

#include "vec_avx2.h"

#include "route_impl.h"

void clsa_route_avx2(const struct clsa_route *p, int ith, int nth, void *scratch) { route(p, ith, nth, scratch); }

void clsa_score_avx2(const struct clsa_score *p, int ith, int nth, void *scratch) {
    (void)scratch;
    score(p, ith, nth);
}

void clsa_topk_avx2(const struct clsa_topk *p, int ith, int nth, void *scratch) {
    (void)nth;
    if (ith == 0)
        topk(p, scratch);
}

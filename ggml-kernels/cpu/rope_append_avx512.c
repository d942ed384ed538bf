#include "vec_avx512.h"

#include "rope_append_impl.h"

void clsa_rope_append_avx512(const struct clsa_rope_append *p, int ith, int nth, void *scratch) {
    (void)scratch;
    rope_append(p, ith, nth);
}

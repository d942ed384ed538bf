// Sizes of matmul's buffers, for every instruction set.
#include "matmul_layout.h"

size_t clsa_packed_bytes(int32_t n_rows, int32_t n_in, int32_t forms) {
    size_t q8 = forms & CLSA_FORM_Q8 ? q8_bytes(n_rows, n_in) : 0;
    return q8 + (forms & CLSA_FORM_F32 ? (size_t)n_rows * F32_STRIDE(n_in) * sizeof(float) : 0);
}

size_t clsa_pack_scratch(const struct clsa_pack *p, int nth) {
    (void)p, (void)nth;
    return CLSA_SYNC;
}

size_t clsa_matmul_scratch(const struct clsa_matmul *p, int nth) {
    return CLSA_SYNC + (size_t)nth * mm_scratch_of(p, 0, NULL).bytes;
}

// Sizes of matmul's buffers and the repacking of weights, for every instruction set.
#include "matmul_layout.h"

size_t clsa_packed_bytes(int32_t n_rows, int32_t n_in, int32_t forms) {
    size_t q8 = forms & CLSA_FORM_Q8 ? q8_bytes(n_rows, n_in) : 0;
    size_t f32 = forms & CLSA_FORM_F32 ? (size_t)n_rows * F32_STRIDE(n_in) * sizeof(float) : 0;
    size_t bf16 = forms & CLSA_FORM_BF16 ? bf16_bytes(n_rows, n_in) : 0;
    return q8 + f32 + bf16 + (forms & CLSA_FORM_I8 ? i8_bytes(n_rows, n_in) : 0);
}

size_t clsa_pack_scratch(const struct clsa_pack *p, int nth) {
    (void)p, (void)nth;
    return CLSA_SYNC;
}

size_t clsa_matmul_scratch(const struct clsa_matmul *p, int nth) {
    return CLSA_SYNC + (size_t)nth * mm_scratch_of(p, 0, NULL).bytes;
}

void clsa_repack(int32_t type, const uint8_t *w, int32_t n_out, int32_t n_in, int32_t first, int32_t n_groups,
                 uint8_t *out) {
    const size_t block = mm_block_bytes(type), row_bytes = mm_row_bytes(type, n_in), dwords = block / 4;
    // The f16 that is left over stands first, or last in the formats of 256 values.
    const size_t skip = block % 4 && mm_block_values(type) == 32 ? 2 : 0, f16_at = skip ? 0 : block - 2;
    for (int32_t g = 0; g < n_groups; g++)
        for (size_t b = 0; b < row_bytes / block; b++, out += 16 * block)
            for (size_t o = 0; o < 16; o++) {
                const size_t row = (size_t)first + 16 * (size_t)g + o;
                const uint8_t *from = w + row * row_bytes + b * block;
                for (size_t i = 0; i < dwords; i++) {
                    uint32_t v = 0;
                    if (row < (size_t)n_out)
                        memcpy(&v, from + skip + 4 * i, 4);
                    memcpy(out + 64 * i + 4 * o, &v, 4);
                }
                if (block % 4) {
                    uint16_t v = 0;
                    if (row < (size_t)n_out)
                        memcpy(&v, from + f16_at, 2);
                    memcpy(out + 64 * dwords + 2 * o, &v, 2);
                }
            }
}

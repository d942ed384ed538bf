// limits.h with AVX2: pmaddubsw, the 8-bit multiplication there is, without the additions that follow it.
#include "common.h"
#include "limits.h"
#include <immintrin.h>

double clsa_limit_int8_avx2(int64_t steps) {
    __m256i v = _mm256_set1_epi8(1), to[10];
    for (int64_t i = 0; i < steps; i++)
#pragma clang loop unroll(full)
        for (int k = 0; k < 10; k++)
            __asm__ volatile("vpmaddubsw %1, %1, %0" : "=x"(to[k]) : "x"(v));
    return (double)steps * 10 * 64;
}

double clsa_limit_f32_avx2(int64_t steps) {
    __m256 v = _mm256_set1_ps(0.5f), sum[10];
#pragma clang loop unroll(full)
    for (int k = 0; k < 10; k++)
        sum[k] = v;
    for (int64_t i = 0; i < steps; i++)
#pragma clang loop unroll(full)
        for (int k = 0; k < 10; k++)
            __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(sum[k]) : "x"(v));
    return (double)steps * 10 * 16;
}

void clsa_limit_read_avx2(const uint8_t *memory, size_t bytes) {
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
        __m256i to;
#pragma clang loop unroll(full)
        for (int k = 0; k < 8; k++)
            __asm__ volatile("vmovdqu %1, %0" : "=x"(to) : "m"(*(const __m256i_u *)(memory + i + 32 * k)));
    }
}

// limits.h with AVX-512 and VNNI.
#include "common.h"
#include "limits.h"
#include <immintrin.h>

double clsa_limit_int8_avx512vnni(int64_t steps) {
    __m512i v = _mm512_set1_epi8(1), sum[12];
#pragma clang loop unroll(full)
    for (int k = 0; k < 12; k++)
        sum[k] = v;
    for (int64_t i = 0; i < steps; i++)
#pragma clang loop unroll(full)
        for (int k = 0; k < 12; k++)
            __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(sum[k]) : "v"(v));
    return (double)steps * 12 * 128;
}

double clsa_limit_f32_avx512vnni(int64_t steps) {
    __m512 v = _mm512_set1_ps(0.5f), sum[12];
#pragma clang loop unroll(full)
    for (int k = 0; k < 12; k++)
        sum[k] = v;
    for (int64_t i = 0; i < steps; i++)
#pragma clang loop unroll(full)
        for (int k = 0; k < 12; k++)
            __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(sum[k]) : "v"(v));
    return (double)steps * 12 * 32;
}

void clsa_limit_read_avx512vnni(const uint8_t *memory, size_t bytes) {
    for (size_t i = 0; i + 512 <= bytes; i += 512) {
        __m512i to;
#pragma clang loop unroll(full)
        for (int k = 0; k < 8; k++)
            __asm__ volatile("vmovdqu64 %1, %0" : "=v"(to) : "m"(*(const __m512i_u *)(memory + i + 64 * k)));
    }
}

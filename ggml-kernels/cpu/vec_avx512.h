// The vector operations that the SIMD kernels are written in, for AVX-512 (F, BW, DQ, VL).
#pragma once
#include "common.h"
#include <immintrin.h>

#define ISA avx512
#define VL 16 // lanes
// Register blocks: rows x 2 vectors of keys, rows x up to so many vectors of values.
#define QK_ROWS 12
#define PV_ROWS 6
#define PV_VECTORS 4

typedef __m512 vf;
typedef __m512i vi;

ALWAYS_INLINE vf vf_load(const float *x) { return _mm512_loadu_ps(x); }
ALWAYS_INLINE void vf_store(float *x, vf a) { _mm512_storeu_ps(x, a); }
ALWAYS_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
ALWAYS_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
ALWAYS_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
ALWAYS_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
ALWAYS_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// The second where either is NaN.
ALWAYS_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
ALWAYS_INLINE float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }
ALWAYS_INLINE float vf_hsum(vf a) { return _mm512_reduce_add_ps(a); }
ALWAYS_INLINE float vf_first(vf a) { return _mm512_cvtss_f32(a); }
ALWAYS_INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
ALWAYS_INLINE vf vf_from_f16(const uint8_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }
ALWAYS_INLINE vf vf_from_i8(const uint8_t *x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
}
ALWAYS_INLINE void vf_to_f16(uint8_t *x, vf a) {
    _mm256_storeu_si256((__m256i *)x, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
ALWAYS_INLINE void vf_to_i8(uint8_t *x, vf a) {
    _mm_storeu_si128((__m128i *)x, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}
// Lanes first <= i < end of a, -inf in the others.
ALWAYS_INLINE vf vf_keep(vf a, int32_t first, int32_t end) {
    uint32_t below = end >= VL ? 0xffff : end <= 0 ? 0 : (1u << end) - 1;
    uint32_t skip = first <= 0 ? 0 : first >= VL ? 0xffff : (1u << first) - 1;
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(below & ~skip), a);
}

// 2^x for x <= 0, relative error below 5e-7, exact at 0; 0 below -126; NaN stays.
ALWAYS_INLINE vf vf_exp2(vf x) {
    const vf magic = vf_set1(0x1.8p23f);
    __mmask16 alive = _mm512_cmp_ps_mask(x, vf_set1(-126), _CMP_NLT_UQ);
    vf n = vf_add(x, magic), f = vf_sub(x, vf_sub(n, magic));
    vf p = vf_set1(1.1125507682416e-3f);
    p = vf_fma(p, f, vf_set1(9.6662825246809e-3f));
    p = vf_fma(p, f, vf_set1(5.5574004733210e-2f));
    p = vf_fma(p, f, vf_set1(2.4022350650686e-1f));
    p = vf_fma(p, f, vf_set1(6.9314283060835e-1f));
    p = vf_fma(p, f, vf_set1(1));
    vi exponent = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(alive, _mm512_castps_si512(p), exponent));
}

// Integers, for keys that order as their scores do.
ALWAYS_INLINE vi vi_load(const int32_t *x) { return _mm512_loadu_si512(x); }
ALWAYS_INLINE void vi_store(int32_t *x, vi a) { _mm512_storeu_si512(x, a); }
ALWAYS_INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
ALWAYS_INLINE vi vi_iota(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
ALWAYS_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
ALWAYS_INLINE vi vi_min(vi a, vi b) { return _mm512_min_epi32(a, b); }
ALWAYS_INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
ALWAYS_INLINE int32_t vi_hmin(vi a) { return _mm512_reduce_min_epi32(a); }
ALWAYS_INLINE int32_t vi_hmax(vi a) { return _mm512_reduce_max_epi32(a); }
// Bits of the lanes where a > b, a == b.
ALWAYS_INLINE uint32_t vi_gt(vi a, vi b) { return _mm512_cmpgt_epi32_mask(a, b); }
ALWAYS_INLINE uint32_t vi_eq(vi a, vi b) { return _mm512_cmpeq_epi32_mask(a, b); }
// Stores the lanes in `mask` side by side; writes a whole vector.
ALWAYS_INLINE void vi_compress(int32_t *out, vi a, uint32_t mask) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)mask, a));
}
// Order-preserving integers: -0 is +0, NaN is -inf.
ALWAYS_INLINE vi vi_key(vf a) {
    a = _mm512_mask_mov_ps(vf_add(a, vf_set1(0)), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), vf_set1(-INFINITY));
    vi bits = _mm512_castps_si512(a);
    return _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
}
// Lane i of the result: the sum of the lanes of a[i], each in the same order.
ALWAYS_INLINE vf vf_sums(vf a[VL]) {
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++) { // lanes apart by 8
        vf low = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), high = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee);
        a[i] = vf_add(low, high);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) { // by 4
        vf low = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), high = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        a[i] = vf_add(low, high);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < 2; i++) // by 2
        a[i] = vf_add(_mm512_unpacklo_ps(a[i], a[i + 2]), _mm512_unpackhi_ps(a[i], a[i + 2]));
    a[0] = vf_add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    // By now the 128-bit lanes hold a[0..4], a[8..12], a[4..8], a[12..16].
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15), a[0]);
}

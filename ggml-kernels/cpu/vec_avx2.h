// The vector operations that the SIMD kernels are written in, for AVX2 with FMA and F16C.
#pragma once
#include "common.h"
#include <immintrin.h>

#define ISA avx2
#define VL 8 // lanes
// Register blocks: rows x 2 vectors of keys, rows x up to so many vectors of values.
#define QK_ROWS 6
#define PV_ROWS 6
#define PV_VECTORS 2

typedef __m256 vf;
typedef __m256i vi;

ALWAYS_INLINE vf vf_load(const float *x) { return _mm256_loadu_ps(x); }
ALWAYS_INLINE void vf_store(float *x, vf a) { _mm256_storeu_ps(x, a); }
ALWAYS_INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }
ALWAYS_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
ALWAYS_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
ALWAYS_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
ALWAYS_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
// The second where either is NaN.
ALWAYS_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
ALWAYS_INLINE float vf_hmax(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
ALWAYS_INLINE float vf_hsum(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
ALWAYS_INLINE float vf_first(vf a) { return _mm256_cvtss_f32(a); }
ALWAYS_INLINE vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
ALWAYS_INLINE vf vf_from_f16(const uint8_t *x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)); }
ALWAYS_INLINE vf vf_from_i8(const uint8_t *x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
}
ALWAYS_INLINE void vf_to_f16(uint8_t *x, vf a) {
    _mm_storeu_si128((__m128i *)x, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
ALWAYS_INLINE void vf_to_i8(uint8_t *x, vf a) {
    vi i = _mm256_cvtps_epi32(a);
    __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i *)x, _mm_packs_epi16(w, w));
}
// Lanes first <= i < end of a, -inf in the others.
ALWAYS_INLINE vf vf_keep(vf a, int32_t first, int32_t end) {
    vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    vi in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), a, _mm256_castsi256_ps(in));
}

// 2^x for x <= 0, relative error below 5e-7, exact at 0; 0 below -126; NaN stays.
ALWAYS_INLINE vf vf_exp2(vf x) {
    const vf magic = vf_set1(0x1.8p23f);
    vf alive = _mm256_cmp_ps(x, vf_set1(-126), _CMP_NLT_UQ);
    vf n = vf_add(x, magic), f = vf_sub(x, vf_sub(n, magic));
    vf p = vf_set1(1.1125507682416e-3f);
    p = vf_fma(p, f, vf_set1(9.6662825246809e-3f));
    p = vf_fma(p, f, vf_set1(5.5574004733210e-2f));
    p = vf_fma(p, f, vf_set1(2.4022350650686e-1f));
    p = vf_fma(p, f, vf_set1(6.9314283060835e-1f));
    p = vf_fma(p, f, vf_set1(1));
    vi scaled = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(n), 23));
    return _mm256_and_ps(alive, _mm256_castsi256_ps(scaled));
}

// Integers, for keys that order as their scores do.
ALWAYS_INLINE vi vi_load(const int32_t *x) { return _mm256_loadu_si256((const __m256i *)x); }
ALWAYS_INLINE void vi_store(int32_t *x, vi a) { _mm256_storeu_si256((__m256i *)x, a); }
ALWAYS_INLINE vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
ALWAYS_INLINE vi vi_iota(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
ALWAYS_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
ALWAYS_INLINE vi vi_min(vi a, vi b) { return _mm256_min_epi32(a, b); }
ALWAYS_INLINE vi vi_max(vi a, vi b) { return _mm256_max_epi32(a, b); }
ALWAYS_INLINE int32_t vi_hmin(vi a) {
    __m128i x = _mm_min_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    x = _mm_min_epi32(x, _mm_unpackhi_epi64(x, x));
    return _mm_cvtsi128_si32(_mm_min_epi32(x, _mm_srli_epi64(x, 32)));
}
ALWAYS_INLINE int32_t vi_hmax(vi a) {
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    x = _mm_max_epi32(x, _mm_unpackhi_epi64(x, x));
    return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_srli_epi64(x, 32)));
}
// Bits of the lanes where a > b, a == b.
ALWAYS_INLINE uint32_t vi_gt(vi a, vi b) {
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)));
}
ALWAYS_INLINE uint32_t vi_eq(vi a, vi b) {
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)));
}
// Stores the lanes in `mask` side by side; writes a whole vector.
ALWAYS_INLINE void vi_compress(int32_t *out, vi a, uint32_t mask) {
    uint64_t lanes = _pext_u64(0x0706050403020100, _pdep_u64(mask, 0x0101010101010101) * 255);
    vi_store(out, _mm256_permutevar8x32_epi32(a, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)lanes))));
}
// Order-preserving integers: -0 is +0, NaN is -inf.
ALWAYS_INLINE vi vi_key(vf a) {
    a = _mm256_blendv_ps(vf_add(a, vf_set1(0)), vf_set1(-INFINITY), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    vi bits = _mm256_castps_si256(a);
    return _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
}
// Lane i of the result: the sum of the lanes of a[i], each in the same order.
ALWAYS_INLINE vf vf_sums(vf a[VL]) {
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) // lanes apart by 4
        a[i] = vf_add(_mm256_permute2f128_ps(a[i], a[i + 4], 0x20), _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
#pragma clang loop unroll(full)
    for (int i = 0; i < 2; i++) // by 2
        a[i] = vf_add(_mm256_unpacklo_ps(a[i], a[i + 2]), _mm256_unpackhi_ps(a[i], a[i + 2]));
    return vf_add(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
}

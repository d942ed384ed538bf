// The operations that matmul is written in, with AVX-512 F, BW, DQ, VL, VNNI, VBMI and VBMI2: 16 lanes of 32 bits.
#pragma once
#include "matmul_layout.h"
#include <immintrin.h>

#define VNNI 1 // unsigned codes of 8 bits multiply without saturating
typedef __m512i I;
#define W 16
#define FLOAT_OUTS 4
#define FLOAT_ROWS 6
typedef __m512 V;
ALWAYS_INLINE V v_zero(void) { return _mm512_setzero_ps(); }
ALWAYS_INLINE V v_set1(float f) { return _mm512_set1_ps(f); }
ALWAYS_INLINE V v_load(const float *p) { return _mm512_loadu_ps(p); }
ALWAYS_INLINE void v_store(float *p, V v) { _mm512_storeu_ps(p, v); }
ALWAYS_INLINE V v_add(V a, V b) { return _mm512_add_ps(a, b); }
ALWAYS_INLINE V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
ALWAYS_INLINE V v_div(V a, V b) { return _mm512_div_ps(a, b); }
ALWAYS_INLINE V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE float v_sum(V v) {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
ALWAYS_INLINE V v_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
ALWAYS_INLINE V v_bf16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
// exp: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
ALWAYS_INLINE V v_exp(V x) {
    x = _mm512_min_ps(_mm512_set1_ps(128), _mm512_max_ps(_mm512_set1_ps(-128), x));
    const V n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), 8);
    V r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e400p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    V p = _mm512_set1_ps(0x1.6a2432p-10f);
    p = v_fma(p, r, v_set1(0x1.1239e2p-7f));
    p = v_fma(p, r, v_set1(0x1.5558f2p-5f));
    p = v_fma(p, r, v_set1(0x1.555492p-3f));
    p = v_fma(p, r, v_set1(0x1.fffffcp-2f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_set1(1.0f)));
    return _mm512_scalef_ps(p, n);
}
#define i_add32(...) _mm512_add_epi32(__VA_ARGS__)
#define i_add8(...) _mm512_add_epi8(__VA_ARGS__)
#define i_sub32(...) _mm512_sub_epi32(__VA_ARGS__)
#define i_and(...) _mm512_and_si512(__VA_ARGS__)
#define i_xor(...) _mm512_xor_si512(__VA_ARGS__)
#define i_set32(...) _mm512_set1_epi32(__VA_ARGS__)
#define i_set8(...) _mm512_set1_epi8(__VA_ARGS__)
#define i_zero(...) _mm512_setzero_si512(__VA_ARGS__)
#define i_sll32(...) _mm512_slli_epi32(__VA_ARGS__)
#define i_srl32(...) _mm512_srli_epi32(__VA_ARGS__)
#define i_sra32(...) _mm512_srai_epi32(__VA_ARGS__)
#define i_srl16(...) _mm512_srli_epi16(__VA_ARGS__)
#define i_sll16(...) _mm512_slli_epi16(__VA_ARGS__)
#define v_from32(...) _mm512_cvtepi32_ps(__VA_ARGS__)
#define v_fnma(...) _mm512_fnmadd_ps(__VA_ARGS__)
#define v_sub(...) _mm512_sub_ps(__VA_ARGS__)
#define i_store(...) _mm512_store_si512(__VA_ARGS__)
#define v_xor(...) _mm512_xor_ps(__VA_ARGS__)
#define i_load(p) _mm512_loadu_si512(p)
#define i_joined(a, b) _mm512_shrdi_epi32(a, b, 16) // high half of a, low half of b

// sum + the dot products of four vectors of codes with 4 values of x each, `stride` bytes apart.
ALWAYS_INLINE I dot4(I sum, const I q[4], const int8_t *x, size_t stride, enum mm_kind kind, int log2_bias) {
    (void)kind, (void)log2_bias;
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
        int32_t xk;
        memcpy(&xk, x + k * stride, 4);
        sum = _mm512_dpbusd_epi32(sum, q[k], _mm512_set1_epi32(xk));
    }
    return sum;
}

struct src {
    const uint8_t *w;
    size_t stride;
};

// 16 bytes of 16 rows -> v[k]: lane o holds bytes 4k..4k+3 of row o.
ALWAYS_INLINE void load16(struct src w, size_t at, size_t skip, int packed, __m512i v[4]) {
    if (packed) {
#pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++)
            v[k] = _mm512_loadu_si512(w.w + 16 * (at - skip) + 64 * k);
        return;
    }
    __m512i a[4];
#pragma clang loop unroll(full)
    for (int e = 0; e < 4; e++) { // 128-bit lane l of a[e]: row 4l + e
        const uint8_t *p = w.w + at + e * w.stride;
        __m256i lo = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
        lo = _mm256_inserti128_si256(lo, _mm_loadu_si128((const __m128i *)(p + 4 * w.stride)), 1);
        __m256i hi = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(p + 8 * w.stride)));
        hi = _mm256_inserti128_si256(hi, _mm_loadu_si128((const __m128i *)(p + 12 * w.stride)), 1);
        a[e] = _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
    }
    __m512i lo01 = _mm512_unpacklo_epi32(a[0], a[1]), hi01 = _mm512_unpackhi_epi32(a[0], a[1]);
    __m512i lo23 = _mm512_unpacklo_epi32(a[2], a[3]), hi23 = _mm512_unpackhi_epi32(a[2], a[3]);
    v[0] = _mm512_unpacklo_epi64(lo01, lo23);
    v[1] = _mm512_unpackhi_epi64(lo01, lo23);
    v[2] = _mm512_unpacklo_epi64(hi01, hi23);
    v[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

// 4 bytes of 16 rows.
ALWAYS_INLINE __m512i load4(struct src w, size_t at, size_t skip, int packed) {
    if (packed)
        return _mm512_loadu_si512(w.w + 16 * (at - skip));
    __m128i a[4];
#pragma clang loop unroll(full)
    for (int l = 0; l < 4; l++) {
        int32_t v[4];
        for (int e = 0; e < 4; e++)
            memcpy(&v[e], w.w + at + (4 * l + e) * w.stride, 4);
        a[l] = _mm_setr_epi32(v[0], v[1], v[2], v[3]);
    }
    __m256i lo = _mm256_inserti128_si256(_mm256_castsi128_si256(a[0]), a[1], 1);
    __m256i hi = _mm256_inserti128_si256(_mm256_castsi128_si256(a[2]), a[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}

// The f16 of 16 blocks of `size` bytes.
ALWAYS_INLINE __m512 load_f16(struct src w, size_t at, size_t size, int packed) {
    if (packed)
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w.w + 16 * (size - 2))));
    int16_t v[16];
#pragma clang loop unroll(full)
    for (int o = 0; o < 16; o++)
        memcpy(&v[o], w.w + at + o * w.stride, 2);
    return _mm512_cvtph_ps(_mm256_setr_epi16(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11],
                                             v[12], v[13], v[14], v[15]));
}

ALWAYS_INLINE __m512 f16_low(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
// a | (b & mask)
ALWAYS_INLINE __m512i or_and8(__m512i a, __m512i b, int mask) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8((char)mask), 0xf8);
}
// The bytes that 4-bit codes of IQ4 stand for, plus 128.
ALWAYS_INLINE __m512i iq4_bytes(__m512i codes) {
    const __m128i table = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153, (char)166,
                                        (char)181, (char)197, (char)217, (char)241);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

// Bits at .. at + 4 of each lane of `bits` -> bit 4 of its bytes 0 .. 3.
ALWAYS_INLINE __m512i spread(__m512i bits, int at) {
    uint64_t from = 0;
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++)
        from |= (uint64_t)((at + i % 4 - 4 + (i < 4 ? 0 : 32)) & 63) << 8 * i;
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64((int64_t)from), bits);
}

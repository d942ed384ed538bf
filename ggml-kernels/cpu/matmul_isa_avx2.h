// The operations that matmul is written in, with AVX2, FMA and F16C: 16 lanes of 32 bits in two halves.
#pragma once
// Sixteen registers hold the products of one row; more rows share panels.
#define FEW_TILE 1
#define FEW_ROWS 1
#include "matmul_layout.h"
#include <immintrin.h>

#define VNNI 0 // codes multiply to 16 bits: of 8 bits only with their sign apart, and never 16 times as large
#define W 16
#define FLOAT_OUTS 2
#define FLOAT_ROWS 2
typedef struct {
    __m256i lo, hi;
} I;
typedef struct {
    __m256 lo, hi;
} V;

#define MM_BOTH(T, name, params, lo_, hi_)                                                                             \
    ALWAYS_INLINE T name params { return (T){lo_, hi_}; }
MM_BOTH(I, i_add32, (I a, I b), _mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi))
MM_BOTH(I, i_add8, (I a, I b), _mm256_add_epi8(a.lo, b.lo), _mm256_add_epi8(a.hi, b.hi))
MM_BOTH(I, i_sub32, (I a, I b), _mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi))
MM_BOTH(I, i_and, (I a, I b), _mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi))
MM_BOTH(I, i_xor, (I a, I b), _mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi))
MM_BOTH(I, i_set32, (int32_t v), _mm256_set1_epi32(v), _mm256_set1_epi32(v))
MM_BOTH(I, i_set8, (char v), _mm256_set1_epi8(v), _mm256_set1_epi8(v))
MM_BOTH(I, i_zero, (void), _mm256_setzero_si256(), _mm256_setzero_si256())
MM_BOTH(I, i_sll32, (I a, unsigned n), _mm256_slli_epi32(a.lo, (int)n), _mm256_slli_epi32(a.hi, (int)n))
MM_BOTH(I, i_srl32, (I a, unsigned n), _mm256_srli_epi32(a.lo, (int)n), _mm256_srli_epi32(a.hi, (int)n))
MM_BOTH(I, i_sra32, (I a, unsigned n), _mm256_srai_epi32(a.lo, (int)n), _mm256_srai_epi32(a.hi, (int)n))
MM_BOTH(I, i_srl16, (I a, unsigned n), _mm256_srli_epi16(a.lo, (int)n), _mm256_srli_epi16(a.hi, (int)n))
MM_BOTH(I, i_sll16, (I a, unsigned n), _mm256_slli_epi16(a.lo, (int)n), _mm256_slli_epi16(a.hi, (int)n))
MM_BOTH(V, v_from32, (I a), _mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi))
MM_BOTH(V, v_fma, (V a, V b, V c), _mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi))
MM_BOTH(V, v_fnma, (V a, V b, V c), _mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi))
MM_BOTH(V, v_add, (V a, V b), _mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi))
MM_BOTH(V, v_sub, (V a, V b), _mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi))
MM_BOTH(V, v_mul, (V a, V b), _mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi))
MM_BOTH(V, v_div, (V a, V b), _mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi))
MM_BOTH(V, v_xor, (V a, V b), _mm256_xor_ps(a.lo, b.lo), _mm256_xor_ps(a.hi, b.hi))
MM_BOTH(V, v_set1, (float x), _mm256_set1_ps(x), _mm256_set1_ps(x))
MM_BOTH(V, v_zero, (void), _mm256_setzero_ps(), _mm256_setzero_ps())
MM_BOTH(V, v_load, (const float *p), _mm256_loadu_ps(p + 8 * 0), _mm256_loadu_ps(p + 8 * 1))
MM_BOTH(I, i_load, (const void *p), _mm256_loadu_si256((const __m256i *)p + 0),
        _mm256_loadu_si256((const __m256i *)p + 1))
MM_BOTH(V, v_f16, (const void *p), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 0)),
        _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1)))
MM_BOTH(V, v_bf16, (const void *p),
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + 0)), 16)),
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + 1)), 16)))
MM_BOTH(I, i_joined, (I a, I b), _mm256_or_si256(_mm256_srli_epi32(a.lo, 16), _mm256_slli_epi32(b.lo, 16)),
        _mm256_or_si256(_mm256_srli_epi32(a.hi, 16), _mm256_slli_epi32(b.hi, 16)))
#undef MM_BOTH
ALWAYS_INLINE void v_store(float *p, V v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
ALWAYS_INLINE void i_store(void *p, I v) {
    _mm256_storeu_si256((__m256i *)p, v.lo);
    _mm256_storeu_si256((__m256i *)p + 1, v.hi);
}
ALWAYS_INLINE float v_sum(V v) {
    __m256 h = _mm256_add_ps(v.lo, v.hi);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
// exp: 2^n times a polynomial on [-ln2/2, ln2/2]; from exp(-87) to exp(88). NaN stays NaN.
ALWAYS_INLINE __m256 exp8(__m256 x) {
    x = _mm256_min_ps(_mm256_set1_ps(88), _mm256_max_ps(_mm256_set1_ps(-87), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)), 8);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e400p-1f), x), p = _mm256_set1_ps(0x1.6a2432p-10f);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.1239e2p-7f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.5558f2p-5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.555492p-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.fffffcp-2f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1)));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}
ALWAYS_INLINE V v_exp(V x) { return (V){exp8(x.lo), exp8(x.hi)}; }

// Sums of four products of 8 bits each. pairs(): of codes up to 63. signed_dot(): of w, whatever it is.
ALWAYS_INLINE __m256i widened(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
ALWAYS_INLINE __m256i signed_dot(__m256i w, __m256i x) {
    return widened(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
}
// 16 bits hold the sums of eight products with codes up to 31, of four with codes up to 63 (x is within +-127).
ALWAYS_INLINE __m256i dot16(__m256i sum, const __m256i q[4], const __m256i x[4], int with_sign, int six_bits) {
    if (with_sign) {
#pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++)
            sum = _mm256_add_epi32(sum, signed_dot(_mm256_xor_si256(q[k], _mm256_set1_epi8((char)0x80)), x[k]));
        return sum;
    }
    const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(q[0], x[0]), _mm256_maddubs_epi16(q[1], x[1]));
    const __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(q[2], x[2]), _mm256_maddubs_epi16(q[3], x[3]));
    if (six_bits)
        return _mm256_add_epi32(sum, _mm256_add_epi32(widened(a), widened(b)));
    return _mm256_add_epi32(sum, widened(_mm256_add_epi16(a, b)));
}
ALWAYS_INLINE I dot4(I sum, const I q[4], const int8_t *x, size_t stride, enum mm_kind kind, int log2_bias) {
    const int with_sign = kind == S32 && log2_bias == 7, six_bits = kind == S16;
    __m256i lo[4], hi[4], xk[4];
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
        int32_t v;
        memcpy(&v, x + k * stride, 4);
        xk[k] = _mm256_set1_epi32(v), lo[k] = q[k].lo, hi[k] = q[k].hi;
    }
    return (I){dot16(sum.lo, lo, xk, with_sign, six_bits), dot16(sum.hi, hi, xk, with_sign, six_bits)};
}

// 16 rows of weights, as they lie in the file (stride > 0), or repacked.
struct src {
    const uint8_t *w;
    size_t stride;
};

ALWAYS_INLINE __m256i two_rows(const uint8_t *p, size_t apart) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)),
                                   _mm_loadu_si128((const __m128i *)(p + apart)), 1);
}
ALWAYS_INLINE void turn(const __m256i a[4], __m256i v[4]) {
    __m256i lo01 = _mm256_unpacklo_epi32(a[0], a[1]), hi01 = _mm256_unpackhi_epi32(a[0], a[1]);
    __m256i lo23 = _mm256_unpacklo_epi32(a[2], a[3]), hi23 = _mm256_unpackhi_epi32(a[2], a[3]);
    v[0] = _mm256_unpacklo_epi64(lo01, lo23), v[1] = _mm256_unpackhi_epi64(lo01, lo23);
    v[2] = _mm256_unpacklo_epi64(hi01, hi23), v[3] = _mm256_unpackhi_epi64(hi01, hi23);
}
// 16 bytes of 16 rows -> v[k]: lane o holds bytes 4k..4k+3 of row o.
ALWAYS_INLINE void load16(struct src w, size_t at, size_t skip, int packed, I v[4]) {
    __m256i lo[4], hi[4];
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
        if (packed)
            v[k] = i_load(w.w + 16 * (at - skip) + 64 * k);
        else
            lo[k] = two_rows(w.w + at + k * w.stride, 4 * w.stride),
            hi[k] = two_rows(w.w + at + (8 + k) * w.stride, 4 * w.stride);
    }
    if (packed)
        return;
    turn(lo, lo), turn(hi, hi);
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++)
        v[k] = (I){lo[k], hi[k]};
}
// 4 bytes of 16 rows.
ALWAYS_INLINE I load4(struct src w, size_t at, size_t skip, int packed) {
    if (packed)
        return i_load(w.w + 16 * (at - skip));
    int32_t v[16];
    for (int o = 0; o < 16; o++)
        memcpy(&v[o], w.w + at + o * w.stride, 4);
    return i_load(v);
}
// The f16 of 16 blocks of `size` bytes.
ALWAYS_INLINE V load_f16(struct src w, size_t at, size_t size, int packed) {
    if (packed)
        return v_f16(w.w + 16 * (size - 2));
    int16_t v[16];
    for (int o = 0; o < 16; o++)
        memcpy(&v[o], w.w + at + o * w.stride, 2);
    return v_f16(v);
}
ALWAYS_INLINE V f16_low(I v) {
    v = i_and(v, i_set32(0xffff));
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(v.lo, v.hi), 0xd8);
    return (V){_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
// a | (b & mask)
ALWAYS_INLINE I or_and8(I a, I b, int mask) {
    b = i_and(b, i_set8((char)mask));
    return (I){_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
// The bytes that 4-bit codes of IQ4 stand for, plus 128.
ALWAYS_INLINE I iq4_bytes(I codes) {
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153,
                                                  (char)166, (char)181, (char)197, (char)217, (char)241));
    return (I){_mm256_shuffle_epi8(table, codes.lo), _mm256_shuffle_epi8(table, codes.hi)};
}
// Bits at .. at + 3 of each lane of `bits` -> bit 4 of its bytes 0 .. 3.
ALWAYS_INLINE I spread(I bits, int at) {
    const __m256i times = _mm256_set1_epi32(0x00204081);
    bits = i_and(i_srl32(bits, (unsigned)at), i_set32(15));
    bits = (I){_mm256_mullo_epi32(bits.lo, times), _mm256_mullo_epi32(bits.hi, times)};
    return i_sll32(i_and(bits, i_set32(0x01010101)), 4);
}

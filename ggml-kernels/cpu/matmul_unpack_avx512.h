// Unpackers: 16 rows of quantized weights at a time, turned so that lane o of a vector belongs to output o.
//
// An unpacker walks along the rows and hands on, per block of 32 values (or half block), eight (four) vectors of
// unsigned bytes (lane o: values 4k..4k+3 of row o) and the scale and minimum of each row: w = s * (q - bias) or w = s
// * q - m. Where they go is the sink's business: into a panel that many rows of x are multiplied with, or straight into
// a dot product. Everything here is inlined into one function per type and sink.
#pragma once
#include "matmul_layout.h"
#include <immintrin.h>

// `rows` = 0: a panel. Otherwise that many rows of x (a compile-time constant), which form one tile.
struct sink {
    uint8_t *panel;
    struct q8_tile x;
    const uint8_t *ahead; // weights to prefetch
    __m512 acc[4];
};

// Bytes of 32 x 16 weights in a panel: q [8][16][4], s, (m); halves: s of both, (m of both).
ALWAYS_INLINE size_t panel_block(enum mm_kind kind) { return 512 + 64 * (kind == S32 ? 1 : kind == M16 ? 4 : 2); }

// A block's dot products (of each row of x) on the way.
struct dots {
    __m512i i[4];
};

// Starts the sum of a block (S32, M32) or of its half (S16, M16). log2_bias: of the weights' bias; -1 where there is
// none.
ALWAYS_INLINE void start(const struct sink *to, int rows, enum mm_kind kind, int log2_bias, int b, int half,
                         struct dots *d) {
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) {
        int32_t sum = 0;
        if (kind == S32)
            sum = to->x.i32[b * rows + r] >> (7 - log2_bias);
        if (kind == S16)
            sum = to->x.i16[(2 * b + half) * rows + r] >> (5 - log2_bias);
        d->i[r] = kind == S32 || kind == S16 ? _mm512_set1_epi32(sum) : _mm512_setzero_si512();
    }
}

// Values 16 * half .. + 16 of block b.
ALWAYS_INLINE void put(const struct sink *to, int rows, enum mm_kind kind, int log2_bias, int b, int half,
                       const __m512i q[4], struct dots *d) {
    if (rows == 0) { // a panel holds one bias for all types of a kind
        const int bias = kind == S32 ? 128 - (1 << log2_bias) : kind == S16 ? 32 - (1 << log2_bias) : 0;
        __m512i *out = (__m512i *)(to->panel + (size_t)b * panel_block(kind)) + 4 * half;
#pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++)
            _mm512_store_si512(out + k, bias ? _mm512_add_epi8(q[k], _mm512_set1_epi8((char)bias)) : q[k]);
    }
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++)
#pragma clang loop unroll(full)
        for (int r = 0; r < rows; r++) {
            int32_t x;
            memcpy(&x, to->x.q + (((size_t)b * 8 + 4 * half + k) * rows + r) * 4, 4);
            d->i[r] = _mm512_dpbusd_epi32(d->i[r], q[k], _mm512_set1_epi32(x));
        }
}

ALWAYS_INLINE __m512 fold(__m512 acc, __m512i dot, __m512 s, float xs) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(s, _mm512_set1_ps(xs)), acc);
}

// Ends the sum of a block or of its half. `half` is 0 for whole blocks; m is unused without minima.
ALWAYS_INLINE void finish(struct sink *to, int rows, enum mm_kind kind, int b, int half, __m512 s, __m512 m,
                          const struct dots *d) {
    if (rows == 0) {
        float *out = (float *)(to->panel + (size_t)b * panel_block(kind) + 512);
        _mm512_store_ps(out + 16 * half, s);
        if (kind == M32 || kind == M16)
            _mm512_store_ps(out + 16 * (kind == M32 ? 1 : 2 + half), m);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) {
        float xs = to->x.s[b * rows + r];
        to->acc[r] = fold(to->acc[r], d->i[r], s, xs);
        if (kind == M32)
            to->acc[r] = _mm512_fnmadd_ps(m, _mm512_set1_ps(to->x.f[b * rows + r]), to->acc[r]);
        if (kind == M16)
            to->acc[r] = _mm512_fnmadd_ps(
                m, _mm512_set1_ps(xs * -0x1p-5f * (float)to->x.i16[(2 * b + half) * rows + r]), to->acc[r]);
    }
}

// Weights of the next group of rows come to the cache while this one is worked on: `bytes` of each of 16 rows.
ALWAYS_INLINE void prefetch(struct sink *to, int rows, size_t bytes) {
    if (rows == 0)
        return;
    for (size_t i = 0; i < 16 * bytes; i += 64)
        _mm_prefetch((const char *)to->ahead + i, _MM_HINT_T1);
    to->ahead += 16 * bytes;
}

// 16 bytes of 16 rows -> v[k]: lane o holds bytes 4k..4k+3 of row o.
ALWAYS_INLINE void load16(const uint8_t *p, size_t stride, __m512i v[4]) {
    __m512i a[4];
#pragma clang loop unroll(full)
    for (int e = 0; e < 4; e++) { // 128-bit lane l of a[e]: row 4l + e
        const uint8_t *at = p + e * stride;
        __m256i lo = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)at));
        lo = _mm256_inserti128_si256(lo, _mm_loadu_si128((const __m128i *)(at + 4 * stride)), 1);
        __m256i hi = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(at + 8 * stride)));
        hi = _mm256_inserti128_si256(hi, _mm_loadu_si128((const __m128i *)(at + 12 * stride)), 1);
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
ALWAYS_INLINE __m512i load4(const uint8_t *p, size_t stride) {
    __m128i a[4];
#pragma clang loop unroll(full)
    for (int l = 0; l < 4; l++) {
        int32_t w[4];
        for (int e = 0; e < 4; e++)
            memcpy(&w[e], p + (4 * l + e) * stride, 4);
        a[l] = _mm_setr_epi32(w[0], w[1], w[2], w[3]);
    }
    __m256i lo = _mm256_inserti128_si256(_mm256_castsi128_si256(a[0]), a[1], 1);
    __m256i hi = _mm256_inserti128_si256(_mm256_castsi128_si256(a[2]), a[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}

// An f16 of 16 rows.
ALWAYS_INLINE __m512 load_f16(const uint8_t *p, size_t stride) {
    int16_t w[16];
#pragma clang loop unroll(full)
    for (int o = 0; o < 16; o++)
        memcpy(&w[o], p + o * stride, 2);
    return _mm512_cvtph_ps(_mm256_setr_epi16(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11],
                                             w[12], w[13], w[14], w[15]));
}

ALWAYS_INLINE __m512 f16_low(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
ALWAYS_INLINE __m512 f16_high(__m512i v) { return f16_low(_mm512_srli_epi32(v, 16)); }
ALWAYS_INLINE __m512i and8(__m512i v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8((char)mask)); }
// a | (b & mask)
ALWAYS_INLINE __m512i or_and8(__m512i a, __m512i b, int mask) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8((char)mask), 0xf8);
}
// Byte i of each lane, as a float.
ALWAYS_INLINE __m512 byte_ps(__m512i v, int i) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(i ? _mm512_srli_epi32(v, 8 * (unsigned)i) : v, _mm512_set1_epi32(0xff)));
}
ALWAYS_INLINE __m512 signed_byte_ps(__m512i v, int i) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * (unsigned)i), 24));
}

// The bytes that 4-bit codes of IQ4 stand for, plus 128.
ALWAYS_INLINE __m512i iq4_bytes(__m512i codes) {
    const __m128i table = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153, (char)166,
                                        (char)181, (char)197, (char)217, (char)241);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

// What the formats of 32 values with 4-bit codes have in common. fifth: bits 4, [o] = 32 bits of row o. iq4: codes go
// through the table.
ALWAYS_INLINE void nibbles32(const uint8_t *p, size_t stride, int b, struct sink *to, int rows, enum mm_kind kind,
                             int log2_bias, int iq4, const __m512i *fifth, struct dots *d) {
    __m512i v[4], q[4];
    load16(p, stride, v);
#pragma clang loop unroll(full)
    for (int half = 0; half < 2; half++) {
#pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++) {
            q[k] = and8(half ? _mm512_srli_epi16(v[k], 4) : v[k], 15);
            if (iq4)
                q[k] = iq4_bytes(q[k]);
            if (fifth) { // bit 16 * half + 4k + i of a lane -> bit 4 of its byte i
                const int at = 16 * half + 4 * k - 4;
                const __m512i from =
                    _mm512_set1_epi64((int64_t)((uint64_t)((at + 35) & 63) << 56 | (uint64_t)((at + 34) & 63) << 48 |
                                                (uint64_t)((at + 33) & 63) << 40 | (uint64_t)((at + 32) & 63) << 32 |
                                                (uint64_t)((at + 3) & 63) << 24 | (uint64_t)((at + 2) & 63) << 16 |
                                                (uint64_t)((at + 1) & 63) << 8 | (uint64_t)(at & 63)));
                q[k] = or_and8(q[k], _mm512_multishift_epi64_epi8(from, *fifth), 16);
            }
        }
        put(to, rows, kind, log2_bias, b, half, q, d);
    }
}

// Formats of blocks of 32: `size` bytes, the quants at `at`, five bits at `high` (0: four bits).
ALWAYS_INLINE void blocks32(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows, enum mm_kind kind,
                            int log2_bias, int iq4, size_t size, size_t at, size_t high) {
    for (int b = 0; b < nb; b++, w += size) {
        struct dots d;
        __m512i fifth;
        prefetch(to, rows, size);
        start(to, rows, kind, log2_bias, b, 0, &d);
        if (high)
            fifth = load4(w + high, stride);
        nibbles32(w + at, stride, b, to, rows, kind, log2_bias, iq4, high ? &fifth : NULL, &d);
        if (kind == M32) {
            __m512i dm = load4(w, stride); // d, m: w = d q + m
            finish(to, rows, kind, b, 0, f16_low(dm), _mm512_sub_ps(_mm512_setzero_ps(), f16_high(dm)), &d);
        } else {
            finish(to, rows, kind, b, 0, load_f16(w, stride), _mm512_setzero_ps(), &d);
        }
    }
}

ALWAYS_INLINE void unpack_Q4_0(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    blocks32(w, stride, nb, to, rows, S32, 3, 0, 18, 2, 0);
}
ALWAYS_INLINE void unpack_Q4_1(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    blocks32(w, stride, nb, to, rows, M32, -1, 0, 20, 4, 0);
}
ALWAYS_INLINE void unpack_Q5_0(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    blocks32(w, stride, nb, to, rows, S32, 4, 0, 22, 6, 2);
}
ALWAYS_INLINE void unpack_Q5_1(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    blocks32(w, stride, nb, to, rows, M32, -1, 0, 24, 8, 4);
}
ALWAYS_INLINE void unpack_IQ4_NL(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    blocks32(w, stride, nb, to, rows, S32, 7, 1, 18, 2, 0);
}

// d, then 32 signed bytes.
ALWAYS_INLINE void unpack_Q8_0(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    for (int b = 0; b < nb; b++, w += 34) {
        struct dots d;
        prefetch(to, rows, 34);
        start(to, rows, S32, 7, b, 0, &d);
#pragma clang loop unroll(full)
        for (int half = 0; half < 2; half++) {
            __m512i q[4];
            load16(w + 2 + 16 * half, stride, q);
#pragma clang loop unroll(full)
            for (int k = 0; k < 4; k++)
                q[k] = _mm512_xor_si512(q[k], _mm512_set1_epi8((char)0x80));
            put(to, rows, S32, 7, b, half, q, &d);
        }
        finish(to, rows, S32, b, 0, load_f16(w, stride), _mm512_setzero_ps(), &d);
    }
}

// d, dmin, 12 bytes of 6-bit scales and minima, (32 bytes of fifth bits,) 128 bytes of codes. Two blocks share 32
// bytes.
ALWAYS_INLINE void super_45(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows, int five) {
    const size_t size = five ? 176 : 144;
    for (int sb = 0; sb < nb / 8; sb++, w += size) {
        __m512i h[4], sc[2], mn[2], bits[8];
        load16(w, stride, h);
        const __m512 dd = f16_low(h[0]), dmin = f16_high(h[0]);
        sc[0] = and8(h[1], 0x3f);
        mn[0] = and8(h[2], 0x3f);
        sc[1] = or_and8(and8(h[3], 15), _mm512_srli_epi32(h[1], 2), 0x30);
        mn[1] = or_and8(and8(_mm512_srli_epi32(h[3], 4), 15), _mm512_srli_epi32(h[2], 2), 0x30);
        if (five) {
            load16(w + 16, stride, bits);
            load16(w + 32, stride, bits + 4);
        }
#pragma clang loop unroll(full)
        for (int c = 0; c < 4; c++) {
            const int b = 8 * sb + 2 * c;
            struct dots lo, hi;
            prefetch(to, rows, size / 4);
            start(to, rows, M32, -1, b, 0, &lo);
            start(to, rows, M32, -1, b + 1, 0, &hi);
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                __m512i v[4], q[4];
                load16(w + (five ? 48 : 16) + 32 * c + 16 * half, stride, v);
#pragma clang loop unroll(full)
                for (int k = 0; k < 4; k++) {
                    q[k] = and8(v[k], 15);
                    if (five) {
                        const __m512i f = bits[4 * half + k];
                        q[k] = or_and8(q[k], c < 2 ? _mm512_slli_epi16(f, 4 - 2 * c) : _mm512_srli_epi16(f, 2 * c - 4),
                                       16);
                    }
                }
                put(to, rows, M32, -1, b, half, q, &lo);
#pragma clang loop unroll(full)
                for (int k = 0; k < 4; k++) { // four bits: left where they are, 16 times as large
                    q[k] = and8(five ? _mm512_srli_epi16(v[k], 4) : v[k], five ? 0x0f : 0xf0);
                    if (five) {
                        const __m512i f = bits[4 * half + k];
                        q[k] = or_and8(q[k], c < 2 ? _mm512_slli_epi16(f, 3 - 2 * c) : _mm512_srli_epi16(f, 2 * c - 3),
                                       16);
                    }
                }
                put(to, rows, M32, -1, b + 1, half, q, &hi);
            }
            const int i = 2 * c % 4;
            const __m512 d_hi = five ? dd : _mm512_mul_ps(dd, _mm512_set1_ps(0x1p-4f));
            finish(to, rows, M32, b, 0, _mm512_mul_ps(dd, byte_ps(sc[c / 2], i)),
                   _mm512_mul_ps(dmin, byte_ps(mn[c / 2], i)), &lo);
            finish(to, rows, M32, b + 1, 0, _mm512_mul_ps(d_hi, byte_ps(sc[c / 2], i + 1)),
                   _mm512_mul_ps(dmin, byte_ps(mn[c / 2], i + 1)), &hi);
        }
    }
}

ALWAYS_INLINE void unpack_Q4_K(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    super_45(w, stride, nb, to, rows, 0);
}
ALWAYS_INLINE void unpack_Q5_K(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    super_45(w, stride, nb, to, rows, 1);
}

// d, 2 high bits of 8 scales of 6 bits, their 4 low bits, 128 bytes of codes.
ALWAYS_INLINE void unpack_IQ4_XS(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    for (int sb = 0; sb < nb / 8; sb++, w += 136) {
        const __m512i h = load4(w, stride), low = load4(w + 4, stride);
        const __m512 dd = f16_low(h);
#pragma clang loop unroll(full)
        for (int i = 0; i < 8; i++) {
            const int b = 8 * sb + i;
            struct dots d;
            prefetch(to, rows, 17);
            start(to, rows, S32, 7, b, 0, &d);
            nibbles32(w + 8 + 16 * i, stride, b, to, rows, S32, 7, 1, NULL, &d);
            __m512i s = _mm512_and_si512(_mm512_srli_epi32(low, 4 * (unsigned)i), _mm512_set1_epi32(15));
            s = _mm512_ternarylogic_epi32(s, _mm512_srli_epi32(h, 12 + 2 * (unsigned)i), _mm512_set1_epi32(0x30), 0xf8);
            s = _mm512_sub_epi32(s, _mm512_set1_epi32(32));
            finish(to, rows, S32, b, 0, _mm512_mul_ps(dd, _mm512_cvtepi32_ps(s)), _mm512_setzero_ps(), &d);
        }
    }
}

// Formats with a scale for 16 values go through 128 values in the order half 0 of four blocks, half 1 of four blocks:
// that is how their bits lie together. Panels are multiplied in that order too.

// 128 bytes of low nibbles, 64 of high bits, 16 signed scales, d.
ALWAYS_INLINE void unpack_Q6_K(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    for (int sb = 0; sb < nb / 8; sb++, w += 210) {
        __m512i sc[4];
        load16(w + 192, stride, sc);
        const __m512 dd = load_f16(w + 208, stride);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                __m512i low[2][4], high[4], q[4];
                load16(w + 64 * n + 16 * half, stride, low[0]);
                load16(w + 64 * n + 32 + 16 * half, stride, low[1]);
                load16(w + 128 + 32 * n + 16 * half, stride, high);
                prefetch(to, rows, 53);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) { // bits 2j of high; nibble j / 2 of low[j % 2]
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half;
                    struct dots d;
                    start(to, rows, S16, 5, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++) {
                        const __m512i l = low[j % 2][k], h = high[k];
                        q[k] = and8(j < 2 ? l : _mm512_srli_epi16(l, 4), 15);
                        q[k] = or_and8(q[k],
                                       j == 0   ? _mm512_slli_epi16(h, 4)
                                       : j == 1 ? _mm512_slli_epi16(h, 2)
                                       : j == 2 ? h
                                                : _mm512_srli_epi16(h, 2),
                                       0x30);
                    }
                    put(to, rows, S16, 5, b, half, q, &d);
                    finish(to, rows, S16, b, half, _mm512_mul_ps(dd, signed_byte_ps(sc[is / 4], is % 4)),
                           _mm512_setzero_ps(), &d);
                }
            }
    }
}

// 32 bytes of third bits, 64 of two low bits, 12 bytes of 6-bit scales, d.
ALWAYS_INLINE void unpack_Q3_K(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    for (int sb = 0; sb < nb / 8; sb++, w += 110) {
        const __m512i a0 = load4(w + 96, stride), a1 = load4(w + 100, stride), a2 = load4(w + 104, stride);
        const __m512i sc[4] = {or_and8(and8(a0, 15), _mm512_slli_epi32(a2, 4), 0x30),
                               or_and8(and8(a1, 15), _mm512_slli_epi32(a2, 2), 0x30),
                               or_and8(and8(_mm512_srli_epi32(a0, 4), 15), a2, 0x30),
                               or_and8(and8(_mm512_srli_epi32(a1, 4), 15), _mm512_srli_epi32(a2, 2), 0x30)};
        const __m512 dd = load_f16(w + 108, stride);
        __m512i third[8];
        load16(w, stride, third);
        load16(w + 16, stride, third + 4);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                __m512i low[4], q[4];
                load16(w + 32 + 32 * n + 16 * half, stride, low);
                prefetch(to, rows, 28);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) {
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half, bit = 4 * n + j;
                    struct dots d;
                    start(to, rows, S16, 2, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++) {
                        const __m512i t = third[4 * half + k];
                        q[k] = and8(j ? _mm512_srli_epi16(low[k], 2 * (unsigned)j) : low[k], 3);
                        q[k] = or_and8(q[k],
                                       bit < 2   ? _mm512_slli_epi16(t, 2 - (unsigned)bit)
                                       : bit > 2 ? _mm512_srli_epi16(t, (unsigned)bit - 2)
                                                 : t,
                                       4);
                    }
                    put(to, rows, S16, 2, b, half, q, &d);
                    __m512 s = _mm512_sub_ps(byte_ps(sc[is / 4], is % 4), _mm512_set1_ps(32));
                    finish(to, rows, S16, b, half, _mm512_mul_ps(dd, s), _mm512_setzero_ps(), &d);
                }
            }
    }
}

// 16 bytes of 4-bit scales and minima, 64 bytes of codes, d, dmin.
ALWAYS_INLINE void unpack_Q2_K(const uint8_t *w, size_t stride, int nb, struct sink *to, int rows) {
    for (int sb = 0; sb < nb / 8; sb++, w += 84) {
        __m512i sc[4];
        load16(w, stride, sc);
        const __m512i dm = load4(w + 80, stride);
        const __m512 dd = f16_low(dm), dmin = f16_high(dm);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                __m512i low[4], q[4];
                load16(w + 16 + 32 * n + 16 * half, stride, low);
                prefetch(to, rows, 21);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) {
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half;
                    struct dots d;
                    start(to, rows, M16, -1, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++)
                        q[k] = and8(j ? _mm512_srli_epi16(low[k], 2 * (unsigned)j) : low[k], 3);
                    put(to, rows, M16, -1, b, half, q, &d);
                    const __m512 s = byte_ps(and8(sc[is / 4], 15), is % 4);
                    const __m512 m = byte_ps(and8(_mm512_srli_epi16(sc[is / 4], 4), 15), is % 4);
                    finish(to, rows, M16, b, half, _mm512_mul_ps(dd, s), _mm512_mul_ps(dmin, m), &d);
                }
            }
    }
}

// Unpackers: 16 rows of quantized weights at a time, turned so that lane o of a vector belongs to output o.
//
// An unpacker walks along the rows and hands on, per block of 32 values (or half block), eight (four) vectors of
// unsigned bytes (lane o: values 4k..4k+3 of row o) and the scale and minimum of each row: w = s * (q - bias) or w = s
// * q - m. Where they go is the sink's business: into a panel that many rows of x are multiplied with, or straight into
// dot products. Everything here is inlined into one function per type, layout and sink.
#pragma once
#include "matmul_layout.h"
#include <immintrin.h>

// `rows` = 0: a panel. Otherwise that many rows of x (a compile-time constant), which form one tile.
#define SINK_ROWS FEW_TILE
struct sink {
    uint8_t *panel;
    struct q8_tile x;
    const uint8_t *ahead; // weights to prefetch
    __m512 acc[SINK_ROWS];
    __m512 part[4][SINK_ROWS]; // S16, M16: blocks of which half is done
};

// A block's dot products on the way: in `by16`, of values that are 16 times too large.
struct dots {
    __m512i i[SINK_ROWS], by16[SINK_ROWS];
};

// 16 rows of weights, as they lie in the file (stride > 0), or repacked: units of 16 blocks, first the dwords of 16
// rows one after another, then the f16 that leaves a block's size odd. `packed` is a compile-time constant.
struct src {
    const uint8_t *w;
    size_t stride;
};

// Bytes of 32 x 16 weights in a panel: q [8][16][4], s, (m); halves: s of both, (m of both).
ALWAYS_INLINE size_t panel_block(enum mm_kind kind) { return 512 + 64 * (kind == S32 ? 1 : kind == M16 ? 4 : 2); }

// ---- Sinks

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
        d->by16[r] = _mm512_setzero_si512();
    }
}

// Values 16 * half .. + 16 of block b.
ALWAYS_INLINE void put(const struct sink *to, int rows, enum mm_kind kind, int log2_bias, int b, int half,
                       const __m512i q[4], __m512i *sum) {
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
            sum[r] = _mm512_dpbusd_epi32(sum[r], q[k], _mm512_set1_epi32(x));
        }
}

// acc += dot * s * xs (- m * f)
ALWAYS_INLINE __m512 fold32(__m512 acc, __m512i dot, __m512 s, float xs) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(s, _mm512_set1_ps(xs)), acc);
}
ALWAYS_INLINE __m512 fold_min(__m512 acc, __m512 m, float f) { return _mm512_fnmadd_ps(m, _mm512_set1_ps(f), acc); }
// Halves: part = dot_0 * s_0 (- m_0 * sum_0), then += dot_1 * s_1 (- m_1 * sum_1), then acc += part * xs. sum32: -32
// sum(q)
ALWAYS_INLINE __m512 half_first(__m512i dot, __m512 s) { return _mm512_mul_ps(_mm512_cvtepi32_ps(dot), s); }
ALWAYS_INLINE __m512 half_next(__m512 part, __m512i dot, __m512 s) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), s, part);
}
ALWAYS_INLINE __m512 half_min(__m512 part, __m512 m32, int32_t sum32) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_set1_epi32(sum32)), m32, part);
}
ALWAYS_INLINE __m512 fold_halves(__m512 acc, __m512 part, float xs) {
    return _mm512_fmadd_ps(part, _mm512_set1_ps(xs), acc);
}

// Ends the sum of a block (S32, M32). m is unused without minima.
ALWAYS_INLINE void finish(struct sink *to, int rows, enum mm_kind kind, int b, __m512 s, __m512 m, const struct dots *d,
                          int with_by16) {
    if (rows == 0) {
        float *out = (float *)(to->panel + (size_t)b * panel_block(kind) + 512);
        _mm512_store_ps(out, s);
        if (kind == M32)
            _mm512_store_ps(out + 16, m);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) {
        const __m512i dot = with_by16 ? _mm512_add_epi32(d->i[r], _mm512_srai_epi32(d->by16[r], 4)) : d->i[r];
        to->acc[r] = fold32(to->acc[r], dot, s, to->x.s[b * rows + r]);
        if (kind == M32)
            to->acc[r] = fold_min(to->acc[r], m, to->x.f[b * rows + r]);
    }
}

// Ends the sum of half a block (S16, M16); halves 0 of up to four blocks may come before their halves 1. m32: minima
// / 32.
ALWAYS_INLINE void finish_half(struct sink *to, int rows, enum mm_kind kind, int b, int half, __m512 s, __m512 m32,
                               const struct dots *d) {
    if (rows == 0) {
        float *out = (float *)(to->panel + (size_t)b * panel_block(kind) + 512);
        _mm512_store_ps(out + 16 * half, s);
        if (kind == M16)
            _mm512_store_ps(out + 16 * (2 + half), m32);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) {
        __m512 *part = &to->part[b % 4][r];
        *part = half ? half_next(*part, d->i[r], s) : half_first(d->i[r], s);
        if (kind == M16)
            *part = half_min(*part, m32, to->x.i16[(2 * b + half) * rows + r]);
        if (half)
            to->acc[r] = fold_halves(to->acc[r], *part, to->x.s[b * rows + r]);
    }
}

// Weights to come are brought to the L2 cache: `bytes` of each of 16 rows.
ALWAYS_INLINE void prefetch(struct sink *to, int rows, size_t bytes) {
    if (rows == 0)
        return;
    for (size_t i = 0; i < 16 * bytes; i += 64)
        _mm_prefetch((const char *)to->ahead + i, _MM_HINT_T1);
    to->ahead += 16 * bytes;
}

// ---- Loads. `skip`: bytes of a block before its first dword (2 where an f16 stands there).

ALWAYS_INLINE struct src next_block(struct src w, size_t size, int packed) {
    w.w += packed ? 16 * size : size;
    return w;
}

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
ALWAYS_INLINE __m512 scaled(__m512 d, float by) { return _mm512_mul_ps(d, _mm512_set1_ps(by)); }

// The bytes that 4-bit codes of IQ4 stand for, plus 128.
ALWAYS_INLINE __m512i iq4_bytes(__m512i codes) {
    const __m128i table = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153, (char)166,
                                        (char)181, (char)197, (char)217, (char)241);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

// ---- Formats of blocks of 32

// Bits at .. at + 4 of each lane of `bits` -> bit 4 of its bytes 0 .. 3.
ALWAYS_INLINE __m512i spread(__m512i bits, int at) {
    uint64_t from = 0;
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++)
        from |= (uint64_t)((at + i % 4 - 4 + (i < 4 ? 0 : 32)) & 63) << 8 * i;
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64((int64_t)from), bits);
}

// 32 codes of 4 bits, 16 bytes a row. fifth: their bits 4. iq4: codes go through the table.
ALWAYS_INLINE void codes32(const __m512i v[4], int b, struct sink *to, int rows, enum mm_kind kind, int log2_bias,
                           int iq4, const __m512i *fifth, struct dots *d) {
    const int by16 = rows && !iq4 && !fifth; // high codes stay where they are
#pragma clang loop unroll(full)
    for (int half = 0; half < 2; half++) {
        __m512i q[4];
#pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++) {
            q[k] = half && by16 ? and8(v[k], 0xf0) : and8(half ? _mm512_srli_epi16(v[k], 4) : v[k], 15);
            if (iq4)
                q[k] = iq4_bytes(q[k]);
            if (fifth)
                q[k] = or_and8(q[k], spread(*fifth, 16 * half + 4 * k), 16);
        }
        put(to, rows, kind, log2_bias, b, half, q, half && by16 ? d->by16 : d->i);
    }
}

// What differs between them. Bytes of a block, where its d (or d and m), fifth bits (0: none) and codes are.
struct format {
    enum mm_kind kind;
    int log2_bias, iq4;
    size_t size, high, at;
};

// One block from its parts.
ALWAYS_INLINE void block32(const struct format f, int b, struct sink *to, int rows, __m512 s, __m512 m, __m512i fifth,
                           const __m512i *codes) {
    struct dots d;
    start(to, rows, f.kind, f.log2_bias, b, 0, &d);
    if (f.size == 34) { // Q8_0: signed bytes
#pragma clang loop unroll(full)
        for (int half = 0; half < 2; half++) {
            __m512i q[4];
#pragma clang loop unroll(full)
            for (int k = 0; k < 4; k++)
                q[k] = _mm512_xor_si512(codes[4 * half + k], _mm512_set1_epi8((char)0x80));
            put(to, rows, f.kind, f.log2_bias, b, half, q, d.i);
        }
    } else {
        codes32(codes, b, to, rows, f.kind, f.log2_bias, f.iq4, f.high ? &fifth : NULL, &d);
    }
    finish(to, rows, f.kind, b, s, m, &d, rows && f.size != 34 && !f.iq4 && !f.high);
}

// dwords[i]: bytes 4i..4i+3 of 16 rows. The dword at byte `at`, which is even.
ALWAYS_INLINE __m512i dword(const __m512i *dwords, size_t at) {
    return at % 4 ? _mm512_shrdi_epi32(dwords[at / 4], dwords[at / 4 + 1], 16) : dwords[at / 4];
}
ALWAYS_INLINE __m512 half_float(const __m512i *dwords, size_t at) {
    return at % 4 ? f16_high(dwords[at / 4]) : f16_low(dwords[at / 4]);
}
ALWAYS_INLINE __m512 negated(__m512 v) { return _mm512_xor_ps(v, _mm512_set1_ps(-0.0f)); }

ALWAYS_INLINE void blocks32(struct src w, int nb, struct sink *to, int rows, int packed, const struct format f) {
    const size_t skip = f.kind == M32 ? 0 : 2, n_codes = f.size == 34 ? 8 : 4;
    int b = 0;
    // Eight blocks are whole pieces of 16 bytes: every part of them is in some dword, or between two.
    for (; !packed && b + 8 <= nb; b += 8, w = next_block(w, 8 * f.size, 0)) {
        __m512i v[8 * 34 / 4];
#pragma clang loop unroll(full)
        for (size_t i = 0; i < f.size / 2; i++)
            load16(w, 16 * i, 0, 0, v + 4 * i);
#pragma clang loop unroll(full)
        for (int j = 0; j < 8; j++) {
            const size_t at = j * f.size;
            __m512i codes[8];
            prefetch(to, rows, f.size);
#pragma clang loop unroll(full)
            for (size_t k = 0; k < n_codes; k++)
                codes[k] = dword(v, at + f.at + 4 * k);
            block32(f, b + j, to, rows, half_float(v, at),
                    f.kind == M32 ? negated(half_float(v, at + 2)) : _mm512_setzero_ps(),
                    f.high ? dword(v, at + f.high) : _mm512_setzero_si512(), codes);
        }
    }
    for (; b < nb; b++, w = next_block(w, f.size, packed)) {
        __m512i codes[8], dm = _mm512_setzero_si512();
        prefetch(to, rows, f.size);
        load16(w, f.at, skip, packed, codes);
        if (n_codes == 8)
            load16(w, f.at + 16, skip, packed, codes + 4);
        if (f.kind == M32)
            dm = load4(w, 0, 0, packed);
        block32(f, b, to, rows, f.kind == M32 ? f16_low(dm) : load_f16(w, 0, f.size, packed),
                f.kind == M32 ? negated(f16_high(dm)) : _mm512_setzero_ps(),
                f.high ? load4(w, f.high, skip, packed) : _mm512_setzero_si512(), codes);
    }
}

#define MM_FORMAT(name, ...)                                                                                           \
    ALWAYS_INLINE void unpack_##name(struct src w, int nb, struct sink *to, int rows, int packed) {                    \
        blocks32(w, nb, to, rows, packed, (struct format){__VA_ARGS__});                                               \
    }
MM_FORMAT(Q4_0, S32, 3, 0, 18, 0, 2)
MM_FORMAT(Q4_1, M32, -1, 0, 20, 0, 4)
MM_FORMAT(Q5_0, S32, 4, 0, 22, 2, 6)
MM_FORMAT(Q5_1, M32, -1, 0, 24, 4, 8)
MM_FORMAT(Q8_0, S32, 7, 0, 34, 0, 2)
MM_FORMAT(IQ4_NL, S32, 7, 1, 18, 0, 2)
#undef MM_FORMAT

// ---- Formats of super-blocks of 256

// Bits of a byte moved by `left` (right where negative).
ALWAYS_INLINE __m512i moved(__m512i v, int left) {
    return left > 0 ? _mm512_slli_epi16(v, (unsigned)left) : left < 0 ? _mm512_srli_epi16(v, (unsigned)-left) : v;
}

// d, dmin, 12 bytes of 6-bit scales and minima, (32 bytes of fifth bits,) 128 bytes of codes. Two blocks share 32
// bytes.
ALWAYS_INLINE void super_45(struct src w, int nb, struct sink *to, int rows, int packed, int five) {
    const size_t size = five ? 176 : 144;
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, size, packed)) {
        __m512i h[4], sc[2], mn[2], bits[8];
        load16(w, 0, 0, packed, h);
        const __m512 dd = f16_low(h[0]), dmin = f16_high(h[0]);
        sc[0] = and8(h[1], 0x3f);
        mn[0] = and8(h[2], 0x3f);
        sc[1] = or_and8(and8(h[3], 15), _mm512_srli_epi32(h[1], 2), 0x30);
        mn[1] = or_and8(and8(_mm512_srli_epi32(h[3], 4), 15), _mm512_srli_epi32(h[2], 2), 0x30);
        if (five) {
            load16(w, 16, 0, packed, bits);
            load16(w, 32, 0, packed, bits + 4);
        }
#pragma clang loop unroll(full)
        for (int c = 0; c < 4; c++) {
            const int b = 8 * sb + 2 * c, i = 2 * c % 4;
            struct dots lo, hi;
            __m512i v[8], q[4];
            prefetch(to, rows, size / 4);
            load16(w, (five ? 48 : 16) + 32 * c, 0, packed, v);
            load16(w, (five ? 48 : 16) + 32 * c + 16, 0, packed, v + 4);
            start(to, rows, M32, -1, b, 0, &lo);
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
#pragma clang loop unroll(full)
                for (int k = 0; k < 4; k++) {
                    q[k] = and8(v[4 * half + k], 15);
                    if (five)
                        q[k] = or_and8(q[k], moved(bits[4 * half + k], 4 - 2 * c), 16);
                }
                put(to, rows, M32, -1, b, half, q, lo.i);
            }
            finish(to, rows, M32, b, _mm512_mul_ps(dd, byte_ps(sc[c / 2], i)),
                   _mm512_mul_ps(dmin, byte_ps(mn[c / 2], i)), &lo, 0);
            start(to, rows, M32, -1, b + 1, 0, &hi);
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
#pragma clang loop unroll(full)
                for (int k = 0; k < 4; k++) { // four bits: left where they are, 16 times as large
                    q[k] = five ? and8(_mm512_srli_epi16(v[4 * half + k], 4), 15) : and8(v[4 * half + k], 0xf0);
                    if (five)
                        q[k] = or_and8(q[k], moved(bits[4 * half + k], 3 - 2 * c), 16);
                }
                put(to, rows, M32, -1, b + 1, half, q, hi.i);
            }
            finish(to, rows, M32, b + 1, _mm512_mul_ps(five ? dd : scaled(dd, 0x1p-4f), byte_ps(sc[c / 2], i + 1)),
                   _mm512_mul_ps(dmin, byte_ps(mn[c / 2], i + 1)), &hi, 0);
        }
    }
}

ALWAYS_INLINE void unpack_Q4_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    super_45(w, nb, to, rows, packed, 0);
}
ALWAYS_INLINE void unpack_Q5_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    super_45(w, nb, to, rows, packed, 1);
}

// d, 2 high bits of 8 scales of 6 bits, their 4 low bits, 128 bytes of codes.
ALWAYS_INLINE void unpack_IQ4_XS(struct src w, int nb, struct sink *to, int rows, int packed) {
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, 136, packed)) {
        const __m512i h = load4(w, 0, 0, packed), low = load4(w, 4, 0, packed);
        const __m512 dd = f16_low(h);
#pragma clang loop unroll(full)
        for (int i = 0; i < 8; i++) {
            const int b = 8 * sb + i;
            struct dots d;
            __m512i v[4];
            prefetch(to, rows, 17);
            load16(w, 8 + 16 * i, 0, packed, v);
            start(to, rows, S32, 7, b, 0, &d);
            codes32(v, b, to, rows, S32, 7, 1, NULL, &d);
            __m512i s = _mm512_and_si512(_mm512_srli_epi32(low, 4 * (unsigned)i), _mm512_set1_epi32(15));
            s = _mm512_ternarylogic_epi32(s, _mm512_srli_epi32(h, 12 + 2 * (unsigned)i), _mm512_set1_epi32(0x30), 0xf8);
            s = _mm512_sub_epi32(s, _mm512_set1_epi32(32));
            finish(to, rows, S32, b, _mm512_mul_ps(dd, _mm512_cvtepi32_ps(s)), _mm512_setzero_ps(), &d, 0);
        }
    }
}

// Formats with a scale for 16 values: halves 0 of four blocks, then halves 1, as their bits lie together.

// 128 bytes of low nibbles, 64 of high bits, 16 signed scales, d.
ALWAYS_INLINE void unpack_Q6_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, 210, packed)) {
        __m512i sc[4];
        load16(w, 192, 0, packed, sc);
        const __m512 dd = load_f16(w, 208, 210, packed);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                __m512i low[2][4], high[4], q[4];
                load16(w, 64 * n + 16 * half, 0, packed, low[0]);
                load16(w, 64 * n + 32 + 16 * half, 0, packed, low[1]);
                load16(w, 128 + 32 * n + 16 * half, 0, packed, high);
                prefetch(to, rows, 53);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) { // bits 2j of high; nibble j / 2 of low[j % 2]
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half;
                    struct dots d;
                    start(to, rows, S16, 5, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++) {
                        const __m512i l = low[j % 2][k];
                        q[k] = and8(j < 2 ? l : _mm512_srli_epi16(l, 4), 15);
                        q[k] = or_and8(q[k], moved(high[k], 4 - 2 * j), 0x30);
                    }
                    put(to, rows, S16, 5, b, half, q, d.i);
                    finish_half(to, rows, S16, b, half, _mm512_mul_ps(dd, signed_byte_ps(sc[is / 4], is % 4)),
                                _mm512_setzero_ps(), &d);
                }
            }
    }
}

// 32 bytes of third bits, 64 of two low bits, 12 bytes of 6-bit scales, d.
ALWAYS_INLINE void unpack_Q3_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, 110, packed)) {
        const __m512i a0 = load4(w, 96, 0, packed), a1 = load4(w, 100, 0, packed), a2 = load4(w, 104, 0, packed);
        const __m512i sc[4] = {or_and8(and8(a0, 15), _mm512_slli_epi32(a2, 4), 0x30),
                               or_and8(and8(a1, 15), _mm512_slli_epi32(a2, 2), 0x30),
                               or_and8(and8(_mm512_srli_epi32(a0, 4), 15), a2, 0x30),
                               or_and8(and8(_mm512_srli_epi32(a1, 4), 15), _mm512_srli_epi32(a2, 2), 0x30)};
        const __m512 dd = load_f16(w, 108, 110, packed);
        __m512i third[8];
        load16(w, 0, 0, packed, third);
        load16(w, 16, 0, packed, third + 4);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                __m512i low[4], q[4];
                load16(w, 32 + 32 * n + 16 * half, 0, packed, low);
                prefetch(to, rows, 28);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) {
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half;
                    struct dots d;
                    start(to, rows, S16, 2, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++)
                        q[k] = or_and8(and8(moved(low[k], -2 * j), 3), moved(third[4 * half + k], 2 - 4 * n - j), 4);
                    put(to, rows, S16, 2, b, half, q, d.i);
                    __m512 s = _mm512_sub_ps(byte_ps(sc[is / 4], is % 4), _mm512_set1_ps(32));
                    finish_half(to, rows, S16, b, half, _mm512_mul_ps(dd, s), _mm512_setzero_ps(), &d);
                }
            }
    }
}

// 16 bytes of 4-bit scales and minima, 64 bytes of codes, d, dmin.
ALWAYS_INLINE void unpack_Q2_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, 84, packed)) {
        __m512i sc[4];
        load16(w, 0, 0, packed, sc);
        const __m512i dm = load4(w, 80, 0, packed);
        const __m512 dd = f16_low(dm), dmin = scaled(f16_high(dm), 0x1p-5f);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                __m512i low[4], q[4];
                load16(w, 16 + 32 * n + 16 * half, 0, packed, low);
                prefetch(to, rows, 21);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) {
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half;
                    struct dots d;
                    start(to, rows, M16, -1, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++)
                        q[k] = and8(moved(low[k], -2 * j), 3);
                    put(to, rows, M16, -1, b, half, q, d.i);
                    const __m512 s = byte_ps(and8(sc[is / 4], 15), is % 4);
                    const __m512 m = byte_ps(and8(_mm512_srli_epi16(sc[is / 4], 4), 15), is % 4);
                    finish_half(to, rows, M16, b, half, _mm512_mul_ps(dd, s), _mm512_mul_ps(dmin, m), &d);
                }
            }
    }
}

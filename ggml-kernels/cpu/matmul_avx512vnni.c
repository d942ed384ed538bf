// matmul.h with AVX-512 and VNNI.
//
// Up to FEW_ROWS rows: the unpackers feed the dot products directly, so that each weight byte is read once and written
// nowhere. More rows: 16 outputs at a time are unpacked into a panel that stays in the L2 cache, and tiles of TILE rows
// are multiplied with it. Lane o of every vector is output o, so both ways do the same operations in the same order.
#include "matmul_isa_avx512vnni.h"
#include "matmul_unpack.h"
#include "matmul_vector.h"
#define ISA avx512vnni

// ---- Packing

// Form Q8 of row `row`.
static void pack_q8(const struct clsa_pack *p, const float *x, float inv, int row) {
    const struct q8_tile t = q8_tile_at(p->packed, p->n_rows, p->n_in, row);
    const int h = t.h, r = row % tile_rows(p->n_rows);
    for (int b = 0; b < p->n_in / 32; b++) {
        V v[2] = {v_load(x + 32 * b), v_load(x + 32 * b + 16)};
        if (p->norm)
            for (int i = 0; i < 2; i++)
                v[i] = v_mul(v_mul(v[i], v_set1(inv)), v_load(p->norm + 32 * b + 16 * i));
        // The integer order of absolute values is theirs, with NaN above all.
        const __m512i abs0 = _mm512_castps_si512(_mm512_abs_ps(v[0])), abs1 = _mm512_castps_si512(_mm512_abs_ps(v[1]));
        const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(abs0, abs1));
        float max, s;
        memcpy(&max, &bits, 4);
        s = max * (1.0f / 127);
        const int finite = bits < 0x7f800000;
        const V id = v_set1(finite && s > 0 ? 127.0f / max : 0);
        const __m128i q0 = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v_mul(v[0], id)));
        const __m128i q1 = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v_mul(v[1], id)));
        const __m256i q = _mm256_inserti128_si256(_mm256_castsi128_si256(q0), q1, 1);
        int32_t words[8];
        _mm256_storeu_si256((__m256i *)words, q);
        // Sums of the halves: biased to unsigned bytes, whose differences from 0 add up to 64 bits.
        const __m256i sad = _mm256_sad_epu8(_mm256_xor_si256(q, _mm256_set1_epi8((char)0x80)), _mm256_setzero_si256());
        const __m128i sad0 = _mm256_castsi256_si128(sad), sad1 = _mm256_extracti128_si256(sad, 1);
        const int32_t lo = _mm_cvtsi128_si32(sad0) + _mm_extract_epi32(sad0, 2) - 16 * 128;
        const int32_t hi = _mm_cvtsi128_si32(sad1) + _mm_extract_epi32(sad1, 2) - 16 * 128;
        for (int k = 0; k < 8; k++)
            memcpy(t.q + (((size_t)b * 8 + k) * h + r) * 4, &words[k], 4);
        if (!finite)
            s = NAN;
        t.s[b * h + r] = s;
        t.f[b * h + r] = s * (float)(lo + hi);
        t.i32[b * h + r] = -128 * (lo + hi);
        t.i16[(2 * b + 0) * h + r] = -32 * lo;
        t.i16[(2 * b + 1) * h + r] = -32 * hi;
    }
}

// ---- A panel times a tile of h rows -> acc [h][16]

ALWAYS_INLINE void tile(const uint8_t *panel, const struct q8_tile *x, int nb, float *out, enum mm_kind kind, int h) {
    const int halves = kind == S16 || kind == M16 ? 2 : 1, deep = 8 / halves;
    const size_t record = panel_block(kind);
    __m512 acc[TILE];
#pragma clang loop unroll(full)
    for (int r = 0; r < h; r++)
        acc[r] = _mm512_setzero_ps();
    for (int b = 0; b < nb; b++) {
        const __m512i *w = (const __m512i *)(panel + (size_t)b * record);
        const float *scales = (const float *)(w + 8);
        const int8_t *q = x->q + (size_t)b * 32 * h;
        const float *xs = x->s + (size_t)b * h;
        const int32_t *i16 = x->i16 + (size_t)2 * b * h;
        __m512i dot[TILE];
        __m512 part[TILE];
#pragma clang loop unroll(full)
        for (int half = 0; half < halves; half++) {
#pragma clang loop unroll(full)
            for (int r = 0; r < h; r++)
                dot[r] = kind == S32   ? _mm512_set1_epi32(x->i32[(size_t)b * h + r])
                         : kind == S16 ? _mm512_set1_epi32(i16[half * h + r])
                                       : _mm512_setzero_si512();
#pragma clang loop unroll(full)
            for (int k = half * deep; k < (half + 1) * deep; k++) {
                const __m512i v = _mm512_load_si512(w + k);
#pragma clang loop unroll(full)
                for (int r = 0; r < h; r++) {
                    int32_t xk;
                    memcpy(&xk, q + (k * h + r) * 4, 4);
                    dot[r] = _mm512_dpbusd_epi32(dot[r], v, _mm512_set1_epi32(xk));
                }
            }
            if (halves == 2) {
                const __m512 s = _mm512_load_ps(scales + 16 * half);
                const __m512 m32 = kind == M16 ? _mm512_load_ps(scales + 16 * (2 + half)) : _mm512_setzero_ps();
#pragma clang loop unroll(full)
                for (int r = 0; r < h; r++) {
                    part[r] = half ? half_next(part[r], dot[r], s) : half_first(dot[r], s);
                    if (kind == M16)
                        part[r] = half_min(part[r], m32, i16[half * h + r]);
                    if (half)
                        acc[r] = fold_halves(acc[r], part[r], xs[r]);
                }
            }
        }
        if (halves == 1) {
            const __m512 s = _mm512_load_ps(scales), m = kind == M32 ? _mm512_load_ps(scales + 16) : s;
#pragma clang loop unroll(full)
            for (int r = 0; r < h; r++) {
                acc[r] = fold32(acc[r], dot[r], s, xs[r]);
                if (kind == M32)
                    acc[r] = fold_min(acc[r], m, x->f[(size_t)b * h + r]);
            }
        }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < h; r++)
        _mm512_storeu_ps(out + 16 * r, acc[r]);
}

#include "matmul_impl.h"

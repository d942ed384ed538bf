// matmul.h with AVX2: the operations of matmul_avx512vnni.c in the same order, each on two halves.
#include "matmul_isa_avx2.h"
#include "matmul_unpack.h"
#include "matmul_vector.h"
#define ISA avx2

// ---- Packing

// Form Q8 of row `row`.
static void pack_q8(const struct clsa_pack *p, const float *x, float inv, int row) {
    const struct q8_tile t = q8_tile_at(p->packed, p->n_rows, p->n_in, row);
    const int h = t.h, r = row % tile_rows(p->n_rows);
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int b = 0; b < p->n_in / 32; b++) {
        __m256 v[4];
        __m256i max8 = _mm256_setzero_si256(), q[4];
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 32 * b + 8 * i);
            if (p->norm)
                v[i] =
                    _mm256_mul_ps(_mm256_mul_ps(v[i], _mm256_set1_ps(inv)), _mm256_loadu_ps(p->norm + 32 * b + 8 * i));
            // The integer order of absolute values is theirs, with NaN above all.
            max8 = _mm256_max_epi32(max8, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
        }
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(max8), _mm256_extracti128_si256(max8, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        const int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
        float max, s;
        memcpy(&max, &bits, 4);
        s = max * (1.0f / 127);
        const int finite = bits < 0x7f800000;
        const __m256 id = _mm256_set1_ps(finite && s > 0 ? 127.0f / max : 0);
        for (int i = 0; i < 4; i++)
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], id));
        const __m256i bytes = _mm256_permutevar8x32_epi32(
            _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])),
            _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        int32_t words[8], sums[8];
        _mm256_storeu_si256((__m256i *)words, bytes);
        _mm256_storeu_si256((__m256i *)sums, widened(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes)));
        const int32_t lo = sums[0] + sums[1] + sums[2] + sums[3], hi = sums[4] + sums[5] + sums[6] + sums[7];
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

// ---- A panel times a tile of h rows -> acc [h][16]: eight outputs and AT_ONCE rows at a time, for want of registers
#define AT_ONCE 3

ALWAYS_INLINE void strip(const uint8_t *panel, const struct q8_tile *x, int nb, float *out, enum mm_kind kind, int h,
                         int first, int rows, int side) {
    const int halves = kind == S16 || kind == M16 ? 2 : 1;
    const size_t record = panel_block(kind);
    __m256 acc[AT_ONCE];
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
        acc[r] = _mm256_setzero_ps();
    for (int b = 0; b < nb; b++) {
        const uint8_t *w = panel + (size_t)b * record + 32 * side;
        const float *scales = (const float *)(w + 512);
        const float *xs = x->s + (size_t)b * h + first;
        const int32_t *i16 = x->i16 + (size_t)2 * b * h + first;
        __m256i dot[AT_ONCE];
        __m256 part[AT_ONCE];
#pragma clang loop unroll(full)
        for (int half = 0; half < 2; half++) {
            __m256i q[4];
#pragma clang loop unroll(full)
            for (int k = 0; k < 4; k++)
                q[k] = _mm256_loadu_si256((const __m256i *)(w + 64 * (4 * half + k)));
            const __m256 s = _mm256_loadu_ps(scales + (halves == 2 ? 16 * half : 0));
#pragma clang loop unroll(full)
            for (int r = 0; r < rows; r++) {
                __m256i xk[4];
#pragma clang loop unroll(full)
                for (int k = 0; k < 4; k++) {
                    int32_t v;
                    memcpy(&v, x->q + (((size_t)b * 8 + 4 * half + k) * h + first + r) * 4, 4);
                    xk[k] = _mm256_set1_epi32(v);
                }
                if (half == 0 || halves == 2)
                    dot[r] = _mm256_set1_epi32(kind == S16 ? i16[half * h + r] : 0);
                dot[r] = dot16(dot[r], q, xk, kind == S32, kind == S16);
                const __m256 f = _mm256_cvtepi32_ps(dot[r]);
                if (halves == 2) {
                    part[r] = half ? _mm256_fmadd_ps(f, s, part[r]) : _mm256_mul_ps(f, s);
                    if (kind == M16)
                        part[r] = _mm256_fmadd_ps(_mm256_set1_ps((float)i16[half * h + r]),
                                                  _mm256_loadu_ps(scales + 16 * (2 + half)), part[r]);
                    if (half)
                        acc[r] = _mm256_fmadd_ps(part[r], _mm256_set1_ps(xs[r]), acc[r]);
                } else if (half) {
                    acc[r] = _mm256_fmadd_ps(f, _mm256_mul_ps(s, _mm256_set1_ps(xs[r])), acc[r]);
                    if (kind == M32)
                        acc[r] = _mm256_fnmadd_ps(_mm256_loadu_ps(scales + 16),
                                                  _mm256_set1_ps(x->f[(size_t)b * h + first + r]), acc[r]);
                }
            }
        }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
        _mm256_storeu_ps(out + 16 * (first + r) + 8 * side, acc[r]);
}

#define MM_STRIP(kind, rows)                                                                                           \
    static void strip_##kind##_##rows(const uint8_t *panel, const struct q8_tile *x, int nb, float *out, int first,    \
                                      int side) {                                                                      \
        strip(panel, x, nb, out, kind, x->h, first, rows, side);                                                       \
    }
#define MM_STRIPS(kind) MM_STRIP(kind, 1) MM_STRIP(kind, 3)
MM_STRIPS(S32)
MM_STRIPS(M32)
MM_STRIPS(S16) MM_STRIPS(M16) typedef void strip_fn(const uint8_t *, const struct q8_tile *, int, float *, int, int);
static strip_fn *const strips[4][2] = {
    {strip_S32_1, strip_S32_3}, {strip_M32_1, strip_M32_3}, {strip_S16_1, strip_S16_3}, {strip_M16_1, strip_M16_3}};

ALWAYS_INLINE void tile(const uint8_t *panel, const struct q8_tile *x, int nb, float *out, enum mm_kind kind, int h) {
    for (int side = 0; side < 2; side++) {
        int first = 0;
        for (; first + AT_ONCE <= h; first += AT_ONCE)
            strips[kind][1](panel, x, nb, out, first, side);
        for (; first < h; first++)
            strips[kind][0](panel, x, nb, out, first, side);
    }
}

#include "matmul_impl.h"

// attention.h with AMX: ops of CLSA_AMX_ROWS rows and more over f16 and Q8_0 caches. Everything else goes to
// attention_avx512.c. As attend_impl.h, with the two products in bf16 tiles: S = Q K^T of 16 (row, head) pairs and 64
// keys, then O += P V. Softmax and sums stay in f32.
#include "vec_avx512.h"

#include "attend_impl.h"

#include "amx.h"
#include "matmul.h"

// Values j .. j + 32 of a cached row in bf16.
ALWAYS_INLINE __m512i row_bf16(const uint8_t *row, const int32_t type, int32_t j) {
    return (__m512i)_mm512_cvtne2ps_pbh(row_load(row, type, j + 16), row_load(row, type, j));
}

// 16 x 16 dwords: r[i][j] <-> r[j][i].
ALWAYS_INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
#pragma clang loop unroll(full)
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma clang loop unroll(full)
    for (int i = 0; i < 16; i += 4)
#pragma clang loop unroll(full)
        for (int h = 0; h < 2; h++) {
            r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
            r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
        }
    // r[4 q + c]: column 4 l + c of rows 4 q .. 4 q + 3 in 128-bit lane l.
#pragma clang loop unroll(full)
    for (int c = 0; c < 4; c++) {
        const __m512i low0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88),
                      high0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i low1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i high1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(low0, low1, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(high0, high1, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < 16; i++)
        r[i] = t[i];
}

// K of KV head g for a tile's keys: [4][d / 32] tiles of 16 keys and 32 dimensions, turned: row r holds dimensions 2r
// and 2r + 1 of the 16 keys. Prefetches the next tile's.
ALWAYS_INLINE void turn_k(const struct attend *a, const struct tile *rows, const struct tile *next, int32_t g,
                          const int32_t type, uint8_t *out) {
    const int32_t d = a->d, first = g * d;
    const size_t bytes = clsa_type_bytes(type, (size_t)d);
    for (int32_t i = 0; i < TILE; i += 16) {
        for (int32_t l = 0; l < 16; l++)
            prefetch(next->k[i + l] + (size_t)g * bytes, bytes);
        for (int32_t j = 0; j < d; j += 32, out += AMX_BYTES) {
            __m512i r[16];
#pragma clang loop unroll(full)
            for (int l = 0; l < 16; l++)
                r[l] = row_bf16(rows->k[i + l], type, first + j);
            transpose16(r);
#pragma clang loop unroll(full)
            for (int l = 0; l < 16; l++)
                _mm512_storeu_si512(out + 64 * l, r[l]);
        }
    }
}

// V likewise: [2][d / 16] tiles of 32 keys and 16 dimensions; row r holds keys 2r and 2r + 1. Keys with values that are
// not finite become zeros: returns their bits.
ALWAYS_INLINE uint64_t pair_v(const struct attend *a, const struct tile *rows, const struct tile *next, int32_t g,
                              const int32_t type, uint8_t *out) {
    const int32_t d = a->d, first = g * d;
    const size_t bytes = clsa_type_bytes(type, (size_t)d);
    const __m512i both = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                          21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    uint64_t bad = 0;
    for (int32_t i = 0; i < TILE; i += 2) {
        const uint8_t *row[2] = {rows->v[i], rows->v[i + 1]};
        vf sum[2] = {vf_set1(0), vf_set1(0)};
        uint8_t *to = out + (size_t)(i / 32 * (d / 16)) * AMX_BYTES + (size_t)(i % 32 / 2) * 64;
        for (int l = 0; l < 2; l++)
            prefetch(next->v[i + l] + (size_t)g * bytes, bytes);
        for (int32_t j = 0; j < d; j += 16) {
            const vf v0 = row_load(row[0], type, first + j), v1 = row_load(row[1], type, first + j);
            sum[0] = vf_fma(v0, vf_set1(0), sum[0]), sum[1] = vf_fma(v1, vf_set1(0), sum[1]);
            _mm512_storeu_si512(to + (size_t)(j / 16) * AMX_BYTES,
                                _mm512_permutexvar_epi16(both, (__m512i)_mm512_cvtne2ps_pbh(v1, v0)));
        }
        for (int l = 0; l < 2; l++) {
            if (_mm512_cmp_ps_mask(sum[l], vf_set1(0), _CMP_NEQ_UQ) == 0)
                continue;
            bad |= (uint64_t)1 << (i + l);
            for (int32_t j = 0; j < d / 16; j++)
                for (int32_t n = 0; n < 16; n++)
                    memset(to + (size_t)j * AMX_BYTES + 4 * n + 2 * l, 0, 2);
        }
    }
    return bad;
}

// s [16][TILE] = the scores of 16 pairs: q [d / 32] tiles, k as turn_k leaves it.
static void tile_scores(const uint8_t *q, const uint8_t *k, int32_t steps, float *s) {
    const size_t of_keys = (size_t)steps * AMX_BYTES;
    amx_zero(0);
    amx_zero(1);
    amx_zero(2);
    amx_zero(3);
    for (int32_t j = 0; j < steps; j++, q += AMX_BYTES, k += AMX_BYTES) {
        amx_load(4, q, 64);
        amx_load(5, k, 64);
        amx_dot_bf16(0, 4, 5);
        amx_load(6, k + of_keys, 64);
        amx_dot_bf16(1, 4, 6);
        amx_load(7, k + 2 * of_keys, 64);
        amx_dot_bf16(2, 4, 7);
        amx_load(5, k + 3 * of_keys, 64);
        amx_dot_bf16(3, 4, 5);
    }
    amx_store(0, s, 4 * TILE);
    amx_store(1, s + 16, 4 * TILE);
    amx_store(2, s + 32, 4 * TILE);
    amx_store(3, s + 48, 4 * TILE);
}

// o [16][stride] += p v: p [2] tiles, v as pair_v leaves it; two tiles of d at a time.
static void tile_weigh(const uint8_t *p, const uint8_t *v, int32_t d, float *o, size_t stride) {
    const size_t of_keys = (size_t)(d / 16) * AMX_BYTES;
    amx_load(4, p, 64);
    amx_load(5, p + AMX_BYTES, 64);
    for (int32_t j = 0; j < d; j += 32, v += 2 * AMX_BYTES) {
        amx_load(0, o + j, stride);
        amx_load(6, v, 64);
        amx_dot_bf16(0, 4, 6);
        amx_load(1, o + j + 16, stride);
        amx_load(7, v + AMX_BYTES, 64);
        amx_dot_bf16(1, 4, 7);
        amx_load(6, v + of_keys, 64);
        amx_dot_bf16(0, 5, 6);
        amx_load(7, v + of_keys + AMX_BYTES, 64);
        amx_dot_bf16(1, 5, 7);
        amx_store(0, o + j, stride);
        amx_store(1, o + j + 16, stride);
    }
}

// As attend_piece, of one KV head.
static void attend_tiles(const struct attend *a, struct work w, struct piece piece) {
    const int32_t d = a->d, group = a->n_head / a->n_kv, pairs = piece.n_rows * group, steps = d / 32;
    const size_t state = state_floats(d);
    const float factor = a->scale * 1.44269504f;
    uint8_t *q = (uint8_t *)w.q, *k = (uint8_t *)w.k, *v = (uint8_t *)w.v;
    for (int32_t p = 0; p < ROUND_UP(pairs, 16); p++) {
        const float *from = a->q + ((size_t)(piece.row + p / group) * a->n_head + piece.g * group + p % group) * d;
        uint8_t *to = q + (size_t)(p / 16 * steps) * AMX_BYTES + (size_t)(p % 16) * 64;
        for (int32_t j = 0; j < steps; j++) {
            __m512i pair = _mm512_setzero_si512();
            if (p < pairs)
                pair = (__m512i)_mm512_cvtne2ps_pbh(vf_mul(vf_load(from + 32 * j + 16), vf_set1(factor)),
                                                    vf_mul(vf_load(from + 32 * j), vf_set1(factor)));
            _mm512_storeu_si512(to + (size_t)j * AMX_BYTES, pair);
        }
        state_clear(w.chunk + p * state);
        state_clear(w.total + p * state);
    }
    struct tile tiles[2], *now = &tiles[0], *next = &tiles[1];
    int32_t tile = piece.keys.first / TILE * TILE;
    if (tile < piece.keys.end)
        find_rows(a, piece.row, tile, piece.keys.first, MIN(tile + TILE, piece.keys.end), now);
    for (; tile < piece.keys.end; tile += TILE) {
        const int32_t tile_end = MIN(tile + TILE, piece.keys.end);
        const int32_t ahead = MIN(TILE, piece.keys.end - tile - TILE); // keys of the next tile
        if (ahead > 0)
            find_rows(a, piece.row, tile + TILE, tile + TILE, tile + TILE + ahead, next);
        else
            *next = *now;
        if (tile % CHUNK_MIN == 0)
            for (int32_t p = 0; p < pairs; p++)
                if (tile % chunk_length(keys_of(a, piece.row + p / group)) == 0)
                    state_merge(w.total + p * state, w.chunk + p * state, d);
        uint64_t bad;
        if (a->k.type == CLSA_F16)
            turn_k(a, now, next, piece.g, CLSA_F16, k);
        else
            turn_k(a, now, next, piece.g, CLSA_Q8_0, k);
        if (a->v.type == CLSA_F16)
            bad = pair_v(a, now, next, piece.g, CLSA_F16, v);
        else
            bad = pair_v(a, now, next, piece.g, CLSA_Q8_0, v);
        for (int32_t p0 = 0; p0 < pairs; p0 += 16) {
            const int32_t n = MIN(16, pairs - p0);
            _Alignas(64) float s[16 * TILE];
            _Alignas(64) uint8_t weights[2][AMX_ROWS][64];
            float *states = w.chunk + p0 * state;
            struct range keys[16];
            int some = 0;
            for (int32_t i = 0; i < n; i++) {
                keys[i] = keys_of(a, piece.row + (p0 + i) / group);
                keys[i].first = MAX(keys[i].first - tile, 0), keys[i].end = MIN(keys[i].end, tile_end) - tile;
                some |= keys[i].first < keys[i].end;
            }
            if (!some)
                continue;
            tile_scores(q + (size_t)(p0 / 16 * steps) * AMX_BYTES, k, steps, s);
            for (int32_t i = 0; i < n; i++) {
                const float alpha = soften(s + i * TILE, 0, TILE, keys[i].first, keys[i].end, states + i * state);
                float *o = states + i * state + STATE_OUT;
                for (int32_t j = 0; j < d && alpha != 1; j += VL)
                    vf_store(o + j, alpha == 0 ? vf_set1(0) : vf_mul(vf_load(o + j), vf_set1(alpha)));
            }
            for (int32_t i = 0; i < 16; i++)
                for (int h = 0; h < 2; h++) {
                    const float *x = s + i * TILE + 32 * h;
                    _mm512_store_si512(weights[h][i], i < n ? (__m512i)_mm512_cvtne2ps_pbh(vf_load(x + 16), vf_load(x))
                                                            : _mm512_setzero_si512());
                }
            tile_weigh(weights[0][0], v, d, states + STATE_OUT, 4 * state);
            for (uint64_t left = bad; left; left &= left - 1) {
                const int32_t key = __builtin_ctzll(left);
                const float one = 1;
                for (int32_t i = 0; i < n; i++)
                    if (key >= keys[i].first && key < keys[i].end)
                        weigh_block(1, s + i * TILE, &one, now->v, NULL, a->v.type, piece.g * d, d, key, key + 1,
                                    states + i * state + STATE_OUT);
            }
        }
        struct tile *swap = now;
        now = next, next = swap;
    }
    for (int32_t p = 0; p < pairs; p++)
        state_merge(w.total + p * state, w.chunk + p * state, d);
}

void clsa_attention_amx(const struct clsa_attention *p, int ith, int nth, void *scratch) {
    if (p->batch.n_rows < CLSA_AMX_ROWS || p->d % 32 || p->k.type == CLSA_F32 || p->v.type == CLSA_F32) {
        clsa_attention_avx512(p, ith, nth, scratch);
        return;
    }
    struct attend a = {p->batch, p->n_head, p->n_kv, p->d, p->window, p->scale, p->q,
                       p->out,   p->k,      p->v,    NULL, NULL,      0};
    struct amx_config before;
    amx_start(&before);
    attend_blocks(&a, work_of(&a, ith, scratch), scratch, nth, attend_tiles, 1);
    team_leave(scratch, nth);
    amx_end(&before);
}

// AMX tiles: eight registers of 16 rows of 64 bytes, and C[m][n] += sum_k A[m][k] B[k][n] on them. B holds two
// values of k side by side: its row r is B[2r][n], B[2r + 1][n] for n = 0 .. 15.
//
// With CLSA_AMX_EMULATED the registers are plain arrays, so that CPUs without AMX can test the kernels.
#pragma once
#include "common.h"
#include <immintrin.h>

#define AMX_ROWS 16
#define AMX_BYTES 1024 // of a tile

// The operand of ldtilecfg.
struct amx_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct amx_config) == 64, "the operand of ldtilecfg");

#ifndef CLSA_AMX_EMULATED

// Every tile of full size; what was configured before goes to `before`. (ggml configures a thread once and for all.)
// The whole operand is named, so that it is stored before the instruction reads it.
ALWAYS_INLINE void amx_start(struct amx_config *before) {
    __asm__ volatile("sttilecfg %0" : "=m"(*before));
    _Alignas(64) struct amx_config config = {.palette = 1};
    for (int t = 0; t < 8; t++)
        config.row_bytes[t] = 64, config.rows[t] = AMX_ROWS;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
ALWAYS_INLINE void amx_end(const struct amx_config *before) {
    if (before->palette)
        __asm__ volatile("ldtilecfg %0" : : "m"(*before));
    else
        _tile_release();
}
// t, a, b, c: numbers of registers, constants.
#define amx_zero(t) _tile_zero(t)
#define amx_load(t, from, stride) _tile_loadd(t, from, stride)
#define amx_store(t, to, stride) _tile_stored(t, to, stride)
#define amx_dot_bf16(c, a, b) _tile_dpbf16ps(c, a, b)
#define amx_dot_int8(c, a, b) _tile_dpbssd(c, a, b)

#else

static _Thread_local _Alignas(64) uint8_t amx_tiles[8][AMX_ROWS][64];
static _Thread_local int amx_started;

// A use outside of amx_start and amx_end would trap on a real machine.
ALWAYS_INLINE uint8_t (*amx_tile(int t))[64] {
    if (!amx_started)
        __builtin_trap();
    return amx_tiles[t];
}
ALWAYS_INLINE void amx_start(struct amx_config *before) {
    *before = (struct amx_config){0};
    amx_started = 1;
}
ALWAYS_INLINE void amx_end(const struct amx_config *before) {
    (void)before;
    memset(amx_tiles, 0xff, sizeof amx_tiles); // NaN, for whoever reads them later
    amx_started = 0;
}
ALWAYS_INLINE void amx_zero(int t) { memset(amx_tile(t), 0, AMX_BYTES); }
ALWAYS_INLINE void amx_load(int t, const void *from, size_t stride) {
    uint8_t(*tile)[64] = amx_tile(t);
    for (size_t r = 0; r < AMX_ROWS; r++)
        memcpy(tile[r], (const uint8_t *)from + r * stride, 64);
}
ALWAYS_INLINE void amx_store(int t, void *to, size_t stride) {
    uint8_t(*tile)[64] = amx_tile(t);
    for (size_t r = 0; r < AMX_ROWS; r++)
        memcpy((uint8_t *)to + r * stride, tile[r], 64);
}
// v with values below the smallest normal number as zeros, as the instruction takes them.
ALWAYS_INLINE __m512 amx_flushed(__m512 v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(0x1p-126f), _CMP_NLT_UQ), v);
}
static __attribute__((noinline)) void amx_dot_bf16(int c, int a, int b) {
    for (int m = 0; m < AMX_ROWS; m++) {
        __m512 sum = _mm512_load_ps(amx_tile(c)[m]);
        for (int k = 0; k < 16; k++) {
            uint32_t pair;
            memcpy(&pair, amx_tile(a)[m] + 4 * k, 4);
            const __m512i w = _mm512_load_si512(amx_tile(b)[k]), high = _mm512_set1_epi32((int)0xffff0000);
            const __m512 w0 = amx_flushed(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)));
            const __m512 w1 = amx_flushed(_mm512_castsi512_ps(_mm512_and_si512(w, high)));
            const __m512 x0 = amx_flushed(_mm512_castsi512_ps(_mm512_set1_epi32((int)(pair << 16))));
            const __m512 x1 = amx_flushed(_mm512_castsi512_ps(_mm512_set1_epi32((int)(pair & 0xffff0000u))));
            sum = amx_flushed(_mm512_fmadd_ps(x1, w1, amx_flushed(_mm512_fmadd_ps(x0, w0, sum))));
        }
        _mm512_store_ps(amx_tile(c)[m], sum);
    }
}
// Signed bytes, four values of k side by side.
static __attribute__((noinline)) void amx_dot_int8(int c, int a, int b) {
    for (int m = 0; m < AMX_ROWS; m++) {
        __m512i sum = _mm512_load_si512(amx_tile(c)[m]);
        for (int k = 0; k < 16; k++) { // x + 128, which is unsigned, less 128
            int32_t x;
            memcpy(&x, amx_tile(a)[m] + 4 * k, 4);
            const __m512i bias = _mm512_set1_epi8((char)0x80), w = _mm512_load_si512(amx_tile(b)[k]);
            sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(_mm512_set1_epi32(x), bias), w);
            sum = _mm512_sub_epi32(sum, _mm512_dpbusd_epi32(_mm512_setzero_si512(), bias, w));
        }
        _mm512_store_si512(amx_tile(c)[m], sum);
    }
}

#endif

// What the CPU kernels share: where a cache row lies, its types, and how threads share work without a barrier.
#pragma once
#include "clsa.h"
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))
#define ALWAYS_INLINE static inline __attribute__((always_inline))

// Bytes of n values of a cache type. Q8_0: n is a multiple of 32.
ALWAYS_INLINE size_t clsa_type_bytes(int32_t type, size_t n) {
    return type == CLSA_F32 ? 4 * n : type == CLSA_F16 ? 2 * n : n / CLSA_QK8_0 * (CLSA_QK8_0 + 2);
}

// The cache row of position pos of the sequence in `slot`.
ALWAYS_INLINE uint8_t *clsa_row(const struct clsa_rows *rows, const struct clsa_batch *batch, int32_t slot,
                                int32_t pos) {
    if (rows->ring > 0)
        return rows->base + (size_t)slot * rows->page_stride + (size_t)(pos % rows->ring) * rows->row_stride;
    uint32_t page = batch->tables[(size_t)slot * (size_t)batch->table_stride + (size_t)(pos / CLSA_PAGE)];
    return rows->base + page * rows->page_stride + (size_t)(pos % CLSA_PAGE) * rows->row_stride;
}

// f16 <-> f32, one value, in plain C (round to nearest even; NaN stays NaN).
ALWAYS_INLINE float clsa_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 0x3ff, bits;
    float f;
    if (exp == 0) {
        f = (float)man * 0x1p-24f; // subnormal
        return sign ? -f : f;
    }
    bits = sign | (exp == 31 ? 0x7f800000 : (exp + 112) << 23) | man << 13;
    memcpy(&f, &bits, 4);
    return f;
}

ALWAYS_INLINE uint16_t clsa_f32_to_f16(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    uint16_t sign = (uint16_t)(x >> 16 & 0x8000);
    uint32_t a = x & 0x7fffffff;
    if (a > 0x7f800000)
        return sign | 0x7e00;
    if (a >= 0x477ff000)
        return sign | 0x7c00; // rounds to infinity
    if (a < 0x38800000) {     // subnormal: let the FPU round at 2^-24
        float g;
        memcpy(&g, &a, 4);
        g += 0.5f;
        memcpy(&a, &g, 4);
        return sign | (uint16_t)(a - 0x3f000000);
    }
    return sign | (uint16_t)((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13);
}

// Value i of a stored row.
ALWAYS_INLINE float clsa_value(const uint8_t *row, int32_t type, int32_t i) {
    if (type == CLSA_F32)
        return ((const float *)row)[i];
    if (type == CLSA_F16)
        return clsa_f16_to_f32(((const uint16_t *)row)[i]);
    const uint8_t *block = row + i / CLSA_QK8_0 * (CLSA_QK8_0 + 2);
    uint16_t d;
    memcpy(&d, block, 2);
    return clsa_f16_to_f32(d) * (float)(int8_t)block[2 + i % CLSA_QK8_0];
}

// route: query rows that share one pass over the keys.
#define ROUTE_ROWS 8
// Candidates that a list holds between two selections of the k best, and their bytes: (score, position) each.
ALWAYS_INLINE size_t candidates_capacity(int32_t k) { return ROUND_UP(2 * (size_t)k + 2048, 64); }
ALWAYS_INLINE size_t candidates_bytes(int32_t k) { return 8 * candidates_capacity(k); }

// Where a position's cache row lies (clsa.h), and how its values are read.
#pragma once
#include "clsa.h"
#include "primitives.cuh"

// The row of `pos` in the sequence of `slot`.
static __device__ __forceinline__ uint8_t *cache_row(const clsa_rows &rows, const clsa_batch &batch, int slot,
                                                     int pos) {
    if (rows.ring > 0)
        return rows.base + (size_t)slot * rows.page_stride + (size_t)(pos % rows.ring) * rows.row_stride;
    const uint32_t page = batch.tables[(size_t)slot * batch.table_stride + pos / CLSA_PAGE];
    return rows.base + (size_t)page * rows.page_stride + (size_t)(pos % CLSA_PAGE) * rows.row_stride;
}

// Value `i` of a row, as f32. For the general paths; the fast ones load 16 bytes at a time.
template <int TYPE> static __device__ __forceinline__ float row_value(const uint8_t *row, int i) {
    if constexpr (TYPE == CLSA_F32) {
        return reinterpret_cast<const float *>(row)[i];
    } else if constexpr (TYPE == CLSA_F16) {
        return half_to_float(reinterpret_cast<const uint16_t *>(row)[i]);
    } else {
        const uint8_t *block = row + (size_t)(i / CLSA_QK8_0) * (CLSA_QK8_0 + 2);
        return half_to_float(*reinterpret_cast<const uint16_t *>(block)) * (float)(int8_t)block[2 + i % CLSA_QK8_0];
    }
}

// Eight quants (four aligned words of two) as f16, exact.
static __device__ __forceinline__ uint4 half8_of_quants(const uint16_t *quants) {
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        // A byte b + 128 put into the low mantissa bits of 1024.0 is 1024 + 128 + b.
        const uint32_t biased = byte_perm(quants[j] ^ 0x8080u, 0x64646464u, 0x4140);
        out[j] = hsub2(biased, 0x64806480u);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// Eight consecutive values (i a multiple of 8) as f16 pairs. Q8_0: quant times scale, rounded once to f16.
// F32 rows have no such path: they are read by kernels that multiply in f32.
template <int TYPE> static __device__ __forceinline__ uint4 row_half8(const uint8_t *row, int i) {
    static_assert(TYPE == CLSA_F16 || TYPE == CLSA_Q8_0, "f16 fragments come from f16 and q8_0 rows");
    if constexpr (TYPE == CLSA_F16) {
        return load_stream_16(row + (size_t)i * 2);
    } else {
        const uint16_t *block = reinterpret_cast<const uint16_t *>(row + (size_t)(i / CLSA_QK8_0) * (CLSA_QK8_0 + 2));
        const uint32_t scale = block[0] * 0x10001u;
        const uint4 q = half8_of_quants(block + 1 + i % CLSA_QK8_0 / 2);
        return make_uint4(hmul2(q.x, scale), hmul2(q.y, scale), hmul2(q.z, scale), hmul2(q.w, scale));
    }
}

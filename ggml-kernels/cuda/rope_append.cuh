// One head of q, k or v on its way from the projection to attention and the cache (rope_append.h), by one warp.
#pragma once
#include "cache_rows.cuh"
#include "rope_append.h"
#include <float.h>

// x[d] (shared memory of this warp) = the head `in`, normalised when `norm` is not null, turned when `cos` is not.
static __device__ __forceinline__ void turn_head(float *x, const float *in, const float *norm, const clsa_rope_append &p, const float *cos,
                                                 int row, int lane) {
    const int d = p.d;
    float sum = 0;
    for (int j = lane; j < d; j += 32) {
        const float v = in[j];
        x[j] = v;
        sum = fmaf(v, v, sum);
    }
    if (norm != nullptr) {
        const float factor = 1 / sqrtf(warp_sum(sum) / (float)d + p.eps);
        for (int j = lane; j < d; j += 32) x[j] = x[j] * factor * norm[j];
    }
    __syncwarp();
    if (cos != nullptr) {
        // Each lane turns whole pairs, in place.
        const int half = p.n_rot / 2;
        for (int i = lane; i < half; i += 32) {
            const int a = p.interleaved ? 2 * i : i, b = p.interleaved ? 2 * i + 1 : i + half;
            const float c = cos[(size_t)row * half + i], s = p.sin[(size_t)row * half + i], xa = x[a], xb = x[b];
            x[a] = xa * c - xb * s;
            x[b] = xb * c + xa * s;
        }
        __syncwarp();
    }
}

// Stores d values, of which the lane holds in shared memory x[lane], x[lane + 32], ..., as values `at..at + d` of a
// cache row.
static __device__ __forceinline__ void store_head(uint8_t *row, int type, int at, const float *x, int d, int lane) {
    for (int j = lane; j < d; j += 32) {
        if (type == CLSA_F32) {
            reinterpret_cast<float *>(row)[at + j] = x[j];
        } else if (type == CLSA_F16) {
            reinterpret_cast<uint16_t *>(row)[at + j] = float_to_half(x[j]);
        } else {
            // A block of 32 is what the warp holds at a time; d is a multiple of 32.
            uint8_t *block = row + (size_t)((at + j) / CLSA_QK8_0) * (CLSA_QK8_0 + 2);
            const float scale = warp_max(fabsf(x[j])) / 127, inverse = scale >= FLT_MIN ? 1 / scale : 0;
            if (lane == 0)
                *reinterpret_cast<uint16_t *>(block) = float_to_half(scale);
            block[2 + lane] = (uint8_t)(int8_t)lrintf(x[j] * inverse);
        }
    }
}


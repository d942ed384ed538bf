// One head of q, k or v on its way from the projection to attention and the cache (rope_append.h), by one warp.
#pragma once
#include "cache_rows.cuh"
#include "rope_append.h"
#include <float.h>

// Turns pair i of x by the angle with cosine c and sine s.
static __device__ __forceinline__ void turn_pair(float *x, const clsa_rope_append &p, int i, float c, float s) {
    const int a = p.interleaved ? 2 * i : i, b = p.interleaved ? 2 * i + 1 : i + p.n_rot / 2;
    const float xa = x[a], xb = x[b];
    x[a] = xa * c - xb * s;
    x[b] = xb * c + xa * s;
}

// x[d] (shared memory of this warp) = the head `in`, normalised when `norm` is not null, turned when `cos` is not.
static __device__ __forceinline__ void turn_head(float *x, const float *in, const float *norm,
                                                 const clsa_rope_append &p, const float *cos, int row, int lane) {
    constexpr int HELD = 4; // times 32 values: loaded all at once, the rest one after the other
    const int d = p.d, half = cos != nullptr ? p.n_rot / 2 : 0;
    const size_t angles = (size_t)row * half;
    float v[HELD], weight[HELD], c[HELD / 2], s[HELD / 2], sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int j = i * 32 + lane;
        v[i] = j < d ? in[j] : 0.0f;
        weight[i] = norm != nullptr && j < d ? norm[j] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < HELD / 2; ++i) {
        const int j = i * 32 + lane;
        c[i] = j < half ? cos[angles + j] : 1.0f;
        s[i] = j < half ? p.sin[angles + j] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        sum = fmaf(v[i], v[i], sum);
    for (int j = HELD * 32 + lane; j < d; j += 32)
        sum = fmaf(in[j], in[j], sum);
    const float factor = norm != nullptr ? 1 / sqrtf(warp_sum(sum) / (float)d + p.eps) : 1.0f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (i * 32 + lane < d)
            x[i * 32 + lane] = v[i] * factor * weight[i];
    }
    for (int j = HELD * 32 + lane; j < d; j += 32)
        x[j] = norm != nullptr ? in[j] * factor * norm[j] : in[j];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < HELD / 2; ++i) {
        if (i * 32 + lane < half)
            turn_pair(x, p, i * 32 + lane, c[i], s[i]);
    }
    for (int i = HELD * 16 + lane; i < half; i += 32)
        turn_pair(x, p, i, cos[angles + i], p.sin[angles + i]);
    __syncwarp();
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

// rope_append: a warp per head normalises, rotates and stores it (rope_append.h).
#include "cache_rows.cuh"
#include "rope_append.h"
#include <float.h>

namespace {

constexpr int THREADS = 128;

// Stores d values, of which the lane holds in shared memory x[lane], x[lane + 32], ..., as values `at..at + d` of a
// cache row.
__device__ __forceinline__ void store_head(uint8_t *row, int type, int at, const float *x, int d, int lane) {
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

// Grid (heads of q, k and v over the warps of a block, rows).
__device__ __forceinline__ void rope_append_body(const clsa_rope_append &p) {
    CLSA_DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = blockIdx.y, d = p.d;
    float *x = reinterpret_cast<float *>(shared) + warp * d;
    grid_begin();
    int head = blockIdx.x * (THREADS / 32) + warp;
    const int n_q = p.q != nullptr ? p.n_head : 0, n_k = p.k_cache.base != nullptr ? p.n_kv : 0;
    const int n_v = p.v_cache.base != nullptr ? p.n_kv : 0;
    if (head >= n_q + n_k + n_v)
        return;
    const bool is_q = head < n_q, is_v = head >= n_q + n_k;
    head -= is_v ? n_q + n_k : is_q ? 0 : n_q;
    const float *in = is_q   ? p.q + ((size_t)r * p.n_head + head) * d
                      : is_v ? p.v + ((size_t)r * p.n_kv + head) * d
                             : p.k + ((size_t)r * p.n_kv + head) * d;
    const float *norm = is_v ? nullptr : is_q ? p.q_norm : p.k_norm;
    float sum = 0;
    for (int j = lane; j < d; j += 32) {
        const float v = in[j];
        x[j] = v;
        sum = fmaf(v, v, sum);
    }
    if (norm != nullptr) {
        const float factor = 1 / sqrtf(warp_sum(sum) / (float)d + p.eps);
        for (int j = lane; j < d; j += 32)
            x[j] = x[j] * factor * norm[j];
    }
    __syncwarp();
    if (p.cos != nullptr && !is_v) {
        // Each lane turns whole pairs, in place.
        const int half = p.n_rot / 2;
        for (int i = lane; i < half; i += 32) {
            const int a = p.interleaved ? 2 * i : i, b = p.interleaved ? 2 * i + 1 : i + half;
            const float c = p.cos[(size_t)r * half + i], s = p.sin[(size_t)r * half + i], xa = x[a], xb = x[b];
            x[a] = xa * c - xb * s;
            x[b] = xb * c + xa * s;
        }
        __syncwarp();
    }
    if (is_q) {
        float *out = p.q_out + ((size_t)r * p.n_head + head) * d;
        for (int j = lane; j < d; j += 32)
            out[j] = x[j];
    } else {
        const clsa_rows &rows = is_v ? p.v_cache : p.k_cache;
        store_head(cache_row(rows, p.batch, p.batch.slot[r], p.batch.pos[r]), rows.type, head * d, x, d, lane);
    }
}

} // namespace

CLSA_KERNEL(rope_append, clsa_rope_append, (THREADS, 1), (rope_append_body(p)))

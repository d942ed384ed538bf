// Exact selection by histograms of order-preserving integers: what routing and sampling share.
#pragma once
#include "primitives.cuh"

// Bins of a histogram of the high bits of 32-bit keys.
constexpr int BIN_SHIFT = 20, BINS = 1 << (32 - BIN_SHIFT);

// Unsigned order of the result = order of the scores; -0 equals +0, NaN equals -inf.
__device__ __forceinline__ uint32_t ordered(float x) {
    uint32_t u = f32_bits(x);
    if (x == 0.0f)
        u = 0;
    if (x != x)
        u = 0xff800000u;
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

__device__ __forceinline__ void zero_histogram(uint32_t *bins, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        bins[i] = 0;
    __syncthreads();
}

__device__ __forceinline__ void flush_histogram(const uint32_t *bins, uint32_t *global) {
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
        if (bins[i] != 0)
            atomicAdd(&global[i], bins[i]);
    }
}

// Exclusive prefix sum over the block's threads; *total receives the sum. `sums` is 33 words of shared memory.
template <typename T> __device__ __forceinline__ T block_prefix(T x, T *sums, T *total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T inclusive = warp_inclusive_sum(x, lane);
    __syncthreads(); // the previous use of `sums` is over
    if (lane == 31)
        sums[warp] = inclusive;
    __syncthreads();
    if (warp == 0) {
        const T own = lane < (int)(blockDim.x / 32) ? sums[lane] : 0, upto = warp_inclusive_sum(own, lane);
        sums[lane] = upto - own;
        if (lane == 31)
            sums[32] = upto;
    }
    __syncthreads();
    *total = sums[32];
    return sums[warp] + inclusive - x;
}

// The bin that holds the `need`-th largest entry: entries in higher bins, entries in it.
struct Pivot {
    uint32_t bin, above, inside;
};

// Four bins per thread, descending: thread i holds bins n-1-4i .. n-4-4i of n = 4 * blockDim.x (c.w is the highest).
__device__ __forceinline__ Pivot find_pivot(uint4 c, uint32_t n_bins, uint32_t need, uint32_t *sums,
                                            Pivot *shared_pivot) {
    uint32_t total;
    uint32_t before = block_prefix(c.x + c.y + c.z + c.w, sums, &total);
    const uint32_t counts[4] = {c.w, c.z, c.y, c.x};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (before < need && need <= before + counts[i])
            *shared_pivot = {n_bins - 1 - 4 * threadIdx.x - i, before, counts[i]};
        before += counts[i];
    }
    __syncthreads();
    return *shared_pivot;
}

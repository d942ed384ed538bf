// Softmax over tiles of scores, one after another, in the fragments of tensor-core products (prefill_attention.cuh,
// prefill_hopper.cu).
#pragma once
#include "primitives.cuh"

// Turns a tile's scores of a lane's rows g and g + 8 into weights 2^(score * factor - top), after `top` has become the
// largest scaled score that the rows have seen; what was summed before, `sum` and `out`, is rescaled to it. A score of
// -inf gives 0. `sum` is the lane's own part. Rescaling has no branch around it: the compiler would run out of
// registers.
template <int KEYS, int WIDTH>
__device__ __forceinline__ void softmax_step(float (&score)[KEYS][4], const float (&factor)[2], float (&top)[2],
                                             float (&sum)[2], float (&out)[WIDTH][4]) {
    float correction[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float largest = -INFINITY;
#pragma unroll
        for (int j = 0; j < KEYS; ++j)
            largest = fmaxf(largest, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(CLSA_FULL_WARP, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(CLSA_FULL_WARP, largest, 2));
        const float before = top[h];
        top[h] = fmaxf(before, largest * factor[h]);
        // Nothing seen yet: every weight is 2^-inf, not 2^(inf - inf).
        const float base = top[h] == -INFINITY ? 0.0f : top[h];
        correction[h] = exp2_approx(before - base);
        float weights = 0;
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i) {
                score[j][i] = exp2_approx(fmaf(score[j][i], factor[h], -base));
                weights += score[j][i];
            }
        }
        sum[h] = fmaf(sum[h], correction[h], weights);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
            out[i][j] *= correction[j / 2];
    }
}

// Attention of many consecutive rows: a flash kernel on tensor cores (mma.sync), K and V tiles of 64 positions
// double-buffered in shared memory by asynchronous copies.
//
// The query heads of one KV head are packed into the rows of the tile (row m: token m / group, head m % group), so that
// a window's edges waste little and K and V are read once per group. Tiles of positions begin at multiples of 64
// whatever the batch, so that a row's result does not depend on how a prompt was cut into batches.
#pragma once
#include "attention_cuda.h"
#include "cache_rows.cuh"
#include "softmax.cuh"

constexpr int PREFILL_THREADS = 256, PREFILL_ROWS = PREFILL_THREADS / 2, PREFILL_KEYS = 64;

// A row of a tile in shared memory is D f16; its 16-byte chunks are permuted so that eight rows' equal chunks lie in
// eight banks.
template <int D> __device__ __forceinline__ uint8_t *tile_chunk(uint8_t *tile, int row, int chunk) {
    return tile + row * D * 2 + (chunk ^ row % 8) * 16;
}

// Positions at..at+63 of K or V into a tile, zeros outside begin..end.
template <int TYPE, int D>
__device__ __forceinline__ void load_tile(uint8_t *tile, const clsa_rows &rows, const uint32_t *table, int slot, int kv,
                                          int at, int begin, int end) {
    const size_t unit = rows.ring > 0 ? (size_t)slot : (size_t)table[at / CLSA_PAGE];
    const int offset = rows.ring > 0 ? at % rows.ring : at % CLSA_PAGE;
    const uint8_t *base = rows.base + unit * rows.page_stride;
#pragma unroll
    for (int i = 0; i < PREFILL_KEYS * D / 8 / PREFILL_THREADS; ++i) {
        const int item = i * PREFILL_THREADS + threadIdx.x, row = item / (D / 8), chunk = item % (D / 8);
        const int pos = at + row;
        const bool valid = pos >= begin && pos < end;
        int place = offset + row;
        if (rows.ring > 0 && place >= rows.ring)
            place %= rows.ring;
        const uint8_t *from = valid ? base + (size_t)place * rows.row_stride : base;
        uint8_t *to = tile_chunk<D>(tile, row, chunk);
        if constexpr (TYPE == CLSA_F16) {
            copy_async_16(to, from + (kv * D + chunk * 8) * 2, valid);
        } else {
            *reinterpret_cast<uint4 *>(to) = valid ? row_half8<TYPE>(from, kv * D + chunk * 8) : make_uint4(0, 0, 0, 0);
        }
    }
}

// The warp's 16 query rows as the A operand, each scaled by a power of two to use the range of f16.
template <int D> struct QueryRows {
    uint32_t a[D / 16][4];
    float unscale[2]; // rows g and g + 8
    __device__ __forceinline__ void load(const float *const (&q)[2], int t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float largest = 0;
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
                const float2 x =
                    q[h] == nullptr ? make_float2(0, 0) : *reinterpret_cast<const float2 *>(q[h] + i * 8 + t * 2);
                largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
            }
            const auto [scale, inverse] = quad_scale(largest, 8);
            unscale[h] = inverse;
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
                const float2 x =
                    q[h] == nullptr ? make_float2(0, 0) : *reinterpret_cast<const float2 *>(q[h] + i * 8 + t * 2);
                a[i / 2][i % 2 * 2 + h] = pack_half2(x.x * scale, x.y * scale);
            }
        }
    }
};

// Grid (tiles of p.tokens rows, n_kv), PREFILL_THREADS threads.
template <int TK, int TV, int D> __device__ __forceinline__ void attention_prefill(const clsa_attention_cuda &p) {
    CLSA_DYNAMIC_SHARED(shared); // [2] tiles of K, [2] tiles of V
    constexpr int TILE = PREFILL_KEYS * D * 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const clsa_attention &op = p.op;
    const int group = op.n_head / op.n_kv, kv = blockIdx.y;
    grid_begin();
    // The last rows see the most positions: first.
    const int first_row = (gridDim.x - 1 - blockIdx.x) * p.tokens, end_row = min(first_row + p.tokens, op.batch.n_rows);

    int token[2]; // batch rows of the lane's rows g and g + 8 of the warp's 16; -1 past the end
    size_t head[2];
    const float *q[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int m = warp * 16 + g + 8 * h;
        token[h] = first_row + m / group;
        if (m >= p.tokens * group || token[h] >= end_row)
            token[h] = -1;
        head[h] = (size_t)token[h] * op.n_head + kv * group + m % group;
        q[h] = token[h] < 0 ? nullptr : op.q + head[h] * D;
    }
    QueryRows<D> query;
    query.load(q, t);
    const float factor[2] = {query.unscale[0] * op.scale * 1.4426950408889634f,
                             query.unscale[1] * op.scale * 1.4426950408889634f};

    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (int run = first_row; run < end_row;) {
        // Rows of one sequence.
        const int slot = op.batch.slot[run];
        int run_end = run + 1;
        while (run_end < end_row && op.batch.slot[run_end] == slot)
            ++run_end;
        const uint32_t *table = op.batch.tables + (size_t)slot * op.batch.table_stride;
        const int first_pos = op.batch.pos[run], end = op.batch.pos[run_end - 1] + 1;
        const int begin = op.window > 0 ? max(first_pos + 1 - op.window, 0) : 0;
        // The lane's rows see positions low..high; none when they are not of this run.
        int low[2], high[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const bool mine = token[h] >= run && token[h] < run_end;
            high[h] = mine ? op.batch.pos[token[h]] + 1 : 0;
            low[h] = op.window > 0 ? max(high[h] - op.window, 0) : 0;
        }
        // Every row of the run sees all of all_low..all_high.
        const int all_low = op.window > 0 ? max(end - op.window, 0) : 0;
        const int all_high = run_end - run == end_row - first_row ? first_pos + 1 : 0;

        const int first_tile = begin / PREFILL_KEYS, end_tile = (end + PREFILL_KEYS - 1) / PREFILL_KEYS;
        load_tile<TK, D>(shared, op.k, table, slot, kv, first_tile * PREFILL_KEYS, begin, end);
        load_tile<TV, D>(shared + 2 * TILE, op.v, table, slot, kv, first_tile * PREFILL_KEYS, begin, end);
        copy_async_commit();
        for (int tile = first_tile; tile < end_tile; ++tile) {
            const int stage = (tile - first_tile) % 2, at = tile * PREFILL_KEYS;
            if (tile + 1 < end_tile) {
                load_tile<TK, D>(shared + (1 - stage) * TILE, op.k, table, slot, kv, at + PREFILL_KEYS, begin, end);
                load_tile<TV, D>(shared + (3 - stage) * TILE, op.v, table, slot, kv, at + PREFILL_KEYS, begin, end);
            }
            copy_async_commit();
            copy_async_wait<1>();
            __syncthreads();
            uint8_t *k_tile = shared + stage * TILE, *v_tile = shared + (2 + stage) * TILE;

            float score[PREFILL_KEYS / 8][4] = {};
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
#pragma unroll
                for (int j = 0; j < PREFILL_KEYS / 16; ++j) {
                    uint32_t b[4];
                    ldmatrix_x4(b, tile_chunk<D>(k_tile, j * 16 + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                    mma_16816(score[2 * j], query.a[i], b[0], b[1]);
                    mma_16816(score[2 * j + 1], query.a[i], b[2], b[3]);
                }
            }
            if (at < all_low || at + PREFILL_KEYS > all_high) {
#pragma unroll
                for (int j = 0; j < PREFILL_KEYS / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int pos = at + j * 8 + 2 * t + i % 2;
                        if (pos < low[i / 2] || pos >= high[i / 2])
                            score[j][i] = -INFINITY;
                    }
                }
            }
            softmax_step(score, factor, top, sum, out);
#pragma unroll
            for (int j = 0; j < PREFILL_KEYS / 16; ++j) {
                const uint32_t a[4] = {pack_half2(score[2 * j][0], score[2 * j][1]),
                                       pack_half2(score[2 * j][2], score[2 * j][3]),
                                       pack_half2(score[2 * j + 1][0], score[2 * j + 1][1]),
                                       pack_half2(score[2 * j + 1][2], score[2 * j + 1][3])};
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, tile_chunk<D>(v_tile, j * 16 + lane % 16, 2 * i + lane / 16));
                    mma_16816(out[2 * i], a, b[0], b[1]);
                    mma_16816(out[2 * i + 1], a, b[2], b[3]);
                }
            }
            __syncthreads(); // the stage may be written again
        }
        copy_async_wait<0>();
        run = run_end;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(CLSA_FULL_WARP, sum[h], 1);
        sum[h] += __shfl_xor_sync(CLSA_FULL_WARP, sum[h], 2);
        if (token[h] < 0)
            continue;
        const float inverse = 1 / sum[h];
        float *to = op.out + head[h] * D + 2 * t;
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
            *reinterpret_cast<float2 *>(to + i * 8) = make_float2(out[i][2 * h] * inverse, out[i][2 * h + 1] * inverse);
    }
}

// Attention of single rows over a list of positions, split over blocks: for window and dense decode (attention.cu) and
// for the selected positions (gather_attention.cu), which differ in the Source of rows.
//
// Fast form, d 64 or 128 over f16 and q8_0: everything stays in registers, straight from global memory. A warp takes 16
// positions at a time: their K rows are the A operand and up to 8 query heads the columns of B, split into two f16 each
// (22 bits of every f32 query value); their V rows, transposed on the way by byte permutations, are the A operand of
// the second product, with the weights as B. The order of summed dimensions being free, each lane loads 16 contiguous
// bytes. General form, any type and d: f32 arithmetic, a warp per position.
#pragma once
#include "attention_cuda.h"
#include "rope_append.cuh"

constexpr int DECODE_THREADS = 256, DECODE_WARPS = DECODE_THREADS / 32;

// A range of positions of a sequence in the cache.
struct CachedSource {
    const clsa_rows &k, &v;
    const uint32_t *table;
    int slot, begin, end;
    const uint8_t *k_base, *v_base;
    int first, offset; // of the tile in hand, within its page or ring

    __device__ __forceinline__ CachedSource(const clsa_attention &op, int row) : k(op.k), v(op.v) {
        const int pos = op.batch.pos[row];
        slot = op.batch.slot[row];
        table = op.batch.tables + (size_t)slot * op.batch.table_stride;
        end = pos + 1;
        begin = op.window > 0 ? max(end - op.window, 0) : 0;
    }
    // Positions at..at+15 come next, `at` a multiple of 16.
    __device__ __forceinline__ void tile(int at, int) {
        first = at;
        const size_t unit = k.ring > 0 ? (size_t)slot : (size_t)table[at / CLSA_PAGE];
        offset = k.ring > 0 ? at % k.ring : at % CLSA_PAGE;
        k_base = k.base + unit * k.page_stride;
        v_base = v.base + unit * v.page_stride;
    }
    __device__ __forceinline__ int place(int pos) const {
        const int at = offset + pos - first;
        return k.ring > 0 && at >= k.ring ? at - k.ring : at;
    }
    __device__ __forceinline__ const uint8_t *k_row(int pos) const {
        return k_base + (size_t)place(pos) * k.row_stride;
    }
    __device__ __forceinline__ const uint8_t *v_row(int pos) const {
        return v_base + (size_t)place(pos) * v.row_stride;
    }
    template <int TYPE> __device__ __forceinline__ uint4 load(const uint8_t *row, int i) const {
        return row_half8<TYPE>(row, i);
    }
};

// The selected positions, through the page table.
struct SelectedSource {
    const clsa_rows &k, &v;
    const uint32_t *table, *selected;
    int begin, end, first;
    uint32_t own; // row `lane % 16` of the tile in hand, as page * CLSA_PAGE + row of the page

    __device__ __forceinline__ SelectedSource(const clsa_gather_attention &op, int row) : k(op.k), v(op.v) {
        table = op.batch.tables + (size_t)op.batch.slot[row] * op.batch.table_stride;
        selected = op.selected + (size_t)row * op.n_columns;
        begin = 0;
        end = op.count[row];
    }
    __device__ __forceinline__ void tile(int at, int lane) {
        first = at;
        const uint32_t pos = selected[min(at + lane % 16, end - 1)];
        own = table[pos / CLSA_PAGE] * CLSA_PAGE + pos % CLSA_PAGE;
    }
    __device__ __forceinline__ const uint8_t *row(const clsa_rows &rows, int i) const {
        const uint32_t at = __shfl_sync(CLSA_FULL_WARP, own, i - first);
        return rows.base + (size_t)(at / CLSA_PAGE) * rows.page_stride + (size_t)(at % CLSA_PAGE) * rows.row_stride;
    }
    __device__ __forceinline__ const uint8_t *k_row(int i) const { return row(k, i); }
    __device__ __forceinline__ const uint8_t *v_row(int i) const { return row(v, i); }
    template <int TYPE> __device__ __forceinline__ uint4 load(const uint8_t *row, int i) const {
        return row_half8<TYPE>(row, i);
    }
};

// The selected rows, already gathered.
struct CompactSource {
    const uint8_t *k, *v;
    size_t k_stride, v_stride;
    int begin, end;
    uint64_t policy;

    __device__ __forceinline__ CompactSource(const clsa_gather_cuda &p, int row) {
        const int width = p.op.n_kv * p.op.d;
        k_stride = (size_t)width * (p.k_type == CLSA_F32 ? 4 : 2);
        v_stride = (size_t)width * (p.v_type == CLSA_F32 ? 4 : 2);
        k = p.k + (size_t)row * p.op.n_columns * k_stride;
        v = p.v + (size_t)row * p.op.n_columns * v_stride;
        begin = 0;
        end = p.op.count[row];
        policy = keep_policy();
    }
    __device__ __forceinline__ void tile(int, int) {}
    __device__ __forceinline__ const uint8_t *k_row(int i) const { return k + (size_t)i * k_stride; }
    __device__ __forceinline__ const uint8_t *v_row(int i) const { return v + (size_t)i * v_stride; }
    template <int TYPE> __device__ __forceinline__ uint4 load(const uint8_t *row, int i) const {
        static_assert(TYPE == CLSA_F16, "gathered rows are f16");
        return load_keep_16(row + (size_t)i * 2, policy);
    }
};

// What a block works on.
struct DecodeShape {
    int n_head, n_kv, d;
    float scale;
    const float *q;
    float *out;
};

struct DecodeBlock {
    int row, kv, head, n_heads, ticket;
    __device__ __forceinline__ DecodeBlock(const DecodeShape &s, const clsa_split &split) {
        const int group = s.n_head / s.n_kv, tiles = (group + split.head_tile - 1) / split.head_tile;
        const int tile = blockIdx.y % tiles;
        row = blockIdx.z;
        kv = blockIdx.y / tiles;
        head = kv * group + tile * split.head_tile;
        n_heads = min(split.head_tile, group - tile * split.head_tile);
        ticket = row * gridDim.y + blockIdx.y;
    }
};

// Shared memory of a block: what each warp found.
struct DecodeShared {
    float *part;   // [DECODE_WARPS][head_tile][d + 4]
    float *bounds; // [DECODE_WARPS][CLSA_HEAD_TILE][2]
    uint32_t *flag;
    int stride, warp_stride;
    __device__ __forceinline__ DecodeShared(uint8_t *shared, int head_tile, int d) {
        stride = d + 4;
        warp_stride = head_tile * stride;
        part = reinterpret_cast<float *>(shared);
        bounds = part + DECODE_WARPS * warp_stride;
        flag = reinterpret_cast<uint32_t *>(bounds + DECODE_WARPS * CLSA_HEAD_TILE * 2);
    }
};

__device__ __forceinline__ float4 fma4(float w, float4 x, float4 sum) {
    return make_float4(fmaf(w, x.x, sum.x), fmaf(w, x.y, sum.y), fmaf(w, x.z, sum.z), fmaf(w, x.w, sum.w));
}

// Weight of a part with largest score m among parts with largest score `top`: 0 for a part without positions.
__device__ __forceinline__ float part_weight(float m, float top) {
    return m == -INFINITY ? 0.0f : exp2_approx(m - top);
}

// Merges the warps' parts, then, in the last of `active` blocks, the blocks' parts, and writes the block's heads of
// `out`.
__device__ __forceinline__ void decode_finish(const DecodeShape &s, const clsa_split &split, const DecodeBlock &b,
                                              DecodeShared &sh, int active) {
    // Not before: the next kernel's weights would queue in front of this one's rows.
    grid_release();
    const int vectors = s.d / 4;
    const size_t first_head = (size_t)b.row * s.n_head + b.head;
    __syncthreads();
    for (int item = threadIdx.x; item < b.n_heads * vectors; item += DECODE_THREADS) {
        const int h = item / vectors, c = item % vectors;
        float top = -INFINITY, sum = 0;
        for (int w = 0; w < DECODE_WARPS; ++w)
            top = fmaxf(top, sh.bounds[(w * CLSA_HEAD_TILE + h) * 2]);
        float4 v = make_float4(0, 0, 0, 0);
        for (int w = 0; w < DECODE_WARPS; ++w) {
            const float *bound = &sh.bounds[(w * CLSA_HEAD_TILE + h) * 2];
            const float weight = part_weight(bound[0], top);
            sum = fmaf(weight, bound[1], sum);
            v = fma4(weight, *reinterpret_cast<const float4 *>(&sh.part[w * sh.warp_stride + h * sh.stride + 4 * c]),
                     v);
        }
        if (active == 1) {
            reinterpret_cast<float4 *>(s.out)[(first_head + h) * vectors + c] =
                make_float4(v.x / sum, v.y / sum, v.z / sum, v.w / sum);
        } else {
            const size_t part = (first_head + h) * split.splits + blockIdx.x;
            reinterpret_cast<float4 *>(split.partial)[part * vectors + c] = v;
            if (c == 0)
                *reinterpret_cast<float2 *>(split.bounds + part * 2) = make_float2(top, sum);
        }
    }
    if (active == 1 || !last_block(split.tickets + b.ticket, active, sh.flag))
        return;
    constexpr int AT_ONCE = 16; // parts in flight
    for (int item = threadIdx.x; item < b.n_heads * vectors; item += DECODE_THREADS) {
        const int h = item / vectors, c = item % vectors;
        const size_t first = (first_head + h) * split.splits;
        const float2 *bounds = reinterpret_cast<const float2 *>(split.bounds) + first;
        const float4 *parts = reinterpret_cast<const float4 *>(split.partial) + first * vectors + c;
        float top = -INFINITY, sum = 0;
        float4 v = make_float4(0, 0, 0, 0);
        for (int start = 0; start < active; start += AT_ONCE) {
            float2 bound[AT_ONCE];
            float4 part[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const bool there = start + i < active;
                bound[i] = there ? load_l2(&bounds[start + i]) : make_float2(-INFINITY, 0);
                part[i] = there ? load_l2(&parts[(size_t)(start + i) * vectors]) : make_float4(0, 0, 0, 0);
            }
            const float before = top;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                top = fmaxf(top, bound[i].x);
            const float correction = part_weight(before, top);
            sum *= correction;
            v = make_float4(v.x * correction, v.y * correction, v.z * correction, v.w * correction);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const float weight = part_weight(bound[i].x, top);
                sum = fmaf(weight, bound[i].y, sum);
                v = fma4(weight, part[i], v);
            }
        }
        reinterpret_cast<float4 *>(s.out)[(first_head + h) * vectors + c] =
            make_float4(v.x / sum, v.y / sum, v.z / sum, v.w / sum);
    }
}

// The head of column `lane / 4`, times `factor`, as the B operand: high + low, scaled by a power of two so that its
// largest value is near 2^14. Returns what undoes the scale.
template <int D> struct QueryHeads {
    uint32_t high[D / 16][2], low[D / 16][2];
    __device__ __forceinline__ float load(const float *q, float factor, int lane) {
        const int at = lane % 4 * 8;
        float x[D / 32][8], largest = 0;
#pragma unroll
        for (int s = 0; s < D / 32; ++s) {
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                const float4 v =
                    q == nullptr ? make_float4(0, 0, 0, 0) : *reinterpret_cast<const float4 *>(q + s * 32 + at + i);
                x[s][i] = v.x * factor;
                x[s][i + 1] = v.y * factor;
                x[s][i + 2] = v.z * factor;
                x[s][i + 3] = v.w * factor;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
                largest = fmaxf(largest, fabsf(x[s][i]));
        }
        const auto [scale, inverse] = quad_scale(largest, 14);
#pragma unroll
        for (int s = 0; s < D / 32; ++s) {
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                const float a = x[s][i] * scale, b = x[s][i + 1] * scale;
                const uint32_t pair = pack_half2(a, b);
                high[2 * s + i / 4][i / 2 % 2] = pair;
                low[2 * s + i / 4][i / 2 % 2] =
                    pack_half2(a - half_to_float((uint16_t)pair), b - half_to_float((uint16_t)(pair >> 16)));
            }
        }
        return inverse;
    }
};

// Where a block's query heads are: [n_heads][d].
struct GivenQueries {
    static constexpr bool STAGED = false;
    __device__ __forceinline__ const float *operator()(const DecodeShape &s, const DecodeBlock &b, int, bool) const {
        return s.q + ((size_t)b.row * s.n_head + b.head) * s.d;
    }
};

// The block normalises and turns them itself, into shared memory, and, if it is the one that reads the row's own
// position, appends that first. All blocks that read it (one per tile of heads) write the same bytes.
struct AppendedQueries {
    static constexpr bool STAGED = true;
    const clsa_rope_append &p;
    float *x; // shared: [head_tile + 2][d], later the warps' parts

    __device__ __forceinline__ const float *operator()(const DecodeShape &s, const DecodeBlock &b, int warp,
                                                       bool owner) const {
        const int lane = threadIdx.x % 32, r = b.row;
        for (int h = warp; h < b.n_heads; h += DECODE_WARPS)
            turn_head(x + h * s.d, p.q + ((size_t)r * p.n_head + b.head + h) * s.d, p.q_norm, p, p.cos, r, lane);
        if (owner && warp >= DECODE_WARPS - 2) {
            // The last two warps have the fewest heads.
            const bool is_v = warp == DECODE_WARPS - 1;
            const size_t at = ((size_t)r * p.n_kv + b.kv) * s.d;
            float *own = x + (b.n_heads + is_v) * s.d;
            const clsa_rows &rows = is_v ? p.v_cache : p.k_cache;
            turn_head(own, (is_v ? p.v : p.k) + at, is_v ? nullptr : p.k_norm, p, is_v ? nullptr : p.cos, r, lane);
            store_head(cache_row(rows, p.batch, p.batch.slot[r], p.batch.pos[r]), rows.type, b.kv * s.d, own, s.d,
                       lane);
        }
        __syncthreads();
        return x;
    }
};

constexpr float LOG2_E = 1.4426950408889634f;

// Grid (splits, n_kv * head tiles, rows), DECODE_THREADS threads. The first rows are asked for before grid_wait: where
// a kernel not yet done writes them, the caller has waited.
template <int TK, int TV, int D, typename Source, typename Queries>
__device__ __forceinline__ void decode_attention(const DecodeShape &s, const clsa_split &split, Source source,
                                                 const Queries &queries) {
    CLSA_DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const DecodeBlock b(s, split);
    const int first_tile = source.begin / 16, tiles = (source.end + 15) / 16 - first_tile;
    const int active = max(1, min(split.splits, (tiles + DECODE_WARPS - 1) / DECODE_WARPS));
    if ((int)blockIdx.x >= active) {
        grid_wait();
        return;
    }

    uint4 low[D / 32], high[D / 32], value[4][D / 64];
    const auto load = [&](int tile) {
        const int at = (first_tile + tile) * 16;
        source.tile(at, lane);
        const auto within = [&](int i) { return max(source.begin, min(source.end - 1, at + i)); };
        const uint8_t *k_low = source.k_row(within(g)), *k_high = source.k_row(within(g + 8));
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            low[i] = source.template load<TK>(k_low, b.kv * D + i * 32 + t * 8);
            high[i] = source.template load<TK>(k_high, b.kv * D + i * 32 + t * 8);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint8_t *v_row = source.v_row(within(2 * t + j % 2 + j / 2 * 8));
#pragma unroll
            for (int i = 0; i < D / 64; ++i)
                value[j][i] = source.template load<TV>(v_row, b.kv * D + i * 64 + g * 8);
        }
    };
    // The first tile is on its way while the queries are made ready; the one with the row's own position once that is
    // appended.
    int tile = warp * active + blockIdx.x;
    const bool late = Queries::STAGED && tile == tiles - 1;
    if (tile < tiles && !late)
        load(tile);
    grid_wait();
    const float *q = queries(s, b, warp, (int)blockIdx.x == (tiles - 1) % active);
    if (late)
        load(tile);
    QueryHeads<D> query;
    const float unscale = query.load(g < b.n_heads ? q + g * D : nullptr, s.scale * LOG2_E, lane);
    if constexpr (Queries::STAGED)
        __syncthreads();
    const float unscale_even = __shfl_sync(CLSA_FULL_WARP, unscale, 8 * t);
    const float unscale_odd = __shfl_sync(CLSA_FULL_WARP, unscale, 8 * t + 4);

    // Columns 2t and 2t + 1 of the products: the lane's two heads.
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    float acc[D / 16][4] = {};
    while (tile < tiles) {
        const int at = (first_tile + tile) * 16;
        float by_high[4] = {}, by_low[4] = {};
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            const uint32_t first[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
            const uint32_t second[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
            mma_16816(by_high, first, query.high[2 * i][0], query.high[2 * i][1]);
            mma_16816(by_low, first, query.low[2 * i][0], query.low[2 * i][1]);
            mma_16816(by_high, second, query.high[2 * i + 1][0], query.high[2 * i + 1][1]);
            mma_16816(by_low, second, query.low[2 * i + 1][0], query.low[2 * i + 1][1]);
        }
        float score[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int pos = at + g + i / 2 * 8;
            score[i] = pos >= source.begin && pos < source.end
                           ? (by_high[i] + by_low[i]) * (i % 2 ? unscale_odd : unscale_even)
                           : -INFINITY;
        }
        uint32_t weights[2];
        float correction[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float m = fmaxf(score[i], score[i + 2]);
#pragma unroll
            for (int o = 4; o < 32; o <<= 1)
                m = fmaxf(m, __shfl_xor_sync(CLSA_FULL_WARP, m, o));
            const float before = top[i];
            top[i] = fmaxf(before, m);
            correction[i] = exp2_approx(before - top[i]);
            score[i] = exp2_approx(score[i] - top[i]);
            score[i + 2] = exp2_approx(score[i + 2] - top[i]);
            sum[i] = fmaf(sum[i], correction[i], score[i] + score[i + 2]);
        }
        weights[0] = movmatrix(pack_half2(score[0], score[1]));
        weights[1] = movmatrix(pack_half2(score[2], score[3]));
#pragma unroll
        for (int i = 0; i < D / 64; ++i) {
            const uint32_t w[4][4] = {{value[0][i].x, value[0][i].y, value[0][i].z, value[0][i].w},
                                      {value[1][i].x, value[1][i].y, value[1][i].z, value[1][i].w},
                                      {value[2][i].x, value[2][i].y, value[2][i].z, value[2][i].w},
                                      {value[3][i].x, value[3][i].y, value[3][i].z, value[3][i].w}};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                // Row g: dimension 8g + 2j, row g + 8: dimension 8g + 2j + 1, of this 64.
                const uint32_t a[4] = {byte_perm(w[0][j], w[1][j], 0x5410), byte_perm(w[0][j], w[1][j], 0x7632),
                                       byte_perm(w[2][j], w[3][j], 0x5410), byte_perm(w[2][j], w[3][j], 0x7632)};
                float(&o)[4] = acc[4 * i + j];
                o[0] *= correction[0];
                o[1] *= correction[1];
                o[2] *= correction[0];
                o[3] *= correction[1];
                mma_16816(o, a, weights[0], weights[1]);
            }
        }
        tile += active * DECODE_WARPS;
        if (tile < tiles)
            load(tile);
    }
    DecodeShared sh(shared, split.head_tile, D);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int o = 4; o < 32; o <<= 1)
            sum[i] += __shfl_xor_sync(CLSA_FULL_WARP, sum[i], o);
        const int h = 2 * t + i;
        if (h >= b.n_heads)
            continue;
        if (g == 0)
            *reinterpret_cast<float2 *>(&sh.bounds[(warp * CLSA_HEAD_TILE + h) * 2]) = make_float2(top[i], sum[i]);
        float *part = sh.part + warp * sh.warp_stride + h * sh.stride + g * 8;
#pragma unroll
        for (int j = 0; j < D / 16; ++j)
            *reinterpret_cast<float2 *>(part + j / 4 * 64 + j % 4 * 2) = make_float2(acc[j][i], acc[j][i + 2]);
    }
    decode_finish(s, split, b, sh, active);
}

__device__ __forceinline__ float any_row_value(int type, const uint8_t *row, int i) {
    if (type == CLSA_F32)
        return row_value<CLSA_F32>(row, i);
    return type == CLSA_F16 ? row_value<CLSA_F16>(row, i) : row_value<CLSA_Q8_0>(row, i);
}

// The general form: d up to 32 * CHUNKS, up to HEADS heads a block.
template <int CHUNKS, int HEADS, typename Source, typename Queries>
__device__ __forceinline__ void decode_attention_any(const DecodeShape &s, const clsa_split &split, Source source,
                                                     const Queries &queries, int k_type, int v_type) {
    CLSA_DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const DecodeBlock b(s, split);
    const int tiles = (source.end - source.begin + 15) / 16;
    const int active = max(1, min(split.splits, (tiles + DECODE_WARPS - 1) / DECODE_WARPS));
    if ((int)blockIdx.x >= active)
        return;
    // The row's own position is the last.
    const float *heads = queries(s, b, warp, (int)blockIdx.x == (source.end - 1 - source.begin) % active);
    float q[HEADS][CHUNKS], acc[HEADS][CHUNKS] = {}, top[HEADS], sum[HEADS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        top[h] = -INFINITY;
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int j = i * 32 + lane;
            q[h][i] = h < b.n_heads && j < s.d ? heads[h * s.d + j] * (s.scale * LOG2_E) : 0.0f;
        }
    }
    if constexpr (Queries::STAGED)
        __syncthreads();
    for (int pos = source.begin + warp * active + blockIdx.x; pos < source.end; pos += active * DECODE_WARPS) {
        source.tile(pos / 16 * 16, lane);
        const uint8_t *k_row = source.k_row(pos), *v_row = source.v_row(pos);
        float k[CHUNKS], v[CHUNKS];
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int j = i * 32 + lane;
            k[i] = j < s.d ? any_row_value(k_type, k_row, b.kv * s.d + j) : 0.0f;
            v[i] = j < s.d ? any_row_value(v_type, v_row, b.kv * s.d + j) : 0.0f;
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float score = 0;
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i)
                score = fmaf(q[h][i], k[i], score);
            score = warp_sum(score);
            const float before = top[h];
            top[h] = fmaxf(before, score);
            const float correction = exp2_approx(before - top[h]), weight = exp2_approx(score - top[h]);
            sum[h] = fmaf(sum[h], correction, weight);
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i)
                acc[h][i] = fmaf(acc[h][i], correction, weight * v[i]);
        }
    }
    DecodeShared sh(shared, split.head_tile, s.d);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        if (h >= b.n_heads)
            continue;
        if (lane == 0)
            *reinterpret_cast<float2 *>(&sh.bounds[(warp * CLSA_HEAD_TILE + h) * 2]) = make_float2(top[h], sum[h]);
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            if (i * 32 + lane < s.d)
                sh.part[warp * sh.warp_stride + h * sh.stride + i * 32 + lane] = acc[h][i];
        }
    }
    decode_finish(s, split, b, sh, active);
}

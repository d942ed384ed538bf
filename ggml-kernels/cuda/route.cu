// route: scores of one query per row over all index keys, then the exact k best (route.h, route_cuda.h).
//
// Scoring on tensor cores, at memory bandwidth: 16 keys are the A operand, straight from global memory (the order of
// the summed dimensions is free, so that each lane takes 16 contiguous bytes); the columns of B are up to four queries,
// each split into the f16 nearest to it and the f16 nearest to the rest, which together hold 22 bits of every f32 query
// value. f16 keys and q8_0 quants are exact in f16, products are exact and summed in f32.
#include "cache_rows.cuh"
#include "route_cuda.h"
#include "select.cuh"

namespace {

constexpr int SCORE_THREADS = 512, SELECT_THREADS = 1024, CANDIDATES = CLSA_ROUTE_CANDIDATES;
static_assert(BINS == CLSA_ROUTE_BINS && BINS == 4 * SELECT_THREADS, "four bins per selecting thread");

// What is selected from: single positions, or blocks of them.
struct Units {
    int positions, n, k, size, wanted;
    __device__ Units(const clsa_route &op, int row) {
        positions = op.batch.pos[row] + 1;
        size = max(op.block, 1);
        n = (positions + size - 1) / size;
        k = max(op.k / size, 1);
        wanted = op.k;
    }
    __device__ bool all() const { return n <= k || positions <= wanted; }
};

__device__ __forceinline__ void put_score(const clsa_route_cuda &p, int row, int pos, float score, bool keep_float,
                                          uint32_t *bins) {
    const uint32_t key = ordered(score);
    p.scores[(size_t)row * p.max_positions + pos] = keep_float ? f32_bits(score) : key;
    if (!keep_float)
        atomicAdd(&bins[key >> BIN_SHIFT], 1u);
}

// Calls f(first, n, positions) for each run of rows of one sequence within this block's group; `positions` = 0 when no
// row of the run needs scores.
template <typename F> __device__ __forceinline__ void for_each_run(const clsa_route_cuda &p, F f) {
    const clsa_batch &batch = p.op.batch;
    const int end = min((int)(blockIdx.y + 1) * p.group, p.n_rows);
    for (int first = blockIdx.y * p.group; first < end;) {
        const int slot = batch.slot[p.first_row + first];
        int n = 1;
        while (first + n < end && batch.slot[p.first_row + first + n] == slot)
            ++n;
        // Positions increase within a run: the last row sees the most.
        const Units last(p.op, p.first_row + first + n - 1);
        f(first, n, slot, last.all() && !p.raw ? 0 : last.positions);
        first += n;
    }
}

// The query of column pair `lane/8` in the B fragments of one warp, scaled by a power of two so that its largest value
// is near 2^14.
template <int D> struct Query {
    uint32_t fragment[D / 16][2];
    __device__ float load(const float *q, int lane) {
        const bool low = lane / 4 % 2;
        const int at = lane % 4 * 8;
        float largest = 0;
        if (q != nullptr) {
#pragma unroll
            for (int s = 0; s < D; s += 32) {
                for (int i = 0; i < 8; ++i)
                    largest = fmaxf(largest, fabsf(q[s + at + i]));
            }
        }
        const auto [scale, inverse] = quad_scale(largest, 14);
#pragma unroll
        for (int s = 0; s < D; s += 32) {
            float v[8];
            for (int i = 0; i < 8; ++i) {
                const float x = q == nullptr ? 0.0f : q[s + at + i] * scale;
                const float high = half_to_float(float_to_half(x));
                v[i] = low ? x - high : high;
            }
            fragment[s / 16][0] = pack_half2(v[0], v[1]);
            fragment[s / 16][1] = pack_half2(v[2], v[3]);
            fragment[s / 16 + 1][0] = pack_half2(v[4], v[5]);
            fragment[s / 16 + 1][1] = pack_half2(v[6], v[7]);
        }
        return inverse;
    }
};

// q8_0: the eight quants at dimension i of a block, exact in f16, and the block's scale.
__device__ __forceinline__ uint4 quants_half8(const uint8_t *row, int i, float &scale) {
    const uint16_t *block = reinterpret_cast<const uint16_t *>(row + (size_t)(i / CLSA_QK8_0) * (CLSA_QK8_0 + 2));
    scale = half_to_float(block[0]);
    return half8_of_quants(block + 1 + i % CLSA_QK8_0 / 2);
}

// Scores of 16 keys for the quad's query: s[0] of key `lane/4`, s[1] of key `lane/4 + 8`, still scaled.
template <int TYPE, int D>
__device__ __forceinline__ void score_16(const uint8_t *low_row, const uint8_t *high_row, const Query<D> &query,
                                         int lane, float (&s)[2]) {
    const int at = lane % 4 * 8;
    uint4 low[D / 32], high[D / 32];
    float low_scale[D / 32], high_scale[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
        if constexpr (TYPE == CLSA_F16) {
            low[i] = load_stream_16(low_row + (i * 32 + at) * 2);
            high[i] = load_stream_16(high_row + (i * 32 + at) * 2);
        } else {
            low[i] = quants_half8(low_row, i * 32 + at, low_scale[i]);
            high[i] = quants_half8(high_row, i * 32 + at, high_scale[i]);
        }
    }
    float sum[2][4] = {};
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
        const uint32_t first[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
        const uint32_t second[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
        if constexpr (TYPE == CLSA_F16) {
            mma_16816(sum[0], first, query.fragment[2 * i][0], query.fragment[2 * i][1]);
            mma_16816(sum[1], second, query.fragment[2 * i + 1][0], query.fragment[2 * i + 1][1]);
        } else {
            float block[4] = {};
            mma_16816(block, first, query.fragment[2 * i][0], query.fragment[2 * i][1]);
            mma_16816(block, second, query.fragment[2 * i + 1][0], query.fragment[2 * i + 1][1]);
            for (int j = 0; j < 4; ++j)
                sum[0][j] += block[j] * (j < 2 ? low_scale[i] : high_scale[i]);
        }
    }
    s[0] = (sum[0][0] + sum[1][0]) + (sum[0][1] + sum[1][1]);
    s[1] = (sum[0][2] + sum[1][2]) + (sum[0][3] + sum[1][3]);
}

// Grid (splits, groups of rows). Warps take tiles of 16 positions round robin over the splits.
template <int TYPE, int D> __device__ __forceinline__ void route_score(const clsa_route_cuda &p) {
    CLSA_DYNAMIC_SHARED(shared);
    uint32_t *bins = reinterpret_cast<uint32_t *>(shared); // [group][BINS]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const clsa_rows &keys = p.op.keys;
    const bool keep_float = p.raw || p.op.block > 1;
    grid_begin();
    for_each_run(p, [&](int first, int n, int slot, int positions) {
        const int tiles = (positions + 15) / 16;
        if ((int)blockIdx.x >= tiles)
            return;
        if (!keep_float)
            zero_histogram(bins, n * BINS);
        const int mine = lane % 4; // the query whose scores this lane receives
        int limit = 0;
        if (mine < n) {
            const Units units(p.op, p.first_row + first + mine);
            limit = units.all() && !p.raw ? 0 : units.positions;
        }
        Query<D> query;
        const int loads = lane / 8; // the query whose values this lane supplies
        const float unscale = __shfl_sync(
            CLSA_FULL_WARP, query.load(loads < n ? p.op.q + (size_t)(p.first_row + first + loads) * D : nullptr, lane),
            mine * 8);
        const uint32_t *table = p.op.batch.tables + (size_t)slot * p.op.batch.table_stride;
        const int step = gridDim.x * (SCORE_THREADS / 32);
        int tile = warp * gridDim.x + blockIdx.x;
        uint32_t page = tile < tiles ? table[tile * 16 / CLSA_PAGE] : 0;
        for (; tile < tiles; tile += step) {
            const uint32_t next = tile + step < tiles ? table[(tile + step) * 16 / CLSA_PAGE] : 0;
            const int low = tile * 16 + lane / 4, high = low + 8;
            const uint8_t *base = keys.base + (size_t)page * keys.page_stride;
            float s[2];
            score_16<TYPE, D>(base + (size_t)(min(low, positions - 1) % CLSA_PAGE) * keys.row_stride,
                              base + (size_t)(min(high, positions - 1) % CLSA_PAGE) * keys.row_stride, query, lane, s);
            if (low < limit)
                put_score(p, first + mine, low, s[0] * unscale, keep_float, bins + mine * BINS);
            if (high < limit)
                put_score(p, first + mine, high, s[1] * unscale, keep_float, bins + mine * BINS);
            page = next;
        }
        if (!keep_float) {
            __syncthreads();
            for (int i = 0; i < n; ++i)
                flush_histogram(bins + i * BINS, p.histogram + (size_t)(first + i) * BINS);
            __syncthreads();
        }
    });
}

// The same for any type and d, products in f32: a warp per position.
template <int TYPE> __device__ __forceinline__ void route_score_any(const clsa_route_cuda &p) {
    CLSA_DYNAMIC_SHARED(shared);
    uint32_t *bins = reinterpret_cast<uint32_t *>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool keep_float = p.raw || p.op.block > 1;
    grid_begin();
    for_each_run(p, [&](int first, int n, int slot, int positions) {
        if ((int)blockIdx.x >= positions)
            return;
        if (!keep_float)
            zero_histogram(bins, n * BINS);
        for (int pos = warp * gridDim.x + blockIdx.x; pos < positions; pos += gridDim.x * (SCORE_THREADS / 32)) {
            const uint8_t *key = cache_row(p.op.keys, p.op.batch, slot, pos);
            for (int i = 0; i < n; ++i) {
                const Units units(p.op, p.first_row + first + i);
                if (pos >= units.positions || (units.all() && !p.raw))
                    continue;
                const float *q = p.op.q + (size_t)(p.first_row + first + i) * p.op.d;
                float sum = 0;
                for (int j = lane; j < p.op.d; j += 32)
                    sum = fmaf(q[j], row_value<TYPE>(key, j), sum);
                sum = warp_sum(sum);
                if (lane == 0)
                    put_score(p, first + i, pos, sum, keep_float, bins + i * BINS);
            }
        }
        if (!keep_float) {
            __syncthreads();
            for (int i = 0; i < n; ++i)
                flush_histogram(bins + i * BINS, p.histogram + (size_t)(first + i) * BINS);
            __syncthreads();
        }
    });
}

// Block mode. Grid (splits, rows): a thread per block of positions.
__device__ __forceinline__ void route_pool_body(const clsa_route_cuda &p) {
    CLSA_DYNAMIC_SHARED(shared);
    uint32_t *bins = reinterpret_cast<uint32_t *>(shared);
    grid_begin();
    const int row = blockIdx.y;
    const Units units(p.op, p.first_row + row);
    if (units.all() || (int)(blockIdx.x * blockDim.x) >= units.n)
        return;
    zero_histogram(bins, BINS);
    const float *scores = reinterpret_cast<const float *>(p.scores) + (size_t)row * p.max_positions;
    for (int u = blockIdx.x * blockDim.x + threadIdx.x; u < units.n; u += gridDim.x * blockDim.x) {
        const int begin = u * units.size, end = min(begin + units.size, units.positions);
        float sum = 0;
        for (int i = begin; i < end; ++i)
            sum += scores[i];
        const uint32_t key = ordered(sum / (float)(end - begin));
        p.pooled[(size_t)row * (p.max_positions / 2) + u] = key;
        atomicAdd(&bins[key >> BIN_SHIFT], 1u);
    }
    __syncthreads();
    flush_histogram(bins, p.histogram + (size_t)row * BINS);
}

// ---- selection
// ----------------------------------------------------------------------------------------------------------------------

struct SelectShared {
    uint32_t sums[33];
    uint32_t flag;
    Pivot pivot;
    alignas(16) uint32_t bins[BINS];
    uint64_t candidates[CANDIDATES];
};

static_assert(sizeof(SelectShared) <= CLSA_ROUTE_SELECT_SHARED, "what the launch asks for");

// Where marks go: a bitmap of its own in shared memory (in place of the bins) when it fits, else the row's.
__device__ __forceinline__ uint32_t *marks_of(SelectShared &s, uint32_t *bitmap, bool in_shared) {
    __syncthreads();
    if (in_shared)
        zero_histogram(s.bins, BINS);
    return in_shared ? s.bins : bitmap;
}

// Marks the `need` best of the n candidates in the bitmap.
__device__ __forceinline__ void mark_candidates(SelectShared &s, const uint64_t *candidates, uint32_t n, uint32_t need,
                                                uint32_t *bitmap, bool in_shared) {
    for (uint32_t i = threadIdx.x; i < n; i += SELECT_THREADS)
        s.candidates[i] = load_l2(&candidates[i]);
    // From the high bits down: the bits of a score below its bin, then those of the position. `floor` is the least that
    // is taken.
    uint64_t floor = 0;
    int known = 64 - (32 - BIN_SHIFT); // candidates agree above this bit
    uint64_t prefix = 0;
    bool first = true;
    while (known > 0) {
        const int width = min(known, 12), shift = known - width;
        __syncthreads();
        zero_histogram(s.bins, BINS);
        if (first)
            prefix = s.candidates[0] >> known;
        first = false;
        for (uint32_t i = threadIdx.x; i < n; i += SELECT_THREADS) {
            const uint64_t c = s.candidates[i];
            if (c >> known == prefix)
                atomicAdd(&s.bins[(uint32_t)(c >> shift) & ((1u << width) - 1)], 1u);
        }
        __syncthreads();
        const uint4 counts = *reinterpret_cast<const uint4 *>(&s.bins[BINS - 4 - 4 * threadIdx.x]);
        const Pivot pivot = find_pivot(counts, BINS, need, s.sums, &s.pivot);
        prefix = prefix << width | pivot.bin;
        floor = prefix << shift;
        need -= pivot.above;
        known = shift;
        if (need == pivot.inside)
            break;
    }
    uint32_t *marks = marks_of(s, bitmap, in_shared);
    for (uint32_t i = threadIdx.x; i < n; i += SELECT_THREADS) {
        const uint64_t c = s.candidates[i];
        const uint32_t unit = ~(uint32_t)c;
        if (c >= floor)
            atomicOr(&marks[unit / 32], 1u << unit % 32);
    }
}

// The same when the bin holds more than fits: over the row's scores themselves.
__device__ __forceinline__ void mark_many(SelectShared &s, const uint32_t *keys, int n, uint32_t bin, uint32_t need,
                                          uint32_t *bitmap, bool in_shared) {
    uint32_t prefix = bin;
    int known = BIN_SHIFT;
    bool whole = false;
    while (known > 0 && !whole) {
        const int width = min(known, 12), shift = known - width;
        __syncthreads();
        zero_histogram(s.bins, BINS);
        for (int i = 4 * threadIdx.x; i < n; i += 4 * SELECT_THREADS) {
            const uint4 v = *reinterpret_cast<const uint4 *>(keys + i);
            const uint32_t key[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (i + j < n && key[j] >> known == prefix)
                    atomicAdd(&s.bins[key[j] >> shift & ((1u << width) - 1)], 1u);
            }
        }
        __syncthreads();
        const uint4 counts = *reinterpret_cast<const uint4 *>(&s.bins[BINS - 4 - 4 * threadIdx.x]);
        const Pivot pivot = find_pivot(counts, BINS, need, s.sums, &s.pivot);
        prefix = prefix << width | pivot.bin;
        need -= pivot.above;
        known = shift;
        whole = need == pivot.inside;
    }
    // Scores of the bin above `prefix` are taken, and of those equal to it the first `need`.
    uint32_t *all_marks = marks_of(s, bitmap, in_shared);
    uint32_t taken = 0;
    for (int start = 0; start < n; start += 4 * SELECT_THREADS) {
        const int i = start + 4 * threadIdx.x;
        uint32_t equal = 0, marks = 0;
        if (i < n) {
            const uint4 v = *reinterpret_cast<const uint4 *>(keys + i);
            const uint32_t key[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (i + j >= n || key[j] >> BIN_SHIFT != bin)
                    continue;
                if (key[j] >> known == prefix)
                    equal |= 1u << j;
                else if (key[j] >> known > prefix)
                    marks |= 1u << j;
            }
        }
        uint32_t total;
        uint32_t rank = taken + block_prefix((uint32_t)__popc(equal), s.sums, &total);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (equal >> j & 1u && rank++ < need)
                marks |= 1u << j;
        }
        if (marks != 0)
            atomicOr(&all_marks[i / 32], marks << i % 32);
        taken += total;
    }
}

// The marked units, ascending, as positions. `early`: the thread's first words of the bitmap, to which those in shared
// memory are added.
__device__ __forceinline__ void extract(SelectShared &s, const uint32_t *bitmap, bool in_shared, uint4 early,
                                        const Units &units, uint32_t *selected, int32_t *count) {
    const int words = (units.n + 31) / 32;
    uint32_t base = 0;
    for (int start = 0; start < words; start += 4 * SELECT_THREADS) {
        const int at = start + 4 * threadIdx.x;
        uint32_t word[4] = {early.x, early.y, early.z, early.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (at + i >= words)
                word[i] = 0;
            else if (in_shared)
                word[i] |= s.bins[at + i];
            else
                word[i] = load_l2(&bitmap[at + i]);
        }
        uint32_t total;
        uint32_t rank =
            base + block_prefix((uint32_t)(__popc(word[0]) + __popc(word[1]) + __popc(word[2]) + __popc(word[3])),
                                s.sums, &total);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (uint32_t w = word[i]; w != 0; w &= w - 1) {
                const int unit = (at + i) * 32 + __ffs((int)w) - 1;
                for (int j = 0, pos = unit * units.size; j < units.size && pos < units.positions; ++j, ++pos)
                    selected[(size_t)rank * units.size + j] = pos;
                // Only the last block may be short, and it comes last.
                if (unit == units.n - 1)
                    s.flag = units.n * units.size - units.positions;
                ++rank;
            }
        }
        base += total;
    }
    __syncthreads();
    if (threadIdx.x == 0)
        *count = (int)base * units.size - (int)s.flag;
}

// Grid (splits, rows).
__device__ __forceinline__ void route_select_body(const clsa_route_cuda &p) {
    CLSA_DYNAMIC_SHARED(shared);
    SelectShared &s = *reinterpret_cast<SelectShared *>(shared);
    grid_begin();
    const int row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool pooled = p.op.block > 1;
    const int room = pooled ? p.max_positions / 2 : p.max_positions;
    const uint32_t *keys = (pooled ? p.pooled : p.scores) + (size_t)row * room;
    uint32_t *histogram = p.histogram + (size_t)row * BINS;
    // Loaded before anything says whether they are needed.
    const int first_word = warp * gridDim.x + blockIdx.x;
    const uint32_t first_key = first_word * 32 < room ? keys[first_word * 32 + lane] : 0;
    const uint4 counts = *reinterpret_cast<const uint4 *>(&histogram[BINS - 4 - 4 * threadIdx.x]);
    const Units units(p.op, p.first_row + row);
    uint32_t *selected = p.op.selected + (size_t)(p.first_row + row) * p.op.n_columns;
    int32_t *count = p.op.count + p.first_row + row;
    if (units.all()) {
        for (int i = blockIdx.x * SELECT_THREADS + threadIdx.x; i < units.positions; i += gridDim.x * SELECT_THREADS)
            selected[i] = i;
        if (blockIdx.x == 0 && threadIdx.x == 0)
            *count = units.positions;
        return;
    }
    uint32_t *bitmap = p.bitmap + (size_t)row * (p.max_positions / 32);
    uint64_t *candidates = p.candidates + (size_t)row * CANDIDATES;
    clsa_route_state *state = p.state + row;

    const Pivot pivot = find_pivot(counts, BINS, units.k, s.sums, &s.pivot);
    const uint32_t need = units.k - pivot.above;
    const bool whole = need == pivot.inside, fits = pivot.inside <= CANDIDATES;
    const int words = (units.n + 31) / 32;
    for (int w = first_word; w < words; w += gridDim.x * (SELECT_THREADS / 32)) {
        const int unit = w * 32 + lane;
        const uint32_t key = w == first_word ? first_key : unit < units.n ? keys[unit] : 0, bin = key >> BIN_SHIFT;
        const uint32_t marks =
            __ballot_sync(CLSA_FULL_WARP, unit < units.n && (bin > pivot.bin || (whole && bin == pivot.bin)));
        if (lane == 0)
            bitmap[w] = marks;
        if (!whole && fits) {
            const bool candidate = unit < units.n && bin == pivot.bin;
            const uint32_t those = __ballot_sync(CLSA_FULL_WARP, candidate);
            if (those != 0) {
                uint32_t at = 0;
                if (lane == 0)
                    at = atomicAdd(&state->n_candidates, (uint32_t)__popc(those));
                at = __shfl_sync(CLSA_FULL_WARP, at, 0) + __popc(those & ((1u << lane) - 1));
                if (candidate)
                    candidates[at] = (uint64_t)key << 32 | ~(uint32_t)unit;
            }
        }
    }
    if (!last_block(&state->ticket, gridDim.x, &s.flag))
        return;
    const bool in_shared = words <= BINS;
    uint4 early = make_uint4(0, 0, 0, 0);
    if (in_shared && 4 * (int)threadIdx.x < words)
        early = load_l2(reinterpret_cast<const uint4 *>(&bitmap[4 * threadIdx.x]));
    if (whole)
        marks_of(s, bitmap, in_shared);
    else if (fits)
        mark_candidates(s, candidates, pivot.inside, need, bitmap, in_shared);
    else
        mark_many(s, keys, units.n, pivot.bin, need, bitmap, in_shared);
    if (threadIdx.x == 0)
        s.flag = 0;
    if (!in_shared)
        __threadfence();
    __syncthreads(); // every mark is made
    extract(s, bitmap, in_shared, early, units, selected, count);
    *reinterpret_cast<uint4 *>(&histogram[4 * threadIdx.x]) = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0)
        state->n_candidates = 0;
}

} // namespace

CLSA_KERNEL(route_score_f16_d64, clsa_route_cuda, (SCORE_THREADS, 1), (route_score<CLSA_F16, 64>(p)))
CLSA_KERNEL(route_score_f16_d128, clsa_route_cuda, (SCORE_THREADS, 1), (route_score<CLSA_F16, 128>(p)))
CLSA_KERNEL(route_score_q8_0_d64, clsa_route_cuda, (SCORE_THREADS, 1), (route_score<CLSA_Q8_0, 64>(p)))
CLSA_KERNEL(route_score_q8_0_d128, clsa_route_cuda, (SCORE_THREADS, 1), (route_score<CLSA_Q8_0, 128>(p)))
CLSA_KERNEL(route_score_f32, clsa_route_cuda, (SCORE_THREADS, 1), (route_score_any<CLSA_F32>(p)))
CLSA_KERNEL(route_score_f16, clsa_route_cuda, (SCORE_THREADS, 1), (route_score_any<CLSA_F16>(p)))
CLSA_KERNEL(route_score_q8_0, clsa_route_cuda, (SCORE_THREADS, 1), (route_score_any<CLSA_Q8_0>(p)))
CLSA_KERNEL(route_pool, clsa_route_cuda, (SCORE_THREADS, 1), (route_pool_body(p)))
CLSA_KERNEL(route_select, clsa_route_cuda, (SELECT_THREADS, 1), (route_select_body(p)))

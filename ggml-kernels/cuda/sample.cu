// sample (sample_cuda.h): all blocks of a row find its largest logit and a histogram of the logits' high bits; the last
// one to finish filters and draws, mostly among a short list in shared memory.
#include "sample_cuda.h"
#include "select.cuh"

namespace {

constexpr int THREADS = 1024, SMALL = 2048;
static_assert(BINS == 4 * THREADS && SMALL == 2 * THREADS, "four bins, or two of a short list, per thread");
constexpr uint32_t LEAST = 0x007fffffu; // ordered(-inf)

struct SampleShared {
    uint32_t sums[33];
    uint32_t flag, n, cut, pick;
    Pivot pivot;
    uint64_t wide_sums[33];
    double real_sums[33];
    uint64_t digit, above, inside;
    union {
        alignas(16) uint32_t bins[BINS];
        uint64_t masses[BINS];
        uint64_t list[SMALL];
    };
};

static_assert(sizeof(SampleShared) <= CLSA_SAMPLE_SHARED, "what the launch asks for");

// Larger logits first, of equal ones lower ids: descending.
__device__ __forceinline__ uint64_t composite(float logit, uint32_t id) {
    return (uint64_t)ordered(logit) << 32 | (uint32_t)~id;
}
__device__ __forceinline__ uint32_t id_of(uint64_t c) { return ~(uint32_t)c; }
__device__ __forceinline__ float logit_of(uint64_t c) {
    const uint32_t key = (uint32_t)(c >> 32);
    return bits_f32(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ double uniform(clsa_sample_row &row) {
    if (row.at >= 0)
        return row.at;
    uint32_t x[4] = {(uint32_t)row.counter, (uint32_t)(row.counter >> 32), 0, 0};
    uint32_t key[2] = {(uint32_t)row.seed, (uint32_t)(row.seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)x[0] * 0xd2511f53u, b = (uint64_t)x[2] * 0xcd9e8d57u;
        const uint32_t y[4] = {(uint32_t)(b >> 32) ^ x[1] ^ key[0], (uint32_t)b, (uint32_t)(a >> 32) ^ x[3] ^ key[1],
                               (uint32_t)a};
        for (int i = 0; i < 4; ++i)
            x[i] = y[i];
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
    ++row.counter;
    return (double)(((uint64_t)x[1] << 32 | x[0]) >> 11) * (1.0 / 9007199254740992.0);
}

// Descending, n a power of two up to 2 * THREADS.
__device__ __forceinline__ void sort(uint64_t *list, int n) {
    for (int run = 2; run <= n; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            if ((int)threadIdx.x < n / 2) {
                const int i = threadIdx.x / step * 2 * step + threadIdx.x % step, j = i + step;
                const uint64_t a = list[i], b = list[j];
                if ((a < b) == ((i & run) == 0)) {
                    list[i] = b;
                    list[j] = a;
                }
            }
        }
    }
    __syncthreads();
}

// Everything that may be kept is among the `total` tokens from `floor` on, few enough to be sorted.
__device__ __forceinline__ uint32_t draw_few(SampleShared &s, const float *logits, int n_vocab,
                                             const clsa_sample_row &row, float top, uint64_t floor, int total, int kept,
                                             double at) {
    __syncthreads();
    if (threadIdx.x == 0)
        s.n = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_vocab; i += THREADS) {
        const uint64_t c = composite(logits[i], i);
        if (c >= floor && (uint32_t)(c >> 32) > LEAST)
            s.list[atomicAdd(&s.n, 1u)] = c;
    }
    __syncthreads();
    int size = 2;
    while (size < total)
        size *= 2;
    for (int i = total + threadIdx.x; i < size; i += THREADS)
        s.list[i] = 0;
    sort(s.list, size);

    const int mine[2] = {2 * (int)threadIdx.x, 2 * (int)threadIdx.x + 1};
    float logit[2];
    for (int i = 0; i < 2; ++i)
        logit[i] = mine[i] < kept ? logit_of(s.list[mine[i]]) : -INFINITY;
    if (threadIdx.x == 0)
        s.cut = kept;
    if (row.top_p < 1) {
        double weight[2], sum;
        for (int i = 0; i < 2; ++i)
            weight[i] = expf(logit[i] - top);
        double upto = block_prefix(weight[0] + weight[1], s.real_sums, &sum);
        const double enough = (double)row.top_p * sum;
        for (int i = 0; i < 2; ++i) {
            upto += weight[i];
            if (mine[i] < kept && upto >= enough)
                atomicMin(&s.cut, (uint32_t)mine[i] + 1);
        }
    }
    __syncthreads();
    if (row.min_p > 0) {
        const float least = top + logf(row.min_p);
        for (int i = 0; i < 2; ++i) {
            if (mine[i] > 0 && mine[i] < kept && logit[i] < least)
                atomicMin(&s.cut, (uint32_t)mine[i]);
        }
        __syncthreads();
    }
    kept = (int)s.cut;
    if (threadIdx.x == 0)
        s.pick = kept - 1;
    double weight[2], sum;
    for (int i = 0; i < 2; ++i)
        weight[i] = mine[i] < kept ? expf((logit[i] - top) / row.temperature) : 0.0f;
    double upto = block_prefix(weight[0] + weight[1], s.real_sums, &sum);
    for (int i = 0; i < 2; ++i) {
        upto += weight[i];
        if (mine[i] < kept && upto > at * sum)
            atomicMin(&s.pick, (uint32_t)mine[i]);
    }
    __syncthreads();
    return id_of(s.list[s.pick]);
}

// e^x for x <= 0 as an integer multiple of 2^-32.
__device__ __forceinline__ uint64_t mass_of(float x) { return (uint64_t)((double)expf(x) * 4294967296.0); }

// The largest composite c such that the tokens from `floor` on that are at least c amount to `need`, counted or by
// their mass.
__device__ __forceinline__ uint64_t threshold(SampleShared &s, const float *logits, int n_vocab, float top,
                                              bool by_mass, uint64_t need, uint64_t floor) {
    uint64_t prefix = 0;
    int known = 64;
    while (known > 0) {
        const int width = min(known, 12), shift = known - width;
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            s.masses[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n_vocab; i += THREADS) {
            const uint64_t c = composite(logits[i], i);
            if (c < floor || (known < 64 && c >> known != prefix))
                continue;
            atomic_add_u64(&s.masses[c >> shift & ((1u << width) - 1)], by_mass ? mass_of(logits[i] - top) : 1);
        }
        __syncthreads();
        const int highest = BINS - 1 - 4 * (int)threadIdx.x;
        uint64_t counts[4], total;
        for (int i = 0; i < 4; ++i)
            counts[i] = s.masses[highest - i];
        uint64_t before = block_prefix(counts[0] + counts[1] + counts[2] + counts[3], s.wide_sums, &total);
        for (int i = 0; i < 4; ++i) {
            if (before < need && need <= before + counts[i]) {
                s.digit = highest - i;
                s.above = before;
                s.inside = counts[i];
            }
            before += counts[i];
        }
        __syncthreads();
        prefix = prefix << width | s.digit;
        need -= s.above;
        known = shift;
        if (need == s.inside)
            break;
    }
    return prefix << known;
}

// The same for any number of tokens, by passes over all logits; drawn in the order of ids.
__device__ __forceinline__ uint32_t draw_many(SampleShared &s, const float *logits, int n_vocab,
                                              const clsa_sample_row &row, float top, uint64_t allowed, uint64_t kept,
                                              double at) {
    uint64_t floor = (uint64_t)(LEAST + 1) << 32;
    if (kept < allowed)
        floor = threshold(s, logits, n_vocab, top, false, kept, floor);
    const int each = (n_vocab + THREADS - 1) / THREADS, begin = min(n_vocab, each * (int)threadIdx.x),
              end = min(n_vocab, begin + each);
    uint64_t sum = 0, total;
    if (row.top_p < 1) {
        for (int i = begin; i < end; ++i) {
            if (composite(logits[i], i) >= floor)
                sum += mass_of(logits[i] - top);
        }
        block_prefix(sum, s.wide_sums, &total);
        const double enough = ceil((double)row.top_p * (double)total);
        floor = threshold(s, logits, n_vocab, top, true, max((uint64_t)1, min(total, (uint64_t)enough)), floor);
    }
    if (row.min_p > 0)
        floor = max(floor, (uint64_t)ordered(fminf(top, top + logf(row.min_p))) << 32);
    sum = 0;
    for (int i = begin; i < end; ++i) {
        if (composite(logits[i], i) >= floor)
            sum += mass_of((logits[i] - top) / row.temperature);
    }
    __syncthreads();
    if (threadIdx.x == 0)
        s.pick = 0;
    uint64_t upto = block_prefix(sum, s.wide_sums, &total);
    const uint64_t target = min((uint64_t)(at * (double)total), total - 1);
    if (upto <= target && target < upto + sum) {
        for (int i = begin; i < end; ++i) {
            if (composite(logits[i], i) < floor)
                continue;
            upto += mass_of((logits[i] - top) / row.temperature);
            if (upto > target) {
                s.pick = i;
                break;
            }
        }
    }
    __syncthreads();
    return s.pick;
}

// Grid (splits, rows).
__device__ __forceinline__ void sample_body(const clsa_sample_cuda &p) {
    CLSA_DYNAMIC_SHARED(shared);
    SampleShared &s = *reinterpret_cast<SampleShared *>(shared);
    grid_begin();
    const int row = blockIdx.y, lane = threadIdx.x % 32;
    const float *logits = p.logits + (size_t)row * p.n_vocab;
    clsa_sample_state *state = p.state + row;
    clsa_sample_row params = p.rows[row];
    const bool greedy = !(params.temperature > 0);
    if (!greedy)
        zero_histogram(s.bins, BINS);
    uint64_t best = 0;
    bool bad = false;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < p.n_vocab; i += gridDim.x * THREADS) {
        const float x = logits[i];
        bad |= x != x || x == INFINITY;
        const uint64_t c = composite(x, i);
        best = max(best, c);
        if (!greedy && x > -INFINITY)
            atomicAdd(&s.bins[c >> (32 + BIN_SHIFT)], 1u);
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        best = max(best, (uint64_t)__shfl_xor_sync(CLSA_FULL_WARP, best, o));
    const bool any_bad = __ballot_sync(CLSA_FULL_WARP, bad) != 0;
    if (lane == 0) {
        atomic_max_u64(&state->best, best);
        if (any_bad)
            atomicOr(&state->bad, 1u);
    }
    if (!greedy) {
        __syncthreads();
        flush_histogram(s.bins, state->histogram);
    }
    if (!last_block(&state->ticket, gridDim.x, &s.flag))
        return;

    best = load_l2(&state->best);
    const bool broken = load_l2(&state->bad) != 0, nothing = (uint32_t)(best >> 32) <= LEAST;
    uint4 counts = make_uint4(0, 0, 0, 0);
    if (!greedy)
        counts = load_l2(reinterpret_cast<const uint4 *>(&state->histogram[BINS - 4 - 4 * threadIdx.x]));
    __syncthreads(); // everyone has read the state
    if (threadIdx.x == 0) {
        state->best = 0;
        state->bad = 0;
    }
    if (!greedy)
        *reinterpret_cast<uint4 *>(&state->histogram[BINS - 4 - 4 * threadIdx.x]) = make_uint4(0, 0, 0, 0);
    uint32_t token = id_of(best);
    if (!broken && !nothing && !greedy) {
        const float top = logit_of(best);
        const double at = uniform(params);
        if (threadIdx.x == 0)
            p.rows[row].counter = params.counter;
        uint32_t allowed;
        block_prefix(counts.x + counts.y + counts.z + counts.w, s.sums, &allowed);
        const uint32_t kept = params.top_k > 0 ? min((uint32_t)params.top_k, allowed) : allowed;
        const Pivot pivot = find_pivot(counts, BINS, kept, s.sums, &s.pivot);
        const uint32_t few = pivot.above + pivot.inside;
        if (few <= SMALL) {
            token = draw_few(s, logits, p.n_vocab, params, top, (uint64_t)pivot.bin << (32 + BIN_SHIFT), few, kept, at);
        } else if (kept <= SMALL) {
            // The bin of the last one kept is crowded.
            const uint64_t floor = threshold(s, logits, p.n_vocab, top, false, kept, (uint64_t)(LEAST + 1) << 32);
            token = draw_few(s, logits, p.n_vocab, params, top, floor, kept, kept, at);
        } else {
            token = draw_many(s, logits, p.n_vocab, params, top, allowed, kept, at);
        }
    }
    if (threadIdx.x == 0) {
        p.tokens[row] = broken || nothing ? UINT32_MAX : token;
        p.status[row] = broken ? CLSA_SAMPLE_NOT_FINITE : nothing ? CLSA_SAMPLE_NOTHING_LEFT : CLSA_SAMPLE_OK;
    }
}

} // namespace

CLSA_KERNEL(sample, clsa_sample_cuda, (THREADS, 1), (sample_body(p)))

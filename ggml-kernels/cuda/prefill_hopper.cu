// Attention of many consecutive rows on Hopper's warpgroup products (wgmma, sm_90a): d 128 over f16 caches. The tiles
// and their order are those of prefill_attention.cuh, which serves everything else.
//
// A block has three warpgroups of 64 (token, query head) rows of one KV head each, so that each has the matrix units
// while the others compute weights. Queries and weights come from registers, K and V from shared memory, where a tile
// of 64 positions lies in the layout that the units read: two halves of 64 dimensions, rows of 128 bytes whose 16-byte
// chunks are permuted by the row's number. Queries are normalised and turned here, and the results may be written as
// the f16 rows that the next product takes.
#ifndef CLSA_EMULATE
#include "attention_cuda.h"
#include "cache_rows.cuh"
#include "softmax.cuh"

namespace {

[[maybe_unused]] constexpr int D = 128;
constexpr int KEYS = 64, GROUPS = 3, THREADS = 128 * GROUPS, STAGES = 3;
constexpr int HALF_BYTES = KEYS * 128, TILE_BYTES = 2 * HALF_BYTES, RUN_BYTES = 16;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A matrix in shared memory with 128-byte swizzling: its address, and the bytes from 64 columns to the next 64
// (matrices whose rows are summed over) and from 8 rows to the next 8.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62, ROWS_8 = 1024 >> 4;
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 | ROWS_8 << 32 | SWIZZLE_128;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define ROW4(x, i) "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])
#define ROWS32(x, i)                                                                                                   \
    ROW4(x, i), ROW4(x, i + 1), ROW4(x, i + 2), ROW4(x, i + 3), ROW4(x, i + 4), ROW4(x, i + 5), ROW4(x, i + 6),        \
        ROW4(x, i + 7)

// c[64][64] (+)= a[64][16] b[64][16]^T: scores of 64 keys. `keep` false: c is not read.
__device__ __forceinline__ void add_scores(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool keep) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                 "%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
                 : ROWS32(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)keep));
}

// c[64][128] += a[64][16] b[16][128]: weighted values of 16 positions.
__device__ __forceinline__ void add_values(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                 "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
                 "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : ROWS32(c, 0), ROWS32(c, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Positions at..at+63 of K and V into a stage, zeros outside begin..end.
__device__ __forceinline__ void load_stage(uint8_t *stage, const clsa_rows &k, const clsa_rows &v,
                                           const uint32_t *table, int slot, int kv, int at, int begin, int end) {
    const size_t unit = k.ring > 0 ? (size_t)slot : (size_t)table[at / CLSA_PAGE];
    const int offset = k.ring > 0 ? at % k.ring : at % CLSA_PAGE;
    const int chunk = threadIdx.x % 16, first = threadIdx.x / 16, column = (kv * D + chunk * 8) * 2;
    const uint8_t *k_base = k.base + unit * k.page_stride + column, *v_base = v.base + unit * v.page_stride + column;
    for (int row = first; row < KEYS; row += THREADS / 16) {
        const int pos = at + row;
        const bool valid = pos >= begin && pos < end;
        int in_unit = offset + row;
        if (k.ring > 0 && in_unit >= k.ring)
            in_unit %= k.ring;
        in_unit = valid ? in_unit : 0;
        uint8_t *to = stage + chunk / 8 * HALF_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
        copy_async_16(to, k_base + (size_t)in_unit * k.row_stride, valid);
        copy_async_16(to + TILE_BYTES, v_base + (size_t)in_unit * v.row_stride, valid);
    }
}

// The lane's values of a query row (dimensions 8i + 2t, 8i + 2t + 1) on the way from the projection: rope_append.h.
__device__ __forceinline__ void turn_query(float2 (&x)[D / 8], const clsa_prefill_cuda &p, int row, int t) {
    if (p.q_norm != nullptr) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
            sum = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, sum));
        sum += __shfl_xor_sync(CLSA_FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(CLSA_FULL_WARP, sum, 2);
        const float factor = 1 / sqrtf(sum / (float)D + p.eps);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            const float2 weight = *reinterpret_cast<const float2 *>(p.q_norm + i * 8 + t * 2);
            x[i] = make_float2(x[i].x * factor * weight.x, x[i].y * factor * weight.y);
        }
    }
    if (p.cos == nullptr)
        return;
    const size_t angles = (size_t)row * (p.n_rot / 2);
    if (p.interleaved) {
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            const int j = i * 4 + t;
            const bool turned = j < p.n_rot / 2;
            const float c = turned ? p.cos[angles + j] : 1.0f, s = turned ? p.sin[angles + j] : 0.0f;
            x[i] = make_float2(x[i].x * c - x[i].y * s, x[i].y * c + x[i].x * s);
        }
    } else { // n_rot = D
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            const float2 c = *reinterpret_cast<const float2 *>(p.cos + angles + i * 8 + t * 2);
            const float2 s = *reinterpret_cast<const float2 *>(p.sin + angles + i * 8 + t * 2);
            const float2 a = x[i], b = x[i + D / 16];
            x[i] = make_float2(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y);
            x[i + D / 16] = make_float2(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y);
        }
    }
}

__device__ __forceinline__ float clamp_half(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

__device__ __forceinline__ void prefill(const clsa_prefill_cuda &p) {
    extern __shared__ uint8_t unaligned[];
    uint8_t *shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024; // [STAGES] tiles of K and of V
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int mine = threadIdx.x / 128 * 64; // the warpgroup's first row
    const clsa_attention &op = p.op;
    const int group = op.n_head / op.n_kv, kv = blockIdx.y;
    grid_begin();
    // The last rows see the most positions: first.
    const int first_row = (gridDim.x - 1 - blockIdx.x) * p.tokens, end_row = min(first_row + p.tokens, op.batch.n_rows);

    // The rows run..run_end of one sequence, and its tiles; the first two are asked for at once.
    const auto oldest = [&](int pos) { return op.window > 0 ? max(pos + 1 - op.window, 0) : 0; };
    struct Run {
        int slot, rows_end, begin, end; // positions begin..end
    };
    // In shared memory, where it takes no registers: each warp has its own.
    static_assert(sizeof(Run) == RUN_BYTES);
    Run &here = reinterpret_cast<Run *>(shared + STAGES * 2 * TILE_BYTES)[threadIdx.x / 32];
    const auto load = [&](int tile) {
        const Run r = here;
        if (tile * KEYS < r.end)
            load_stage(shared + tile % STAGES * (2 * TILE_BYTES), op.k, op.v,
                       op.batch.tables + (size_t)r.slot * op.batch.table_stride, r.slot, kv, tile * KEYS, r.begin,
                       r.end);
        copy_async_commit();
    };
    const auto open_run = [&](int run) {
        Run r;
        r.slot = op.batch.slot[run];
        r.begin = oldest(op.batch.pos[run]);
        for (r.rows_end = run + 1; r.rows_end < end_row;) {
            const int at = r.rows_end + lane;
            const uint32_t same = __ballot_sync(CLSA_FULL_WARP, at < end_row && op.batch.slot[at] == r.slot);
            r.rows_end += same == CLSA_FULL_WARP ? 32 : __ffs(~same) - 1;
            if (same != CLSA_FULL_WARP)
                break;
        }
        r.end = op.batch.pos[r.rows_end - 1] + 1;
        __syncwarp(); // all have read the run before
        if (lane == 0)
            here = r;
        __syncwarp();
        load(r.begin / KEYS);
        load(r.begin / KEYS + 1);
    };
    open_run(first_row);

    // Of the lane's rows g and g + 8 of the warp's 16: the batch row, -1 past the end, and where the lane's first
    // dimension lies in q and out. Computed anew where they are needed.
    const auto row = [&](int h) { return mine + (int)threadIdx.x % 128 / 32 * 16 + g + 8 * h; };
    const auto token = [&](int h) {
        const int at = first_row + row(h) / group;
        return row(h) < p.tokens * group && at < end_row ? at : -1;
    };
    const auto place = [&](int h) { return ((size_t)token(h) * op.n_head + kv * group + row(h) % group) * D + 2 * t; };
    float2 values[2][D / 8];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const bool there = token(h) >= 0;
        const float *from = op.q + place(h);
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
            values[h][i] = !there ? make_float2(0, 0) : *reinterpret_cast<const float2 *>(from + i * 8);
    }
    uint32_t query[D / 16][4];
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float2(&x)[D / 8] = values[h];
        turn_query(x, p, max(token(h), 0), t);
        // Scaled by a power of two to use the range of f16.
        float largest = 0;
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
            largest = fmaxf(largest, fmaxf(fabsf(x[i].x), fabsf(x[i].y)));
        const auto [scale, inverse] = quad_scale(largest, 8);
        factor[h] = inverse * op.scale * 1.4426950408889634f;
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
            query[i / 2][i % 2 * 2 + h] = pack_half2(x[i].x * scale, x[i].y * scale);
    }

    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (int run = first_row; run < end_row;) {
        const int run_end = here.rows_end;
        // The lane's rows see the positions from oldest(high - 1) to high; none when they are not of this run.
        int high[2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
            high[h] = token(h) >= run && token(h) < run_end ? op.batch.pos[token(h)] + 1 : 0;
        // The tiles that the warpgroup's rows see, and the positions all_low..all_high that every one of them does.
        const int head_token = first_row + mine / group, tail_token = min(first_row + (mine + 63) / group, end_row - 1);
        const int head_here = max(head_token, run), tail_here = min(tail_token, run_end - 1);
        int my_first = 0, my_end = 0, all_low = 0, all_high = 0;
        if (head_here <= tail_here) {
            const int head_pos = op.batch.pos[head_here], tail_pos = op.batch.pos[tail_here];
            my_first = oldest(head_pos) / KEYS;
            my_end = tail_pos / KEYS + 1;
            all_low = oldest(tail_pos);
            all_high = head_here == head_token && tail_here == tail_token ? head_pos + 1 : 0;
        }

        for (int tile = here.begin / KEYS; tile * KEYS < here.end; ++tile) {
            copy_async_wait<1>();
            // What this thread copied is seen by the matrix units of whoever passes the barrier; and the stage before
            // this one has been read.
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncthreads();
            load(tile + 2);
            if (tile < my_first || tile >= my_end)
                continue;
            const int at = tile * KEYS;
            const uint32_t k_tile = shared_address(shared + tile % STAGES * (2 * TILE_BYTES));

            float score[KEYS / 8][4];
            products_begin();
#pragma unroll
            for (int i = 0; i < D / 16; ++i)
                add_scores(score, query[i], descriptor(k_tile + i / 4 * HALF_BYTES + i % 4 * 32, 16), i > 0);
            products_wait();
            if (at < all_low || at + KEYS > all_high) {
#pragma unroll
                for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int pos = at + j * 8 + 2 * t + i % 2;
                        if (pos < oldest(high[i / 2] - 1) || pos >= high[i / 2])
                            score[j][i] = -INFINITY;
                    }
                }
            }
            softmax_step(score, factor, top, sum, out);
            uint32_t weights[KEYS / 16][4];
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j) {
                weights[j / 2][j % 2 * 2] = pack_half2(score[j][0], score[j][1]);
                weights[j / 2][j % 2 * 2 + 1] = pack_half2(score[j][2], score[j][3]);
            }
            products_begin();
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j)
                add_values(out, weights[j], descriptor(k_tile + TILE_BYTES + j * 2048, HALF_BYTES));
            products_wait();
        }
        copy_async_wait<0>();
        run = here.rows_end;
        if (run < end_row) {
            __syncthreads(); // the run and all stages may be written again
            open_run(run);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(CLSA_FULL_WARP, sum[h], 1);
        sum[h] += __shfl_xor_sync(CLSA_FULL_WARP, sum[h], 2);
        if (token(h) < 0)
            continue;
        const float inverse = 1 / sum[h];
        const size_t to = place(h);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            const float a = out[i][2 * h] * inverse, b = out[i][2 * h + 1] * inverse;
            if (p.out_f16 != nullptr)
                *reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(p.out_f16) + to + i * 8) =
                    pack_half2(clamp_half(a), clamp_half(b));
            else
                *reinterpret_cast<float2 *>(op.out + to + i * 8) = make_float2(a, b);
        }
    }
}

#endif

} // namespace

// Grid (tiles of p.tokens rows, n_kv); shared: CLSA_PREFILL_HOPPER_SHARED.
static_assert(STAGES * 2 * TILE_BYTES + THREADS / 32 * RUN_BYTES + 1024 == CLSA_PREFILL_HOPPER_SHARED,
              "what the launch asks for");
static_assert(64 * GROUPS == CLSA_PREFILL_HOPPER_ROWS, "what the launch counts with");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
CLSA_KERNEL(attention_prefill_hopper, clsa_prefill_cuda, (THREADS, 1), (prefill(p)))
#else
// Code for other targets does not have that name, so that the host cannot launch what does nothing; no file is empty.
CLSA_KERNEL(attention_prefill_other, clsa_prefill_cuda, (THREADS, 1), )
#endif
#endif // CLSA_EMULATE

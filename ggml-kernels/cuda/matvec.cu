// One activation row times quantized matrices: see clsa_matvec in gpu_matmul.h.
//
// A block takes tiles of 16 rows of W (GLU: 8 of the gate and the same 8 of up), one after another; its warps share the
// columns in units of 256, eight groups of 32. In a unit lane (g, t) reads groups t and t + 4 of rows g and g + 8, and
// the tensor cores multiply: sixteen 16x8x16 products whose k-th pairs are numbered so that each lane's own weights are
// its fragment. The eight columns of the activation operand keep the groups apart: column n holds the activations of
// group n and zeros for the others, so that the product [16][8] is the sum of each row and group, which one
// multiplication by the group's scale ends. The codes go in as they are: an integer below 2048 in the bits of an f16 is
// that integer times 2^-24. Offsets of the codes meet the sums of the activations. A warp's first two units are asked
// for before the predecessor kernel has ended, and each later one when the unit two before it is multiplied.
#include "quant.cuh"

namespace clsa {

constexpr int MAX_WARPS = CLSA_MATVEC_WARPS;

struct Scratch {
    float part[2][MAX_WARPS][16];
    float sums[32];
};

// Eight activations from x, times the norm's weights.
struct Eight {
    float v[8];
    __device__ void fill(float x) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = x;
    }
    __device__ void load(const float *x, int u) {
        const float4 a = reinterpret_cast<const float4 *>(x)[2 * u], b = reinterpret_cast<const float4 *>(x)[2 * u + 1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
    __device__ float squares() const {
        float s = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++)
            s += v[j] * v[j];
        return s;
    }
    __device__ void times(const float *w, int u) {
        Eight by;
        by.load(w, u);
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] *= by.v[j];
    }
    __device__ uint4 halves(float scale) const {
        uint32_t h[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            h[j] = bits(clamped(v[2 * j] * scale, v[2 * j + 1] * scale));
        return make_uint4(h[0], h[2], h[1], h[3]);
    }
};

__device__ inline float sum_of_halves(const uint4 &v) {
    const float2 a = __half22float2(bits2(v.x)), b = __half22float2(bits2(v.y));
    const float2 c = __half22float2(bits2(v.z)), d = __half22float2(bits2(v.w));
    return ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
}

// Dynamic shared memory: zeros, the activations, and their sums over each 16.
constexpr int ZEROS = 32; // of 16 bytes: what the lanes of the other groups read

// Waits for the predecessors, then puts f16 activations into shared memory: unit u of eight lies at (chunk * 4 + i) * 4
// + t with chunk = u / 16, t = u / 4 % 4, i = u % 4, its pairs in the order 0 2 1 3.
// HELD: values of a thread in registers; the rest are read later (NORM: twice).
template <bool NORM, int HELD>
__device__ inline void load_activations(const clsa_matvec &p, int cols, int chunks, uint4 *xs, float *sums,
                                        float *scratch) {
    const int units = cols / 8, padded = chunks * 16, threads = blockDim.x;
    Eight x[HELD];
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const int u = threadIdx.x + j * threads;
        x[j].fill(0.0f);
        if (NORM && u < units)
            prefetch_l2(p.norm + u * 8);
    }
    if (threadIdx.x < ZEROS)
        xs[int(threadIdx.x) - ZEROS] = make_uint4(0, 0, 0, 0);
    if (p.order != CLSA_BESIDE)
        wait_for_predecessors();
    if (p.order == CLSA_LEADS)
        release_successors();
    float scale = p.in_scale;
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const int u = threadIdx.x + j * threads;
        if (u < units)
            x[j].load(p.x, u);
    }
    if constexpr (NORM) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            const int u = threadIdx.x + j * threads;
            sum += x[j].squares();
            if (u < units)
                x[j].times(p.norm, u);
        }
        for (int u = threadIdx.x + HELD * threads; u < units; u += threads) {
            Eight more;
            more.load(p.x, u);
            sum += more.squares();
        }
        scale *= rsqrtf(block_sum(sum, scratch) / float(cols) + p.eps);
    }
    const auto put = [&](int u, const uint4 &v) { // by whole warps
        float s = sum_of_halves(v);
        s += __shfl_xor_sync(0xFFFFFFFFu, s, 1);
        if (u < padded) {
            xs[(u / 16 * 4 + u % 4) * 4 + u / 4 % 4] = v;
            if (u % 2 == 0)
                sums[u / 2] = s;
        }
    };
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (j * threads < padded)
            put(threadIdx.x + j * threads, x[j].halves(scale));
    for (int first = HELD * threads; first < padded; first += threads) {
        const int u = first + threadIdx.x;
        Eight more;
        more.fill(0.0f);
        if (u < units) {
            more.load(p.x, u);
            if constexpr (NORM)
                more.times(p.norm, u);
        }
        put(u, more.halves(scale));
    }
    __syncthreads();
}

// A tile of the launch: its task, and its first row there.
struct Tile {
    int task, row;
    __device__ Tile(const clsa_matvec &p, int index) : task(0) {
        if (p.mode == CLSA_GLU) {
            row = index * 8;
            return;
        }
        for (; task + 1 < p.n_tasks; task++) {
            const int tiles = (p.task[task].w.rows + 15) >> 4;
            if (index < tiles)
                break;
            index -= tiles;
        }
        row = index * 16;
    }
};

// The scales of groups 2t and 2t + 1 of a unit of a row.
template <int T> struct UnitScales {
    using L = Layout<T>;
    static constexpr bool QUAD = T == Q6_K || T == Q2_K; // a byte for each 16 weights
    uint32_t scale[L::super ? (QUAD ? 1 : (L::scale_bytes + 3) / 4) : 2];
    uint32_t sup;

    // first: the row's first group; unit: of the row.
    __device__ void load(const clsa_planes &m, uint32_t first, int unit, int t, int groups) {
        if constexpr (L::floats) {
            return;
        } else if constexpr (!L::super) {
#pragma unroll
            for (int e = 0; e < 2; e++)
                scale[e] = load_scale<T>(m, first + uint32_t(min(8 * unit + 2 * t + e, groups - 1)));
        } else {
            const uint32_t n = first / 8 + unit;
            if constexpr (QUAD)
                scale[0] = load4(m.scales + size_t(n) * L::scale_bytes + 4 * t);
            else
                load_scales<T>(m, n, scale);
            load_super<T>(m, n, sup);
        }
    }

    // y += the products of a row. product(e, side): of the codes of group 2t + e (of its half `side`) times 2^-24;
    // sum(e, side): of the activations.
    template <typename P, typename S> __device__ void add(float &y, int t, P product, S sum) const {
        constexpr int SIDES = L::sub16 ? 2 : 1;
        if constexpr (T == Q4_K || T == Q5_K) {
            // Bytes 2t % 4 and the next of the scales' words, in the halves of a word; an integer in the bits of an f16
            // is that integer times 2^-24.
            const uint32_t select = t % 2 ? 0x4342 : 0x4140;
            const uint32_t v = __byte_perm(scale[1], 0, select), m = __byte_perm(scale[2], 0, select);
            const uint32_t x = __byte_perm(scale[3], 0, select);
            const bool late = t >= 2;
            const float2 sc = __half22float2(bits2(late ? (x & 0x000F000F) | (v >> 2 & 0x00300030) : v & 0x003F003F));
            const float2 mn =
                __half22float2(bits2(late ? (x >> 4 & 0x000F000F) | (m >> 2 & 0x00300030) : m & 0x003F003F));
            const float2 dm = __half22float2(bits2(scale[0]));
            y += dm.x * 281474976710656.0f * (sc.x * product(0, 0) + sc.y * product(1, 0)) -
                 dm.y * 16777216.0f * (mn.x * sum(0, 0) + mn.y * sum(1, 0));
        } else if constexpr (QUAD) {
            const float2 d = __half22float2(bits2(sup));
            float scaled = 0.0f, offset = 0.0f;
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const uint32_t byte = scale[0] >> (16 * e + 8 * side) & 0xFF;
                    if constexpr (T == Q6_K) {
                        const float s = float(int(int8_t(byte)));
                        scaled += s * (product(e, side) - Codes<T>::zero / 16777216.0f * sum(e, side));
                    } else {
                        scaled += float(byte & 0xF) * product(e, side);
                        offset += float(byte >> 4) * sum(e, side);
                    }
                }
            y += d.x * 16777216.0f * scaled - (T == Q6_K ? 0.0f : d.y * offset);
        } else {
            Scales<T> s;
            s.sup = sup;
#pragma unroll
            for (int i = 0; i < int(sizeof(scale) / 4); i++)
                s.scale[i] = scale[i];
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int side = 0; side < SIDES; side++) {
                    float by, offset;
                    s.get(2 * t, e, side, by, offset);
                    y += by * product(e, side) + offset * sum(e, side);
                }
        }
    }
};

// What a lane holds of a unit: its groups t and t + 4 of rows g and g + 8, and the scales of groups 2t and 2t + 1 of
// both rows, whose sums the product leaves with it.
template <int T> struct Unit {
    Codes<T> a[2], b[2];
    UnitScales<T> sa, sb;
    // first_a, first_b: the first groups of rows g and g + 8.
    __device__ void load(const clsa_planes &ma, const clsa_planes &mb, uint32_t first_a, uint32_t first_b, int unit,
                         int groups, int t, uint64_t policy) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            // A group past the end is read at the last one; its product multiplies zeros.
            const uint32_t at = Layout<T>::super ? 8 * unit + 4 * j + t : min(8 * unit + 4 * j + t, groups - 1);
            a[j].template load<true>(ma.codes, ma.high, first_a + at, policy);
            b[j].template load<true>(mb.codes, mb.high, first_b + at, policy);
        }
        sa.load(ma, first_a, unit, t, groups);
        sb.load(mb, first_b, unit, t, groups);
    }
    // Adds the unit's part of rows g and g + 8 that this lane's groups give.
    __device__ void multiply(float &ya, float &yb, const uint4 *xs, const float *sums, int unit, int chunks, int g,
                             int t) const {
        constexpr int SIDES = Layout<T>::sub16 ? 2 : 1;
        float d[SIDES][2][4] = {};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int chunk = 2 * unit + j;
            const uint4 *x = g == t + 4 * j && chunk < chunks ? xs + chunk * 16 + t : xs - ZEROS;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t u[4], v[4];
                a[j].words(i, u);
                b[j].words(i, v);
                const uint4 y = x[4 * i];
                float(&e)[2][4] = d[SIDES == 2 ? i / 2 : 0];
                mma(e[0], u[0], v[0], u[2], v[2], y.x, y.y);
                mma(e[1], u[1], v[1], u[3], v[3], y.z, y.w);
            }
        }
        // Sums over 16 of groups 2t and 2t + 1; what lies past the last chunk is not read.
        const float4 x = 8 * unit + 2 * t < 4 * chunks ? reinterpret_cast<const float4 *>(sums)[4 * unit + t]
                                                       : make_float4(0, 0, 0, 0);
        const auto sum = [&](int e, int side) {
            if constexpr (SIDES == 1)
                return e ? x.z + x.w : x.x + x.y;
            else
                return e ? (side ? x.w : x.z) : (side ? x.y : x.x);
        };
        sa.add(ya, t, [&](int e, int side) { return d[side][0][e] + d[side][1][e] * Codes<T>::odd; }, sum);
        sb.add(yb, t, [&](int e, int side) { return d[side][0][2 + e] + d[side][1][2 + e] * Codes<T>::odd; }, sum);
    }
};

// The units of a warp, in order: every `warps`-th of each tile from its own on, at least one (which may lie past the
// end and is then not multiplied), of tiles first, first + step, ... below end.
struct Walk {
    int tile, unit;
    __device__ bool next(int units, int warp, int warps, int step) { // true at a new tile
        unit += warps;
        if (unit < units)
            return false;
        unit = warp, tile += step;
        return true;
    }
};

template <int T> __device__ void run(const clsa_matvec &p, int first, int step, int end, Scratch &scratch) {
    extern __shared__ uint4 shared[];
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int cols = p.task[0].w.cols, groups = cols / 32, chunks = (groups + 3) / 4, units = (chunks + 1) / 2;
    const bool glu = p.mode == CLSA_GLU;
    uint4 *xs = shared + ZEROS;
    float *sums = reinterpret_cast<float *>(xs + chunks * 16);
    Walk loads{first, warp}, now{first, warp};
    int task;
    uint32_t first_a, first_b;
    const uint64_t policy = leaves_first();
    const auto open = [&] {
        const Tile tile(p, loads.tile);
        task = tile.task;
        const int last = p.task[task].w.rows - 1; // a row past the end is read at the last one; its product is dropped
        first_a = uint32_t(min(tile.row + g, last)) * uint32_t(groups);
        first_b = glu ? first_a : uint32_t(min(tile.row + g + 8, last)) * uint32_t(groups);
    };
    const auto load = [&](Unit<T> &unit) {
        if (loads.tile >= end)
            return;
        unit.load(p.task[task].w, p.task[glu ? 1 : task].w, first_a, first_b, min(loads.unit, units - 1), groups, t,
                  policy);
        if (loads.next(units, warp, warps, step) && loads.tile < end)
            open();
    };
    Unit<T> one, two;
    float ya = 0.0f, yb = 0.0f;
    if (p.order != CLSA_LEADS)
        release_successors();
    open();
    load(one);
    load(two);
    constexpr int HELD = Layout<T>::high_bytes > 0 ? 1 : 2; // what the two units leave registers for
    if (p.norm)
        load_activations<true, HELD>(p, cols, chunks, xs, sums, scratch.sums);
    else
        load_activations<false, HELD + 1>(p, cols, chunks, xs, sums, scratch.sums);

    // The warp that adds up the tile in hand: they take turns.
    int turn = 0, parity = 0;
    // Multiplies `unit` and loads the one after the next into it; ends a tile when its units are done. False when all
    // is done.
    const auto advance = [&](Unit<T> &unit) {
        const int this_unit = now.unit;
        float *to = nullptr; // where the lane's sum goes
        float before = 0.0f;
        const bool last = this_unit + warps >= units;
        if (last && warp == turn) {
            const Tile tile(p, now.tile);
            const clsa_matmul_task &task = p.task[tile.task];
            const int r = tile.row + lane;
            if (lane < (glu ? 8 : 16) && r < task.w.rows)
                to = task.out + r;
            if (to != nullptr && p.mode == CLSA_ADD)
                before = *to;
        }
        now.next(units, warp, warps, step);
        if (this_unit < units)
            unit.multiply(ya, yb, xs, sums, this_unit, chunks, g, t);
        load(unit);
        if (last) {
            ya += __shfl_xor_sync(0xFFFFFFFFu, ya, 1), yb += __shfl_xor_sync(0xFFFFFFFFu, yb, 1);
            ya += __shfl_xor_sync(0xFFFFFFFFu, ya, 2), yb += __shfl_xor_sync(0xFFFFFFFFu, yb, 2);
            if (t == 0) {
                scratch.part[parity][warp][g] = ya;
                scratch.part[parity][warp][g + 8] = yb;
            }
            ya = yb = 0.0f;
            __syncthreads();
            if (warp == turn) {
                float y = 0.0f;
#pragma unroll
                for (int w = 0; w < MAX_WARPS; w += 2)
                    if (w + lane / 16 < warps)
                        y += scratch.part[parity][w + lane / 16][lane % 16];
                y += __shfl_xor_sync(0xFFFFFFFFu, y, 16);
                y *= p.out_scale;
                const float up = __shfl_down_sync(0xFFFFFFFFu, y, 8);
                if (to != nullptr)
                    *to = glu ? silu(y) * up : y + before;
            }
            parity ^= 1;
            turn = turn + 1 < warps ? turn + 1 : 0;
        }
        return now.tile < end;
    };
    while (advance(one) && advance(two)) {
    }
    if (p.order == CLSA_BESIDE)
        wait_for_predecessors();
}

} // namespace clsa

using namespace clsa;

// block: 32 * warps; shared: 512 bytes, and 288 for each chunk of 128 columns; p.n_tiles: the 16-row tiles of all tasks
// (GLU: the 8-row tiles of task 0). One kernel for each type: a launch's tasks are of one type. Types whose units take
// more registers have eight warps a block (Spread).
#define SAME(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(                                                                      \
        T == Q8_0 || T == Q5_K ? 32 * CLSA_MATVEC_WARPS_WIDE : 32 * MAX_WARPS, 2)                                      \
        clsa_matvec_##T##_kernel(const __grid_constant__ clsa_matvec p) {                                              \
        __shared__ Scratch scratch;                                                                                    \
        run<T>(p, blockIdx.x, gridDim.x, p.n_tiles, scratch);                                                          \
    }
CLSA_TYPES(SAME)

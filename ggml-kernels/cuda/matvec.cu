// One activation row times quantized matrices: see clsa_matvec in gpu_matmul.h.
//
// A block takes tiles of 16 rows of W (GLU: 8 of the gate and the same 8 of up), one after another; its warps share the
// columns in units of 256, eight groups of 32. In a unit lane (g, t) reads groups t and t + 4 of rows g and g + 8, and
// the tensor cores multiply: sixteen 16x8x16 products whose k-th pairs are numbered so that each lane's own weights are
// its fragment. The eight columns of the activation operand keep the groups apart: column n holds the activations of
// group n and zeros for the others, so that the product [16][8] is the sum of each row and group, which one
// multiplication by the group's scale ends. The codes go in as they are: an integer below 2048 in the bits of an f16 is
// that integer times 2^-24. Offsets of the codes meet the sums of the activations. The next unit is on its way while
// one is multiplied, and the first one is asked for before the predecessor kernel has ended.
#include "quant.cuh"

namespace clsa {

constexpr int MAX_WARPS = 10;

struct Scratch {
    float part[2][MAX_WARPS][16];
    float sums[32];
};

// Eight activations from x, times the norm's weights.
struct Eight {
    float v[8];
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
    __device__ uint4 halves(const Eight &w, float scale) const {
        uint32_t h[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            h[j] = bits(clamped(v[2 * j] * w.v[2 * j] * scale, v[2 * j + 1] * w.v[2 * j + 1] * scale));
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
__device__ inline void load_activations(const clsa_matvec &p, int cols, int chunks, uint4 *xs, float *sums,
                                        float *scratch) {
    constexpr int HELD = 2; // values of a thread in registers; the rest are read twice
    const int units = cols / 8, padded = chunks * 16;
    Eight x[HELD], w[HELD];
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const int u = threadIdx.x + j * blockDim.x;
#pragma unroll
        for (int e = 0; e < 8; e++)
            x[j].v[e] = 0.0f, w[j].v[e] = 1.0f;
        if (p.norm && u < units)
            w[j].load(p.norm, u);
    }
    if (threadIdx.x < ZEROS)
        xs[int(threadIdx.x) - ZEROS] = make_uint4(0, 0, 0, 0);
    wait_for_predecessors();
    float sum = 0.0f, scale = p.in_scale;
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const int u = threadIdx.x + j * blockDim.x;
        if (u < units)
            x[j].load(p.x, u);
    }
    if (p.norm) {
#pragma unroll
        for (int j = 0; j < HELD; j++)
            sum += x[j].squares();
        for (int u = threadIdx.x + HELD * blockDim.x; u < units; u += blockDim.x) {
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
        put(threadIdx.x + j * blockDim.x, x[j].halves(w[j], scale));
    for (int first = HELD * blockDim.x; first < padded; first += blockDim.x) {
        const int u = first + threadIdx.x;
        Eight more, weight;
#pragma unroll
        for (int e = 0; e < 8; e++)
            more.v[e] = 0.0f, weight.v[e] = 1.0f;
        if (u < units) {
            more.load(p.x, u);
            if (p.norm)
                weight.load(p.norm, u);
        }
        put(u, more.halves(weight, scale));
    }
    __syncthreads();
}

// A tile of the launch: its task, and its first row there.
struct Tile {
    int task, row;
    __device__ Tile(const clsa_matvec &p, int index) : task(0) {
        const int rows = p.mode == CLSA_GLU ? 8 : 16;
        for (; task + 1 < p.n_tasks && p.mode != CLSA_GLU; task++) {
            const int tiles = (p.task[task].w.rows + rows - 1) / rows;
            if (index < tiles)
                break;
            index -= tiles;
        }
        row = index * rows;
    }
};

// What a lane holds of a unit: its groups t and t + 4 of rows g and g + 8, and the scales of groups 2t and 2t + 1 of
// both rows, whose sums the product leaves with it.
template <int T> struct Unit {
    Codes<T> a[2], b[2];
    Scales<T> sa, sb;
    __device__ void load(const clsa_matvec &p, const Tile &tile, int unit, int g, int t) {
        const bool glu = p.mode == CLSA_GLU;
        const clsa_planes &wa = p.task[tile.task].w, &wb = glu ? p.task[1].w : wa;
        // A row or group past the end is read at the last one; its product is dropped, or multiplies zeros.
        const int groups = wa.cols / 32;
        const int ra = min(tile.row + g, wa.rows - 1), rb = min(tile.row + g + (glu ? 0 : 8), wb.rows - 1);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int at = min(8 * unit + 4 * j + t, groups - 1);
            a[j].load(wa, size_t(ra) * groups + at);
            b[j].load(wb, size_t(rb) * groups + at);
        }
        sa.load(wa, ra, 8 * unit, 2 * t, groups);
        sb.load(wb, rb, 8 * unit, 2 * t, groups);
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
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int group = 8 * unit + 2 * t + e;
            const float2 x = group < 4 * chunks ? reinterpret_cast<const float2 *>(sums)[group] : make_float2(0, 0);
#pragma unroll
            for (int side = 0; side < SIDES; side++) {
                const float sum = SIDES == 1 ? x.x + x.y : side ? x.y : x.x;
                const float da = d[side][0][e] + d[side][1][e] * Codes<T>::odd,
                            db = d[side][0][2 + e] + d[side][1][2 + e] * Codes<T>::odd;
                float s, m;
                sa.get(2 * t, e, side, s, m);
                ya += s * da + m * sum;
                sb.get(2 * t, e, side, s, m);
                yb += s * db + m * sum;
            }
        }
    }
};

// Tiles first, first + step, ... below end.
template <int T> __device__ void run(const clsa_matvec &p, int first, int step, int end, Scratch &scratch) {
    extern __shared__ uint4 shared[];
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int cols = p.task[0].w.cols, chunks = (cols / 32 + 3) / 4, units = (chunks + 1) / 2;
    const bool glu = p.mode == CLSA_GLU;
    uint4 *xs = shared + ZEROS;
    float *sums = reinterpret_cast<float *>(xs + chunks * 16);
    int index = first, unit = warp, parity = 0;
    Unit<T> one, two;
    float ya = 0.0f, yb = 0.0f, before = 0.0f;
    release_successors();
    one.load(p, Tile(p, index), min(unit, units - 1), g, t);
    load_activations(p, cols, chunks, xs, sums, scratch.sums);

    // Multiplies `now` while `later` is loaded; ends a tile when its units are done. False when all is done.
    const auto advance = [&](Unit<T> &now, Unit<T> &later) {
        const int this_index = index, this_unit = unit;
        unit += warps;
        const bool last = unit >= units;
        if (last)
            unit = warp, index += step;
        if (index < end)
            later.load(p, Tile(p, index), min(unit, units - 1), g, t);
        const Tile tile(p, this_index);
        const clsa_matmul_task &task = p.task[tile.task];
        const int r = tile.row + lane;
        const bool mine = warp == 0 && lane < (glu ? 8 : 16) && r < task.w.rows;
        if (last && mine && p.mode == CLSA_ADD)
            before = task.out[r];
        if (this_unit < units)
            now.multiply(ya, yb, xs, sums, this_unit, chunks, g, t);
        if (last) {
            ya += __shfl_xor_sync(0xFFFFFFFFu, ya, 1), yb += __shfl_xor_sync(0xFFFFFFFFu, yb, 1);
            ya += __shfl_xor_sync(0xFFFFFFFFu, ya, 2), yb += __shfl_xor_sync(0xFFFFFFFFu, yb, 2);
            if (t == 0) {
                scratch.part[parity][warp][g] = ya;
                scratch.part[parity][warp][g + 8] = yb;
            }
            ya = yb = 0.0f;
            __syncthreads();
            if (warp == 0) {
                float y = 0.0f;
#pragma unroll
                for (int w = 0; w < MAX_WARPS; w += 2)
                    if (w + lane / 16 < warps)
                        y += scratch.part[parity][w + lane / 16][lane % 16];
                y += __shfl_xor_sync(0xFFFFFFFFu, y, 16);
                y *= 1.0f / p.in_scale;
                const float up = __shfl_down_sync(0xFFFFFFFFu, y, 8);
                if (mine)
                    task.out[r] = glu ? silu(y) * up : y + before;
            }
            parity ^= 1;
        }
        return index < end;
    };
    while (advance(one, two) && advance(two, one)) {
    }
    // What comes next streams into L2 while this kernel drains and small kernels run.
    for (size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 128; at < p.prefetch_bytes;
         at += size_t(gridDim.x) * blockDim.x * 128)
        prefetch_l2(p.prefetch + at);
}

} // namespace clsa

using namespace clsa;

// block: 32 * warps; shared: 512 bytes, and 288 for each chunk of 128 columns; p.n_tiles: the 16-row tiles of all tasks
// (GLU: the 8-row tiles of task 0). One kernel for each type: a launch's tasks are of one type. Types whose units take
// more registers have fewer warps on a multiprocessor.
#define SAME(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, T == Q6_K || T == Q8_0 || T == Q5_K ? 1 : 2)          \
        clsa_matvec_##T##_kernel(const __grid_constant__ clsa_matvec p) {                                              \
        __shared__ Scratch scratch;                                                                                    \
        run<T>(p, blockIdx.x, gridDim.x, p.n_tiles, scratch);                                                          \
    }
CLSA_TYPES(SAME)

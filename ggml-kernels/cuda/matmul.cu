// 2 to 64 activation rows times quantized matrices: see clsa_gpu_matmul in gpu_matmul.h.
//
// As in matvec.cu, each warp multiplies 16-row tiles of W by chunks of 128 columns with the tensor cores; here the
// operand's columns are different activation rows, read in fragment order through L1. A block has `tile_warps` warps
// along the rows of W, and the others share the columns; partial sums meet in shared memory, always in the same order.
#include "quant.cuh"

namespace clsa {

constexpr int MAX_WARPS = CLSA_MATMUL_WARPS;

// The groups of a lane in a chunk: group t of rows g and g + 8.
template <int T> struct Pair {
    Group<T> a, b;
};

// NT: tiles of 8 activation rows.
template <int T, int NT>
__device__ void tile(const clsa_gpu_matmul &p, const clsa_matmul_task &task, int first_tile, float *part) {
    const int warp = uniform_warp(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warps = blockDim.x / 32, along = p.tile_warps, shares = warps / along;
    const int mine = warp % along, share = warp / along;
    const int cols = task.w.cols, groups = cols / 32, chunks = (groups + 3) / 4;
    const bool glu = p.mode == CLSA_GLU;
    const clsa_planes &wa = task.w, &wb = glu ? p.task[1].w : task.w;
    const int first_row = (first_tile + mine) * (glu ? 8 : 16);
    // A row or group past the end is read at the last one; its product is dropped, or multiplies zeros.
    const int ra = min(first_row + g, wa.rows - 1), rb = min(first_row + g + (glu ? 0 : 8), wb.rows - 1);
    const auto load = [&](Pair<T> &w, int c) {
        const int at = min(4 * min(c, chunks - 1) + t, groups - 1);
        w.a.load(wa, ra, at, groups);
        w.b.load(wb, rb, at, groups);
    };
    Pair<T> now, later;
    load(now, share);
    release_successors();
    wait_for_predecessors();

    float acc[NT][4] = {};
    const uint4 *x = static_cast<const uint4 *>(p.a);
    for (int c = share; c < chunks; c += shares) {
        load(later, c + shares);
        const int at = min(4 * c + t, groups - 1);
        const bool whole = at == 4 * c + t; // the columns past the last group hold anything
        half2 sa[2], ma[2], sb[2], mb[2];
        now.a.factors(at, sa, ma);
        now.b.factors(at, sb, mb);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            half2 u[4], v[4];
            now.a.pairs(i, sa, ma, u);
            now.b.pairs(i, sb, mb, v);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint4 y = whole ? x[((c * 4 + i) * (NT * 8) + n * 8 + g) * 4 + t] : make_uint4(0, 0, 0, 0);
                mma(acc[n], bits(u[0]), bits(v[0]), bits(u[1]), bits(v[1]), y.x, y.y);
                mma(acc[n], bits(u[2]), bits(v[2]), bits(u[3]), bits(v[3]), y.z, y.w);
            }
        }
        now = later;
    }

    // part[share][mine][n][lane][4], summed by the warps of share 0.
    if (shares > 1) {
        if (share > 0) {
            float4 *to = reinterpret_cast<float4 *>(part) + size_t((share - 1) * along + mine) * NT * 32 + lane;
#pragma unroll
            for (int n = 0; n < NT; n++)
                to[n * 32] = make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]);
        }
        __syncthreads();
        if (share > 0)
            return;
        for (int s = 1; s < shares; s++) {
            const float4 *from =
                reinterpret_cast<const float4 *>(part) + size_t((s - 1) * along + mine) * NT * 32 + lane;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const float4 v = from[n * 32];
                acc[n][0] += v.x, acc[n][1] += v.y, acc[n][2] += v.z, acc[n][3] += v.w;
            }
        }
    }
    // acc[n][e] and acc[n][2 + e]: rows g and g + 8, activation row 8n + 2t + e.
    const float scale = 1.0f / (weight_scale<T>() * p.in_scale);
    const int row = first_row + g;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            acc[n][e] *= scale;
    if (glu) {
        if (row >= wa.rows)
            return;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int at = n * 8 + 2 * t + e;
                if (at >= p.n_rows)
                    continue;
                const float h = silu(acc[n][e]) * acc[n][2 + e] * p.out_scale;
                const size_t unit = (size_t(row / 128 * 4 + row / 8 % 4) * (NT * 8) + at) * 4 + row / 32 % 4;
                static_cast<__half *>(p.out_packed)[unit * 8 + row % 8] =
                    __float2half_rn(fminf(fmaxf(h, -65504.0f), 65504.0f));
            }
    } else {
        const auto place = [&](int n, int e) { // where acc[n][e] goes; NULL: nowhere
            const int at = n * 8 + 2 * t + e % 2, r = row + (e < 2 ? 0 : 8);
            return at < p.n_rows && r < wa.rows ? task.out + size_t(at) * wa.rows + r : nullptr;
        };
        if (p.mode == CLSA_ADD) { // all reads before any write, so that they travel together
            float before[NT][4];
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    before[n][e] = place(n, e) ? *place(n, e) : 0.0f;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[n][e] += before[n][e];
        }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (float *to = place(n, e))
                    *to = acc[n][e];
    }
}

// The first of this block's 16-row tiles (GLU: 8 rows of both), and its task.
__device__ inline int find_task(const clsa_gpu_matmul &p, int &n) {
    const int rows = (p.mode == CLSA_GLU ? 8 : 16) * p.tile_warps;
    int block = blockIdx.x;
    for (n = 0; n + 1 < p.n_tasks && p.mode != CLSA_GLU; n++) {
        const int blocks = (p.task[n].w.rows + rows - 1) / rows;
        if (block < blocks)
            break;
        block -= blocks;
    }
    return block * p.tile_warps;
}

} // namespace clsa

using namespace clsa;

// grid: the row tiles of all tasks, of tile_warps * 16 rows (GLU: 8); block: 32 * tile_warps * column shares;
// shared: (shares - 1) * tile_warps * NT * 512 bytes.
#define SAME(T, ROWS)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1)                                                    \
        clsa_matmul_##ROWS##_##T##_kernel(const __grid_constant__ clsa_gpu_matmul p) {                                 \
        extern __shared__ float part[];                                                                                \
        int n;                                                                                                         \
        const int first = find_task(p, n);                                                                             \
        tile<T, ROWS / 8>(p, p.task[n], first, part);                                                                  \
    }
#define EACH(T) SAME(T, 8) SAME(T, 32) SAME(T, 64)
CLSA_TYPES(EACH)

// In f32; a warp per row of W and activation row. For parity tests with F32 weights.
extern "C" __global__ void clsa_matmul_f32_kernel(const clsa_matmul_f32 p) {
    wait_for_predecessors();
    release_successors();
    const int lane = threadIdx.x % 32, r = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (r >= p.rows)
        return;
    const float *w = p.w + size_t(r) * p.cols;
    for (int n = blockIdx.y; n < p.n_rows; n += gridDim.y) {
        const float *x = p.x + size_t(n) * p.cols;
        float y = 0.0f;
        for (int k = lane; k < p.cols; k += 32)
            y += w[k] * x[k];
        y = warp_sum(y);
        if (lane == 0) {
            float *out = p.out + size_t(n) * p.rows + r;
            *out = p.mode == CLSA_ADD ? *out + y : y;
        }
    }
}

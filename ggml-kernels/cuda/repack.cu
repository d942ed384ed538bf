// ggml blocks to planes (once, at upload), planes to f16 rows (for cuBLASLt), and embedding rows.
#include "quant.cuh"

namespace clsa {

// Where the fields of a ggml block lie: bytes of a block, of its scales and super-scales (in the order of the plane),
// its codes.
template <int T> struct Block {
    static constexpr int bytes = T == Q4_0 || T == IQ4_NL ? 18
                                 : T == Q4_1              ? 20
                                 : T == Q5_0              ? 22
                                 : T == Q5_1              ? 24
                                 : T == Q8_0              ? 34
                                 : T == Q2_K              ? 84
                                 : T == Q3_K              ? 110
                                 : T == Q4_K              ? 144
                                 : T == Q5_K              ? 176
                                 : T == Q6_K              ? 210
                                                          : 136;
    static constexpr int scale_at = T == Q3_K ? 96 : T == Q6_K ? 192 : 0;
    static constexpr int super_at = T == Q2_K ? 80 : T == Q3_K ? 108 : 208;
};

// Code of weight k of a block: the integer before its zero point, or the index into IQ4's grid.
template <int T> __device__ uint32_t code(const uint8_t *b, int k) {
    if constexpr (T == Q8_0) {
        return b[2 + k];
    } else if constexpr (T == Q4_0 || T == IQ4_NL || T == Q4_1 || T == Q5_0 || T == Q5_1) {
        constexpr int head = T == Q4_1 || T == Q5_1 ? 4 : 2, extra = T == Q5_0 || T == Q5_1 ? 4 : 0;
        uint32_t q = b[head + extra + k % 16] >> (4 * (k / 16)) & 0xF;
        if constexpr (extra)
            q |= uint32_t(b[head + k / 8] >> (k % 8) & 1) << 4;
        return q;
    } else if constexpr (T == Q2_K || T == Q3_K) {
        const int n = k / 128, j = k % 128 / 32, l = k % 32;
        uint32_t q = b[(T == Q2_K ? 16 : 32) + 32 * n + l] >> (2 * j) & 3;
        if constexpr (T == Q3_K)
            q |= uint32_t(b[l] >> (4 * n + j) & 1) << 2;
        return q;
    } else if constexpr (T == Q4_K || T == Q5_K) {
        const int c = k / 64, l = k % 32, high = k % 64 / 32;
        uint32_t q = b[(T == Q4_K ? 16 : 48) + 32 * c + l] >> (4 * high) & 0xF;
        if constexpr (T == Q5_K)
            q |= uint32_t(b[16 + l] >> (2 * c + high) & 1) << 4;
        return q;
    } else if constexpr (T == Q6_K) {
        const int n = k / 128, l = k % 32, part = k % 128 / 32;
        const uint32_t low = b[64 * n + 32 * (part & 1) + l] >> (4 * (part >> 1)) & 0xF;
        return low | uint32_t(b[128 + 32 * n + l] >> (2 * part) & 3) << 4;
    } else { // IQ4_XS
        const int ib = k / 32, l = k % 32;
        return b[8 + 16 * ib + l % 16] >> (4 * (l / 16)) & 0xF;
    }
}

template <int T> __device__ void repack_group(const clsa_repack &p, int row, int g) {
    using L = Layout<T>;
    const int groups = p.matrix.cols / 32, r = p.first_row + row;
    const size_t n = size_t(r) * groups + g;
    if constexpr (L::floats) {
        const uint16_t *from = reinterpret_cast<const uint16_t *>(p.blocks) + (size_t(row) * groups + g) * 32;
        uint16_t *to = reinterpret_cast<uint16_t *>(const_cast<uint8_t *>(p.matrix.codes)) + n * 32;
        for (int k = 0; k < 32; k++)
            to[k] = from[k];
        return;
    } else {
        using B = Block<T>;
        constexpr int per_block = L::super ? 8 : 1;
        const uint8_t *b = p.blocks + (size_t(row) * (groups / per_block) + g / per_block) * B::bytes;
        const int first = L::super ? g % 8 * 32 : 0;
        uint32_t codes[L::code_bytes / 4] = {}, high[L::high_bytes ? L::high_bytes / 4 : 1] = {};
        constexpr int bits = L::code_bytes / 4, high_bits = L::high_bytes / 4; // of a code, in each plane
#pragma unroll
        for (int k = 0; k < 32; k++) {
            const uint32_t q = code<T>(b, first + k);
            if constexpr (bits == 8) {
                codes[k / 4] |= q << (8 * (k % 4));
            } else {
                constexpr int per_word = 32 / bits;
                const int in = k % per_word;
                codes[k / per_word] |= (q & ((1u << bits) - 1)) << (16 * (in & 1) + bits * (in / 2));
            }
            if constexpr (high_bits > 0) {
                constexpr int per_word = 32 / high_bits;
                const int in = k % per_word;
                high[k / per_word] |= (q >> bits) << (16 * (in & 1) + high_bits * (in / 2));
            }
        }
        uint32_t *to = reinterpret_cast<uint32_t *>(const_cast<uint8_t *>(p.matrix.codes) + n * L::code_bytes);
#pragma unroll
        for (int j = 0; j < L::code_bytes / 4; j++)
            to[j] = codes[j];
        if constexpr (L::high_bytes > 0) {
            uint32_t *h = reinterpret_cast<uint32_t *>(const_cast<uint8_t *>(p.matrix.high) + n * L::high_bytes);
#pragma unroll
            for (int j = 0; j < L::high_bytes / 4; j++)
                h[j] = high[j];
        }
        if (g % per_block == 0) {
            const size_t s = L::super ? size_t(r) * (groups / 8) + g / 8 : n;
            uint8_t *to_scales = const_cast<uint8_t *>(p.matrix.scales) + s * L::scale_bytes;
            for (int j = 0; j < L::scale_bytes; j++)
                to_scales[j] = b[B::scale_at + j];
            uint8_t *to_super = const_cast<uint8_t *>(p.matrix.super) + s * L::super_bytes;
            for (int j = 0; j < L::super_bytes; j++)
                to_super[j] = b[B::super_at + j];
        }
    }
}

template <int T> __device__ void dequantize_group(const clsa_planes &m, int r, int g, half2 (&out)[16]) {
    const int groups = m.cols / 32;
    Group<T> w;
    w.load(m, r, g, groups);
    half2 s[2], a[2];
    w.factors(g, s, a);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        half2 v[4];
        w.pairs(i, s, a, v);
#pragma unroll
        for (int j = 0; j < 4; j++)
            out[4 * i + j] = v[j];
    }
}

} // namespace clsa

using namespace clsa;

// One thread per group of 32 weights: grid (ceil(groups / block), n_rows).
extern "C" __global__ void clsa_repack_kernel(const clsa_repack p) {
    const int g = blockIdx.x * blockDim.x + threadIdx.x;
    if (g >= p.matrix.cols / 32)
        return;
    for (int row = blockIdx.y; row < p.n_rows; row += gridDim.y) {
#define REPACK(T)                                                                                                      \
    case T:                                                                                                            \
        repack_group<T>(p, row, g);                                                                                    \
        break;
        CLSA_FOR_TYPE(p.matrix.type, REPACK)
    }
}

// One thread per group of the whole matrix, blocks of 128. The weights change lanes in shared memory, so that each
// store of a warp is 512 bytes side by side; chunks of 16 bytes are permuted there against bank conflicts.
extern "C" __global__ void __launch_bounds__(128) clsa_dequantize_kernel(const clsa_dequantize p) {
    __shared__ uint4 shared[4][128];
    const int lane = threadIdx.x % 32;
    uint4 *tile = shared[threadIdx.x / 32];
    const auto place = [](int group, int chunk) { return group * 4 + (chunk ^ group / 2 % 4); };
    const uint32_t per_row = p.matrix.cols / 32, groups = p.matrix.rows * per_row;
    const uint32_t first = blockIdx.x * 128 + threadIdx.x / 32 * 32, n = min(first + lane, groups - 1);
    if (first >= groups)
        return;
    half2 v[16];
#define DEQUANTIZE(T)                                                                                                  \
    case T:                                                                                                            \
        dequantize_group<T>(p.matrix, n / per_row, n % per_row, v);                                                    \
        break;
    CLSA_FOR_TYPE(p.matrix.type, DEQUANTIZE)
#pragma unroll
    for (int i = 0; i < 4; i++)
        tile[place(lane, i)] = make_uint4(bits(v[4 * i]), bits(v[4 * i + 1]), bits(v[4 * i + 2]), bits(v[4 * i + 3]));
    __syncwarp();
    uint4 *out = static_cast<uint4 *>(p.out) + size_t(first) * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = i * 32 + lane;
        if (first + at / 4 < groups)
            out[at] = tile[place(at / 4, at % 4)];
    }
}

// One thread per group: grid (ceil(groups / block), n_rows). A token past the vocabulary gives row 0.
extern "C" __global__ void clsa_embed_kernel(const clsa_embed p) {
    wait_for_predecessors();
    release_successors();
    const int g = blockIdx.x * blockDim.x + threadIdx.x, cols = p.matrix.cols;
    if (g >= cols / 32)
        return;
    for (int n = blockIdx.y; n < p.n_rows; n += gridDim.y) {
        const uint32_t token = p.tokens[n];
        const int r = token < uint32_t(p.matrix.rows) ? int(token) : 0;
        float *out = p.out + size_t(n) * cols + 32 * g;
        if (p.matrix.type == F32) {
            const float *from = reinterpret_cast<const float *>(p.matrix.codes) + size_t(r) * cols + 32 * g;
            for (int k = 0; k < 32; k++)
                out[k] = from[k] * p.scale;
            continue;
        }
        half2 v[16];
#define EMBED(T)                                                                                                       \
    case T:                                                                                                            \
        dequantize_group<T>(p.matrix, r, g, v);                                                                        \
        break;
        CLSA_FOR_TYPE(p.matrix.type, EMBED)
        const float scale = p.scale * (p.matrix.type == F16 ? 1.0f : 1.0f / CLSA_WEIGHT_SCALE);
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const float2 f = __half22float2(v[j]);
            out[2 * j] = f.x * scale, out[2 * j + 1] = f.y * scale;
        }
    }
}

// RMSNorm and SwiGLU, and the conversion of activations for the matrix kernels: see gpu_matmul.h.
#include "quant.cuh"

using namespace clsa;

// One block per row of the padded batch.
extern "C" __global__ void clsa_pack_kernel(const clsa_gpu_pack p) {
    __shared__ float scratch[32];
    release_successors();
    wait_for_predecessors();
    const int n = blockIdx.x, units = p.cols / 8, padded = p.packed ? (p.cols + 127) / 128 * 16 : units;
    uint4 *out = static_cast<uint4 *>(p.out);
    const bool real = n < p.n_rows;
    const float4 *x = reinterpret_cast<const float4 *>(p.x + size_t(real ? n : 0) * p.cols);
    float scale = p.scale;
    if (real && p.norm) {
        float sum = 0.0f;
        for (int u = threadIdx.x; u < 2 * units; u += blockDim.x) {
            const float4 a = x[u];
            sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
        }
        scale *= rsqrtf(block_sum(sum, scratch) / float(p.cols) + p.eps);
    }
    for (int u = threadIdx.x; u < padded; u += blockDim.x) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (real && u < units) {
            float4 a = x[2 * u], b = x[2 * u + 1];
            if (p.norm) {
                const float4 c = __ldg(reinterpret_cast<const float4 *>(p.norm) + 2 * u);
                const float4 d = __ldg(reinterpret_cast<const float4 *>(p.norm) + 2 * u + 1);
                a.x *= c.x, a.y *= c.y, a.z *= c.z, a.w *= c.w;
                b.x *= d.x, b.y *= d.y, b.z *= d.z, b.w *= d.w;
            }
            v.x = bits(clamped(a.x * scale, a.y * scale)), v.y = bits(clamped(a.z * scale, a.w * scale));
            v.z = bits(clamped(b.x * scale, b.y * scale)), v.w = bits(clamped(b.z * scale, b.w * scale));
        }
        if (p.packed)
            out[(size_t(u / 16 * 4 + u % 4) * p.n_padded + n) * 4 + u / 4 % 4] = v;
        else
            out[size_t(n) * units + u] = v;
    }
}

// One block per row.
extern "C" __global__ void clsa_norm_kernel(const clsa_norm p) {
    __shared__ float scratch[32];
    release_successors();
    wait_for_predecessors();
    const float *x = p.x + size_t(blockIdx.x) * p.cols;
    float *out = p.out + size_t(blockIdx.x) * p.cols;
    float sum = 0.0f;
    for (int k = threadIdx.x; k < p.cols; k += blockDim.x)
        sum += x[k] * x[k];
    const float scale = rsqrtf(block_sum(sum, scratch) / float(p.cols) + p.eps);
    for (int k = threadIdx.x; k < p.cols; k += blockDim.x)
        out[k] = x[k] * scale * p.norm[k];
}

// Four values a thread; ffn is a multiple of 4. grid (ceil(ffn / 4 / block), n_rows).
extern "C" __global__ void clsa_glu_kernel(const clsa_glu p) {
    release_successors();
    wait_for_predecessors();
    const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= p.ffn)
        return;
    for (int n = blockIdx.y; n < p.n_rows; n += gridDim.y) {
        const size_t row = size_t(n) * p.stride + i;
        float g[4], u[4];
        if (p.in_f16) {
            const uint2 a = *reinterpret_cast<const uint2 *>(static_cast<const __half *>(p.gate) + row);
            const uint2 b = *reinterpret_cast<const uint2 *>(static_cast<const __half *>(p.up) + row);
            const float2 a0 = __half22float2(bits2(a.x)), a1 = __half22float2(bits2(a.y));
            const float2 b0 = __half22float2(bits2(b.x)), b1 = __half22float2(bits2(b.y));
            g[0] = a0.x, g[1] = a0.y, g[2] = a1.x, g[3] = a1.y;
            u[0] = b0.x, u[1] = b0.y, u[2] = b1.x, u[3] = b1.y;
        } else {
            const float4 a = *reinterpret_cast<const float4 *>(static_cast<const float *>(p.gate) + row);
            const float4 b = *reinterpret_cast<const float4 *>(static_cast<const float *>(p.up) + row);
            g[0] = a.x, g[1] = a.y, g[2] = a.z, g[3] = a.w;
            u[0] = b.x, u[1] = b.y, u[2] = b.z, u[3] = b.w;
        }
        float h[4];
        for (int j = 0; j < 4; j++)
            h[j] = silu(g[j] * p.in_scale) * (u[j] * p.in_scale) * p.scale;
        const size_t at = size_t(n) * p.ffn + i;
        if (p.out_f32)
            *reinterpret_cast<float4 *>(static_cast<float *>(p.out) + at) = make_float4(h[0], h[1], h[2], h[3]);
        else
            *reinterpret_cast<uint2 *>(static_cast<__half *>(p.out) + at) =
                make_uint2(bits(clamped(h[0], h[1])), bits(clamped(h[2], h[3])));
    }
}

// One thread per angle.
extern "C" __global__ void clsa_angles_kernel(const clsa_angles p) {
    release_successors();
    wait_for_predecessors();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n_rows * p.half)
        return;
    double sine, cosine;
    sincos(double(p.pos[i / p.half]) * p.frequencies[i % p.half], &sine, &cosine);
    p.cos[i] = float(cosine), p.sin[i] = float(sine);
}

// Four values a thread: grid (ceil(cols / 4 / block), n_rows).
extern "C" __global__ void clsa_select_rows_kernel(const clsa_select_rows p) {
    release_successors();
    wait_for_predecessors();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.cols / 4)
        return;
    for (int n = blockIdx.y; n < p.n_rows; n += gridDim.y) {
        const float4 *from = reinterpret_cast<const float4 *>(p.x + size_t(p.rows[n]) * p.cols);
        reinterpret_cast<float4 *>(p.out + size_t(n) * p.cols)[i] = from[i];
    }
}

// The few machine operations that the attention, routing and sampling kernels are written in: f16 conversion,
// tensor-core products, asynchronous copies, cache hints, warp reductions. The same kernels compile as plain C++
// against tests/emulator/emulator.h (CLSA_EMULATE), where each of these has a second definition, so that their logic is
// tested without a GPU.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef CLSA_EMULATE
#include "emulator.h"
#else
#include <cuda_fp16.h>

// Defines kernel `name` of one parameter struct `p`, by value; bounds: (threads, blocks per multiprocessor).
#define CLSA_KERNEL(name, params, bounds, call)                                                                        \
    extern "C" __global__ void __launch_bounds__ bounds name(const __grid_constant__ params p) { call; }
// Dynamic shared memory of the block, aligned for 16-byte accesses.
#define CLSA_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

// ---- launch order
// -------------------------------------------------------------------------------------------------------------------
// With programmatic dependent launch a kernel starts before the previous one is done: nothing that that one wrote may
// be read, and nothing that it reads be written, before grid_wait. From grid_release on the next kernel may start, and
// load what no kernel writes, until it waits itself. grid_begin is both.
static __device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
static __device__ __forceinline__ void grid_release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
static __device__ __forceinline__ void grid_begin() {
    grid_wait();
    grid_release();
}

// ---- conversion
// ---------------------------------------------------------------------------------------------------------------------
static __device__ __forceinline__ float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
static __device__ __forceinline__ uint16_t float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }
// Two f16 in a word, `lo` in the low half, rounded to nearest even.
static __device__ __forceinline__ uint32_t pack_half2(float lo, float hi) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
static __device__ __forceinline__ uint32_t hmul2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
static __device__ __forceinline__ uint32_t hsub2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// 2^x; -inf gives 0.
static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t s) {
    return __byte_perm(a, b, s);
}

// ---- tensor cores
// -------------------------------------------------------------------------------------------------------------------
// c[16][8] += a[16][16] b[16][8], f16 products summed in f32. With g = lane / 4 and t = lane % 4:
//   a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..)    b: (2t.., g) (2t+8.., g)    c: (g, 2t) (g, 2t+1) (g+8, 2t)
//   (g+8, 2t+1)
static __device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Transposes an 8x8 matrix of f16: lane holds (g, 2t..), receives (2t.., g).
static __device__ __forceinline__ uint32_t movmatrix(uint32_t x) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
    return d;
}
static __device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Four 8x8 matrices of f16; lane 8i + r names row r of matrix i (16 bytes of shared memory). r[i]: (g, 2t..) of matrix
// i.
static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same, each matrix transposed: r[i]: (2t.., g) of matrix i.
static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// ---- memory
// -------------------------------------------------------------------------------------------------------------------------
// 16 bytes global -> shared in the background; `valid` false writes zeros and reads nothing.
static __device__ __forceinline__ void copy_async_16(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
static __device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Cache rows that are read once per step: not kept in L1, first to leave L2.
static __device__ __forceinline__ uint4 load_stream_16(const void *p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
// Policy for rows that the next layers read again: last to leave L2.
static __device__ __forceinline__ uint64_t keep_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ uint4 load_keep_16(const void *p, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(policy)
                 : "memory");
    return v;
}
static __device__ __forceinline__ void store_keep_16(void *p, uint4 v, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w), "l"(policy)
                 : "memory");
}
// Reads of what other blocks of this launch wrote: through L2, never L1.
template <typename T> static __device__ __forceinline__ T load_l2(const T *p) { return __ldcg(p); }

// CUDA's atomics take 64 bits as unsigned long long.
static __device__ __forceinline__ void atomic_add_u64(uint64_t *p, uint64_t x) {
    atomicAdd(reinterpret_cast<unsigned long long *>(p), (unsigned long long)x);
}
static __device__ __forceinline__ void atomic_max_u64(uint64_t *p, uint64_t x) {
    atomicMax(reinterpret_cast<unsigned long long *>(p), (unsigned long long)x);
}

static __device__ __forceinline__ uint32_t f32_bits(float x) { return __float_as_uint(x); }
static __device__ __forceinline__ float bits_f32(uint32_t x) { return __uint_as_float(x); }
#endif // CLSA_EMULATE

#define CLSA_FULL_WARP 0xffffffffu

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        x += __shfl_xor_sync(CLSA_FULL_WARP, x, o);
    return x;
}
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        x = fmaxf(x, __shfl_xor_sync(CLSA_FULL_WARP, x, o));
    return x;
}
// A power of two, and what undoes it.
struct PowerOfTwo {
    float scale, inverse;
};
// Brings values that four neighbouring lanes hold together near 2^exponent, for f16: `largest` is the lane's largest.
static __device__ __forceinline__ PowerOfTwo quad_scale(float largest, int exponent) {
    largest = fmaxf(largest, __shfl_xor_sync(CLSA_FULL_WARP, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(CLSA_FULL_WARP, largest, 2));
    int shift = exponent - ((int)(f32_bits(largest) >> 23 & 0xff) - 127);
    shift = largest == 0 ? 0 : max(-126, min(126, shift));
    return {bits_f32((uint32_t)(shift + 127) << 23), bits_f32((uint32_t)(127 - shift) << 23)};
}
// Sum over lanes 0..=lane.
template <typename T> static __device__ __forceinline__ T warp_inclusive_sum(T x, int lane) {
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const T y = __shfl_up_sync(CLSA_FULL_WARP, x, o);
        if (lane >= o)
            x += y;
    }
    return x;
}

// True in every thread of the block that arrives last of `blocks` at *ticket, which it leaves zero; what the others
// wrote before is then visible to it (through load_l2). `flag` is a word of shared memory.
static __device__ __forceinline__ bool last_block(uint32_t *ticket, uint32_t blocks, uint32_t *flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t before = atomicAdd(ticket, 1u);
        if (before == blocks - 1)
            *ticket = 0;
        *flag = before == blocks - 1;
    }
    __syncthreads();
    const bool last = *flag != 0;
    if (last)
        __threadfence();
    return last;
}

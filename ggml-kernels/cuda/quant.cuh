// The plane layout of gpu_matmul.h: loading a group of 32 weights and turning its codes into f16.
#pragma once
#include "gpu_matmul.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace clsa {

enum Type : int {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30
};

// Every type but F32, which has kernels of its own.
#define CLSA_TYPES(f)                                                                                                  \
    f(F16) f(BF16) f(Q4_0) f(Q4_1) f(Q5_0) f(Q5_1) f(Q8_0) f(Q2_K) f(Q3_K) f(Q4_K) f(Q5_K) f(Q6_K) f(IQ4_NL) f(IQ4_XS)
// Calls f(TYPE) for the type at hand, where CLSA_CASE(T) is `case T: ...; break;`.
#define CLSA_FOR_TYPE(type, CLSA_CASE)                                                                                 \
    switch (type) {                                                                                                    \
        CLSA_TYPES(CLSA_CASE)                                                                                          \
    default:                                                                                                           \
        break;                                                                                                         \
    }

// Factor that the f16 weights of a type carry (scales of quantized tensors are often below f16's normal range).
template <int T> constexpr float weight_scale() { return T == F16 ? 1.0f : float(CLSA_WEIGHT_SCALE); }

// Streaming loads: weights are read once and stay out of L1.
__device__ inline uint4 load16(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
// The same under an L2 policy.
__device__ inline uint4 load16(const void *p, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(policy));
    return v;
}
// Policy for what nothing reads again soon: it leaves L2 first, before the rows that the next kernels read.
__device__ inline uint64_t leaves_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ inline uint2 load8(const void *p) { return __ldg(static_cast<const uint2 *>(p)); }
__device__ inline uint32_t load4(const void *p) { return __ldg(static_cast<const uint32_t *>(p)); }
__device__ inline uint32_t load2(const void *p) { return __ldg(static_cast<const uint16_t *>(p)); }

__device__ inline half2 bits2(uint32_t v) { return *reinterpret_cast<half2 *>(&v); }
__device__ inline uint32_t bits(half2 v) { return *reinterpret_cast<uint32_t *>(&v); }
__device__ inline float half_bits(uint32_t v) { return __half2float(__ushort_as_half(static_cast<unsigned short>(v))); }

// Moves bit `from` of each half to bit `to` (both known to the compiler), leaving junk around it.
__device__ constexpr uint32_t move(uint32_t v, int from, int to) {
    return from <= to ? v << (to - from) : v >> (from - to);
}

// Layout of a type: bytes of its planes, and whether a group has one scale or two (16 weights each).
template <int T> struct Layout {
    static constexpr bool floats = T == F16 || T == BF16;
    static constexpr int code_bytes = floats ? 64 : T == Q8_0 ? 32 : (T == Q2_K || T == Q3_K) ? 8 : 16;
    static constexpr int high_bytes = T == Q6_K ? 8 : (T == Q5_0 || T == Q5_1 || T == Q5_K || T == Q3_K) ? 4 : 0;
    static constexpr bool super = T >= Q2_K && T != IQ4_NL && !floats;
    static constexpr int scale_bytes = // of a group, or of a super-block
        T == Q4_0 || T == Q5_0 || T == Q8_0 || T == IQ4_NL ? 2
        : T == Q4_1 || T == Q5_1                           ? 4
        : T == IQ4_XS                                      ? 8
        : T == Q3_K                                        ? 12
        : floats                                           ? 0
                                                           : 16;
    static constexpr int super_bytes = T == Q2_K ? 4 : (T == Q3_K || T == Q6_K) ? 2 : 0;
    static constexpr bool sub16 = T == Q2_K || T == Q3_K || T == Q6_K;
    static constexpr bool affine = T == Q4_1 || T == Q5_1 || T == Q2_K || T == Q4_K || T == Q5_K;
};

// The codes of a group as they lie in memory.
template <int T> struct Codes {
    using L = Layout<T>;
    uint32_t code[L::floats ? 1 : L::code_bytes / 4];
    uint32_t high[L::high_bytes ? L::high_bytes / 4 : 1];
    const uint8_t *from; // floats are read when they are used: they need no decoding, and would fill the registers

    // Value of an integer code in words(): times 2^-24, and 16 times that in the pairs 1 and 3 where that saves a
    // shift.
    static constexpr bool in_place = L::code_bytes == 16 && T != IQ4_NL && T != IQ4_XS;
    static constexpr float odd = in_place ? 1.0f / 16.0f : 1.0f;
    // The code of zero.
    static constexpr float zero = T == Q4_0                                 ? 8
                                  : T == Q5_0                               ? 16
                                  : T == Q6_K                               ? 32
                                  : T == Q3_K                               ? 4
                                  : T == Q8_0 || T == IQ4_NL || T == IQ4_XS ? 128
                                                                            : 0;

    // Reads group n of a matrix.
    __device__ void load(const clsa_planes &m, size_t n) { load<false>(m.codes, m.high, n, 0); }
    // Reads group n from these places of the planes on, under an L2 policy where HINT.
    template <bool HINT, typename N>
    __device__ void load(const uint8_t *codes, const uint8_t *highs, N n, uint64_t policy) {
        const uint8_t *c = codes + size_t(n) * L::code_bytes;
        if constexpr (L::floats) {
            from = c;
            return;
        } else if constexpr (L::code_bytes >= 16) {
#pragma unroll
            for (int j = 0; j < L::code_bytes / 16; j++) {
                const uint4 v = HINT ? load16(c + 16 * j, policy) : load16(c + 16 * j);
                code[4 * j] = v.x, code[4 * j + 1] = v.y, code[4 * j + 2] = v.z, code[4 * j + 3] = v.w;
            }
        } else {
            const uint2 v = load8(c);
            code[0] = v.x, code[1] = v.y;
        }
        if constexpr (L::high_bytes == 8) {
            const uint2 v = load8(highs + size_t(n) * 8);
            high[0] = v.x, high[1] = v.y;
        } else if constexpr (L::high_bytes == 4) {
            high[0] = load4(highs + size_t(n) * 4);
        }
    }

    // Codes 8i .. 8i+7 as four pairs of integers in the bits of f16 (see `odd`), or the floats; i is known to the
    // compiler.
    __device__ void words(int i, uint32_t (&out)[4]) const {
        if constexpr (L::floats) {
            const uint4 v = load16(from + 16 * i);
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if constexpr (T == F16)
                    out[j] = w[j];
                else
                    out[j] = bits(__floats2half2_rn(__uint_as_float(w[j] << 16) * weight_scale<T>(),
                                                    __uint_as_float(w[j] & 0xFFFF0000u) * weight_scale<T>()));
            }
        } else if constexpr (T == Q8_0) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t w = code[2 * i + j] ^ 0x80808080u;
                out[2 * j] = __byte_perm(w, 0, 0x4140), out[2 * j + 1] = __byte_perm(w, 0, 0x4342);
            }
        } else if constexpr (T == IQ4_NL || T == IQ4_XS) {
            // The grid -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113, plus 128, looked up four codes at a
            // time.
            uint32_t v[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t x = code[i] >> (16 * j);
                const uint32_t lo = __byte_perm(0x3F2D1801u, 0x766A5D4Fu, x & 0x7777);
                const uint32_t hi = __byte_perm(0xA6998D81u, 0xF1D9C5B5u, x & 0x7777);
                v[j] = __byte_perm(lo, hi, 0x3210 + (x >> 1 & 0x4444));
            }
            out[0] = __byte_perm(v[0], v[1], 0x7430) & 0x00FF00FFu;
            out[1] = __byte_perm(v[0], v[1], 0x7531) & 0x00FF00FFu;
            out[2] = __byte_perm(v[0], v[1], 0x7632) & 0x00FF00FFu;
            out[3] = (v[0] >> 24) | (v[1] >> 8 & 0x00FF0000u);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = in_place && j % 2 ? 4 : 0; // the lowest bit of the code in `out`
                uint32_t v;
                if constexpr (L::code_bytes == 16)
                    v = move(code[i], 4 * j, at) & (0x000F000Fu << at);
                else
                    v = code[i >> 1] >> (2 * (4 * (i & 1) + j)) & 0x00030003u;
                if constexpr (T == Q5_0 || T == Q5_1 || T == Q5_K)
                    v |= move(high[0], 4 * i + j, 4 + at) & (0x00100010u << at);
                if constexpr (T == Q3_K)
                    v |= move(high[0], 4 * i + j, 2) & 0x00040004u;
                if constexpr (T == Q6_K)
                    v |= move(high[i >> 1], 2 * (4 * (i & 1) + j), 4 + at) & (0x00300030u << at);
                out[j] = v;
            }
        }
    }
};

// What the planes hold of the scales of group n (d, or d and m), of super-block n, and above those.
template <int T> __device__ inline uint32_t load_scale(const clsa_planes &m, size_t n) {
    return Layout<T>::scale_bytes == 2 ? load2(m.scales + n * 2) : load4(m.scales + n * 4);
}
template <int T> __device__ inline void load_scales(const clsa_planes &m, size_t n, uint32_t *scale) {
    const uint8_t *p = m.scales + n * Layout<T>::scale_bytes;
    if constexpr (Layout<T>::scale_bytes == 16) {
        const uint4 v = __ldg(reinterpret_cast<const uint4 *>(p));
        scale[0] = v.x, scale[1] = v.y, scale[2] = v.z, scale[3] = v.w;
    } else if constexpr (Layout<T>::scale_bytes == 12) {
        scale[0] = load4(p), scale[1] = load4(p + 4), scale[2] = load4(p + 8);
    } else {
        const uint2 v = load8(p);
        scale[0] = v.x, scale[1] = v.y;
    }
}
template <int T> __device__ inline void load_super(const clsa_planes &m, size_t n, uint32_t &sup) {
    if constexpr (Layout<T>::super_bytes == 4)
        sup = load4(m.super + n * 4);
    else if constexpr (Layout<T>::super_bytes == 2)
        sup = load2(m.super + n * 2);
}

// The scales of one super-block, or of two groups, of a row.
template <int T> struct Scales {
    using L = Layout<T>;
    uint32_t scale[L::super ? (L::scale_bytes + 3) / 4 : 2];
    uint32_t sup;

    // Of row r of `groups` groups: the super-block from group `first` on, or groups first + g and first + g + 1.
    __device__ void load(const clsa_planes &m, int r, int first, int g, int groups) {
        if constexpr (L::floats) {
            return;
        } else if constexpr (!L::super) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                scale[e] = load_scale<T>(m, size_t(r) * groups + min(first + g + e, groups - 1));
            }
        } else {
            const size_t s = size_t(r) * (groups / 8) + first / 8;
            load_scales<T>(m, s, scale);
            load_super<T>(m, s, sup);
        }
    }

    // Multiplier and addend of the integer codes of group g + e (of the super-block), weights 16 side .. 16 side + 15
    // where a group has two scales: w = scale * code + add.
    __device__ void exact(int g, int e, int side, float &s, float &a) const {
        if constexpr (L::floats) {
            s = 1.0f, a = 0.0f;
        } else if constexpr (!L::super) {
            s = half_bits(scale[e] & 0xFFFF);
            a = L::affine ? half_bits(scale[e] >> 16) : -Codes<T>::zero * s;
        } else if constexpr (T == Q4_K || T == Q5_K) {
            const int j = g + e, sh = 8 * (j & 3);
            const bool late = j & 4;
            const uint32_t l = scale[1] >> sh, h = scale[2] >> sh, x = scale[3] >> sh;
            const uint32_t sc = late ? (x & 0xF) | (l >> 2 & 0x30) : l & 63;
            const uint32_t mn = late ? (x >> 4 & 0xF) | (h >> 2 & 0x30) : h & 63;
            s = half_bits(scale[0] & 0xFFFF) * float(sc);
            a = -half_bits(scale[0] >> 16) * float(mn);
        } else if constexpr (T == IQ4_XS) {
            const int j = g + e;
            const uint32_t low = scale[1] >> (4 * j) & 0xF, top = scale[0] >> (16 + 2 * j) & 3;
            s = half_bits(scale[0] & 0xFFFF) * float(int(low | top << 4) - 32);
            a = -Codes<T>::zero * s;
        } else {
            const int is = 2 * (g + e) + side; // 16 sub-blocks of 16
            const float d = half_bits(sup & 0xFFFF);
            if constexpr (T == Q3_K) {
                const uint32_t w = is & 4 ? scale[1] : scale[0]; // bytes is % 8
                const uint32_t low = w >> (8 * (is & 3) + (is >= 8 ? 4 : 0)) & 0xF;
                const uint32_t top = scale[2] >> (8 * (is & 3) + 2 * (is >> 2)) & 3;
                s = d * float(int(low | top << 4) - 32);
                a = -Codes<T>::zero * s;
            } else {
                const uint32_t lo = is & 4 ? scale[1] : scale[0], hi = is & 4 ? scale[3] : scale[2];
                const uint32_t byte = (is & 8 ? hi : lo) >> (8 * (is & 3)) & 0xFF;
                if constexpr (T == Q6_K) {
                    s = d * float(int(int8_t(byte)));
                    a = -Codes<T>::zero * s;
                } else {
                    s = d * float(byte & 0xF);
                    a = -half_bits(sup >> 16) * float(byte >> 4);
                }
            }
        }
    }
};

// The 32 weights of a group, to be expanded to f16.
template <int T> struct Group {
    using L = Layout<T>;
    Codes<T> codes;
    Scales<T> scales;

    // Reads group g of row r; `groups` is the number of groups of a row.
    __device__ void load(const clsa_planes &m, int r, int g, int groups) {
        codes.load(m, size_t(r) * groups + g);
        scales.load(m, r, L::super ? g & ~7 : g, 0, groups);
    }

    // Multiplier and addend of the codes' pairs (both halves alike unless L::sub16), times weight_scale.
    __device__ void factors(int g, half2 (&s)[2], half2 (&a)[2]) const {
        if constexpr (!L::floats) {
#pragma unroll
            for (int side = 0; side < (L::sub16 ? 2 : 1); side++) {
                float scale, add;
                scales.exact(L::super ? g & 7 : 0, 0, side, scale, add);
                s[side] = __float2half2_rn(scale * weight_scale<T>());
                a[side] = __float2half2_rn(add * weight_scale<T>());
            }
            if constexpr (!L::sub16)
                s[1] = s[0], a[1] = a[0];
        }
    }

    // Weights 8i .. 8i+7 as four pairs of f16; i is known to the compiler.
    __device__ void pairs(int i, const half2 (&s)[2], const half2 (&a)[2], half2 (&out)[4]) const {
        uint32_t w[4];
        codes.words(i, w);
        const int side = L::sub16 ? i >> 1 : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (L::floats) {
                out[j] = bits2(w[j]);
            } else {
                // 0x6400 is 1024, and its last bit counts 1.
                const half2 v = bits2(w[j] | 0x64006400u);
                constexpr float zero = L::affine ? 0.0f : Codes<T>::zero;
                const half2 q = Codes<T>::in_place && j % 2
                                    ? __hfma2(v, __float2half2_rn(1.0f / 16.0f), __float2half2_rn(-64.0f - zero))
                                    : __hsub2(v, __float2half2_rn(1024.0f + zero));
                out[j] = L::affine ? __hfma2(q, s[side], a[side]) : __hmul2(q, s[side]);
            }
        }
    }
};

// d += a b for a 16x16 tile of W and 8 columns of activations.
__device__ inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Waits for the kernels that this one depends on, when it was launched to overlap them.
__device__ inline void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel of the stream start its preamble.
__device__ inline void release_successors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The warp's number in its block. The broadcast tells the compiler that it, and what follows from it, is the same in
// all lanes and needs no registers of theirs.
__device__ inline int uniform_warp() { return __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0); }

__device__ inline half2 clamped(float x, float y) {
    const float top = 65504.0f;
    return __floats2half2_rn(fminf(fmaxf(x, -top), top), fminf(fmaxf(y, -top), top));
}
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ inline float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1)
        v += __shfl_xor_sync(0xFFFFFFFFu, v, o);
    return v;
}
// Sum over the block, in every thread; `scratch` holds 32 floats.
__device__ inline float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    const int warps = (blockDim.x + 31) / 32;
    if ((threadIdx.x & 31) == 0)
        scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0.0f;
    return warp_sum(v);
}

} // namespace clsa

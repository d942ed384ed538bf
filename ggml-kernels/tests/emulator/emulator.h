// The part of CUDA's device language that the kernels use, as plain C++ on one CPU thread: every thread of a block is a
// fiber, warp operations and barriers are rendezvous, blocks run one after another. Slow, and exact about what the
// machine leaves undefined: a missing lane or thread is a deadlock with a message, asynchronous copies land only when
// waited for, shared memory starts as NaN.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static
#define CLSA_DYNAMIC_SHARED(name) uint8_t *name = emulator::shared()

struct uint3 {
    unsigned x, y, z;
};

// Vectors whose every copy checks the alignment that a GPU's vector accesses demand.
inline void check_aligned(const void *p, size_t n) {
    asm volatile("" : "+r"(p)); // the type must not tell the compiler that it is
    if (reinterpret_cast<uintptr_t>(p) % n != 0) {
        fprintf(stderr, "misaligned access of %zu bytes at %p\n", n, p);
        abort();
    }
}
template <typename T> struct alignas(2 * sizeof(T)) Vector2 {
    T x, y;
    Vector2() = default;
    Vector2(T x, T y) : x(x), y(y) {}
    Vector2(const Vector2 &o) : x((check_aligned(&o, sizeof o), o.x)), y(o.y) {}
    Vector2 &operator=(const Vector2 &o) {
        check_aligned(this, sizeof o);
        check_aligned(&o, sizeof o);
        x = o.x;
        y = o.y;
        return *this;
    }
};
template <typename T> struct alignas(4 * sizeof(T)) Vector4 {
    T x, y, z, w;
    Vector4() = default;
    Vector4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    Vector4(const Vector4 &o) : x((check_aligned(&o, sizeof o), o.x)), y(o.y), z(o.z), w(o.w) {}
    Vector4 &operator=(const Vector4 &o) {
        check_aligned(this, sizeof o);
        check_aligned(&o, sizeof o);
        x = o.x;
        y = o.y;
        z = o.z;
        w = o.w;
        return *this;
    }
};
typedef Vector4<unsigned> uint4;
typedef Vector2<unsigned> uint2;
typedef Vector2<float> float2;
typedef Vector4<float> float4;
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;

namespace emulator {
typedef void (*Body)(const void *params);
struct Register {
    Register(const char *name, Body body);
};
uint8_t *shared();
// Deposits 64 bytes of this lane, waits for the warp, and returns everyone's; leave() waits until all have read.
struct Deposit {
    alignas(16) uint8_t bytes[64];
};
const Deposit *enter(const void *bytes, size_t n);
void leave();
void block_barrier();
void warp_barrier();
void copy_async(void *shared, const void *global, bool valid);
void copy_commit();
void copy_wait(int pending);
int lane();
template <typename T> T from(const Deposit *d, int lane) {
    T v;
    memcpy(&v, d[lane].bytes, sizeof v);
    return v;
}
template <typename T> T shuffle(T x, int source) {
    const Deposit *d = enter(&x, sizeof x);
    const T v = from<T>(d, source & 31);
    leave();
    return v;
}
} // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulator::warp_barrier(); }
inline void __threadfence() {}
template <typename T> T __shfl_sync(unsigned, T x, int source) { return emulator::shuffle(x, source); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int o) { return emulator::shuffle(x, emulator::lane() ^ o); }
template <typename T> T __shfl_up_sync(unsigned, T x, int o) {
    return emulator::shuffle(x, emulator::lane() >= o ? emulator::lane() - o : emulator::lane());
}
template <typename T> T __shfl_down_sync(unsigned, T x, int o) {
    return emulator::shuffle(x, emulator::lane() + o < 32 ? emulator::lane() + o : emulator::lane());
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const emulator::Deposit *d = emulator::enter(&predicate, sizeof predicate);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i)
        bits |= (emulator::from<int>(d, i) != 0 ? 1u : 0u) << i;
    emulator::leave();
    return bits;
}
inline int __syncthreads_or(int predicate) {
    static int any;
    emulator::block_barrier();
    any = 0;
    emulator::block_barrier();
    any |= predicate != 0;
    emulator::block_barrier();
    return any;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
template <typename T, typename U> T atomicAdd(T *p, U x) {
    const T before = *p;
    *p = (T)(before + (T)x);
    return before;
}
template <typename T, typename U> T atomicOr(T *p, U x) {
    const T before = *p;
    *p |= (T)x;
    return before;
}
template <typename T, typename U> T atomicMax(T *p, U x) {
    const T before = *p;
    if ((T)x > before)
        *p = (T)x;
    return before;
}

template <typename T, typename U> T atomicMin(T *p, U x) {
    const T before = *p;
    if ((T)x < before)
        *p = (T)x;
    return before;
}
inline void atomic_add_u64(uint64_t *p, uint64_t x) { *p += x; }
inline void atomic_max_u64(uint64_t *p, uint64_t x) { *p = max(*p, x); }

static inline void grid_begin() {}
static inline void grid_wait() {}
static inline void grid_release() {}
inline float half_to_float(uint16_t h) {
    _Float16 v;
    memcpy(&v, &h, 2);
    return (float)v;
}
inline uint16_t float_to_half(float f) {
    const _Float16 v = (_Float16)f;
    uint16_t h;
    memcpy(&h, &v, 2);
    return h;
}
inline uint32_t pack_half2(float lo, float hi) { return float_to_half(lo) | (uint32_t)float_to_half(hi) << 16; }
inline uint32_t hmul2(uint32_t a, uint32_t b) {
    return pack_half2(half_to_float((uint16_t)a) * half_to_float((uint16_t)b),
                      half_to_float((uint16_t)(a >> 16)) * half_to_float((uint16_t)(b >> 16)));
}
inline uint32_t hsub2(uint32_t a, uint32_t b) {
    return pack_half2(half_to_float((uint16_t)a) - half_to_float((uint16_t)b),
                      half_to_float((uint16_t)(a >> 16)) - half_to_float((uint16_t)(b >> 16)));
}
inline float exp2_approx(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float f32_of(uint32_t x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline float bits_f32(uint32_t x) { return f32_of(x); }
inline uint32_t f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t s) {
    const uint64_t both = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i)
        out |= (uint32_t)((both >> (8 * (s >> (4 * i) & 7))) & 0xff) << (8 * i);
    return out;
}

inline float half_at(uint32_t word, int high) { return half_to_float((uint16_t)(high ? word >> 16 : word)); }
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const emulator::Deposit *d = emulator::enter(mine, sizeof mine);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g, high_row = i / 2, column = 2 * t + i % 2;
        float sum = c[i];
        for (int k = 0; k < 16; ++k) {
            uint32_t from_a[6], from_b[6];
            memcpy(from_a, d[row * 4 + k % 8 / 2].bytes, sizeof from_a);
            memcpy(from_b, d[column * 4 + k % 8 / 2].bytes, sizeof from_b);
            sum += half_at(from_a[high_row + 2 * (k / 8)], k % 2) * half_at(from_b[4 + k / 8], k % 2);
        }
        c[i] = sum;
    }
    emulator::leave();
}
inline uint32_t movmatrix(uint32_t x) {
    const emulator::Deposit *d = emulator::enter(&x, sizeof x);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    // Receives elements (row 2t, column g) and (row 2t+1, column g); row r, column c is held by lane 4r + c/2.
    uint32_t out = 0;
    for (int i = 0; i < 2; ++i) {
        const uint32_t word = emulator::from<uint32_t>(d, 4 * (2 * t + i) + g / 2);
        out |= (g % 2 ? word >> 16 : word & 0xffff) << (16 * i);
    }
    emulator::leave();
    return out;
}
inline void ldmatrix_any(uint32_t (&r)[4], const void *row, bool transposed) {
    const emulator::Deposit *d = emulator::enter(&row, sizeof row);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
            const int at_row = transposed ? 2 * t + j : g, at_column = transposed ? g : 2 * t + j;
            const uint16_t *line = emulator::from<const uint16_t *>(d, 8 * i + at_row);
            if ((uintptr_t)line % 16)
                abort();
            pair[j] = line[at_column];
        }
        r[i] = pair[0] | (uint32_t)pair[1] << 16;
    }
    emulator::leave();
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) { ldmatrix_any(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) { ldmatrix_any(r, row, true); }
inline void copy_async_16(void *shared, const void *global, bool valid) {
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16)
        abort();
    emulator::copy_async(shared, global, valid);
}
inline void copy_async_commit() { emulator::copy_commit(); }
template <int N> void copy_async_wait() { emulator::copy_wait(N); }
inline uint4 load_16(const void *p) {
    if ((uintptr_t)p % 16)
        abort();
    return *static_cast<const uint4 *>(p);
}
inline uint4 load_stream_16(const void *p) { return load_16(p); }
inline uint64_t keep_policy() { return 0; }
inline uint4 load_keep_16(const void *p, uint64_t) { return load_16(p); }
inline void store_keep_16(void *p, uint4 v, uint64_t) {
    if ((uintptr_t)p % 16)
        abort();
    memcpy(p, &v, 16);
}
template <typename T> T load_l2(const T *p) {
    if ((uintptr_t)p % sizeof(T))
        abort();
    return *p;
}

#define CLSA_KERNEL(name, params, bounds, call)                                                                        \
    static void name##_body(const void *raw) {                                                                         \
        const params &p = *static_cast<const params *>(raw);                                                           \
        call;                                                                                                          \
    }                                                                                                                  \
    static emulator::Register name##_registration(#name, name##_body);

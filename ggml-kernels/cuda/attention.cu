// attention over a contiguous range of positions (attention.h): decode, split over blocks (decode_attention.cuh), and
// prefill, in tiles of rows (prefill_attention.cuh).
#include "decode_attention.cuh"
#include "prefill_attention.cuh"

namespace {

__device__ __forceinline__ DecodeShape shape_of(const clsa_attention &op) {
    return {op.n_head, op.n_kv, op.d, op.scale, op.q, op.out};
}

template <int TK, int TV, int D> __device__ __forceinline__ void attention_decode(const clsa_attention_cuda &p) {
    grid_wait();
    decode_attention<TK, TV, D>(shape_of(p.op), p.split, CachedSource(p.op, blockIdx.z), GivenQueries());
}

template <int CHUNKS, int HEADS> __device__ __forceinline__ void attention_decode_any(const clsa_attention_cuda &p) {
    grid_wait();
    const CachedSource source(p.op, blockIdx.z);
    decode_attention_any<CHUNKS, HEADS>(shape_of(p.op), p.split, source, GivenQueries(), p.op.k.type, p.op.v.type);
}

// rope_append and attention in one, for rows of as many sequences. All positions but the row's own were appended by
// earlier steps: they are read before the predecessors are done.
template <int TK, int TV, int D> __device__ __forceinline__ void attention_append(const clsa_append_attention_cuda &p) {
    CLSA_DYNAMIC_SHARED(shared);
    const AppendedQueries queries{p.append, reinterpret_cast<float *>(shared)};
    decode_attention<TK, TV, D>(shape_of(p.op), p.split, CachedSource(p.op, blockIdx.z), queries);
}

template <int CHUNKS, int HEADS>
__device__ __forceinline__ void attention_append_any(const clsa_append_attention_cuda &p) {
    CLSA_DYNAMIC_SHARED(shared);
    grid_wait();
    const AppendedQueries queries{p.append, reinterpret_cast<float *>(shared)};
    const CachedSource source(p.op, blockIdx.z);
    decode_attention_any<CHUNKS, HEADS>(shape_of(p.op), p.split, source, queries, p.op.k.type, p.op.v.type);
}

} // namespace

#define DECODE(k, v, K, V, d)                                                                                          \
    CLSA_KERNEL(attention_decode_##k##_##v##_d##d, clsa_attention_cuda, (DECODE_THREADS, 1),                           \
                (attention_decode<K, V, d>(p)))                                                                        \
    CLSA_KERNEL(attention_append_##k##_##v##_d##d, clsa_append_attention_cuda, (DECODE_THREADS, 1),                    \
                (attention_append<K, V, d>(p)))

DECODE(f16, f16, CLSA_F16, CLSA_F16, 64)
DECODE(f16, f16, CLSA_F16, CLSA_F16, 128)
DECODE(f16, q8_0, CLSA_F16, CLSA_Q8_0, 64)
DECODE(f16, q8_0, CLSA_F16, CLSA_Q8_0, 128)
DECODE(q8_0, f16, CLSA_Q8_0, CLSA_F16, 64)
DECODE(q8_0, f16, CLSA_Q8_0, CLSA_F16, 128)
DECODE(q8_0, q8_0, CLSA_Q8_0, CLSA_Q8_0, 64)
DECODE(q8_0, q8_0, CLSA_Q8_0, CLSA_Q8_0, 128)

#define DECODE_ANY(chunks, heads, limit)                                                                               \
    CLSA_KERNEL(attention_decode_any_##limit, clsa_attention_cuda, (DECODE_THREADS, 1),                                \
                (attention_decode_any<chunks, heads>(p)))                                                              \
    CLSA_KERNEL(attention_append_any_##limit, clsa_append_attention_cuda, (DECODE_THREADS, 1),                         \
                (attention_append_any<chunks, heads>(p)))

DECODE_ANY(2, 8, d64)
DECODE_ANY(4, 8, d128)
DECODE_ANY(8, 4, d256)
DECODE_ANY(16, 2, d512)

#define PREFILL(k, v, K, V)                                                                                            \
    CLSA_KERNEL(attention_prefill_##k##_##v##_d64, clsa_attention_cuda, (PREFILL_THREADS, 1),                          \
                (attention_prefill<K, V, 64>(p)))                                                                      \
    CLSA_KERNEL(attention_prefill_##k##_##v##_d128, clsa_attention_cuda, (PREFILL_THREADS, 1),                         \
                (attention_prefill<K, V, 128>(p)))

PREFILL(f16, f16, CLSA_F16, CLSA_F16)
PREFILL(f16, q8_0, CLSA_F16, CLSA_Q8_0)
PREFILL(q8_0, f16, CLSA_Q8_0, CLSA_F16)
PREFILL(q8_0, q8_0, CLSA_Q8_0, CLSA_Q8_0)

// attention over a contiguous range of positions (attention.h): decode, split over blocks (decode_attention.cuh), and
// prefill, in tiles of rows (prefill_attention.cuh).
#include "decode_attention.cuh"
#include "prefill_attention.cuh"

namespace {

template <int TK, int TV, int D> __device__ __forceinline__ void attention_decode(const clsa_attention_cuda &p) {
    grid_begin();
    const DecodeShape shape = {p.op.n_head, p.op.n_kv, D, p.op.scale, p.op.q, p.op.out};
    decode_attention<TK, TV, D>(shape, p.split, CachedSource(p.op, blockIdx.z));
}

template <int CHUNKS, int HEADS> __device__ __forceinline__ void attention_decode_any(const clsa_attention_cuda &p) {
    grid_begin();
    const DecodeShape shape = {p.op.n_head, p.op.n_kv, p.op.d, p.op.scale, p.op.q, p.op.out};
    decode_attention_any<CHUNKS, HEADS>(shape, p.split, CachedSource(p.op, blockIdx.z), p.op.k.type, p.op.v.type);
}

} // namespace

#define DECODE(k, v, K, V)                                                                                             \
    CLSA_KERNEL(attention_decode_##k##_##v##_d64, clsa_attention_cuda, (DECODE_THREADS, 3),                            \
                (attention_decode<K, V, 64>(p)))                                                                       \
    CLSA_KERNEL(attention_decode_##k##_##v##_d128, clsa_attention_cuda, (DECODE_THREADS, 3),                           \
                (attention_decode<K, V, 128>(p)))

DECODE(f16, f16, CLSA_F16, CLSA_F16)
DECODE(f16, q8_0, CLSA_F16, CLSA_Q8_0)
DECODE(q8_0, f16, CLSA_Q8_0, CLSA_F16)
DECODE(q8_0, q8_0, CLSA_Q8_0, CLSA_Q8_0)
CLSA_KERNEL(attention_decode_any_d64, clsa_attention_cuda, (DECODE_THREADS, 1), (attention_decode_any<2, 8>(p)))
CLSA_KERNEL(attention_decode_any_d128, clsa_attention_cuda, (DECODE_THREADS, 1), (attention_decode_any<4, 8>(p)))
CLSA_KERNEL(attention_decode_any_d256, clsa_attention_cuda, (DECODE_THREADS, 1), (attention_decode_any<8, 4>(p)))
CLSA_KERNEL(attention_decode_any_d512, clsa_attention_cuda, (DECODE_THREADS, 1), (attention_decode_any<16, 2>(p)))

#define PREFILL(k, v, K, V)                                                                                            \
    CLSA_KERNEL(attention_prefill_##k##_##v##_d64, clsa_attention_cuda, (PREFILL_THREADS, 1),                          \
                (attention_prefill<K, V, 64>(p)))                                                                      \
    CLSA_KERNEL(attention_prefill_##k##_##v##_d128, clsa_attention_cuda, (PREFILL_THREADS, 1),                         \
                (attention_prefill<K, V, 128>(p)))

PREFILL(f16, f16, CLSA_F16, CLSA_F16)
PREFILL(f16, q8_0, CLSA_F16, CLSA_Q8_0)
PREFILL(q8_0, f16, CLSA_Q8_0, CLSA_F16)
PREFILL(q8_0, q8_0, CLSA_Q8_0, CLSA_Q8_0)

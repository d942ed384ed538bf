// gather_attention over the selected positions (gather_attention.h): the rows gathered once per token, then attended to
// by every cross layer; or, where gathering does not pay or would need too much memory, read through the selection.
#include "decode_attention.cuh"

namespace {

constexpr int GATHER_THREADS = 256;

// Eight values of a row, converted to the gathered type.
__device__ __forceinline__ void gather_row(uint8_t *to, const uint8_t *from, int type, int width, int lane,
                                           uint64_t policy) {
    if (type == CLSA_F32) {
        for (int i = lane; i < width; i += 32)
            reinterpret_cast<float *>(to)[i] = reinterpret_cast<const float *>(from)[i];
    } else if (type == CLSA_F16) {
        for (int i = lane * 8; i < width; i += 256)
            store_keep_16(to + (size_t)i * 2, row_half8<CLSA_F16>(from, i), policy);
    } else {
        for (int i = lane * 8; i < width; i += 256)
            store_keep_16(to + (size_t)i * 2, row_half8<CLSA_Q8_0>(from, i), policy);
    }
}

// Grid (columns over the warps of a block, rows): a warp per selected position.
__device__ __forceinline__ void gather_body(const clsa_gather_cuda &p) {
    const int lane = threadIdx.x % 32, row = blockIdx.y, width = p.op.n_kv * p.op.d;
    const int column = blockIdx.x * (GATHER_THREADS / 32) + threadIdx.x / 32;
    grid_begin();
    // The selection may hold anything past its count; the read itself is in bounds.
    const int slot = p.op.batch.slot[row], count = p.op.count[row];
    if (column >= count)
        return;
    const uint32_t pos = p.op.selected[(size_t)row * p.op.n_columns + column];
    const size_t at = ((size_t)row * p.op.n_columns + column) * width;
    const uint64_t policy = keep_policy();
    gather_row(p.k + at * (p.k_type == CLSA_F32 ? 4 : 2), cache_row(p.op.k, p.op.batch, slot, pos), p.op.k.type, width,
               lane, policy);
    gather_row(p.v + at * (p.v_type == CLSA_F32 ? 4 : 2), cache_row(p.op.v, p.op.batch, slot, pos), p.op.v.type, width,
               lane, policy);
}

__device__ __forceinline__ DecodeShape shape_of(const clsa_gather_attention &op) {
    return {op.n_head, op.n_kv, op.d, op.scale, op.q, op.out};
}

template <int D> __device__ __forceinline__ void attend_gathered(const clsa_gather_cuda &p) {
    if (!p.settled)
        grid_wait();
    decode_attention<CLSA_F16, CLSA_F16, D>(shape_of(p.op), p.split, CompactSource(p, blockIdx.z), GivenQueries());
}

template <int TK, int TV, int D> __device__ __forceinline__ void attend_selected(const clsa_gather_cuda &p) {
    grid_wait();
    decode_attention<TK, TV, D>(shape_of(p.op), p.split, SelectedSource(p.op, blockIdx.z), GivenQueries());
}

template <int CHUNKS, int HEADS> __device__ __forceinline__ void attend_gathered_any(const clsa_gather_cuda &p) {
    grid_wait();
    decode_attention_any<CHUNKS, HEADS>(shape_of(p.op), p.split, CompactSource(p, blockIdx.z), GivenQueries(), p.k_type,
                                        p.v_type);
}

template <int CHUNKS, int HEADS> __device__ __forceinline__ void attend_selected_any(const clsa_gather_cuda &p) {
    grid_wait();
    decode_attention_any<CHUNKS, HEADS>(shape_of(p.op), p.split, SelectedSource(p.op, blockIdx.z), GivenQueries(),
                                        p.op.k.type, p.op.v.type);
}

} // namespace

CLSA_KERNEL(gather_rows, clsa_gather_cuda, (GATHER_THREADS, 1), (gather_body(p)))
CLSA_KERNEL(attend_gathered_d64, clsa_gather_cuda, (DECODE_THREADS, 1), (attend_gathered<64>(p)))
CLSA_KERNEL(attend_gathered_d128, clsa_gather_cuda, (DECODE_THREADS, 1), (attend_gathered<128>(p)))

#define SELECTED(k, v, K, V)                                                                                           \
    CLSA_KERNEL(attend_selected_##k##_##v##_d64, clsa_gather_cuda, (DECODE_THREADS, 1),                                \
                (attend_selected<K, V, 64>(p)))                                                                        \
    CLSA_KERNEL(attend_selected_##k##_##v##_d128, clsa_gather_cuda, (DECODE_THREADS, 1),                               \
                (attend_selected<K, V, 128>(p)))

SELECTED(f16, f16, CLSA_F16, CLSA_F16)
SELECTED(f16, q8_0, CLSA_F16, CLSA_Q8_0)
SELECTED(q8_0, f16, CLSA_Q8_0, CLSA_F16)
SELECTED(q8_0, q8_0, CLSA_Q8_0, CLSA_Q8_0)

#define ANY(chunks, heads, limit)                                                                                      \
    CLSA_KERNEL(attend_gathered_any_##limit, clsa_gather_cuda, (DECODE_THREADS, 1),                                    \
                (attend_gathered_any<chunks, heads>(p)))                                                               \
    CLSA_KERNEL(attend_selected_any_##limit, clsa_gather_cuda, (DECODE_THREADS, 1),                                    \
                (attend_selected_any<chunks, heads>(p)))

ANY(2, 8, d64)
ANY(4, 8, d128)
ANY(8, 4, d256)
ANY(16, 2, d512)

// rope_append: a warp per head normalises, rotates and stores it (rope_append.h).
#include "rope_append.cuh"

namespace {

constexpr int THREADS = 128;

// Grid (heads of q, k and v over the warps of a block, rows).
__device__ __forceinline__ void rope_append_body(const clsa_rope_append &p) {
    CLSA_DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = blockIdx.y, d = p.d;
    float *x = reinterpret_cast<float *>(shared) + warp * d;
    grid_begin();
    int head = blockIdx.x * (THREADS / 32) + warp;
    const int n_q = p.q != nullptr ? p.n_head : 0, n_k = p.k_cache.base != nullptr ? p.n_kv : 0;
    const int n_v = p.v_cache.base != nullptr ? p.n_kv : 0;
    if (head >= n_q + n_k + n_v)
        return;
    const bool is_q = head < n_q, is_v = head >= n_q + n_k;
    head -= is_v ? n_q + n_k : is_q ? 0 : n_q;
    const float *in = is_q   ? p.q + ((size_t)r * p.n_head + head) * d
                      : is_v ? p.v + ((size_t)r * p.n_kv + head) * d
                             : p.k + ((size_t)r * p.n_kv + head) * d;
    const float *norm = is_v ? nullptr : is_q ? p.q_norm : p.k_norm;
    turn_head(x, in, norm, p, is_v ? nullptr : p.cos, r, lane);
    if (is_q) {
        float *out = p.q_out + ((size_t)r * p.n_head + head) * d;
        for (int j = lane; j < d; j += 32)
            out[j] = x[j];
    } else {
        const clsa_rows &rows = is_v ? p.v_cache : p.k_cache;
        store_head(cache_row(rows, p.batch, p.batch.slot[r], p.batch.pos[r]), rows.type, head * d, x, d, lane);
    }
}

} // namespace

CLSA_KERNEL(rope_append, clsa_rope_append, (THREADS, 1), (rope_append_body(p)))

// Matrices on the GPU: quantized weights in planes, and products with one to CLSA_MATMUL_ROWS activation rows.
//
//   y[n][r] = sum_k W[r][k] a[n][k]
//
// A matrix keeps every bit of its ggml blocks, re-ordered once at upload so that a thread reads the 32 weights of a
// group with aligned 16-byte loads. G = cols / 32 groups a row, group (r, g) has number r * G + g, super-block s of a
// row number r * G/8 + s:
//
//   codes   the low bits of the 32 codes: 4 bits (16 bytes), 2 bits (8 bytes, Q2_K Q3_K), 8 bits (32 bytes, Q8_0), or
//   the floats high    the bits above them: 1 bit (4 bytes, Q5_0 Q5_1 Q5_K Q3_K) or 2 bits (8 bytes, Q6_K) scales  per
//   group: d (Q4_0 Q5_0 Q8_0 IQ4_NL) or d, m (Q4_1 Q5_1); per super-block: d, dmin, scales (16 bytes, Q4_K Q5_K),
//           scales (16 bytes Q2_K Q6_K, 12 bytes Q3_K), or d, scales_h, scales_l (8 bytes, IQ4_XS)
//   super   per super-block: d (Q6_K Q3_K) or d, dmin (Q2_K)
//
// Within a plane of b-bit codes (b = 4, 2, 1) a 32-bit word holds 32/b consecutive weights: the even ones in its low
// half and the odd ones in its high half, both from the lowest bits up, so that one shift and mask yields a pair.
#pragma once
#include "clsa.h"

#ifdef __cplusplus
extern "C" {
#endif

// Largest number of activation rows of the kernels that read the planes directly.
#define CLSA_MATMUL_ROWS 64
// Warps of a block of those kernels, of which a multiprocessor holds one.
#define CLSA_MATMUL_WARPS 16
// Warps of a block of the one-row kernels at most; of those whose units take more registers, for Q8_0 and Q5_K.
#define CLSA_MATVEC_WARPS 10
#define CLSA_MATVEC_WARPS_WIDE 8
// Bytes of shared memory that they keep the activations of 256 columns in.
#define CLSA_MATVEC_UNIT 656
// Products that one launch may do on the same activations (q, k, v; or gate, up), with matrices of one type.
#define CLSA_MATMUL_TASKS 4

struct clsa_planes {
    const uint8_t *codes, *high, *scales, *super;
    int32_t type;       // number in ggml's enum ggml_type
    int32_t rows, cols; // cols: a multiple of 32
    int32_t reserved;
};

// Raw ggml blocks to planes, and planes to f16 (times CLSA_WEIGHT_SCALE for quantized types and BF16).
#define CLSA_WEIGHT_SCALE 64
struct clsa_repack {
    struct clsa_planes matrix;
    const uint8_t *blocks; // the ggml blocks of rows first_row .. first_row + n_rows
    int32_t first_row, n_rows;
};
struct clsa_dequantize {
    struct clsa_planes matrix;
    void *out; // [rows][cols] f16
};

// x[n] = E[token[n]] * scale
struct clsa_embed {
    struct clsa_planes matrix;
    const uint32_t *tokens; // [n_rows]
    float *out;             // [n_rows][cols]
    int32_t n_rows;
    float scale;
};

// What happens to the products of a launch.
enum clsa_matmul_mode {
    CLSA_STORE = 0, // out = y
    CLSA_ADD = 1,   // out += y: the residual stream
    CLSA_GLU = 2    // task 0 is the gate, task 1 the up matrix, of one type: out = silu(y0) * y1
};

struct clsa_matmul_task {
    struct clsa_planes w;
    float *out; // [n][rows]
};

// How a launch stands in the queue of kernels that may overlap.
enum clsa_matvec_order {
    CLSA_ALONE = 0,
    // The next launch is CLSA_BESIDE: it may start once this one's predecessors are done, not before.
    CLSA_LEADS = 1,
    // Needs nothing that the CLSA_LEADS before it writes (nor a CLSA_BESIDE between them): runs at the same time, and
    // ends after it, so that whatever waits for this launch has waited for both.
    CLSA_BESIDE = 2
};

// One activation row: a = x, or with `norm` a = norm * x / sqrt(mean(x^2) + eps). It is multiplied in f16, each 256
// values times the power of two that brings their largest near 2^14.
struct clsa_matvec {
    const float *x;    // [cols]
    const float *norm; // [cols] or NULL
    // inverse_cols, units and turns follow from the rest: a kernel would wait for the divisions.
    float eps, inverse_cols; // 1 / cols
    int32_t mode, n_tasks;
    int32_t n_tiles; // 16-row tiles of all tasks; GLU: 8-row tiles of task 0
    int32_t order;
    int32_t units, turns; // 256 columns are a unit; turns: units, rounded up to a multiple of the block's warps
    struct clsa_matmul_task task[CLSA_MATMUL_TASKS];
};

// Up to CLSA_MATMUL_ROWS rows: a is f16 in the order of the matrix units' fragments, written by clsa_gpu_pack (or by
// GLU, out_packed): value (n, k) lies at unit (((k / 128) * 4 + k / 8 % 4) * n_padded + n) * 4 + k / 32 % 4 of 8
// values, place k % 8.
struct clsa_gpu_matmul {
    const void *a;
    void *out_packed; // GLU: f16 output in the same order, times out_scale
    float in_scale, out_scale;
    int32_t n_rows, n_padded; // n_padded: 8, 32 or 64
    int32_t mode, n_tasks;
    int32_t tile_warps; // warps of a block along the rows of W; the others share the columns
    int32_t reserved;
    struct clsa_matmul_task task[CLSA_MATMUL_TASKS];
};

// RMSNorm (norm != NULL) or a plain conversion of f32 rows to f16, times scale, clamped to f16's range.
struct clsa_gpu_pack {
    const float *x;    // [n_rows][cols]
    const float *norm; // [cols] or NULL
    void *out;         // packed != 0: fragment order with n_padded rows (the padding is set to 0); else [n_rows][cols]
    float eps, scale;
    int32_t n_rows, n_padded, cols, packed;
};

// h[n][i] = silu(g) * u, with g = gate[n * stride + i] * in_scale and u likewise, in f32 or f16; times scale, clamped,
// as f16 rows.
struct clsa_glu {
    const void *gate, *up;
    void *out; // [n_rows][ffn] f16, or f32 when out_f32
    float in_scale, scale;
    int32_t n_rows, ffn, stride;
    int32_t in_f16, out_f32;
    int32_t reserved;
};

// cos and sin of the angles pos * frequency, [n_rows][half], computed in f64: at a million positions an f32 angle would
// be off by a tenth of a radian.
struct clsa_angles {
    const int32_t *pos;        // [n_rows]
    const double *frequencies; // [half]
    float *cos, *sin;
    int32_t n_rows, half;
};

// out[i] = x[rows[i]], rows of `cols` floats, a multiple of 4.
struct clsa_select_rows {
    const float *x;
    const int32_t *rows; // [n_rows]
    float *out;
    int32_t n_rows, cols;
};

// RMSNorm of f32 rows to f32 rows.
struct clsa_norm {
    const float *x, *norm;
    float *out;
    float eps;
    int32_t n_rows, cols;
};

// F32 matrices: y = W a in f32 for any number of rows, stored or added.
struct clsa_matmul_f32 {
    const float *w, *x;
    float *out;
    int32_t rows, cols, n_rows, mode;
};

#ifdef __cplusplus
}
#endif

// matmul: products of activations with weights as they lie in the file, of any type of quant.rs:
//
//   y[r][o] = sum_i W[o][i] x[r][i]                       W [n_out][n_in], x [n_rows][n_in], y [n_rows][n_out]
//
// In two ops, so that products of the same x share the first (q, k, v; gate, up):
//   pack     x  ->  packed rows, after an optional RMS(x; norm) = norm * x / sqrt(mean(x^2) + eps)
//   matmul   up to CLSA_MAX_MATRICES products of the packed rows, with an optional epilogue
//
// Arithmetic. Quantized weights: x is rounded to int8 per block of 32 values (scale max|x|/127, f32), each block (or
// half block, where the weights have a scale for 16 values) is an exact integer dot product, and the products are added
// up in f32 in increasing i. F32, F16 and BF16 weights: f32 throughout. A row's bits depend on the instruction set
// alone: neither on the other rows, nor on nth, nor on how products are put together in one call. The scalar reference
// does not round x, and adds in f64. A block of x with a NaN or an infinity gives NaN.
//
// With AMX, quantized weights and CLSA_AMX_ROWS rows and more are multiplied in other ways, so that a row of an op of
// few rows and the same row in an op of many differ within the errors of both:
//   form I8    (all types of the op of at most 6 bits) x and the rows of W are cut into pieces of 64 values (zeros
//   behind
//              the last), and H x / 64 and H w take their place, H the Hadamard matrix of 64 x 64: (H x / 64) . (H w) =
//              x . w, but no value stands out from its piece. Both are rounded to int8 per block of 128 (scale
//              max / 127, f32; blocks with a maximum below 2^-100 are zeros); a block is an exact integer dot product,
//              times the product of both scales, added up in f32 in increasing i, beginning with `add`. A block of W
//              with a NaN or an infinity gives NaN too.
//   form BF16  (other quantized types) x and the weights are rounded to bf16, products are added up in f32.
#pragma once
#include "clsa.h"

#ifdef __cplusplus
extern "C" {
#endif

// Products that one op can do.
#define CLSA_MAX_MATRICES 4
// Rows up to which matmul packs x by itself: each thread does it for itself, so that no barrier is needed.
#define CLSA_PRIVATE_ROWS 8

// Forms of packed rows, bits. Which ones a product reads depends on the weights' type and on the instruction set:
// clsa_matmul_form_<isa>(type), and with AMX BF16 or I8, one of them for all matrices of the op.
enum clsa_form { CLSA_FORM_Q8 = 1, CLSA_FORM_F32 = 2, CLSA_FORM_BF16 = 4, CLSA_FORM_I8 = 8 };

// Rows from which forms BF16 and I8 pay: unpacking weights costs as much as multiplying some dozens of rows.
#define CLSA_AMX_ROWS 32

struct clsa_pack {
    int32_t n_rows, n_in;
    int32_t forms;     // bits of enum clsa_form. All but F32: n_in is a multiple of 32
    float eps;         // for norm
    const float *x;    // [n_rows][x_stride]
    size_t x_stride;   // floats
    const float *norm; // [n_in], or NULL: x as it is
    uint8_t *packed;   // clsa_packed_bytes(n_rows, n_in, forms), aligned to CLSA_ALIGN
};

// How weights lie in memory.
enum clsa_layout {
    CLSA_LAYOUT_ROWS = 0, // as in the file: [n_out] rows of whole blocks, no gaps
    // As clsa_repack writes them: rows in groups of 16 (the last one filled up with zeros); of each block, its dwords,
    // each of 16 rows side by side, then the f16 (if there is one more) of 16 rows. As large as the rows are. Not for
    // F32, F16, BF16.
    CLSA_LAYOUT_GROUPS = 1,
};

struct clsa_matrix {
    const uint8_t *w; // n_out x n_in weights
    int32_t type;     // ggml's number
    int32_t layout;   // enum clsa_layout
    int32_t n_out;
    int32_t reserved;
    float *y;          // [n_rows][y_stride]
    size_t y_stride;   // floats
    const float *add;  // [n_rows][add_stride], or NULL: y = add + W x. May equal y.
    size_t add_stride; // floats
};

enum clsa_epilogue {
    CLSA_EPILOGUE_NONE = 0,
    // Two matrices of equal n_out: mat[0].y = silu(mat[0] x) * (mat[1] x), silu(z) = z / (1 + exp(-z)). mat[1].y and
    // both `add` are unused.
    CLSA_EPILOGUE_SWIGLU = 1,
};

struct clsa_matmul {
    // x.packed: the rows, packed before by clsa_pack with the same n_rows, n_in and forms. NULL, with at most
    // CLSA_PRIVATE_ROWS rows: matmul packs them itself.
    struct clsa_pack x;
    int32_t n_mat;
    int32_t epilogue; // enum clsa_epilogue
    // SWIGLU of rows of form BF16 or I8, n_out a multiple of 32: where the results go instead of mat[0].y, rounded and
    // laid out as clsa_pack leaves the same form, of which they have clsa_packed_bytes(n_rows, n_out), aligned to
    // CLSA_ALIGN.
    uint8_t *y_packed;
    struct clsa_matrix mat[CLSA_MAX_MATRICES];
};

// Repacks rows first .. first + 16 * n_groups of a matrix (first: a multiple of 16) to `out`, where group first / 16
// belongs.
void clsa_repack(int32_t type, const uint8_t *w, int32_t n_out, int32_t n_in, int32_t first, int32_t n_groups,
                 uint8_t *out);

size_t clsa_packed_bytes(int32_t n_rows, int32_t n_in, int32_t forms);

size_t clsa_pack_scratch(const struct clsa_pack *p, int nth);
size_t clsa_matmul_scratch(const struct clsa_matmul *p, int nth);

// As clsa.h says of CLSA_OP. avx512vnni: F, BW, CD, DQ, VL, VNNI, VBMI and VBMI2. amx: those, BF16, AMX-BF16 and
// AMX-INT8.
#define CLSA_MATMUL_ISA(isa)                                                                                           \
    int32_t clsa_matmul_form_##isa(int32_t type);                                                                      \
    void clsa_pack_##isa(const struct clsa_pack *p, int ith, int nth, void *scratch);                                  \
    void clsa_matmul_##isa(const struct clsa_matmul *p, int ith, int nth, void *scratch);
CLSA_MATMUL_ISA(ref)
CLSA_MATMUL_ISA(avx2)
CLSA_MATMUL_ISA(avx512vnni)
void clsa_pack_amx(const struct clsa_pack *p, int ith, int nth, void *scratch);
void clsa_matmul_amx(const struct clsa_matmul *p, int ith, int nth, void *scratch);

#ifdef __cplusplus
}
#endif

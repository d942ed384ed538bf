// What the variants of matmul share: types, the layout of packed rows, how the outputs are shared out.
#pragma once
#include "common.h"
#include "matmul.h"
#include "team.h"

// ggml's numbers, values and bytes of a block.
#define MM_TYPES(X)                                                                                                    \
    X(F32, 0, 1, 4)                                                                                                    \
    X(F16, 1, 1, 2)                                                                                                    \
    X(Q4_0, 2, 32, 18)                                                                                                 \
    X(Q4_1, 3, 32, 20)                                                                                                 \
    X(Q5_0, 6, 32, 22)                                                                                                 \
    X(Q5_1, 7, 32, 24)                                                                                                 \
    X(Q8_0, 8, 32, 34)                                                                                                 \
    X(Q2_K, 10, 256, 84)                                                                                               \
    X(Q3_K, 11, 256, 110)                                                                                              \
    X(Q4_K, 12, 256, 144)                                                                                              \
    X(Q5_K, 13, 256, 176)                                                                                              \
    X(Q6_K, 14, 256, 210)                                                                                              \
    X(IQ4_NL, 20, 32, 18)                                                                                              \
    X(IQ4_XS, 23, 256, 136)                                                                                            \
    X(BF16, 30, 1, 2)

#define MM_ENUM(name, number, values, bytes) T_##name = number,
enum mm_type { MM_TYPES(MM_ENUM) };
#undef MM_ENUM

#define MM_QUANTIZED(X)                                                                                                \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS)

ALWAYS_INLINE size_t mm_row_bytes(int32_t type, int32_t n_in) {
    switch (type) {
#define MM_CASE(name, number, values, bytes)                                                                           \
    case number:                                                                                                       \
        return (size_t)n_in / values * bytes;
        MM_TYPES(MM_CASE)
#undef MM_CASE
    }
    return 0;
}

ALWAYS_INLINE size_t mm_block_values(int32_t type) {
    switch (type) {
#define MM_CASE(name, number, values, bytes)                                                                           \
    case number:                                                                                                       \
        return values;
        MM_TYPES(MM_CASE)
#undef MM_CASE
    }
    return 1;
}

ALWAYS_INLINE size_t mm_block_bytes(int32_t type) { return mm_row_bytes(type, (int32_t)mm_block_values(type)); }

ALWAYS_INLINE int mm_is_float(int32_t type) { return type == T_F32 || type == T_F16 || type == T_BF16; }

// Blocks of 32 values have a scale each, or one for each half; and a minimum beside the scale, or none.
enum mm_kind { S32, M32, S16, M16 };

ALWAYS_INLINE enum mm_kind mm_kind_of(int32_t type) {
    switch (type) {
    case T_Q4_1:
    case T_Q5_1:
    case T_Q4_K:
    case T_Q5_K:
        return M32;
    case T_Q3_K:
    case T_Q6_K:
        return S16;
    case T_Q2_K:
        return M16;
    default:
        return S32;
    }
}

// ---- Packed rows, form Q8. Rows go in tiles (the last one has what is left); a tile of h rows of nb blocks is
//   q    [nb][8][h][4] int8     four values of each row side by side, as vpdpbusd wants them
//   s    [nb][h] f32            x = s * q
//   f    [nb][h] f32            s * sum(q), what the weights' minimum is multiplied by
//   i32  [nb][h] int32          -128 * sum(q): undoes the bias of weights stored as unsigned bytes
//   i16  [nb][2][h] int32       -32 * sum(q) of each half block
// Rows of a tile; of up to FEW_ROWS rows, which are multiplied with the weights directly and not with panels of them.
#define TILE 12
#ifndef FEW_ROWS
#define FEW_TILE 8
#define FEW_ROWS 8
#endif
ALWAYS_INLINE int tile_rows(int n_rows) { return n_rows <= FEW_ROWS ? FEW_TILE : TILE; }
// Bytes of a row and block.
#define Q8_BLOCK (32 + 5 * 4)

struct q8_tile {
    int8_t *q;
    float *s, *f;
    int32_t *i32, *i16;
    int h;
};

ALWAYS_INLINE struct q8_tile q8_tile_at(uint8_t *packed, int n_rows, int n_in, int row) {
    const int most = tile_rows(n_rows);
    size_t nb = (size_t)n_in / 32, first = (size_t)(row / most * most);
    size_t h = (size_t)MIN(most, n_rows - (int)first);
    struct q8_tile t = {.h = (int)h, .q = (int8_t *)packed + first * nb * Q8_BLOCK};
    t.s = (float *)(t.q + 32 * nb * h);
    t.f = t.s + nb * h;
    t.i32 = (int32_t *)(t.f + nb * h);
    t.i16 = t.i32 + nb * h;
    return t;
}

// ---- Form F32: [n_rows][F32_STRIDE] f32, zeros behind the n_in values; it lies behind the Q8 form.
#define F32_STRIDE(n_in) ROUND_UP((size_t)(n_in), 16)

ALWAYS_INLINE size_t q8_bytes(int n_rows, int n_in) {
    return ROUND_UP((size_t)n_rows * ((size_t)n_in / 32) * Q8_BLOCK, CLSA_ALIGN);
}

ALWAYS_INLINE float *f32_rows(uint8_t *packed, int n_rows, int n_in, int forms) {
    return (float *)(packed + (forms & CLSA_FORM_Q8 ? q8_bytes(n_rows, n_in) : 0));
}

// ---- Form BF16, behind those two: tiles of 16 rows (zeros behind the last row), each [n_in / 32][16][32] bf16.
ALWAYS_INLINE size_t bf16_bytes(int n_rows, int n_in) { return ROUND_UP((size_t)n_rows, 16) * (size_t)n_in * 2; }

// ---- Form I8, in its stead: tiles of 16 rows (zeros behind the last row), each of
//   q    [n_in / 64, rounded up][16][64] int8     zeros behind the values
//   s    [n_in / 128, rounded up][16] f32         H x / 64 = s * q in each block of 128
// A group of 16 unpacked outputs has as many bytes: q [..][16][16][4], four values of each output side by side, and s.
#define I8_BLOCK 128
// Blocks of which no value has this size are zeros.
#define I8_LEAST 0x1p-100f

ALWAYS_INLINE int i8_steps(int n) { return (n + 63) / 64; }
ALWAYS_INLINE size_t i8_tile_bytes(int n) {
    return (size_t)i8_steps(n) * 1024 + (size_t)((n + I8_BLOCK - 1) / I8_BLOCK) * 64;
}
ALWAYS_INLINE size_t i8_bytes(int n_rows, int n_in) { return ROUND_UP((size_t)n_rows, 16) / 16 * i8_tile_bytes(n_in); }

struct i8_tile {
    int8_t *q;
    float *s;
};
ALWAYS_INLINE struct i8_tile i8_tile_of(uint8_t *tile, int n) {
    return (struct i8_tile){(int8_t *)tile, (float *)(tile + (size_t)i8_steps(n) * 1024)};
}

// Bytes of a tile of rows, or of a group of outputs, of the forms that tiles multiply.
ALWAYS_INLINE size_t tile_bytes(int form, int n) { return form == CLSA_FORM_I8 ? i8_tile_bytes(n) : bf16_bytes(16, n); }

// Tile `tile` of packed rows of one of them.
ALWAYS_INLINE uint8_t *tile_at(uint8_t *packed, int n_rows, int n_in, int forms, int form, int tile) {
    const size_t f32 = forms & CLSA_FORM_F32 ? (size_t)n_rows * F32_STRIDE(n_in) * sizeof(float) : 0;
    return (uint8_t *)f32_rows(packed, n_rows, n_in, forms) + f32 + (size_t)tile * tile_bytes(form, n_in);
}

// ---- The outputs of all matrices in groups of 16: group g of the op is group `g` of matrix `m`.
#define GROUP 16

// Groups a thread works on at once: what their unpacked weights may take of a core's L2.
#define PANEL_BYTES (384 * 1024)
// Bytes of 32 x 16 unpacked weights: one byte each, and two scales and minima each.
#define PANEL_BLOCK_MAX (32 * GROUP + 4 * 4 * GROUP)
// The same for forms BF16 and I8. Of 2 MiB of L2 the rows of x on their way take some, and so may another thread of
// the same core.
#define AMX_PANEL_BYTES (640 * 1024)
#define AMX_PANEL_BLOCK (2 * 32 * GROUP)

ALWAYS_INLINE int mm_groups(const struct clsa_matmul *p) {
    int n = 0, used = p->epilogue == CLSA_EPILOGUE_SWIGLU ? 1 : p->n_mat;
    for (int i = 0; i < used; i++)
        n += (p->mat[i].n_out + GROUP - 1) / GROUP;
    return n;
}

// Claims the next of the op's n groups for a thread: *from .. *to. False: none is left. Whole multiples of `unit`, and
// the fewer the nearer the end, so that all threads end together, however unlike their speeds.
ALWAYS_INLINE int mm_claim(struct team *team, int n, int unit, int nth, int *from, int *to) {
    uint32_t next = atomic_load_explicit(&team->next, memory_order_relaxed), end;
    do {
        if (next >= (uint32_t)n)
            return 0;
        end = MIN((uint32_t)n, next + (uint32_t)MAX(1, (n - (int)next) / (2 * nth * unit)) * (uint32_t)unit);
    } while (
        !atomic_compare_exchange_weak_explicit(&team->next, &next, end, memory_order_relaxed, memory_order_relaxed));
    *from = (int)next, *to = (int)end;
    return 1;
}

// Scratch of one thread: unpacked weights, rows that it packs itself, and 16 rows of a matrix of fewer than 16.
struct mm_scratch {
    uint8_t *panel, *packed, *rows;
    size_t bytes;
};

ALWAYS_INLINE size_t mm_panel_bytes(const struct clsa_matmul *p) {
    int blocks = (p->x.n_in + 31) / 32, both = p->epilogue == CLSA_EPILOGUE_SWIGLU ? 2 : 1;
    // At least two groups; in form I8 of SwiGLU, gate and up of as many as make a block of packed results.
    if (p->x.forms & CLSA_FORM_I8)
        return MAX((size_t)AMX_PANEL_BYTES, i8_tile_bytes(p->x.n_in) * (both == 2 ? 2 * I8_BLOCK / GROUP : 2));
    if (p->x.forms & CLSA_FORM_BF16)
        return MAX((size_t)AMX_PANEL_BYTES, (size_t)blocks * AMX_PANEL_BLOCK * 2);
    return MAX((size_t)PANEL_BYTES, (size_t)blocks * PANEL_BLOCK_MAX * (size_t)both);
}

ALWAYS_INLINE struct mm_scratch mm_scratch_of(const struct clsa_matmul *p, int ith, void *scratch) {
    struct mm_scratch s;
    size_t rows = 0;
    for (int i = 0; i < p->n_mat; i++)
        if (p->mat[i].n_out < GROUP)
            rows = MAX(rows, GROUP * mm_row_bytes(p->mat[i].type, p->x.n_in));
    size_t packed = p->x.packed ? 0 : clsa_packed_bytes(p->x.n_rows, p->x.n_in, p->x.forms);
    rows = ROUND_UP(rows, CLSA_ALIGN), packed = ROUND_UP(packed, CLSA_ALIGN);
    s.bytes = mm_panel_bytes(p) + packed + rows;
    s.panel = (uint8_t *)scratch + CLSA_SYNC + s.bytes * (size_t)ith;
    s.packed = s.panel + mm_panel_bytes(p);
    s.rows = s.packed + packed;
    return s;
}

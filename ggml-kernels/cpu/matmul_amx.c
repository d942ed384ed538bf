// matmul.h with AMX: the rows of forms BF16 and I8, from CLSA_AMX_ROWS on, with quantized weights. Everything else goes
// to matmul_avx512vnni.c.
//
// Some groups of 16 outputs at a time are unpacked into panels that stay in the L2 cache; blocks of 2 x 2 tiles of rows
// and outputs are multiplied with little more than loads and dot products in the loop (matmul_tiles.h). Long rows are
// cut into pieces along the sum, so that enough outputs share a pass over the rows of x.
#define MM_TILES 1
#include "matmul_isa_avx512vnni.h"

#include "matmul_unpack.h"

#include "matmul_tiles.h"

// Bytes of a piece of the sum of one group, at most.
#define PIECE_BYTES (96 * 1024)

// The form of an op's rows that tiles multiply; 0: they are none.
static int form_of(const struct clsa_pack *p) { return p->forms & (CLSA_FORM_BF16 | CLSA_FORM_I8); }

// ---- Packing

void clsa_pack_amx(const struct clsa_pack *p, int ith, int nth, void *scratch) {
    const int form = form_of(p), n_in = p->n_in;
    if (!form) {
        clsa_pack_avx512vnni(p, ith, nth, scratch);
        return;
    }
    const int from = (int)((int64_t)p->n_rows * ith / nth), to = (int)((int64_t)p->n_rows * (ith + 1) / nth);
    for (int row = from; row < to; row++) {
        const float *x = p->x + (size_t)row * p->x_stride;
        const float inv = p->norm ? inverse_rms(x, n_in, p->eps) : 1;
        uint8_t *tile = tile_at(p->packed, p->n_rows, n_in, p->forms, form, row / AMX_ROWS);
        (form == CLSA_FORM_I8 ? pack_i8 : pack_bf16)(x, p->norm, inv, n_in, tile, row % AMX_ROWS);
    }
    // The last tile's other rows.
    uint8_t *tile = tile_at(p->packed, p->n_rows, n_in, p->forms, form, p->n_rows / AMX_ROWS);
    for (int row = p->n_rows % AMX_ROWS; to == p->n_rows && from < to && row && row < AMX_ROWS; row++)
        clear_row(tile, form, n_in, row);
}

// ---- Unpacking, per form, type and layout

// Blocks of 32 values of 16 rows; I8: scales go to `scales`.
typedef void unpack_fn(struct src w, int nb, uint8_t *panel, float *scales);
#define MM_UNPACK(name, form_, packed)                                                                                 \
    static void name##_##form_##_##packed(struct src w, int nb, uint8_t *panel, float *scales) {                       \
        struct sink to;                                                                                                \
        to.panel = panel, to.form = CLSA_FORM_##form_, to.scales = scales, to.ahead = NULL;                            \
        unpack_##name(w, nb, &to, 0, packed);                                                                          \
        put_rest(&to, nb);                                                                                             \
    }
#define MM_UNPACKERS(name)                                                                                             \
    MM_UNPACK(name, BF16, 0) MM_UNPACK(name, BF16, 1) MM_UNPACK(name, I8, 0) MM_UNPACK(name, I8, 1)
MM_QUANTIZED(MM_UNPACKERS)

static unpack_fn *unpacker(int form, int type, int packed) {
    switch (type) {
#define MM_CASE(name)                                                                                                  \
    case T_##name: {                                                                                                   \
        static unpack_fn *const table[2][2] = {{name##_BF16_0, name##_BF16_1}, {name##_I8_0, name##_I8_1}};            \
        return table[form == CLSA_FORM_I8][packed];                                                                    \
    }
        MM_QUANTIZED(MM_CASE)
#undef MM_CASE
    }
    return NULL;
}

// ---- The op

// A block's results: `m` tiles of rows from `row` on, `n` groups: of one matrix, or gate and up of one group.
struct results {
    const struct clsa_matrix *mat;
    struct group at[2];
    int m, n, row, n_rows;
};

// Whether whole tiles lie in y as they come.
static int is_whole(const struct results *r) {
    for (int i = 0; i < r->n; i++)
        if (r->at[i].skip || r->at[i].lanes < GROUP)
            return 0;
    return r->row + r->m * AMX_ROWS <= r->n_rows;
}

static struct sums in_place(const struct results *r) {
    const struct clsa_matrix *mat = r->mat;
    struct sums s = {.from_stride = 4 * mat->add_stride, .to_stride = 4 * mat->y_stride};
    for (int m = 0; m < r->m; m++)
        for (int i = 0; i < r->n; i++) {
            const size_t row = (size_t)(r->row + m * AMX_ROWS), first = (size_t)r->at[i].first;
            s.to[2 * m + i] = mat->y + row * mat->y_stride + first;
            if (mat->add)
                s.from[2 * m + i] = mat->add + row * mat->add_stride + first;
        }
    return s;
}

// By way of acc, where what is to be added stands already.
static struct sums by_way_of(float (*acc)[AMX_ROWS * GROUP], const struct results *r, int with_add) {
    struct sums s = {.from_stride = 4 * GROUP, .to_stride = 4 * GROUP};
    for (int t = 0; t < 4; t++)
        s.to[t] = acc[t];
    if (!with_add || !r->mat->add)
        return s;
    memset(acc, 0, 4 * sizeof *acc);
    for (int t = 0; t < 4; t++)
        s.from[t] = acc[t];
    for (int m = 0; m < r->m; m++)
        for (int i = 0; i < r->n; i++) {
            const struct group *at = &r->at[i];
            const int first = r->row + m * AMX_ROWS, rows = MIN(AMX_ROWS, r->n_rows - first);
            for (int row = 0; row < rows; row++)
                memcpy(acc[2 * m + i] + row * GROUP + at->skip,
                       r->mat->add + (size_t)(first + row) * r->mat->add_stride + at->first + at->skip,
                       sizeof(float) * (size_t)(at->lanes - at->skip));
        }
    return s;
}

// Packed results: `tile` of the rows that the next product reads.
static uint8_t *y_tile(const struct clsa_matmul *p, int form, int tile) {
    return tile_at(p->y_packed, p->x.n_rows, p->mat[0].n_out, form, form, tile);
}

// SwiGLU's results of two tiles of rows, on their way to be packed: [row][output] of one block of form I8.
typedef float outputs[2 * AMX_ROWS][I8_BLOCK];

// Form BF16 of 16 rows of a group of outputs; form I8 when it ends a block, until when they stand in `ys`. Rows past
// the last one are zeros, since those of x are.
static void pack_group(const struct clsa_matmul *p, int form, const struct group *at, const float *acc, int row, int m,
                       outputs ys) {
    uint8_t *tile = y_tile(p, form, row / AMX_ROWS);
    const int first = at->first, block = first / I8_BLOCK, end = MIN(block * I8_BLOCK + I8_BLOCK, p->mat[0].n_out);
    for (int r = 0; r < AMX_ROWS; r++) {
        const V v = v_load(acc + GROUP * r);
        if (form == CLSA_FORM_BF16) {
            uint8_t *out = tile + (size_t)(first / 32) * AMX_BYTES + (size_t)(first % 32) * 2 + 64 * r;
            _mm256_store_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(v));
            continue;
        }
        float *y = ys[AMX_ROWS * m + r];
        v_store(y + first % I8_BLOCK, v);
        if (first + GROUP == end)
            pack_i8_block(y, NULL, 1, end - block * I8_BLOCK, i8_tile_of(tile, p->mat[0].n_out), block, r);
    }
}

// From acc to where results belong.
static void hand_out(const struct clsa_matmul *p, int form, const struct results *r, int n_mat,
                     float (*acc)[AMX_ROWS * GROUP], outputs ys) {
    for (int m = 0; m < r->m; m++) {
        const int first = r->row + m * AMX_ROWS, rows = MIN(AMX_ROWS, r->n_rows - first);
        if (n_mat == 2)
            swiglu(acc[2 * m], acc[2 * m + 1], AMX_ROWS * GROUP);
        if (n_mat == 2 && p->y_packed) {
            pack_group(p, form, &r->at[0], acc[2 * m], first, m, ys);
            continue;
        }
        for (int i = 0; i < (n_mat == 2 ? 1 : r->n); i++) {
            close_up(&r->at[i], acc[2 * m + i], rows);
            store_group(r->mat, &r->at[i], acc[2 * m + i], first, rows, 0);
        }
    }
}

// Groups first .. first + count of `n_mat` matrices (two: gate and up), blocks b0 .. b0 + nb of the sum, all rows.
static void panel_product(const struct clsa_matmul *p, int form, const struct clsa_matrix *mat, int n_mat, int first,
                          int count, int b0, int nb, const struct mm_scratch *scratch) {
    const int n_in = p->x.n_in, n_rows = p->x.n_rows, panels = count * n_mat, i8 = form == CLSA_FORM_I8;
    const int steps = i8 ? i8_steps(32 * nb) : nb;
    const size_t x_stride = tile_bytes(form, n_in), panel_bytes = tile_bytes(form, 32 * nb);
    for (int i = 0; i < panels; i++) {
        const struct clsa_matrix *m = &mat[i % n_mat];
        const struct group at = group_of(m, n_in, first + i / n_mat, scratch->rows);
        const size_t skip = mm_row_bytes(m->type, 32 * b0) * (at.packed ? GROUP : 1);
        uint8_t *panel = scratch->panel + i * panel_bytes;
        unpacker(form, m->type, at.packed)((struct src){at.w + skip, at.row_bytes}, nb, panel,
                                           i8_tile_of(panel, 32 * nb).s);
    }
    const int units = (panels + 1) / 2;
    _Alignas(64) outputs ys;
    for (int row = 0; row < n_rows; row += 2 * AMX_ROWS) {
        uint8_t *tile = tile_at(p->x.packed, n_rows, n_in, p->x.forms, form, row / AMX_ROWS);
        const struct tiles x = {.at = tile + (size_t)(b0 / (i8 ? 2 : 1)) * AMX_BYTES,
                                .s = i8_tile_of(tile, n_in).s + 32 * b0 / I8_BLOCK * AMX_ROWS,
                                .stride = x_stride};
        for (int u = 0; u < units; u++) {
            struct results r = {mat, {{0}}, row + AMX_ROWS < n_rows ? 2 : 1, MIN(2, panels - 2 * u), row, n_rows};
            for (int i = 0; i < r.n; i++)
                r.at[i] = group_of(&mat[(2 * u + i) % n_mat], n_in, first + (2 * u + i) / n_mat, scratch->rows);
            _Alignas(64) float acc[4][AMX_ROWS * GROUP];
            const int direct = n_mat == 1 && is_whole(&r);
            const struct sums sums = direct ? in_place(&r) : by_way_of(acc, &r, n_mat == 1);
            uint8_t *panel = scratch->panel + 2 * u * panel_bytes;
            const struct tiles w = {panel, i8_tile_of(panel, 32 * nb).s, panel_bytes};
            // The next rows of x, a part with each unit; past the end, these rows.
            const struct ahead ahead = {.by = row + 2 * AMX_ROWS < n_rows ? 2 * x_stride : 0,
                                        .first = 16 * u / units,
                                        .end = 16 * (u + 1) / units};
            (i8 ? i8_products : bf16_products)[r.m - 1][r.n - 1](&x, &w, steps, &ahead, &sums);
            if (!direct)
                hand_out(p, form, &r, n_mat, acc, ys);
        }
    }
}

// Blocks of a piece of the sum. silu() wants whole sums. Pieces are whole blocks of 256.
static int piece_blocks(int form, int nb, int n_mat) {
    const int most = PIECE_BYTES / AMX_BYTES * (form == CLSA_FORM_I8 ? 2 : 1);
    const int pieces = n_mat == 2 ? 1 : (nb + most - 1) / most;
    return MIN(nb, ROUND_UP((nb + pieces - 1) / pieces, 8));
}

// Groups that stay together: two make two tiles; gate and up do by themselves, but packed results come in blocks.
static int together(const struct clsa_matmul *p, int form, int n_mat) {
    return n_mat == 1 ? 2 : p->y_packed && form == CLSA_FORM_I8 ? I8_BLOCK / GROUP : 1;
}

// As many groups as the cache holds.
static int groups_at_once(const struct clsa_matmul *p, int form, int n_mat) {
    const int piece = piece_blocks(form, p->x.n_in / 32, n_mat), pair = together(p, form, n_mat);
    const int fit = AMX_PANEL_BYTES / ((int)tile_bytes(form, 32 * piece) * n_mat);
    return MAX(pair, fit / pair * pair);
}

// Groups from .. to of `n_mat` matrices.
static void groups(const struct clsa_matmul *p, int form, const struct clsa_matrix *mat, int n_mat, int from, int to,
                   const struct mm_scratch *scratch) {
    const int nb = p->x.n_in / 32, piece = piece_blocks(form, nb, n_mat), most = groups_at_once(p, form, n_mat);
    // All passes alike.
    const int passes = (to - from + most - 1) / most;
    const int each = ROUND_UP((to - from + passes - 1) / passes, together(p, form, n_mat));
    for (int first = from; first < to; first += each)
        for (int b = 0; b < nb; b += piece) {
            struct clsa_matrix sum[2] = {mat[0], mat[n_mat - 1]};
            if (b > 0)
                sum[0].add = sum[0].y, sum[0].add_stride = sum[0].y_stride;
            panel_product(p, form, sum, n_mat, first, MIN(each, to - first), b, MIN(piece, nb - b), scratch);
        }
}

// A part of the scratch memory for as long as this thread works on the op: the same one as last time if it is free, so
// that panels are written where this core's cache has them. The op's sync words say which ones are taken.
static int take_part(struct team *team, int nth) {
    static _Thread_local int part;
    _Atomic uint8_t *taken = (_Atomic uint8_t *)team->arrivals;
    for (part = part < nth ? part : 0;; part = (part + 1) % nth) {
        uint8_t no = 0;
        if (atomic_compare_exchange_strong_explicit(&taken[part], &no, 1, memory_order_acquire, memory_order_relaxed))
            return part;
    }
}
static void leave_part(struct team *team, int part) {
    atomic_store_explicit((_Atomic uint8_t *)team->arrivals + part, 0, memory_order_release);
}

void clsa_matmul_amx(const struct clsa_matmul *p, int ith, int nth, void *scratch_) {
    const int form = form_of(&p->x);
    if (!p->x.packed || !form) {
        clsa_matmul_avx512vnni(p, ith, nth, scratch_);
        return;
    }
    (void)ith;
    struct team *team = scratch_;
    const int part = take_part(team, nth);
    const struct mm_scratch scratch = mm_scratch_of(p, part, scratch_);
    const int n_mat = p->epilogue == CLSA_EPILOGUE_SWIGLU ? 2 : 1, n = mm_groups(p);
    // What shares a pass over x, where there is enough for all pieces.
    const int pair = together(p, form, n_mat);
    const int unit = ROUND_UP(MAX(1, MIN(groups_at_once(p, form, n_mat), n / nth)), pair);
    struct amx_config before;
    amx_start(&before);
    for (int from, to; mm_claim(team, n, unit, nth, &from, &to);)
        for (int m = 0; m < (n_mat == 2 ? 1 : p->n_mat); m++) {
            const int mine = (p->mat[m].n_out + GROUP - 1) / GROUP;
            if (from < mine && to > 0)
                groups(p, form, p->mat + m, n_mat, MAX(from, 0), MIN(to, mine), &scratch);
            from -= mine, to -= mine;
        }
    amx_end(&before);
    leave_part(team, part);
    team_leave(team, nth);
}

// matmul.h with AMX: the rows of form BF16, from CLSA_AMX_ROWS on, with quantized weights. Everything else goes to
// matmul_avx512vnni.c.
//
// Some groups of 16 outputs at a time are unpacked into bf16 panels that stay in the L2 cache; blocks of 2 x 2 tiles
// of rows and outputs are multiplied with no more than loads and dot products in the loop. Long rows are cut into
// pieces along the sum, so that enough outputs share a pass over the rows of x.
#define MM_BF16 1
#include "matmul_isa_avx512vnni.h"

#include "amx.h"

#include "matmul_unpack.h"
#include "matmul_vector.h"

// Blocks of 32 values of a piece of the sum, at most.
#define PIECE_BLOCKS 96

// ---- Packing

// Form BF16 of row `row`: to tile row / 16, step b.
static void pack_bf16(const struct clsa_pack *p, const float *x, float inv, int row) {
    const int nb = p->n_in / 32;
    uint8_t *out = bf16_tile(p->packed, p->n_rows, p->n_in, p->forms, row / AMX_ROWS) + row % AMX_ROWS * 64;
    for (int b = 0; b < nb; b++, out += AMX_BYTES) {
        V v[2] = {v_load(x + 32 * b), v_load(x + 32 * b + 16)};
        if (p->norm)
            for (int i = 0; i < 2; i++)
                v[i] = v_mul(v_mul(v[i], v_set1(inv)), v_load(p->norm + 32 * b + 16 * i));
        _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
    }
}

void clsa_pack_amx(const struct clsa_pack *p, int ith, int nth, void *scratch) {
    if (!(p->forms & CLSA_FORM_BF16)) {
        clsa_pack_avx512vnni(p, ith, nth, scratch);
        return;
    }
    const int from = (int)((int64_t)p->n_rows * ith / nth), to = (int)((int64_t)p->n_rows * (ith + 1) / nth);
    for (int row = from; row < to; row++) {
        const float *x = p->x + (size_t)row * p->x_stride;
        pack_bf16(p, x, p->norm ? inverse_rms(x, p->n_in, p->eps) : 1, row);
    }
    // The last tile's other rows.
    for (int row = p->n_rows; to == p->n_rows && from < to && row % AMX_ROWS; row++)
        for (int b = 0; b < p->n_in / 32; b++)
            memset(bf16_tile(p->packed, p->n_rows, p->n_in, p->forms, row / AMX_ROWS) + b * AMX_BYTES +
                       row % AMX_ROWS * 64,
                   0, 64);
}

// ---- Unpacking, per type and layout

typedef void unpack_fn(struct src w, int nb, uint8_t *panel);
#define MM_UNPACK(name, packed)                                                                                        \
    static void name##_##packed(struct src w, int nb, uint8_t *panel) {                                                \
        struct sink to = {.panel = panel};                                                                             \
        unpack_##name(w, nb, &to, 0, packed);                                                                          \
    }
#define MM_UNPACKERS(name) MM_UNPACK(name, 0) MM_UNPACK(name, 1)
MM_QUANTIZED(MM_UNPACKERS)

static unpack_fn *unpacker(int type, int packed) {
    switch (type) {
#define MM_CASE(name)                                                                                                  \
    case T_##name:                                                                                                     \
        return packed ? name##_1 : name##_0;
        MM_QUANTIZED(MM_CASE)
#undef MM_CASE
    }
    return NULL;
}

// ---- The op

// Steps by which tiles of x are asked for before they are loaded: past the L2 cache's latency.
#define X_AHEAD 2

// The sums of 2 x 2 tiles, [2 m + n]: where they start from (NULL: zero) and where they go, 16 rows of 16 f32 each.
struct sums {
    const float *from[4];
    float *to[4];
    size_t from_stride, to_stride; // bytes from row to row
};

// to[2 m + n] = from[2 m + n] + x tile m * panel n over nb blocks: sums in tiles 0 .. 3, x in 4 and 5, weights in 6 and
// 7. Brings lines first .. end of each tile of x a block of rows further on (`ahead` bytes) to the L2 cache.
ALWAYS_INLINE void block(const uint8_t *x, size_t x_stride, const uint8_t *w, size_t w_stride, int nb, size_t ahead,
                         int first, int end, const struct sums *sums, int m, int n) {
#define MM_SUM(t, used)                                                                                                \
    if (used) {                                                                                                        \
        if (sums->from[t])                                                                                             \
            amx_load(t, sums->from[t], sums->from_stride);                                                             \
        else                                                                                                           \
            amx_zero(t);                                                                                               \
    }
    MM_SUM(0, 1)
    MM_SUM(1, n > 1)
    MM_SUM(2, m > 1)
    MM_SUM(3, m > 1 && n > 1)
#undef MM_SUM
    for (int b = 0; b < nb; b++, x += AMX_BYTES, w += AMX_BYTES) {
        // All loads first: products between them would wait for the one before and hold up the next.
        amx_load(6, w, 64);
        amx_load(4, x, 64);
        if (n > 1)
            amx_load(7, w + w_stride, 64);
        if (m > 1)
            amx_load(5, x + x_stride, 64);
        amx_dot_bf16(0, 4, 6);
        if (n > 1)
            amx_dot_bf16(1, 4, 7);
        if (m > 1)
            amx_dot_bf16(2, 5, 6);
        if (m > 1 && n > 1)
            amx_dot_bf16(3, 5, 7);
        for (int line = 0; line < AMX_ROWS; line++) {
            _mm_prefetch((const char *)x + X_AHEAD * AMX_BYTES + 64 * line, _MM_HINT_T0);
            if (m > 1)
                _mm_prefetch((const char *)x + X_AHEAD * AMX_BYTES + x_stride + 64 * line, _MM_HINT_T0);
        }
        for (int line = first; line < end; line++) {
            _mm_prefetch((const char *)x + ahead + 64 * line, _MM_HINT_T1);
            _mm_prefetch((const char *)x + ahead + x_stride + 64 * line, _MM_HINT_T1);
        }
    }
    amx_store(0, sums->to[0], sums->to_stride);
    if (n > 1)
        amx_store(1, sums->to[1], sums->to_stride);
    if (m > 1)
        amx_store(2, sums->to[2], sums->to_stride);
    if (m > 1 && n > 1)
        amx_store(3, sums->to[3], sums->to_stride);
}

typedef void block_fn(const uint8_t *x, size_t x_stride, const uint8_t *w, size_t w_stride, int nb, size_t ahead,
                      int first, int end, const struct sums *sums);
#define MM_BLOCK(m, n)                                                                                                 \
    static void block_##m##_##n(const uint8_t *x, size_t x_stride, const uint8_t *w, size_t w_stride, int nb,          \
                                size_t ahead, int first, int end, const struct sums *sums) {                           \
        block(x, x_stride, w, w_stride, nb, ahead, first, end, sums, m, n);                                            \
    }
MM_BLOCK(1, 1)
MM_BLOCK(1, 2)
MM_BLOCK(2, 1)
MM_BLOCK(2, 2)
static block_fn *const blocks[2][2] = {{block_1_1, block_1_2}, {block_2_1, block_2_2}};

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

// Form BF16 of 16 rows of a group of outputs. Rows past the last one are zeros, since those of x are.
static void pack_group(const struct clsa_matmul *p, const struct group *at, const float *acc, int row) {
    uint8_t *out = bf16_tile(p->y_packed, p->x.n_rows, p->mat[0].n_out, CLSA_FORM_BF16, row / AMX_ROWS) +
                   (size_t)(at->first / 32) * AMX_BYTES + (size_t)(at->first % 32) * 2;
    for (int r = 0; r < AMX_ROWS; r++)
        _mm256_store_si256((__m256i *)(out + 64 * r), (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(acc + GROUP * r)));
}

// From acc to where results belong.
static void hand_out(const struct clsa_matmul *p, const struct results *r, int n_mat, float (*acc)[AMX_ROWS * GROUP]) {
    for (int m = 0; m < r->m; m++) {
        const int first = r->row + m * AMX_ROWS, rows = MIN(AMX_ROWS, r->n_rows - first);
        if (n_mat == 2)
            swiglu(acc[2 * m], acc[2 * m + 1], AMX_ROWS * GROUP);
        if (n_mat == 2 && p->y_packed) {
            pack_group(p, &r->at[0], acc[2 * m], first);
            continue;
        }
        for (int i = 0; i < (n_mat == 2 ? 1 : r->n); i++) {
            close_up(&r->at[i], acc[2 * m + i], rows);
            store_group(r->mat, &r->at[i], acc[2 * m + i], first, rows, 0);
        }
    }
}

// Groups first .. first + count of `n_mat` matrices (two: gate and up), blocks b0 .. b0 + nb of the sum, all rows.
static void panel_product(const struct clsa_matmul *p, const struct clsa_matrix *mat, int n_mat, int first, int count,
                          int b0, int nb, const struct mm_scratch *scratch) {
    const int n_in = p->x.n_in, n_rows = p->x.n_rows, panels = count * n_mat;
    const size_t panel_bytes = (size_t)nb * AMX_BYTES, x_stride = (size_t)(n_in / 32) * AMX_BYTES;
    for (int i = 0; i < panels; i++) {
        const struct clsa_matrix *m = &mat[i % n_mat];
        const struct group at = group_of(m, n_in, first + i / n_mat, scratch->rows);
        const size_t skip = mm_row_bytes(m->type, 32 * b0) * (at.packed ? GROUP : 1);
        unpacker(m->type, at.packed)((struct src){at.w + skip, at.row_bytes}, nb, scratch->panel + i * panel_bytes);
    }
    const int units = (panels + 1) / 2;
    for (int row = 0; row < n_rows; row += 2 * AMX_ROWS) {
        const uint8_t *x = bf16_tile(p->x.packed, n_rows, n_in, p->x.forms, row / AMX_ROWS) + (size_t)b0 * AMX_BYTES;
        // The next rows of x, a part with each unit; past the end, these rows.
        const size_t ahead = row + 2 * AMX_ROWS < n_rows ? 2 * x_stride : 0;
        for (int u = 0; u < units; u++) {
            struct results r = {mat, {{0}}, row + AMX_ROWS < n_rows ? 2 : 1, MIN(2, panels - 2 * u), row, n_rows};
            for (int i = 0; i < r.n; i++)
                r.at[i] = group_of(&mat[(2 * u + i) % n_mat], n_in, first + (2 * u + i) / n_mat, scratch->rows);
            _Alignas(64) float acc[4][AMX_ROWS * GROUP];
            const int direct = n_mat == 1 && is_whole(&r);
            const struct sums sums = direct ? in_place(&r) : by_way_of(acc, &r, n_mat == 1);
            blocks[r.m - 1][r.n - 1](x, x_stride, scratch->panel + 2 * u * panel_bytes, panel_bytes, nb, ahead,
                                     16 * u / units, 16 * (u + 1) / units, &sums);
            if (!direct)
                hand_out(p, &r, n_mat, acc);
        }
    }
}

// Blocks of a piece of the sum. silu() wants whole sums. Pieces are whole blocks of 256.
static int piece_blocks(int nb, int n_mat) {
    const int pieces = n_mat == 2 ? 1 : (nb + PIECE_BLOCKS - 1) / PIECE_BLOCKS;
    return MIN(nb, ROUND_UP((nb + pieces - 1) / pieces, 8));
}

// As many groups as the cache holds, in pairs.
static int groups_at_once(int nb, int n_mat) {
    const int fit = AMX_PANEL_BYTES / (piece_blocks(nb, n_mat) * AMX_BYTES * n_mat);
    return MAX(1, fit * n_mat / 2) * 2 / n_mat;
}

// Groups from .. to of `n_mat` matrices.
static void groups(const struct clsa_matmul *p, const struct clsa_matrix *mat, int n_mat, int from, int to,
                   const struct mm_scratch *scratch) {
    const int nb = p->x.n_in / 32, piece = piece_blocks(nb, n_mat), most = groups_at_once(nb, n_mat);
    // All passes alike.
    const int passes = (to - from + most - 1) / most, each = ROUND_UP((to - from + passes - 1) / passes, 2 / n_mat);
    for (int first = from; first < to; first += each)
        for (int b = 0; b < nb; b += piece) {
            struct clsa_matrix sum[2] = {mat[0], mat[n_mat - 1]};
            if (b > 0)
                sum[0].add = sum[0].y, sum[0].add_stride = sum[0].y_stride;
            panel_product(p, sum, n_mat, first, MIN(each, to - first), b, MIN(piece, nb - b), scratch);
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
    if (!p->x.packed || !(p->x.forms & CLSA_FORM_BF16)) {
        clsa_matmul_avx512vnni(p, ith, nth, scratch_);
        return;
    }
    (void)ith;
    struct team *team = scratch_;
    const int part = take_part(team, nth);
    const struct mm_scratch scratch = mm_scratch_of(p, part, scratch_);
    const int n_mat = p->epilogue == CLSA_EPILOGUE_SWIGLU ? 2 : 1, n = mm_groups(p);
    // What shares a pass over x, where there is enough for all pieces.
    const int unit = MAX(1, MIN(groups_at_once(p->x.n_in / 32, n_mat), n / nth));
    struct amx_config before;
    amx_start(&before);
    for (int from, to; mm_claim(team, n, unit, nth, &from, &to);)
        for (int m = 0; m < (n_mat == 2 ? 1 : p->n_mat); m++) {
            const int mine = (p->mat[m].n_out + GROUP - 1) / GROUP;
            if (from < mine && to > 0)
                groups(p, p->mat + m, n_mat, MAX(from, 0), MIN(to, mine), &scratch);
            from -= mine, to -= mine;
        }
    amx_end(&before);
    leave_part(team, part);
    team_leave(team, nth);
}

// The ops of matmul.h, the same for every SIMD instruction set. Included after pack_q8() and tile() of that set.
#pragma once
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(op) JOIN(op, ISA)

static void pack_rows(const struct clsa_pack *p, int from, int to) {
    for (int row = from; row < to; row++) {
        const float *x = p->x + (size_t)row * p->x_stride;
        const float inv = p->norm ? inverse_rms(x, p->n_in, p->eps) : 1;
        if (p->forms & CLSA_FORM_Q8)
            pack_q8(p, x, inv, row);
        if (p->forms & CLSA_FORM_F32)
            pack_f32(p, x, inv, f32_rows(p->packed, p->n_rows, p->n_in, p->forms) + row * F32_STRIDE(p->n_in));
    }
}

int32_t NAME(clsa_matmul_form)(int32_t type) { return mm_is_float(type) ? CLSA_FORM_F32 : CLSA_FORM_Q8; }
void NAME(clsa_pack)(const struct clsa_pack *p, int ith, int nth, void *scratch) {
    (void)scratch;
    pack_rows(p, (int)((int64_t)p->n_rows * ith / nth), (int)((int64_t)p->n_rows * (ith + 1) / nth));
}

typedef void tile_fn(const uint8_t *panel, const struct q8_tile *x, int nb, float *out);
#define MM_TILE(kind, h)                                                                                               \
    static void tile_##kind##_##h(const uint8_t *panel, const struct q8_tile *x, int nb, float *out) {                 \
        tile(panel, x, nb, out, kind, h);                                                                              \
    }
#define MM_TILES(kind)                                                                                                 \
    MM_TILE(kind, 1)                                                                                                   \
    MM_TILE(kind, 2)                                                                                                   \
    MM_TILE(kind, 3)                                                                                                   \
    MM_TILE(kind, 4)                                                                                                   \
    MM_TILE(kind, 5)                                                                                                   \
    MM_TILE(kind, 6)                                                                                                   \
    MM_TILE(kind, 7)                                                                                                   \
    MM_TILE(kind, 8)                                                                                                   \
    MM_TILE(kind, 9)                                                                                                   \
    MM_TILE(kind, 10)                                                                                                  \
    MM_TILE(kind, 11)                                                                                                  \
    MM_TILE(kind, 12)
MM_TILES(S32)
MM_TILES(M32)
MM_TILES(S16)
MM_TILES(M16)
#define MM_ROW(kind)                                                                                                   \
    {tile_##kind##_1, tile_##kind##_2, tile_##kind##_3, tile_##kind##_4,  tile_##kind##_5,  tile_##kind##_6,           \
     tile_##kind##_7, tile_##kind##_8, tile_##kind##_9, tile_##kind##_10, tile_##kind##_11, tile_##kind##_12},
static tile_fn *const tiles[4][TILE] = {MM_ROW(S32) MM_ROW(M32) MM_ROW(S16) MM_ROW(M16)};

// ---- Per type and layout: unpacking into a panel, and the products with 1 .. SINK_ROWS rows

// Where a group's weights go: into a panel, or into the products with the rows of x.
struct goal {
    uint8_t *panel;
    struct q8_tile x;
    const uint8_t *ahead;
};

// acc: [rows][16]
typedef void unpack_fn(struct src w, int nb, const struct goal *to, float *acc);
#define MM_UNPACK(name, rows, packed)                                                                                  \
    static void name##_##rows##_##packed(struct src w, int nb, const struct goal *to, float *acc) {                    \
        struct sink local;                                                                                             \
        local.panel = to->panel, local.x = to->x, local.ahead = to->ahead;                                             \
        for (int r = 0; r < rows; r++)                                                                                 \
            local.acc[r] = v_zero();                                                                                   \
        unpack_##name(w, nb, &local, rows, packed);                                                                    \
        for (int r = 0; r < rows; r++)                                                                                 \
            v_store(acc + r * GROUP, local.acc[r]);                                                                    \
    }
#if FEW_TILE == 8
#define MM_EACH(X, name, packed)                                                                                       \
    X(name, 0, packed)                                                                                                 \
    X(name, 1, packed)                                                                                                 \
    X(name, 2, packed)                                                                                                 \
    X(name, 3, packed)                                                                                                 \
    X(name, 4, packed)                                                                                                 \
    X(name, 5, packed) X(name, 6, packed) X(name, 7, packed) X(name, 8, packed)
#else
#define MM_EACH(X, name, packed) X(name, 0, packed) X(name, 1, packed)
#endif
#define MM_UNPACKERS(name) MM_EACH(MM_UNPACK, name, 0) MM_EACH(MM_UNPACK, name, 1)
#define MM_POINTER(name, rows, packed) name##_##rows##_##packed,
#define MM_ROWS(name, packed) {MM_EACH(MM_POINTER, name, packed)}
MM_QUANTIZED(MM_UNPACKERS)

static unpack_fn *unpacker(int type, int packed, int rows) {
    switch (type) {
#define MM_CASE(name)                                                                                                  \
    case T_##name: {                                                                                                   \
        static unpack_fn *const table[2][SINK_ROWS + 1] = {MM_ROWS(name, 0), MM_ROWS(name, 1)};                        \
        return table[packed][rows];                                                                                    \
    }
        MM_QUANTIZED(MM_CASE)
#undef MM_CASE
    }
    return NULL;
}

// ---- The op

// The weights of group g of the op: of its matrix, or of the first or second one (`m`) of a pair.
static const uint8_t *weights_of(const struct clsa_matmul *p, int m, int g) {
    if (p->epilogue != CLSA_EPILOGUE_SWIGLU)
        for (m = 0; m + 1 < p->n_mat && g >= (p->mat[m].n_out + GROUP - 1) / GROUP; m++)
            g -= (p->mat[m].n_out + GROUP - 1) / GROUP;
    return p->mat[m].w + (size_t)g * GROUP * mm_row_bytes(p->mat[m].type, p->x.n_in);
}

// The product of a group of one matrix with a tile of rows. ahead: the weights that this thread reads next.
static void group_tile(const struct clsa_matrix *m, const struct group *g, const uint8_t *ahead,
                       const struct clsa_matmul *p, uint8_t *packed, int row, const uint8_t *panel, float *acc) {
    const int n_in = p->x.n_in, nb = n_in / 32, n_rows = p->x.n_rows, rows = MIN(tile_rows(n_rows), n_rows - row);
    if (mm_is_float(m->type)) {
        const float *x = f32_rows(packed, n_rows, n_in, p->x.forms) + row * F32_STRIDE(n_in);
        float_group(m->type, g->w, g->row_bytes, n_in, x, rows, acc);
        return;
    }
    const struct q8_tile x = q8_tile_at(packed, n_rows, n_in, row);
    if (panel) {
        tiles[mm_kind_of(m->type)][rows - 1](panel, &x, nb, acc);
        return;
    }
    const struct goal to = {.x = x, .ahead = ahead};
    unpacker(m->type, g->packed, rows)((struct src){g->w, g->row_bytes}, nb, &to, acc);
}

// Bytes of a group's panels, of one matrix or of two.
static size_t panels_bytes(const struct clsa_matrix *mat, int n_mat, int n_in, size_t size[2]) {
    size[0] = size[1] = 0;
    for (int m = 0; m < n_mat; m++)
        size[m] = mm_is_float(mat[m].type) ? GROUP * mm_row_bytes(mat[m].type, n_in)
                                           : (size_t)(n_in / 32) * panel_block(mm_kind_of(mat[m].type));
    return size[0] + size[1];
}

// Groups from .. to of `n_mat` matrices (two: gate and up) for all rows. before: groups of the op that lie before those
// of this matrix; after: the op's group that this thread goes on with.
static void groups(const struct clsa_matmul *p, const struct clsa_matrix *mat, int n_mat, int from, int to, int before,
                   int after, uint8_t *packed, const struct mm_scratch *scratch) {
    const int n_rows = p->x.n_rows, n_in = p->x.n_in, nb = n_in / 32, direct = n_rows <= FEW_ROWS;
    const int most = tile_rows(n_rows);
    size_t size[2];
    const int at_once = (int)MAX(1, PANEL_BYTES / panels_bytes(mat, n_mat, n_in, size));
    for (int first = from; first < to; first += at_once) {
        const int count = MIN(at_once, to - first);
        for (int g = 0; g < count && !direct; g++)
            for (int m = 0; m < n_mat; m++)
                if (!mm_is_float(mat[m].type)) {
                    const struct group at = group_of(&mat[m], n_in, first + g, scratch->rows);
                    const struct goal to = {.panel = scratch->panel + (size_t)g * (size[0] + size[1]) + m * size[0]};
                    unpacker(mat[m].type, at.packed, 0)((struct src){at.w, at.row_bytes}, nb, &to, NULL);
                }
        const int n_tiles = (n_rows + most - 1) / most;
        for (int i = 0; i < n_tiles * count; i++) {
            // Directly: all rows with a group while it is cached. With panels: all groups with a tile of rows.
            const int g = direct ? i / n_tiles : i % count, row = most * (direct ? i % n_tiles : i / count);
            const int rows = MIN(most, n_rows - row), next = first + g + 1 < to ? before + first + g + 1 : after;
            _Alignas(64) float acc[2][TILE * GROUP];
            struct group at;
            for (int m = n_mat - 1; m >= 0; m--) {
                at = group_of(&mat[m], n_in, first + g, scratch->rows);
                const uint8_t *panel = scratch->panel + (size_t)g * (size[0] + size[1]) + m * size[0];
                group_tile(&mat[m], &at, weights_of(p, m, next), p, packed, row, direct ? NULL : panel, acc[m]);
                close_up(&at, acc[m], rows);
            }
            if (n_mat == 2)
                swiglu(acc[0], acc[1], rows * GROUP);
            store_group(mat, &at, acc[0], row, rows, n_mat == 1);
        }
    }
}

// Groups that share a pass over many rows of x, where there are enough for all pieces.
static int unit_of(const struct clsa_matmul *p, int n, int nth) {
    if (p->x.n_rows <= FEW_ROWS)
        return 1;
    size_t size[2];
    const int both = p->epilogue == CLSA_EPILOGUE_SWIGLU ? 2 : 1;
    return (int)MAX(1, MIN(PANEL_BYTES / panels_bytes(p->mat, both, p->x.n_in, size), (size_t)(n / nth)));
}

// Lines of the first weights that are asked for before x is packed: as many as a core can have on their way.
#define FIRST_LINES 48

void NAME(clsa_matmul)(const struct clsa_matmul *p, int ith, int nth, void *scratch_) {
    struct team *team = scratch_;
    const struct mm_scratch scratch = mm_scratch_of(p, ith, scratch_);
    const int swiglu_pair = p->epilogue == CLSA_EPILOGUE_SWIGLU, n = mm_groups(p), unit = unit_of(p, n, nth);
    uint8_t *packed = p->x.packed;
    int from, to, next_from, next_to;
    for (int more = mm_claim(team, n, unit, nth, &from, &to); more; from = next_from, to = next_to) {
        if (!packed) {
            for (int i = 0; i < FIRST_LINES; i++)
                _mm_prefetch((const char *)weights_of(p, swiglu_pair, from) + 64 * i, _MM_HINT_T1);
            struct clsa_pack own = p->x;
            own.packed = packed = scratch.packed;
            pack_rows(&own, 0, own.n_rows);
        }
        // Claimed ahead, so that its first weights are on their way when this claim ends.
        more = mm_claim(team, n, unit, nth, &next_from, &next_to);
        for (int m = 0, before = 0; m < (swiglu_pair ? 1 : p->n_mat); m++) {
            const int mine = (p->mat[m].n_out + GROUP - 1) / GROUP;
            const int first = MAX(from - before, 0), end = MIN(to - before, mine);
            const int after = to > before + mine ? before + mine : more ? next_from : to - 1;
            if (first < end)
                groups(p, p->mat + m, swiglu_pair ? 2 : 1, first, end, before, after, packed, &scratch);
            before += mine;
        }
    }
    team_leave(team, nth);
}

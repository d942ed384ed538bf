// The C kernels on fixed inputs, one call each, for counting instructions under callgrind (tools/instruction-counts):
//
//   instructions            prints what there is to count: a name, and the function that does it
//   instructions NAME       does it once and prints a checksum of the result
//
// The wide instruction sets are left out: valgrind has no AVX-512.
#include "attention.h"
#include "gather_attention.h"
#include "matmul.h"
#include "rope_append.h"
#include "route.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    HEADS = 20,
    KV = 4,
    D = 128,
    POSITIONS = 4096,
    K = 1024,
    ROWS = 2,
    IN = 2560,
    OUT = 256,
    Q4_K = 12,
    Q4_K_BYTES = 144
};

static uint64_t state = 1;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static void *memory(size_t bytes) {
    void *p = aligned_alloc(CLSA_ALIGN, (bytes + CLSA_ALIGN - 1) / CLSA_ALIGN * CLSA_ALIGN + CLSA_ALIGN);
    if (!p)
        exit(1);
    memset(p, 0, bytes);
    return p;
}

// Uniform in -1..1.
static float *values(size_t n) {
    float *x = memory(4 * n);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(random_bits() >> 8) / (float)(1 << 23) - 1;
    return x;
}

// f16 in -2..2: any bits below the exponent of 2.
static struct clsa_rows rows(int32_t width) {
    size_t n = (size_t)POSITIONS * (size_t)width;
    uint16_t *base = memory(2 * n);
    for (size_t i = 0; i < n; i++)
        base[i] = (uint16_t)(random_bits() & 0xbfff);
    return (struct clsa_rows){
        (uint8_t *)base, 2 * (size_t)width, 2 * (size_t)width * CLSA_PAGE, CLSA_F16, width, 0, 0, 2 * n};
}

static struct clsa_batch batch(void) {
    static int32_t pos[ROWS], slot[ROWS];
    static uint32_t tables[POSITIONS / CLSA_PAGE];
    for (int32_t r = 0; r < ROWS; r++)
        pos[r] = POSITIONS - ROWS + r;
    for (uint32_t i = 0; i < POSITIONS / CLSA_PAGE; i++)
        tables[i] = POSITIONS / CLSA_PAGE - 1 - i;
    return (struct clsa_batch){ROWS, POSITIONS / CLSA_PAGE, 1, 0, pos, slot, tables};
}

// FNV-1a.
static void print_checksum(const void *bytes, size_t n) {
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < n; i++)
        h = (h ^ ((const uint8_t *)bytes)[i]) * 16777619u;
    printf("%08x\n", h);
}

typedef void (*kernel)(const void *p, int ith, int nth, void *scratch);

static void rope_append(kernel f) {
    struct clsa_rope_append p = {.batch = batch(), .n_head = HEADS, .n_kv = KV, .d = D, .n_rot = D, .eps = 1e-5f};
    p.q = values(ROWS * HEADS * D), p.k = values(ROWS * KV * D), p.v = values(ROWS * KV * D);
    p.q_norm = values(D), p.k_norm = values(D), p.cos = values(ROWS * D / 2), p.sin = values(ROWS * D / 2);
    p.q_out = memory(4 * ROWS * HEADS * D), p.k_cache = rows(KV * D), p.v_cache = rows(KV * D);
    f(&p, 0, 1, memory(clsa_rope_append_scratch(&p, 1)));
    print_checksum(p.q_out, 4 * ROWS * HEADS * D);
}

static void attention(kernel f) {
    struct clsa_attention p = {.batch = batch(), .n_head = HEADS, .n_kv = KV, .d = D, .window = 512, .scale = 0.09f};
    float *out = memory(4 * ROWS * HEADS * D);
    p.q = values(ROWS * HEADS * D), p.k = rows(KV * D), p.v = rows(KV * D), p.out = out;
    f(&p, 0, 1, memory(clsa_attention_scratch(&p, 1)));
    print_checksum(out, 4 * ROWS * HEADS * D);
}

static void gather_attention(kernel f) {
    static uint32_t selected[ROWS * K];
    static int32_t count[ROWS] = {K, K};
    for (uint32_t i = 0; i < ROWS * K; i++)
        selected[i] = i % K * (POSITIONS / K);
    struct clsa_gather_attention p = {
        .batch = batch(), .n_head = HEADS, .n_kv = KV, .d = D, .n_columns = K, .scale = 0.09f};
    float *out = memory(4 * ROWS * HEADS * D);
    p.q = values(ROWS * HEADS * D), p.k = rows(KV * D), p.v = rows(KV * D), p.out = out;
    p.selected = selected, p.count = count;
    f(&p, 0, 1, memory(clsa_gather_attention_scratch(&p, 1)));
    print_checksum(out, 4 * ROWS * HEADS * D);
}

static void route(kernel f) {
    struct clsa_route p = {.batch = batch(), .d = D, .k = K, .n_columns = K, .q = values(ROWS * D), .keys = rows(D)};
    p.selected = memory(4 * ROWS * K), p.count = memory(4 * ROWS);
    f(&p, 0, 1, memory(clsa_route_scratch(&p, 1)));
    print_checksum(p.selected, 4 * ROWS * K);
}

static void score(kernel f) {
    struct clsa_score p = {.batch = batch(), .d = D, .n = POSITIONS, .q = values(D), .keys = rows(D)};
    p.out = memory(4 * POSITIONS);
    f(&p, 0, 1, memory(clsa_score_scratch(&p, 1)));
    print_checksum(p.out, 4 * POSITIONS);
}

static void topk(kernel f) {
    struct clsa_topk p = {.n = POSITIONS, .k = K, .scores = values(POSITIONS), .selected = memory(4 * K)};
    f(&p, 0, 1, memory(clsa_topk_scratch(&p, 1)));
    print_checksum(p.selected, 4 * K);
}

// Random Q4_K blocks with scales of 2^-8: any bits are valid.
static struct clsa_matmul product(int32_t n_rows) {
    uint8_t *w = memory(OUT * IN / 256 * Q4_K_BYTES);
    for (size_t block = 0; block < OUT * IN / 256; block++) {
        for (size_t i = 4; i < Q4_K_BYTES; i++)
            w[block * Q4_K_BYTES + i] = (uint8_t)random_bits();
        w[block * Q4_K_BYTES + 1] = w[block * Q4_K_BYTES + 3] = 0x1c;
    }
    struct clsa_matmul p = {.n_mat = 1};
    p.x = (struct clsa_pack){.n_rows = n_rows, .n_in = IN, .forms = clsa_matmul_form_avx2(Q4_K), .x_stride = IN};
    p.x.x = values((size_t)n_rows * IN);
    p.x.packed = memory(clsa_packed_bytes(n_rows, IN, p.x.forms));
    p.mat[0] = (struct clsa_matrix){.w = w, .type = Q4_K, .n_out = OUT, .y_stride = OUT};
    p.mat[0].y = memory(4 * (size_t)n_rows * OUT);
    return p;
}

static void pack(kernel f) {
    struct clsa_matmul p = product(16);
    f(&p.x, 0, 1, memory(clsa_pack_scratch(&p.x, 1)));
    print_checksum(p.x.packed, clsa_packed_bytes(16, IN, p.x.forms));
}

static void matmul(kernel f, int32_t n_rows) {
    struct clsa_matmul p = product(n_rows);
    clsa_pack_avx2(&p.x, 0, 1, memory(clsa_pack_scratch(&p.x, 1)));
    f(&p, 0, 1, memory(clsa_matmul_scratch(&p, 1)));
    print_checksum(p.mat[0].y, 4 * (size_t)n_rows * OUT);
}

static void matmul_1(kernel f) { matmul(f, 1); }
static void matmul_16(kernel f) { matmul(f, 16); }

#define COUNT(name, op, isa) {#name "_" #isa, "clsa_" #op "_" #isa, name, (kernel)(void (*)(void))clsa_##op##_##isa}
#define COUNT_BOTH(op) COUNT(op, op, ref), COUNT(op, op, avx2)

static const struct {
    const char *name, *function;
    void (*run)(kernel);
    kernel kernel;
} counted[] = {
    COUNT_BOTH(rope_append),
    COUNT_BOTH(attention),
    COUNT_BOTH(gather_attention),
    COUNT_BOTH(route),
    COUNT_BOTH(score),
    COUNT_BOTH(topk),
    COUNT(pack, pack, avx2),
    COUNT(matmul_1, matmul, avx2),
    COUNT(matmul_16, matmul, avx2),
};

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof counted / sizeof *counted; i++) {
        if (argc < 2) {
            printf("%s %s\n", counted[i].name, counted[i].function);
        } else if (strcmp(argv[1], counted[i].name) == 0) {
            counted[i].run(counted[i].kernel);
            return 0;
        }
    }
    return argc < 2 ? 0 : 2;
}

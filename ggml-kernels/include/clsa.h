// Types that every op shares: C, CUDA and (through bindgen) Rust see these very structs.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Positions of a page of the cache. A power of two.
#define CLSA_PAGE 256
// Values of a Q8_0 block: an f16 scale, then 32 int8.
#define CLSA_QK8_0 32

// The largest head dim and index key width. Both are multiples of 16, of 32 where the cache is Q8_0.
#define CLSA_MAX_D 512

// Numbers of ggml's types (enum ggml_type), for what a cache row may hold.
enum clsa_type { CLSA_F32 = 0, CLSA_F16 = 1, CLSA_Q8_0 = 8 };

// A pool of cache rows. One row holds what one position contributes: all KV heads of K (or of V) side by side,
// or one index key. The row of position p of the sequence in slot s lies
//   paged (ring == 0): at base + table[s][p / CLSA_PAGE] * page_stride + (p % CLSA_PAGE) * row_stride
//   ring  (ring  > 0): at base + s * page_stride + (p % ring) * row_stride
// so that sequences share pages by naming the same page, and a window keeps only its last `ring` positions.
struct clsa_rows {
    uint8_t *base;
    size_t row_stride;  // bytes
    size_t page_stride; // bytes of a page (paged) or of a slot's ring
    int32_t type;       // enum clsa_type
    int32_t width;      // values in a row
    int32_t ring;       // 0, or the ring's capacity in positions
    int32_t reserved;
    size_t bytes; // of the memory at base: what the bounds checks of the callers go by
};

// Which sequence and position each row of a batch is. Rows of one sequence stand in increasing position.
struct clsa_batch {
    int32_t n_rows;
    int32_t table_stride; // entries of one slot's page table
    int32_t n_slots;      // page tables, or rings
    int32_t reserved;
    const int32_t *pos;     // [n_rows] position within its sequence
    const int32_t *slot;    // [n_rows] the sequence's slot
    const uint32_t *tables; // [n_slots][table_stride] page numbers
};

// How every op is called on the CPU. All nth threads of a team call clsa_<op>_<isa> with the same *p and scratch, each
// with its own ith; the op is done when all have returned. There is no barrier inside: whoever finishes a piece last
// merges it. Scratch: clsa_<op>_scratch bytes (for the largest n_rows; no pointer is read), aligned to CLSA_ALIGN,
// shared by ops that do not run at the same time. Its first CLSA_SYNC bytes are zero before the first call, and every
// op leaves them zero. A row's result depends neither on nth nor on the other rows of the batch.
#define CLSA_ALIGN 64
#define CLSA_SYNC 8192

#define CLSA_OP(op)                                                                                                    \
    size_t clsa_##op##_scratch(const struct clsa_##op *p, int nth);                                                    \
    void clsa_##op##_ref(const struct clsa_##op *p, int ith, int nth, void *scratch);                                  \
    void clsa_##op##_avx2(const struct clsa_##op *p, int ith, int nth, void *scratch);                                 \
    void clsa_##op##_avx512(const struct clsa_##op *p, int ith, int nth, void *scratch);

#ifdef __cplusplus
}
#endif

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
};

// Which sequence and position each row of a batch is. Rows of one sequence stand in increasing position.
struct clsa_batch {
    int32_t n_rows;
    int32_t table_stride;   // entries of one slot's page table
    const int32_t *pos;     // [n_rows] position within its sequence
    const int32_t *slot;    // [n_rows] the sequence's slot
    const uint32_t *tables; // [n_slots][table_stride] page numbers
};

#ifdef __cplusplus
}
#endif

// How route (route.h) runs on a GPU: three kernels over one scratch, for at most as many rows at a time as the scratch
// holds.
//
//   route_score_*   one pass over the index keys at memory bandwidth: every score, and the histogram of the scores'
//   high bits route_pool      block mode only: mean of each block's scores, and the histogram of those route_select
//   finds the histogram bin that holds the k-th best, marks what lies above in a bitmap, refines the bin exactly
//                   (the last block of a row does), writes the marked positions in ascending order
//
// Scratch of one row: scores, 4 bytes a position; pooled scores 2; a bitmap of 1/8; 16 KiB of histogram; 32 KiB of
// candidates. Histogram and state are zero before the first call and left zero by every call.
#pragma once
#include "route.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLSA_ROUTE_BINS 4096
#define CLSA_ROUTE_CANDIDATES 4096
// Bytes of shared memory of a selecting block.
#define CLSA_ROUTE_SELECT_SHARED 49408
// Query rows of one sequence that one pass over its keys scores together.
#define CLSA_ROUTE_GROUP 4

struct clsa_route_state {
    uint32_t ticket, n_candidates;
};

struct clsa_route_cuda {
    struct clsa_route op;
    int32_t first_row, n_rows; // rows of the batch in this launch; scratch row i belongs to batch row first_row + i
    int32_t group;             // rows scored together, 1..=CLSA_ROUTE_GROUP
    int32_t max_positions;     // positions the scratch holds per row, a multiple of 1024
    uint32_t *scores;     // [n_rows][max_positions] scores as order-preserving integers; block mode and `raw`: as f32
    uint32_t *pooled;     // [n_rows][max_positions/2] block mode: order-preserving integers
    uint32_t *bitmap;     // [n_rows][max_positions/32]
    uint32_t *histogram;  // [n_rows][CLSA_ROUTE_BINS]
    uint64_t *candidates; // [n_rows][CLSA_ROUTE_CANDIDATES]
    struct clsa_route_state *state; // [n_rows]
    int32_t raw;                    // only score: f32 scores of every position into `scores`
    int32_t reserved;
};

#ifdef __cplusplus
}
#endif

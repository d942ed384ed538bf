// sample: from logits to a token per row, on the GPU, so that a step costs one small copy to the host.
//
//   temperature 0: the token with the largest logit; of equal ones the lowest id
//   else, in this order: the top_k best (logit descending, id ascending; 0: all); of these the best until their
//   probabilities (softmax at temperature 1) sum to top_p; of these the ones with at least min_p times the best one's
//   probability; then one by softmax(logit / temperature): the one that holds the random number when the probabilities
//   are laid end to end, best first where top_k keeps at most 2048, by id where it keeps all of more than 2048
//
// A logit of -inf is a token that may not come. A row with a NaN or +inf, or with nothing but -inf, gives no token but
// a status. The random number in [0, 1) of a row is `at`, or when that is negative Philox4x32-10 (Salmon et al., 2011)
// of key `seed` and counter
// (`counter`, 0): its first 64 bits, shifted right by 11, times 2^-53; `counter` then advances by one. Sums that decide
// are of fixed order or of integers: equal inputs give equal tokens.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of shared memory of a block.
#define CLSA_SAMPLE_SHARED 34048

enum clsa_sample_status { CLSA_SAMPLE_OK = 0, CLSA_SAMPLE_NOT_FINITE = 1, CLSA_SAMPLE_NOTHING_LEFT = 2 };

struct clsa_sample_row {
    float temperature, top_p, min_p;
    int32_t top_k;
    double at;
    uint64_t seed, counter;
};

// Zero between calls.
struct clsa_sample_state {
    uint64_t best; // largest (logit, lowest id), as ordered integers
    uint32_t bad, ticket;
    uint32_t histogram[4096];
};

struct clsa_sample_cuda {
    int32_t n_rows, n_vocab;
    const float *logits;             // [n_rows][n_vocab]
    struct clsa_sample_row *rows;    // [n_rows]
    struct clsa_sample_state *state; // [n_rows]
    uint32_t *tokens;                // [n_rows]; UINT32_MAX where the status is not OK
    uint32_t *status;                // [n_rows] enum clsa_sample_status
};

#ifdef __cplusplus
}
#endif

// limits: what one core can do at most, to stand beside a kernel's measured rates. Each runs for `steps` rounds (reads:
// once over the memory) and returns the operations done (a multiply-add is two), so that the caller can time it on all
// cores at once.
#pragma once
#include "clsa.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLSA_LIMITS(isa)                                                                                               \
    double clsa_limit_int8_##isa(int64_t steps);                                                                       \
    double clsa_limit_f32_##isa(int64_t steps);                                                                        \
    void clsa_limit_read_##isa(const uint8_t *memory, size_t bytes);
CLSA_LIMITS(ref)
CLSA_LIMITS(avx2)
CLSA_LIMITS(avx512vnni)
double clsa_limit_int8_amx(int64_t steps);
double clsa_limit_bf16_amx(int64_t steps);

#ifdef __cplusplus
}
#endif

// limits.h in plain C: what the compiler makes of it.
#include "common.h"
#include "limits.h"

double clsa_limit_int8_ref(int64_t steps) {
    volatile int32_t seed = 1;
    int32_t sum[8] = {0}, x = seed;
    for (int64_t i = 0; i < steps; i++)
        for (int k = 0; k < 8; k++)
            sum[k] += x * (int8_t)(sum[k] | 1);
    for (int k = 0; k < 8; k++)
        seed = sum[k];
    return (double)steps * 16;
}

double clsa_limit_f32_ref(int64_t steps) {
    volatile float seed = 0.5f;
    float sum[8] = {0}, x = seed;
    for (int64_t i = 0; i < steps; i++)
        for (int k = 0; k < 8; k++)
            sum[k] = sum[k] * x + x;
    for (int k = 0; k < 8; k++)
        seed = sum[k];
    return (double)steps * 16;
}

void clsa_limit_read_ref(const uint8_t *memory, size_t bytes) {
    volatile uint64_t sink;
    uint64_t sum = 0, word;
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        memcpy(&word, memory + i, 8);
        sum ^= word;
    }
    sink = sum;
    (void)sink;
}

// limits.h with AMX: products of int8 and of bf16 tiles; reads are those of limits_avx512vnni.c.
#include "limits.h"

#include "amx.h"

// Operations of one product of int8 tiles; of bf16 tiles, half of it.
#define INT8_TILE (2 * 16 * 16 * 64)

double clsa_limit_int8_amx(int64_t steps) {
    struct amx_config before;
    amx_start(&before);
    for (int64_t i = 0; i < steps; i++) {
        amx_dot_int8(0, 4, 6);
        amx_dot_int8(1, 4, 7);
        amx_dot_int8(2, 5, 6);
        amx_dot_int8(3, 5, 7);
    }
    amx_end(&before);
    return (double)steps * 4 * INT8_TILE;
}

double clsa_limit_bf16_amx(int64_t steps) {
    struct amx_config before;
    amx_start(&before);
    for (int64_t i = 0; i < steps; i++) {
        amx_dot_bf16(0, 4, 6);
        amx_dot_bf16(1, 4, 7);
        amx_dot_bf16(2, 5, 6);
        amx_dot_bf16(3, 5, 7);
    }
    amx_end(&before);
    return (double)steps * 4 * (INT8_TILE / 2);
}

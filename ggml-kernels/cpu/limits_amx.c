// limits.h with AMX: products of int8 and of bf16 tiles; reads are those of limits_avx512vnni.c.
#include "limits.h"

#include "amx.h"

// Operations of one product of int8 tiles; of bf16 tiles, half of it.
#define INT8_TILE (2 * 16 * 16 * 64)

// Operands: `high` in every second byte, so that bf16 values are about 1, among bytes that differ. Products of zeros
// are more than twice as fast: they draw less power.
static void load_operands(uint8_t high) {
    _Alignas(64) uint8_t tiles[4 * AMX_BYTES];
    for (uint32_t i = 0; i < 4 * AMX_BYTES; i++) {
        const uint8_t byte = (uint8_t)(i * 2654435761u >> 24);
        tiles[i] = high && i % 2 ? (uint8_t)(high | (byte & 0x80)) : byte;
    }
    amx_load(4, tiles, 64);
    amx_load(5, tiles + AMX_BYTES, 64);
    amx_load(6, tiles + 2 * AMX_BYTES, 64);
    amx_load(7, tiles + 3 * AMX_BYTES, 64);
}

double clsa_limit_int8_amx(int64_t steps) {
    struct amx_config before;
    amx_start(&before);
    load_operands(0);
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
    load_operands(0x3f);
    for (int64_t i = 0; i < steps; i++) {
        amx_dot_bf16(0, 4, 6);
        amx_dot_bf16(1, 4, 7);
        amx_dot_bf16(2, 5, 6);
        amx_dot_bf16(3, 5, 7);
    }
    amx_end(&before);
    return (double)steps * 4 * (INT8_TILE / 2);
}

// Cached rows as f32, for the vector operations of vec_<isa>.h.
#pragma once

ALWAYS_INLINE float f16_value(const uint8_t *x) {
    uint16_t h;
    memcpy(&h, x, 2);
    return _cvtsh_ss(h);
}

// VL values of a row of the (constant) type, from value j on. Exact, whatever the type.
ALWAYS_INLINE vf row_load(const uint8_t *row, const int32_t type, int32_t j) {
    if (type == CLSA_F32)
        return vf_load((const float *)row + j);
    if (type == CLSA_F16)
        return vf_from_f16(row + 2 * (size_t)j);
    row += (size_t)(j / CLSA_QK8_0) * (CLSA_QK8_0 + 2);
    return vf_mul(vf_set1(f16_value(row)), vf_from_i8(row + 2 + j % CLSA_QK8_0));
}

// body(type) with a constant type.
#define WITH_TYPE(type, body)                                                                                          \
    switch (type) {                                                                                                    \
    case CLSA_F32:                                                                                                     \
        body(CLSA_F32);                                                                                                \
        break;                                                                                                         \
    case CLSA_F16:                                                                                                     \
        body(CLSA_F16);                                                                                                \
        break;                                                                                                         \
    default:                                                                                                           \
        body(CLSA_Q8_0);                                                                                               \
    }

// n values of a row, from value `from` on; both are multiples of 16, of 32 in Q8_0.
static void row_to_f32(const uint8_t *row, int32_t type, int32_t from, int32_t n, float *out) {
    row += clsa_type_bytes(type, (size_t)from);
#define BODY(type)                                                                                                     \
    for (int32_t j = 0; j < n; j += VL)                                                                                \
    vf_store(out + j, row_load(row, type, j))
    WITH_TYPE(type, BODY)
#undef BODY
}

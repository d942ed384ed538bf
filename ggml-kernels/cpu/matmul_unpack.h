// Unpackers: 16 rows of quantized weights at a time, turned so that lane o of a vector belongs to output o.
//
// An unpacker walks along the rows and hands on, per block of 32 values (or half block), eight (four) vectors of
// unsigned bytes (lane o: values 4k..4k+3 of row o) and the scale and minimum of each row: w = s * (q - bias) or w = s
// * q - m. Where they go is the sink's business: into a panel that many rows of x are multiplied with, or straight into
// dot products. Everything here is inlined into one function per type, layout and sink.
#pragma once
// Included after matmul_isa_<isa>.h, which has the operations that all this is written in.

// `rows` = 0: a panel. Otherwise that many rows of x (a compile-time constant), which form one tile.
#define SINK_ROWS FEW_TILE
struct sink {
    uint8_t *panel;
    struct q8_tile x;
    const uint8_t *ahead; // weights to prefetch
    V acc[SINK_ROWS];
    V part[4][SINK_ROWS]; // S16, M16: blocks of which half is done
#ifdef MM_TILES
    int form;      // of the panel: BF16 or I8, a compile-time constant
    I codes[8];    // of the block in hand, on the way into the panel
    V values[128]; // I8: of the block of 128 in hand, rotated among each 16
    float *scales; // I8: [blocks of 128][16]
#endif
};

// A block's dot products on the way: in `by16`, of values that are 16 times too large.
struct dots {
    I i[SINK_ROWS], by16[SINK_ROWS];
};

// 16 rows of weights, as they lie in the file (stride > 0), or repacked: units of 16 blocks, first the dwords of 16
// rows one after another, then the f16 that leaves a block's size odd. `packed` is a compile-time constant.
// Bytes of 32 x 16 weights in a panel: q [8][16][4], s, (m); halves: s of both, (m of both).
ALWAYS_INLINE size_t panel_block(enum mm_kind kind) { return 512 + 64 * (kind == S32 ? 1 : kind == M16 ? 4 : 2); }

// ---- Sinks

// Starts the sum of a block (S32, M32) or of its half (S16, M16). log2_bias: of the weights' bias; -1 where there is
// none.
ALWAYS_INLINE void start(const struct sink *to, int rows, enum mm_kind kind, int log2_bias, int b, int half,
                         struct dots *d) {
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) {
        int32_t sum = 0;
        if (kind == S32 && (VNNI || log2_bias < 7))
            sum = to->x.i32[b * rows + r] >> (7 - log2_bias);
        if (kind == S16)
            sum = to->x.i16[(2 * b + half) * rows + r] >> (5 - log2_bias);
        d->i[r] = kind == S32 || kind == S16 ? i_set32(sum) : i_zero();
        d->by16[r] = i_zero();
    }
}

#ifdef MM_TILES
// H among n vectors that lie `stride` apart, of which each is one value of 16 outputs.
ALWAYS_INLINE void rotate(V *v, int n, int stride) {
#pragma clang loop unroll(full)
    for (int h = 1; h < n; h *= 2)
#pragma clang loop unroll(full)
        for (int i = 0; i < n; i++)
            if (!(i & h)) {
                const V a = v[i * stride], b = v[(i + h) * stride];
                v[i * stride] = v_add(a, b), v[(i + h) * stride] = v_sub(a, b);
            }
}

// Steps of 64 of the values of a block, of which each 16 are rotated already -> H w, rounded to s * q with one scale
// for an output.
static __attribute__((noinline)) void put_i8(V *values, int steps, I *q, float *s) {
    I most = i_zero();
    for (int i = 0; i < 64 * steps; i += i % 16 == 15 ? 49 : 1) {
        V v[4];
        for (int k = 0; k < 4; k++)
            v[k] = values[i + 16 * k];
        rotate(v, 4, 1);
        // The integer order of absolute values is theirs, with NaN above all.
        for (int k = 0; k < 4; k++) {
            values[i + 16 * k] = v[k];
            most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(v[k])));
        }
    }
    const V max = _mm512_castsi512_ps(most);
    const __mmask16 finite = _mm512_cmp_epi32_mask(most, i_set32(0x7f800000), _MM_CMPINT_LT);
    const __mmask16 some = _mm512_mask_cmp_ps_mask(finite, max, v_set1(I8_LEAST), _CMP_GE_OQ);
    const V by = _mm512_maskz_div_ps(some, v_set1(127), max);
    v_store(s, _mm512_mask_mov_ps(v_set1(NAN), finite, _mm512_maskz_mul_ps(some, max, v_set1(1.0f / 127))));
    // Added to this, a value is rounded, and its lowest byte holds it.
    const V whole = v_set1(0x1.8p23f);
    for (int i = 0; i < 16 * steps; i++) {
        I v[4];
        for (int k = 0; k < 4; k++)
            v[k] = _mm512_castps_si512(v_fma(values[4 * i + k], by, whole));
        const I even = _mm512_mask_blend_epi16(0xaaaaaaaa, v[0], i_sll32(v[2], 16));
        const I odd = _mm512_mask_blend_epi16(0xaaaaaaaa, v[1], i_sll32(v[3], 16));
        i_store(q + i, _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, i_sll16(odd, 8)));
    }
}

// A row's last block of 128, of which only `blocks` of 32 are there.
ALWAYS_INLINE void put_rest(struct sink *to, int nb) {
    const int blocks = nb % 4;
    if (to->form != CLSA_FORM_I8 || blocks == 0)
        return;
    for (int i = 32 * blocks; i < 64; i++)
        to->values[i] = v_zero();
    if (blocks == 3)
        for (int i = 96; i < 128; i++)
            to->values[i] = v_zero();
    put_i8(to->values, (blocks + 1) / 2, (I *)(to->panel + (size_t)(nb / 4) * 2 * 1024), to->scales + nb / 4 * GROUP);
}

// Vectors from .. to of the codes in hand -> weights s * code + c of block b, as rows of a tile.
// BF16: lane o of row r holds values 2r, 2r + 1 of output o. (Rounded to nearest, ties away from zero.)
ALWAYS_INLINE void put_tile(struct sink *to, int b, int from, int end, V s, V c) {
    I *out = (I *)(to->panel + (size_t)b * AMX_PANEL_BLOCK);
    const I half_step = i_set32(0x8000);
    V all[32];
#pragma clang loop unroll(full)
    for (int k = from; k < end; k++) {
        V *v = all + 4 * k;
#pragma clang loop unroll(full)
        for (int i = 0; i < 4; i++) {
            const I code = i == 0   ? i_and(to->codes[k], i_set32(0xff))
                           : i == 3 ? i_srl32(to->codes[k], 24)
                                    : i_and(i_srl32(to->codes[k], 8 * (unsigned)i), i_set32(0xff));
            v[i] = v_fma(v_from32(code), s, c);
        }
        if (to->form == CLSA_FORM_BF16) {
            I r[4];
#pragma clang loop unroll(full)
            for (int i = 0; i < 4; i++)
                r[i] = i_add32(_mm512_castps_si512(v[i]), half_step);
            i_store(out + 2 * k, _mm512_mask_blend_epi16(0xaaaaaaaa, i_srl32(r[0], 16), r[1]));
            i_store(out + 2 * k + 1, _mm512_mask_blend_epi16(0xaaaaaaaa, i_srl32(r[2], 16), r[3]));
        }
        if (to->form == CLSA_FORM_I8 && k % 4 == 3) {
            V *const half = all + 4 * (k - 3);
            rotate(half, 16, 1);
#pragma clang loop unroll(full)
            for (int i = 0; i < 16; i++)
                to->values[32 * (b % 4) + 4 * (k - 3) + i] = half[i];
        }
    }
    if (to->form == CLSA_FORM_I8 && end == 8 && b % 4 == 3)
        put_i8(to->values, 2, (I *)(to->panel + (size_t)(b / 4) * 2 * 1024), to->scales + b / 4 * GROUP);
}
#endif

// Values 16 * half .. + 16 of block b.
ALWAYS_INLINE void put(struct sink *to, int rows, enum mm_kind kind, int log2_bias, int b, int half, const I q[4],
                       I *sum) {
    if (rows == 0) { // a panel holds one bias for all types of a kind
        const int bias = kind == S32 ? 128 - (1 << log2_bias) : kind == S16 ? 32 - (1 << log2_bias) : 0;
#ifdef MM_TILES
        I *out = to->codes + 4 * half;
#else
        I *out = (I *)(to->panel + (size_t)b * panel_block(kind)) + 4 * half;
#endif
#pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++)
            i_store(out + k, bias ? i_add8(q[k], i_set8((char)bias)) : q[k]);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
        sum[r] = dot4(sum[r], q, to->x.q + (((size_t)b * 8 + 4 * half) * rows + r) * 4, 4 * rows, kind, log2_bias);
}

// acc += dot * s * xs (- m * f)
ALWAYS_INLINE V fold32(V acc, I dot, V s, float xs) { return v_fma(v_from32(dot), v_mul(s, v_set1(xs)), acc); }
ALWAYS_INLINE V fold_min(V acc, V m, float f) { return v_fnma(m, v_set1(f), acc); }
// Halves: part = dot_0 * s_0 (- m_0 * sum_0), then += dot_1 * s_1 (- m_1 * sum_1), then acc += part * xs. sum32: -32
// sum(q)
ALWAYS_INLINE V half_first(I dot, V s) { return v_mul(v_from32(dot), s); }
ALWAYS_INLINE V half_next(V part, I dot, V s) { return v_fma(v_from32(dot), s, part); }
ALWAYS_INLINE V half_min(V part, V m32, int32_t sum32) { return v_fma(v_from32(i_set32(sum32)), m32, part); }
ALWAYS_INLINE V fold_halves(V acc, V part, float xs) { return v_fma(part, v_set1(xs), acc); }

// Ends the sum of a block (S32, M32). m is unused without minima.
ALWAYS_INLINE void finish(struct sink *to, int rows, enum mm_kind kind, int b, V s, V m, const struct dots *d,
                          int with_by16) {
#ifdef MM_TILES
    put_tile(to, b, 0, 8, s, kind == M32 ? v_sub(v_zero(), m) : v_mul(s, v_set1(-128)));
    return;
#endif
    if (rows == 0) {
        float *out = (float *)(to->panel + (size_t)b * panel_block(kind) + 512);
        v_store(out, s);
        if (kind == M32)
            v_store(out + 16, m);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) {
        const I dot = with_by16 ? i_add32(d->i[r], i_sra32(d->by16[r], 4)) : d->i[r];
        to->acc[r] = fold32(to->acc[r], dot, s, to->x.s[b * rows + r]);
        if (kind == M32)
            to->acc[r] = fold_min(to->acc[r], m, to->x.f[b * rows + r]);
    }
}

// Ends the sum of half a block (S16, M16); halves 0 of up to four blocks may come before their halves 1. m32: minima
// / 32.
ALWAYS_INLINE void finish_half(struct sink *to, int rows, enum mm_kind kind, int b, int half, V s, V m32,
                               const struct dots *d) {
#ifdef MM_TILES
    put_tile(to, b, 4 * half, 4 * half + 4, s, v_mul(kind == M16 ? m32 : s, v_set1(-32)));
    return;
#endif
    if (rows == 0) {
        float *out = (float *)(to->panel + (size_t)b * panel_block(kind) + 512);
        v_store(out + 16 * half, s);
        if (kind == M16)
            v_store(out + 16 * (2 + half), m32);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) {
        V *part = &to->part[b % 4][r];
        *part = half ? half_next(*part, d->i[r], s) : half_first(d->i[r], s);
        if (kind == M16)
            *part = half_min(*part, m32, to->x.i16[(2 * b + half) * rows + r]);
        if (half)
            to->acc[r] = fold_halves(to->acc[r], *part, to->x.s[b * rows + r]);
    }
}

// Weights to come are brought to the L2 cache: `bytes` of each of 16 rows.
ALWAYS_INLINE void prefetch(struct sink *to, int rows, size_t bytes) {
    if (rows == 0)
        return;
    for (size_t i = 0; i < 16 * bytes; i += 64)
        _mm_prefetch((const char *)to->ahead + i, _MM_HINT_T1);
    to->ahead += 16 * bytes;
}

// ---- Loads. `skip`: bytes of a block before its first dword (2 where an f16 stands there).

ALWAYS_INLINE struct src next_block(struct src w, size_t size, int packed) {
    w.w += packed ? 16 * size : size;
    return w;
}

ALWAYS_INLINE V f16_high(I v) { return f16_low(i_srl32(v, 16)); }
ALWAYS_INLINE I and8(I v, int mask) { return i_and(v, i_set8((char)mask)); }
// Byte i of each lane, as a float.
ALWAYS_INLINE V byte_ps(I v, int i) { return v_from32(i_and(i ? i_srl32(v, 8 * (unsigned)i) : v, i_set32(0xff))); }
ALWAYS_INLINE V signed_byte_ps(I v, int i) { return v_from32(i_sra32(i_sll32(v, 24 - 8 * (unsigned)i), 24)); }
ALWAYS_INLINE V scaled(V d, float by) { return v_mul(d, v_set1(by)); }

// ---- Formats of blocks of 32

// 32 codes of 4 bits, 16 bytes a row. fifth: their bits 4. iq4: codes go through the table.
ALWAYS_INLINE void codes32(const I v[4], int b, struct sink *to, int rows, enum mm_kind kind, int log2_bias, int iq4,
                           const I *fifth, struct dots *d) {
    const int by16 = VNNI && rows && !iq4 && !fifth; // high codes stay where they are
#pragma clang loop unroll(full)
    for (int half = 0; half < 2; half++) {
        I q[4];
#pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++) {
            q[k] = half && by16 ? and8(v[k], 0xf0) : and8(half ? i_srl16(v[k], 4) : v[k], 15);
            if (iq4)
                q[k] = iq4_bytes(q[k]);
            if (fifth)
                q[k] = or_and8(q[k], spread(*fifth, 16 * half + 4 * k), 16);
        }
        put(to, rows, kind, log2_bias, b, half, q, half && by16 ? d->by16 : d->i);
    }
}

// What differs between them. Bytes of a block, where its d (or d and m), fifth bits (0: none) and codes are.
struct format {
    enum mm_kind kind;
    int log2_bias, iq4;
    size_t size, high, at;
};

// One block from its parts.
ALWAYS_INLINE void block32(const struct format f, int b, struct sink *to, int rows, V s, V m, I fifth, const I *codes) {
    struct dots d;
    start(to, rows, f.kind, f.log2_bias, b, 0, &d);
    if (f.size == 34) { // Q8_0: signed bytes
#pragma clang loop unroll(full)
        for (int half = 0; half < 2; half++) {
            I q[4];
#pragma clang loop unroll(full)
            for (int k = 0; k < 4; k++)
                q[k] = i_xor(codes[4 * half + k], i_set8((char)0x80));
            put(to, rows, f.kind, f.log2_bias, b, half, q, d.i);
        }
    } else {
        codes32(codes, b, to, rows, f.kind, f.log2_bias, f.iq4, f.high ? &fifth : NULL, &d);
    }
    finish(to, rows, f.kind, b, s, m, &d, VNNI && rows && f.size != 34 && !f.iq4 && !f.high);
}

// dwords[i]: bytes 4i..4i+3 of 16 rows. The dword at byte `at`, which is even.
ALWAYS_INLINE I dword(const I *dwords, size_t at) {
    return at % 4 ? i_joined(dwords[at / 4], dwords[at / 4 + 1]) : dwords[at / 4];
}
ALWAYS_INLINE V half_float(const I *dwords, size_t at) {
    return at % 4 ? f16_high(dwords[at / 4]) : f16_low(dwords[at / 4]);
}
ALWAYS_INLINE V negated(V v) { return v_xor(v, v_set1(-0.0f)); }

ALWAYS_INLINE void blocks32(struct src w, int nb, struct sink *to, int rows, int packed, const struct format f) {
    const size_t skip = f.kind == M32 ? 0 : 2, n_codes = f.size == 34 ? 8 : 4;
    int b = 0;
    // Eight blocks are whole pieces of 16 bytes: every part of them is in some dword, or between two.
    for (; !packed && b + 8 <= nb; b += 8, w = next_block(w, 8 * f.size, 0)) {
        I v[8 * 34 / 4];
#pragma clang loop unroll(full)
        for (size_t i = 0; i < f.size / 2; i++)
            load16(w, 16 * i, 0, 0, v + 4 * i);
#pragma clang loop unroll(full)
        for (int j = 0; j < 8; j++) {
            const size_t at = j * f.size;
            I codes[8];
            prefetch(to, rows, f.size);
#pragma clang loop unroll(full)
            for (size_t k = 0; k < n_codes; k++)
                codes[k] = dword(v, at + f.at + 4 * k);
            block32(f, b + j, to, rows, half_float(v, at), f.kind == M32 ? negated(half_float(v, at + 2)) : v_zero(),
                    f.high ? dword(v, at + f.high) : i_zero(), codes);
        }
    }
    for (; b < nb; b++, w = next_block(w, f.size, packed)) {
        I codes[8], dm = i_zero();
        prefetch(to, rows, f.size);
        load16(w, f.at, skip, packed, codes);
        if (n_codes == 8)
            load16(w, f.at + 16, skip, packed, codes + 4);
        if (f.kind == M32)
            dm = load4(w, 0, 0, packed);
        block32(f, b, to, rows, f.kind == M32 ? f16_low(dm) : load_f16(w, 0, f.size, packed),
                f.kind == M32 ? negated(f16_high(dm)) : v_zero(), f.high ? load4(w, f.high, skip, packed) : i_zero(),
                codes);
    }
}

#define MM_FORMAT(name, ...)                                                                                           \
    ALWAYS_INLINE void unpack_##name(struct src w, int nb, struct sink *to, int rows, int packed) {                    \
        blocks32(w, nb, to, rows, packed, (struct format){__VA_ARGS__});                                               \
    }
MM_FORMAT(Q4_0, S32, 3, 0, 18, 0, 2)
MM_FORMAT(Q4_1, M32, -1, 0, 20, 0, 4)
MM_FORMAT(Q5_0, S32, 4, 0, 22, 2, 6)
MM_FORMAT(Q5_1, M32, -1, 0, 24, 4, 8)
MM_FORMAT(Q8_0, S32, 7, 0, 34, 0, 2)
MM_FORMAT(IQ4_NL, S32, 7, 1, 18, 0, 2)
#undef MM_FORMAT

// ---- Formats of super-blocks of 256

// Bits of a byte moved by `left` (right where negative).
ALWAYS_INLINE I moved(I v, int left) {
    return left > 0 ? i_sll16(v, (unsigned)left) : left < 0 ? i_srl16(v, (unsigned)-left) : v;
}

// d, dmin, 12 bytes of 6-bit scales and minima, (32 bytes of fifth bits,) 128 bytes of codes. Two blocks share 32
// bytes.
ALWAYS_INLINE void super_45(struct src w, int nb, struct sink *to, int rows, int packed, int five) {
    const size_t size = five ? 176 : 144;
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, size, packed)) {
        I h[4], sc[2], mn[2], bits[8];
        load16(w, 0, 0, packed, h);
        const V dd = f16_low(h[0]), dmin = f16_high(h[0]);
        sc[0] = and8(h[1], 0x3f);
        mn[0] = and8(h[2], 0x3f);
        sc[1] = or_and8(and8(h[3], 15), i_srl32(h[1], 2), 0x30);
        mn[1] = or_and8(and8(i_srl32(h[3], 4), 15), i_srl32(h[2], 2), 0x30);
        if (five) {
            load16(w, 16, 0, packed, bits);
            load16(w, 32, 0, packed, bits + 4);
        }
#pragma clang loop unroll(full)
        for (int c = 0; c < 4; c++) {
            const int b = 8 * sb + 2 * c, i = 2 * c % 4;
            struct dots lo, hi;
            I v[8], q[4];
            prefetch(to, rows, size / 4);
            load16(w, (five ? 48 : 16) + 32 * c, 0, packed, v);
            load16(w, (five ? 48 : 16) + 32 * c + 16, 0, packed, v + 4);
            start(to, rows, M32, -1, b, 0, &lo);
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
#pragma clang loop unroll(full)
                for (int k = 0; k < 4; k++) {
                    q[k] = and8(v[4 * half + k], 15);
                    if (five)
                        q[k] = or_and8(q[k], moved(bits[4 * half + k], 4 - 2 * c), 16);
                }
                put(to, rows, M32, -1, b, half, q, lo.i);
            }
            finish(to, rows, M32, b, v_mul(dd, byte_ps(sc[c / 2], i)), v_mul(dmin, byte_ps(mn[c / 2], i)), &lo, 0);
            start(to, rows, M32, -1, b + 1, 0, &hi);
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
#pragma clang loop unroll(full)
                for (int k = 0; k < 4; k++) { // four bits: left where they are, 16 times as large
                    q[k] = five || !VNNI ? and8(i_srl16(v[4 * half + k], 4), 15) : and8(v[4 * half + k], 0xf0);
                    if (five)
                        q[k] = or_and8(q[k], moved(bits[4 * half + k], 3 - 2 * c), 16);
                }
                put(to, rows, M32, -1, b + 1, half, q, hi.i);
            }
            finish(to, rows, M32, b + 1, v_mul(five || !VNNI ? dd : scaled(dd, 0x1p-4f), byte_ps(sc[c / 2], i + 1)),
                   v_mul(dmin, byte_ps(mn[c / 2], i + 1)), &hi, 0);
        }
    }
}

ALWAYS_INLINE void unpack_Q4_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    super_45(w, nb, to, rows, packed, 0);
}
ALWAYS_INLINE void unpack_Q5_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    super_45(w, nb, to, rows, packed, 1);
}

// d, 2 high bits of 8 scales of 6 bits, their 4 low bits, 128 bytes of codes.
ALWAYS_INLINE void unpack_IQ4_XS(struct src w, int nb, struct sink *to, int rows, int packed) {
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, 136, packed)) {
        const I h = load4(w, 0, 0, packed), low = load4(w, 4, 0, packed);
        const V dd = f16_low(h);
#pragma clang loop unroll(full)
        for (int i = 0; i < 8; i++) {
            const int b = 8 * sb + i;
            struct dots d;
            I v[4];
            prefetch(to, rows, 17);
            load16(w, 8 + 16 * i, 0, packed, v);
            start(to, rows, S32, 7, b, 0, &d);
            codes32(v, b, to, rows, S32, 7, 1, NULL, &d);
            I s = i_and(i_srl32(low, 4 * (unsigned)i), i_set32(15));
            s = i_add32(s, i_and(i_srl32(h, 12 + 2 * (unsigned)i), i_set32(0x30)));
            s = i_sub32(s, i_set32(32));
            finish(to, rows, S32, b, v_mul(dd, v_from32(s)), v_zero(), &d, 0);
        }
    }
}

// Formats with a scale for 16 values: halves 0 of four blocks, then halves 1, as their bits lie together.

// 128 bytes of low nibbles, 64 of high bits, 16 signed scales, d.
ALWAYS_INLINE void unpack_Q6_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, 210, packed)) {
        I sc[4];
        load16(w, 192, 0, packed, sc);
        const V dd = load_f16(w, 208, 210, packed);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                I low[2][4], high[4], q[4];
                load16(w, 64 * n + 16 * half, 0, packed, low[0]);
                load16(w, 64 * n + 32 + 16 * half, 0, packed, low[1]);
                load16(w, 128 + 32 * n + 16 * half, 0, packed, high);
                prefetch(to, rows, 53);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) { // bits 2j of high; nibble j / 2 of low[j % 2]
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half;
                    struct dots d;
                    start(to, rows, S16, 5, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++) {
                        const I l = low[j % 2][k];
                        q[k] = and8(j < 2 ? l : i_srl16(l, 4), 15);
                        q[k] = or_and8(q[k], moved(high[k], 4 - 2 * j), 0x30);
                    }
                    put(to, rows, S16, 5, b, half, q, d.i);
                    finish_half(to, rows, S16, b, half, v_mul(dd, signed_byte_ps(sc[is / 4], is % 4)), v_zero(), &d);
                }
            }
    }
}

// 32 bytes of third bits, 64 of two low bits, 12 bytes of 6-bit scales, d.
ALWAYS_INLINE void unpack_Q3_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, 110, packed)) {
        const I a0 = load4(w, 96, 0, packed), a1 = load4(w, 100, 0, packed), a2 = load4(w, 104, 0, packed);
        const I sc[4] = {or_and8(and8(a0, 15), i_sll32(a2, 4), 0x30), or_and8(and8(a1, 15), i_sll32(a2, 2), 0x30),
                         or_and8(and8(i_srl32(a0, 4), 15), a2, 0x30),
                         or_and8(and8(i_srl32(a1, 4), 15), i_srl32(a2, 2), 0x30)};
        const V dd = load_f16(w, 108, 110, packed);
        I third[8];
        load16(w, 0, 0, packed, third);
        load16(w, 16, 0, packed, third + 4);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                I low[4], q[4];
                load16(w, 32 + 32 * n + 16 * half, 0, packed, low);
                prefetch(to, rows, 28);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) {
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half;
                    struct dots d;
                    start(to, rows, S16, 2, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++)
                        q[k] = or_and8(and8(moved(low[k], -2 * j), 3), moved(third[4 * half + k], 2 - 4 * n - j), 4);
                    put(to, rows, S16, 2, b, half, q, d.i);
                    V s = v_sub(byte_ps(sc[is / 4], is % 4), v_set1(32));
                    finish_half(to, rows, S16, b, half, v_mul(dd, s), v_zero(), &d);
                }
            }
    }
}

// 16 bytes of 4-bit scales and minima, 64 bytes of codes, d, dmin.
ALWAYS_INLINE void unpack_Q2_K(struct src w, int nb, struct sink *to, int rows, int packed) {
    for (int sb = 0; sb < nb / 8; sb++, w = next_block(w, 84, packed)) {
        I sc[4];
        load16(w, 0, 0, packed, sc);
        const I dm = load4(w, 80, 0, packed);
        const V dd = f16_low(dm), dmin = scaled(f16_high(dm), 0x1p-5f);
#pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++)
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                I low[4], q[4];
                load16(w, 16 + 32 * n + 16 * half, 0, packed, low);
                prefetch(to, rows, 21);
#pragma clang loop unroll(full)
                for (int j = 0; j < 4; j++) {
                    const int b = 8 * sb + 4 * n + j, is = 8 * n + 2 * j + half;
                    struct dots d;
                    start(to, rows, M16, -1, b, half, &d);
#pragma clang loop unroll(full)
                    for (int k = 0; k < 4; k++)
                        q[k] = and8(moved(low[k], -2 * j), 3);
                    put(to, rows, M16, -1, b, half, q, d.i);
                    const V s = byte_ps(and8(sc[is / 4], 15), is % 4);
                    const V m = byte_ps(and8(i_srl16(sc[is / 4], 4), 15), is % 4);
                    finish_half(to, rows, M16, b, half, v_mul(dd, s), v_mul(dmin, m), &d);
                }
            }
    }
}

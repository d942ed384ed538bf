// One activation row times quantized matrices: see clsa_matvec in gpu_matmul.h.
//
// A block takes tiles of 16 rows of W (GLU: 8 of the gate and the same 8 of up), one after another; its warps share the
// columns in units of 256, eight groups of 32. A warp converts the activations of its own units, so that no barrier
// stands between the row's arrival and the products; RMSNorm's factor meets the sums at the end.
//
// In a unit lane (g, t) reads groups t and t + 4 of rows g and g + 8, and the tensor cores multiply: for either row
// eight 16x8x16 products, row g of whose operand is the lane's first group and row g + 8 its second. The k-th pairs are
// numbered so that each lane's own weights are its fragment. The eight columns of the activation operand keep the
// groups apart: column n holds the activations of one group, in the lanes that hold its weights, and zeros elsewhere,
// so that the product holds the sum of each row and group, which one multiplication by the group's scale ends. The
// codes go in as they are: an integer below 2048 in the bits of an f16 is that integer times 2^-24. Offsets of the
// codes meet the sums of the activations. A warp's first two units are asked for before the predecessor kernel has
// ended, their scales are decoded while the row is on its way, and each later unit is asked for when the one two before
// it is multiplied.
#include "quant.cuh"

namespace clsa {

constexpr int MAX_WARPS = CLSA_MATVEC_WARPS;
// Types whose units take more registers: eight warps a block.
template <int T> constexpr bool WIDE = T == Q8_0 || T == Q5_K;

struct Scratch {
    float4 part[2][MAX_WARPS][16]; // of each warp and row: the sums of the row's four lanes
    float squares[MAX_WARPS];      // the sum of each warp's activations squared
};

// The activations of a unit in shared memory: eight of group t + 4e, the i-th of four, lie at value[9i + 2t + e], their
// pairs in the order 0 2 1 3; value[9i + 8] is zero, for the lanes of other groups.
struct Values {
    uint4 value[36];
    float4 sum[4];              // of the halves of groups t and t + 4: [t]
    float unscale, reserved[3]; // undoes the values' scale
};
static_assert(sizeof(Values) == CLSA_MATVEC_UNIT, "what the host reserves");

// Eight activations from x, times the norm's weights.
struct Eight {
    float v[8];
    __device__ void fill(float x) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = x;
    }
    __device__ void load(const float *x, int u) {
        const float4 a = reinterpret_cast<const float4 *>(x)[2 * u], b = reinterpret_cast<const float4 *>(x)[2 * u + 1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
    __device__ float squares() const {
        const auto two = [&](int j) { return v[j] * v[j] + v[j + 1] * v[j + 1]; };
        return (two(0) + two(2)) + (two(4) + two(6));
    }
    __device__ void times(const Eight &by) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] *= by.v[j];
    }
    __device__ float largest() const {
        const auto two = [&](int j) { return fmaxf(fabsf(v[j]), fabsf(v[j + 1])); };
        return fmaxf(fmaxf(two(0), two(2)), fmaxf(two(4), two(6)));
    }
    __device__ uint4 halves(float scale) const {
        uint32_t h[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            h[j] = bits(__floats2half2_rn(v[2 * j] * scale, v[2 * j + 1] * scale));
        return make_uint4(h[0], h[2], h[1], h[3]);
    }
};

__device__ inline float sum_of_halves(const uint4 &v) {
    const float2 a = __half22float2(bits2(v.x)), b = __half22float2(bits2(v.y));
    const float2 c = __half22float2(bits2(v.z)), d = __half22float2(bits2(v.w));
    return ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
}

// A warp writes a unit's values: f16, times the power of two that brings the largest near 2^14, so that none overflows
// and f16 keeps 2^-11 of each. Their sums are times 2^-24, as the integer codes are. NORM: also adds the lanes' squares
// up, in the time that the other steps wait for each other.
template <bool NORM> __device__ inline void write_values(Values &to, const Eight &x, float &squares, int lane) {
    const auto add = [&](int o) {
        if (NORM)
            squares += __shfl_xor_sync(0xFFFFFFFFu, squares, o);
    };
    const uint32_t top = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(x.largest()));
    add(16);
    const int shift = top == 0 ? 0 : min(126, max(-126, 141 - int(top >> 23)));
    const uint4 v = x.halves(__uint_as_float(uint32_t(127 + shift) << 23));
    const int t = lane / 4 % 4, e = lane / 16, i = lane % 4;
    to.value[9 * i + 2 * t + e] = v;
    if (lane < 4)
        to.value[9 * lane + 8] = make_uint4(0, 0, 0, 0);
    add(8);
    float s = sum_of_halves(v) * (1.0f / 16777216.0f);
    add(4);
    s += __shfl_xor_sync(0xFFFFFFFFu, s, 1);
    add(2);
    if (i % 2 == 0)
        reinterpret_cast<float *>(to.sum)[4 * t + 2 * e + i / 2] = s;
    if (lane == 0)
        to.unscale = __uint_as_float(uint32_t(127 - shift) << 23);
    add(1);
}

// Waits for the predecessors, then writes the values of the warp's units, HELD of them asked for at once. `meanwhile`
// runs while the first are on their way. NORM: times the norm's weights; returns the sum of the squares before that.
template <bool NORM, int HELD, typename F>
__device__ inline float load_activations(const clsa_matvec &p, int cols, int units, int warp, int warps, int lane,
                                         Values *values, F meanwhile) {
    Eight weights; // of the norm: those of the first unit are there before the row is
    weights.fill(0.0f);
    if (NORM && warp * 256 + lane * 8 < cols)
        weights.load(p.norm, warp * 32 + lane);
    if (p.order != CLSA_BESIDE)
        wait_for_predecessors();
    if (p.order == CLSA_LEADS)
        release_successors();
    float squares = 0.0f;
#pragma unroll 1
    for (int start = warp; start < units; start += HELD * warps) {
        Eight x[HELD];
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            const int u = (start + j * warps) * 32 + lane;
            x[j].fill(0.0f);
            if (u * 8 < cols)
                x[j].load(p.x, u);
        }
        if (start == warp)
            meanwhile();
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            const int unit = start + j * warps, u = unit * 32 + lane;
            if (unit >= units)
                break;
            float own = 0.0f;
            if constexpr (NORM) {
                own = x[j].squares();
                if (j > 0 || start > warp) {
                    weights.fill(0.0f);
                    if (u * 8 < cols)
                        weights.load(p.norm, u);
                }
                x[j].times(weights);
            }
            write_values<NORM>(values[unit], x[j], own, lane);
            squares += own;
        }
    }
    __syncwarp();
    return squares;
}

// A tile of the launch: its task, and its first row there.
struct Tile {
    int task, row;
    __device__ Tile(const clsa_matvec &p, int index) : task(0) {
        if (p.mode == CLSA_GLU) {
            row = index * 8;
            return;
        }
        for (; task + 1 < p.n_tasks; task++) {
            const int tiles = (p.task[task].w.rows + 15) >> 4;
            if (index < tiles)
                break;
            index -= tiles;
        }
        row = index * 16;
    }
};

// The scales of groups t and t + 4 of a unit of a row.
template <int T> struct UnitScales {
    using L = Layout<T>;
    static constexpr bool PAIRS = T == Q4_K || T == Q5_K; // decoded: multipliers and offsets of both groups, as floats
    static constexpr bool QUAD = T == Q6_K || T == Q2_K;  // a byte for each 16 weights; decoded: of both groups
    uint32_t scale[L::super ? (QUAD ? 1 : (L::scale_bytes + 3) / 4) : 2];
    uint32_t sup;

    // first: the row's first group; unit: of the row.
    __device__ void load(const clsa_planes &m, uint32_t first, int unit, int t, int groups) {
        if constexpr (L::floats) {
            return;
        } else if constexpr (!L::super) {
#pragma unroll
            for (int e = 0; e < 2; e++)
                scale[e] = load_scale<T>(m, first + uint32_t(min(8 * unit + t + 4 * e, groups - 1)));
        } else {
            const uint32_t n = first / 8 + unit;
            if constexpr (QUAD)
                scale[0] = load4(m.scales + size_t(n) * L::scale_bytes + 4 * t); // of groups 2t and 2t + 1
            else
                load_scales<T>(m, n, scale);
            load_super<T>(m, n, sup);
        }
    }

    // What needs no activations. By whole warps.
    __device__ void decode(int t) {
        if constexpr (PAIRS) {
            // Bytes t of the scales' words: 6 bits of group t, and 2 of group t + 4, whose others are in the last word.
            // An integer in the bits of an f16 is that integer times 2^-24.
            const uint32_t v = __byte_perm(scale[1], scale[2], t * 0x1111 + 0x4400);
            const uint32_t x = __byte_perm(scale[3], 0, t * 0x1111);
            const float2 one = __half22float2(bits2(v & 0x003F003F));
            const float2 two = __half22float2(bits2((v >> 2 & 0x00300030) | (x & 0xF) | (x >> 4 & 0x000F0000)));
            const float2 dm = __half22float2(bits2(scale[0]));
            scale[0] = __float_as_uint(dm.x * one.x), scale[1] = __float_as_uint(dm.x * two.x);
            scale[2] = __float_as_uint(dm.y * one.y), scale[3] = __float_as_uint(dm.y * two.y);
        } else if constexpr (QUAD) {
            const int lane = threadIdx.x % 32;
            const uint32_t one = __shfl_sync(0xFFFFFFFFu, scale[0], (lane & 28) | t / 2);
            const uint32_t two = __shfl_sync(0xFFFFFFFFu, scale[0], (lane & 28) | 2 | t / 2);
            scale[0] = __byte_perm(one, two, t % 2 ? 0x7632 : 0x5410);
        }
    }

    // What undoes the powers of two that sums() leaves out.
    static constexpr float factor = L::floats ? 1.0f / weight_scale<T>() : PAIRS ? 281474976710656.0f : 16777216.0f;

    // The part of halves `side` of both groups (of all of them, where a group has one scale) in a row's product. a, b:
    // of the codes times 2^-24 with the activations; sa, sb: of the activations, times 2^-24.
    __device__ float sums(int t, int side, float a, float b, float sa, float sb) const {
        if constexpr (L::floats) {
            return a + b;
        } else if constexpr (PAIRS) {
            return __uint_as_float(scale[0]) * a + __uint_as_float(scale[1]) * b -
                   (__uint_as_float(scale[2]) * sa + __uint_as_float(scale[3]) * sb);
        } else if constexpr (QUAD) {
            const float2 d = __half22float2(bits2(sup));
            const uint32_t one = scale[0] >> (8 * side) & 0xFF, two = scale[0] >> (16 + 8 * side) & 0xFF;
            if constexpr (T == Q6_K)
                return d.x * (float(int(int8_t(one))) * (a - Codes<T>::zero * sa) +
                              float(int(int8_t(two))) * (b - Codes<T>::zero * sb));
            else
                return d.x * (float(one & 0xF) * a + float(two & 0xF) * b) -
                       d.y * (float(one >> 4) * sa + float(two >> 4) * sb);
        } else {
            Scales<T> s;
            s.sup = sup;
#pragma unroll
            for (int i = 0; i < int(sizeof(scale) / 4); i++)
                s.scale[i] = scale[i];
            float by, offset, out;
            s.exact(L::super ? t : 0, 0, side, by, offset);
            out = by * a + offset * sa;
            s.exact(L::super ? t + 4 : 0, L::super ? 0 : 1, side, by, offset);
            return out + by * b + offset * sb;
        }
    }
};

// What a lane holds of a unit: its groups t and t + 4 of rows g and g + 8, and their scales.
template <int T> struct Unit {
    Codes<T> a[2], b[2];
    UnitScales<T> sa, sb;
    // first_a, first_b: the first groups of rows g and g + 8.
    __device__ void load(const clsa_planes &ma, const clsa_planes &mb, uint32_t first_a, uint32_t first_b, int unit,
                         int groups, int t, uint64_t policy) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            // A group past the end is read at the last one; its product multiplies zeros.
            const uint32_t at = Layout<T>::super ? 8 * unit + 4 * j + t : min(8 * unit + 4 * j + t, groups - 1);
            a[j].template load<true>(ma.codes, ma.high, first_a + at, policy);
            b[j].template load<true>(mb.codes, mb.high, first_b + at, policy);
        }
        sa.load(ma, first_a, unit, t, groups);
        sb.load(mb, first_b, unit, t, groups);
    }
    __device__ void decode(int t) {
        sa.decode(t);
        sb.decode(t);
    }
    // Adds the unit's part of rows g and g + 8 that this lane's groups give. decode() came before.
    __device__ void multiply(float &ya, float &yb, const Values &x, int g, int t) const {
        constexpr int SIDES = Layout<T>::sub16 ? 2 : 1;
        // Column g is group g / 2 or, if g is odd, the fourth behind it.
        const uint4 *y = x.value + (g / 2 == t ? g : 8);
        float one = 0.0f, two = 0.0f;
#pragma unroll
        for (int side = 0; side < SIDES; side++) {
            const float4 halves = x.sum[t];
            float s[2] = {halves.x, halves.z};
            if (SIDES == 1)
                s[0] += halves.y, s[1] += halves.w;
            else if (side)
                s[0] = halves.y, s[1] = halves.w;
            // Of both rows at once, or of each in turn where the halves' scales take the registers.
            constexpr int ROWS = SIDES == 1 ? 2 : 1;
#pragma unroll
            for (int first = 0; first < 2; first += ROWS) {
                float d[ROWS][2][4] = {};
#pragma unroll
                for (int k = 0; k < 4 / SIDES; k++) {
                    const int i = side * 2 + k;
                    const uint4 v = y[9 * i];
#pragma unroll
                    for (int row = 0; row < ROWS; row++) {
                        const Codes<T>(&c)[2] = first + row ? b : a;
                        uint32_t p[4], q[4];
                        c[0].words(i, p);
                        c[1].words(i, q);
                        mma(d[row][0], p[0], q[0], p[2], q[2], v.x, v.y);
                        mma(d[row][1], p[1], q[1], p[3], q[3], v.z, v.w);
                    }
                }
#pragma unroll
                for (int row = 0; row < ROWS; row++) {
                    const auto product = [&](int e) { return d[row][0][3 * e] + d[row][1][3 * e] * Codes<T>::odd; };
                    (first + row ? two : one) +=
                        (first + row ? sb : sa).sums(t, side, product(0), product(1), s[0], s[1]);
                }
            }
        }
        ya += one * x.unscale, yb += two * x.unscale;
    }
};

// The units of a warp, in order: every `warps`-th of each tile from its own on, of tiles first, first + step, ... below
// end. All warps take as many turns in a tile, so that they meet at its end in the same place. A turn past the tile's
// end multiplies nothing. It reads the last unit again, as a condition around the loads costs more (Q4_K: 4 % of all),
// but for WIDE types, whose warps are fewer and units more bytes.
struct Walk {
    int tile, unit;
    __device__ bool next(int turns, int warp, int warps, int step) { // true at a new tile; turns: of all warps
        unit += warps;
        if (unit < turns)
            return false;
        unit = warp, tile += step;
        return true;
    }
};

template <int T> __device__ void run(const clsa_matvec &p, int first, int step, int end, Scratch &scratch) {
    extern __shared__ uint4 shared[];
    const int warp = uniform_warp(), warps = blockDim.x / 32;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int cols = p.task[0].w.cols, groups = cols / 32, units = p.units, turns = p.turns;
    const bool glu = p.mode == CLSA_GLU;
    Values *values = reinterpret_cast<Values *>(shared);
    Walk loads{first, warp}, now{first, warp};
    int task;
    uint32_t first_a, first_b;
    const uint64_t policy = leaves_first();
    const auto open = [&] {
        const Tile tile(p, loads.tile);
        task = tile.task;
        const int last = p.task[task].w.rows - 1; // a row past the end is read at the last one; its product is dropped
        first_a = uint32_t(min(tile.row + g, last)) * uint32_t(groups);
        first_b = glu ? first_a : uint32_t(min(tile.row + g + 8, last)) * uint32_t(groups);
    };
    const auto load = [&](Unit<T> &unit) {
        if (loads.tile < end && (!WIDE<T> || loads.unit < units))
            unit.load(p.task[task].w, p.task[glu ? 1 : task].w, first_a, first_b,
                      WIDE<T> ? loads.unit : min(loads.unit, units - 1), groups, t, policy);
        if (loads.tile < end && loads.next(turns, warp, warps, step) && loads.tile < end)
            open();
    };
    Unit<T> one, two;
    open();
    load(one);
    const bool second = loads.tile < end;
    load(two);
    if (p.order != CLSA_LEADS)
        release_successors();
    const auto decode = [&] {
        one.decode(t);
        if (second)
            two.decode(t);
    };
    constexpr int HELD = Layout<T>::high_bytes > 0 ? 2 : 3; // what the two units leave registers for
    if (p.norm) {
        const float squares = load_activations<true, 1>(p, cols, units, warp, warps, lane, values, decode);
        if (lane == 0)
            scratch.squares[warp] = squares;
    } else {
        load_activations<false, HELD>(p, cols, units, warp, warps, lane, values, decode);
    }

    float ya = 0.0f, yb = 0.0f;
    int decoded = 2; // units in hand
    // The warp that adds up the tile in hand: they take turns.
    int turn = 0, parity = 0;
    // Multiplies `unit` and loads the one after the next into it; ends a tile when its units are done. False when all
    // is done.
    const auto advance = [&](Unit<T> &unit) {
        const int this_unit = now.unit;
        float *to = nullptr; // where the lane's sum goes
        float before = 0.0f;
        const bool last = this_unit + warps >= turns;
        if (last && warp == turn) {
            const Tile tile(p, now.tile);
            const clsa_matmul_task &task = p.task[tile.task];
            const int r = tile.row + lane;
            if (lane < (glu ? 8 : 16) && r < task.w.rows)
                to = task.out + r;
            if (to != nullptr && p.mode == CLSA_ADD)
                before = *to;
        }
        now.next(turns, warp, warps, step);
        if (decoded > 0)
            decoded--;
        else
            unit.decode(t);
        if (this_unit < units)
            unit.multiply(ya, yb, values[this_unit], g, t);
        load(unit);
        if (last) {
            float *part = reinterpret_cast<float *>(scratch.part[parity][warp]);
            part[lane] = ya, part[32 + lane] = yb;
            ya = yb = 0.0f;
            __syncthreads();
            if (warp == turn) {
                float y = 0.0f, squares = 0.0f, factor = UnitScales<T>::factor;
#pragma unroll
                for (int w = 0; w < MAX_WARPS; w += 2)
                    if (w + lane / 16 < warps) {
                        const float4 v = scratch.part[parity][w + lane / 16][lane % 16];
                        y += (v.x + v.y) + (v.z + v.w);
                    }
                y += __shfl_xor_sync(0xFFFFFFFFu, y, 16);
                if (p.norm) {
                    float more = 0.0f;
#pragma unroll
                    for (int w = 0; w < MAX_WARPS; w += 2) {
                        squares += w < warps ? scratch.squares[w] : 0.0f;
                        more += w + 1 < warps ? scratch.squares[w + 1] : 0.0f;
                    }
                    squares += more;
                    factor *= rsqrtf(squares * p.inverse_cols + p.eps);
                }
                y *= factor;
                const float up = __shfl_down_sync(0xFFFFFFFFu, y, 8);
                if (to != nullptr)
                    *to = glu ? silu(y) * up : y + before;
            }
            parity ^= 1;
            turn = turn + 1 < warps ? turn + 1 : 0;
        }
        return now.tile < end;
    };
    while (advance(one) && advance(two)) {
    }
    if (p.order == CLSA_BESIDE)
        wait_for_predecessors();
}

} // namespace clsa

using namespace clsa;

// block: 32 * warps; shared: CLSA_MATVEC_UNIT bytes for each 256 columns; p.n_tiles: the 16-row tiles of all tasks
// (GLU: the 8-row tiles of task 0). One kernel for each type: a launch's tasks are of one type. Types whose units take
// more registers have eight warps a block (Spread).
#define SAME(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(WIDE<T> ? 32 * CLSA_MATVEC_WARPS_WIDE : 32 * MAX_WARPS, 2)            \
        clsa_matvec_##T##_kernel(const __grid_constant__ clsa_matvec p) {                                              \
        __shared__ Scratch scratch;                                                                                    \
        run<T>(p, blockIdx.x, gridDim.x, p.n_tiles, scratch);                                                          \
    }
CLSA_TYPES(SAME)

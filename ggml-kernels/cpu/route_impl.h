// Scoring and exact top-k, for the vector operations of vec_<isa>.h. A score's sum always runs in the same order, so a
// row's selection depends neither on the threads nor on the rows that share its pass over the keys.
#include "route.h"
#include "team.h"

#include "rows_impl.h"
#include "topk_impl.h"

// Bytes by which keys are asked for before they are read: past the end of a page of 4 KiB, where the prefetchers of the
// hardware stop. Keys of neighbouring positions follow each other but at the ends of cache pages.
#define KEYS_AHEAD 4096

// Scores of the VL keys at rows[0..VL] of the (constant) type: VL partial sums each over every VL-th dimension, then
// their tree. So many keys `together`: from memory, no more than lie within the kilobyte in which prefetchers still see
// an order; from the first cache, all of them, for chains of multiply-adds that do not wait. It changes no result.
ALWAYS_INLINE vf dots(const float *q, const uint8_t *const *rows, const int32_t type, const int together, int32_t d) {
    const int32_t line = type == CLSA_F32 ? 16 : type == CLSA_F16 ? 32 : 64; // about 64 bytes of values
    vf acc[VL];
#pragma clang loop unroll(full)
    for (int i = 0; i < VL; i += together) {
#pragma clang loop unroll(full)
        for (int l = 0; l < together; l++)
            acc[i + l] = vf_set1(0);
        for (int32_t j = 0; j < d; j += VL) {
            vf x = vf_load(q + j);
#pragma clang loop unroll(full)
            for (int l = 0; l < together; l++) {
                if (together < VL && j % line == 0)
                    _mm_prefetch((const char *)rows[i + l] + clsa_type_bytes(type, (size_t)j) + KEYS_AHEAD,
                                 _MM_HINT_T1);
                acc[i + l] = vf_fma(x, row_load(rows[i + l], type, j), acc[i + l]);
            }
        }
    }
    return vf_sums(acc);
}

ALWAYS_INLINE vf dots_in_memory(const float *q, const uint8_t *const *rows, int32_t type, int32_t d) {
    if (type == CLSA_F32)
        return dots(q, rows, CLSA_F32, 1, d);
    if (type == CLSA_F16)
        return dots(q, rows, CLSA_F16, 4, d);
    return dots(q, rows, CLSA_Q8_0, 4, d);
}

// Rows of the keys at pos, pos + 1, ...; past the last one, the last one again.
ALWAYS_INLINE void key_rows(const struct clsa_rows *keys, const struct clsa_batch *batch, int32_t slot, int32_t pos,
                            int32_t n, const uint8_t **rows) {
    for (int32_t i = 0; i < VL; i++)
        rows[i] = i > 0 && (i >= n || (keys->ring == 0 && (pos + i) % CLSA_PAGE != 0))
                      ? rows[i - 1] + (i < n ? keys->row_stride : 0)
                      : clsa_row(keys, batch, slot, pos + i);
}

// A query row's way through a stretch of keys.
struct scan {
    const float *q;
    int32_t end; // its keys are below it
    struct list list;
    float sum; // block mode: of the block so far, and its keys
    int32_t in_block;
};

// Block mode: one vector of scores, lane by lane.
static void scan_blocks(struct scan *scan, vf scores, int32_t pos, int32_t n, int32_t block) {
    float lane[VL];
    vf_store(lane, scores);
    for (int32_t i = 0; i < n; i++) {
        scan->sum += lane[i];
        scan->in_block++;
        if (scan->in_block < block && pos + i + 1 < scan->end)
            continue;
        list_offer(&scan->list, vf_set1(scan->sum / (float)scan->in_block), (pos + i) / block, 1);
        scan->sum = 0, scan->in_block = 0;
    }
}

// Scores keys first <= s < end for n rows of one sequence. first is a multiple of the block.
static void scan_keys(const struct clsa_route *p, int32_t slot, int32_t first, int32_t end, struct scan *scans,
                      int32_t n) {
    const uint8_t *rows[VL];
    float tile[VL * CLSA_MAX_D] __attribute__((aligned(64)));
    for (int32_t s = first; s < end; s += VL) {
        key_rows(&p->keys, &p->batch, slot, s, MIN(VL, end - s), rows);
        if (n > 1)
            for (int32_t i = 0; i < VL; i++) {
                row_to_f32(rows[i], p->keys.type, 0, p->d, tile + i * p->d);
                rows[i] = (const uint8_t *)(tile + i * p->d);
            }
        for (int32_t r = 0; r < n; r++) {
            int32_t valid = MIN(MIN(scans[r].end, end) - s, VL);
            if (valid <= 0)
                continue;
            vf x;
            if (n > 1)
                x = dots(scans[r].q, rows, CLSA_F32, VL, p->d);
            else
                x = dots_in_memory(scans[r].q, rows, p->keys.type, p->d);
            if (p->block > 1)
                scan_blocks(&scans[r], x, s, valid, p->block);
            else
                list_offer(&scans[r].list, x, s, (uint32_t)((1ull << valid) - 1));
        }
    }
}

// Merges the row's lists into its selection.
static void finish_row(const struct clsa_route *p, int32_t r, struct list *lists, int32_t n_lists) {
    const int32_t block = MAX(p->block, 1), n = p->batch.pos[r] + 1;
    uint32_t *out = p->selected + (size_t)r * p->n_columns;
    int32_t held = lists_finish(lists, n_lists, lists[0].k, out), count = held;
    if (block > 1) { // from blocks to their positions, in place from the end on; only the last one may be partial
        int32_t last = (int32_t)out[held - 1] * block;
        count = (held - 1) * block + MIN(block, n - last);
        for (int32_t b = held - 1; b >= 0; b--)
            for (int32_t start = (int32_t)out[b] * block, i = MIN(block, n - start) - 1; i >= 0; i--)
                out[b * block + i] = (uint32_t)(start + i);
    }
    p->count[r] = count;
}

static void route(const struct clsa_route *p, int ith, int nth, void *scratch) {
    struct team *team = scratch;
    const int32_t n_rows = p->batch.n_rows, block = MAX(p->block, 1), k = MAX(p->k / block, 1);
    // Few rows: the keys of each are cut into segments for the threads. Many: rows that share a pass are a piece.
    const int32_t most = MIN(ROUTE_ROWS, (n_rows + nth - 1) / nth),
                  n_segments = most > 1 ? 1 : (nth + n_rows - 1) / n_rows;
    const size_t bytes = candidates_bytes(k);
    char *memory = (char *)scratch + CLSA_SYNC;
    int32_t row = 0;
    uint32_t piece = 0, claimed;
    while ((claimed = team_claim(team)) < (uint32_t)n_rows * (uint32_t)n_segments) {
        int32_t n = 0, segment = (int32_t)(claimed % (uint32_t)n_segments);
        for (;; row += n, piece++) {
            for (n = 0; row + n < n_rows && n < most && p->batch.slot[row + n] == p->batch.slot[row];)
                n++;
            if (n == 0 || piece == claimed / (uint32_t)n_segments)
                break;
        }
        if (n == 0)
            break;
        struct scan scans[ROUTE_ROWS];
        int32_t row_of[ROUTE_ROWS], n_scans = 0, longest = 0;
        for (int32_t i = 0; i < n; i++) {
            int32_t r = row + i, keys = p->batch.pos[r] + 1;
            if (keys > p->k && (keys + block - 1) / block > k) {
                size_t at = n_segments > 1 ? (size_t)claimed : (size_t)ith * (size_t)most + (size_t)i;
                scans[n_scans] = (struct scan){p->q + (size_t)r * p->d, keys, list_at(memory + at * bytes, k), 0, 0};
                row_of[n_scans++] = r;
                longest = MAX(longest, keys);
            } else if (segment == 0) {
                for (int32_t s = 0; s < keys; s++)
                    p->selected[(size_t)r * p->n_columns + s] = (uint32_t)s;
                p->count[r] = keys;
            }
        }
        if (n_scans == 0)
            continue;
        const int32_t unit = ROUND_UP((longest + n_segments - 1) / n_segments, block * VL);
        scan_keys(p, p->batch.slot[row], (int32_t)MIN((int64_t)segment * unit, longest),
                  (int32_t)MIN((int64_t)(segment + 1) * unit, longest), scans, n_scans);
        if (n_segments == 1) {
            for (int32_t i = 0; i < n_scans; i++)
                finish_row(p, row_of[i], &scans[i].list, 1);
            continue;
        }
        struct list *kept = (struct list *)(memory + (size_t)n_rows * n_segments * bytes);
        list_shrink(&scans[0].list);
        kept[claimed] = scans[0].list;
        if (team_arrive(team, (uint32_t)row, (uint32_t)n_segments))
            finish_row(p, row, kept + (size_t)row * n_segments, n_segments);
    }
    team_leave(team, nth);
}

static void score(const struct clsa_score *p, int ith, int nth) {
    const uint8_t *rows[VL];
    const int32_t unit = ROUND_UP((p->n + nth - 1) / nth, VL);
    const int32_t end = (int32_t)MIN((int64_t)(ith + 1) * unit, p->n);
    for (int32_t i = (int32_t)MIN((int64_t)ith * unit, p->n); i < end; i += VL) {
        key_rows(&p->keys, &p->batch, p->slot, p->start + i, MIN(VL, end - i), rows);
        vf x = dots_in_memory(p->q, rows, p->keys.type, p->d);
        float lane[VL];
        if (i + VL <= end)
            vf_store(p->out + i, x);
        else
            vf_store(lane, x), memcpy(p->out + i, lane, 4 * (size_t)(end - i));
    }
}

static void topk(const struct clsa_topk *p, void *scratch) {
    struct list list = list_at((char *)scratch + CLSA_SYNC, MIN(p->k, p->n));
    int32_t i = 0;
    for (; i + VL <= p->n; i += VL)
        list_offer(&list, vf_load(p->scores + i), i, (uint32_t)((1ull << VL) - 1));
    if (i < p->n) {
        float rest[VL] = {0};
        memcpy(rest, p->scores + i, 4 * (size_t)(p->n - i));
        list_offer(&list, vf_load(rest), i, (1u << (p->n - i)) - 1);
    }
    lists_finish(&list, 1, list.k, p->selected);
}

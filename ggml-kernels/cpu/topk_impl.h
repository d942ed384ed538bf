// Exact selection of the k best of a stream, for the vector operations of vec_<isa>.h.
//
// Scores become integers that order as they do. A list takes what lies above its threshold; when it is full, a bound of
// its k best becomes the threshold and only those stay. Positions come in ascending order and stay so: whatever
// comes later loses a tie.
#pragma once

struct list {
    int32_t *key, *pos; // [limit + VL]
    size_t n, limit;
    int32_t threshold; // what is at or below it is not among the k best
    int32_t k;
};

static struct list list_at(void *memory, int32_t k) {
    size_t capacity = candidates_capacity(k);
    return (struct list){memory, (int32_t *)memory + capacity, 0, capacity - VL, INT32_MIN, k};
}

// Keys of the lists that are >= key.
static size_t count_from(const struct list *lists, int32_t n_lists, int32_t key) {
    size_t count = 0;
    vi below = vi_set1(key - 1); // key > INT32_MIN: that is no score's
    for (int32_t l = 0; l < n_lists; l++)
        for (size_t i = 0; i < lists[l].n; i += VL)
            count += (size_t)__builtin_popcount(vi_gt(vi_load(lists[l].key + i), below));
    return count;
}

// A bound of the k best of more than k keys: at most k keys are above it, at least k at or above it.
static int32_t kth_key(struct list *lists, int32_t n_lists, size_t k) {
    vi min = vi_set1(INT32_MAX), max = vi_set1(INT32_MIN);
    size_t held = 0;
    for (int32_t l = 0; l < n_lists; l++) {
        struct list *list = &lists[l];
        held += list->n;
        if (list->n == 0)
            continue;
        vi_store(list->key + list->n, vi_set1(list->key[0]));
        for (size_t i = 0; i < list->n; i += VL) {
            vi keys = vi_load(list->key + i);
            min = vi_min(min, keys), max = vi_max(max, keys);
        }
        vi_store(list->key + list->n, vi_set1(INT32_MIN)); // never counted
    }
    int64_t low = vi_hmin(min), high = (int64_t)vi_hmax(max) + 1; // k keys reach low, fewer reach high
    size_t from_low = held, from_high = 0;
    for (int step = 0; high - low > 1; step++) {
        // Where k would be if keys lay evenly, and every other time in the middle, for when they do not.
        const double part = step % 2 ? 0.5 : (double)(from_low - k) / (double)(from_low - from_high);
        const int64_t guess = low + (int64_t)((double)(high - low) * part);
        const int64_t middle = MIN(MAX(guess, low + 1), high - 1);
        const size_t count = count_from(lists, n_lists, (int32_t)middle);
        if (count == k)
            return (int32_t)(middle - 1);
        if (count > k)
            low = middle, from_low = count;
        else
            high = middle, from_high = count;
    }
    return (int32_t)low;
}

// The lanes of vector i of a list that are among the best: those above kth, and the first *ties of those equal to it.
ALWAYS_INLINE uint32_t best_lanes(const struct list *list, size_t i, int32_t kth, size_t *ties) {
    vi keys = vi_load(list->key + i);
    uint32_t valid = list->n - i < VL ? (1u << (list->n - i)) - 1 : (uint32_t)((1ull << VL) - 1);
    uint32_t above = vi_gt(keys, vi_set1(kth)) & valid, equal = vi_eq(keys, vi_set1(kth)) & valid;
    if (equal == 0 || *ties == 0)
        return above;
    if ((size_t)__builtin_popcount(equal) > *ties)
        equal = _pdep_u32((1u << *ties) - 1, equal);
    *ties -= (size_t)__builtin_popcount(equal);
    return above | equal;
}

// How many of the lists' keys equal to the k-th, kth, are among the k best.
static size_t ties_of(const struct list *lists, int32_t n_lists, int32_t kth, size_t k) {
    return k - (kth == INT32_MAX ? 0 : count_from(lists, n_lists, kth + 1));
}

// Keeps the k best of a list that holds more.
static void list_shrink(struct list *list) {
    const size_t k = (size_t)list->k;
    if (list->n <= k)
        return;
    int32_t kth = kth_key(list, 1, k);
    size_t ties = ties_of(list, 1, kth, k), n = 0;
    for (size_t i = 0; i < list->n; i += VL) {
        uint32_t mask = best_lanes(list, i, kth, &ties);
        vi keys = vi_load(list->key + i), pos = vi_load(list->pos + i);
        vi_compress(list->key + n, keys, mask);
        vi_compress(list->pos + n, pos, mask);
        n += (size_t)__builtin_popcount(mask);
    }
    list->n = n;
    list->threshold = kth;
}

// Offers VL scores at positions from pos on; `valid` are the lanes that count.
ALWAYS_INLINE void list_offer(struct list *list, vf scores, int32_t pos, uint32_t valid) {
    vi keys = vi_key(scores);
    uint32_t mask = vi_gt(keys, vi_set1(list->threshold)) & valid;
    if (__builtin_expect(mask == 0, 1))
        return;
    vi_compress(list->key + list->n, keys, mask);
    vi_compress(list->pos + list->n, vi_add(vi_set1(pos), vi_iota()), mask);
    list->n += (size_t)__builtin_popcount(mask);
    if (list->n > list->limit - VL)
        list_shrink(list);
}

// Writes the positions of the k best of lists that follow each other, ascending. Returns their number, at most k.
static int32_t lists_finish(struct list *lists, int32_t n_lists, int32_t k, uint32_t *selected) {
    size_t held = 0, n = 0;
    for (int32_t l = 0; l < n_lists; l++)
        held += lists[l].n;
    int32_t kth = INT32_MIN;
    size_t ties = 0, wanted = MIN((size_t)k, held);
    if (held > (size_t)k) {
        kth = kth_key(lists, n_lists, (size_t)k);
        ties = ties_of(lists, n_lists, kth, (size_t)k);
    }
    for (int32_t l = 0; l < n_lists; l++)
        for (size_t i = 0; i < lists[l].n; i += VL) {
            uint32_t mask = best_lanes(&lists[l], i, kth, &ties);
            size_t count = (size_t)__builtin_popcount(mask);
            vi pos = vi_load(lists[l].pos + i);
            int32_t last[VL];
            if (n + VL <= wanted) {
                vi_compress((int32_t *)selected + n, pos, mask);
            } else {
                vi_compress(last, pos, mask);
                memcpy(selected + n, last, 4 * count);
            }
            n += count;
        }
    return (int32_t)n;
}

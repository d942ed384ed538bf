// How the threads of a team share an op without a barrier: the first bytes of its scratch, zero before and after.
#pragma once
#include "common.h"

struct team {
    _Atomic uint32_t next;    // the next piece of work
    _Atomic uint32_t leavers; // threads that found none left
    uint32_t unused[30];
    _Atomic uint32_t arrivals[CLSA_SYNC / 4 - 32];
};
_Static_assert(sizeof(struct team) == CLSA_SYNC, "the sync words");

// Claims the next of n pieces; n or more: none is left.
ALWAYS_INLINE uint32_t team_claim(struct team *team) {
    return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed);
}

// Each thread's last call: the last one of all clears the words.
ALWAYS_INLINE void team_leave(struct team *team, int nth) {
    if (atomic_fetch_add_explicit(&team->leavers, 1, memory_order_acq_rel) + 1 == (uint32_t)nth) {
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        atomic_store_explicit(&team->leavers, 0, memory_order_relaxed);
    }
}

// Reports one of n parts of `job` as done. True for the last: it sees what all the others wrote, and clears the word.
ALWAYS_INLINE int team_arrive(struct team *team, uint32_t job, uint32_t n) {
    if (atomic_fetch_add_explicit(&team->arrivals[job], 1, memory_order_acq_rel) + 1 != n)
        return 0;
    atomic_store_explicit(&team->arrivals[job], 0, memory_order_relaxed);
    return 1;
}

//! Who runs next: admission by worst-case memory, and the rows of each micro-batch.
use crate::cache::PAGE;

/// A sequence that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// Prompt tokens still to run.
    pub prompt_left: usize,
    /// When it was admitted: smaller is older.
    pub age: u64,
}

/// Rows for each active sequence in one micro-batch of at most `max_rows`: one for each that decodes; the rest goes to prompts, half of it to
/// the oldest, so that it cannot starve, the other half to the shortest first, so that short jobs are not held up by long ones.
#[must_use]
pub fn rows(active: &[Active], max_rows: usize) -> Vec<usize> {
    let mut rows: Vec<usize> = active.iter().map(|a| usize::from(a.prompt_left == 0)).collect();
    let mut left = max_rows.saturating_sub(rows.iter().sum());
    let mut prompts: Vec<usize> = (0..active.len()).filter(|&i| active[i].prompt_left > 0).collect();
    if let Some(&oldest) = prompts.iter().min_by_key(|&&i| active[i].age) {
        rows[oldest] = active[oldest].prompt_left.min(left.div_ceil(2));
        left -= rows[oldest];
    }
    prompts.sort_by_key(|&i| (active[i].prompt_left, active[i].age));
    for i in prompts {
        let more = (active[i].prompt_left - rows[i]).min(left);
        rows[i] += more;
        left -= more;
    }
    rows
}

/// Pages that a sequence may still take: up to `len` positions, `shared` of which it has by reference. A partly filled shared page is
/// copied when it is written.
#[must_use]
pub fn pages_needed(len: usize, shared: usize) -> usize {
    len.div_ceil(PAGE) - shared / PAGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn decoding_sequences_always_get_their_row() {
        let a = |prompt_left, age| Active { prompt_left, age };
        assert_eq!(rows(&[a(0, 0), a(100, 1), a(0, 2), a(5, 3)], 16), [1, 9, 1, 5]);
        assert_eq!(rows(&[a(0, 0), a(0, 1)], 16), [1, 1]);
        assert_eq!(rows(&[a(1000, 0)], 16), [16]);
    }

    /// Short prompts that come for ever take half of a micro-batch at most from the oldest one.
    #[test]
    fn the_oldest_prompt_advances_whatever_comes_after() {
        let (mut left, mut steps) = (1000, 0);
        while left > 0 {
            steps += 1;
            assert!(steps < 100, "{left} rows left");
            let new = |i| Active { prompt_left: 20, age: 8 * steps + i };
            let active: Vec<Active> =
                (0..8).map(|i| if i == 3 { Active { prompt_left: left, age: 0 } } else { new(i) }).collect();
            left -= rows(&active, 64)[3];
        }
        assert_eq!(steps, 1000_u64.div_ceil(32));
    }

    #[test]
    fn shared_pages_are_not_counted_twice() {
        assert_eq!(pages_needed(PAGE * 4, 0), 4);
        assert_eq!(pages_needed(PAGE * 4, PAGE * 3), 1);
        // The partly filled third page is copied.
        assert_eq!(pages_needed(PAGE * 4, PAGE * 2 + 1), 2);
    }

    proptest! {
        #[test]
        fn batches_are_full_and_nobody_starves(
            lefts in prop::collection::vec(0usize..2000, 1..12),
            max_rows in 16usize..600,
        ) {
            let mut active: Vec<Active> =
                lefts.iter().enumerate().map(|(i, &prompt_left)| Active { prompt_left, age: i as u64 }).collect();
            let total: usize = lefts.iter().sum();
            let mut steps = 0;
            while active.iter().any(|a| a.prompt_left > 0) {
                let rows = rows(&active, max_rows);
                let used: usize = rows.iter().sum();
                let wanted: usize = active.iter().map(|a| a.prompt_left.max(1)).sum();
                prop_assert_eq!(used, wanted.min(max_rows).max(used.min(wanted)));
                prop_assert!(used <= max_rows);
                for (a, n) in active.iter_mut().zip(rows) {
                    if a.prompt_left == 0 {
                        prop_assert_eq!(n, 1);
                    }
                    a.prompt_left -= n.min(a.prompt_left);
                }
                steps += 1;
                prop_assert!(steps <= total + 1);
            }
        }
    }
}

//! What the router looked at while an answer was made: how often each position was selected.
use std::ops::Range;

/// Counts of selected positions over the tokens of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    counts: Vec<u32>,
    steps: u32,
}

impl Looked {
    /// Adds the positions that were selected for one token.
    pub fn add(&mut self, selected: &[u32]) {
        if selected.is_empty() {
            return;
        }
        self.steps += 1;
        let end = selected.iter().max().map_or(0, |&p| p as usize + 1);
        if self.counts.len() < end {
            self.counts.resize(end, 0);
        }
        selected.iter().for_each(|&p| self.counts[p as usize] += 1);
    }

    /// Tokens that were routed.
    #[must_use]
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// Positions up to the last one that was selected.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    /// Whether nothing was routed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps == 0
    }

    /// Share of the tokens for which a position of the range was selected, on average over the range: 1 is always.
    #[must_use]
    pub fn share(&self, range: Range<usize>) -> f64 {
        let range = range.start.min(self.counts.len())..range.end.min(self.counts.len());
        if range.is_empty() || self.steps == 0 {
            return 0.0;
        }
        let sum: u64 = self.counts[range.clone()].iter().map(|&c| u64::from(c)).sum();
        sum as f64 / range.len() as f64 / f64::from(self.steps)
    }

    /// The shares of at most `bins` equal parts of the positions.
    #[must_use]
    pub fn histogram(&self, bins: usize) -> Vec<f64> {
        let (n, bins) = (self.counts.len(), bins.min(self.counts.len()));
        (0..bins).map(|i| self.share(i * n / bins..(i + 1) * n / bins)).collect()
    }

    /// Up to `count` passages of `len` positions that were selected most, best first, none overlapping another.
    #[must_use]
    pub fn passages(&self, count: usize, len: usize) -> Vec<Range<usize>> {
        let mut sums = vec![0u64];
        sums.extend(self.counts.iter().scan(0, |sum, &c| {
            *sum += u64::from(c);
            Some(*sum)
        }));
        let len = len.min(self.counts.len());
        let mut starts: Vec<usize> = (0..=self.counts.len() - len).collect();
        starts.sort_by_key(|&s| (std::cmp::Reverse(sums[s + len] - sums[s]), s));
        let mut chosen: Vec<Range<usize>> = vec![];
        for start in starts {
            if chosen.len() == count || len == 0 || sums[start + len] == sums[start] {
                break;
            }
            if chosen.iter().all(|c| start + len <= c.start || c.end <= start) {
                chosen.push(start..start + len);
            }
        }
        chosen
    }
}

/// A histogram as a line of bars; the tallest stands for the largest value.
#[must_use]
pub fn bars(values: &[f64]) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = values.iter().copied().fold(0.0, f64::max);
    let bar = |v: f64| {
        let level = if most > 0.0 { (v / most * 8.0).ceil() } else { 0.0 };
        BARS[(level as usize).min(8)]
    };
    values.iter().map(|&v| bar(v)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn looked(selections: &[&[u32]]) -> Looked {
        let mut l = Looked::default();
        selections.iter().for_each(|s| l.add(s));
        l
    }

    #[test]
    fn shares_are_of_tokens_and_positions() {
        let l = looked(&[&[0, 1], &[1, 3], &[]]);
        assert_eq!((l.steps(), l.len()), (2, 4));
        assert_eq!(l.share(1..2), 1.0);
        assert_eq!(l.share(0..4), 0.5);
        assert_eq!(l.share(9..12), 0.0);
        assert_eq!(l.histogram(2), [0.75, 0.25]);
        assert_eq!(l.histogram(100).len(), 4);
        assert!(Looked::default().histogram(10).is_empty());
    }

    #[test]
    fn the_passages_selected_most_come_first() {
        let l = looked(&[&[2, 3, 10, 11], &[10, 11], &[10, 11, 20]]);
        assert_eq!(l.passages(3, 2), [10..12, 2..4, 19..21]);
        assert_eq!(l.passages(1, 100), vec![0..21; 1]);
        assert!(Looked::default().passages(3, 2).is_empty());
    }

    #[test]
    fn bars_scale_to_the_largest() {
        assert_eq!(bars(&[0.0, 0.5, 1.0, 0.01]), " ▄█▁");
        assert_eq!(bars(&[0.0, 0.0]), "  ");
    }

    proptest! {
        #[test]
        fn passages_never_overlap(selected in proptest::collection::vec(proptest::collection::vec(0u32..200, 0..20), 0..6), count in 0usize..8, len in 0usize..40) {
            let mut l = Looked::default();
            selected.iter().for_each(|s| l.add(s));
            let passages = l.passages(count, len);
            prop_assert!(passages.len() <= count);
            for (i, a) in passages.iter().enumerate() {
                prop_assert!(a.end <= l.len());
                prop_assert!(passages[..i].iter().all(|b| a.end <= b.start || b.end <= a.start));
            }
        }
    }
}

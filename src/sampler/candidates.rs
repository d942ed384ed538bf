//! The tokens still in the running, and the filters that drop some of them.
use super::math::{self, exp};
use std::cmp::Ordering;

/// A token that may come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub id: u32,
    pub logit: f32,
    /// Its probability among the candidates when [`Candidates::softmax`] last ran.
    pub p: f32,
}

/// Larger logits first; of equal ones the lower id.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// The tokens still in the running: never empty once [`Self::take`] found one.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    list: Vec<Candidate>,
    /// How many at the start of `list` are in order, with none better after them. All others are by id.
    ordered: usize,
    /// The sum of all `p`, which is 1 but for rounding.
    total: f64,
    /// Room for a pass over all logits.
    scratch: Vec<f32>,
    /// Room for looking for a cut.
    shuffled: Vec<Candidate>,
}

impl Candidates {
    pub fn as_slice(&self) -> &[Candidate] {
        &self.list
    }

    /// Takes the tokens with logits above -inf that are at least `floor`: the `k` best of them, in order, or all of them,
    /// by id, when `k` is 0. No logit may be NaN.
    pub fn take(&mut self, logits: &[f32], k: usize, floor: f32) {
        const BLOCK: usize = 32;
        self.list.clear();
        self.ordered = 0;
        // What is not above this is not wanted; it rises as better tokens are found.
        let mut bar = floor.next_down();
        let room = if k == 0 { usize::MAX } else { k.saturating_mul(2).max(64) };
        for (first, block) in (0u32..).step_by(BLOCK).zip(logits.chunks(BLOCK)) {
            if !block.iter().fold(false, |any, x| any | (*x > bar)) {
                continue;
            }
            for (id, logit) in (first..).zip(block) {
                if *logit > bar {
                    self.list.push(Candidate { id, logit: *logit, p: 0.0 });
                }
            }
            if self.list.len() >= room {
                self.list.select_nth_unstable_by(k - 1, best_first);
                self.list.truncate(k);
                bar = self.list[k - 1].logit;
            }
        }
        if k > 0 {
            self.order(k);
            self.list.truncate(k);
        }
    }

    /// Brings the `n` best to the front, in order.
    fn order(&mut self, n: usize) {
        let n = n.min(self.list.len());
        if n <= self.ordered {
            return;
        }
        let rest = &mut self.list[self.ordered..];
        let more = n - self.ordered;
        if more < rest.len() {
            rest.select_nth_unstable_by(more - 1, best_first);
        }
        rest[..more].sort_unstable_by(best_first);
        self.ordered = n;
    }

    fn top(&self) -> f32 {
        match self.ordered {
            0 => self.list.iter().fold(f32::NEG_INFINITY, |top, c| top.max(c.logit)),
            _ => self.list[0].logit,
        }
    }

    /// Sets the probabilities: softmax(logit / temperature). Returns the logarithm of the sum of e^(logit / temperature).
    pub fn softmax(&mut self, temperature: f32) -> f32 {
        let top = self.top();
        self.scratch.clear();
        self.scratch.extend(self.list.iter().map(|c| c.logit));
        self.scratch.iter_mut().for_each(|x| *x = exp((*x - top) / temperature));
        let sum = math::sum(&self.scratch, |p| p);
        let scale = (1.0 / sum) as f32;
        self.list.iter_mut().zip(&self.scratch).for_each(|(c, p)| c.p = p * scale);
        self.total = sum * f64::from(scale);
        (f64::from(top / temperature) + sum.ln()) as f32
    }

    /// Keeps the best tokens until they have the probability `p` together.
    pub fn top_p(&mut self, p: f32) {
        if p >= 1.0 {
            return;
        }
        self.softmax(1.0);
        self.keep_enough(best_first, |sum| sum >= f64::from(p));
    }

    /// Keeps tokens at least `p` times as probable as the best.
    pub fn min_p(&mut self, p: f32) {
        if p > 0.0 {
            let floor = self.top() + (f64::from(p)).ln() as f32;
            self.retain(|c| c.logit >= floor);
        }
    }

    /// Keeps the tokens whose surprise -ln p is nearest to the entropy, until they have the probability `p` together
    /// (locally typical sampling, arXiv 2202.00666).
    pub fn typical(&mut self, p: f32) {
        if p >= 1.0 {
            return;
        }
        let normalizer = self.softmax(1.0);
        let surprise = |c: &Candidate| normalizer - c.logit;
        let entropy: f64 = self.list.iter().map(|c| f64::from(c.p) * f64::from(surprise(c))).sum();
        let entropy = entropy as f32;
        // Of equally typical tokens the better one first.
        let typical_first = |a: &Candidate, b: &Candidate| {
            let far = |c: &Candidate| (surprise(c) - entropy).abs();
            far(a).total_cmp(&far(b)).then_with(|| best_first(a, b))
        };
        self.keep_enough(typical_first, |sum| sum > f64::from(p));
    }

    /// Keeps the first candidates in `order` whose probabilities together are `sufficient`, in the places that they have.
    fn keep_enough(
        &mut self,
        order: impl Fn(&Candidate, &Candidate) -> Ordering,
        sufficient: impl Fn(f64) -> bool,
    ) {
        let mut list = std::mem::take(&mut self.shuffled);
        list.clone_from(&self.list);
        if let Some(last) = last_needed(&mut list, &order, sufficient) {
            self.retain(|c| order(c, &last).is_le());
        }
        self.shuffled = list;
    }

    /// Drops all tokens with at least the probability `threshold` but the least probable of them.
    pub fn xtc(&mut self, threshold: f32) {
        self.order(usize::MAX);
        self.softmax(1.0);
        let above = self.list.iter().take_while(|c| c.p >= threshold).count();
        if above > 1 {
            self.list.drain(..above - 1);
            self.ordered = self.list.len();
        }
    }

    /// Keeps the `n` best.
    pub fn top_k(&mut self, n: usize) {
        self.order(n);
        self.keep(n);
    }

    /// Keeps the `n` first.
    fn keep(&mut self, n: usize) {
        self.list.truncate(n);
        self.ordered = self.ordered.min(self.list.len());
    }

    fn retain(&mut self, wanted: impl Fn(&Candidate) -> bool) {
        let dropped = self.list[..self.ordered].iter().filter(|c| !wanted(c)).count();
        self.list.retain(|c| wanted(c));
        self.ordered -= dropped;
    }

    /// The token at `at` in [0, 1) of the probabilities laid end to end.
    pub fn pick(&self, at: f64) -> Option<Candidate> {
        let mut left = at * self.total;
        for block in self.list.chunks(256) {
            let sum: f32 = block.iter().map(|c| c.p).sum();
            if left >= f64::from(sum) {
                left -= f64::from(sum);
                continue;
            }
            let found = block.iter().find(|c| {
                left -= f64::from(c.p);
                left < 0.0
            });
            return found.or_else(|| block.iter().rfind(|c| c.p > 0.0)).copied();
        }
        // Rounding may leave nothing at the very end.
        self.list.iter().rfind(|c| c.p > 0.0).copied()
    }
}

/// The last of the first candidates in `order` whose probabilities together are `sufficient`; `None` when all together are not.
/// Shuffles the list.
fn last_needed(
    list: &mut [Candidate],
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
    sufficient: impl Fn(f64) -> bool,
) -> Option<Candidate> {
    const SMALL: usize = 64;
    let mut sum = 0.0;
    let mut rest = list;
    // Halves what is in question: either its first half suffices, or all of that is needed.
    while rest.len() > SMALL {
        let half = rest.len() / 2;
        rest.select_nth_unstable_by(half - 1, &order);
        let (first, second) = rest.split_at_mut(half);
        let with = sum + first.iter().map(|c| f64::from(c.p)).sum::<f64>();
        if sufficient(with) {
            rest = first;
        } else {
            sum = with;
            rest = second;
        }
    }
    rest.sort_unstable_by(&order);
    rest.iter().copied().find(|c| {
        sum += f64::from(c.p);
        sufficient(sum)
    })
}

/// Logits at least this large are within `n` standard deviations of the largest (top-n-sigma, arXiv 2411.07641).
pub(super) fn sigma_floor(logits: &[f32], top: f32, n: f32) -> f32 {
    if n <= 0.0 {
        return f32::NEG_INFINITY;
    }
    let (_, deviation) = math::moments(logits);
    top - (f64::from(n) * deviation) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn logits(n: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f32>> {
        let logit = prop_oneof![
            8 => -12f32..12.0,
            2 => (-4i8..4).prop_map(f32::from),
            1 => Just(f32::NEG_INFINITY)
        ];
        proptest::collection::vec(logit, n)
    }

    /// All tokens, best first, with f64 probabilities.
    fn sorted(logits: &[f32]) -> Vec<(u32, f32, f64)> {
        let mut all: Vec<(u32, f32, f64)> = (0..).zip(logits).map(|(id, x)| (id, *x, 0.0)).collect();
        all.retain(|(_, x, _)| *x > f32::NEG_INFINITY);
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        normalize(&mut all);
        all
    }

    fn normalize(list: &mut [(u32, f32, f64)]) {
        let Some(top) = list.iter().map(|c| c.1).max_by(f32::total_cmp) else { return };
        let sum: f64 = list.iter().map(|c| f64::from(c.1 - top).exp()).sum();
        list.iter_mut().for_each(|c| c.2 = f64::from(c.1 - top).exp() / sum);
    }

    fn taken(logits: &[f32], k: usize) -> Candidates {
        let mut c = Candidates::default();
        c.take(logits, k, f32::NEG_INFINITY);
        c
    }

    fn ids(c: &Candidates) -> Vec<u32> {
        c.as_slice().iter().map(|c| c.id).collect()
    }

    fn set(ids: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let mut ids: Vec<u32> = ids.into_iter().collect();
        ids.sort_unstable();
        ids
    }

    proptest! {
        #[test]
        fn take_equals_a_full_sort(logits in logits(0..700), k in 0usize..100, floor in prop_oneof![
            Just(f32::NEG_INFINITY), -3f32..3.0, (-4i8..4).prop_map(f32::from)]) {
            let mut c = Candidates::default();
            c.take(&logits, k, floor);
            let mut naive: Vec<u32> = sorted(&logits).iter().filter(|c| c.1 >= floor).map(|c| c.0).collect();
            if k == 0 { naive.sort_unstable() } else { naive.truncate(k) }
            prop_assert_eq!(ids(&c), naive);
        }

        #[test]
        fn top_p_keeps_the_shortest_sufficient_prefix(logits in logits(1..700), k in prop_oneof![Just(0usize), 1usize..100], p in 0f32..1.0) {
            let mut c = taken(&logits, k);
            prop_assume!(!c.list.is_empty());
            c.top_p(p);
            let mut naive = sorted(&logits);
            naive.truncate(if k == 0 { usize::MAX } else { k });
            normalize(&mut naive);
            let kept = c.list.len();
            let sum: f64 = naive[..kept].iter().map(|c| c.2).sum();
            let naive_ids: Vec<u32> = naive[..kept].iter().map(|c| c.0).collect();
            prop_assert_eq!(ids(&c), if k == 0 { set(naive_ids) } else { naive_ids });
            prop_assert!(sum >= f64::from(p) - 1e-5 || kept == naive.len(), "{sum} of {p} in {kept}");
            prop_assert!(kept == 1 || sum - naive[kept - 1].2 < f64::from(p) + 1e-5);
        }

        #[test]
        fn min_p_keeps_what_is_probable_enough(logits in logits(1..300), k in prop_oneof![Just(0usize), 1usize..100], p in 0.001f32..1.0) {
            let mut c = taken(&logits, k);
            prop_assume!(!c.list.is_empty());
            c.min_p(p);
            let naive = sorted(&logits);
            let near = |c: &&(u32, f32, f64)| (c.2 / naive[0].2 / f64::from(p) - 1.0).abs() < 1e-5;
            prop_assume!(!naive.iter().any(|c| near(&c)));
            let kept = naive.iter().take(if k == 0 { usize::MAX } else { k }).filter(|c| c.2 >= naive[0].2 * f64::from(p));
            prop_assert_eq!(set(ids(&c)), set(kept.map(|c| c.0)));
            prop_assert!(c.as_slice()[..c.ordered].is_sorted_by(|a, b| best_first(a, b).is_le()));
        }

        #[test]
        fn typical_keeps_the_least_surprising_surprises(logits in logits(1..300), p in 0.01f32..0.99) {
            let mut c = taken(&logits, 0);
            prop_assume!(!c.list.is_empty());
            c.typical(p);
            let mut naive = sorted(&logits);
            let entropy: f64 = naive.iter().map(|c| -c.2 * c.2.ln()).sum();
            naive.sort_by(|a, b| (a.2.ln() + entropy).abs().total_cmp(&(b.2.ln() + entropy).abs()));
            let kept = c.list.len();
            let far = |i: usize| (naive[i].2.ln() + entropy).abs();
            // A cut between tokens that are equally typical is a matter of rounding.
            prop_assume!(kept == naive.len() || (far(kept) - far(kept - 1)).abs() > 1e-4);
            let sum: f64 = naive[..kept].iter().map(|c| c.2).sum();
            prop_assert_eq!(set(ids(&c)), set(naive[..kept].iter().map(|c| c.0)));
            prop_assert!(sum > f64::from(p) - 1e-5 || kept == naive.len());
            prop_assert!(kept == 1 || sum - naive[kept - 1].2 < f64::from(p) + 1e-5);
        }

        #[test]
        fn xtc_leaves_the_last_of_the_probable(logits in logits(1..40), threshold in 0.01f32..0.6) {
            let mut c = taken(&logits, 0);
            prop_assume!(!c.list.is_empty());
            c.xtc(threshold);
            let naive = sorted(&logits);
            prop_assume!(!naive.iter().any(|c| (c.2 - f64::from(threshold)).abs() < 1e-6));
            let above = naive.iter().filter(|c| c.2 >= f64::from(threshold)).count();
            prop_assert_eq!(ids(&c), naive[above.max(1) - 1..].iter().map(|c| c.0).collect::<Vec<_>>());
        }

        #[test]
        fn sigma_equals_the_definition(logits in logits(2..3000), n in 0.1f32..4.0) {
            let naive = sorted(&logits);
            prop_assume!(naive.len() > 1);
            let mean = naive.iter().map(|c| f64::from(c.1)).sum::<f64>() / naive.len() as f64;
            let var = naive.iter().map(|c| (f64::from(c.1) - mean).powi(2)).sum::<f64>() / naive.len() as f64;
            let floor = f64::from(naive[0].1) - f64::from(n) * var.sqrt();
            prop_assert!((f64::from(sigma_floor(&logits, naive[0].1, n)) - floor).abs() < 1e-3);
        }
    }

    #[test]
    fn picks_follow_the_probabilities() {
        let mut c = taken(&[0.0, f32::NEG_INFINITY, 2f32.ln(), 5f32.ln()], 0);
        c.softmax(1.0);
        for (at, id) in [(0.0, 0), (0.124, 0), (0.126, 2), (0.374, 2), (0.376, 3), (0.999_999, 3), (1.0, 3)] {
            assert_eq!(c.pick(at).unwrap().id, id, "{at}");
        }
        assert_eq!(Candidates::default().pick(0.5), None);
        // A temperature near 0 leaves the best alone, a high one evens out.
        c.softmax(1e-30);
        assert_eq!(c.pick(0.0).unwrap().id, 3);
        c.softmax(100.0);
        assert!(c.as_slice().iter().all(|c| (c.p - 1.0 / 3.0).abs() < 0.01));
    }
}

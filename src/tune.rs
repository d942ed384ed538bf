//! Types for a size: how much each group of tensors suffers from each type is measured, then bytes go where they help most.
//!
//! One group at a time is quantized, everything else stays as it is, and the divergence from the unquantized model is measured on a text.
//! Divergences of several groups add up nearly, as long as they are small; so the choice is a knapsack, solved greedily along the lower
//! convex hull of each group's (bytes, divergence).
use crate::engine::Engine;
use crate::error::Result;
use crate::eval::divergence::Divergence;
use crate::eval::perplexity::run_window;
use crate::eval::{Mean, log_sum_exp};
use crate::model::{Model, Weight};

/// Tensors that get their type together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// For people: `self attn_q k`.
    pub name: String,
    /// Names of the tensors.
    pub tensors: Vec<String>,
}

/// A type for a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The type's name, or the names where rows made some tensors fall back.
    pub name: String,
    /// Bytes of the group.
    pub bytes: u64,
    /// Mean divergence in nats when only this group has the type.
    pub kl: f64,
    /// Its standard error.
    pub error: f64,
}

/// The groups of a model: by role, and by decoder (of a Transformer, by half). Every matrix is in one of them.
#[must_use]
pub fn groups(model: &Model) -> Vec<Group> {
    let (c, w) = (&model.config, &model.weights);
    let middle = if c.is_yoco() { c.n_self } else { c.n_layer.div_ceil(2) };
    let bands = if c.is_yoco() { ["self", "cross"] } else { ["first half", "second half"] };
    let mut groups: Vec<Group> = vec![];
    let mut add = |name: String, weight: &Weight| match groups.iter_mut().find(|g| g.name == name) {
        Some(group) => group.tensors.push(weight.name.clone()),
        None => groups.push(Group { name, tensors: vec![weight.name.clone()] }),
    };
    add("token_embd".into(), &w.token_embd);
    if w.output.name != w.token_embd.name {
        add("output".into(), &w.output);
    }
    for (i, layer) in w.layers.iter().enumerate() {
        let band = bands[usize::from(i >= middle)];
        add(format!("{band} attn_q k"), &layer.q);
        if let Some((k, v)) = &layer.kv {
            add(format!("{band} attn_q k"), k);
            add(format!("{band} attn_v"), v);
        }
        add(format!("{band} attn_output"), &layer.o);
        add(format!("{band} ffn_gate up"), &layer.ffn.gate);
        add(format!("{band} ffn_gate up"), &layer.ffn.up);
        add(format!("{band} ffn_down"), &layer.ffn.down);
    }
    if let Some(shared) = &w.shared {
        add("shared_kv".into(), &shared.k);
        add("shared_kv".into(), &shared.v);
        if let Some((q, k)) = &shared.indexer {
            add("indexer".into(), q);
            add("indexer".into(), k);
        }
    }
    groups
}

/// The candidates of a group from which none is both smaller and better than a mix of two others, smallest first: their indices.
fn hull(candidates: &[Candidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let (bytes, kl) = (|i: usize| candidates[i].bytes as f64, |i: usize| candidates[i].kl);
    order.sort_by(|&a, &b| bytes(a).total_cmp(&bytes(b)).then(kl(a).total_cmp(&kl(b))).then(a.cmp(&b)));
    let gain = |a: usize, b: usize| (kl(a) - kl(b)) / (bytes(b) - bytes(a));
    let mut kept: Vec<usize> = vec![];
    for i in order {
        if kept.last().is_some_and(|&l| bytes(i) <= bytes(l) || kl(i) >= kl(l)) {
            continue;
        }
        while let [.., a, b] = kept[..]
            && gain(a, b) <= gain(b, i)
        {
            kept.pop();
        }
        kept.push(i);
    }
    kept
}

/// Chooses a candidate for each group so that all take at most `budget` bytes: from the smallest on, always the step that takes away the
/// most divergence per byte and still fits. `None` when the smallest do not fit. Equal steps: the first group's.
#[must_use]
pub fn choose(groups: &[Vec<Candidate>], budget: u64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = groups.iter().map(|g| hull(g)).collect();
    let mut at = vec![0; groups.len()];
    let chosen = |at: &[usize]| -> Vec<usize> { hulls.iter().zip(at).map(|(h, &i)| h[i]).collect() };
    let mut total: u64 = chosen(&at).iter().zip(groups).map(|(&i, g)| g[i].bytes).sum();
    if total > budget {
        return None;
    }
    loop {
        let steps = hulls.iter().enumerate().filter_map(|(g, hull)| {
            let (from, to) = (&groups[g][hull[at[g]]], &groups[g][*hull.get(at[g] + 1)?]);
            let more = to.bytes - from.bytes;
            (total + more <= budget).then(|| (g, more, (from.kl - to.kl) / more as f64))
        });
        let best = steps.reduce(|a, b| if b.2 > a.2 { b } else { a });
        let Some((g, more, _)) = best else { return Some(chosen(&at)) };
        at[g] += 1;
        total += more;
    }
}

/// The unquantized model's predictions, in memory: `4 * vocab` bytes for each scored position.
pub struct Reference {
    windows: Vec<Vec<u32>>,
    /// Log probabilities, `[scored][vocab]`.
    log_probabilities: Vec<f32>,
}

impl Reference {
    /// Runs `windows`; the second half of each is scored.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn new(engine: &mut Engine, windows: &[&[u32]], mut progress: impl FnMut(usize)) -> Result<Self> {
        let mut log_probabilities = vec![];
        for window in windows {
            run_window(engine, window, window.len() / 2, |_, logits| {
                let norm = log_sum_exp(logits) as f32;
                log_probabilities.extend(logits.iter().map(|l| l - norm));
                Ok(())
            })?;
            progress(window.len());
        }
        Ok(Self { windows: windows.iter().map(|w| w.to_vec()).collect(), log_probabilities })
    }

    /// Mean divergence of another model from this one.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn divergence(&self, engine: &mut Engine, mut progress: impl FnMut(usize)) -> Result<Mean> {
        let vocab = engine.model().config.vocab;
        let mut mean = Mean::default();
        let mut base = self.log_probabilities.chunks_exact(vocab);
        for window in &self.windows {
            run_window(engine, window, window.len() / 2, |p, logits| {
                if let Some(base) = base.next() {
                    mean.push(Divergence::compare(base, logits, window[p + 1]).kl);
                }
                Ok(())
            })?;
            progress(window.len());
        }
        Ok(mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(bytes: u64, kl: f64) -> Candidate {
        Candidate { name: String::new(), bytes, kl, error: 0.0 }
    }

    #[test]
    fn bytes_go_where_they_help_most() {
        let a = vec![candidate(10, 1.0), candidate(20, 0.1), candidate(40, 0.0)];
        // Its middle candidate lies above the line between the others; one is worse than a smaller one.
        let b = vec![candidate(10, 0.4), candidate(15, 0.39), candidate(20, 0.2), candidate(12, 0.5)];
        let groups = [a, b];
        assert_eq!(choose(&groups, 19), None);
        assert_eq!(choose(&groups, 20), Some(vec![0, 0]));
        assert_eq!(choose(&groups, 30), Some(vec![1, 0]));
        assert_eq!(choose(&groups, 40), Some(vec![1, 2]));
        assert_eq!(choose(&groups, 59), Some(vec![1, 2]));
        assert_eq!(choose(&groups, 60), Some(vec![2, 2]));
    }

    proptest! {
        #[test]
        fn a_choice_fits_and_more_room_is_never_worse(
            groups in prop::collection::vec(prop::collection::vec((1u64..100, 0.0..1.0f64), 1..6), 1..6),
            budget in 1u64..600,
        ) {
            let groups: Vec<Vec<Candidate>> =
                groups.iter().map(|g| g.iter().map(|&(b, k)| candidate(b, k)).collect()).collect();
            let sum = |choice: &[usize]| {
                let picked = groups.iter().zip(choice).map(|(g, &i)| &g[i]);
                picked.fold((0, 0.0), |(b, k), c| (b + c.bytes, k + c.kl))
            };
            let smallest: u64 = groups.iter().map(|g| g.iter().map(|c| c.bytes).min().unwrap()).sum();
            match choose(&groups, budget) {
                None => prop_assert!(smallest > budget),
                Some(choice) => {
                    prop_assert!(sum(&choice).0 <= budget);
                    let all = choose(&groups, u64::MAX).unwrap();
                    prop_assert!(sum(&all).1 <= sum(&choice).1 + 1e-12);
                }
            }
        }
    }
}

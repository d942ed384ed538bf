//! How far one model's predictions are from another's: Kullback-Leibler divergence, agreement, change of probability.
use serde::{Deserialize, Serialize};

use super::{Mean, argmax, exp, log_sum_exp};

/// Divergence over many positions.
#[derive(Clone, Debug, Default)]
pub struct Divergence {
    kl: Vec<f64>,
    mean: Mean,
    same_top: Mean,
    changes: Vec<f64>,
    change: Mean,
    squared_change: Mean,
    loss: Mean,
}

/// One position's part of a [`Divergence`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// KL(base || this), in nats.
    pub kl: f64,
    /// Whether both prefer the same token.
    pub same_top: bool,
    /// Change of the probability of the token that came.
    pub probability_change: f64,
    /// Its cross-entropy, this minus base.
    pub loss_change: f64,
}

/// What is printed of a [`Divergence`].
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Positions compared.
    pub tokens: u64,
    /// Mean of KL(base || this), in nats.
    pub kl_mean: f64,
    /// Its standard error.
    pub kl_error: f64,
    /// KL at these shares of the positions.
    pub kl_median: f64,
    /// 1 % of positions have at most this.
    pub kl_01: f64,
    /// 10 % of positions have at most this.
    pub kl_10: f64,
    /// 90 % of positions have at most this.
    pub kl_90: f64,
    /// 95 % of positions have at most this.
    pub kl_95: f64,
    /// 99 % of positions have at most this.
    pub kl_99: f64,
    /// 99.9 % of positions have at most this.
    pub kl_999: f64,
    /// The largest.
    pub kl_max: f64,
    /// Share of positions where both prefer the same token.
    pub same_top: f64,
    /// Its standard error.
    pub same_top_error: f64,
    /// Mean change of the probability of the token that came.
    pub probability_change: f64,
    /// Its standard error.
    pub probability_change_error: f64,
    /// Its root mean square.
    pub probability_change_rms: f64,
    /// Change of the probability at these shares of the positions.
    pub probability_change_01: f64,
    /// 10 % of positions have at most this.
    pub probability_change_10: f64,
    /// Half of the positions have at most this.
    pub probability_change_median: f64,
    /// 90 % of positions have at most this.
    pub probability_change_90: f64,
    /// 99 % of positions have at most this.
    pub probability_change_99: f64,
    /// Mean difference of the cross-entropies, this minus base.
    pub loss_change: f64,
    /// Its standard error (paired).
    pub loss_change_error: f64,
}

impl Divergence {
    /// Compares one position: log probabilities of the base, logits of this model, and the token that came.
    pub fn push(&mut self, base: &[f32], logits: &[f32], next: u32) -> Position {
        let position = Self::compare(base, logits, next);
        self.add(position);
        position
    }

    /// What [`Self::push`] takes in.
    #[must_use]
    pub fn compare(base: &[f32], logits: &[f32], next: u32) -> Position {
        let norm = log_sum_exp(logits);
        let term = |b: f32, l: f32| f64::from(exp(b)) * (f64::from(b) - (f64::from(l) - norm));
        let ((bases, b_rest), (these, l_rest)) = (base.as_chunks::<16>(), logits.as_chunks::<16>());
        // In lanes, so that it runs on vectors.
        let mut sums = [0.0; 16];
        for (bases, these) in bases.iter().zip(these) {
            (0..16).for_each(|i| sums[i] += term(bases[i], these[i]));
        }
        let rest: f64 = b_rest.iter().zip(l_rest).map(|(&b, &l)| term(b, l)).sum();
        let kl = sums.iter().sum::<f64>() + rest;
        let next = next as usize;
        let (base_next, this_next) = (f64::from(base[next]), f64::from(logits[next]) - norm);
        Position {
            // Rounding may leave a divergence a hair below zero.
            kl: kl.max(0.0),
            same_top: argmax(base) == argmax(logits),
            probability_change: this_next.exp() - base_next.exp(),
            loss_change: base_next - this_next,
        }
    }

    /// Takes in a position that was compared before.
    pub fn add(&mut self, p: Position) {
        self.kl.push(p.kl);
        self.mean.push(p.kl);
        self.same_top.push(f64::from(u8::from(p.same_top)));
        self.changes.push(p.probability_change);
        self.change.push(p.probability_change);
        self.squared_change.push(p.probability_change * p.probability_change);
        self.loss.push(p.loss_change);
    }

    /// For printing.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let sorted = |values: &[f64]| {
            let mut values = values.to_vec();
            values.sort_by(f64::total_cmp);
            move |share: f64| {
                let i = ((values.len() as f64 - 1.0) * share).round() as usize;
                values.get(i).copied().unwrap_or(f64::NAN)
            }
        };
        let (at, change_at) = (sorted(&self.kl), sorted(&self.changes));
        Summary {
            tokens: self.mean.count(),
            kl_mean: self.mean.mean(),
            kl_error: self.mean.error(),
            kl_median: at(0.5),
            kl_01: at(0.01),
            kl_10: at(0.1),
            kl_90: at(0.9),
            kl_95: at(0.95),
            kl_99: at(0.99),
            kl_999: at(0.999),
            kl_max: at(1.0),
            same_top: self.same_top.mean(),
            same_top_error: self.same_top.error(),
            probability_change: self.change.mean(),
            probability_change_error: self.change.error(),
            probability_change_rms: self.squared_change.mean().sqrt(),
            probability_change_01: change_at(0.01),
            probability_change_10: change_at(0.1),
            probability_change_median: change_at(0.5),
            probability_change_90: change_at(0.9),
            probability_change_99: change_at(0.99),
            loss_change: self.loss.mean(),
            loss_change_error: self.loss.error(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_models_do_not_diverge() {
        let logits = [0.5f32, -1.0, 2.0];
        let norm = log_sum_exp(&logits) as f32;
        let mut d = Divergence::default();
        d.push(&logits.map(|l| l - norm), &logits.map(|l| l + 7.0), 1);
        let s = d.summary();
        assert!(s.kl_mean < 1e-7 && s.same_top == 1.0 && s.probability_change.abs() < 1e-7, "{s:?}");
    }

    #[test]
    fn divergence_is_the_sum_over_tokens() {
        // Two tokens among many that are next to impossible: whole lanes and a rest.
        let mut base = vec![-60.0; 35];
        (base[3], base[33]) = (0.75f32.ln(), 0.25f32.ln());
        let mut logits = vec![-70.0; 35];
        (logits[3], logits[33]) = (0.0, 0.0);
        let mut d = Divergence::default();
        d.push(&base, &logits, 3);
        let expected = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        let s = d.summary();
        assert!((s.kl_mean - expected).abs() < 1e-7, "{s:?}");
        assert!((s.probability_change + 0.25).abs() < 1e-7 && s.same_top == 1.0, "{s:?}");
    }
}

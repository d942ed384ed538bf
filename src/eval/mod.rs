//! Measures of what quantization, sparsity and length cost.
pub mod base;
pub mod consistency;
pub mod coverage;
pub mod divergence;
pub mod perplexity;
pub mod plot;
pub mod ruler;
pub mod state;

use serde::{Deserialize, Serialize};

/// Mean of independent values, and the standard error of that mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    n: u64,
    sum: f64,
    squares: f64,
}

impl Mean {
    /// Takes one more value.
    pub fn push(&mut self, value: f64) {
        self.n += 1;
        self.sum += value;
        self.squares += value * value;
    }

    /// Takes the values of another.
    pub fn merge(&mut self, other: &Self) {
        self.n += other.n;
        self.sum += other.sum;
        self.squares += other.squares;
    }

    /// The mean; `None` without any values.
    #[must_use]
    pub fn get(&self) -> Option<f64> {
        (self.n > 0).then(|| self.mean())
    }

    /// Number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.n
    }

    /// Their mean; NaN without any.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.sum / self.n as f64
    }

    /// The standard error of the mean; 0 with fewer than two values.
    #[must_use]
    pub fn error(&self) -> f64 {
        if self.n < 2 {
            return 0.0;
        }
        let n = self.n as f64;
        let variance = (self.squares - self.sum * self.sum / n).max(0.0) / (n - 1.0);
        (variance / n).sqrt()
    }
}

/// Natural logarithm of the softmax of `logits`, in f64 sums: `logits[i] - log_sum_exp(logits)` is token i's log probability.
#[must_use]
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return f64::from(max);
    }
    f64::from(max) + logits.iter().map(|&l| f64::from((l - max).exp())).sum::<f64>().ln()
}

/// The most likely token; the lowest of equals.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_its_error() {
        let mut m = Mean::default();
        [1.0, 2.0, 3.0, 4.0].into_iter().for_each(|v| m.push(v));
        assert_eq!(m.mean(), 2.5);
        // Sample deviation 1.2910, over the square root of 4.
        assert!((m.error() - 1.290_994_448_735_805_6 / 2.0).abs() < 1e-12);
    }

    #[test]
    fn log_sum_exp_is_stable() {
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2f64.ln())).abs() < 1e-9);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY, 3.0]), 3.0);
    }
}

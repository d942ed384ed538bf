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

/// `log_sum_exp(logits)`, in f64 sums: `logits[i] - log_sum_exp(logits)` is token i's log probability.
#[must_use]
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return f64::from(max);
    }
    f64::from(max) + lanes(logits, |l| f64::from(exp(l - max))).ln()
}

/// Sum of `of` over `values`, added up in lanes so that it runs on vectors.
fn lanes<T: Copy>(values: &[T], of: impl Fn(T) -> f64) -> f64 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut sums = [0.0; 16];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, &v)| *sum += of(v));
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&v| of(v)).sum::<f64>()
}

/// e^x for x up to 80, within 2e-7 of itself, without a branch or a call; e^-87 below -87. A vocabulary's worth of these is most of what
/// an evaluation does outside the model.
fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: a number beside it is rounded to a whole one, which is in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; multiples of the first are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// 1/7!, 1/6!, ... 1/0!
    const TAYLOR: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    // Not f32::max, which would hide a NaN.
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    let power_of_2 = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    TAYLOR.into_iter().fold(0.0, |sum, c| sum * r + c) * power_of_2
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
    fn exp_is_near() {
        for i in 0..=100_000 {
            let x = -87.0 + i as f32 * (167.0 / 100_000.0);
            let error = f64::from(exp(x)) / f64::from(x).exp() - 1.0;
            assert!(error.abs() < 2e-7, "{x}: {error:.1e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), exp(-87.0));
        assert!(exp(f32::NAN).is_nan());
        assert!(log_sum_exp(&[1.0, f32::NAN]).is_nan(), "a broken model has no loss");
    }

    #[test]
    fn log_sum_exp_is_that_of_f64() {
        let logits: Vec<f32> = (0..1003).map(|i| ((i * i) % 977) as f32 / 40.0 - 20.0).collect();
        let direct = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
        assert!((log_sum_exp(&logits) - direct).abs() < 2e-7);
    }

    #[test]
    fn log_sum_exp_is_stable() {
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2f64.ln())).abs() < 1e-9);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY, 3.0]), 3.0);
    }
}

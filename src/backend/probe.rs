//! Sums of squares of what enters the matrix products, per column: what an importance matrix is made of.
//!
//! A backend without a probe does nothing for it. With one, the CPU backend puts a node before each product; pieces share the columns,
//! so that the sums do not depend on the number of threads.
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::Weight;

/// Watches every product of a backend.
#[derive(Debug, Default)]
pub struct Probe {
    inputs: Mutex<HashMap<Vec<String>, Arc<Input>>>,
}

/// What enters the products of one or several weights.
#[derive(Debug)]
pub struct Input {
    n_in: usize,
    seen: Mutex<Seen>,
}

/// Sums since the last [`Probe::drain`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// Sum of squares of each column.
    pub sums: Vec<f64>,
    /// Rows.
    pub rows: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Probe {
    /// Where to add what enters the products of `weights`, which all take the same rows.
    pub(super) fn input(&self, weights: &[&Weight]) -> Arc<Input> {
        let names = weights.iter().map(|w| w.name.clone()).collect();
        let n_in = weights.first().map_or(0, |w| w.n_in);
        let seen = Mutex::new(Seen { sums: vec![0.0; n_in], rows: 0 });
        Arc::clone(lock(&self.inputs).entry(names).or_insert_with(|| Arc::new(Input { n_in, seen })))
    }

    /// What was seen since the last call, by the name of the weight.
    pub fn drain(&self) -> HashMap<String, Seen> {
        let mut all = HashMap::<String, Seen>::new();
        for (names, input) in lock(&self.inputs).iter() {
            let empty = Seen { sums: vec![0.0; input.n_in], rows: 0 };
            let seen = std::mem::replace(&mut *lock(&input.seen), empty);
            for name in names {
                let sum = all.entry(name.clone()).or_default();
                sum.sums.resize(input.n_in, 0.0);
                sum.sums.iter_mut().zip(&seen.sums).for_each(|(to, from)| *to += from);
                sum.rows += seen.rows;
            }
        }
        all
    }
}

impl Input {
    /// Adds piece `ith` of `nth` of the columns of `x`, `[rows][n_in]`, after `RMS(x; weights)` where `norm` has weights and epsilon.
    pub(super) fn add(&self, x: &[f32], norm: Option<(&[f32], f32)>, ith: usize, nth: usize) {
        let columns = self.n_in * ith / nth..self.n_in * (ith + 1) / nth;
        let mut sums = vec![0f64; columns.len()];
        for row in x.chunks_exact(self.n_in) {
            match norm {
                None => squares(&mut sums, &row[columns.clone()], |_| 1.0),
                Some((weights, eps)) => {
                    let mean =
                        row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / row.len() as f64;
                    let scale = ((mean + f64::from(eps)).sqrt().recip()) as f32;
                    let weights = &weights[columns.clone()];
                    squares(&mut sums, &row[columns.clone()], |i| scale * weights[i]);
                }
            }
        }
        self.add_sums(columns, &sums, if ith == 0 { x.len() / self.n_in } else { 0 });
    }

    fn add_sums(&self, columns: Range<usize>, sums: &[f64], rows: usize) {
        let mut seen = lock(&self.seen);
        seen.sums[columns].iter_mut().zip(sums).for_each(|(to, from)| *to += from);
        seen.rows += rows as u64;
    }
}

fn squares(sums: &mut [f64], row: &[f32], factor: impl Fn(usize) -> f32) {
    for (i, (sum, &v)) in sums.iter_mut().zip(row).enumerate() {
        let v = f64::from(v * factor(i));
        *sum += v * v;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ggml_kernels::quant::Type;

    fn weight(name: &str) -> Weight {
        Weight { name: name.into(), ty: Type::F32, n_in: 3, n_out: 1, offset: 0, bytes: 12 }
    }

    #[test]
    fn columns_are_summed_whatever_the_pieces() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        for pieces in 1..=5 {
            let probe = Probe::default();
            let (a, b) = (weight("a"), weight("b"));
            let input = probe.input(&[&a, &b]);
            (0..pieces).for_each(|i| input.add(&x, None, i, pieces));
            let seen = probe.drain();
            for name in ["a", "b"] {
                assert_eq!(seen[name], Seen { sums: vec![17.0, 29.0, 45.0], rows: 2 }, "{pieces} pieces");
            }
            assert_eq!(probe.drain()["a"].rows, 0);
        }
    }

    #[test]
    fn the_norm_comes_first() {
        let probe = Probe::default();
        let input = probe.input(&[&weight("a")]);
        // Mean of squares 3: RMS is 1/sqrt(3) per unit.
        input.add(&[1.0, 2.0, 2.0], Some((&[1.0, 1.0, 0.5], 0.0)), 0, 1);
        let seen = probe.drain().remove("a").unwrap();
        for (got, want) in seen.sums.iter().zip([1.0 / 3.0, 4.0 / 3.0, 1.0 / 3.0]) {
            assert!((got - want).abs() < 1e-6, "{seen:?}");
        }
    }
}

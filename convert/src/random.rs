//! Random weights at the speed of copying: rows are drawn from a pool of blocks that ggml has quantized once.
use std::f64::consts::TAU;

use ggml_kernels::quant::{self, Type};

/// Runs of values in a pool; a power of two.
const RUNS: usize = 1024;
/// The longest run.
const RUN: usize = 256;

/// SplitMix64: small, fast, and any seed is a good one.
#[derive(Clone, Debug)]
pub(crate) struct SplitMix(u64);

impl SplitMix {
    /// The stream number `stream` of `seed`.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut start = Self(seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95));
        Self(start.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Two normal values of deviation 1 (Box and Muller).
    fn normals(&mut self) -> [f64; 2] {
        let (radius, angle) = ((-2.0 * self.unit().ln()).sqrt(), TAU * self.unit());
        [radius * angle.cos(), radius * angle.sin()]
    }
}

/// Quantized runs of normal values, all of one type and deviation.
#[derive(Debug)]
pub(crate) struct Pool {
    run_bytes: usize,
    bytes: Vec<u8>,
}

impl Pool {
    /// Runs that rows of `row_len` values of `ty` can be put together from. Rows must be whole blocks.
    pub(crate) fn new(ty: Type, row_len: usize, deviation: f32) -> Self {
        let run = Self::run_len(row_len).max(ty.block_len());
        let mut random = SplitMix::new(0, u64::from(ty.to_ggml()));
        let values: Vec<f32> = std::iter::repeat_with(|| random.normals())
            .flatten()
            .map(|v| (v * f64::from(deviation)) as f32)
            .take(RUNS * run)
            .collect();
        let run_bytes = run / ty.block_len() * ty.block_bytes();
        let mut bytes = vec![0; RUNS * run_bytes];
        quant::quantize(ty, &values, run, None, &mut bytes);
        Self { run_bytes, bytes }
    }

    /// The longest run that rows of `row_len` values are whole numbers of: a power of two.
    pub(crate) fn run_len(row_len: usize) -> usize {
        RUN.min(1 << row_len.trailing_zeros().min(RUN.trailing_zeros()))
    }

    /// Fills row `row` of the tensor with this seed: the same bytes whoever asks, in whatever order.
    pub(crate) fn fill(&self, seed: u64, row: usize, out: &mut [u8]) {
        let mut random = SplitMix::new(seed, row as u64);
        // The first run goes round, so that rows of a single run differ from their neighbours too.
        let mut at = (seed as usize).wrapping_add(row) % RUNS;
        for run in out.chunks_exact_mut(self.run_bytes) {
            run.copy_from_slice(&self.bytes[at * self.run_bytes..][..self.run_bytes]);
            at = random.next() as usize % RUNS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_deviation_and_differ() {
        for ty in [Type::F32, Type::Q8_0, Type::Q4_K, Type::Q6_K, Type::IQ4_XS] {
            let pool = Pool::new(ty, 2560, 0.02);
            let mut row = vec![0; ty.row_bytes(2560).unwrap()];
            let (mut sum, mut square, mut first) = (0.0, 0.0, Vec::new());
            for r in 0..64 {
                pool.fill(7, r, &mut row);
                let mut values = vec![0f32; 2560];
                quant::dequantize(ty, &row, &mut values);
                sum += values.iter().map(|&v| f64::from(v)).sum::<f64>();
                square += values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
                assert_ne!(first, row);
                first.clone_from(&row);
            }
            let n = 64.0 * 2560.0;
            let (mean, deviation) = (sum / n, (square / n).sqrt());
            assert!(mean.abs() < 3e-4, "{ty}: mean {mean}");
            assert!((deviation / 0.02 - 1.0).abs() < 0.02, "{ty}: deviation {deviation}");
        }
    }

    #[test]
    fn runs_divide_rows() {
        assert_eq!(Pool::run_len(2560), 256);
        assert_eq!(Pool::run_len(576), 64);
        assert_eq!(Pool::run_len(577), 1);
        assert_eq!(Pool::run_len(1 << 20), 256);
    }
}

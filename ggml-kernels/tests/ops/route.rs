use crate::fixture::*;
use ggml_kernels::contracts::*;
use ggml_kernels::ops::{Op, Ops};
use proptest::prelude::{ProptestConfig, proptest};

/// What the index keys look like.
#[derive(Clone, Copy, PartialEq)]
enum Keys {
    Random,
    /// Small integers: every score is exact in any order of summation, and equal scores come by the dozen.
    Ties,
    /// Ties, with infinities and NaN among them.
    Wild,
}

struct Case {
    batch: Batch,
    keys: Pool,
    q: Vec<f32>,
    d: usize,
    k: usize,
    block: usize,
    n_columns: usize,
}

impl Case {
    fn new(seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let kind = rng.pick(&[Keys::Random, Keys::Ties, Keys::Wild]);
        let cache_type = rng.pick(&TYPES);
        let d = rng.pick(if cache_type == CLSA_Q8_0 { &[32, 64, 96, 128] } else { &[16, 32, 80, 128] });
        let sequences: Vec<(usize, usize)> = (0..rng.pick(&[1, 1, 2, 3]))
            .map(|_| (rng.pick(&[0, 3, 250, 1000, 6000]) + rng.below(70), rng.pick(&[1, 1, 2, 5, 21])))
            .collect();
        let batch = Batch::new(rng, &sequences);
        let mut keys = Pool::new(rng, cache_type, d, 0, batch.n_pages());
        let mut row = 0;
        for &(first, n) in &sequences {
            let slot = batch.slot[row] as usize;
            for pos in 0..first + n {
                let mut key = match kind {
                    Keys::Random => rng.normals(d),
                    _ => (0..d).map(|_| rng.pick(&[0.0, 0.0, 0.0, 0.0, -0.0, 0.0, 1.0, -1.0])).collect(),
                };
                if kind == Keys::Wild && cache_type != CLSA_Q8_0 && rng.below(4) == 0 {
                    key[rng.below(d)] = rng.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
                }
                keys.write(&batch, slot, pos, &key);
            }
            row += n;
        }
        let q = match kind {
            Keys::Random => rng.normals(batch.n_rows() * d),
            _ => (0..batch.n_rows() * d).map(|_| rng.pick(&[1.0, 1.0, 0.0, -1.0, 2.0])).collect(),
        };
        let (k, block) = (rng.pick(&[1, 2, 33, 64, 500, 2048]), rng.pick(&[0, 0, 1, 3, 16, 64]));
        let n_columns = k.max((k / block.max(1)).max(1) * block.max(1)) + rng.below(3);
        Self { batch, keys, q, d, k, block, n_columns }
    }

    fn run(&self, ops: &Ops, nth: usize, rows: std::ops::Range<usize>) -> Vec<Vec<u32>> {
        let batch = self.batch.part(rows.clone());
        let guard = 32;
        let mut selected = vec![7777; rows.len() * self.n_columns + guard];
        let mut count = vec![-1; rows.len()];
        let p = clsa_route {
            batch: batch.raw(),
            d: self.d as i32,
            k: self.k as i32,
            block: self.block as i32,
            n_columns: self.n_columns as i32,
            q: self.q[rows.start * self.d..].as_ptr(),
            keys: self.keys.rows,
            selected: selected.as_mut_ptr(),
            count: count.as_mut_ptr(),
        };
        run(ops, &p, nth);
        assert_eq!(selected.split_off(rows.len() * self.n_columns), vec![7777; guard]);
        selected.chunks(self.n_columns).zip(count).map(|(s, n)| s[..n as usize].to_vec()).collect()
    }

    /// The scores of row r as the level computes them.
    fn scores(&self, ops: &Ops, r: usize, nth: usize) -> Vec<f32> {
        let n = self.batch.pos[r] as usize + 1;
        let mut out = vec![f32::NAN; n];
        let p = clsa_score {
            batch: self.batch.raw(),
            d: self.d as i32,
            slot: self.batch.slot[r],
            start: 0,
            n: n as i32,
            q: self.q[r * self.d..].as_ptr(),
            out: out.as_mut_ptr(),
            keys: self.keys.rows,
        };
        run(ops, &p, nth);
        out
    }

    /// The selection by a full sort of the scores.
    fn wanted(&self, scores: &[f32]) -> Vec<u32> {
        let (n, block) = (scores.len(), self.block.max(1));
        if n <= self.k {
            return (0..n as u32).collect();
        }
        let pooled: Vec<f32> =
            scores.chunks(block).map(|b| b.iter().fold(0.0, |sum, x| sum + x) / b.len() as f32).collect();
        let mut blocks = crate::topk::by_sort(&pooled, (self.k / block).max(1));
        blocks.sort_unstable();
        blocks.iter().flat_map(|&b| b * block as u32..((b + 1) * block as u32).min(n as u32)).collect()
    }
}

/// Selections equal a full sort of the level's own scores, and the scores are right.
fn selects_the_best(ops: &Ops, seed: u64) {
    let case = Case::new(seed);
    let n = case.batch.n_rows();
    let found = case.run(ops, 1 + (seed % 4) as usize, 0..n);
    for (r, found) in found.iter().enumerate() {
        let scores = case.scores(ops, r, 1 + (seed % 3) as usize);
        let wanted = case.wanted(&scores);
        assert_eq!(found, &wanted, "{}: row {r} of {n} at {}", ops.level, case.batch.pos[r]);
        let reference = case.scores(Ops::at(ggml_kernels::simd::Level::Ref).unwrap(), r, 1);
        let scale = reference.iter().filter(|x| x.is_finite()).fold(1f32, |m, x| m.max(x.abs()));
        for (s, (a, b)) in scores.iter().zip(&reference).enumerate() {
            let same = (a - b).abs() < 1e-5 * scale || a == b || (a.is_nan() && b.is_nan());
            assert!(same, "{}: score {s} of row {r}: {a}, {b}", ops.level);
        }
    }
    for nth in 1..=4 {
        assert_eq!(case.run(ops, nth, 0..n), found, "{nth} threads");
    }
    let r = (seed % n as u64) as usize;
    assert_eq!(case.run(ops, 3, r..r + 1)[0], found[r], "{}: row {r} alone", ops.level);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_level_selects_the_best(seed: u64) {
        Ops::all().for_each(|ops| selects_the_best(ops, seed));
    }
}

#[test]
fn scratch_does_not_grow_with_the_context() {
    let p = |n_rows, k| clsa_route {
        batch: clsa_batch { n_rows, ..Default::default() },
        d: 128,
        k,
        n_columns: k,
        ..Default::default()
    };
    for nth in [1, 2, 16] {
        assert!(p(512, 2048).scratch_bytes(nth) < nth << 20);
        for n_rows in 1..40 {
            assert!(p(n_rows, 2048).scratch_bytes(nth) <= p(n_rows + 1, 2048).scratch_bytes(nth));
        }
    }
}

#[test]
fn bad_parameters_are_refused() {
    let case = Case::new(5);
    let (mut selected, mut count) = (vec![0; 1 << 16], vec![0; 100]);
    let good = clsa_route {
        batch: case.batch.raw(),
        d: case.d as i32,
        k: 4,
        block: 0,
        n_columns: 4,
        q: case.q.as_ptr(),
        keys: case.keys.rows,
        selected: selected.as_mut_ptr(),
        count: count.as_mut_ptr(),
    };
    let refused = |p: clsa_route, what: &str| {
        let error = p.check().unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(clsa_route { n_columns: 0, ..good }, "0 columns");
    refused(clsa_route { k: 0, ..good }, "k = 0");
    refused(clsa_route { block: -1, ..good }, "block = -1");
    refused(clsa_route { d: 8, ..good }, "8 values");
    refused(clsa_route { count: std::ptr::null_mut(), ..good }, "null");
}

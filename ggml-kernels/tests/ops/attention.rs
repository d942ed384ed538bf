use crate::fixture::*;
use ggml_kernels::contracts::*;
use ggml_kernels::ops::{Op, Ops};
use ggml_kernels::simd::Level;
use proptest::prelude::{ProptestConfig, proptest};

/// A case: everything that an `attention` call points to.
struct Case {
    batch: Batch,
    k: Pool,
    v: Pool,
    q: Vec<f32>,
    heads: (usize, usize, usize),
    window: usize,
    scale: f32,
    wanted: Vec<f32>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let (kt, vt) = (rng.pick(&TYPES), rng.pick(&TYPES));
        let dims: &[usize] = if kt == CLSA_Q8_0 || vt == CLSA_Q8_0 {
            &[32, 64, 96, 128, 256]
        } else {
            &[16, 32, 64, 80, 96, 128, 256]
        };
        let (d, n_kv, group) = (rng.pick(dims), rng.pick(&[1, 2, 3]), rng.pick(&[1, 2, 3, 5, 8]));
        let window = rng.pick(&[0, 0, 1, 7, 64, 100, 300, 512]);
        let sequences: Vec<(usize, usize)> = (0..rng.pick(&[1, 1, 2, 4]))
            .map(|_| (rng.pick(&[0, 0, 1, 63, 250, 700, 1500]) + rng.below(70), rng.pick(&[1, 1, 2, 13, 70])))
            .collect();
        let batch = Batch::new(rng, &sequences);
        let most = sequences.iter().map(|(_, n)| *n).max().unwrap();
        let ring = if window > 0 && rng.below(2) == 0 { window + most - 1 + rng.below(40) } else { 0 };
        let units = if ring > 0 { batch.n_slots } else { batch.n_pages() };
        let (n_head, width) = (n_kv * group, n_kv * d);
        let mut k = Pool::new(rng, kt, width, ring, units);
        let mut v = Pool::new(rng, vt, width, ring, units);
        let q = rng.normals(batch.n_rows() * n_head * d);
        let scale = rng.pick(&[1.0, 1.0, 4.0]) / (d as f32).sqrt();
        let mut wanted = vec![];
        let mut row = 0;
        for &(first, n) in &sequences {
            let slot = batch.slot[row] as usize;
            let from = if ring > 0 { (first + n).saturating_sub(ring) } else { 0 };
            let keys = k.fill(rng, &batch, slot, from, first + n);
            let values = v.fill(rng, &batch, slot, from, first + n);
            for r in row..row + n {
                let t = batch.pos[r] as usize;
                let range = if window > 0 { (t + 1).saturating_sub(window) } else { 0 }..t + 1;
                for h in 0..n_head {
                    let q = &q[(r * n_head + h) * d..][..d];
                    wanted.extend(softmax_head(
                        q,
                        scale,
                        &keys,
                        &values,
                        width,
                        h / group * d,
                        range.clone(),
                    ));
                }
            }
            row += n;
        }
        Self { batch, k, v, q, heads: (n_head, n_kv, d), window, scale, wanted }
    }

    /// Rows `rows` alone.
    fn run(&self, ops: &Ops, nth: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
        let (n_head, n_kv, d) = self.heads;
        let batch = self.batch.part(rows.clone());
        let q = &self.q[rows.start * n_head * d..rows.end * n_head * d];
        let mut out = vec![f32::NAN; q.len()];
        let p = clsa_attention {
            batch: batch.raw(),
            n_head: n_head as i32,
            n_kv: n_kv as i32,
            d: d as i32,
            window: self.window as i32,
            scale: self.scale,
            q: q.as_ptr(),
            out: out.as_mut_ptr(),
            k: self.k.rows,
            v: self.v.rows,
        };
        run(ops, &p, nth);
        out
    }
}

/// Whether an op of so many rows rounds to bf16.
fn tiles(ops: &Ops, n_rows: usize) -> bool {
    ops.level == Level::Amx && n_rows >= CLSA_AMX_ROWS as usize
}

fn matches_the_equation(ops: &Ops, seed: u64) {
    let case = Case::new(seed);
    let all = 0..case.batch.n_rows();
    let found = case.run(ops, 1 + (seed % 4) as usize, all.clone());
    let width = case.heads.0 * case.heads.2;
    for (r, (found, wanted)) in found.chunks(width).zip(case.wanted.chunks(width)).enumerate() {
        let error = relative_error(found, wanted);
        let wanted = if tiles(ops, case.batch.n_rows()) { 4e-2 } else { 2e-5 };
        assert!(error < wanted, "{}: row {r} of {}: relative error {error}", ops.level, case.batch.n_rows());
    }
}

fn depends_on_no_other_row_nor_thread(ops: &Ops, seed: u64) {
    let case = Case::new(seed);
    let n = case.batch.n_rows();
    let all = bits(&case.run(ops, 1, 0..n));
    for nth in 2..=4 {
        assert_eq!(bits(&case.run(ops, nth, 0..n)), all, "{} threads", nth);
    }
    let width = case.heads.0 * case.heads.2;
    let rng = &mut Rng::new(seed);
    for _ in 0..6 {
        // Few rows, or as many as are rounded alike.
        let least = if tiles(ops, n) { CLSA_AMX_ROWS as usize } else { 1 };
        let start = rng.below(n + 1 - least);
        let end = start + least + rng.below((n + 1 - start - least).min(9));
        let alone = bits(&case.run(ops, 1 + rng.below(4), start..end));
        assert_eq!(alone, all[start * width..end * width], "{}: rows {start}..{end} of {n} alone", ops.level);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_level_matches_the_equation(seed: u64) {
        Ops::all().for_each(|ops| matches_the_equation(ops, seed));
    }
    #[test]
    fn results_depend_on_no_other_row_nor_thread(seed: u64) {
        Ops::all().for_each(|ops| depends_on_no_other_row_nor_thread(ops, seed));
    }
}

/// A value that is not finite shows in the rows that attend to its position, and in no other row, whatever rows share the work.
#[test]
fn values_out_of_range_are_not_seen() {
    for seed in 0..32 {
        let mut case = Case::new(seed);
        let (n_head, n_kv, d) = case.heads;
        let (n, width) = (case.batch.n_rows(), n_head * d);
        let clean: Vec<_> = Ops::all().map(|ops| bits(&case.run(ops, 2, 0..n))).collect();
        // One bad row of V for each sequence: that of its middle position in the batch.
        let rng = &mut Rng::new(seed);
        let rows: Vec<usize> =
            (0..n).filter(|&r| r + 1 == n || case.batch.slot[r + 1] != case.batch.slot[r]).collect();
        let mut bad = vec![0; n];
        let mut first = 0;
        let mut stored = true;
        for &last in &rows {
            let at = usize::midpoint(first, last);
            let (slot, pos) = (case.batch.slot[at] as usize, case.batch.pos[at] as usize);
            let values = vec![rng.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]); n_kv * d];
            let batch = case.batch.clone();
            let back = case.v.write(&batch, slot, pos, &values);
            stored &= back.iter().all(|x| !x.is_finite()); // Q8_0 has no NaN of its own
            bad[first..=last].fill(pos);
            first = last + 1;
        }
        if !stored {
            continue;
        }
        for (ops, clean) in Ops::all().zip(clean) {
            let found = case.run(ops, 2, 0..n);
            for r in 0..n {
                let t = case.batch.pos[r] as usize;
                let sees = bad[r] <= t && (case.window == 0 || t < bad[r] + case.window);
                let row = &found[r * width..(r + 1) * width];
                if sees {
                    assert!(
                        row.iter().all(|x| !x.is_finite()),
                        "{}, seed {seed}: row {r} hides {row:?}",
                        ops.level
                    );
                } else {
                    assert_eq!(
                        bits(row),
                        clean[r * width..(r + 1) * width],
                        "{}, seed {seed}: row {r}",
                        ops.level
                    );
                }
            }
        }
    }
}

#[test]
fn bad_parameters_are_refused() {
    let case = (0..).map(Case::new).find(|c| c.k.rows.ring == 0 && c.batch.n_rows() < 1000).unwrap();
    let (n_head, n_kv, d) = case.heads;
    let mut out = vec![0.0; case.q.len()];
    let good = clsa_attention {
        batch: case.batch.raw(),
        n_head: n_head as i32,
        n_kv: n_kv as i32,
        d: d as i32,
        window: 0,
        scale: 1.0,
        q: case.q.as_ptr(),
        out: out.as_mut_ptr(),
        k: case.k.rows,
        v: case.v.rows,
    };
    let refused = |what: &str, change: &dyn Fn(&mut clsa_attention)| {
        let mut p = good;
        change(&mut p);
        let error = p.check().expect_err(what).to_string();
        assert!(error.starts_with("attention: ") && error.contains(what), "{what}: {error}");
    };
    let far = [1 << 20; 1000];
    let outside = vec![u32::MAX; case.batch.tables.len()];
    refused("heads over", &|p| p.n_kv = p.n_head + 1);
    refused("multiple of 16", &|p| p.d = 24);
    refused("values", &|p| p.k.width += 16);
    refused("cache type 3", &|p| p.v.type_ = 3);
    refused("row stride", &|p| p.k.row_stride = 2);
    refused("page stride", &|p| p.k.page_stride = 64);
    refused("outside the pool", &|p| p.v.bytes = 1000);
    refused("outside the pool", &|p| p.batch.tables = outside.as_ptr());
    refused("past the page table", &|p| p.batch.pos = far.as_ptr());
    refused("slot", &|p| p.batch.n_slots = 0);
    refused("null", &|p| p.q = std::ptr::null());
    refused("null", &|p| p.k.base = std::ptr::null_mut());
    refused("does not hold", &|p| (p.k.ring, p.v.ring) = (1, 1));
    refused("window", &|p| p.window = -1);
}

use crate::fixture::*;
use ggml_kernels::contracts::*;
use ggml_kernels::ops::Ops;
use proptest::prelude::{ProptestConfig, proptest};

struct Case {
    batch: Batch,
    k: Pool,
    v: Pool,
    q: Vec<f32>,
    heads: (usize, usize, usize),
    n_columns: usize,
    selected: Vec<u32>,
    count: Vec<i32>,
    wanted: Vec<f32>,
}

const SCALE: f32 = 0.125;

impl Case {
    fn new(seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let (kt, vt) = (rng.pick(&TYPES), rng.pick(&TYPES));
        let dims: &[usize] = if kt == CLSA_Q8_0 || vt == CLSA_Q8_0 {
            &[32, 64, 96, 128, 256]
        } else {
            &[16, 32, 64, 80, 96, 128, 256]
        };
        let (d, n_kv, group) = (rng.pick(dims), rng.pick(&[1, 2, 4]), rng.pick(&[1, 2, 3, 5, 8]));
        let sequences: Vec<(usize, usize)> = (0..rng.pick(&[1, 1, 2, 5]))
            .map(|_| (rng.pick(&[0, 40, 300, 2500]) + rng.below(70), rng.pick(&[1, 1, 3, 11])))
            .collect();
        let batch = Batch::new(rng, &sequences);
        let (n_head, width) = (n_kv * group, n_kv * d);
        let mut k = Pool::new(rng, kt, width, 0, batch.n_pages());
        let mut v = Pool::new(rng, vt, width, 0, batch.n_pages());
        let q = rng.normals(batch.n_rows() * n_head * d);
        let most = rng.pick(&[1, 5, 64, 100, 700, 2000]);
        let n_columns = most + rng.below(3);
        let mut selected = vec![u32::MAX; batch.n_rows() * n_columns];
        let (mut count, mut wanted) = (vec![], vec![]);
        let mut row = 0;
        for &(first, n) in &sequences {
            let slot = batch.slot[row] as usize;
            let keys = k.fill(rng, &batch, slot, 0, first + n);
            let values = v.fill(rng, &batch, slot, 0, first + n);
            for r in row..row + n {
                let mut s: Vec<u32> = (0..=batch.pos[r] as u32).collect();
                shuffle(rng, &mut s);
                s.truncate(most);
                s.sort_unstable();
                selected[r * n_columns..][..s.len()].copy_from_slice(&s);
                count.push(s.len() as i32);
                for h in 0..n_head {
                    let q = &q[(r * n_head + h) * d..][..d];
                    let set = s.iter().map(|&s| s as usize);
                    wanted.extend(softmax_head(q, SCALE, &keys, &values, width, h / group * d, set));
                }
            }
            row += n;
        }
        Self { batch, k, v, q, heads: (n_head, n_kv, d), n_columns, selected, count, wanted }
    }

    fn run(&self, ops: &Ops, nth: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
        let (n_head, n_kv, d) = self.heads;
        let batch = self.batch.part(rows.clone());
        let q = &self.q[rows.start * n_head * d..rows.end * n_head * d];
        let mut out = vec![f32::NAN; q.len()];
        let p = clsa_gather_attention {
            batch: batch.raw(),
            n_head: n_head as i32,
            n_kv: n_kv as i32,
            d: d as i32,
            n_columns: self.n_columns as i32,
            scale: SCALE,
            q: q.as_ptr(),
            out: out.as_mut_ptr(),
            k: self.k.rows,
            v: self.v.rows,
            selected: self.selected[rows.start * self.n_columns..].as_ptr(),
            count: self.count[rows.start..].as_ptr(),
        };
        run(ops, &p, nth);
        out
    }
}

fn matches_the_equation(ops: &Ops, seed: u64) {
    let case = Case::new(seed);
    let n = case.batch.n_rows();
    let all = case.run(ops, 1 + (seed % 4) as usize, 0..n);
    let width = case.heads.0 * case.heads.2;
    for (r, (found, wanted)) in all.chunks(width).zip(case.wanted.chunks(width)).enumerate() {
        let error = relative_error(found, wanted);
        assert!(
            error < 2e-5,
            "{}: row {r} of {n}, {} keys: relative error {error}",
            ops.level,
            case.count[r]
        );
    }
    for nth in 1..=4 {
        assert_eq!(bits(&case.run(ops, nth, 0..n)), bits(&all), "{nth} threads");
    }
    let r = (seed % n as u64) as usize;
    assert_eq!(bits(&case.run(ops, 2, r..r + 1)), bits(&all[r * width..][..width]), "row {r} alone");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_level_matches_the_equation(seed: u64) {
        Ops::all().for_each(|ops| matches_the_equation(ops, seed));
    }
}

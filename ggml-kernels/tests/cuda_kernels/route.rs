//! route: the selection equals the reference's, but for scores so close that rounding orders them differently.
use crate::harness::*;
use ggml_kernels::contracts::*;
use ggml_kernels::cuda::ops::RouteScratch;

struct Case {
    kind: u32,
    d: usize,
    k: usize,
    block: usize,
    /// Slots' lengths.
    lens: Vec<usize>,
    /// (slot, position)
    rows: Vec<(usize, usize)>,
    one_sequence: bool,
    scratch_rows: usize,
}

impl Case {
    fn decode(kind: u32, d: usize, k: usize, lens: &[usize]) -> Self {
        let rows = lens.iter().enumerate().map(|(s, &l)| (s, l - 1)).collect();
        Self {
            kind,
            d,
            k,
            block: 0,
            lens: lens.to_vec(),
            rows,
            one_sequence: false,
            scratch_rows: lens.len(),
        }
    }

    /// Runs the case twice over one scratch; `key(slot, pos)` and `query(row)` give the data. `exact`: scores are free of rounding.
    fn check(
        &self,
        target: &Target,
        exact: bool,
        mut key: impl FnMut(usize, usize) -> Vec<f32>,
        query: impl FnMut(usize) -> Vec<f32>,
    ) {
        let mut random = Random::new(7);
        let mut seq = Sequences::new(target, &mut random, &self.lens, &self.rows);
        let mut keys = seq.pool(target, self.kind, self.d, 0, &mut key);
        let n = self.rows.len();
        let mut q = Dual::new(target, (0..n).flat_map(query).collect::<Vec<f32>>());
        let columns = self.k.max(self.block);
        let mut selected = Dual::<u32>::poisoned(target, n * columns);
        let mut count = Dual::<i32>::poisoned(target, n);
        let common =
            clsa_route { d: self.d as i32, k: self.k as i32, block: self.block as i32, ..Default::default() };
        let host = clsa_route {
            batch: seq.host(),
            n_columns: columns as i32,
            q: q.h(),
            keys: keys.host(),
            selected: selected.h(),
            count: count.h(),
            ..common
        };
        reference(&host);
        let device = clsa_route {
            batch: seq.device(),
            n_columns: columns as i32,
            q: q.d(),
            keys: keys.device(),
            selected: selected.d(),
            count: count.d(),
            ..common
        };
        let max_positions = seq.table_stride * 256;
        let scratch = Dual::<u8>::new(target, vec![0; RouteScratch::bytes(self.scratch_rows, max_positions)]);
        let route = RouteScratch::new(scratch.d(), self.scratch_rows, max_positions);
        // Twice: the first call must leave the scratch as it found it.
        for _ in 0..2 {
            // SAFETY: buffers of these shapes live until the wait.
            unsafe { route.route(target, &device, self.one_sequence).expect("route") };
        }
        target.wait();
        let (got, got_count) = (selected.fetch(), count.fetch());
        for r in 0..n {
            assert_eq!(got_count[r], count.host[r], "row {r}: count");
            let m = got_count[r] as usize;
            let (got, want) = (&got[r * columns..][..m], &selected.host[r * columns..][..m]);
            assert!(got.is_sorted_by(|a, b| a < b), "row {r}: ascending");
            if got != want {
                assert!(!exact, "row {r}: {:?}", got.iter().zip(want).find(|(a, b)| a != b));
                self.differences_are_ties(r, got, want, &mut key, &q.host[r * self.d..][..self.d]);
            }
        }
    }

    /// Positions that only one side selected must score within rounding of the others that only the other side did.
    fn differences_are_ties(
        &self,
        row: usize,
        got: &[u32],
        want: &[u32],
        key: &mut impl FnMut(usize, usize) -> Vec<f32>,
        q: &[f32],
    ) {
        assert!(self.block <= 1, "row {row}: block selections differ");
        let mut score = |pos: u32| {
            let values = key(self.rows[row].0, pos as usize);
            let mut bytes = vec![0; row_bytes(self.kind, self.d)];
            encode(self.kind, &values, &mut bytes);
            let exact = decode(self.kind, &bytes);
            let size: f64 = exact.iter().zip(q).map(|(k, q)| (k * f64::from(*q)).abs()).sum();
            (exact.iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>(), size)
        };
        let only = |a: &[u32], b: &[u32]| -> Vec<u32> {
            a.iter().filter(|p| b.binary_search(p).is_err()).copied().collect()
        };
        let (mine, theirs) = (only(got, want), only(want, got));
        assert!(mine.len() <= 2 + self.k / 200, "row {row}: {} differences", mine.len());
        for &a in &mine {
            for &b in &theirs {
                let ((x, size), (y, _)) = (score(a), score(b));
                assert!((x - y).abs() <= 2e-6 * size, "row {row}: {a} ({x}) for {b} ({y})");
            }
        }
    }
}

fn decode(kind: u32, bytes: &[u8]) -> Vec<f64> {
    match kind {
        CLSA_F32 => bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
        CLSA_F16 => bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f64()).collect(),
        _ => bytes
            .chunks_exact(34)
            .flat_map(|b| {
                let d = half::f16::from_le_bytes([b[0], b[1]]).to_f64();
                b[2..].iter().map(move |&q| d * f64::from(q as i8)).collect::<Vec<_>>()
            })
            .collect(),
    }
}

fn random_key(d: usize) -> impl FnMut(usize, usize) -> Vec<f32> {
    move |slot, pos| Random::new((slot * 1_000_003 + pos) as u64 + 1).normals(d)
}
fn random_query(d: usize) -> impl FnMut(usize) -> Vec<f32> {
    move |row| Random::new(row as u64 + 99).normals(d)
}

#[test]
fn one_row_of_each_type_and_width() {
    on_each_target(|target| {
        for (kind, d) in [
            (CLSA_F16, 64),
            (CLSA_F16, 128),
            (CLSA_Q8_0, 64),
            (CLSA_Q8_0, 128),
            (CLSA_F32, 64),
            (CLSA_F16, 48),
            (CLSA_Q8_0, 96),
        ] {
            Case::decode(kind, d, 100, &[1500]).check(target, false, random_key(d), random_query(d));
        }
    });
}

#[test]
fn ragged_decode_batch() {
    on_each_target(|target| {
        // Shorter than k, k exactly, k + 1, a page's end, beyond.
        Case::decode(CLSA_F16, 64, 64, &[1, 63, 64, 65, 256, 257, 700]).check(
            target,
            false,
            random_key(64),
            random_query(64),
        );
    });
}

#[test]
fn many_rows_of_one_sequence() {
    on_each_target(|target| {
        let rows = (300..311).map(|p| (0, p)).chain((40..43).map(|p| (1, p))).collect();
        let case = Case {
            kind: CLSA_F16,
            d: 128,
            k: 48,
            block: 0,
            lens: vec![311, 43],
            rows,
            one_sequence: true,
            scratch_rows: 6,
        };
        case.check(target, false, random_key(128), random_query(128));
    });
}

/// Keys whose only value is the score, so that scores are exact and chosen.
fn scored(d: usize, score: impl Fn(usize) -> f32) -> impl FnMut(usize, usize) -> Vec<f32> {
    move |_, pos| {
        let mut key = vec![0.0; d];
        key[3] = score(pos);
        key
    }
}
fn unit_query(d: usize) -> impl FnMut(usize) -> Vec<f32> {
    move |_| {
        let mut q = vec![0.0; d];
        q[3] = 1.0;
        q
    }
}

#[test]
fn ties_take_the_lower_position() {
    on_each_target(|target| {
        for (kind, n) in [(CLSA_F32, 3000), (CLSA_F16, 3000), (CLSA_F16, 9000)] {
            for (k, modulus) in [(70, 1), (70, 7), (1, 2), (999, 64), (2048, 3)] {
                let case = Case::decode(kind, 64, k, &[n]);
                let score = |pos: usize| (pos * 7919 % modulus) as f32 - 1.0;
                case.check(target, true, scored(64, score), unit_query(64));
            }
        }
    });
}

#[test]
fn narrow_scores_overflow_the_candidates() {
    on_each_target(|target| {
        // All in one bin of the histogram, and more of them than the candidate list holds; some equal.
        let score = |pos: usize| 100.0 + (pos * 7919 % 6007) as f32 / 1024.0;
        Case::decode(CLSA_F32, 64, 500, &[9500]).check(target, true, scored(64, score), unit_query(64));
        Case::decode(CLSA_F32, 64, 5000, &[9500]).check(target, true, scored(64, score), unit_query(64));
    });
}

#[test]
fn long_sequences_do_not_fit_shared_memory() {
    on_each_target(|target| {
        let score = |pos: usize| ((pos * 7919) % 65_537) as f32 - 300.0;
        Case::decode(CLSA_F32, 16, 100, &[132_000]).check(target, true, scored(16, score), unit_query(16));
        let few = |pos: usize| (pos % 3) as f32;
        Case::decode(CLSA_F32, 16, 50_000, &[132_000]).check(target, true, scored(16, few), unit_query(16));
    });
}

#[test]
fn zeros_infinities_and_nan_have_their_order() {
    on_each_target(|target| {
        let score = |pos: usize| match pos % 7 {
            0 => f32::NAN,
            1 => f32::NEG_INFINITY,
            2 => -0.0,
            3 => 0.0,
            4 => -1e30,
            5 => 1e-40,
            _ => f32::MAX,
        };
        // A query of one value 1 and zeros elsewhere would turn infinities of other dimensions into NaN; these are zero there.
        for k in [10, 200, 400, 500, 700, 900] {
            Case::decode(CLSA_F32, 48, k, &[1000]).check(target, true, scored(48, score), unit_query(48));
        }
    });
}

#[test]
fn blocks_are_pooled_by_mean() {
    on_each_target(|target| {
        // Multiples of 1/64: means are exact.
        let score = |pos: usize| (pos * 7919 % 997) as f32 / 64.0;
        for (block, k, n) in
            [(16, 128, 1000), (64, 256, 1030), (7, 100, 333), (32, 16, 100), (16, 2048, 1000)]
        {
            let case = Case { block, ..Case::decode(CLSA_F32, 64, k, &[n, n / 2]) };
            case.check(target, true, scored(64, score), unit_query(64));
        }
    });
}

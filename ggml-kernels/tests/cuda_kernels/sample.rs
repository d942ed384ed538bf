//! sample: the drawn token is the one whose share of the filtered distribution holds the random number.
use crate::harness::*;
use ggml_kernels::contracts::*;
use ggml_kernels::cuda::ops::{philox_uniform, sample, sample_state_bytes};

/// Tokens that the filters leave, in the order in which the kernel draws, with their probabilities.
fn filtered(logits: &[f32], row: &clsa_sample_row, by_id: bool) -> Vec<(u32, f64)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    all.retain(|t| t.1 > f32::NEG_INFINITY);
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if row.top_k > 0 {
        all.truncate(row.top_k as usize);
    }
    let top = all[0].1;
    let weight = |x: f32, temperature: f32| (f64::from(x - top) / f64::from(temperature)).exp();
    if row.top_p < 1.0 {
        let sum: f64 = all.iter().map(|t| weight(t.1, 1.0)).sum();
        let mut upto = 0.0;
        let n = all.iter().take_while(|t| {
            let before = upto;
            upto += weight(t.1, 1.0);
            before == 0.0 || before < f64::from(row.top_p) * sum
        });
        let n = n.count();
        all.truncate(n);
    }
    if row.min_p > 0.0 {
        all.retain(|t| t.1 >= top + row.min_p.ln());
    }
    if by_id {
        all.sort_by_key(|t| t.0);
    }
    let sum: f64 = all.iter().map(|t| weight(t.1, row.temperature)).sum();
    all.iter().map(|t| (t.0, weight(t.1, row.temperature) / sum)).collect()
}

/// Whether `at` lies in the token's interval, give or take rounding.
fn holds(shares: &[(u32, f64)], token: u32, at: f64) -> bool {
    let mut upto = 0.0;
    shares.iter().any(|&(id, p)| {
        upto += p;
        id == token && at >= upto - p - 1e-6 && at <= upto + 1e-6
    })
}

struct Run {
    tokens: Vec<u32>,
    status: Vec<u32>,
    rows: Vec<clsa_sample_row>,
}

/// Samples `times` times over one state.
fn run(target: &Target, n_vocab: usize, logits: &[f32], rows: &[clsa_sample_row], times: usize) -> Vec<Run> {
    let n = rows.len();
    let logits = Dual::new(target, logits.to_vec());
    let params = Dual::new(target, rows.to_vec());
    let state = Dual::<u64>::new(target, vec![0; sample_state_bytes(n) / 8]);
    let (tokens, status) = (Dual::<u32>::poisoned(target, n), Dual::<u32>::poisoned(target, n));
    let op = clsa_sample_cuda {
        n_rows: n as i32,
        n_vocab: n_vocab as i32,
        logits: logits.d(),
        rows: params.d(),
        state: state.d().cast(),
        tokens: tokens.d(),
        status: status.d(),
    };
    (0..times)
        .map(|_| {
            // SAFETY: buffers of these shapes live until the wait.
            unsafe { sample(target, &op).expect("sample") };
            target.wait();
            Run { tokens: tokens.fetch(), status: status.fetch(), rows: params.fetch() }
        })
        .collect()
}

fn row(temperature: f32, top_k: i32, top_p: f32, min_p: f32, at: f64) -> clsa_sample_row {
    clsa_sample_row { temperature, top_p, min_p, top_k, at, seed: 0x1234_5678_9abc_def0, counter: 7 }
}

#[test]
fn greedy_takes_the_lowest_of_the_best() {
    on_each_target(|target| {
        let n = 5003;
        let mut logits = Random::new(1).normals(3 * n);
        for i in [4000, 77, 1234] {
            logits[n + i] = 9.5;
        }
        logits[2 * n..].fill(f32::NEG_INFINITY);
        logits[2 * n + 4999] = -1e30;
        let best = logits[..n].iter().copied().fold(f32::MIN, f32::max);
        let first = logits[..n].iter().position(|x| *x == best).unwrap() as u32;
        for run in run(target, n, &logits, &[row(0.0, 40, 0.9, 0.1, -1.0); 3], 2) {
            assert_eq!(run.tokens, [first, 77, 4999]);
            assert_eq!(run.status, [CLSA_SAMPLE_OK; 3]);
            assert_eq!(run.rows[0].counter, 7);
        }
    });
}

#[test]
fn drawn_tokens_follow_the_filtered_distribution() {
    on_each_target(|target| {
        // A vocabulary whose whole fits the short list, and one whose does not.
        for n in [1500, 6000] {
            let mut logits: Vec<f32> = Random::new(n as u64).normals(n).iter().map(|x| x * 3.0).collect();
            // Equal logits at the cuts, and tokens that may not come.
            logits.iter_mut().skip(3).step_by(7).for_each(|x| *x = x.round());
            logits.iter_mut().step_by(11).for_each(|x| *x = f32::NEG_INFINITY);
            for (temperature, k, p, min_p) in [
                (0.8, 40, 0.95, 0.05),
                (1.0, 0, 1.0, 0.0),
                (1.5, 0, 0.9, 0.0),
                (0.7, 3000, 1.0, 0.02),
                (2.0, 2500, 0.999, 0.0),
                (1.0, 1, 1.0, 0.0),
                (0.3, 100, 0.0, 0.0),
                (1e-20, 20, 1.0, 0.0),
            ] {
                let ats = [0.0, 0.1, 0.5, 0.9, 0.999_999, -1.0];
                let rows = ats.map(|at| row(temperature, k, p, min_p, at));
                let repeated: Vec<f32> = rows.iter().flat_map(|_| logits.clone()).collect();
                for (time, run) in run(target, n, &repeated, &rows, 2).iter().enumerate() {
                    assert_eq!(run.status, [CLSA_SAMPLE_OK; 6]);
                    for (r, &at) in run.rows.iter().zip(&ats).map(|(_, at)| at).enumerate() {
                        let at = if at < 0.0 { philox_uniform(rows[r].seed, 7 + time as u64) } else { at };
                        let by = [false, true].map(|by_id| filtered(&logits, &rows[r], by_id));
                        assert!(
                            by.iter().any(|shares| holds(shares, run.tokens[r], at)),
                            "{n} tokens, {:?}: {} at {at}",
                            rows[r],
                            run.tokens[r]
                        );
                    }
                    assert_eq!(run.rows[5].counter, 8 + time as u64);
                    assert_eq!(run.rows[0].counter, 7);
                }
            }
        }
    });
}

#[test]
fn broken_logits_are_reported() {
    on_each_target(|target| {
        let n = 3000;
        let mut logits = Random::new(3).normals(4 * n);
        logits[2999] = f32::NAN;
        logits[n + 5] = f32::INFINITY;
        logits[2 * n..3 * n].fill(f32::NEG_INFINITY);
        let rows = [
            row(0.0, 0, 1.0, 0.0, -1.0),
            row(0.8, 40, 0.9, 0.0, 0.5),
            row(1.0, 0, 1.0, 0.0, 0.5),
            row(1.0, 40, 0.9, 0.0, 0.5),
        ];
        for run in run(target, n, &logits, &rows, 2) {
            let wanted =
                [CLSA_SAMPLE_NOT_FINITE, CLSA_SAMPLE_NOT_FINITE, CLSA_SAMPLE_NOTHING_LEFT, CLSA_SAMPLE_OK];
            assert_eq!(run.status, wanted);
            assert_eq!(run.tokens[..3], [u32::MAX; 3]);
            assert!(run.tokens[3] < n as u32);
        }
    });
}

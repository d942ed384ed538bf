use crate::fixture::*;
use ggml_kernels::contracts::*;
use ggml_kernels::ops::Ops;
use proptest::prelude::{ProptestConfig, proptest};

/// The k best by a full sort: score descending, position ascending, NaN as -inf, -0 as +0.
pub fn by_sort(scores: &[f32], k: usize) -> Vec<u32> {
    let key = |i: u32| {
        let x = scores[i as usize];
        if x.is_nan() { f32::NEG_INFINITY } else { x + 0.0 }
    };
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// Scores of different shapes: random, few distinct, all equal, rising, falling, wild.
fn scores(rng: &mut Rng, n: usize) -> Vec<f32> {
    let shape = rng.below(6);
    let distinct = 1 + rng.below(5);
    (0..n)
        .map(|i| match shape {
            0 => rng.normal() * 30.0,
            1 => rng.below(distinct) as f32 - 1.0,
            2 => i as f32 - 1000.0,
            3 => -(i as f32),
            4 => rng.pick(&[
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                -f32::NAN,
                0.0,
                -0.0,
                1e-45,
                -1e-45,
                f32::MAX,
            ]),
            _ => f32::from_bits(rng.next() as u32),
        })
        .collect()
}

fn equals_a_full_sort(ops: &Ops, seed: u64, n: usize) {
    let rng = &mut Rng::new(seed);
    let scores = scores(rng, n);
    let k = match rng.below(4) {
        0 => 1,
        1 => 1 + rng.below(n),
        2 => n + rng.below(5),
        _ => 2048.min(n),
    };
    let kept = k.min(n);
    let mut selected = vec![7777; kept + 32];
    let p = clsa_topk { scores: scores.as_ptr(), n: n as i32, k: k as i32, selected: selected.as_mut_ptr() };
    run(ops, &p, 1);
    assert!(selected.split_off(kept).iter().all(|&x| x == 7777), "wrote past the selection");
    assert!(selected == by_sort(&scores, k), "{}: seed {seed}, {k} of {n}", ops.level);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn every_level_equals_a_full_sort(seed: u64, n in 1usize..20_000) {
        Ops::all().for_each(|ops| equals_a_full_sort(ops, seed, n));
    }
    #[test]
    fn every_level_equals_a_full_sort_when_small(seed: u64, n in 1usize..100) {
        Ops::all().for_each(|ops| equals_a_full_sort(ops, seed, n));
    }
}

#[test]
fn every_level_equals_a_full_sort_when_large() {
    for (seed, n) in
        [(1, 131_072), (2, 262_143), (3, 1_048_576), (4, 1_048_576), (5, 1_000_001), (6, 1_048_576)]
    {
        Ops::all().for_each(|ops| equals_a_full_sort(ops, seed, n));
    }
}

use crate::fixture::*;
use ggml_kernels::contracts::*;
use ggml_kernels::ops::{Op, Ops};
use proptest::prelude::{ProptestConfig, proptest};

/// RMSNorm, then rotation, of one head in f64.
fn head(x: &[f32], norm: Option<&[f32]>, cos: &[f32], sin: &[f32], interleaved: bool, eps: f32) -> Vec<f32> {
    let mut y: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    if let Some(w) = norm {
        let mean = y.iter().map(|x| x * x).sum::<f64>() / y.len() as f64;
        let factor = 1.0 / (mean + f64::from(eps)).sqrt();
        y.iter_mut().zip(w).for_each(|(y, &w)| *y *= factor * f64::from(w));
    }
    for j in 0..cos.len() {
        let (a, b) = if interleaved { (2 * j, 2 * j + 1) } else { (j, j + cos.len()) };
        let (c, s) = (f64::from(cos[j]), f64::from(sin[j]));
        (y[a], y[b]) = (y[a] * c - y[b] * s, y[b] * c + y[a] * s);
    }
    y.iter().map(|&y| y as f32).collect()
}

/// The bytes of a row as values.
fn decode(bytes: &[u8], cache_type: u32) -> Vec<f32> {
    match cache_type {
        CLSA_F32 => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        CLSA_F16 => {
            bytes.chunks(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        _ => bytes
            .chunks(34)
            .flat_map(|b| {
                let d = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                b[2..].iter().map(move |&q| d * f32::from(q as i8)).collect::<Vec<_>>()
            })
            .collect(),
    }
}

/// Largest difference allowed after rounding to a cache type, relative to the row's largest value.
fn tolerance(cache_type: u32) -> f32 {
    match cache_type {
        CLSA_F32 => 2e-6,
        CLSA_F16 => 1.0 / 2048.0 + 1e-6,
        _ => 1.0 / 127.0 / 2.0 + 1.0 / 2048.0,
    }
}

fn matches_the_equation(ops: &Ops, seed: u64) {
    let rng = &mut Rng::new(seed);
    let (kt, vt) = (rng.pick(&TYPES), rng.pick(&TYPES));
    let d = rng.pick(&[32, 64, 96, 128, 256]);
    let (n_kv, group) = (rng.pick(&[1, 2, 3]), rng.pick(&[1, 2, 3, 5]));
    let n_head = n_kv * group;
    let sequences: Vec<(usize, usize)> =
        (0..rng.pick(&[1, 2, 3])).map(|_| (rng.below(600), 1 + rng.below(9))).collect();
    let batch = Batch::new(rng, &sequences);
    let n = batch.n_rows();
    let ring = if rng.below(2) == 0 { 9 + rng.below(30) } else { 0 };
    let units = if ring > 0 { batch.n_slots } else { batch.n_pages() };
    let mut k_cache = Pool::new(rng, kt, n_kv * d, ring, units);
    let mut v_cache = Pool::new(rng, vt, n_kv * d, ring, units);
    let (has_q, has_k, has_v) = (rng.below(4) > 0, rng.below(4) > 0, rng.below(4) > 0);
    let (has_norm, has_rope, interleaved) = (rng.below(2) == 0, rng.below(3) > 0, rng.below(2) == 0);
    let n_rot = if rng.below(2) == 0 { d } else { 2 + 2 * rng.below(d / 2) };
    let (q, k, v) = (rng.normals(n * n_head * d), rng.normals(n * n_kv * d), rng.normals(n * n_kv * d));
    let (q_norm, k_norm) = (rng.normals(d), rng.normals(d));
    let (sin, cos): (Vec<f32>, Vec<f32>) = rng.normals(n * n_rot / 2).iter().map(|x| x.sin_cos()).unzip();
    let eps = 1e-5;
    let when = |on: bool, x: &[f32]| if on { x.as_ptr() } else { std::ptr::null() };
    let none = clsa_rows::default();
    // In place, or apart.
    let mut q_out = if rng.below(2) == 0 { q.clone() } else { vec![f32::NAN; q.len()] };
    let in_place = !q_out[0].is_nan();
    let p = clsa_rope_append {
        batch: batch.raw(),
        n_head: n_head as i32,
        n_kv: n_kv as i32,
        d: d as i32,
        n_rot: n_rot as i32,
        interleaved: interleaved.into(),
        eps,
        q: if in_place { when(has_q, &q_out) } else { when(has_q, &q) },
        q_out: q_out.as_mut_ptr(),
        k: when(has_k, &k),
        v: when(has_v, &v),
        q_norm: when(has_norm, &q_norm),
        k_norm: when(has_norm, &k_norm),
        cos: when(has_rope, &cos),
        sin: when(has_rope, &sin),
        k_cache: if has_k { k_cache.rows } else { none },
        v_cache: if has_v { v_cache.rows } else { none },
    };
    run(ops, &p, 1 + rng.below(4));
    for r in 0..n {
        let angles = if has_rope { r * n_rot / 2..(r + 1) * n_rot / 2 } else { 0..0 };
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        let heads = |x: &[f32], norm: &[f32]| -> Vec<f32> {
            x.chunks(d).flat_map(|x| head(x, has_norm.then_some(norm), cos, sin, interleaved, eps)).collect()
        };
        if has_q {
            let wanted = heads(&q[r * n_head * d..][..n_head * d], &q_norm);
            let error = relative_error(&q_out[r * n_head * d..][..n_head * d], &wanted);
            assert!(error < 2e-6, "{}: q of row {r}: {error}", ops.level);
        }
        let (slot, pos) = (batch.slot[r] as usize, batch.pos[r] as usize);
        let stored = |pool: &mut Pool, what: &str, wanted: &[f32]| {
            let cache_type = pool.rows.type_ as u32;
            let bytes = pool.read(&batch, slot, pos, encode(wanted, cache_type).0.len());
            let error = relative_error(&decode(&bytes, cache_type), wanted);
            assert!(
                error < tolerance(cache_type),
                "{}: {what} of row {r}, type {cache_type}: {error}",
                ops.level
            );
            bytes
        };
        if has_k {
            stored(&mut k_cache, "k", &heads(&k[r * n_kv * d..][..n_kv * d], &k_norm));
        }
        if has_v {
            let values = &v[r * n_kv * d..][..n_kv * d];
            assert_eq!(
                stored(&mut v_cache, "v", values),
                encode(values, vt).0,
                "{}: exact rounding",
                ops.level
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn every_level_matches_the_equation(seed: u64) {
        Ops::all().for_each(|ops| matches_the_equation(ops, seed));
    }
}

#[test]
fn every_half_rounds_as_it_must() {
    // All halves, and the values between neighbours: ties go to even, beyond the largest is infinity.
    let halves: Vec<f32> = (0..0x7c00u16).map(|h| half::f16::from_bits(h).to_f32()).collect();
    let mut values: Vec<f32> = halves.windows(2).flat_map(|w| [w[0], (w[0] + w[1]) / 2.0, -w[1]]).collect();
    values.extend([65519.9, 65520.0, 1e30, f32::INFINITY, -f32::INFINITY, -0.0, 1e-8, 2e-8, 3e-8]);
    values.resize(values.len().next_multiple_of(256), 0.0);
    let rng = &mut Rng::new(1);
    for ops in Ops::all() {
        for v in values.chunks(256) {
            let batch = Batch::new(rng, &[(0, 1)]);
            let mut pool = Pool::new(rng, CLSA_F16, 256, 0, batch.n_pages());
            let p = clsa_rope_append {
                batch: batch.raw(),
                n_head: 1,
                n_kv: 1,
                d: 256,
                v: v.as_ptr(),
                v_cache: pool.rows,
                ..Default::default()
            };
            run(ops, &p, 1);
            let slot = batch.slot[0] as usize;
            assert_eq!(pool.read(&batch, slot, 0, 512), encode(v, CLSA_F16).0, "{}", ops.level);
        }
    }
}

#[test]
fn bad_parameters_are_refused() {
    let rng = &mut Rng::new(1);
    let batch = Batch::new(rng, &[(5, 3)]);
    let pool = Pool::new(rng, CLSA_F16, 64, 2, batch.n_slots);
    let v = rng.normals(3 * 64);
    let base = clsa_rope_append {
        batch: batch.raw(),
        n_head: 1,
        n_kv: 1,
        d: 64,
        v: v.as_ptr(),
        v_cache: pool.rows,
        ..Default::default()
    };
    let refused = |p: clsa_rope_append, what: &str| {
        let error = p.check().unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(base, "wraps within the batch");
    refused(clsa_rope_append { v: std::ptr::null(), ..base }, "a V cache without v");
    refused(clsa_rope_append { q: v.as_ptr(), ..base }, "q without q_out");
    refused(clsa_rope_append { cos: v.as_ptr(), ..base }, "one of cos and sin");
    refused(
        clsa_rope_append { cos: v.as_ptr(), sin: v.as_ptr(), n_rot: 66, ..base },
        "66 rotated dimensions",
    );
}

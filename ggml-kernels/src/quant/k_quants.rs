//! The slow ones of ggml's quantizers, Q2_K, Q4_K, Q5_K and Q6_K, sixteen sub-blocks at a time: the same bytes, an order faster.
//!
//! A sub-block's scale (and minimum) is searched by trying some twenty scales, each with a least-squares fit. ggml does one sub-block
//! after another in scalar code; here a lane has one, and a vector holds the values that sixteen sub-blocks have at one place.
use half::f16;

use super::lanes::{LANES, Lanes, Mask, both, nearest_int};

/// Values of a super-block.
const SUPER: usize = 256;

/// Splits `values`, [`LANES`] sub-blocks of N, into vectors of the values at each place.
#[inline(always)]
fn transposed<const N: usize>(values: &[f32]) -> [Lanes; N] {
    let mut out = [Lanes::splat(0.0); N];
    for (lane, sub) in values.chunks_exact(N).enumerate().take(LANES) {
        for (place, &value) in out.iter_mut().zip(sub) {
            place.0[lane] = value;
        }
    }
    out
}

/// What a search found for each sub-block: `x ~ scale * l - min`, with the integers `l = nearest(factor * (x - offset))`.
struct Fit {
    scale: Lanes,
    min: Lanes,
    factor: Lanes,
    offset: Lanes,
}

/// How the error of a fit is measured.
#[derive(Clone, Copy, PartialEq)]
enum Error {
    Square,
    Absolute,
}

impl Error {
    #[inline(always)]
    fn of(self, difference: Lanes) -> Lanes {
        match self {
            Self::Square => difference * difference,
            Self::Absolute => difference.map(f32::abs),
        }
    }
}

/// Weighted sum of the errors of `scale * l + min`, `l` computed by `level`.
#[inline(always)]
fn fit_error<const N: usize>(
    x: &[Lanes; N],
    w: &[Lanes; N],
    l: &[Lanes; N],
    scale: Lanes,
    min: Lanes,
    error: Error,
) -> Lanes {
    let mut sum = Lanes::splat(0.0);
    for i in 0..N {
        sum = sum + w[i] * error.of(scale * l[i] + min - x[i]);
    }
    sum
}

/// Scale and minimum of sub-blocks whose integers run from 0 to `n_max`: after the plain one, scales of
/// `n_max + first + 0.1 step` levels over the range are tried for each step.
#[inline(always)]
fn fit_scale_and_min<const N: usize>(
    x: &[Lanes; N],
    w: &[Lanes; N],
    n_max: i32,
    first: f32,
    steps: usize,
    error: Error,
) -> Fit {
    let (mut min, mut max) = (x[0], x[0]);
    let mut sum_w = w[0];
    let mut sum_x = sum_w * x[0];
    for i in 1..N {
        min = x[i].zip(min, |x, min| if x < min { x } else { min });
        max = x[i].zip(max, |x, max| if x > max { x } else { max });
        sum_w = sum_w + w[i];
        sum_x = sum_x + w[i] * x[i];
    }
    min = min.map(|m| if m > 0.0 { 0.0 } else { m });
    let flat = max.equal(min);
    let flat_min = min;

    let top = n_max as f32;
    let level = |x: Lanes, factor: Lanes, offset: Lanes| (factor * (x - offset)).nearest(0, n_max);
    let mut fit = Fit { scale: min, min, factor: Lanes::splat(top) / (max - min), offset: min };
    fit.scale = Lanes::splat(1.0) / fit.factor;
    let mut levels = [Lanes::splat(0.0); N];
    for i in 0..N {
        levels[i] = level(x[i], fit.factor, min);
    }
    let mut best = fit_error(x, w, &levels, fit.scale, min, error);
    for step in 0..=steps {
        let factor = Lanes::splat(first + 0.1 * step as f32 + top) / (max - min);
        let zero = Lanes::splat(0.0);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (zero, zero, zero);
        for i in 0..N {
            let l = level(x[i], factor, min);
            let wl = w[i] * l;
            levels[i] = l;
            sum_l = sum_l + wl;
            sum_l2 = sum_l2 + wl * l;
            sum_xl = sum_xl + wl * x[i];
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        let mut scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        let positive = zero.less(this_min);
        this_min = zero.select(positive, this_min);
        scale = (sum_xl / sum_l2).select(positive, scale);
        let error = fit_error(x, w, &levels, scale, this_min, error);
        let better = both(zero.less(determinant), error.less(best));
        best = error.select(better, best);
        fit.scale = scale.select(better, fit.scale);
        fit.factor = factor.select(better, fit.factor);
        fit.offset = min.select(better, fit.offset);
        // The next steps go on from the better minimum.
        min = this_min.select(better, min);
    }
    // A flat sub-block is its minimum; its levels are 0.
    let zero = Lanes::splat(0.0);
    fit.scale = zero.select(flat, fit.scale);
    fit.factor = zero.select(flat, fit.factor);
    fit.min = flat_min.select(flat, min).map(|m| -m);
    fit
}

/// Scale of sub-blocks whose integers run from `-n_max` to `n_max - 1`, by nineteen tries.
#[inline(always)]
fn fit_scale<const N: usize>(x: &[Lanes; N], n_max: i32) -> Fit {
    /// Below this, a sub-block counts as zero.
    const NOTHING: f32 = 1e-15;
    let zero = Lanes::splat(0.0);
    let (mut largest, mut extreme) = (zero, zero);
    for &v in x {
        let magnitude = v.map(f32::abs);
        let more = largest.less(magnitude);
        largest = magnitude.select(more, largest);
        extreme = v.select(more, extreme);
    }
    let nothing: Mask = largest.less(Lanes::splat(NOTHING));
    let top = n_max as f32;
    let sums = |factor: Lanes| {
        let (mut sum_xl, mut sum_l2) = (zero, zero);
        for &v in x {
            let l = (factor * v).nearest(-n_max, n_max - 1);
            let w = v * v;
            sum_xl = sum_xl + w * v * l;
            sum_l2 = sum_l2 + w * l * l;
        }
        (sum_xl, sum_l2)
    };
    let mut factor = Lanes::splat(-top) / extreme;
    let (sum_xl, sum_l2) = sums(factor);
    let mut scale = (sum_xl / sum_l2).zip(sum_l2, |s, l2| if l2 != 0.0 { s } else { 0.0 });
    let mut best = scale * sum_xl;
    for step in (-9..=9).filter(|&s| s != 0) {
        let tried = Lanes::splat(-(top + 0.1 * step as f32)) / extreme;
        let (sum_xl, sum_l2) = sums(tried);
        let better = both(zero.less(sum_l2), (best * sum_l2).less(sum_xl * sum_xl));
        scale = (sum_xl / sum_l2).select(better, scale);
        best = (scale * sum_xl).select(better, best);
        factor = tried.select(better, factor);
    }
    // The levels of a zero sub-block are the lowest, as ggml has them: far below any value.
    let offset = Lanes::splat(1e3).select(nothing, zero);
    let factor = Lanes::splat(1.0).select(nothing, factor);
    Fit { scale: zero.select(nothing, scale), min: zero, factor, offset }
}

/// Integers of a super-block: by the rounded scale `d` (times minus `dm`) of each sub-block, or, where that is zero, by the fit.
fn levels<const N: usize>(
    x: &[f32],
    fit: &Fit,
    first_lane: usize,
    (low, high): (i32, i32),
    rounded: impl Fn(usize) -> (f32, f32),
) -> [i32; SUPER] {
    let mut out = [0; SUPER];
    for (j, (x, out)) in x.chunks_exact(N).zip(out.chunks_exact_mut(N)).enumerate() {
        let (d, dm) = rounded(j);
        let (factor, offset) = (fit.factor.0[first_lane + j], fit.offset.0[first_lane + j]);
        for (&x, l) in x.iter().zip(out) {
            let exact = if d != 0.0 { (x + dm) / d } else { factor * (x - offset) };
            *l = nearest_int(exact).max(low).min(high);
        }
    }
    out
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, &v| if v > most { v } else { most })
}

/// Rounds to f16; returns its bytes and what it stands for.
fn half(value: f32) -> ([u8; 2], f32) {
    let half = f16::from_f32(value);
    (half.to_bits().to_le_bytes(), half.to_f32())
}

/// Weights of Q4_K and Q5_K: the deviation of the sub-block plus the magnitude of the value.
#[inline(always)]
fn deviation_weights<const N: usize>(x: &[Lanes; N]) -> [Lanes; N] {
    let mut sum = Lanes::splat(0.0);
    for &v in x {
        sum = sum + v * v;
    }
    let deviation = (sum / N as f32).map(f32::sqrt);
    let mut out = *x;
    for w in &mut out {
        *w = deviation + w.map(f32::abs);
    }
    out
}

/// Quantizes two super-blocks to Q4_K (16 levels) or Q5_K (32 levels).
fn fit_eight(x: &[f32], n_max: i32) -> Fit {
    let places: [Lanes; 32] = transposed(x);
    let weights = deviation_weights(&places);
    match n_max {
        15 => fit_scale_and_min(&places, &weights, 15, -1.0, 20, Error::Square),
        _ => fit_scale_and_min(&places, &weights, 31, -0.5, 15, Error::Square),
    }
}

/// Scales and minimums of 8 sub-blocks in 6 bits each, and the super-block's own scale and minimum; returns the integers.
fn put_six_bit_scales(x: &[f32], fit: &Fit, first_lane: usize, n_max: i32, out: &mut [u8]) -> [i32; SUPER] {
    let (scales, mins) = (&fit.scale.0[first_lane..][..8], &fit.min.0[first_lane..][..8]);
    let (most_scale, most_min) = (largest(scales), largest(mins));
    let inverse = |most: f32| if most > 0.0 { 63.0 / most } else { 0.0 };
    let six = |value: f32, inverse: f32| (nearest_int(inverse * value) as u8).min(63);
    let (d_bytes, d) = half(most_scale / 63.0);
    let (m_bytes, m) = half(most_min / 63.0);
    out[..2].copy_from_slice(&d_bytes);
    out[2..4].copy_from_slice(&m_bytes);
    let packed = &mut out[4..16];
    packed.fill(0);
    let mut rounded = [(0.0, 0.0); 8];
    for j in 0..8 {
        let (ls, lm) = (six(scales[j], inverse(most_scale)), six(mins[j], inverse(most_min)));
        if j < 4 {
            packed[j] = ls;
            packed[j + 4] = lm;
        } else {
            packed[j + 4] = (ls & 15) | (lm & 15) << 4;
            packed[j - 4] |= ls >> 4 << 6;
            packed[j] |= lm >> 4 << 6;
        }
        rounded[j] = (d * f32::from(ls), m * f32::from(lm));
    }
    levels::<32>(x, fit, first_lane, (0, n_max), |j| rounded[j])
}

/// Q4_K: two super-blocks of `x` to 2 x 144 bytes.
pub(super) fn q4_k(x: &[f32; 2 * SUPER], out: &mut [u8]) {
    let fit = fit_eight(x, 15);
    for (b, (x, out)) in x.chunks_exact(SUPER).zip(out.chunks_exact_mut(144)).enumerate() {
        let l = put_six_bit_scales(x, &fit, 8 * b, 15, out);
        for (q, l) in out[16..].chunks_exact_mut(32).zip(l.chunks_exact(64)) {
            for i in 0..32 {
                q[i] = (l[i] | l[i + 32] << 4) as u8;
            }
        }
    }
}

/// Q5_K: two super-blocks of `x` to 2 x 176 bytes.
pub(super) fn q5_k(x: &[f32; 2 * SUPER], out: &mut [u8]) {
    let fit = fit_eight(x, 31);
    for (b, (x, out)) in x.chunks_exact(SUPER).zip(out.chunks_exact_mut(176)).enumerate() {
        let l = put_six_bit_scales(x, &fit, 8 * b, 31, out);
        let (high, low) = out[16..].split_at_mut(32);
        high.fill(0);
        for (part, (q, l)) in low.chunks_exact_mut(32).zip(l.chunks_exact(64)).enumerate() {
            for i in 0..32 {
                q[i] = (l[i] & 15 | (l[i + 32] & 15) << 4) as u8;
                high[i] |= ((l[i] >> 4 | l[i + 32] >> 4 << 1) << (2 * part)) as u8;
            }
        }
    }
}

/// Q6_K: a super-block of `x` to 210 bytes.
pub(super) fn q6_k(x: &[f32; SUPER], out: &mut [u8]) {
    let places: [Lanes; 16] = transposed(x);
    let fit = fit_scale(&places, 32);
    let mut most = 0.0f32;
    for &scale in &fit.scale.0 {
        if scale.abs() > most.abs() {
            most = scale;
        }
    }
    if most.abs() < 1e-15 {
        out.fill(0);
        return;
    }
    let inverse = -128.0 / most;
    let (d_bytes, d) = half(1.0 / inverse);
    let mut scales = [0i8; 16];
    for (s, &scale) in scales.iter_mut().zip(&fit.scale.0) {
        *s = nearest_int(inverse * scale).min(127) as i8;
    }
    let l = levels::<16>(x, &fit, 0, (-32, 31), |j| (d * f32::from(scales[j]), 0.0));
    let (low, rest) = out.split_at_mut(128);
    let (high, rest) = rest.split_at_mut(64);
    for ((low, high), l) in low.chunks_exact_mut(64).zip(high.chunks_exact_mut(32)).zip(l.chunks_exact(128)) {
        for i in 0..32 {
            let q = [l[i] + 32, l[i + 32] + 32, l[i + 64] + 32, l[i + 96] + 32];
            low[i] = (q[0] & 15 | (q[2] & 15) << 4) as u8;
            low[i + 32] = (q[1] & 15 | (q[3] & 15) << 4) as u8;
            high[i] = (q[0] >> 4 | q[1] >> 4 << 2 | q[2] >> 4 << 4 | q[3] >> 4 << 6) as u8;
        }
    }
    for (byte, s) in rest.iter_mut().zip(scales) {
        *byte = s as u8;
    }
    rest[16..].copy_from_slice(&d_bytes);
}

/// Q2_K: a super-block of `x` to 84 bytes.
pub(super) fn q2_k(x: &[f32; SUPER], out: &mut [u8]) {
    let places: [Lanes; 16] = transposed(x);
    let mut weights = places;
    for w in &mut weights {
        *w = w.map(f32::abs);
    }
    let fit = fit_scale_and_min(&places, &weights, 3, -0.5, 15, Error::Absolute);
    let (most_scale, most_min) = (largest(&fit.scale.0), largest(&fit.min.0));
    let inverse = |most: f32| if most > 0.0 { 15.0 / most } else { 0.0 };
    let (d_bytes, d) = half(if most_scale > 0.0 { most_scale / 15.0 } else { 0.0 });
    let (m_bytes, m) = half(if most_min > 0.0 { most_min / 15.0 } else { 0.0 });
    let (scales, rest) = out.split_at_mut(16);
    let mut rounded = [(0.0, 0.0); 16];
    for j in 0..16 {
        let ls = nearest_int(inverse(most_scale) * fit.scale.0[j]) as u8;
        let lm = nearest_int(inverse(most_min) * fit.min.0[j]) as u8;
        scales[j] = ls | lm << 4;
        rounded[j] = (d * f32::from(scales[j] & 15), m * f32::from(scales[j] >> 4));
    }
    let l = levels::<16>(x, &fit, 0, (0, 3), |j| rounded[j]);
    for (q, l) in rest.chunks_exact_mut(32).zip(l.chunks_exact(128)) {
        for i in 0..32 {
            q[i] = (l[i] | l[i + 32] << 2 | l[i + 64] << 4 | l[i + 96] << 6) as u8;
        }
    }
    rest[64..66].copy_from_slice(&d_bytes);
    rest[66..68].copy_from_slice(&m_bytes);
}

//! Passes over all logits, written so that compilers make SIMD of them. Each is a fixed order of IEEE operations: the same
//! result on every platform.
use super::{Error, Result};

const LANES: usize = 16;

/// e^x for x <= 0, to 2 units in the last place; 0 below -87, where f32 becomes subnormal.
#[must_use]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves no bits for a fraction
    let x = x.max(-88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    // ln 2 in two parts, the first exact when multiplied by n.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    // Minimax polynomial of e^r on [-ln 2 / 2, ln 2 / 2] (Cephes' expf).
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let p = p * (r * r) + r + 1.0;
    // n is in the low bits of `rounded`; 2^n has n + 127 as its exponent.
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

/// The largest logit.
///
/// # Errors
/// [`Error::NotFinite`] when one is NaN or +inf; -inf is a token that may not come.
pub(super) fn max(logits: &[f32]) -> Result<f32> {
    let mut top = [f32::NEG_INFINITY; LANES];
    let mut bad = [0u32; LANES];
    let mut take = |values: &[f32]| {
        for (i, x) in values.iter().enumerate() {
            top[i] = if *x > top[i] { *x } else { top[i] };
            bad[i] |= u32::from(x.is_nan() | (*x == f32::INFINITY));
        }
    };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    chunks.iter().for_each(|chunk| take(chunk));
    take(rest);
    if bad.iter().any(|b| *b != 0) {
        let at = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY).unwrap_or_default();
        return Err(Error::NotFinite { id: at, value: logits[at] });
    }
    Ok(top.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// The lowest id with the largest logit.
pub(super) fn argmax(logits: &[f32]) -> Result<u32> {
    let top = max(logits)?;
    if top == f32::NEG_INFINITY {
        return Err(Error::NothingLeft);
    }
    const BLOCK: usize = 64;
    let mut blocks = logits.chunks(BLOCK).zip((0u32..).step_by(BLOCK));
    let block = blocks.find(|(block, _)| block.iter().fold(false, |any, x| any | (*x == top)));
    let found = block.and_then(|(block, first)| (first..).zip(block).find(|(_, x)| **x == top));
    found.map(|(id, _)| id).ok_or(Error::NothingLeft)
}

/// The sum of e^(x - top) over all logits.
pub(super) fn sum_exp(logits: &[f32], top: f32) -> f64 {
    sum(logits, |x| exp(x - top))
}

/// Mean and standard deviation of the logits that are not -inf.
pub(super) fn moments(logits: &[f32]) -> (f64, f64) {
    let finite = |x: f32| x > f32::NEG_INFINITY;
    let count = sum(logits, |x| f32::from(u8::from(finite(x))));
    let mean = sum(logits, |x| if finite(x) { x } else { 0.0 }) / count;
    let centre = mean as f32;
    let square = |x: f32| if finite(x) { (x - centre) * (x - centre) } else { 0.0 };
    (mean, (sum(logits, square) / count).sqrt())
}

/// The sum of `f` of each value: in f32 over stretches of 1024, in f64 over those.
pub(super) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0.0;
    for stretch in values.chunks(1024) {
        let mut lanes = [0f32; LANES];
        let (chunks, rest) = stretch.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += f(*x);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += f(*x);
        }
        total += lanes.iter().map(|x| f64::from(*x)).sum::<f64>();
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exp_is_accurate_to_two_units() {
        let mut x = 0f32;
        let mut worst = 0f64;
        while x > -87.0 {
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
            x -= 0.000_731;
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(-87.1), exp(-1e30), exp(f32::NEG_INFINITY)), (0.0, 0.0, 0.0));
    }

    #[test]
    fn what_is_not_finite_is_named() {
        for value in [f32::NAN, f32::INFINITY] {
            for at in [0, 15, 16, 36] {
                let mut logits = [0.5; 37];
                logits[at] = value;
                assert!(matches!(max(&logits), Err(Error::NotFinite { id, .. }) if id == at));
            }
        }
        assert!(matches!(argmax(&[f32::NEG_INFINITY; 40]), Err(Error::NothingLeft)));
        assert!(matches!(argmax(&[]), Err(Error::NothingLeft)));
    }

    proptest! {
        #[test]
        fn passes_equal_the_naive_ones(logits in proptest::collection::vec(prop_oneof![
            9 => -20f32..20.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(3.0)], 1..3000)) {
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(max(&logits).unwrap(), top);
            prop_assume!(top > f32::NEG_INFINITY);
            prop_assert_eq!(argmax(&logits).unwrap() as usize, logits.iter().position(|x| *x == top).unwrap());
            let exact: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
            prop_assert!((sum_exp(&logits, top) / exact - 1.0).abs() < 1e-6);
            let finite: Vec<f64> = logits.iter().filter(|x| x.is_finite()).map(|x| f64::from(*x)).collect();
            let mean = finite.iter().sum::<f64>() / finite.len() as f64;
            let var = finite.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / finite.len() as f64;
            let (m, s) = moments(&logits);
            prop_assert!((m - mean).abs() < 1e-4 && (s - var.sqrt()).abs() < 1e-4, "{m} {mean} {s} {var}");
        }
    }
}

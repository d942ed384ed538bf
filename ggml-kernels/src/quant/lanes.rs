//! Sixteen values at a time: each operation is one loop that compiles to vector instructions.
//!
//! Nothing is contracted or reassociated, so a lane computes bit for bit what scalar code does.
#![allow(clippy::needless_range_loop, reason = "counted loops over arrays are what becomes vector code")]
use std::ops::{Add, Div, Mul, Sub};

/// Number of lanes.
pub(super) const LANES: usize = 16;

/// One value per lane.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Lanes(pub [f32; LANES]);

/// One condition per lane.
pub(super) type Mask = [bool; LANES];

macro_rules! operator {
    ($($name:ident $method:ident $op:tt;)*) => {$(
        impl $name for Lanes {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, |a, b| a $op b)
            }
        }
        impl $name<f32> for Lanes {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: f32) -> Self {
                self.map(|a| a $op other)
            }
        }
    )*};
}
operator! { Add add +; Sub sub -; Mul mul *; Div div /; }

impl Lanes {
    /// The same value in each lane.
    #[inline(always)]
    pub fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    pub fn map(self, f: impl Fn(f32) -> f32) -> Self {
        let mut out = [0.0; LANES];
        for (o, v) in out.iter_mut().zip(self.0) {
            *o = f(v);
        }
        Self(out)
    }

    #[inline(always)]
    pub fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = f(self.0[i], other.0[i]);
        }
        Self(out)
    }

    /// Where `self < other`.
    #[inline(always)]
    pub fn less(self, other: Self) -> Mask {
        let mut mask = [false; LANES];
        for i in 0..LANES {
            mask[i] = self.0[i] < other.0[i];
        }
        mask
    }

    /// Where `self == other`.
    #[inline(always)]
    pub fn equal(self, other: Self) -> Mask {
        let mut mask = [false; LANES];
        for i in 0..LANES {
            mask[i] = self.0[i] == other.0[i];
        }
        mask
    }

    /// `self` where the mask is set, else `other`.
    #[inline(always)]
    pub fn select(self, mask: Mask, other: Self) -> Self {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = if mask[i] { self.0[i] } else { other.0[i] };
        }
        Self(out)
    }

    /// The nearest integer within `low..=high`, ties to even.
    #[inline(always)]
    pub fn nearest(self, low: i32, high: i32) -> Self {
        self.map(|v| nearest_int(v).max(low).min(high) as f32)
    }
}

/// Where both are set.
#[inline(always)]
pub(super) fn both(a: Mask, b: Mask) -> Mask {
    let mut mask = [false; LANES];
    for i in 0..LANES {
        mask[i] = a[i] & b[i];
    }
    mask
}

/// The nearest integer, ties to even, of values within +-2^22; beyond, the same wrong ones as ggml's.
#[inline(always)]
pub(super) fn nearest_int(value: f32) -> i32 {
    // Adding 1.5 * 2^23 leaves the integer in the low bits of the mantissa.
    let bits = (value + 12_582_912.0).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}

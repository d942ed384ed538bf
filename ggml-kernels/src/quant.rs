//! ggml's tensor types and quantizers behind a safe interface.
//!
//! A row of `n` values (`n` divisible by [`Type::block_len`]) is stored as `n / block_len` blocks of [`Type::block_bytes`] bytes.
//! Rows are quantized independently of each other, so any split of a tensor into whole rows gives the same bytes.
mod k_quants;
mod lanes;

use std::{fmt, str::FromStr};

use half::{f16, slice::HalfFloatSliceExt};

use crate::ggml;

macro_rules! types {
    ($($variant:ident = $number:literal, $block:literal, $bytes:literal, $doc:literal;)*) => {
        /// A tensor type of ggml that this project reads and writes.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Type {
            $(#[doc = $doc] $variant = $number,)*
        }

        impl Type {
            /// Every type, in the order of ggml's numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The type with this number in ggml (and in a GGUF file); `None` for one we do not handle.
            #[must_use]
            pub const fn from_ggml(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }
            /// Values in a block.
            #[must_use]
            pub const fn block_len(self) -> usize {
                match self { $(Self::$variant => $block,)* }
            }
            /// Bytes of a block.
            #[must_use]
            pub const fn block_bytes(self) -> usize {
                match self { $(Self::$variant => $bytes,)* }
            }
            /// The name that users know, in upper case: `Q4_K`, `BF16`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }
        }
    };
}

types! {
    F32 = 0, 1, 4, "32-bit floats.";
    F16 = 1, 1, 2, "IEEE half floats.";
    Q4_0 = 2, 32, 18, "4 bits, blocks of 32 with one scale.";
    Q4_1 = 3, 32, 20, "4 bits, blocks of 32 with scale and minimum.";
    Q5_0 = 6, 32, 22, "5 bits, blocks of 32 with one scale.";
    Q5_1 = 7, 32, 24, "5 bits, blocks of 32 with scale and minimum.";
    Q8_0 = 8, 32, 34, "8 bits, blocks of 32 with one scale.";
    Q2_K = 10, 256, 84, "2 bits, super-blocks of 256.";
    Q3_K = 11, 256, 110, "3 bits, super-blocks of 256.";
    Q4_K = 12, 256, 144, "4 bits, super-blocks of 256.";
    Q5_K = 13, 256, 176, "5 bits, super-blocks of 256.";
    Q6_K = 14, 256, 210, "6 bits, super-blocks of 256.";
    IQ4_NL = 20, 32, 18, "4 bits on a non-linear grid, blocks of 32.";
    IQ4_XS = 23, 256, 136, "4 bits on a non-linear grid, super-blocks of 256.";
    BF16 = 30, 1, 2, "bfloat16.";
}

impl Type {
    /// ggml's number of this type.
    #[must_use]
    pub const fn to_ggml(self) -> u32 {
        self as u32
    }

    /// Bytes of a row of `n` values; `None` when `n` is not whole blocks or the product overflows.
    #[must_use]
    pub const fn row_bytes(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(self.block_len()) {
            return None;
        }
        (n / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether values are stored in blocks with scales, not as floats.
    #[must_use]
    pub const fn is_quantized(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Mean bits of a value.
    #[must_use]
    pub const fn bits_per_weight(self) -> f64 {
        (self.block_bytes() * 8) as f64 / self.block_len() as f64
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A type name that is none of [`Type::ALL`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown tensor type {0:?}: expected one of {list}", list = Type::ALL.iter().map(|t| t.name()).collect::<Vec<_>>().join(", "))]
pub struct UnknownType(
    /// What was found.
    pub String,
);

impl FromStr for Type {
    type Err = UnknownType;
    /// Case-insensitive.
    fn from_str(s: &str) -> Result<Self, UnknownType> {
        let found = Self::ALL.iter().find(|t| t.name().eq_ignore_ascii_case(s));
        found.copied().ok_or_else(|| UnknownType(s.to_owned()))
    }
}

/// Number of rows in `len` values, asserted to be whole.
fn rows(len: usize, n_per_row: usize) -> usize {
    assert!(n_per_row > 0 && len.is_multiple_of(n_per_row), "{len} values are not rows of {n_per_row}");
    len / n_per_row
}

/// Quantizes rows of `n_per_row` values into `out`.
///
/// `imatrix` weighs the squared error of each column (`n_per_row` values); float types ignore it. Values must be finite and
/// smaller than 1e18 (ggml squares them); those beyond what an f16 scale can express give blocks that [`is_finite`] refuses.
///
/// # Panics
/// When `src` is not whole rows, a row is not whole blocks, or `out` or `imatrix` has another length than the rows need.
pub fn quantize(ty: Type, src: &[f32], n_per_row: usize, imatrix: Option<&[f32]>, out: &mut [u8]) {
    let n_rows = rows(src.len(), n_per_row);
    let row_bytes = ty.row_bytes(n_per_row).expect("a row is whole blocks");
    assert_eq!(
        out.len(),
        n_rows.checked_mul(row_bytes).expect("size fits"),
        "bytes of {n_rows} rows of {ty}"
    );
    if let Some(weights) = imatrix {
        assert_eq!(weights.len(), n_per_row, "one importance per column");
    }
    match ty {
        Type::F32 => {
            for (bytes, value) in out.chunks_exact_mut(4).zip(src) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
        Type::F16 => narrow(src, out),
        Type::BF16 => {
            for (bytes, value) in out.chunks_exact_mut(2).zip(src) {
                bytes.copy_from_slice(&bf16_bits(*value).to_le_bytes());
            }
        }
        Type::Q2_K if imatrix.is_none() => super_blocks(ty, src, out, k_quants::q2_k),
        Type::Q4_K if imatrix.is_none() => super_blocks(ty, src, out, k_quants::q4_k),
        Type::Q5_K if imatrix.is_none() => super_blocks(ty, src, out, k_quants::q5_k),
        Type::Q6_K if imatrix.is_none() => super_blocks(ty, src, out, k_quants::q6_k),
        _ => quantize_ggml(ty, src, n_per_row, imatrix, out),
    }
}

/// [`quantize`] by ggml itself; the caller has checked all lengths.
fn quantize_ggml(ty: Type, src: &[f32], n_per_row: usize, imatrix: Option<&[f32]>, out: &mut [u8]) {
    let n_rows = src.len() / n_per_row;
    let weights = imatrix.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: the assertions above give ggml `n_rows` whole rows to read, `n_rows * row_bytes` bytes to write and
    // `n_per_row` weights (or null, which every type of ours takes). The quantizers share no mutable state, and blocks have
    // 2-byte alignment at most, which ggml reads and writes through unaligned-tolerant instructions on x86 and ARM.
    let written = unsafe {
        ggml::ggml_quantize_chunk(
            ty.to_ggml(),
            src.as_ptr(),
            out.as_mut_ptr().cast(),
            0,
            n_rows as i64,
            n_per_row as i64,
            weights,
        )
    };
    assert_eq!(written, out.len(), "ggml wrote the bytes of {n_rows} rows of {ty}");
}

/// Quantizes `N` values at a time; what is left at the end is padded with zeros. Rows are whole super-blocks, so their ends do not
/// matter.
fn super_blocks<const N: usize>(
    ty: Type,
    src: &[f32],
    out: &mut [u8],
    quantize: impl Fn(&[f32; N], &mut [u8]),
) {
    let bytes = N / ty.block_len() * ty.block_bytes();
    let (whole, rest) = src.as_chunks::<N>();
    let (whole_out, rest_out) = out.split_at_mut(whole.len() * bytes);
    for (values, out) in whole.iter().zip(whole_out.chunks_exact_mut(bytes)) {
        quantize(values, out);
    }
    if !rest.is_empty() {
        let (mut values, mut padded) = ([0.0; N], vec![0; bytes]);
        values[..rest.len()].copy_from_slice(rest);
        quantize(&values, &mut padded);
        rest_out.copy_from_slice(&padded[..rest_out.len()]);
    }
}

/// The nearest bfloat16, ties to even; a NaN stays one.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) as u16 | 0x40 } else { rounded }
}

/// Converts `src` to half floats through a small buffer, because `out` may have any alignment.
fn narrow(src: &[f32], out: &mut [u8]) {
    const CHUNK: usize = 1024;
    let mut buffer = [f16::ZERO; CHUNK];
    for (from, to) in src.chunks(CHUNK).zip(out.chunks_mut(2 * CHUNK)) {
        let buffer = &mut buffer[..from.len()];
        buffer.convert_from_f32_slice(from);
        for (bytes, value) in to.chunks_exact_mut(2).zip(&*buffer) {
            bytes.copy_from_slice(&value.to_bits().to_le_bytes());
        }
    }
}

/// Expands blocks to floats.
///
/// # Panics
/// When `bytes` is not exactly the blocks of `out.len()` values.
pub fn dequantize(ty: Type, bytes: &[u8], out: &mut [f32]) {
    let expected = ty.row_bytes(out.len()).expect("the values are whole blocks");
    assert_eq!(bytes.len(), expected, "bytes of {} values of {ty}", out.len());
    match ty {
        Type::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        Type::F16 => widen(bytes, out),
        Type::BF16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16);
            }
        }
        _ => {
            // SAFETY: `ggml_get_type_traits` returns a static table entry for every number below GGML_TYPE_COUNT, which ours are.
            let to_float = unsafe { (*ggml::ggml_get_type_traits(ty.to_ggml())).to_float };
            let to_float = to_float.expect("ggml can expand every quantized type of ours");
            // SAFETY: `bytes` holds exactly the blocks of `out.len()` values, as asserted above; see `quantize` on alignment.
            unsafe { to_float(bytes.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64) };
        }
    }
}

/// The reverse of [`narrow`].
fn widen(bytes: &[u8], out: &mut [f32]) {
    const CHUNK: usize = 1024;
    let mut buffer = [f16::ZERO; CHUNK];
    for (from, to) in bytes.chunks(2 * CHUNK).zip(out.chunks_mut(CHUNK)) {
        let buffer = &mut buffer[..to.len()];
        for (value, bytes) in buffer.iter_mut().zip(from.chunks_exact(2)) {
            *value = f16::from_bits(u16::from_le_bytes([bytes[0], bytes[1]]));
        }
        buffer.convert_to_f32_slice(to);
    }
}

impl Type {
    /// Where in a block its f16 scales (and minimums) are.
    const fn scales(self) -> &'static [usize] {
        match self {
            Self::F32 | Self::BF16 => &[],
            Self::F16 | Self::Q4_0 | Self::Q5_0 | Self::Q8_0 | Self::IQ4_NL | Self::IQ4_XS => &[0],
            Self::Q4_1 | Self::Q5_1 | Self::Q4_K | Self::Q5_K => &[0, 2],
            Self::Q2_K => &[80, 82],
            Self::Q3_K => &[108],
            Self::Q6_K => &[208],
        }
    }
}

/// Whether blocks hold only finite scales and values: what [`quantize`] gives when a value was too large for the type's f16 scale
/// (or for f16 itself) does not.
///
/// # Panics
/// When `bytes` is not whole blocks.
#[must_use]
pub fn is_finite(ty: Type, bytes: &[u8]) -> bool {
    assert!(
        bytes.len().is_multiple_of(ty.block_bytes()),
        "{} bytes are not whole blocks of {ty}",
        bytes.len()
    );
    // An exponent of all ones is an infinity or NaN.
    let has_exponent = |bits: u32, mask: u32| bits & mask == mask;
    match ty {
        Type::F32 => !bytes
            .chunks_exact(4)
            .any(|b| has_exponent(u32::from_le_bytes([b[0], b[1], b[2], b[3]]), 0x7f80_0000)),
        Type::BF16 => {
            !bytes.chunks_exact(2).any(|b| has_exponent(u16::from_le_bytes([b[0], b[1]]).into(), 0x7f80))
        }
        _ => !bytes.chunks_exact(ty.block_bytes()).any(|block| {
            let scale = |&at: &usize| u16::from_le_bytes([block[at], block[at + 1]]);
            ty.scales().iter().any(|at| has_exponent(scale(at).into(), 0x7c00))
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn table_is_ggmls() {
        for &ty in Type::ALL {
            // SAFETY: plain table look-ups by a number that ggml knows.
            let (block, bytes) =
                unsafe { (ggml::ggml_blck_size(ty.to_ggml()), ggml::ggml_type_size(ty.to_ggml())) };
            assert_eq!((ty.block_len() as i64, ty.block_bytes()), (block, bytes), "{ty}");
            assert_eq!(Type::from_ggml(ty.to_ggml()), Some(ty));
            assert_eq!(ty.name().to_lowercase().parse(), Ok(ty));
            // SAFETY: ggml returns a static NUL-terminated name.
            let name = unsafe { std::ffi::CStr::from_ptr(ggml::ggml_type_name(ty.to_ggml())) };
            assert!(name.to_str().unwrap().eq_ignore_ascii_case(ty.name()), "{name:?}");
        }
        assert_eq!(Type::from_ggml(4), None);
        assert!("Q4_2".parse::<Type>().unwrap_err().to_string().contains("IQ4_XS"));
    }

    #[test]
    fn row_bytes_checks_blocks_and_overflow() {
        assert_eq!(Type::Q4_K.row_bytes(512), Some(288));
        assert_eq!(Type::Q4_K.row_bytes(320), None);
        assert_eq!(Type::Q4_0.row_bytes(0), Some(0));
        assert_eq!(Type::F32.row_bytes(usize::MAX), None);
    }

    /// Root mean square error over root mean square, for values of a smooth deterministic wave.
    fn relative_error(ty: Type, imatrix: Option<&[f32]>) -> f64 {
        let src: Vec<f32> =
            (0..4 * 512).map(|i| (i as f32 * 0.37).sin() + (i as f32 * 0.011).cos() * 0.5).collect();
        let mut bytes = vec![0; 4 * ty.row_bytes(512).unwrap()];
        quantize(ty, &src, 512, imatrix, &mut bytes);
        assert!(is_finite(ty, &bytes));
        let mut back = vec![0.0; src.len()];
        dequantize(ty, &bytes, &mut back);
        let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
        let error = square(&mut src.iter().zip(&back).map(|(a, b)| f64::from(a - b)));
        (error / square(&mut src.iter().map(|&x| f64::from(x)))).sqrt()
    }

    #[test]
    fn errors_are_as_small_as_the_bits_allow() {
        for &ty in Type::ALL {
            // Half a step of a uniform grid over +-2.5 sigma, in units of sigma, is a generous bound.
            let bound = match ty {
                Type::F32 => 0.0,
                Type::F16 => 5e-4,
                Type::BF16 => 4e-3,
                _ => 2.5 / f64::from(1 << (ty.bits_per_weight() as u32)),
            };
            let plain = relative_error(ty, None);
            assert!(plain <= bound, "{ty}: {plain} > {bound}");
            let weights = vec![1.0; 512];
            let weighted = relative_error(ty, Some(&weights));
            assert!(weighted <= bound, "{ty} with an importance matrix: {weighted} > {bound}");
        }
    }

    /// Any two bytes of a block made an infinity: finite or not as ggml says.
    #[test]
    fn scales_are_where_ggml_has_them() {
        for &ty in Type::ALL {
            let mut bytes = vec![0; ty.block_bytes() * 3];
            for at in ty.block_bytes()..ty.block_bytes() * 2 - 1 {
                bytes[at..at + 2].copy_from_slice(&[0x80, 0x7f]);
                // SAFETY: ggml reads the whole blocks of `bytes` only.
                let theirs =
                    unsafe { ggml::ggml_validate_row_data(ty.to_ggml(), bytes.as_ptr().cast(), bytes.len()) };
                assert_eq!(is_finite(ty, &bytes), theirs, "{ty} {at}");
                bytes[at..at + 2].fill(0);
            }
        }
    }

    #[test]
    fn overflow_is_not_finite() {
        for ty in [Type::F16, Type::Q8_0, Type::Q4_0, Type::Q4_K, Type::Q6_K] {
            let mut bytes = vec![0; ty.row_bytes(256).unwrap()];
            quantize(ty, &[1e15; 256], 256, None, &mut bytes);
            assert!(!is_finite(ty, &bytes), "{ty}");
        }
    }

    #[test]
    #[should_panic(expected = "not rows")]
    fn ragged_rows_are_refused() {
        quantize(Type::F32, &[0.0; 5], 4, None, &mut [0; 20]);
    }

    #[test]
    #[should_panic(expected = "whole blocks")]
    fn partial_blocks_are_refused() {
        quantize(Type::Q8_0, &[0.0; 48], 48, None, &mut [0; 51]);
    }

    #[test]
    #[should_panic(expected = "bytes of")]
    fn short_output_is_refused() {
        quantize(Type::Q8_0, &[0.0; 64], 64, None, &mut [0; 67]);
    }

    #[test]
    #[should_panic(expected = "bytes of")]
    fn short_input_is_refused() {
        dequantize(Type::Q8_0, &[0; 33], &mut [0.0; 32]);
    }

    /// Values of many scales: some sub-blocks flat, some zero, some of one sign, some tiny, some huge.
    fn varied(seed: u64, blocks: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let mut out = Vec::new();
        for _ in 0..blocks * 16 {
            let (kind, exponent) = (next() % 12, next() % 60);
            let scale = match kind {
                0 => 0.0,
                1 => 2f32.powi(exponent as i32 - 80),
                2 => 2f32.powi(exponent as i32 - 30),
                _ => 2f32.powi(exponent as i32 % 8 - 6),
            };
            for _ in 0..16 {
                let v = (f64::from(next()) / f64::from(u32::MAX >> 1) - 0.5) as f32 * scale;
                out.push(match kind {
                    3 => scale,
                    4 => v.abs(),
                    5 => -v.abs(),
                    6 if next() % 4 != 0 => 0.0,
                    7 => (v * 8.0).round() / 8.0,
                    _ => v,
                });
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn fast_quantizers_give_the_bytes_of_ggml(seed in any::<u64>(), blocks in 1usize..6) {
            let values = varied(seed, blocks);
            for &ty in Type::ALL {
                let row = ty.row_bytes(256).unwrap() * blocks;
                let (mut ours, mut theirs) = (vec![0; row], vec![1; row]);
                quantize(ty, &values, 256, None, &mut ours);
                quantize_ggml(ty, &values, 256, None, &mut theirs);
                let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
                prop_assert_eq!(differs, None, "{} of {} blocks", ty, blocks);
            }
        }

        #[test]
        fn rows_are_independent(seed in any::<u32>(), split in 1usize..4, which in 0..Type::ALL.len()) {
            let ty = Type::ALL[which];
            let src: Vec<f32> = (0..4 * 256u32)
                .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e6 - 8.0)
                .collect();
            let row = ty.row_bytes(256).unwrap();
            let (mut whole, mut parts) = (vec![0; 4 * row], vec![0; 4 * row]);
            quantize(ty, &src, 256, None, &mut whole);
            let (head, tail) = parts.split_at_mut(split * row);
            quantize(ty, &src[..split * 256], 256, None, head);
            quantize(ty, &src[split * 256..], 256, None, tail);
            prop_assert_eq!(whole, parts);
        }
    }
}

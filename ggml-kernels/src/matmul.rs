//! Matrix products with quantized weights: `y[r][o] = sum_i W[o][i] x[r][i]` (include/matmul.h has the contract).
//!
//! Two ops of [`crate::ops`]: [`clsa_pack`] puts the rows of x into the form that products read, [`clsa_matmul`] does one to four
//! products of the same rows. A caller with a graph of ops does, per layer:
//!
//! | op | rows | prologue | matrices | epilogue |
//! |---|---|---|---|---|
//! | pack | many only | `norm`: RMS norm of x | | |
//! | matmul | | `norm`, few rows | q, k, v | |
//! | matmul | | | o | `add`: the residual stream, in place |
//! | pack | many only | `norm` | | |
//! | matmul | | `norm`, few rows | gate, up | `CLSA_EPILOGUE_SWIGLU` |
//! | matmul | | | down | `add` |
//!
//! Weights are read as they lie in the file, or, about twice as fast from the cache, from a repacked copy: [`repack`].
//!
//! With at most [`PRIVATE_ROWS`] rows, `matmul` packs x itself (leave `x.packed` null and fill `x.x`, `x.norm`): every thread does
//! so for itself, which costs less than another op. With more, run `pack` first, into a buffer of [`packed_bytes`], and give
//! `matmul` the same `clsa_pack` struct. In both cases `x.forms` comes from [`forms`] of all matrices that read those rows.
//!
//! ```
//! use ggml_kernels::{contracts::*, matmul, ops, quant::{self, Type}, simd::Level};
//! let (n_out, n_in) = (3, 64);
//! let mut w = vec![0; n_out * Type::Q4_0.row_bytes(n_in).unwrap()];
//! quant::quantize(Type::Q4_0, &vec![0.5; n_out * n_in], n_in, None, &mut w);
//! let (x, mut y) = (vec![1.0; n_in], vec![0.0; n_out]);
//! let ops = ops::Ops::best().unwrap();
//! let mut p = clsa_matmul::default();
//! p.x = clsa_pack { n_rows: 1, n_in: n_in as i32, x: x.as_ptr(), x_stride: n_in, ..Default::default() };
//! p.x.forms = matmul::forms(ops.level, 1, [Type::Q4_0]);
//! p.n_mat = 1;
//! p.mat[0] = matmul::matrix(Type::Q4_0, &w, n_out, n_in, y.as_mut_ptr(), n_out);
//! ops::Op::check(&p).unwrap();
//! // SAFETY: the pointers are of slices with the stated shapes.
//! unsafe { ops::run_team(ops, &p, 2, &ops::Scratch::of(&p, 2)) };
//! assert!((y[0] - 32.0).abs() < 0.5);
//! ```
use crate::{check::Check, contracts::*, ops::Kernel, quant::Type, simd::Level};
use std::ffi::{c_int, c_void};

mod reference;
mod repack;
pub use repack::{HugePages, repack, repacked_bytes, repacked_matrix};

/// Rows that `matmul` packs itself.
pub const PRIVATE_ROWS: usize = CLSA_PRIVATE_ROWS as usize;

/// Bytes of `n_rows` packed rows of `n_in` values in the given forms.
#[must_use]
pub fn packed_bytes(n_rows: usize, n_in: usize, forms: i32) -> usize {
    // SAFETY: arithmetic on its arguments.
    unsafe { clsa_packed_bytes(n_rows as i32, n_in as i32, forms) }
}

/// The forms in which the given level's products of `n_rows` rows with weights of these types read x.
#[must_use]
pub fn forms(level: Level, n_rows: usize, types: impl IntoIterator<Item = Type> + Clone) -> i32 {
    let all = |of: fn(Type) -> bool| types.clone().into_iter().all(of);
    if level == Level::Amx && n_rows >= CLSA_AMX_ROWS as usize && all(Type::is_quantized) {
        // What 8 bits of weights leave would show in Q8_0.
        return if all(|ty| ty != Type::Q8_0) { CLSA_FORM_I8 } else { CLSA_FORM_BF16 } as i32;
    }
    let form = form_of(level);
    // SAFETY: a table look-up.
    types.into_iter().fold(0, |forms, ty| forms | unsafe { form(ty.to_ggml() as i32) })
}

/// Whether rows of these forms are of one that tiles multiply.
#[must_use]
pub const fn is_tiled(forms: i32) -> bool {
    forms == CLSA_FORM_BF16 as i32 || forms == CLSA_FORM_I8 as i32
}

/// A matrix of a product: weights `[n_out][n_in]`, result `[n_rows][y_stride]`, nothing added.
///
/// # Panics
/// When `w` is not `n_out` rows of `n_in` values.
#[must_use]
pub fn matrix(ty: Type, w: &[u8], n_out: usize, n_in: usize, y: *mut f32, y_stride: usize) -> clsa_matrix {
    let wanted = ty.row_bytes(n_in).and_then(|b| b.checked_mul(n_out));
    assert_eq!(Some(w.len()), wanted, "bytes of a {ty} matrix of {n_out} x {n_in}");
    clsa_matrix {
        w: w.as_ptr(),
        type_: ty.to_ggml() as i32,
        n_out: n_out as i32,
        y,
        y_stride,
        ..Default::default()
    }
}

/// Whether this CPU runs the AVX-512 kernels: they want VNNI, VBMI and VBMI2 besides what [`Level::Avx512`] says.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vbmi2")
}

type Form = unsafe extern "C" fn(i32) -> i32;

#[cfg(target_arch = "x86_64")]
fn form_of(level: Level) -> Form {
    match level {
        Level::Avx512 | Level::Amx if has_vnni() => clsa_matmul_form_avx512vnni,
        Level::Avx2 | Level::Avx512 | Level::Amx => clsa_matmul_form_avx2,
        Level::Ref => reference::form,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn form_of(_: Level) -> Form {
    reference::form
}

/// The kernels of a level.
#[must_use]
pub const fn kernels(level: Level) -> (Kernel<clsa_pack>, Kernel<clsa_matmul>) {
    match level {
        #[cfg(all(target_arch = "x86_64", clsa_amx))]
        Level::Amx => (clsa_pack_amx, clsa_matmul_amx),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => (pack_avx512, matmul_avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => (clsa_pack_avx2, clsa_matmul_avx2),
        _ => (reference::pack, reference::matmul),
    }
}

#[cfg(target_arch = "x86_64")]
unsafe extern "C" fn pack_avx512(p: *const clsa_pack, ith: c_int, nth: c_int, scratch: *mut c_void) {
    let kernel: Kernel<clsa_pack> = if has_vnni() { clsa_pack_avx512vnni } else { clsa_pack_avx2 };
    // SAFETY: the caller's.
    unsafe { kernel(p, ith, nth, scratch) }
}

#[cfg(target_arch = "x86_64")]
unsafe extern "C" fn matmul_avx512(p: *const clsa_matmul, ith: c_int, nth: c_int, scratch: *mut c_void) {
    let kernel: Kernel<clsa_matmul> = if has_vnni() { clsa_matmul_avx512vnni } else { clsa_matmul_avx2 };
    // SAFETY: the caller's.
    unsafe { kernel(p, ith, nth, scratch) }
}

macro_rules! ensure {
    ($ok:expr, $($what:tt)+) => {
        if !$ok {
            return Err(format!($($what)+));
        }
    };
}

fn shape(p: &clsa_pack) -> Check {
    ensure!(p.n_rows > 0 && p.n_in > 0, "{} rows of {} values: at least one", p.n_rows, p.n_in);
    let all = (CLSA_FORM_Q8 | CLSA_FORM_F32 | CLSA_FORM_BF16 | CLSA_FORM_I8) as i32;
    ensure!(p.forms > 0 && p.forms & !all == 0, "forms {}: bits of {all}", p.forms);
    let tiles = (CLSA_FORM_BF16 | CLSA_FORM_I8) as i32;
    ensure!(p.forms & tiles != tiles, "forms {}: BF16 or I8, not both", p.forms);
    ensure!(
        p.forms == CLSA_FORM_F32 as i32 || p.n_in % 32 == 0,
        "rows of {} values do not go in blocks of 32",
        p.n_in
    );
    // The packed rows and 16 rows of weights are addressed with 32 bits in places.
    ensure!(
        i64::from(p.n_rows) * i64::from(p.n_in) < i64::from(i32::MAX) / 4,
        "{} rows of {} values: too many for one op",
        p.n_rows,
        p.n_in
    );
    ensure!(
        p.packed.is_null() || p.packed.addr().is_multiple_of(CLSA_ALIGN as usize),
        "packed rows are not aligned to {CLSA_ALIGN}"
    );
    ensure!(p.x.is_null() || p.x_stride >= p.n_in as usize, "rows of {} values overlap", p.n_in);
    Ok(())
}

pub(crate) fn check_pack(p: &clsa_pack) -> Check {
    shape(p)?;
    ensure!(!p.x.is_null() && !p.packed.is_null(), "x or packed is null");
    Ok(())
}

pub(crate) fn check_matmul(p: &clsa_matmul) -> Check {
    shape(&p.x)?;
    if p.x.packed.is_null() {
        ensure!(!p.x.x.is_null(), "neither packed rows nor x");
        ensure!(p.x.n_rows <= PRIVATE_ROWS as i32, "{} rows want packing first", p.x.n_rows);
    }
    let swiglu = p.epilogue == CLSA_EPILOGUE_SWIGLU as i32;
    ensure!(swiglu || p.epilogue == CLSA_EPILOGUE_NONE as i32, "epilogue {}", p.epilogue);
    ensure!(
        if swiglu { p.n_mat == 2 } else { (1..=CLSA_MAX_MATRICES as i32).contains(&p.n_mat) },
        "{} matrices",
        p.n_mat
    );
    ensure!(!swiglu || p.mat[0].n_out == p.mat[1].n_out, "gate and up differ in their outputs");
    if !p.y_packed.is_null() {
        ensure!(
            swiglu && is_tiled(p.x.forms) && p.mat[0].n_out % 32 == 0,
            "packed results of {} outputs from forms {}: of whole blocks of gate and up, from form BF16 or I8 alone",
            p.mat[0].n_out,
            p.x.forms
        );
        ensure!(
            p.y_packed.addr().is_multiple_of(CLSA_ALIGN as usize),
            "packed results are not aligned to {CLSA_ALIGN}"
        );
    }
    for (i, m) in p.mat[..p.n_mat as usize].iter().enumerate() {
        let ty = u32::try_from(m.type_).ok().and_then(Type::from_ggml);
        let Some(ty) = ty else { return Err(format!("matrix {i}: type {}", m.type_)) };
        ensure!(!m.w.is_null() && m.n_out > 0, "matrix {i}: {} outputs, or no weights", m.n_out);
        ensure!(
            ty.row_bytes(p.x.n_in as usize).is_some(),
            "matrix {i}: rows of {} are not blocks of {ty}",
            p.x.n_in
        );
        ensure!(
            m.layout == CLSA_LAYOUT_ROWS as i32
                || (m.layout == CLSA_LAYOUT_GROUPS as i32 && ty.is_quantized()),
            "matrix {i}: layout {} of {ty}",
            m.layout
        );
        let result = (i == 0 || !swiglu) && p.y_packed.is_null();
        ensure!(
            !result || (!m.y.is_null() && m.y_stride >= m.n_out as usize),
            "matrix {i}: y is null or its rows overlap"
        );
        ensure!(m.add.is_null() || m.add_stride >= m.n_out as usize, "matrix {i}: rows to add overlap");
    }
    Ok(())
}

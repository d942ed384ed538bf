//! matmul.h, word for word: weights expanded to f32, x as it is, sums in f64.
use crate::{contracts::*, quant};
use std::ffi::{c_int, c_void};

pub(super) extern "C" fn form(_: i32) -> i32 {
    CLSA_FORM_F32 as i32
}

fn stride(n_in: usize) -> usize {
    n_in.next_multiple_of(16)
}

/// Values `ith / nth` of `n`.
fn share(n: usize, ith: c_int, nth: c_int) -> std::ops::Range<usize> {
    let (ith, nth) = (ith as usize, nth as usize);
    n * ith / nth..n * (ith + 1) / nth
}

/// RMS(x; norm) of row `r`, or the row as it is.
///
/// # Safety
/// The pointers hold what matmul.h says.
unsafe fn row(p: &clsa_pack, r: usize) -> Vec<f32> {
    let n = p.n_in as usize;
    // SAFETY: [n_rows][x_stride], the caller's.
    let x = unsafe { std::slice::from_raw_parts(p.x.add(r * p.x_stride), n) };
    if p.norm.is_null() {
        return x.to_vec();
    }
    // SAFETY: [n_in], the caller's.
    let norm = unsafe { std::slice::from_raw_parts(p.norm, n) };
    let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / n as f64;
    let inv = 1.0 / (mean + f64::from(p.eps)).sqrt();
    x.iter().zip(norm).map(|(&v, &w)| (f64::from(v) * inv * f64::from(w)) as f32).collect()
}

pub(super) unsafe extern "C" fn pack(p: *const clsa_pack, ith: c_int, nth: c_int, _: *mut c_void) {
    // SAFETY: the op's contract: p is a valid struct, its pointers hold what matmul.h says.
    let p = unsafe { &*p };
    let stride = stride(p.n_in as usize);
    for r in share(p.n_rows as usize, ith, nth) {
        // SAFETY: as above.
        let mut x = unsafe { row(p, r) };
        x.resize(stride, 0.0);
        // SAFETY: clsa_packed_bytes of form F32 is [n_rows][stride]; rows r are this thread's.
        unsafe { std::ptr::copy_nonoverlapping(x.as_ptr(), p.packed.cast::<f32>().add(r * stride), stride) };
    }
}

pub(super) unsafe extern "C" fn matmul(p: *const clsa_matmul, ith: c_int, nth: c_int, _: *mut c_void) {
    // SAFETY: the op's contract, as for pack.
    let p = unsafe { &*p };
    let (n_in, n_rows) = (p.x.n_in as usize, p.x.n_rows as usize);
    let stride = stride(n_in);
    let x: Vec<Vec<f32>> = (0..n_rows)
        .map(|r| {
            if p.x.packed.is_null() {
                // SAFETY: the op's contract.
                return unsafe { row(&p.x, r) };
            }
            // SAFETY: written by pack, [n_rows][stride] f32, aligned.
            unsafe { std::slice::from_raw_parts(p.x.packed.cast::<f32>().add(r * stride), n_in) }.to_vec()
        })
        .collect();
    let swiglu = p.epilogue == CLSA_EPILOGUE_SWIGLU as i32;
    let n_mat = if swiglu { 1 } else { p.n_mat as usize };
    for (i, m) in p.mat[..n_mat].iter().enumerate() {
        for o in share(m.n_out as usize, ith, nth) {
            // SAFETY: the op's contract: [n_out] rows of whole blocks.
            let w = unsafe { weights(m, o, n_in) };
            // SAFETY: as above; mat[1] has as many rows.
            let up = swiglu.then(|| unsafe { weights(&p.mat[i + 1], o, n_in) });
            for (r, x) in x.iter().enumerate() {
                let mut y = dot(&w, x);
                if let Some(up) = &up {
                    y = y / (1.0 + (-y).exp()) * dot(up, x);
                } else if !m.add.is_null() {
                    // SAFETY: [n_rows][add_stride].
                    y += f64::from(unsafe { *m.add.add(r * m.add_stride + o) });
                }
                // SAFETY: [n_rows][y_stride]; output o is this thread's.
                unsafe { *m.y.add(r * m.y_stride + o) = y as f32 };
            }
        }
    }
}

/// Row `o` of the weights in f32.
///
/// # Safety
/// `m.w` holds more than `o` rows of `n_in` values.
unsafe fn weights(m: &clsa_matrix, o: usize, n_in: usize) -> Vec<f32> {
    let ty = u32::try_from(m.type_).ok().and_then(quant::Type::from_ggml).expect("checked before the op");
    let bytes = ty.row_bytes(n_in).expect("checked before the op");
    let mut w = vec![0.0; n_in];
    if m.layout == CLSA_LAYOUT_ROWS as i32 {
        // SAFETY: the caller's.
        quant::dequantize(ty, unsafe { std::slice::from_raw_parts(m.w.add(o * bytes), bytes) }, &mut w);
        return w;
    }
    // SAFETY: repacked weights are whole groups of 16 rows.
    let group = unsafe { std::slice::from_raw_parts(m.w.add(o / 16 * 16 * bytes), 16 * bytes) };
    let (size, o) = (ty.block_bytes(), o % 16);
    let dwords = size / 4;
    for (block, w) in group.chunks(16 * size).zip(w.chunks_mut(ty.block_len())) {
        let mut row: Vec<u8> = (0..dwords).flat_map(|i| &block[64 * i + 4 * o..][..4]).copied().collect();
        let rest = &block[64 * dwords..];
        if !rest.is_empty() {
            let at = if ty.block_len() == 32 { 0 } else { row.len() };
            row.splice(at..at, rest[2 * o..][..2].iter().copied());
        }
        quant::dequantize(ty, &row, w);
    }
    w
}

fn dot(w: &[f32], x: &[f32]) -> f64 {
    w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
}

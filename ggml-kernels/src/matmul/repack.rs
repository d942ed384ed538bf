//! Weights copied into the order in which the kernels want them (`CLSA_LAYOUT_GROUPS`).
use super::matrix;
use crate::{contracts::*, mapping::advise_huge_pages, quant::Type};
use memmap2::MmapMut;
use std::{
    io,
    ops::{Deref, DerefMut, Range},
};

/// Rows of a group.
const GROUP: usize = 16;

/// Bytes of a repacked matrix: as many as its rows have, `n_out` rounded up to 16. `None`: a float type, which is left as it is; a
/// shape that is not whole blocks; or an overflow.
#[must_use]
pub fn repacked_bytes(ty: Type, n_out: usize, n_in: usize) -> Option<usize> {
    if !ty.is_quantized() {
        return None;
    }
    n_out.div_ceil(GROUP).checked_mul(GROUP * ty.row_bytes(n_in)?)
}

/// Repacks the given groups (of 16 rows each) of a matrix `w`, `[n_out][n_in]`, into `out`, which is those groups' part of the
/// [`repacked_bytes`]. Groups are independent: several threads may do parts.
///
/// # Panics
/// The type is not repacked, `w` is not `n_out` rows, or `out` is not as large as the groups.
pub fn repack(ty: Type, w: &[u8], n_out: usize, n_in: usize, groups: Range<usize>, out: &mut [u8]) {
    let all = repacked_bytes(ty, n_out, n_in).expect("a quantized type and whole blocks");
    let group = all / n_out.div_ceil(GROUP).max(1);
    assert_eq!(Some(w.len()), ty.row_bytes(n_in).map(|b| b * n_out), "bytes of {n_out} rows of {ty}");
    assert!(groups.end * group <= all && out.len() == groups.len() * group, "groups {groups:?} of {ty}");
    // SAFETY: whole rows of w are read, those past n_out as zeros; `out` has exactly the groups' bytes.
    unsafe {
        clsa_repack(
            ty.to_ggml() as i32,
            w.as_ptr(),
            n_out as i32,
            n_in as i32,
            (groups.start * GROUP) as i32,
            groups.len() as i32,
            out.as_mut_ptr(),
        );
    }
}

/// As [`matrix`](super::matrix), of repacked weights.
///
/// # Panics
/// `w` is not [`repacked_bytes`] long.
#[must_use]
pub fn repacked_matrix(
    ty: Type,
    w: &[u8],
    n_out: usize,
    n_in: usize,
    y: *mut f32,
    y_stride: usize,
) -> clsa_matrix {
    assert_eq!(Some(w.len()), repacked_bytes(ty, n_out, n_in), "bytes of a repacked {ty} matrix");
    let rows = ty.row_bytes(n_in).expect("whole blocks") * n_out;
    clsa_matrix { layout: CLSA_LAYOUT_GROUPS as i32, ..matrix(ty, &w[..rows], n_out, n_in, y, y_stride) }
}

/// Zeroed memory in huge pages where the system has them.
#[derive(Debug)]
pub struct HugePages(MmapMut);

impl HugePages {
    /// At least `bytes` of memory (and at least one), page-aligned.
    ///
    /// # Errors
    /// The system has no such memory.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let map = MmapMut::map_anon(bytes.max(1))?;
        advise_huge_pages(map.as_ptr(), map.len());
        Ok(Self(map))
    }
}

impl Deref for HugePages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for HugePages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

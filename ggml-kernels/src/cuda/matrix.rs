//! Quantized matrices on the device, in the planes of `gpu_matmul.h`, and their upload.
use super::{Buffer, Device, Error, Event, Launch, Pinned, Result, Stream};
use crate::contracts::{clsa_dequantize, clsa_planes, clsa_repack};
use crate::quant::Type;

/// Factor that f16 weights carry after dequantization ([`clsa_dequantize`]) of this type.
#[must_use]
pub fn weight_scale(ty: Type) -> f32 {
    if ty == Type::F16 { 1.0 } else { crate::contracts::CLSA_WEIGHT_SCALE as f32 }
}

/// Bytes of the planes (codes, high, scales, super) of a matrix: together exactly its ggml blocks. `None` when `cols` is not whole
/// groups of 32, or whole blocks, or the sizes overflow, or there are 2^32 groups.
#[must_use]
pub fn plane_bytes(ty: Type, rows: usize, cols: usize) -> Option<[usize; 4]> {
    use Type as T;
    if !cols.is_multiple_of(ty.block_len().max(32)) {
        return None;
    }
    let per_group = rows.checked_mul(cols / 32)?;
    let per_block = rows.checked_mul(cols / ty.block_len().max(32))?;
    let (codes, high) = match ty {
        T::F32 => (128, 0),
        T::F16 | T::BF16 => (64, 0),
        T::Q8_0 => (32, 0),
        T::Q2_K => (8, 0),
        T::Q3_K => (8, 4),
        T::Q5_0 | T::Q5_1 | T::Q5_K => (16, 4),
        T::Q6_K => (16, 8),
        T::Q4_0 | T::Q4_1 | T::Q4_K | T::IQ4_NL | T::IQ4_XS => (16, 0),
    };
    let (scales, sup) = match ty {
        T::F32 | T::F16 | T::BF16 => (0, 0),
        T::Q4_0 | T::Q5_0 | T::Q8_0 | T::IQ4_NL => (2, 0),
        T::Q4_1 | T::Q5_1 => (4, 0),
        T::IQ4_XS => (8, 0),
        T::Q2_K => (16, 4),
        T::Q3_K => (12, 2),
        T::Q4_K | T::Q5_K => (16, 0),
        T::Q6_K => (16, 2),
    };
    // Kernels number groups with 32 bits.
    u32::try_from(per_group).ok()?;
    Some([
        per_group.checked_mul(codes)?,
        per_group.checked_mul(high)?,
        per_block.checked_mul(scales)?,
        per_block.checked_mul(sup)?,
    ])
}

/// Bytes that a matrix takes on the device.
#[must_use]
pub fn matrix_bytes(ty: Type, rows: usize, cols: usize) -> Option<usize> {
    plane_bytes(ty, rows, cols)?.iter().try_fold(0, |sum: usize, b| sum.checked_add(b.next_multiple_of(256)))
}

/// A matrix `[rows][cols]` on the device.
pub struct Matrix {
    ty: Type,
    rows: usize,
    cols: usize,
    planes: Buffer<u8>,
    view: clsa_planes,
}

// SAFETY: `view` holds device addresses into `planes`; nothing on the host is shared.
unsafe impl Send for Matrix {}

impl Matrix {
    /// Reserves its memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Range`] for a shape that is not whole groups of 32 columns.
    pub fn new(device: &Device, ty: Type, rows: usize, cols: usize) -> Result<Self> {
        let shape = || {
            Error::Range(format!("a {ty} matrix of {rows} rows of {cols} columns: multiples of 32 wanted"))
        };
        let bytes = plane_bytes(ty, rows, cols).ok_or_else(shape)?;
        let planes: Buffer<u8> = device.alloc(matrix_bytes(ty, rows, cols).ok_or_else(shape)?)?;
        let mut at = 0;
        let mut place = |bytes: usize| {
            let start = planes.at(at);
            at += bytes.next_multiple_of(256);
            start.cast_const()
        };
        let int = |n: usize| i32::try_from(n).map_err(|_| shape());
        let view = clsa_planes {
            codes: place(bytes[0]),
            high: place(bytes[1]),
            scales: place(bytes[2]),
            super_: place(bytes[3]),
            type_: ty.to_ggml() as i32,
            rows: int(rows)?,
            cols: int(cols)?,
            reserved: 0,
        };
        Ok(Self { ty, rows, cols, planes, view })
    }
    /// Type of its weights.
    #[must_use]
    pub fn ty(&self) -> Type {
        self.ty
    }
    /// Outputs of a product.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Inputs of a product.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.planes.bytes()
    }
    /// As kernels take it.
    #[must_use]
    pub fn view(&self) -> clsa_planes {
        self.view
    }
    /// Where its memory starts.
    #[must_use]
    pub fn start(&self) -> *const u8 {
        self.planes.ptr()
    }

    /// Queues its expansion to f16 `[rows][cols]`, times [`weight_scale`].
    ///
    /// # Safety
    /// `out` has room for it and lives until the work is done.
    pub unsafe fn dequantize(&self, stream: &Stream, out: *mut half::f16) -> Result<()> {
        let groups = self.cols / 32 * self.rows;
        if u32::try_from(groups).is_err() {
            return Err(Error::Range(format!("{groups} groups of 32 weights to expand at once")));
        }
        let launch = Launch::new(groups.div_ceil(128), 128);
        let p = clsa_dequantize { matrix: self.view, out: out.cast() };
        // SAFETY: the kernel's own struct; the rest is the caller's.
        unsafe { launch.run(stream, &stream.device().function("clsa_dequantize_kernel")?, &(p,)) }
    }
}

/// Copies matrices to the device through two page-locked buffers: while one crosses, the other is filled from the memory map.
pub struct Uploader<'a> {
    stream: &'a Stream,
    halves: [(Pinned<u8>, Buffer<u8>, Event); 2],
    turn: usize,
}

impl<'a> Uploader<'a> {
    /// Bytes of each of the buffers.
    const HALF: usize = 16 << 20;

    /// Reserves the buffers.
    ///
    /// # Errors
    /// No memory.
    pub fn new(stream: &'a Stream) -> Result<Self> {
        let device = stream.device();
        let half = || -> Result<_> {
            let event = device.event()?;
            stream.record(&event)?;
            Ok((device.pinned(Self::HALF)?, device.alloc(Self::HALF)?, event))
        };
        Ok(Self { stream, halves: [half()?, half()?], turn: 0 })
    }

    /// Queues the upload of a whole matrix; `blocks` are its ggml blocks. `progress` hears the bytes of each piece.
    ///
    /// # Errors
    /// [`Error::Range`] when the bytes are not those of the matrix; what the driver reports.
    pub fn upload(
        &mut self,
        matrix: &mut Matrix,
        blocks: &[u8],
        mut progress: impl FnMut(usize),
    ) -> Result<()> {
        let row_bytes = matrix.ty.row_bytes(matrix.cols).unwrap_or(0);
        if row_bytes.checked_mul(matrix.rows) != Some(blocks.len()) {
            return Err(Error::Range(format!(
                "{} bytes for a {} matrix of {} rows of {row_bytes} bytes",
                blocks.len(),
                matrix.ty,
                matrix.rows
            )));
        }
        let floats = !matrix.ty.is_quantized();
        // Whole rows where they must be repacked; rows larger than a buffer do not occur below 16 million columns.
        let piece = if floats { Self::HALF } else { (Self::HALF / row_bytes).max(1) * row_bytes };
        if !floats && row_bytes > Self::HALF {
            return Err(Error::Range(format!("rows of {row_bytes} bytes, at most {} wanted", Self::HALF)));
        }
        for (i, bytes) in blocks.chunks(piece).enumerate() {
            let (pinned, staged, done) = &mut self.halves[self.turn];
            self.turn ^= 1;
            done.synchronize()?;
            pinned[..bytes.len()].copy_from_slice(bytes);
            if floats {
                matrix.planes.write_async(i * piece, pinned, bytes.len(), self.stream)?;
            } else {
                staged.write_async(0, pinned, bytes.len(), self.stream)?;
                let n_rows = bytes.len() / row_bytes;
                let p = clsa_repack {
                    matrix: matrix.view,
                    blocks: staged.ptr(),
                    first_row: (i * (piece / row_bytes)) as i32,
                    n_rows: n_rows as i32,
                };
                let launch = Launch::new(1, 64).grid((matrix.cols / 32).div_ceil(64), n_rows.min(65_535), 1);
                // SAFETY: the staged rows are those of `p`, inside the matrix by the checks above; all buffers outlive the stream's work
                // because they are freed by calls that wait for it.
                unsafe {
                    launch.run(self.stream, &self.stream.device().function("clsa_repack_kernel")?, &(p,))
                }?;
            }
            self.stream.record(done)?;
            progress(bytes.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_hold_exactly_the_blocks() {
        for &ty in Type::ALL {
            for (rows, cols) in [(1, 256), (7, 512), (33, 2560)] {
                let planes = plane_bytes(ty, rows, cols).expect("whole blocks");
                assert_eq!(planes.iter().sum::<usize>(), rows * ty.row_bytes(cols).expect("whole"), "{ty}");
            }
        }
    }

    #[test]
    fn odd_columns_are_refused() {
        assert_eq!(plane_bytes(Type::F16, 4, 48), None);
        assert_eq!(plane_bytes(Type::Q4_K, 4, 288), None);
        assert_eq!(plane_bytes(Type::F16, usize::MAX, 64), None);
        assert_eq!(plane_bytes(Type::Q4_0, 1 << 26, 2048), None);
    }
}

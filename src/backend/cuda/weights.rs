//! The weights on the device: matrices in planes, vectors in f32.
use std::collections::HashMap;
use std::ops::Range;

use ggml_kernels::cuda::{Buffer, Device, Matrix, Stream, Uploader, matrix_bytes};
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};
use crate::model::{Model, Weight};

/// The weights of some layers, by their place in the file.
pub struct Weights {
    matrices: HashMap<usize, Matrix>,
    vectors: HashMap<usize, Buffer<f32>>,
}

/// Bytes on the device of the weights of `layers`.
///
/// # Errors
/// [`Error::Input`] for a matrix that the kernels cannot take.
pub fn bytes(model: &Model, layers: &Range<usize>) -> Result<u64> {
    model.weights.of(layers.clone()).map(|w| Ok(one(w)? as u64)).sum()
}

fn one(w: &Weight) -> Result<usize> {
    if w.n_out == 1 {
        return Ok((w.n_in * 4).next_multiple_of(256));
    }
    matrix_bytes(w.ty, w.n_out, w.n_in).ok_or_else(|| {
        Error::Input(format!(
            "{}: rows of {} values; the GPU needs multiples of 32: use --device cpu",
            w.name, w.n_in
        ))
    })
}

impl Weights {
    /// Uploads them, with a bar on a terminal.
    pub fn upload(device: &Device, stream: &Stream, model: &Model, layers: &Range<usize>) -> Result<Self> {
        let total = model.weights.of(layers.clone()).map(|w| w.bytes as u64).sum();
        let bar = ProgressBar::new(total).with_style(
            ProgressStyle::with_template(
                "uploading {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
            )
            .map_err(|e| Error::Runtime(e.to_string()))?,
        );
        let (mut matrices, mut vectors) = (HashMap::new(), HashMap::new());
        let mut uploader = Uploader::new(stream)?;
        for w in model.weights.of(layers.clone()) {
            if w.n_out == 1 {
                vectors.insert(w.offset, device.upload(&model.values(w))?);
                bar.inc(w.bytes as u64);
            } else {
                let mut matrix = Matrix::new(device, w.ty, w.n_out, w.n_in)?;
                uploader.upload(&mut matrix, model.bytes(w), |n| bar.inc(n as u64))?;
                matrices.insert(w.offset, matrix);
            }
        }
        stream.synchronize()?;
        bar.finish_and_clear();
        Ok(Self { matrices, vectors })
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let matrices = self.matrices.values().map(Matrix::bytes);
        matrices.chain(self.vectors.values().map(Buffer::bytes)).sum::<usize>() as u64
    }
    /// A matrix.
    pub fn matrix(&self, w: &Weight) -> &Matrix {
        &self.matrices[&w.offset]
    }
    /// A vector's device address.
    pub fn vector(&self, w: &Weight) -> *const f32 {
        self.vectors[&w.offset].ptr()
    }
}

//! Importance matrices as llama.cpp writes them: a GGUF file with the sums of squared activations per column of each matrix.
use std::{collections::HashMap, path::Path};

use ggml_kernels::quant::Type;

use crate::{
    Result,
    gguf::{File, TensorInfo},
};

/// Ends of the two tensors of an entry.
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// The importance of each column, by the name of the matrix.
#[derive(Clone, Debug, Default)]
pub struct Imatrix {
    columns: HashMap<String, Vec<f32>>,
}

impl Imatrix {
    /// Reads an importance matrix.
    ///
    /// # Errors
    /// When the file is damaged, is no importance matrix, or holds values that are not finite.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let kind: Option<&str> = file.optional("general.type")?;
        if kind != Some("imatrix") {
            return Err(file.key_error("general.type", "imatrix", kind.unwrap_or("nothing")).into());
        }
        let mut columns = HashMap::new();
        for sums in file.tensors() {
            let Some(name) = sums.name.strip_suffix(SUMS) else { continue };
            let counts_name = format!("{name}{COUNTS}");
            let counts = file
                .tensor(&counts_name)
                .ok_or_else(|| file.tensor_error(&counts_name, "counts", "nothing"))?;
            let (sum, count) = (floats(&file, sums)?, floats(&file, counts)?);
            // One count per matrix: experts have their own.
            if sum.len() != sums.row_len() * count.len() {
                let expected = format!("{} rows, one per count", count.len());
                return Err(file
                    .tensor_error(&sums.name, expected, format!("shape {:?}", sums.shape))
                    .into());
            }
            let mean = |(row, &n): (&[f32], &f32)| -> Vec<f32> {
                // A matrix that was never used tells nothing: all columns alike.
                row.iter().map(|&s| if n > 0.0 { s / n } else { 1.0 }).collect()
            };
            let means: Vec<f32> = sum.chunks_exact(sums.row_len()).zip(&count).flat_map(mean).collect();
            columns.insert(name.to_owned(), means);
        }
        Ok(Self { columns })
    }

    /// The importance of the columns of a matrix.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.columns.get(name).map(Vec::as_slice)
    }

    /// Number of matrices.
    #[must_use]
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }
}

fn floats(file: &File, tensor: &TensorInfo) -> Result<Vec<f32>> {
    if tensor.ty != Type::F32 {
        return Err(file.tensor_error(&tensor.name, "type F32", tensor.ty.name()).into());
    }
    let mut values = vec![0.0; tensor.n_elements()];
    ggml_kernels::quant::dequantize(tensor.ty, file.data(tensor), &mut values);
    match values.iter().find(|v| !v.is_finite() || **v < 0.0) {
        Some(v) => Err(file.tensor_error(&tensor.name, "finite values of at least 0", v.to_string()).into()),
        None => Ok(values),
    }
}

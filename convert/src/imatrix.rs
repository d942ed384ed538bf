//! Importance matrices as llama.cpp keeps them: a GGUF file with the sums of squared activations per column of each matrix.
//!
//! `general.type` is `imatrix`; a matrix `NAME` has the tensors `NAME.in_sum2` `[n_in, n_mat]` and `NAME.counts` `[1, n_mat]` in F32,
//! where n_mat is 1 but for experts, and counts are activations (tokens). `imatrix.datasets`, `imatrix.chunk_count` and
//! `imatrix.chunk_size` say what was seen.
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use ggml_kernels::quant::Type;

use crate::{
    Error, Result,
    gguf::{File, Metadata, TensorInfo, TensorPlan, Writer},
};

/// Ends of the two tensors of an entry.
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
const CHUNK_COUNT: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";
const DATASETS: &str = "imatrix.datasets";
/// What a run that saves as it goes needs to go on: its fingerprint, and how many chunks it has done itself.
const RUN: &str = "clsa.imatrix.run";
const RUN_CHUNKS: &str = "clsa.imatrix.run_chunks";

/// Sums of squared activations of one matrix, or of each of its experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// `[n_mat][n_in]` sums of squares.
    pub sums: Vec<f64>,
    /// `[n_mat]` how many activations were added up.
    pub counts: Vec<f64>,
}

/// What an importance matrix is made of; can be added to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    /// By the name of the matrix.
    pub entries: BTreeMap<String, Entry>,
    /// Chunks of text seen, of all sources.
    pub chunks: u32,
    /// Tokens of a chunk.
    pub chunk_size: u32,
    /// The texts seen.
    pub datasets: Vec<String>,
    /// Fingerprint of the run that writes the file, and chunks it has done; `None` in files of others.
    pub run: Option<(String, u32)>,
}

impl Sums {
    /// Reads a file that [`Self::write`] or llama-imatrix wrote.
    ///
    /// # Errors
    /// When the file is damaged, is no importance matrix, or holds values that are not finite.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let kind: Option<&str> = file.optional("general.type")?;
        if kind != Some("imatrix") {
            return Err(file.key_error("general.type", "imatrix", kind.unwrap_or("nothing")).into());
        }
        let mut entries = BTreeMap::new();
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
            entries.insert(name.to_owned(), Entry { sums: sum, counts: count });
        }
        let run = match (file.optional::<&str>(RUN)?, file.optional(RUN_CHUNKS)?) {
            (Some(run), Some(chunks)) => Some((run.to_owned(), chunks)),
            _ => None,
        };
        let datasets: Option<Vec<&str>> = file.optional(DATASETS)?;
        Ok(Self {
            entries,
            chunks: file.optional(CHUNK_COUNT)?.unwrap_or(0),
            chunk_size: file.optional(CHUNK_SIZE)?.unwrap_or(0),
            datasets: datasets.unwrap_or_default().into_iter().map(str::to_owned).collect(),
            run,
        })
    }

    /// Adds `entry` to what there is of matrix `name`.
    ///
    /// # Errors
    /// [`Error::Input`] when the shapes differ.
    pub fn add(&mut self, name: &str, entry: &Entry) -> Result<()> {
        let Some(mine) = self.entries.get_mut(name) else {
            self.entries.insert(name.to_owned(), entry.clone());
            return Ok(());
        };
        if (mine.sums.len(), mine.counts.len()) != (entry.sums.len(), entry.counts.len()) {
            return Err(Error::Input(format!(
                "importance matrix: {name}: expected {} columns, found {}: it was made for another model",
                mine.sums.len(),
                entry.sums.len()
            )));
        }
        mine.sums.iter_mut().zip(&entry.sums).for_each(|(to, from)| *to += from);
        mine.counts.iter_mut().zip(&entry.counts).for_each(|(to, from)| *to += from);
        Ok(())
    }

    /// Adds everything of another matrix of the same model. Chunks of another size count by their tokens.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        other.entries.iter().try_for_each(|(name, entry)| self.add(name, entry))?;
        if self.chunk_size == 0 {
            self.chunk_size = other.chunk_size;
        }
        let tokens = u64::from(other.chunks) * u64::from(other.chunk_size);
        let chunks = tokens.checked_div(u64::from(self.chunk_size)).unwrap_or(0);
        self.chunks = self.chunks.saturating_add(u32::try_from(chunks).unwrap_or(u32::MAX));
        for dataset in &other.datasets {
            if !self.datasets.contains(dataset) {
                self.datasets.push(dataset.clone());
            }
        }
        Ok(())
    }

    /// Writes the file, in one step: an older file stays until the new one is whole.
    ///
    /// # Errors
    /// When a name is too long to be stored, or writing fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut metadata = Metadata::default();
        metadata.string("general.type", "imatrix");
        metadata.strings(DATASETS, &self.datasets);
        metadata.u32(CHUNK_COUNT, self.chunks);
        metadata.u32(CHUNK_SIZE, self.chunk_size);
        if let Some((run, chunks)) = &self.run {
            metadata.string(RUN, run);
            metadata.u32(RUN_CHUNKS, *chunks);
        }
        let (mut plans, mut data) = (Vec::new(), Vec::new());
        for (name, entry) in &self.entries {
            let n_mat = entry.counts.len();
            let n_in = entry.sums.len().checked_div(n_mat).unwrap_or(0);
            for (suffix, width, values) in [(SUMS, n_in, &entry.sums), (COUNTS, 1, &entry.counts)] {
                let shape = vec![width as u64, n_mat as u64];
                plans.push(TensorPlan { name: format!("{name}{suffix}"), shape, ty: Type::F32 });
                data.push(values);
            }
        }
        let mut writer = Writer::create(path, metadata, plans, None)?;
        for values in data {
            let bytes: Vec<u8> = values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
            writer.append(&bytes)?;
        }
        writer.finish()
    }
}

/// The importance of each column, by the name of the matrix.
#[derive(Clone, Debug, Default)]
pub struct Imatrix {
    columns: HashMap<String, Vec<f32>>,
}

impl Imatrix {
    /// Reads an importance matrix.
    ///
    /// # Errors
    /// As [`Sums::open`].
    pub fn open(path: &Path) -> Result<Self> {
        Sums::open(path).map(|sums| Self::from(&sums))
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

impl From<&Sums> for Imatrix {
    /// Mean squares.
    fn from(sums: &Sums) -> Self {
        let means = |entry: &Entry| -> Vec<f32> {
            let n_in = entry.sums.len().checked_div(entry.counts.len()).unwrap_or(0).max(1);
            let rows = entry.sums.chunks_exact(n_in).zip(&entry.counts);
            // A matrix that was never used tells nothing: all columns alike.
            rows.flat_map(|(row, &n)| {
                row.iter().map(move |&s| if n > 0.0 { (s as f32) / (n as f32) } else { 1.0 })
            })
            .collect()
        };
        Self { columns: sums.entries.iter().map(|(name, entry)| (name.clone(), means(entry))).collect() }
    }
}

fn floats(file: &File, tensor: &TensorInfo) -> Result<Vec<f64>> {
    if tensor.ty != Type::F32 {
        return Err(file.tensor_error(&tensor.name, "type F32", tensor.ty.name()).into());
    }
    let mut values = vec![0.0; tensor.n_elements()];
    ggml_kernels::quant::dequantize(tensor.ty, file.data(tensor), &mut values);
    match values.iter().find(|v| !v.is_finite() || **v < 0.0) {
        Some(v) => Err(file.tensor_error(&tensor.name, "finite values of at least 0", v.to_string()).into()),
        None => Ok(values.into_iter().map(f64::from).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(chunks: u32, value: f64) -> Sums {
        let entry = Entry { sums: vec![value, 2.0 * value], counts: vec![4.0] };
        Sums {
            entries: [("blk.0.attn_q.weight".to_owned(), entry)].into(),
            chunks,
            chunk_size: 512,
            datasets: vec![format!("text{value}")],
            run: Some(("fingerprint".into(), chunks)),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("imatrix.gguf");
        let written = sums(3, 1.5);
        written.write(&path).unwrap();
        assert_eq!(Sums::open(&path).unwrap(), written);
        let imatrix = Imatrix::open(&path).unwrap();
        assert_eq!(imatrix.get("blk.0.attn_q.weight"), Some(&[0.375, 0.75][..]));
        let file = File::open(&path).unwrap();
        assert_eq!(file.tensor("blk.0.attn_q.weight.in_sum2").unwrap().shape, [2, 1]);
        assert_eq!(file.tensor("blk.0.attn_q.weight.counts").unwrap().shape, [1, 1]);
    }

    #[test]
    fn merging_adds_sums_counts_and_chunks() {
        let mut all = sums(3, 1.0);
        all.merge(&Sums { chunk_size: 1024, ..sums(2, 2.0) }).unwrap();
        let entry = &all.entries["blk.0.attn_q.weight"];
        assert_eq!((entry.sums.as_slice(), entry.counts.as_slice()), (&[3.0, 6.0][..], &[8.0][..]));
        assert_eq!((all.chunks, all.datasets.len()), (7, 2));
        let other = Entry { sums: vec![1.0; 3], counts: vec![1.0] };
        let refused = all.add("blk.0.attn_q.weight", &other).unwrap_err().to_string();
        assert!(refused.contains("expected 2 columns, found 3"), "{refused}");
    }
}

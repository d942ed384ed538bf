//! A folder of safetensors: one file, or shards with an index, memory-mapped.
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use ggml_kernels::{mapping::Mapping, quant};
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// Name of the index of a sharded checkpoint.
const INDEX: &str = "model.safetensors.index.json";
/// The most bytes of a JSON file that is read: tokenizers of 256K tokens take some 30 MB.
const MAX_JSON: u64 = 256 << 20;

/// A tensor as a checkpoint stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Dimensions in the order of the checkpoint: the row length last.
    pub shape: Vec<usize>,
    /// F32, F16 or BF16.
    pub ty: quant::Type,
    /// Which shard.
    pub shard: usize,
    /// Offset in the shard's file.
    pub at: usize,
    /// Bytes of its data.
    pub bytes: usize,
}

/// A safetensors file.
#[derive(Debug)]
pub struct Shard {
    /// Where it is.
    pub path: PathBuf,
    /// Its content.
    pub mapping: Mapping,
}

/// A checkpoint folder with its tensors.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, StoredTensor>,
}

impl Checkpoint {
    /// Maps every shard in `dir` and checks their headers and the index.
    ///
    /// # Errors
    /// When there is no checkpoint or one of its files is damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut checkpoint = Self { dir: dir.to_owned(), shards: Vec::new(), tensors: BTreeMap::new() };
        if !dir.is_dir() {
            return Err(Error::Input(format!(
                "{} is not a folder: expected one with config.json and *.safetensors",
                dir.display()
            )));
        }
        match read_json::<Value>(&dir.join(INDEX))? {
            Some(index) => checkpoint.open_shards(&index)?,
            None => {
                let path = single_file(dir)?;
                checkpoint.open_shard(&path)?;
            }
        }
        Ok(checkpoint)
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// The shard that holds a tensor.
    #[must_use]
    pub fn shard(&self, tensor: &StoredTensor) -> &Shard {
        &self.shards[tensor.shard]
    }

    /// A tensor's data.
    #[must_use]
    pub fn data(&self, tensor: &StoredTensor) -> &[u8] {
        &self.shard(tensor).mapping[tensor.at..][..tensor.bytes]
    }

    fn open_shards(&mut self, index: &Value) -> Result<()> {
        let path = self.dir.join(INDEX);
        let bad = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let map = index.get("weight_map").and_then(Value::as_object);
        let map =
            map.ok_or_else(|| bad("expected an object \"weight_map\" from tensor names to files".into()))?;
        let mut files: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, file) in map {
            let file = file
                .as_str()
                .ok_or_else(|| bad(format!("tensor {name}: expected a file name, found {file}")))?;
            // A plain name: an index must not point out of its folder.
            if Path::new(file).file_name() != Some(OsStr::new(file)) {
                return Err(bad(format!(
                    "tensor {name}: expected the name of a file in the folder, found {file:?}"
                )));
            }
            if !files.contains_key(file) {
                files.insert(file, self.open_shard(&self.dir.join(file))?);
            }
        }
        for (name, file) in map {
            let shard = file.as_str().and_then(|f| files.get(f));
            if self.tensors.get(name).map(|t| &t.shard) != shard {
                return Err(bad(format!("tensor {name} is not in {file} as the index says")));
            }
        }
        match self.tensors.keys().find(|name| !map.contains_key(*name)) {
            Some(name) => Err(bad(format!("tensor {name} is in a shard but not in the index"))),
            None => Ok(()),
        }
    }

    fn open_shard(&mut self, path: &Path) -> Result<usize> {
        let shard = self.shards.len();
        let mapping = Mapping::open(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
        let bad = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let (header, metadata) = SafeTensors::read_metadata(&mapping)
            .map_err(|e| bad(format!("not a whole safetensors file: {e}: download it again")))?;
        // The data follows the header's length in 8 bytes and the header; `read_metadata` has checked all of it against the file.
        let data = header + 8;
        for (name, info) in metadata.tensors() {
            let ty = match info.dtype {
                Dtype::F32 => quant::Type::F32,
                Dtype::F16 => quant::Type::F16,
                Dtype::BF16 => quant::Type::BF16,
                other => {
                    return Err(bad(format!(
                        "tensor {name}: expected type F32, F16 or BF16, found {other:?}"
                    )));
                }
            };
            let (start, end) = info.data_offsets;
            let tensor =
                StoredTensor { shape: info.shape.clone(), ty, shard, at: data + start, bytes: end - start };
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(bad(format!("tensor {name} is in another shard too")));
            }
        }
        self.shards.push(Shard { path: path.to_owned(), mapping });
        Ok(shard)
    }
}

/// The only safetensors file of a folder.
fn single_file(dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).map_err(|source| Error::Open { path: dir.to_owned(), source })?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension() == Some(OsStr::new("safetensors")))
        .collect();
    found.sort();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Error::Input(format!("{}: no *.safetensors file in the folder", dir.display()))),
        _ => match found.iter().find(|p| p.file_name() == Some(OsStr::new("model.safetensors"))) {
            Some(model) => Ok(model.clone()),
            None => {
                let what = format!(
                    "{} safetensors files but no {INDEX} that says which tensor is where",
                    found.len()
                );
                Err(Error::Input(format!("{}: {what}", dir.display())))
            }
        },
    }
}

/// A JSON file; `None` when there is none.
///
/// # Errors
/// When it cannot be read, is too large or is not such JSON.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|e| Error::Input(format!("{}: {e}", path.display())))
}

/// A text file; `None` when there is none.
///
/// # Errors
/// When it cannot be read, is too large or is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(m) if m.len() > MAX_JSON => {
            return Err(Error::Input(format!(
                "{}: {} bytes: at most {MAX_JSON} expected",
                path.display(),
                m.len()
            )));
        }
        _ => {}
    }
    fs::read_to_string(path).map(Some).map_err(|source| Error::Open { path: path.to_owned(), source })
}

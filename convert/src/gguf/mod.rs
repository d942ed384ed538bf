//! The GGUF container: a validated memory-mapped reader ([`File`]) and a streaming writer ([`Writer`]).
mod checksum;
mod parse;
mod value;
mod writer;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
};

use ggml_kernels::{mapping::Mapping, quant};

pub use checksum::{Checksum, Hasher};
pub use value::{Array, Elements, FromValue, Value, ValueType};
pub use writer::{Metadata, TensorPlan, Writer};

/// The most dimensions of a tensor.
pub const MAX_DIMS: usize = 4;
/// The most bytes of a tensor's name (ggml keeps 64 with the terminating NUL).
pub const MAX_TENSOR_NAME: usize = 63;
/// The most bytes of a key (the format's limit).
pub const MAX_KEY: usize = 65_535;
/// Alignment of tensor data without the key `general.alignment`.
pub const DEFAULT_ALIGNMENT: usize = 32;

/// A GGUF file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is damaged or not what it claims to be.
    #[error("{}: at byte {offset}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What was found and what was expected.
        what: String,
    },
    /// A key is missing or its value is of another type or out of range.
    #[error("{}: key {key}: expected {expected}, found {found}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The type or values expected.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor is missing or its shape or type is not the expected one.
    #[error("{}: tensor {name}: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape or type expected.
        expected: String,
        /// What is there.
        found: String,
    },
}

/// Result with the reader's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the header says about a tensor; all of it has been checked against the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, at most [`MAX_TENSOR_NAME`] bytes.
    pub name: String,
    /// Values per dimension in ggml's order: the row length first. 1 to 4 dimensions, none zero.
    pub shape: Vec<u64>,
    /// How values are stored.
    pub ty: quant::Type,
    /// Where its data begins, counted from the start of the file; a multiple of the alignment.
    pub offset: usize,
    /// Bytes of its data.
    pub bytes: usize,
}

impl TensorInfo {
    /// Values in a row.
    #[must_use]
    pub fn row_len(&self) -> usize {
        self.shape.first().map_or(0, |&n| n as usize)
    }
    /// Number of rows: the product of all dimensions but the first.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.shape.iter().skip(1).map(|&n| n as usize).product()
    }
    /// Number of values.
    #[must_use]
    pub fn n_elements(&self) -> usize {
        self.row_len() * self.n_rows()
    }
}

/// A metadata entry: where its value lies.
#[derive(Debug)]
struct Entry {
    key: String,
    ty: ValueType,
    /// Element type and count of an array.
    array: Option<(ValueType, usize)>,
    /// Offset of the value in the file: of a string's or array's content, after its length.
    at: usize,
    /// Bytes of the value.
    len: usize,
}

/// A memory-mapped GGUF file (version 2 or 3, little endian), whose header has been checked completely.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    mapping: Mapping,
    header: parse::Header,
    keys: HashMap<String, usize>,
    names: HashMap<String, usize>,
}

impl File {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// [`Error::Open`] and [`Error::Damaged`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let mapping = Mapping::open(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
        let header = parse::header(&mapping).map_err(|e| Error::Damaged {
            path: path.clone(),
            offset: e.offset,
            what: e.what,
        })?;
        let keys = header.entries.iter().enumerate().map(|(i, e)| (e.key.clone(), i)).collect();
        let names = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { path, mapping, header, keys, names })
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Version of the format.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.header.version
    }
    /// Bytes of the file.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }
    /// Never true: an empty file is not a GGUF file.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }
    /// Alignment of tensor data in bytes; a power of two, at least 8.
    #[must_use]
    pub fn alignment(&self) -> usize {
        self.header.alignment
    }
    /// Where tensor data begins.
    #[must_use]
    pub fn data_offset(&self) -> usize {
        self.header.data_offset
    }
    /// The map, for advice to the system.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// All metadata in the order of the file.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.header.entries.iter().filter_map(|e| Some((e.key.as_str(), self.value(e)?)))
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.keys.get(key).and_then(|&i| self.value(self.header.entries.get(i)?))
    }

    /// The value of a key as a Rust type: `u32`, `u64`, `usize`, `i32`, `f32`, `bool`, `&str`, or a `Vec` of `u32`, `i32`, `u64`,
    /// `f32` or `&str`. Integers of another width are taken when they fit.
    ///
    /// # Errors
    /// [`Error::Key`] when it is missing or of another type.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.optional(key)?.ok_or_else(|| self.key_error(key, T::EXPECTED, "nothing"))
    }

    /// Like [`Self::require`], but `None` when the key is missing.
    ///
    /// # Errors
    /// [`Error::Key`] when it is of another type.
    pub fn optional<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = || match value {
            Value::Unsigned(ty, v) => format!("{} {v}", ty.name()),
            Value::Signed(ty, v) => format!("{} {v}", ty.name()),
            _ => value.describe(),
        };
        T::from_value(value).map(Some).ok_or_else(|| self.key_error(key, T::EXPECTED, found()))
    }

    /// An error about the value of `key` in this file.
    pub fn key_error(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        let path = self.path.clone();
        Error::Key { path, key: key.to_owned(), expected: expected.into(), found: found.into() }
    }

    /// An error about the tensor `name` of this file.
    pub fn tensor_error(&self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        let path = self.path.clone();
        Error::Tensor { path, name: name.to_owned(), expected: expected.into(), found: found.into() }
    }

    /// All tensors in the order of the file.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The tensor with this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.names.get(name).and_then(|&i| self.header.tensors.get(i))
    }

    /// The data of one of this file's tensors, as it lies in the map.
    ///
    /// # Panics
    /// When `tensor` is of another, larger file.
    #[must_use]
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        &self.mapping[tensor.offset..][..tensor.bytes]
    }

    fn value(&self, entry: &Entry) -> Option<Value<'_>> {
        let bytes = self.mapping.get(entry.at..)?.get(..entry.len)?;
        match entry.array {
            Some((element, len)) => Some(Value::Array(Array::new(element, len, bytes))),
            None => Value::from_bytes(entry.ty, bytes),
        }
    }
}

#[cfg(test)]
mod tests;

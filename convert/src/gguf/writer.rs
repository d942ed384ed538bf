//! The streaming writer: header first, tensor data as it comes, checksums and the final name last.
use std::{
    fs,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use ggml_kernels::quant;
use rustix::fs::{FlockOperation, flock, statvfs};
use tempfile::NamedTempFile;

use super::{
    DEFAULT_ALIGNMENT, MAX_DIMS, MAX_KEY, MAX_TENSOR_NAME, Value, ValueType,
    checksum::{Checksum, HEADER_KEY, Hasher, TENSORS_KEY},
    parse::tensor_bytes,
};
use crate::{Error, Result};

/// Alignment of the tensor data we write: the default, because llama.cpp's quantizer writes broken files from sources of another.
const ALIGNMENT: usize = DEFAULT_ALIGNMENT;

/// Metadata to be written, in the order in which keys were first set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Key and encoded type and value.
    entries: Vec<(String, Vec<u8>)>,
}

macro_rules! setters {
    ($($name:ident($ty:ty) = $value_type:ident, $array:ident, $doc:literal;)*) => {$(
        #[doc = concat!("Sets `key` to ", $doc, ".")]
        pub fn $name(&mut self, key: &str, value: $ty) {
            self.encoded(key, ValueType::$value_type, |bytes| bytes.extend(value.to_le_bytes()));
        }
        #[doc = concat!("Sets `key` to an array: each ", $doc, ".")]
        pub fn $array(&mut self, key: &str, values: &[$ty]) {
            self.encoded_array(key, ValueType::$value_type, values.len(), |bytes| {
                values.iter().for_each(|v| bytes.extend(v.to_le_bytes()));
            });
        }
    )*};
}

impl Metadata {
    setters! {
        u32(u32) = U32, u32s, "a u32";
        i32(i32) = I32, i32s, "an i32";
        u64(u64) = U64, u64s, "a u64";
        f32(f32) = F32, f32s, "an f32";
    }

    /// Sets `key` to a truth value.
    pub fn bool(&mut self, key: &str, value: bool) {
        self.encoded(key, ValueType::Bool, |bytes| bytes.push(u8::from(value)));
    }

    /// Sets `key` to a string.
    pub fn string(&mut self, key: &str, value: &str) {
        self.encoded(key, ValueType::String, |bytes| put_string(bytes, value));
    }

    /// Sets `key` to an array of strings.
    pub fn strings<S: AsRef<str>>(&mut self, key: &str, values: &[S]) {
        self.encoded_array(key, ValueType::String, values.len(), |bytes| {
            values.iter().for_each(|v| put_string(bytes, v.as_ref()));
        });
    }

    /// Sets `key` to a value read from another file.
    pub fn value(&mut self, key: &str, value: Value<'_>) {
        self.encoded(key, value.value_type(), |bytes| match value {
            Value::Unsigned(ty, v) => bytes.extend(v.to_le_bytes().iter().take(ty.width().unwrap_or(8))),
            Value::Signed(ty, v) => bytes.extend(v.to_le_bytes().iter().take(ty.width().unwrap_or(8))),
            Value::F32(v) => bytes.extend(v.to_le_bytes()),
            Value::F64(v) => bytes.extend(v.to_le_bytes()),
            Value::Bool(v) => bytes.push(u8::from(v)),
            Value::String(v) => put_string(bytes, v),
            Value::Array(array) => {
                bytes.extend((array.element_type() as u32).to_le_bytes());
                bytes.extend((array.len() as u64).to_le_bytes());
                bytes.extend(array.bytes());
            }
        });
    }

    /// Removes a key.
    pub fn remove(&mut self, key: &str) {
        self.entries.retain(|(k, _)| k != key);
    }

    /// Whether `key` is set.
    #[must_use]
    pub fn contains(&self, key: &str) -> bool {
        self.entries.iter().any(|(k, _)| k == key)
    }

    fn encoded_array(&mut self, key: &str, element: ValueType, len: usize, put: impl FnOnce(&mut Vec<u8>)) {
        self.encoded(key, ValueType::Array, |bytes| {
            bytes.extend((element as u32).to_le_bytes());
            bytes.extend((len as u64).to_le_bytes());
            put(bytes);
        });
    }

    fn encoded(&mut self, key: &str, ty: ValueType, put: impl FnOnce(&mut Vec<u8>)) {
        assert!(!key.is_empty() && key.len() <= MAX_KEY, "a key of {} bytes", key.len());
        let mut bytes = (ty as u32).to_le_bytes().to_vec();
        put(&mut bytes);
        match self.entries.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = bytes,
            None => self.entries.push((key.to_owned(), bytes)),
        }
    }
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPlan {
    /// Its name, at most [`MAX_TENSOR_NAME`] bytes.
    pub name: String,
    /// Values per dimension, row length first.
    pub shape: Vec<u64>,
    /// How values are stored.
    pub ty: quant::Type,
}

impl TensorPlan {
    /// Bytes of its data.
    ///
    /// # Errors
    /// When the shape cannot be stored in the type.
    pub fn bytes(&self) -> Result<usize> {
        let dims = if (1..=MAX_DIMS).contains(&self.shape.len()) {
            Ok(())
        } else {
            Err("1 to 4 dimensions expected".to_owned())
        };
        let name = match self.name.len() {
            1..=MAX_TENSOR_NAME => Ok(()),
            n => Err(format!("a name of {n} bytes, 1 to {MAX_TENSOR_NAME} expected")),
        };
        name.and(dims).and_then(|()| tensor_bytes(&self.shape, self.ty)).map_err(|why| {
            Error::Input(format!("tensor {}: shape {:?} of {}: {why}", self.name, self.shape, self.ty))
        })
    }
}

/// Where everything of a file to be written goes.
#[derive(Debug)]
struct Layout {
    metadata: Metadata,
    tensors: Vec<TensorPlan>,
    /// Bytes of each tensor.
    bytes: Vec<usize>,
    /// Offset of each tensor from the start of the data.
    offsets: Vec<usize>,
    data_offset: usize,
    len: usize,
}

impl Layout {
    fn new(mut metadata: Metadata, tensors: Vec<TensorPlan>) -> Result<Self> {
        metadata.remove("general.alignment");
        let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::Input(format!("two tensors are called {}", pair[0])));
        }
        let bytes = tensors.iter().map(TensorPlan::bytes).collect::<Result<Vec<_>>>()?;
        let mut offsets = Vec::with_capacity(bytes.len());
        let mut end = 0usize;
        for &n in &bytes {
            offsets.push(end);
            let next = end.checked_add(n).and_then(|e| e.checked_next_multiple_of(ALIGNMENT));
            end =
                next.ok_or_else(|| Error::Input("the file would be larger than can be addressed".into()))?;
        }
        let mut layout = Self { metadata, tensors, bytes, offsets, data_offset: 0, len: 0 };
        let zeros = vec![Checksum::default(); layout.tensors.len()];
        layout.data_offset = layout.header(&zeros, Checksum::default()).len();
        layout.len = layout.data_offset + end;
        Ok(layout)
    }

    /// The header with its padding. Its length does not depend on the checksums.
    fn header(&self, sums: &[Checksum], header_sum: Checksum) -> Vec<u8> {
        let mut metadata = self.metadata.clone();
        metadata.strings(TENSORS_KEY, &sums.iter().map(ToString::to_string).collect::<Vec<_>>());
        metadata.string(HEADER_KEY, &header_sum.to_string());
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((metadata.entries.len() as u64).to_le_bytes());
        for (key, value) in &metadata.entries {
            put_string(&mut bytes, key);
            bytes.extend(value);
        }
        for (tensor, &offset) in self.tensors.iter().zip(&self.offsets) {
            put_string(&mut bytes, &tensor.name);
            bytes.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
            bytes.extend(tensor.ty.to_ggml().to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }
}

/// End of temporary names.
const TEMPORARY: &str = ".gguf.tmp";

/// Begin of the temporary names of files that will be called `path`.
fn temporary_prefix(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    format!(".clsa-{:016x}-", xxhash_rust::xxh3::xxh3_64(name))
}

/// Removes what killed runs to the same output have left: temporary files that nobody holds. Best effort: a file that cannot be removed
/// hinders nobody.
fn remove_stale(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|n| n.starts_with(prefix) && n.ends_with(TEMPORARY));
        let free = |file: fs::File| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if ours && fs::File::open(entry.path()).is_ok_and(free) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whether `folder`'s file system has room for `needed` bytes; where it does not say, writing will tell.
fn check_room(folder: &Path, needed: u64) -> Result<()> {
    let Ok(stat) = statvfs(folder) else { return Ok(()) };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if needed <= free {
        return Ok(());
    }
    Err(Error::Runtime(format!(
        "{}: the file needs {needed} bytes, {free} are free there: make room or write elsewhere",
        folder.display()
    )))
}

/// Writes a GGUF file (version 3) under a temporary name in the same folder; only [`Self::finish`] gives it its final name, so that
/// a failed or interrupted run leaves nothing there and an older file untouched.
#[derive(Debug)]
pub struct Writer<'a> {
    path: PathBuf,
    file: NamedTempFile,
    layout: Layout,
    abort: Option<&'a AtomicBool>,
    /// Checksums of finished tensors.
    sums: Vec<Checksum>,
    /// Bytes of the tensor in hand, and their checksum so far.
    written: usize,
    hasher: Hasher,
}

impl<'a> Writer<'a> {
    /// Bytes of the file that would be written.
    ///
    /// # Errors
    /// When a tensor's name or shape cannot be stored.
    pub fn file_size(metadata: &Metadata, tensors: &[TensorPlan]) -> Result<u64> {
        Layout::new(metadata.clone(), tensors.to_vec()).map(|layout| layout.len as u64)
    }

    /// Starts a file that will be called `path`. Setting `abort` makes the next write fail with [`Error::Interrupted`].
    ///
    /// # Errors
    /// When a tensor's name or shape cannot be stored, or the file cannot be created.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: Metadata,
        tensors: Vec<TensorPlan>,
        abort: Option<&'a AtomicBool>,
    ) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let layout = Layout::new(metadata, tensors)?;
        if path.is_dir() {
            return Err(Error::Input(format!("{} is a folder: name a file in it", path.display())));
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        check_room(folder, layout.len as u64)?;
        let prefix = temporary_prefix(&path);
        remove_stale(folder, &prefix);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(TEMPORARY);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any new file: what the umask leaves of it.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let file =
            builder.tempfile_in(folder).map_err(|source| Error::Io { path: folder.to_owned(), source })?;
        // Held until the file is closed: a later run knows that it must not remove this one.
        let _ = flock(file.as_file(), FlockOperation::NonBlockingLockExclusive);
        let hasher = Hasher::default();
        let mut writer = Self { path, file, layout, abort, sums: Vec::new(), written: 0, hasher };
        let zeros = vec![Checksum::default(); writer.layout.tensors.len()];
        let header = writer.layout.header(&zeros, Checksum::default());
        writer.write(&header)?;
        writer.close_full_tensors()?;
        Ok(writer)
    }

    /// Bytes of the finished file.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.layout.len as u64
    }
    /// Never true: a file has a header.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Appends data of the tensor in hand, in the order of the plan; a call must not reach past that tensor's end.
    ///
    /// # Errors
    /// When writing fails or the run was aborted.
    ///
    /// # Panics
    /// When there are more bytes than the tensor in hand still needs.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let needed = self.layout.bytes.get(self.sums.len()).map_or(0, |n| n - self.written);
        assert!(bytes.len() <= needed, "{} bytes for a tensor that needs {needed} more", bytes.len());
        self.write(bytes)?;
        self.hasher.update(bytes);
        self.written += bytes.len();
        self.close_full_tensors()
    }

    /// Pads after the tensor in hand when it is complete.
    fn close_full_tensors(&mut self) -> Result<()> {
        if self.layout.bytes.get(self.sums.len()) == Some(&self.written) {
            let padding = self.written.next_multiple_of(ALIGNMENT) - self.written;
            self.write(&[0; ALIGNMENT][..padding])?;
            self.sums.push(std::mem::take(&mut self.hasher).checksum());
            self.written = 0;
        }
        Ok(())
    }

    /// Writes the checksums into the header, syncs, and gives the file its name.
    ///
    /// # Errors
    /// When writing fails or the run was aborted.
    ///
    /// # Panics
    /// When a tensor has not been written completely.
    pub fn finish(mut self) -> Result<()> {
        assert_eq!(self.sums.len(), self.layout.tensors.len(), "tensors written");
        let mut hasher = Hasher::default();
        hasher.update(&self.layout.header(&self.sums, Checksum::default()));
        let header = self.layout.header(&self.sums, hasher.checksum());
        self.file.as_file_mut().seek(SeekFrom::Start(0)).map_err(|e| self.io(e))?;
        self.write(&header)?;
        self.file.as_file().sync_all().map_err(|e| self.io(e))?;
        self.check_abort()?;
        let Self { path, file, .. } = self;
        let folder = file.path().parent().map(Path::to_owned);
        file.persist(&path).map_err(|e| Error::Io { path: path.clone(), source: e.error })?;
        // The name is safe only when the folder is on disk too.
        if let Some(folder) = folder {
            let synced = fs::File::open(&folder).and_then(|f| f.sync_all());
            synced.map_err(|source| Error::Io { path: folder, source })?;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.check_abort()?;
        self.file.as_file_mut().write_all(bytes).map_err(|e| self.io(e))
    }

    fn check_abort(&self) -> Result<()> {
        if self.abort.is_some_and(|a| a.load(Ordering::Relaxed)) { Err(Error::Interrupted) } else { Ok(()) }
    }

    fn io(&self, source: std::io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(n: u64) -> Vec<TensorPlan> {
        vec![TensorPlan { name: "a".into(), shape: vec![n], ty: quant::Type::F32 }]
    }

    #[test]
    fn what_a_killed_run_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let names =
            || -> Vec<_> { fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect() };
        let stale = format!("{}x{TEMPORARY}", temporary_prefix(&path));
        fs::write(dir.path().join(&stale), "half a file").unwrap();
        let other = format!("{}x{TEMPORARY}", temporary_prefix(Path::new("other.gguf")));
        fs::write(dir.path().join(&other), "half a file").unwrap();
        // A run at the same time is left alone; so is what another output's run left.
        let first = Writer::create(&path, Metadata::default(), plan(1), None).unwrap();
        let second = Writer::create(&path, Metadata::default(), plan(1), None).unwrap();
        assert!(!names().contains(&stale.into()) && names().contains(&other.into()));
        for mut writer in [first, second] {
            writer.append(&[0; 4]).unwrap();
            writer.finish().unwrap();
        }
        assert_eq!(names().len(), 2);
    }

    #[test]
    fn a_file_that_has_no_room_is_not_begun() {
        let dir = tempfile::tempdir().unwrap();
        let plan = vec![TensorPlan { name: "a".into(), shape: vec![1 << 30, 1 << 20], ty: quant::Type::F32 }];
        let refused = Writer::create(dir.path().join("a.gguf"), Metadata::default(), plan, None).unwrap_err();
        assert!(refused.to_string().contains("the file needs 4503599627370"), "{refused}");
        assert_eq!(refused.exit_code(), 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

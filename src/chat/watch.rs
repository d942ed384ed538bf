//! Whether the model file is still the one that was mapped.
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What a file was when it was mapped.
#[derive(Clone, Debug)]
pub struct FileWatch {
    path: PathBuf,
    identity: (u64, u64),
    content: (u64, i64, i64),
    told: bool,
}

impl FileWatch {
    /// Remembers the file at `path`, of which `len` bytes are mapped.
    ///
    /// # Errors
    /// When it is gone, or no longer has `len` bytes.
    pub fn new(path: &Path, len: usize) -> Result<Self> {
        let found = std::fs::metadata(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        if found.len() != len as u64 {
            return Err(changed(path, len as u64, found.len()));
        }
        Ok(Self { path: path.to_owned(), identity: identity(&found), content: content(&found), told: false })
    }

    /// Checks the file. A file that was replaced or removed is still mapped as it was: that is worth a note, once.
    ///
    /// # Errors
    /// When the mapped file itself was changed: what is computed from it can no longer be trusted.
    pub fn check(&mut self) -> Result<Option<String>> {
        let what = match std::fs::metadata(&self.path) {
            Ok(now) if identity(&now) != self.identity => "was replaced",
            Ok(now) if content(&now) != self.content => {
                return Err(changed(&self.path, self.content.0, now.len()));
            }
            Ok(_) => return Ok(None),
            Err(_) => "was removed",
        };
        if std::mem::replace(&mut self.told, true) {
            return Ok(None);
        }
        let path = self.path.display();
        Ok(Some(format!(
            "{path} {what}: this session goes on with the model as it was; start again for the new one"
        )))
    }
}

fn changed(path: &Path, before: u64, now: u64) -> Error {
    let what = if now < before { "truncated" } else { "changed" };
    Error::Runtime(format!(
        "{}: the model file was {what} while in use ({before} bytes before, {now} now): restore it, then start again; \
         /save still works",
        path.display()
    ))
}

fn identity(m: &Metadata) -> (u64, u64) {
    (m.dev(), m.ino())
}

fn content(m: &Metadata) -> (u64, i64, i64) {
    (m.len(), m.mtime(), m.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_is_noted_once_and_a_changed_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, b"12345").unwrap();
        let mut watch = FileWatch::new(&path, 5).unwrap();
        assert_eq!(watch.check().unwrap(), None);
        let other = dir.path().join("other");
        std::fs::write(&other, b"123").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(watch.check().unwrap().unwrap().contains("was replaced"));
        assert_eq!(watch.check().unwrap(), None);

        let mut watch = FileWatch::new(&path, 3).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(watch.check().unwrap().unwrap().contains("was removed"));

        std::fs::write(&path, b"12345").unwrap();
        let mut watch = FileWatch::new(&path, 5).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(2).unwrap();
        let error = watch.check().unwrap_err().to_string();
        assert!(error.contains("was truncated while in use (5 bytes before, 2 now)"), "{error}");
        assert!(FileWatch::new(&path, 5).is_err());
    }
}

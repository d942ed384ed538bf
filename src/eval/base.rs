//! A file of reference log probabilities, to compare other models with.
//!
//! Layout, little endian: magic, window length, vocabulary, windows; the tokens of all windows; then for each scored position the least and
//! largest log probability (f32), and `vocab` 16-bit steps between them. Log probabilities below `largest - RANGE` are cut off there: a
//! step is then RANGE/65535 at most.
use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::log_sum_exp;
use super::perplexity::Windows;
use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"CLSAKLB1";
const RANGE: f32 = 20.0;

/// Writes a base. It has its final name only when it is whole.
pub struct Writer {
    out: BufWriter<File>,
    temporary: PathBuf,
    path: PathBuf,
}

impl Writer {
    /// Begins a file for these windows, or goes on with one that was cut off, of whose windows at most `done` are kept. Returns how many
    /// windows are there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(
        path: &Path,
        len: usize,
        vocab: usize,
        windows: &[&[u32]],
        done: usize,
    ) -> Result<(Self, usize)> {
        let temporary = path.with_extension("part");
        let numbers = [len as u64, vocab as u64, windows.len() as u64];
        let tokens = windows.iter().copied().flatten().flat_map(|t| t.to_le_bytes());
        let header: Vec<u8> =
            MAGIC.into_iter().chain(numbers.iter().flat_map(|n| n.to_le_bytes())).chain(tokens).collect();
        let per_window = (len - 1 - len / 2) as u64 * (8 + 2 * vocab as u64);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&temporary).map_err(io(&temporary))?;
        let mut found = vec![];
        (&mut file).take(header.len() as u64).read_to_end(&mut found).map_err(io(&temporary))?;
        let size = file.metadata().map_err(io(&temporary))?.len();
        let done = if found == header {
            ((size - header.len() as u64) / per_window).min(done as u64) as usize
        } else {
            0
        };
        let kept = if done > 0 { header.len() as u64 + done as u64 * per_window } else { 0 };
        file.set_len(kept).and_then(|()| file.seek(SeekFrom::Start(kept))).map_err(io(&temporary))?;
        let out = BufWriter::with_capacity(1 << 20, file);
        let mut writer = Self { out, temporary, path: path.to_owned() };
        if done == 0 {
            writer.write(&header)?;
        }
        Ok((writer, done))
    }

    /// Hands all that was pushed to the system, so that a run that is cut off later can go on from here.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(io(&self.temporary))
    }

    /// Adds one position.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn push(&mut self, logits: &[f32]) -> Result<()> {
        let norm = log_sum_exp(logits) as f32;
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) - norm;
        let least = (logits.iter().copied().fold(f32::INFINITY, f32::min) - norm).max(largest - RANGE);
        let step = ((largest - least) / 65535.0).max(f32::MIN_POSITIVE);
        let mut bytes = Vec::with_capacity(8 + 2 * logits.len());
        bytes.extend(least.to_le_bytes());
        bytes.extend(largest.to_le_bytes());
        bytes.extend(logits.iter().flat_map(|l| {
            let steps = ((l - norm).max(least) - least) / step;
            (steps.round() as u16).to_le_bytes()
        }));
        self.write(&bytes)
    }

    /// Ends the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        let Self { out, temporary, path } = self;
        let file = out.into_inner().map_err(|e| io(&temporary)(e.into_error()))?;
        file.sync_all().map_err(io(&temporary))?;
        std::fs::rename(&temporary, &path).map_err(io(&path))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(io(&self.temporary))
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    |source| Error::Io { path: path.to_owned(), source }
}

/// Reads a base, position by position.
pub struct Reader {
    file: BufReader<File>,
    path: PathBuf,
    /// Tokens of a window.
    pub len: usize,
    vocab: usize,
    /// The tokens of each window.
    pub windows: Vec<Vec<u32>>,
}

impl Reader {
    /// Opens a file that [`Writer`] wrote, for a model with `vocab` tokens.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that is none, or of another vocabulary.
    pub fn open(path: &Path, vocab: usize) -> Result<Self> {
        let file = File::open(path).map_err(io(path))?;
        let size = file.metadata().map_err(io(path))?.len();
        let mut reader = Self {
            file: BufReader::with_capacity(1 << 20, file),
            path: path.to_owned(),
            len: 0,
            vocab,
            windows: vec![],
        };
        let mut header = [0; 32];
        reader.read(&mut header)?;
        if header[..8] != MAGIC {
            return Err(reader.damaged("it does not begin like one"));
        }
        let number = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| header[8 * i + b]));
        let (len, found, windows) = (number(1), number(2), number(3));
        if found != vocab as u64 {
            return Err(reader.damaged(&format!("it is of a vocabulary of {found}, the model's has {vocab}")));
        }
        let per_window = len.checked_mul(4).and_then(|tokens| {
            let scored = len.checked_sub(1)?.checked_sub(len / 2)?;
            tokens.checked_add(scored.checked_mul(8 + 2 * vocab as u64)?)
        });
        if per_window.and_then(|b| b.checked_mul(windows)).and_then(|b| b.checked_add(32)) != Some(size) {
            return Err(
                reader.damaged(&format!("{windows} windows of {len} tokens do not make {size} bytes"))
            );
        }
        reader.len = len as usize;
        for _ in 0..windows {
            let mut bytes = vec![0; reader.len * 4];
            reader.read(&mut bytes)?;
            reader.windows.push(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect());
        }
        if let Some(bad) = reader.windows.iter().flatten().find(|t| **t as usize >= vocab) {
            return Err(reader.damaged(&format!("token {bad} is outside the vocabulary")));
        }
        Ok(reader)
    }

    /// How the windows were cut.
    #[must_use]
    pub fn cut(&self) -> Windows {
        Windows { len: self.len, limit: None, last: None }
    }

    /// Passes over the positions of the next `windows` windows.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn skip(&mut self, windows: usize) -> Result<()> {
        let scored = (self.len - 1 - self.len / 2) as u64;
        let bytes = windows as u64 * scored * (8 + 2 * self.vocab as u64);
        self.file.seek_relative(bytes as i64).map_err(io(&self.path))
    }

    /// Log probabilities of the next position into `out`.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Io`].
    pub fn next(&mut self, out: &mut Vec<f32>) -> Result<()> {
        let mut bytes = vec![0; 8 + 2 * self.vocab];
        self.read(&mut bytes)?;
        let float = |at: usize| f32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let (least, largest) = (float(0), float(4));
        if !(least.is_finite() && largest.is_finite() && least <= largest) {
            return Err(self.damaged("log probabilities are not finite"));
        }
        let step = ((largest - least) / 65535.0).max(f32::MIN_POSITIVE);
        out.clear();
        out.extend(
            bytes[8..].as_chunks::<2>().0.iter().map(|b| least + f32::from(u16::from_le_bytes(*b)) * step),
        );
        Ok(())
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact(bytes).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => self.damaged("it ends too soon"),
            _ => io(&self.path)(e),
        })
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Input(format!("{}: not a usable file of reference logits: {what}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let window = [0, 1, 2, 1];
        let (mut writer, done) = Writer::create(&path, 4, 3, &[&window], 1).unwrap();
        assert_eq!(done, 0);
        let logits = [1.0, 2.0, -3.0];
        writer.push(&logits).unwrap();
        writer.finish().unwrap();
        let mut reader = Reader::open(&path, 3).unwrap();
        assert_eq!((reader.len, reader.windows.clone()), (4, vec![window.to_vec()]));
        let mut out = vec![];
        reader.next(&mut out).unwrap();
        let norm = log_sum_exp(&logits) as f32;
        for (a, b) in out.iter().zip(logits) {
            assert!((a - (b - norm)).abs() < 1e-4);
        }
        assert!(Reader::open(&path, 4).is_err());
        let bytes = std::fs::read(&path).unwrap();
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            assert!(Reader::open(&path, 3).is_err(), "{cut} bytes");
        }
    }

    #[test]
    fn whole_windows_of_a_file_that_was_cut_off_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let windows: [&[u32]; 2] = [&[0, 1, 2, 1], &[1, 1, 0, 2]];
        let write = |keep: usize, push: &[f32]| {
            let (mut writer, done) = Writer::create(&path, 4, 3, &windows, keep).unwrap();
            push.iter().for_each(|&l| writer.push(&[l, 0.0, 0.0]).unwrap());
            writer.flush().unwrap();
            (writer, done)
        };
        write(0, &[1.0, 2.0]).0.finish().unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(write(9, &[1.0]).1, 0);
        let (writer, done) = write(9, &[2.0]);
        assert_eq!(done, 1);
        writer.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        // Another text begins anew.
        write(0, &[1.0]);
        assert_eq!(Writer::create(&path, 4, 3, &windows[..1], 9).unwrap().1, 0);
    }
}

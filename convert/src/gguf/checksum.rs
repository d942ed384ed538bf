//! Checksums that prove a file whole: one per tensor and one over the header that holds them.
use std::{fmt, str::FromStr};

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::{Error, File, Result};

/// Key of the tensors' checksums, an array of strings in the order of the tensors.
pub(super) const TENSORS_KEY: &str = "clsa.checksum.xxh3";
/// Key of the header's checksum: over all bytes before the first tensor, with these 32 digits as zeros.
pub(super) const HEADER_KEY: &str = "clsa.checksum.header";
/// Hexadecimal digits of a checksum.
pub(super) const DIGITS: usize = 32;

/// A 128-bit XXH3 checksum; written as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum(u128);

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0width$x}", self.0, width = DIGITS)
    }
}

impl FromStr for Checksum {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let digits = s.len() == DIGITS && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let value = u128::from_str_radix(s, 16).ok().filter(|_| digits);
        value.map(Self).ok_or_else(|| format!("{s:?} is not {DIGITS} lower-case hexadecimal digits"))
    }
}

/// Computes a [`Checksum`] piece by piece.
#[derive(Clone)]
pub struct Hasher(Box<Xxh3>);

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self(Box::new(Xxh3::new()))
    }
}

impl Hasher {
    /// Takes more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    /// The checksum of all bytes so far.
    #[must_use]
    pub fn checksum(&self) -> Checksum {
        Checksum(self.0.digest128())
    }
}

impl File {
    /// Whether [`Self::verify`] has checksums to go by.
    #[must_use]
    pub fn has_checksums(&self) -> bool {
        self.get(HEADER_KEY).is_some() || self.get(TENSORS_KEY).is_some()
    }

    /// Proves every byte of the file: header and tensors by their checksums, padding by its being zero. `advance` is told of bytes
    /// as they are checked, from several threads; the sum is [`Self::len`].
    ///
    /// # Errors
    /// The first damage found, or [`Error::Key`] when the file carries no checksums.
    pub fn verify(&self, advance: impl Fn(usize) + Sync) -> Result<()> {
        let sums: Vec<&str> = self.require(TENSORS_KEY)?;
        if sums.len() != self.tensors().len() {
            let expected = format!("{} checksums, one per tensor", self.tensors().len());
            return Err(self.key_error(TENSORS_KEY, expected, sums.len().to_string()));
        }
        self.verify_header()?;
        advance(self.data_offset());
        self.verify_padding(&advance)?;
        self.tensors().par_iter().zip(sums).try_for_each(|(tensor, expected)| {
            let expected =
                expected.parse().map_err(|e: String| self.key_error(TENSORS_KEY, "checksums", e))?;
            let mut hasher = Hasher::default();
            let mut at = tensor.offset;
            for chunk in self.data(tensor).chunks(8 << 20) {
                hasher.update(chunk);
                self.mapping.release(at..at + chunk.len());
                at += chunk.len();
                advance(chunk.len());
            }
            same(self, tensor.offset, &format!("tensor {}", tensor.name), expected, hasher.checksum())
        })
    }

    fn verify_header(&self) -> Result<()> {
        let expected: &str = self.require(HEADER_KEY)?;
        let expected = expected.parse().map_err(|e: String| self.key_error(HEADER_KEY, "a checksum", e))?;
        let at = self.header.entries.iter().find(|e| e.key == HEADER_KEY).map_or(0, |e| e.at);
        let Some(header) = self.mapping.get(..self.data_offset()) else {
            return Err(self.damaged(self.len(), "the file ends before its tensor data".into()));
        };
        let mut hasher = Hasher::default();
        hasher.update(&header[..at]);
        hasher.update(&[b'0'; DIGITS]);
        hasher.update(&header[at + DIGITS..]);
        same(self, 0, "the header", expected, hasher.checksum())
    }

    /// Everything between tensors and after the last must be zero, and less than an alignment.
    fn verify_padding(&self, advance: &(impl Fn(usize) + Sync)) -> Result<()> {
        let mut ranges: Vec<_> = self.tensors().iter().map(|t| (t.offset, t.offset + t.bytes)).collect();
        ranges.push((self.len(), self.len()));
        ranges.sort_unstable();
        let mut end = self.data_offset();
        for (start, next_end) in ranges {
            let padding = &self.mapping[end..start];
            if padding.len() >= self.alignment() {
                let what = format!("{} bytes that belong to no tensor", padding.len());
                return Err(self.damaged(end, what));
            }
            if let Some(i) = padding.iter().position(|&b| b != 0) {
                return Err(self.damaged(end + i, "padding that is not zero".into()));
            }
            advance(padding.len());
            end = next_end;
        }
        Ok(())
    }

    fn damaged(&self, offset: usize, what: String) -> Error {
        Error::Damaged { path: self.path().to_owned(), offset: offset as u64, what }
    }
}

fn same(file: &File, offset: usize, what: &str, expected: Checksum, found: Checksum) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(file.damaged(offset, format!("{what} is damaged: expected checksum {expected}, found {found}")))
}

//! The GGUF container, version 3, little endian.

/// A damaged or unusable GGUF file.
#[derive(Debug, thiserror::Error)]
#[error("{path}: at byte {offset}: {what}")]
pub struct Error {
    /// The file.
    pub path: String,
    /// Where in it.
    pub offset: u64,
    /// What was found and what was expected.
    pub what: String,
}

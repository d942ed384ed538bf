//! GGUF files, and the conversion of checkpoints to them.
pub mod gguf;

/// What can go wrong in a conversion.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A GGUF file is damaged.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
}

impl Error {
    /// The process exit code: 1 run-time failure, 2 bad input.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        2
    }
}

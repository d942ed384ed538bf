//! GGUF files, and the conversion of checkpoints to them.
pub mod gguf;

use std::path::PathBuf;

/// What can go wrong in a conversion.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A GGUF file is damaged.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// A checkpoint, an option or a name is not usable.
    #[error("{0}")]
    Input(String),
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that was touched.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The user interrupted the work.
    #[error("interrupted")]
    Interrupted,
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The process exit code: 1 run-time failure, 2 bad input, 130 interrupted.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Gguf(_) | Self::Input(_) => 2,
            Self::Io { .. } => 1,
            Self::Interrupted => 130,
        }
    }
}

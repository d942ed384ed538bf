//! GGUF files, and the conversion of checkpoints to them.
pub mod checkpoint;
pub mod encode;
pub mod family;
pub mod gguf;
pub mod imatrix;
pub mod model;
pub mod plan;
mod random;
pub mod recipe;
pub mod synth;
mod tokenizer;

use std::path::PathBuf;

pub use encode::Options;
pub use model::Model;
pub use plan::Plan;
pub use recipe::{Mix, Override, Recipe};

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
    /// An input file or folder cannot be read.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that was touched.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system failed.
    #[error("{0}")]
    Runtime(String),
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
            Self::Gguf(_) | Self::Input(_) | Self::Open { .. } => 2,
            Self::Io { .. } | Self::Runtime(_) => 1,
            Self::Interrupted => 130,
        }
    }
}

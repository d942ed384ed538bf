//! Typed errors. They are printed once, in `main`, which also chooses the exit code from [`Error::exit_code`].
use std::path::PathBuf;

/// What can go wrong, with what was found, what was expected and the remedy in each message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or an argument from outside is not usable. Exit code 2.
    #[error("{0}")]
    Input(String),
    /// A GGUF file is damaged or not what it claims to be. Exit code 2.
    #[error(transparent)]
    Gguf(#[from] clsa_convert::gguf::Error),
    /// A conversion failed.
    #[error(transparent)]
    Convert(#[from] clsa_convert::Error),
    /// A vocabulary cannot be used. Exit code 2.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::Error),
    /// A sampling parameter cannot be used (exit code 2), or no token can be taken from the logits (1).
    #[error(transparent)]
    Sampler(#[from] crate::sampler::Error),
    /// A session file cannot be used. Exit code 2.
    #[error(transparent)]
    Session(#[from] crate::session::FileError),
    /// A chat template is missing, broken or refuses a conversation.
    #[error(transparent)]
    Template(#[from] crate::template::Error),
    /// Reading or writing failed. Exit code 1.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that was touched.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// More positions than the context holds. Exit code 2.
    #[error("the prompt needs {needed} tokens but the context holds {context}: shorten it or raise -c")]
    ContextFull {
        /// Positions that the request needs.
        needed: usize,
        /// Positions that the context holds.
        context: usize,
    },
    /// Memory that could not be had. Exit code 1.
    #[error("out of memory: {what} needs {needed} bytes, {free} are free: {remedy}")]
    Memory {
        /// What it was wanted for.
        what: String,
        /// Bytes wanted.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// What to change.
        remedy: String,
    },
    /// A model that does not fit on the devices where it was wanted. Exit code 1.
    #[error("the model does not fit:\n{table}{remedy}")]
    Placement {
        /// What each device needs and has free.
        table: String,
        /// What to change.
        remedy: String,
    },
    /// A device or library failed while running. Exit code 1.
    #[error("{0}")]
    Runtime(String),
    /// The user interrupted the work. Exit code 130.
    #[error("interrupted")]
    Interrupted,
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The process exit code: 1 run-time failure, 2 bad arguments or input file, 130 interrupted.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_)
            | Self::Session(_)
            | Self::Gguf(_)
            | Self::Tokenizer(_)
            | Self::ContextFull { .. } => 2,
            Self::Convert(e) => e.exit_code(),
            Self::Template(e) => e.exit_code(),
            Self::Sampler(e) => e.exit_code(),
            Self::Io { .. } | Self::Memory { .. } | Self::Placement { .. } | Self::Runtime(_) => 1,
            Self::Interrupted => 130,
        }
    }
}

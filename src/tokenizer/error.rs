//! What can be wrong with a file's vocabulary.

/// An unusable vocabulary, or a token id that it does not hold. Exit code 2.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Neither form of a tokenizer is in the file.
    #[error(
        "the file holds no tokenizer (neither tokenizer.huggingface.json nor tokenizer.ggml.tokens): \
         convert the checkpoint again with its tokenizer.json beside it"
    )]
    Missing,
    /// A key is absent, of another type or out of range.
    #[error("{key}: {what}")]
    Key {
        /// The metadata key.
        key: String,
        /// What was found and what was expected.
        what: String,
    },
    /// The JSON text of a tokenizer cannot be read.
    #[error("tokenizer.huggingface.json: {0}")]
    Json(String),
    /// A part of the tokenizer is of a kind that is not implemented.
    #[error("tokenizer {part} `{found}` is not supported; supported: {supported}")]
    Unsupported {
        /// Which part: model, pre-tokenizer, normalizer, decoder.
        part: &'static str,
        /// Its name in the file.
        found: String,
        /// The names that are.
        supported: &'static str,
    },
    /// A token that cannot be one.
    #[error("token {id} {text:?}: {what}")]
    Token {
        /// Its id.
        id: u32,
        /// Its text, cut to 64 characters.
        text: String,
        /// What is wrong.
        what: String,
    },
    /// A merge that cannot be applied.
    #[error("merge {rank} {text:?}: {what}")]
    Merge {
        /// Its place in the list, from 0.
        rank: usize,
        /// Its text, cut to 64 characters.
        text: String,
        /// What is wrong.
        what: String,
    },
    /// An id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {size}")]
    IdOutOfRange {
        /// The id.
        id: u32,
        /// Ids that exist.
        size: usize,
    },
    /// The tokenizer failed on a text.
    #[error("tokenizing failed: {0}")]
    Encode(String),
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The start of a text from outside, for an error message.
pub(super) fn cut(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

impl Error {
    pub(super) fn key(key: &str, what: impl Into<String>) -> Self {
        Self::Key { key: key.to_owned(), what: what.into() }
    }
    pub(super) fn token(id: u32, text: &str, what: impl Into<String>) -> Self {
        Self::Token { id, text: cut(text), what: what.into() }
    }
    pub(super) fn merge(rank: usize, text: &str, what: impl Into<String>) -> Self {
        Self::Merge { rank, text: cut(text), what: what.into() }
    }
}

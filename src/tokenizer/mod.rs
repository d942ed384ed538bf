//! Text to token ids and back, from a GGUF file's metadata: `tokenizer.huggingface.json` where the file has it,
//! `tokenizer.ggml.*` in files made by others.
mod added;
mod bpe;
mod error;
mod ggml;
mod json;
mod pieces;
mod spm;
#[cfg(test)]
mod tests;

pub use error::{Error, Result};
pub use ggml::GgmlVocab;
pub use pieces::StreamDecoder;

use crate::gguf::File;
use added::Matcher;
use bpe::Bpe;
use pieces::Pieces;
use spm::SentencePiece;
use std::{collections::HashSet, ops::Range};

/// A text in which special tokens count, except where a guard stands inside one. Chat templates make it: what the user
/// wrote is guarded, so that it cannot pose as the template's own control tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// Byte offsets into `text`, ascending: no special token may reach across one.
    pub guards: Vec<usize>,
}

/// Tokens with a meaning of their own; each id is inside the vocabulary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// End of a turn.
    pub eot: Option<u32>,
    /// Whether a text begins with `bos` (tokenizer.ggml.add_bos_token).
    pub add_bos: bool,
    /// Whether a complete text ends with `eos` (tokenizer.ggml.add_eos_token).
    pub add_eos: bool,
    /// Ids that end an answer, ascending: `eos`, `eot` and `clsa.eos_token_ids`. A file without that key was made by
    /// others, who rely on tokens being known by their text: see [`END_OF_ANSWER`].
    pub stop: Vec<u32>,
}

/// Control tokens that end an answer by common usage; looked for in files that do not list such tokens.
pub const END_OF_ANSWER: [&str; 10] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<EOT>",
    "</s>",
    "<｜end▁of▁sentence｜>",
];

/// How text between added tokens becomes ids.
enum Core {
    Bpe(Box<Bpe>),
    SentencePiece {
        model: Box<SentencePiece>,
        /// A text, and each part after an added token, begins with a space.
        space_prefix: bool,
    },
}

/// What both forms of a tokenizer come down to.
struct Loaded {
    core: Core,
    added: Matcher,
    added_normalized: Matcher,
    pieces: Pieces,
    special: HashSet<u32>,
    strips_leading_space: bool,
}

/// What a file says about special tokens.
#[derive(Clone, Debug, Default)]
struct SpecialKeys {
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    eom: Option<u32>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    stop: Option<Vec<u32>>,
}

/// A vocabulary, and the rules by which text becomes its ids.
pub struct Tokenizer {
    loaded: Loaded,
    special: SpecialTokens,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("len", &self.len())
            .field("special", &self.special)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a file.
    ///
    /// # Errors
    /// [`crate::Error::Gguf`] for keys of a wrong type, [`Error`] for a vocabulary that is missing, damaged or of a kind
    /// that is not supported.
    pub fn from_gguf(file: &File) -> crate::Result<Self> {
        let tokens: Option<Vec<&str>> = file.optional("tokenizer.ggml.tokens")?;
        let model: Option<&str> = file.optional("tokenizer.ggml.model")?;
        let pre: Option<&str> = file.optional("tokenizer.ggml.pre")?;
        let mut keys = SpecialKeys {
            bos: file.optional("tokenizer.ggml.bos_token_id")?,
            eos: file.optional("tokenizer.ggml.eos_token_id")?,
            eot: file.optional("tokenizer.ggml.eot_token_id")?,
            eom: file.optional("tokenizer.ggml.eom_token_id")?,
            add_bos: file.optional("tokenizer.ggml.add_bos_token")?,
            add_eos: file.optional("tokenizer.ggml.add_eos_token")?,
            stop: file.optional("clsa.eos_token_ids")?,
        };
        if let Some(json) = file.optional::<&str>("tokenizer.huggingface.json")? {
            let size = vocab_size(file, tokens.as_ref().map(Vec::len))?;
            return Ok(Self::from_json(json, size, keys)?);
        }
        let tokens = tokens.ok_or(Error::Missing)?;
        let vocab = GgmlVocab {
            model: model.ok_or_else(|| Error::key("tokenizer.ggml.model", "is missing"))?,
            pre,
            tokens,
            scores: file.optional("tokenizer.ggml.scores")?,
            types: file.optional("tokenizer.ggml.token_type")?,
            merges: file.optional("tokenizer.ggml.merges")?,
            add_space_prefix: file.optional("tokenizer.ggml.add_space_prefix")?,
            unk: file.optional("tokenizer.ggml.unknown_token_id")?.or(Some(0)),
        };
        if vocab.model == "llama" {
            keys.bos = keys.bos.or(Some(1));
            keys.eos = keys.eos.or(Some(2));
        }
        Ok(Self::from_ggml(&vocab, keys)?)
    }

    /// A tokenizer from the text of a tokenizer.json, for a model with `size` tokens.
    fn from_json(json: &str, size: usize, mut keys: SpecialKeys) -> Result<Self> {
        let (loaded, first) = json::load(json, size)?;
        if keys.add_bos.is_none() {
            let bos = keys.bos.and_then(|id| loaded.pieces.get(id).ok());
            keys.add_bos = Some(first.is_some() && first.as_deref().map(str::as_bytes) == bos);
        }
        Self::new(loaded, keys)
    }

    fn from_ggml(vocab: &GgmlVocab<'_>, mut keys: SpecialKeys) -> Result<Self> {
        let loaded = ggml::load(vocab)?;
        keys.add_bos = keys.add_bos.or(Some(keys.bos.is_some() && ggml::adds_bos(vocab.model, vocab.pre)));
        Self::new(loaded, keys)
    }

    /// A tokenizer from the parts of a `tokenizer.ggml` vocabulary, with no special ids.
    ///
    /// # Errors
    /// [`Error`] for a vocabulary that is damaged or of a kind that is not supported.
    pub fn from_vocab(vocab: &GgmlVocab<'_>) -> Result<Self> {
        Self::from_ggml(vocab, SpecialKeys::default())
    }

    /// A tokenizer from the text of a tokenizer.json for a model with `size` tokens, with no special ids.
    ///
    /// # Errors
    /// [`Error`] for a tokenizer that is damaged or of a kind that is not supported.
    pub fn from_tokenizer_json(json: &str, size: usize) -> Result<Self> {
        Self::from_json(json, size, SpecialKeys::default())
    }

    fn new(loaded: Loaded, keys: SpecialKeys) -> Result<Self> {
        let size = loaded.pieces.len();
        let ids = [
            ("tokenizer.ggml.bos_token_id", keys.bos),
            ("tokenizer.ggml.eos_token_id", keys.eos),
            ("tokenizer.ggml.eot_token_id", keys.eot),
            ("tokenizer.ggml.eom_token_id", keys.eom),
        ];
        let stop = keys.stop.iter().flatten().map(|id| ("clsa.eos_token_ids", Some(*id)));
        for (key, id) in ids.into_iter().chain(stop) {
            if let Some(id) = id.filter(|id| usize::try_from(*id).map_or(true, |id| id >= size)) {
                return Err(Error::key(key, format!("{id}, expected less than the vocabulary's {size}")));
            }
        }
        for (flag, id, key) in [
            (keys.add_bos, keys.bos, "tokenizer.ggml.add_bos_token"),
            (keys.add_eos, keys.eos, "tokenizer.ggml.add_eos_token"),
        ] {
            if flag == Some(true) && id.is_none() {
                return Err(Error::key(key, "is set, but the file does not say which token that is"));
            }
        }
        let mut stop: Vec<u32> = [keys.eos, keys.eot, keys.eom].into_iter().flatten().collect();
        match keys.stop {
            Some(listed) => stop.extend(listed),
            None => stop.extend(loaded.special.iter().filter(|id| {
                let piece = loaded.pieces.get(**id).unwrap_or_default();
                END_OF_ANSWER.iter().any(|text| text.as_bytes() == piece)
            })),
        }
        stop.sort_unstable();
        stop.dedup();
        let special = SpecialTokens {
            bos: keys.bos,
            eos: keys.eos,
            eot: keys.eot,
            add_bos: keys.add_bos.unwrap_or(false),
            add_eos: keys.add_eos.unwrap_or(false),
            stop,
        };
        Ok(Self { loaded, special })
    }

    /// The ids of `text`, without BOS or EOS. Special tokens in it are found only with `parse_special`; otherwise their
    /// text is text, so that it cannot pose as a control token.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        self.encode_where(text, &|_| parse_special)
    }

    /// The ids of a chat template's result, beginning with BOS if the file asks for it and the template has not put it
    /// there. Special tokens count where no guard stands inside them.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn encode_prompt(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let ids = self.encode_where(&prompt.text, &|range| {
            let first = prompt.guards.partition_point(|at| *at <= range.start);
            prompt.guards.get(first).is_none_or(|at| *at >= range.end)
        })?;
        Ok(self.begin(ids))
    }

    /// Puts BOS before `ids` if the file asks for it and it is not there yet.
    #[must_use]
    pub fn begin(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let Some(bos) = self.special.bos.filter(|bos| self.special.add_bos && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        ids
    }

    fn encode_where(&self, text: &str, special: &dyn Fn(&Range<usize>) -> bool) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        match &self.loaded.core {
            Core::Bpe(bpe) => {
                bpe.encode(text, &self.loaded.added, &self.loaded.added_normalized, special, &mut ids)?;
            }
            Core::SentencePiece { model, space_prefix } => {
                let mut after_token = true;
                for (range, id) in self.loaded.added.split(text, special) {
                    if let Some(id) = id {
                        ids.push(id);
                    } else {
                        let prefix = if *space_prefix && after_token { "▁" } else { "" };
                        model.encode(&format!("{prefix}{}", text[range].replace(' ', "▁")), &mut ids);
                    }
                    after_token = id.is_some();
                }
            }
        }
        Ok(ids)
    }

    /// The text of a whole sequence; special tokens appear only with `show_special`. Bytes that are no UTF-8 become
    /// U+FFFD. The space that a SentencePiece vocabulary puts before a text is dropped.
    ///
    /// # Errors
    /// [`Error::IdOutOfRange`].
    pub fn decode(&self, ids: &[u32], show_special: bool) -> Result<String> {
        let mut bytes = Vec::new();
        for id in ids {
            if show_special || !self.is_special(*id) {
                bytes.extend_from_slice(self.piece(*id)?);
            }
        }
        let skip = usize::from(self.loaded.strips_leading_space && bytes.first() == Some(&b' '));
        Ok(String::from_utf8_lossy(&bytes[skip..]).into_owned())
    }

    /// The bytes that a token stands for; empty for ids that no token has. Not always whole characters.
    ///
    /// # Errors
    /// [`Error::IdOutOfRange`].
    pub fn piece(&self, id: u32) -> Result<&[u8]> {
        self.loaded.pieces.get(id)
    }

    /// Whether the id is a control token, which is not part of the text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.loaded.special.contains(&id)
    }

    /// Whether the id ends an answer.
    #[must_use]
    pub fn is_stop(&self, id: u32) -> bool {
        self.special.stop.binary_search(&id).is_ok()
    }

    /// The tokens with a meaning of their own.
    #[must_use]
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// The texts of all control tokens.
    pub fn special_texts(&self) -> impl Iterator<Item = &str> {
        let texts = self.loaded.special.iter().filter_map(|id| self.piece(*id).ok());
        texts.filter_map(|piece| std::str::from_utf8(piece).ok())
    }

    /// Number of ids, as many as the model has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.loaded.pieces.len()
    }

    /// Whether there are no ids.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The number of tokens that the model knows: the rows of its embedding, or the tokens listed in a file without weights.
/// Both are bounded by the size of the file.
fn vocab_size(file: &File, tokens: Option<usize>) -> crate::Result<usize> {
    let rows = file.tensor("token_embd.weight").map(|t| t.n_rows());
    Ok(rows
        .or(tokens)
        .ok_or_else(|| file.tensor_error("token_embd.weight", "[hidden, vocabulary]", "nothing"))?)
}

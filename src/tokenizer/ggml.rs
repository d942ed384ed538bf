//! Tokenizers from `tokenizer.ggml.*` alone, as files made by llama.cpp's converters carry them.
use super::{
    Core, Loaded,
    added::{AddedToken, Matcher},
    bpe::{Bpe, Parts},
    error::{Error, Result},
    pieces::{Pieces, Spelling, byte_token},
    spm::SentencePiece,
};
use ahash::AHashMap;
use std::collections::HashSet;
use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// The keys under `tokenizer.ggml.` that say how text becomes tokens.
#[derive(Clone, Debug, Default)]
pub struct GgmlVocab<'a> {
    /// `model`: `gpt2` or `llama`.
    pub model: &'a str,
    /// `pre`: which texts the merges of a `gpt2` model never cross.
    pub pre: Option<&'a str>,
    /// `tokens`: the text of each id.
    pub tokens: Vec<&'a str>,
    /// `scores`: of each id, for `llama` models.
    pub scores: Option<Vec<f32>>,
    /// `token_type`: of each id, 1 to 6 (normal, unknown, control, user-defined, unused, byte).
    pub types: Option<Vec<i32>>,
    /// `merges`: pairs with a space between, for `gpt2` models.
    pub merges: Option<Vec<&'a str>>,
    /// `add_space_prefix`, for `llama` models; yes when missing.
    pub add_space_prefix: Option<bool>,
    /// `unknown_token_id`, for `llama` models; 0 when missing.
    pub unk: Option<u32>,
}

/// `tokenizer.ggml.token_type`, as SentencePiece numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Kind {
    fn from_number(number: i32) -> Option<Self> {
        [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte]
            .into_iter()
            .find(|k| *k as i32 == number)
    }
    /// Not a part of text: shown and parsed only where asked for.
    fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::Unknown)
    }
}

const CONTRACTIONS: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const PRE_TOKENIZERS: &str = "llama-bpe, qwen2, smollm, gpt-2";

/// The patterns of `tokenizer.ggml.pre` in the order in which they split, and whether a word that is a token is taken
/// whole. Names that llama.cpp treats as one of the four are taken as that one.
fn patterns(pre: &str) -> Result<(Vec<String>, bool)> {
    // Letters with at most one character before them, digits in groups of at most `digits`, punctuation with line ends.
    let words = |digits: &str| {
        format!(
            r"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    Ok(match pre {
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
            (vec![words("{1,3}")], true)
        }
        "qwen2" | "deepseek-r1-qwen" | "kormo" | "megrez" => (vec![words("")], false),
        "smollm" => (vec![r"\p{N}".into(), GPT2.into()], false),
        "gpt-2" | "phi-2" | "gigachat" | "mellum" | "exaone4" => (vec![GPT2.into()], false),
        other => {
            return Err(Error::Unsupported {
                part: "pre-tokenizer (tokenizer.ggml.pre)",
                found: super::error::cut(other),
                supported: PRE_TOKENIZERS,
            });
        }
    })
}

/// Whether text gets a beginning-of-sequence token when the file does not say.
pub(super) fn adds_bos(model: &str, pre: Option<&str>) -> bool {
    model == "llama" || pre.and_then(|p| patterns(p).ok()).is_some_and(|(_, llama3)| llama3)
}

pub(super) fn load(vocab: &GgmlVocab<'_>) -> Result<Loaded> {
    let kinds = check_tokens(vocab)?;
    let special: HashSet<u32> =
        (0..).zip(&kinds).filter(|(_, kind)| kind.is_special()).map(|(id, _)| id).collect();
    let spelling = match vocab.model {
        "gpt2" => Spelling::ByteLevel,
        "llama" => Spelling::SentencePiece,
        other => {
            return Err(Error::Unsupported {
                part: "model (tokenizer.ggml.model)",
                found: super::error::cut(other),
                supported: "gpt2, llama",
            });
        }
    };
    let pieces: Vec<Vec<u8>> = vocab
        .tokens
        .iter()
        .zip(&kinds)
        .map(|(text, kind)| match kind {
            Kind::Normal | Kind::Unused => match spelling {
                // Only tokens of the byte kind are bytes.
                Spelling::SentencePiece => text.replace('▁', " ").into_bytes(),
                Spelling::ByteLevel => spelling.bytes(text),
            },
            Kind::Byte => byte_token(text).into_iter().collect(),
            Kind::Unknown | Kind::Control | Kind::UserDefined => text.as_bytes().to_vec(),
        })
        .collect();
    let added = (0..)
        .zip(vocab.tokens.iter().zip(&kinds))
        .filter(|(_, (_, kind))| kind.is_special() || **kind == Kind::UserDefined)
        .map(|(id, (text, kind))| AddedToken {
            id,
            content: (*text).to_owned(),
            special: kind.is_special(),
            ..AddedToken::default()
        });
    let added = Matcher::new(added.collect())?;
    let core = match spelling {
        Spelling::ByteLevel => Core::Bpe(Box::new(byte_level(vocab, special.clone())?)),
        Spelling::SentencePiece => sentence_piece(vocab, &kinds)?,
    };
    Ok(Loaded {
        core,
        added,
        added_normalized: Matcher::new(Vec::new())?,
        pieces: Pieces::new(pieces.iter().map(Vec::as_slice)),
        special,
        strips_leading_space: spelling == Spelling::SentencePiece && vocab.add_space_prefix.unwrap_or(true),
    })
}

/// Checks each token's text, kind and score; returns the kinds.
fn check_tokens(vocab: &GgmlVocab<'_>) -> Result<Vec<Kind>> {
    let n = vocab.tokens.len();
    if n == 0 || u32::try_from(n).is_err() {
        let what = format!("{n} tokens, expected 1 to {}", u32::MAX);
        return Err(Error::key("tokenizer.ggml.tokens", what));
    }
    let types = vocab.types.as_ref().map(Vec::len).map(|len| ("tokenizer.ggml.token_type", len));
    let scores = vocab.scores.as_ref().map(Vec::len).map(|len| ("tokenizer.ggml.scores", len));
    for (key, len) in [types, scores].into_iter().flatten() {
        if len != n {
            return Err(Error::key(key, format!("{len} values, expected one for each of the {n} tokens")));
        }
    }
    let mut first = AHashMap::with_capacity(n);
    let mut kinds = Vec::with_capacity(n);
    for (id, (at, text)) in (0u32..).zip(vocab.tokens.iter().enumerate()) {
        if text.is_empty() {
            return Err(Error::token(id, text, "is empty"));
        }
        if let Some(earlier) = first.insert(*text, id) {
            return Err(Error::token(id, text, format!("has the text of token {earlier}")));
        }
        let number = vocab.types.as_ref().map_or(Kind::Normal as i32, |t| t[at]);
        let kind = Kind::from_number(number)
            .ok_or_else(|| Error::token(id, text, format!("its type is {number}, expected 1 to 6")))?;
        // Some files call the tokens that end an answer by another type; llama.cpp overrides it as well.
        let ends = super::END_OF_ANSWER.contains(text) && matches!(kind, Kind::Normal | Kind::UserDefined);
        let kind = if ends { Kind::Control } else { kind };
        if kind == Kind::Byte && byte_token(text).is_none() {
            return Err(Error::token(id, text, "is of the byte type, expected <0x00> to <0xFF>"));
        }
        kinds.push(kind);
    }
    Ok(kinds)
}

fn byte_level(vocab: &GgmlVocab<'_>, special: HashSet<u32>) -> Result<Bpe> {
    let pre = vocab.pre.ok_or_else(|| {
        Error::key("tokenizer.ggml.pre", format!("is missing; a gpt2 model needs one of {PRE_TOKENIZERS}"))
    })?;
    let (patterns, ignore_merges) = patterns(pre)?;
    let merges = vocab
        .merges
        .as_ref()
        .ok_or_else(|| Error::key("tokenizer.ggml.merges", "is missing; a gpt2 model needs it"))?
        .iter()
        .enumerate()
        .map(|(rank, text)| {
            text.split_once(' ')
                .filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '))
                .ok_or_else(|| Error::merge(rank, text, "expected two tokens with a space between them"))
        })
        .collect::<Result<_>>()?;
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in patterns {
        let split = Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false)
            .map_err(|e| Error::Encode(e.to_string()))?;
        steps.push(split.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    let parts = Parts {
        tokens: vocab.tokens.iter().copied().zip(0..).collect(),
        merges,
        special,
        ignore_merges,
        keep_gaps: true,
        ..Parts::default()
    };
    Bpe::new(parts, None, Some(Sequence::new(steps).into()))
}

fn sentence_piece(vocab: &GgmlVocab<'_>, kinds: &[Kind]) -> Result<Core> {
    let scores = vocab
        .scores
        .as_ref()
        .ok_or_else(|| Error::key("tokenizer.ggml.scores", "is missing; a llama model needs it"))?;
    let mut bytes = [None; 256];
    for (id, (text, kind)) in (0..).zip(vocab.tokens.iter().zip(kinds)) {
        if *kind == Kind::Byte
            && let Some(byte) = byte_token(text)
            && let Some(earlier) = bytes[usize::from(byte)].replace(id)
        {
            return Err(Error::token(id, text, format!("is the same byte as token {earlier}")));
        }
    }
    let unk = vocab.unk.filter(|id| usize::try_from(*id).is_ok_and(|id| id < vocab.tokens.len()));
    // Text never becomes a control or byte token by merging, as in SentencePiece.
    let pieces = (0..)
        .zip(vocab.tokens.iter().zip(scores).zip(kinds))
        .filter(|(_, (_, kind))| !kind.is_special() && **kind != Kind::Byte)
        .map(|(id, ((text, score), _))| (*text, id, *score));
    Ok(Core::SentencePiece {
        model: Box::new(SentencePiece::new(pieces, bytes, unk)?),
        space_prefix: vocab.add_space_prefix.unwrap_or(true),
    })
}

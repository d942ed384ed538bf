//! Tokenizers from the text of a Hugging Face tokenizer.json (`tokenizer.huggingface.json` in a GGUF file).
use super::{
    Core, Loaded,
    added::{AddedToken, Matcher},
    bpe::{Bpe, Parts},
    error::{Error, Result, cut},
    pieces::{Pieces, Spelling},
};
use ahash::AHashMap;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Value, value::RawValue};
use std::{borrow::Cow, collections::HashSet, fmt};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

#[derive(Deserialize)]
struct File<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(borrow)]
    model: &'a RawValue,
}

#[derive(Deserialize)]
struct ModelType {
    #[serde(rename = "type")]
    name: Option<String>,
}

#[derive(Deserialize)]
struct Model<'a> {
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(borrow)]
    vocab: Vocab<'a>,
    #[serde(borrow)]
    merges: Vec<Merge<'a>>,
}

/// Entries in the order of the file, repeated ones kept, so that they can be refused.
struct Vocab<'a>(Vec<(Cow<'a, str>, u32)>);

/// Borrowed from the JSON text unless it holds escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Vocab<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from token to id")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some((Text(text), id)) = map.next_entry()? {
                    entries.push((text, id));
                }
                Ok(Vocab(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// `"left right"` or `["left", "right"]`.
enum Merge<'a> {
    Spaced(Cow<'a, str>),
    Pair(Cow<'a, str>, Cow<'a, str>),
}

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Merge<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge: \"left right\" or [\"left\", \"right\"]")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Merge<'de>, E> {
                Ok(Merge::Spaced(Cow::Borrowed(text)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Merge<'de>, E> {
                Ok(Merge::Spaced(Cow::Owned(text.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge<'de>, A::Error> {
                let short = || de::Error::custom("a merge of fewer than two tokens");
                let Text(left) = seq.next_element()?.ok_or_else(short)?;
                let Text(right) = seq.next_element()?.ok_or_else(short)?;
                if seq.next_element::<de::IgnoredAny>()?.is_some() {
                    return Err(de::Error::custom("a merge of more than two tokens"));
                }
                Ok(Merge::Pair(left, right))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl Merge<'_> {
    fn pair(&self, rank: usize) -> Result<(&str, &str)> {
        let (left, right) = match self {
            Self::Pair(left, right) => (left.as_ref(), right.as_ref()),
            Self::Spaced(text) => text
                .split_once(' ')
                .filter(|(_, right)| !right.contains(' '))
                .ok_or_else(|| Error::merge(rank, text, "expected two tokens with a space between them"))?,
        };
        if left.is_empty() || right.is_empty() {
            return Err(Error::merge(rank, &format!("{left} {right}"), "one of its tokens is empty"));
        }
        Ok((left, right))
    }
}

const NORMALIZERS: &str = "NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip, Prepend, Replace, Sequence";
const PRE_TOKENIZERS: &str =
    "ByteLevel, Split, Digits, Metaspace, Whitespace, WhitespaceSplit, Punctuation, Sequence";
const DECODERS: &str = "ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip, Sequence";

/// The types in a tree of Sequences, each of which must be among `supported`.
fn types(part: &'static str, value: &Value, supported: &'static str) -> Result<Vec<String>> {
    if value.is_null() {
        return Ok(Vec::new());
    }
    let name = value.get("type").and_then(Value::as_str).unwrap_or("without a type");
    if !supported.split(", ").any(|s| s == name) {
        return Err(Error::Unsupported { part, found: cut(name), supported });
    }
    let mut found = vec![name.to_owned()];
    for list in ["normalizers", "pretokenizers", "decoders"] {
        for step in value.get(list).and_then(Value::as_array).into_iter().flatten() {
            found.extend(types(part, step, supported)?);
        }
    }
    Ok(found)
}

/// How the tokens are spelled, and whether decoding drops a space at the start, from the decoder (or from the pre-tokenizer
/// where there is none).
fn spelling(decoder: &Value, pre_tokenizer: &[String]) -> Result<(Spelling, bool)> {
    let found = types("decoder", decoder, DECODERS)?;
    let has = |list: &[String], name: &str| list.iter().any(|s| s == name);
    if has(&found, "ByteLevel") || (found.is_empty() && has(pre_tokenizer, "ByteLevel")) {
        return Ok((Spelling::ByteLevel, false));
    }
    if has(&found, "ByteFallback") || has(&found, "Metaspace") {
        let steps = decoder.get("decoders").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let strips = std::iter::once(decoder).chain(steps).any(|step| {
            match step.get("type").and_then(Value::as_str) {
                Some("Strip") => step.get("start").and_then(Value::as_u64).is_some_and(|n| n > 0),
                Some("Metaspace") => step.get("prepend_scheme").and_then(Value::as_str) != Some("never"),
                _ => false,
            }
        });
        return Ok((Spelling::SentencePiece, strips));
    }
    Err(Error::Unsupported { part: "decoder", found: found.join(", "), supported: DECODERS })
}

/// The text of the token that the post-processor puts before every text.
fn first_added(post_processor: &Value) -> Option<&str> {
    match post_processor.get("type")?.as_str()? {
        "Sequence" => post_processor.get("processors")?.as_array()?.iter().find_map(first_added),
        "TemplateProcessing" => {
            post_processor.get("single")?.get(0)?.get("SpecialToken")?.get("id")?.as_str()
        }
        _ => None,
    }
}

/// A tokenizer for a model of `size` tokens, and the text of the token that it puts before every text.
pub(super) fn load(text: &str, size: usize) -> Result<(Loaded, Option<String>)> {
    let invalid = |e: serde_json::Error| Error::Json(e.to_string());
    let file: File<'_> = serde_json::from_str(text).map_err(invalid)?;
    let model_type: ModelType = serde_json::from_str(file.model.get()).map_err(invalid)?;
    if let Some(name) = model_type.name.filter(|name| name != "BPE") {
        return Err(Error::Unsupported { part: "model", found: cut(&name), supported: "BPE" });
    }
    let model: Model<'_> = serde_json::from_str(file.model.get()).map_err(invalid)?;
    if model.dropout.is_some_and(|p| p != 0.0) {
        return Err(Error::Json("the model drops merges at random (dropout), expected none".into()));
    }
    for (key, affix) in [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        if let Some(affix) = affix.as_ref().filter(|a| !a.is_empty()) {
            return Err(Error::Json(format!("{key} is {:?}, expected none", cut(affix))));
        }
    }

    types("normalizer", &file.normalizer, NORMALIZERS)?;
    let pre_types = types("pre-tokenizer", &file.pre_tokenizer, PRE_TOKENIZERS)?;
    let (spelling, strips_leading_space) = spelling(&file.decoder, &pre_types)?;
    let normalizer: Option<NormalizerWrapper> = serde_json::from_value(file.normalizer).map_err(invalid)?;
    let pre_tokenizer: Option<PreTokenizerWrapper> =
        serde_json::from_value(file.pre_tokenizer).map_err(invalid)?;

    let ids = check_vocab(&model.vocab.0, size)?;
    check_added(&file.added_tokens, &ids, size)?;
    let special: HashSet<u32> = file.added_tokens.iter().filter(|t| t.special).map(|t| t.id).collect();
    let mut pieces = vec![Vec::new(); size];
    for (text, id) in &model.vocab.0 {
        pieces[*id as usize] = spelling.bytes(text);
    }
    for token in &file.added_tokens {
        pieces[token.id as usize] = token.content.as_bytes().to_vec();
    }
    let parts = Parts {
        tokens: model.vocab.0.iter().map(|(text, id)| (text.as_ref(), *id)).collect(),
        merges: model.merges.iter().enumerate().map(|(rank, m)| m.pair(rank)).collect::<Result<_>>()?,
        special: special.clone(),
        ignore_merges: model.ignore_merges,
        byte_fallback: model.byte_fallback,
        unk: model.unk_token.as_deref(),
        fuse_unk: model.fuse_unk,
        keep_gaps: false,
    };
    let core = Core::Bpe(Box::new(Bpe::new(parts, normalizer, pre_tokenizer)?));
    let (normalized, raw) = file.added_tokens.into_iter().partition(|t| t.normalized);
    let loaded = Loaded {
        core,
        added: Matcher::new(raw)?,
        added_normalized: Matcher::new(normalized)?,
        pieces: Pieces::new(pieces.iter().map(Vec::as_slice)),
        special,
        strips_leading_space,
    };
    Ok((loaded, first_added(&file.post_processor).map(str::to_owned)))
}

/// Each text and each id once, ids below `size`. Returns the ids by text.
fn check_vocab<'a>(vocab: &'a [(Cow<'a, str>, u32)], size: usize) -> Result<AHashMap<&'a str, u32>> {
    let mut ids = AHashMap::with_capacity(vocab.len());
    let mut taken: Vec<Option<&str>> = vec![None; size];
    for (text, id) in vocab {
        check_id(text, *id, size)?;
        if let Some(other) = ids.insert(text.as_ref(), *id) {
            return Err(Error::token(*id, text, format!("has the text of token {other}")));
        }
        if let Some(other) = taken[*id as usize].replace(text) {
            return Err(Error::token(*id, text, format!("has the id of token {:?}", cut(other))));
        }
    }
    Ok(ids)
}

fn check_id(text: &str, id: u32, size: usize) -> Result<()> {
    if text.is_empty() {
        return Err(Error::token(id, text, "is empty"));
    }
    if usize::try_from(id).is_ok_and(|id| id < size) {
        return Ok(());
    }
    Err(Error::token(id, text, format!("its id is outside the model's vocabulary of {size}")))
}

/// An added token that is in the vocabulary has its id there; another one has an id of its own.
fn check_added(added: &[AddedToken], ids: &AHashMap<&str, u32>, size: usize) -> Result<()> {
    let mut texts = HashSet::new();
    let mut own: Vec<Option<&str>> = vec![None; size];
    ids.iter().for_each(|(text, id)| own[*id as usize] = Some(text));
    for token in added {
        check_id(&token.content, token.id, size)?;
        if !texts.insert(token.content.as_str()) {
            return Err(Error::token(token.id, &token.content, "is added twice"));
        }
        if let Some(other) = ids.get(token.content.as_str()).filter(|id| **id != token.id) {
            return Err(Error::token(token.id, &token.content, format!("has id {other} in the vocabulary")));
        }
        let before = own[token.id as usize].replace(&token.content);
        if let Some(other) = before.filter(|other| *other != token.content) {
            return Err(Error::token(
                token.id,
                &token.content,
                format!("has the id of token {:?}", cut(other)),
            ));
        }
    }
    Ok(())
}

//! Tokenizer, chat template and sampling defaults of a checkpoint folder, as metadata.
//!
//! The tokenizer goes into the file twice: whole (`tokenizer.huggingface.json`), and as the `tokenizer.ggml.*` arrays that llama.cpp
//! and its kin read.
mod pretokenizer;
mod sentencepiece;

use std::{collections::HashMap, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    Error, Result,
    checkpoint::{read_json, read_text},
    gguf::Metadata,
};

/// llama.cpp's kinds of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// A vocabulary as `tokenizer.ggml.*` has it; the index is the id.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Vocabulary {
    pub tokens: Vec<String>,
    pub kinds: Vec<Kind>,
    /// Only of SentencePiece models.
    pub scores: Vec<f32>,
}

impl Vocabulary {
    /// `n` tokens that nothing maps to.
    fn unused(n: usize) -> Self {
        Self {
            tokens: (0..n).map(|i| format!("[PAD{i}]")).collect(),
            kinds: vec![Kind::Unused; n],
            scores: Vec::new(),
        }
    }

    fn set(&mut self, id: usize, token: &str, kind: Kind) -> std::result::Result<(), String> {
        let n = self.tokens.len();
        match (self.tokens.get_mut(id), self.kinds.get_mut(id)) {
            (Some(t), Some(k)) => {
                (*t, *k) = (token.to_owned(), kind);
                Ok(())
            }
            _ => Err(format!("token {token:?} has id {id}: the model's vocabulary has {n} rows")),
        }
    }
}

/// What we read of tokenizer.json.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    /// Read as [`BpeModel`] when it is one.
    model: Value,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: usize,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct BpeModel {
    vocab: HashMap<String, usize>,
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    unk_token: Option<String>,
}

/// A merge: `"a b"`, or, in newer files, `["a", "b"]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair(String, String),
}

impl Merge {
    fn joined(&self) -> String {
        match self {
            Self::Joined(s) => s.clone(),
            Self::Pair(a, b) => format!("{a} {b}"),
        }
    }
}

/// What we read of tokenizer_config.json.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<Value>,
    eos_token: Option<Value>,
    unk_token: Option<Value>,
    pad_token: Option<Value>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    add_prefix_space: Option<bool>,
    chat_template: Option<Value>,
}

/// The ids in config.json, for what the tokenizer's files do not say.
#[derive(Default, Deserialize)]
struct ConfigIds {
    bos_token_id: Option<Ids>,
    eos_token_id: Option<Ids>,
    pad_token_id: Option<Ids>,
}

/// What we read of generation_config.json.
#[derive(Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<Ids>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<i64>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

/// Ids of special tokens: one or several. Negative ones stand for none.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(i64),
    Many(Vec<i64>),
}

impl Ids {
    fn list(&self) -> Vec<u32> {
        let ids = match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        };
        ids.iter().filter(|&&id| id >= 0).map(|&id| u32::try_from(id).unwrap_or(u32::MAX)).collect()
    }
}

/// Adds tokenizer, chat template, special tokens and sampling defaults of the folder `dir` to `metadata`, for a model of `vocab`
/// embedding rows. Returns what the user should know.
///
/// # Errors
/// When one of the files is damaged or does not fit the model.
pub(crate) fn add(dir: &Path, vocab: usize, metadata: &mut Metadata) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let config: TokenizerConfig = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let path = dir.join("tokenizer.json");
    let named = |path: &Path, what: String| Error::Input(format!("{}: {what}", path.display()));
    let mut ids = HashMap::new();
    if let Some(text) = read_text(&path)? {
        let tokenizer: TokenizerJson =
            serde_json::from_str(&text).map_err(|e| named(&path, e.to_string()))?;
        ids =
            add_huggingface(&tokenizer, &config, vocab, metadata, &mut notes).map_err(|e| named(&path, e))?;
        metadata.string("tokenizer.huggingface.json", &text);
    }
    // A SentencePiece model beside it has the true scores.
    let sentencepiece = dir.join("tokenizer.model");
    if sentencepiece.is_file() {
        let bytes = std::fs::read(&sentencepiece)
            .map_err(|source| Error::Open { path: sentencepiece.clone(), source })?;
        let added = sentencepiece::read(&bytes, vocab, &ids).map_err(|e| named(&sentencepiece, e))?;
        put_vocabulary(metadata, "llama", &added);
        metadata.remove("tokenizer.ggml.merges");
        for (id, token) in added.tokens.iter().enumerate() {
            ids.entry(token.clone()).or_insert(id as u32);
        }
    }
    if ids.is_empty() {
        notes.push(format!("{}: no tokenizer.json: the file will have no tokenizer", dir.display()));
    }
    special_tokens(dir, &config, &ids, vocab, metadata)?;
    chat_template(dir, &config, metadata)?;
    Ok(notes)
}

/// Adds a tokenizer made here, with its first ids `<|endoftext|>`, begin and end of a turn.
pub(crate) fn add_synthetic(
    tokenizer: &Value,
    vocab: usize,
    metadata: &mut Metadata,
) -> std::result::Result<Vec<String>, String> {
    let parsed = TokenizerJson::deserialize(tokenizer).map_err(|e| e.to_string())?;
    let mut notes = Vec::new();
    add_huggingface(&parsed, &TokenizerConfig::default(), vocab, metadata, &mut notes)?;
    metadata.string("tokenizer.huggingface.json", &tokenizer.to_string());
    metadata.u32("tokenizer.ggml.bos_token_id", 0);
    metadata.u32("tokenizer.ggml.eos_token_id", 2);
    metadata.u32("tokenizer.ggml.padding_token_id", 0);
    metadata.u32s("clsa.eos_token_ids", &[2]);
    Ok(notes)
}

/// Fills `tokenizer.ggml.*` from tokenizer.json; returns the ids of its added tokens, or of all tokens where there are none.
fn add_huggingface(
    tokenizer: &TokenizerJson,
    config: &TokenizerConfig,
    vocab: usize,
    metadata: &mut Metadata,
    notes: &mut Vec<String>,
) -> std::result::Result<HashMap<String, u32>, String> {
    // Old files do not say the type.
    let kind = tokenizer.model.get("type").and_then(Value::as_str);
    if let Some(other) = kind.filter(|k| *k != "BPE") {
        notes.push(format!("tokenizer.json: a {other} model has no tokenizer.ggml.* form: other programs will not find a tokenizer"));
        return Ok(tokenizer.added_tokens.iter().map(|t| (t.content.clone(), t.id as u32)).collect());
    }
    let model = BpeModel::deserialize(&tokenizer.model).map_err(|e| format!("model: {e}"))?;
    let mut list = Vocabulary::unused(vocab);
    for (token, &id) in &model.vocab {
        let unknown = model.unk_token.as_ref() == Some(token);
        let kind = if unknown {
            Kind::Unknown
        } else if model.byte_fallback && sentencepiece::is_byte(token) {
            Kind::Byte
        } else {
            Kind::Normal
        };
        list.set(id, token, kind)?;
    }
    for token in &tokenizer.added_tokens {
        let unknown = model.byte_fallback && model.unk_token.as_ref() == Some(&token.content);
        let kind = if unknown {
            Kind::Unknown
        } else if token.special {
            Kind::Control
        } else {
            Kind::UserDefined
        };
        list.set(token.id, &token.content, kind)?;
    }
    let merges: Vec<String> = model.merges.iter().map(Merge::joined).collect();
    let added = tokenizer.added_tokens.iter().map(|t| (t.content.clone(), t.id as u32));
    let ids: HashMap<String, u32> =
        model.vocab.iter().map(|(t, &id)| (t.clone(), id as u32)).chain(added).collect();
    if model.byte_fallback {
        list.scores = sentencepiece::scores_of_merges(&list.tokens, &merges);
        put_vocabulary(metadata, "llama", &list);
        metadata.bool("tokenizer.ggml.add_space_prefix", config.add_prefix_space.unwrap_or(true));
    } else {
        put_vocabulary(metadata, "gpt2", &list);
        metadata.strings("tokenizer.ggml.merges", &merges);
        match pretokenizer::name(tokenizer.pre_tokenizer.as_ref()) {
            Some(pre) => metadata.string("tokenizer.ggml.pre", pre),
            None => notes.push(format!(
                "tokenizer.json: its pre-tokenizer is none of {}: tokenizer.ggml.pre is not written, and programs that know \
                 tokenizer.ggml.* only may split text differently",
                pretokenizer::NAMES.join(", ")
            )),
        }
        metadata.bool("tokenizer.ggml.add_space_prefix", false);
    }
    let (bos, eos) = pretokenizer::added_by(tokenizer.post_processor.as_ref());
    metadata.bool("tokenizer.ggml.add_bos_token", config.add_bos_token.unwrap_or(bos));
    metadata.bool("tokenizer.ggml.add_eos_token", config.add_eos_token.unwrap_or(eos));
    Ok(ids)
}

fn put_vocabulary(metadata: &mut Metadata, model: &str, list: &Vocabulary) {
    metadata.string("tokenizer.ggml.model", model);
    metadata.strings("tokenizer.ggml.tokens", &list.tokens);
    metadata.i32s("tokenizer.ggml.token_type", &list.kinds.iter().map(|&k| k as i32).collect::<Vec<_>>());
    if !list.scores.is_empty() {
        metadata.f32s("tokenizer.ggml.scores", &list.scores);
        metadata.string("tokenizer.ggml.pre", "default");
    }
}

/// Begin, end, padding and unknown ids, every id that ends generation, and sampling defaults.
fn special_tokens(
    dir: &Path,
    config: &TokenizerConfig,
    ids: &HashMap<String, u32>,
    vocab: usize,
    metadata: &mut Metadata,
) -> Result<()> {
    let fallback: ConfigIds = read_json(&dir.join("config.json"))?.unwrap_or_default();
    let path = dir.join("generation_config.json");
    let generation: GenerationConfig = read_json(&path)?.unwrap_or_default();
    let check = |what: &str, id: u32| match (id as usize) < vocab {
        true => Ok(id),
        false => {
            Err(Error::Input(format!("{}: {what} {id}: the vocabulary has {vocab} rows", dir.display())))
        }
    };
    let named = |token: &Option<Value>| {
        let text = token.as_ref().and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()))?;
        ids.get(text).copied()
    };
    let single = |token: &Option<Value>, id: &Option<Ids>| {
        named(token).or_else(|| id.as_ref()?.list().first().copied())
    };
    let eos = single(&config.eos_token, &fallback.eos_token_id);
    for (key, id) in [
        ("bos", single(&config.bos_token, &fallback.bos_token_id)),
        ("eos", eos),
        ("unknown", named(&config.unk_token)),
        ("padding", single(&config.pad_token, &fallback.pad_token_id)),
    ] {
        if let Some(id) = id {
            metadata.u32(&format!("tokenizer.ggml.{key}_token_id"), check(key, id)?);
        }
    }
    let mut ends: Vec<u32> = eos.into_iter().collect();
    for id in [&fallback.eos_token_id, &generation.eos_token_id].into_iter().flatten().flat_map(Ids::list) {
        if !ends.contains(&check("eos_token_id", id)?) {
            ends.push(id);
        }
    }
    if !ends.is_empty() {
        metadata.u32s("clsa.eos_token_ids", &ends);
    }
    // Without sampling the most likely token is taken: our temperature 0, whatever temperature stands beside it.
    let temperature = if generation.do_sample == Some(false) { Some(0.0) } else { generation.temperature };
    for (key, value, min, max) in [
        ("temperature", temperature, 0.0, 100.0),
        ("top_p", generation.top_p, 0.0, 1.0),
        ("min_p", generation.min_p, 0.0, 1.0),
        ("repetition_penalty", generation.repetition_penalty, 0.0, 100.0),
    ] {
        let Some(value) = value else { continue };
        if !(min..=max).contains(&value) {
            return Err(Error::Input(format!(
                "{}: {key}: expected {min} to {max}, found {value}",
                path.display()
            )));
        }
        metadata.f32(&format!("clsa.sampling.{key}"), value);
    }
    // Zero and below: no limit.
    if let Some(top_k) = generation.top_k {
        metadata.u32("clsa.sampling.top_k", u32::try_from(top_k).unwrap_or(0));
    }
    Ok(())
}

/// The template from chat_template.jinja, or from tokenizer_config.json: one string, or several with names.
fn chat_template(dir: &Path, config: &TokenizerConfig, metadata: &mut Metadata) -> Result<()> {
    const KEY: &str = "tokenizer.chat_template";
    match &config.chat_template {
        Some(Value::String(template)) => metadata.string(KEY, template),
        Some(Value::Array(list)) => {
            let mut names = Vec::new();
            for entry in list {
                let text = |key: &str| entry.get(key).and_then(Value::as_str);
                match (text("name"), text("template")) {
                    (Some("default"), Some(template)) => metadata.string(KEY, template),
                    (Some(name), Some(template))
                        if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') =>
                    {
                        metadata.string(&format!("{KEY}.{name}"), template);
                        names.push(name);
                    }
                    _ => {}
                }
            }
            if !names.is_empty() {
                metadata.strings("tokenizer.chat_templates", &names);
            }
        }
        _ => {}
    }
    if let Some(template) = read_text(&dir.join("chat_template.jinja"))? {
        metadata.string(KEY, &template);
    }
    Ok(())
}

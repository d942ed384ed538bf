//! What a session file is bound to.
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::cache::{PAGE, pools};
use crate::engine::Engine;
use crate::gguf::{File, Value};

/// What must be the same for cached rows and a history to mean the same. The routing mode is not part of it: no cached row depends
/// on it (model.md section 1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// [`model_hash`].
    pub model: String,
    /// Hash of the vocabulary and its rules.
    pub tokenizer: String,
    /// Hash of the chat template in use; of nothing for raw completion.
    pub template: String,
    /// Stored types and widths of a position's rows, the page size, and the window rows.
    pub caches: String,
}

impl Identity {
    /// The identity of sessions on `engine`, where messages are written by `template`.
    #[must_use]
    pub fn new(engine: &Engine, template: &str) -> Self {
        let file = &engine.model().file;
        let (c, spec) = (&engine.model().config, engine.spec());
        let pools = pools(c, spec).iter().fold(String::new(), |all, p| {
            let layer = p.layer.map_or_else(String::new, |l| l.to_string());
            format!("{all}{:?}{layer} {:?} x {}, ", p.kind, p.cache_type, p.width)
        });
        let window = c.window.map_or_else(
            || "no windows".to_owned(),
            |w| {
                let width = c.self_heads.kv_width();
                format!("windows of {w} in {} layers, K {:?}, V {:?} x {width}", c.n_self, spec.k, spec.v)
            },
        );
        Self {
            model: model_hash(file),
            tokenizer: tokenizer_hash(file),
            template: hex(&hash(template.as_bytes())),
            caches: format!("{pools}pages of {PAGE}, {window}"),
        }
    }

    /// What differs from `found`, which a session file was made with, and what to do about it; `None` when nothing does.
    #[must_use]
    pub fn difference(&self, found: &Self) -> Option<String> {
        let short = |hash: &str| hash.chars().take(12).collect::<String>();
        let model = "start with that model (-m)";
        let fields = [
            ("model", short(&self.model), short(&found.model), self.model == found.model, model),
            (
                "tokenizer",
                short(&self.tokenizer),
                short(&found.tokenizer),
                self.tokenizer == found.tokenizer,
                model,
            ),
            (
                "chat template",
                short(&self.template),
                short(&found.template),
                self.template == found.template,
                "use the same --chat-template or --no-chat as then",
            ),
            (
                "cache layout",
                self.caches.clone(),
                found.caches.clone(),
                self.caches == found.caches,
                "use the same -ctk and -ctv as then",
            ),
        ];
        let differ: Vec<_> = fields.iter().filter(|(.., same, _)| !same).collect();
        let (.., remedy) = differ.first()?;
        let list: Vec<_> = differ
            .iter()
            .map(|(what, mine, other, ..)| format!("another {what} ({other}, here {mine})"))
            .collect();
        Some(format!("it was made with {}: {remedy}", list.join(", ")))
    }
}

/// Tells model files apart, cheaply and strongly: over the header, which holds the checksum of every tensor in files that clsa
/// wrote, and the length of the file. In files without checksums a sample of each tensor's bytes stands for them.
#[must_use]
pub fn model_hash(file: &File) -> String {
    const SAMPLE: usize = 4096;
    let mut hasher = Xxh3::new();
    hasher.update(&file.mapping()[..file.data_offset()]);
    hasher.update(&(file.len() as u64).to_le_bytes());
    if !file.has_checksums() {
        for tensor in file.tensors() {
            let data = file.data(tensor);
            let n = data.len().min(SAMPLE);
            hasher.update(&data[..n]);
            hasher.update(&data[data.len() - n..]);
        }
    }
    hex(&hasher.digest128().to_be_bytes())
}

fn tokenizer_hash(file: &File) -> String {
    let mut hasher = Xxh3::new();
    for (key, value) in file.metadata() {
        let own = key.starts_with("tokenizer.") || key == "clsa.eos_token_ids";
        if own && !key.starts_with("tokenizer.chat_template") {
            hasher.update(key.as_bytes());
            match value {
                Value::String(text) => hasher.update(text.as_bytes()),
                Value::Array(array) => hasher.update(array.bytes()),
                other => hasher.update(format!("{other:?}").as_bytes()),
            }
        }
    }
    hex(&hasher.digest128().to_be_bytes())
}

/// XXH3-128.
pub(super) fn hash(bytes: &[u8]) -> [u8; 16] {
    xxhash_rust::xxh3::xxh3_128(bytes).to_be_bytes()
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

//! GGUF metadata -> [`Config`], every invariant checked before anything is sized by it.
use crate::config::{Architecture, Config, Heads, Indexer, Rope};
use crate::error::{Error, Result};
use crate::gguf::File;

// Far above any model, far below anything whose products overflow.
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 4096;
const MAX_CONTEXT: usize = 1 << 26;

/// Reads and checks the shape of the model in `file`.
pub fn config(file: &File) -> Result<Config> {
    let name = file.require::<&str>("general.architecture")?;
    let architecture = match name {
        "yoco-clsa" => Architecture::YocoClsa,
        "llama" => Architecture::Llama,
        "qwen3" => Architecture::Qwen3,
        other => {
            return Err(file.key_error("general.architecture", "yoco-clsa, llama or qwen3", other).into());
        }
    };
    Keys { file, prefix: name }.read(architecture)
}

/// Reads keys under the architecture's prefix.
struct Keys<'a> {
    file: &'a File,
    prefix: &'a str,
}

impl Keys<'_> {
    fn read(&self, architecture: Architecture) -> Result<Config> {
        let yoco = architecture == Architecture::YocoClsa;
        let hidden = self.size("embedding_length", 1, MAX_WIDTH)?;
        let n_layer = self.size("block_count", 1, MAX_LAYERS)?;
        let n_self = if yoco { self.size("self_decoder.block_count", 1, n_layer - 1)? } else { n_layer };
        let cross_heads = self.heads("attention", hidden)?;
        let self_heads = if yoco && self.has("self_decoder.attention.head_count") {
            self.heads("self_decoder.attention", hidden)?
        } else {
            cross_heads
        };
        let window = yoco.then(|| self.size("attention.sliding_window", 1, MAX_CONTEXT)).transpose()?;
        let rope = self.rope("rope.dimension_count", self_heads.head_dim, architecture)?;
        let cross_rope = (yoco && self.has("cross_decoder.rope.dimension_count"))
            .then(|| self.rope("cross_decoder.rope.dimension_count", cross_heads.head_dim, architecture))
            .transpose()?;
        let indexer = (yoco && self.has("attention.indexer.key_length"))
            .then(|| {
                self.size_or("attention.indexer.head_count", 1, 1, 1)?;
                Ok::<_, Error>(Indexer {
                    head_dim: self.size("attention.indexer.key_length", 1, MAX_WIDTH)?,
                    top_k: self.size("attention.indexer.top_k", 1, MAX_CONTEXT)?,
                })
            })
            .transpose()?;
        Ok(Config {
            architecture,
            vocab: self.vocab()?,
            hidden,
            ffn: self.size("feed_forward_length", 1, MAX_WIDTH)?,
            n_layer,
            n_self,
            self_heads,
            cross_heads,
            window,
            rope,
            cross_rope,
            rms_eps: self.float("attention.layer_norm_rms_epsilon", 0.0..=1.0, None)?,
            qk_norm: self.file.tensor("blk.0.attn_q_norm.weight").is_some(),
            indexer,
            context_length: self.size("context_length", 1, MAX_CONTEXT)?,
            embed_scale: self.float("embedding_scale", f32::MIN_POSITIVE..=1e6, Some(1.0))?,
        })
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn has(&self, key: &str) -> bool {
        self.file.get(&self.key(key)).is_some()
    }

    fn size(&self, key: &str, min: usize, max: usize) -> Result<usize> {
        let key = self.key(key);
        self.in_range(&key, self.file.require(&key)?, min, max)
    }

    fn size_or(&self, key: &str, min: usize, max: usize, default: usize) -> Result<usize> {
        if self.has(key) { self.size(key, min, max) } else { Ok(default) }
    }

    fn in_range(&self, key: &str, found: usize, min: usize, max: usize) -> Result<usize> {
        if (min..=max).contains(&found) {
            return Ok(found);
        }
        Err(self.file.key_error(key, format!("{min} to {max}"), found.to_string()).into())
    }

    fn float(&self, key: &str, range: std::ops::RangeInclusive<f32>, default: Option<f32>) -> Result<f32> {
        let key = self.key(key);
        let found = match default {
            Some(d) => self.file.optional(&key)?.unwrap_or(d),
            None => self.file.require(&key)?,
        };
        if found.is_finite() && range.contains(&found) {
            return Ok(found);
        }
        Err(self
            .file
            .key_error(&key, format!("{} to {}", range.start(), range.end()), found.to_string())
            .into())
    }

    fn heads(&self, group: &str, hidden: usize) -> Result<Heads> {
        let n_head = self.size(&format!("{group}.head_count"), 1, MAX_WIDTH)?;
        let n_kv = self.size_or(&format!("{group}.head_count_kv"), 1, n_head, n_head)?;
        let default_dim = hidden / n_head;
        let head_dim = self.size_or(&format!("{group}.key_length"), 1, 4096, default_dim)?;
        let value_dim = self.size_or(&format!("{group}.value_length"), 1, 4096, head_dim)?;
        let fail = |what: String| Err(Error::Input(format!("{}: {what}", self.file.path().display())));
        if !n_head.is_multiple_of(n_kv) {
            return fail(format!(
                "{group}: {n_head} query heads are not a multiple of {n_kv} key/value heads"
            ));
        }
        if value_dim != head_dim {
            return fail(format!(
                "{group}: value_length {value_dim} differs from key_length {head_dim}, which is not supported"
            ));
        }
        if head_dim == 0 || n_head * head_dim > MAX_WIDTH {
            return fail(format!("{group}: {n_head} heads of {head_dim} are not a usable width"));
        }
        Ok(Heads { n_head, n_kv, head_dim })
    }

    fn rope(&self, count_key: &str, head_dim: usize, architecture: Architecture) -> Result<Rope> {
        let n_rot = self.size_or(count_key, 2, head_dim, head_dim)?;
        if !n_rot.is_multiple_of(2) {
            return Err(self
                .file
                .key_error(&self.key(count_key), "an even number", n_rot.to_string())
                .into());
        }
        let scaling = self.key("rope.scaling.type");
        let linear_scale = match self.file.optional::<&str>(&scaling)? {
            None | Some("none") => 1.0,
            Some("linear") => self.float("rope.scaling.factor", 1e-3..=1e6, None)?,
            Some(other) => {
                return Err(self
                    .file
                    .key_error(&scaling, "none or linear (no other is supported)", other)
                    .into());
            }
        };
        Ok(Rope {
            base: self.float("rope.freq_base", 1e-3..=1e12, Some(10_000.0))?,
            n_rot,
            interleaved: architecture == Architecture::Llama,
            linear_scale,
        })
    }

    /// Rows of the embedding: the key where there is one, and the tensor's own shape (checked against each other in `load`).
    fn vocab(&self) -> Result<usize> {
        if self.has("vocab_size") {
            return self.size("vocab_size", 1, 1 << 24);
        }
        let rows = self.file.tensor("token_embd.weight").and_then(|t| t.shape.get(1).copied()).unwrap_or(0);
        self.in_range(&self.key("vocab_size"), usize::try_from(rows).unwrap_or(usize::MAX), 1, 1 << 24)
    }
}

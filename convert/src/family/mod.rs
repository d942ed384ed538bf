//! The families of checkpoints (model.md section 4): from a configuration to metadata and the list of tensors.
mod transformer;
mod unilm;
mod yoco_clsa;

use std::path::Path;

use serde_json::Value;

use crate::{Error, Result, checkpoint::read_json, gguf::Metadata};

/// The most layers taken: a guard against absurd configurations.
const MAX_LAYERS: usize = 4096;
/// The most of any width, head count or vocabulary.
const MAX_DIM: usize = 1 << 24;

/// How the rows of a q or k projection move, in each head, so that rotary pairs lie where the file's architecture has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// They stay.
    AsIs,
    /// From pairs (2j, 2j+1) to pairs (j, j + d/2).
    PairsToHalves {
        /// d.
        head_dim: usize,
    },
    /// From pairs (j, j + d/2) to pairs (2j, 2j+1).
    HalvesToPairs {
        /// d.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The source's row for row `row` of the file.
    #[must_use]
    pub fn source_row(self, row: usize) -> usize {
        match self {
            Self::AsIs => row,
            Self::PairsToHalves { head_dim } => {
                let (head, i) = (row / head_dim * head_dim, row % head_dim);
                head + 2 * (i % (head_dim / 2)) + i / (head_dim / 2)
            }
            Self::HalvesToPairs { head_dim } => {
                let (head, i) = (row / head_dim * head_dim, row % head_dim);
                head + i / 2 + i % 2 * (head_dim / 2)
            }
        }
    }
}

/// Where a wanted tensor comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// The checkpoint.
    Stored {
        /// Its name there.
        name: String,
        /// How its rows move.
        order: RowOrder,
    },
    /// The configuration alone.
    Computed(Vec<f32>),
}

/// A tensor that the file will have.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, row length first.
    pub shape: Vec<u64>,
    /// Where it comes from.
    pub origin: Origin,
}

/// Metadata and tensors of a model of some configuration.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The family's name, for messages.
    pub family: &'static str,
    /// Architecture and hyperparameters.
    pub metadata: Metadata,
    /// Every tensor in the order of the file.
    pub tensors: Vec<Wanted>,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Query heads per KV head in the self-decoder.
    pub n_gqa: usize,
    /// Layers.
    pub n_layer: usize,
    /// The checkpoint's name of the embedding.
    pub embedding: &'static str,
    /// Set when embeddings are tied: the checkpoint's name of an output that may be there as a copy.
    pub tied_output: Option<&'static str>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Layout {
    /// Reads the configuration in a checkpoint folder.
    ///
    /// # Errors
    /// When there is none, or it is of no supported family, or its values are missing or impossible.
    pub fn read(dir: &Path) -> Result<Self> {
        let config = dir.join("config.json");
        if let Some(value) = read_json::<Value>(&config)? {
            return Self::from_config(value)
                .map_err(|what| Error::Input(format!("{}: {what}", config.display())));
        }
        let params = dir.join("params.json");
        if let Some(value) = read_json::<Value>(&params)? {
            return unilm::layout(value)
                .map_err(|what| Error::Input(format!("{}: {what}", params.display())));
        }
        let what = "neither config.json (Hugging Face) nor params.json (microsoft/unilm YOCO) in the folder";
        Err(Error::Input(format!("{}: {what}", dir.display())))
    }

    /// The layout of a Hugging Face configuration.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_config(config: Value) -> std::result::Result<Self, String> {
        match config.get("model_type").and_then(Value::as_str) {
            Some("yoco_clsa") => yoco_clsa::layout(config),
            Some("llama") => transformer::layout(config, transformer::Kind::Llama),
            Some("qwen3") => transformer::layout(config, transformer::Kind::Qwen3),
            Some(other) => {
                Err(format!("model_type {other:?} is not supported: expected yoco_clsa, llama or qwen3"))
            }
            None => Err("no model_type: expected yoco_clsa, llama or qwen3".into()),
        }
    }

    /// Tensors that old checkpoints carry and nobody needs.
    pub(crate) fn ignores(&self, name: &str) -> bool {
        name.ends_with(".rotary_emb.inv_freq")
    }

    /// What may be behind tensors that do not belong.
    pub(crate) fn hint(&self, names: &[&str]) -> &'static str {
        let any = |part: &str| names.iter().any(|n| n.contains(part));
        if any("indexer.") {
            ": config.json lacks index_head_dim and index_topk"
        } else if any(".bias") {
            ": biases are not supported"
        } else if any("_norm.weight") && any("self_attn.") {
            ": is qk_norm missing in config.json?"
        } else if any(".g_proj") || any(".gt_proj") {
            ": gated retention is not supported"
        } else {
            ""
        }
    }
}

/// Lists tensors in the order of the file.
#[derive(Default)]
struct List(Vec<Wanted>);

impl List {
    /// A matrix of `rows` rows of `columns` values.
    fn matrix(
        &mut self,
        name: impl Into<String>,
        source: impl Into<String>,
        rows: usize,
        columns: usize,
    ) -> &mut Self {
        self.rows(name, source, rows, columns, RowOrder::AsIs)
    }
    /// A matrix whose rows move.
    fn rows(
        &mut self,
        name: impl Into<String>,
        source: impl Into<String>,
        rows: usize,
        columns: usize,
        order: RowOrder,
    ) -> &mut Self {
        self.stored(name, source, vec![columns as u64, rows as u64], order)
    }
    /// A vector, such as a norm's weights.
    fn vector(&mut self, name: impl Into<String>, source: impl Into<String>, len: usize) -> &mut Self {
        self.stored(name, source, vec![len as u64], RowOrder::AsIs)
    }
    fn stored(
        &mut self,
        name: impl Into<String>,
        source: impl Into<String>,
        shape: Vec<u64>,
        order: RowOrder,
    ) -> &mut Self {
        let origin = Origin::Stored { name: source.into(), order };
        self.0.push(Wanted { name: name.into(), shape, origin });
        self
    }
    fn computed(&mut self, name: &str, values: Vec<f32>) -> &mut Self {
        self.0.push(Wanted {
            name: name.into(),
            shape: vec![values.len() as u64],
            origin: Origin::Computed(values),
        });
        self
    }
}

type Checked<T> = std::result::Result<T, String>;

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> Checked<T> {
    serde_json::from_value(value).map_err(|e| e.to_string())
}

/// A width, a count or a vocabulary: at least 1, not absurd.
fn dim(name: &str, value: usize) -> Checked<usize> {
    if (1..=MAX_DIM).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{name}: expected 1 to {MAX_DIM}, found {value}"))
    }
}

fn layers(name: &str, value: usize) -> Checked<usize> {
    if (1..=MAX_LAYERS).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{name}: expected 1 to {MAX_LAYERS}, found {value}"))
    }
}

fn positive(name: &str, value: f64) -> Checked<f32> {
    let value = value as f32;
    if value.is_finite() && value > 0.0 {
        Ok(value)
    } else {
        Err(format!("{name}: expected a positive number, found {value}"))
    }
}

fn context(name: &str, value: u64) -> Checked<u32> {
    u32::try_from(value)
        .ok()
        .filter(|&n| n > 0)
        .ok_or_else(|| format!("{name}: expected 1 to {}, found {value}", u32::MAX))
}

/// Query heads must be a multiple of KV heads, and a head's dimensions even where they are rotated.
fn heads(n_head: usize, n_kv: usize, head_dim: usize) -> Checked<()> {
    dim("query heads", n_head)?;
    dim("KV heads", n_kv)?;
    dim("head_dim", head_dim)?;
    if !n_head.is_multiple_of(n_kv) {
        return Err(format!("{n_head} query heads are not a multiple of {n_kv} KV heads"));
    }
    if !head_dim.is_multiple_of(2) {
        return Err(format!("head_dim {head_dim} is odd: rotary pairs need an even one"));
    }
    dim("query heads * head_dim", n_head.saturating_mul(head_dim)).map(drop)
}

fn silu(hidden_act: Option<&str>) -> Checked<()> {
    match hidden_act {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => Err(format!("hidden_act {other:?} is not supported: expected \"silu\"")),
    }
}

fn no_bias(name: &str, value: Option<bool>) -> Checked<()> {
    if value == Some(true) { Err(format!("{name} is not supported: expected false")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_orders_are_each_others_inverse() {
        let (to_halves, to_pairs) =
            (RowOrder::PairsToHalves { head_dim: 8 }, RowOrder::HalvesToPairs { head_dim: 8 });
        assert_eq!(
            (8..16).map(|r| to_halves.source_row(r)).collect::<Vec<_>>(),
            [8, 10, 12, 14, 9, 11, 13, 15]
        );
        assert_eq!(
            (8..16).map(|r| to_pairs.source_row(r)).collect::<Vec<_>>(),
            [8, 12, 9, 13, 10, 14, 11, 15]
        );
        assert!((0..64).all(|r| to_halves.source_row(to_pairs.source_row(r)) == r));
    }
}

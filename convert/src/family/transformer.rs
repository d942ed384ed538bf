//! The Transformer baseline: Hugging Face `llama` and `qwen3` checkpoints (model.md 4c), stored as llama.cpp stores them.
use std::f64::consts::TAU;

use serde::Deserialize;
use serde_json::Value;

use super::{Checked, Layout, List, RowOrder, context, dim, heads, layers, no_bias, parse, positive, silu};
use crate::gguf::Metadata;

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Rotary pairs (2j, 2j+1) in the file: rows of q and k move.
    Llama,
    /// Norms on q and k; rotary pairs (j, j + d/2) as in the checkpoint.
    Qwen3,
}

#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    #[serde(default)]
    tie_word_embeddings: bool,
    max_position_embeddings: u64,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScaling>,
    /// Newer configurations keep everything about rotation here.
    rope_parameters: Option<RopeScaling>,
}

#[derive(Clone, Default, Deserialize)]
struct RopeScaling {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

/// How positions are scaled.
enum Scaling {
    None,
    Linear(f32),
    /// Factors on the angles.
    Factors(Vec<f32>),
}

fn scaling(rope: &RopeScaling, theta: f64, head_dim: usize) -> Checked<Scaling> {
    let need = |name: &str, value: Option<f64>| {
        let value = value.ok_or_else(|| format!("rope_scaling: no {name}"))?;
        positive(name, value).map(f64::from)
    };
    match rope.rope_type.as_deref() {
        None | Some("default") => Ok(Scaling::None),
        Some("linear") => Ok(Scaling::Linear(need("factor", rope.factor)? as f32)),
        Some("llama3") => {
            let factor = need("factor", rope.factor)?;
            let low = need("low_freq_factor", rope.low_freq_factor)?;
            let high = need("high_freq_factor", rope.high_freq_factor)?;
            let trained = need("original_max_position_embeddings", rope.original_max_position_embeddings)?;
            if high <= low {
                return Err(format!(
                    "rope_scaling: expected high_freq_factor above low_freq_factor {low}, found {high}"
                ));
            }
            // Long waves are slowed by `factor`, short ones kept, those between blended.
            let stretch = |j: usize| {
                let wavelength = TAU * theta.powf(2.0 * j as f64 / head_dim as f64);
                if wavelength < trained / high {
                    1.0
                } else if wavelength > trained / low {
                    factor
                } else {
                    let smooth = (trained / wavelength - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            };
            Ok(Scaling::Factors((0..head_dim / 2).map(|j| stretch(j) as f32).collect()))
        }
        Some(other) => {
            Err(format!("rope_scaling of type {other:?} is not supported: expected linear or llama3"))
        }
    }
}

pub(super) fn layout(config: Value, kind: Kind) -> Checked<Layout> {
    let c: Config = parse(config)?;
    let architecture = if kind == Kind::Llama { "llama" } else { "qwen3" };
    let (vocab, hidden) = (dim("vocab_size", c.vocab_size)?, dim("hidden_size", c.hidden_size)?);
    let ffn = dim("intermediate_size", c.intermediate_size)?;
    let n_layer = layers("num_hidden_layers", c.num_hidden_layers)?;
    let n_head = dim("num_attention_heads", c.num_attention_heads)?;
    let n_kv = c.num_key_value_heads.unwrap_or(n_head);
    let head_dim = c.head_dim.unwrap_or(hidden / n_head);
    heads(n_head, n_kv, head_dim)?;
    silu(c.hidden_act.as_deref())?;
    no_bias("attention_bias", c.attention_bias)?;
    no_bias("mlp_bias", c.mlp_bias)?;
    no_bias("use_sliding_window", c.use_sliding_window)?;
    let rope = c.rope_scaling.or_else(|| c.rope_parameters.clone()).unwrap_or_default();
    let theta = c.rope_theta.or(c.rope_parameters.and_then(|r| r.rope_theta)).unwrap_or(10_000.0);
    let scaling = scaling(&rope, f64::from(positive("rope_theta", theta)?), head_dim)?;

    let mut m = Metadata::default();
    m.string("general.architecture", architecture);
    m.string("general.type", "model");
    let mut u32s = |key: &str, value: usize| m.u32(&format!("{architecture}.{key}"), value as u32);
    u32s("block_count", n_layer);
    u32s("context_length", context("max_position_embeddings", c.max_position_embeddings)? as usize);
    u32s("embedding_length", hidden);
    u32s("feed_forward_length", ffn);
    u32s("attention.head_count", n_head);
    u32s("attention.head_count_kv", n_kv);
    u32s("attention.key_length", head_dim);
    u32s("attention.value_length", head_dim);
    u32s("rope.dimension_count", head_dim);
    u32s("vocab_size", vocab);
    m.f32(&format!("{architecture}.rope.freq_base"), theta as f32);
    m.f32(
        &format!("{architecture}.attention.layer_norm_rms_epsilon"),
        positive("rms_norm_eps", c.rms_norm_eps)?,
    );

    let order = match kind {
        Kind::Llama => RowOrder::HalvesToPairs { head_dim },
        Kind::Qwen3 => RowOrder::AsIs,
    };
    let (q_width, kv_width) = (n_head * head_dim, n_kv * head_dim);
    let mut list = List::default();
    match scaling {
        Scaling::None => {}
        Scaling::Linear(factor) => {
            m.string(&format!("{architecture}.rope.scaling.type"), "linear");
            m.f32(&format!("{architecture}.rope.scaling.factor"), factor);
        }
        Scaling::Factors(_) if kind == Kind::Qwen3 => {
            return Err("rope_scaling of type \"llama3\" is not supported for qwen3: expected linear".into());
        }
        Scaling::Factors(factors) => {
            list.computed("rope_freqs.weight", factors);
        }
    }
    list.matrix("token_embd.weight", "model.embed_tokens.weight", vocab, hidden);
    for layer in 0..n_layer {
        let to = |part: &str| format!("blk.{layer}.{part}.weight");
        let own = |part: &str| format!("model.layers.{layer}.{part}.weight");
        list.vector(to("attn_norm"), own("input_layernorm"), hidden)
            .rows(to("attn_q"), own("self_attn.q_proj"), q_width, hidden, order)
            .rows(to("attn_k"), own("self_attn.k_proj"), kv_width, hidden, order)
            .matrix(to("attn_v"), own("self_attn.v_proj"), kv_width, hidden);
        if kind == Kind::Qwen3 {
            list.vector(to("attn_q_norm"), own("self_attn.q_norm"), head_dim).vector(
                to("attn_k_norm"),
                own("self_attn.k_norm"),
                head_dim,
            );
        }
        list.matrix(to("attn_output"), own("self_attn.o_proj"), hidden, q_width)
            .vector(to("ffn_norm"), own("post_attention_layernorm"), hidden)
            .matrix(to("ffn_gate"), own("mlp.gate_proj"), ffn, hidden)
            .matrix(to("ffn_up"), own("mlp.up_proj"), ffn, hidden)
            .matrix(to("ffn_down"), own("mlp.down_proj"), hidden, ffn);
    }
    list.vector("output_norm.weight", "model.norm.weight", hidden);
    if !c.tie_word_embeddings {
        list.matrix("output.weight", "lm_head.weight", vocab, hidden);
    }
    Ok(Layout {
        family: architecture,
        metadata: m,
        tensors: list.0,
        vocab,
        n_gqa: n_head / n_kv,
        n_layer,
        embedding: "model.embed_tokens.weight",
        tied_output: c.tie_word_embeddings.then_some("lm_head.weight"),
        notes: Vec::new(),
    })
}

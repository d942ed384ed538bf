//! microsoft/unilm YOCO checkpoints (model.md 4b), with a window self-decoder.
//!
//! The file is a yoco-clsa one without an indexer: rotary rows move to halves, and the checkpoint's own spacing of angles goes into
//! factors on the usual ones.
use serde::Deserialize;
use serde_json::Value;

use super::{Checked, Layout, List, RowOrder, context, dim, heads, layers, parse, positive};
use crate::gguf::Metadata;

/// Positions assumed where params.json does not say: what the original recipe trains with first.
const DEFAULT_CONTEXT: u64 = 4096;

#[derive(Deserialize)]
struct Params {
    dim: usize,
    hidden_dim: usize,
    n_layers: usize,
    n_self_heads: usize,
    n_attn_heads: usize,
    n_attn_kv_heads: usize,
    vocab_size: usize,
    #[serde(default = "default_theta")]
    rope_theta: f64,
    #[serde(default = "default_eps")]
    norm_eps: f64,
    sliding_window: Option<usize>,
    max_seq_len: Option<i64>,
}

fn default_theta() -> f64 {
    10_000.0
}
fn default_eps() -> f64 {
    1e-5
}

/// Factors that turn the usual angles `theta^(-2j/d)` into `theta^(-j/(d/2-1))`: `angle_j = theta^(-2j/d) / factor_j`.
fn angle_factors(theta: f64, head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    (0..half)
        .map(|j| {
            let usual = 2.0 * j as f64 / head_dim as f64;
            // A single pair has angle 1, as the only point of linspace(0, 1, 1) is 0.
            let inclusive = if half > 1 { j as f64 / (half - 1) as f64 } else { 0.0 };
            theta.powf(inclusive - usual) as f32
        })
        .collect()
}

pub(super) fn layout(params: Value) -> Checked<Layout> {
    let p: Params = parse(params)?;
    let Some(window) = p.sliding_window else {
        return Err(
            "sliding_window is null: a gated-retention self-decoder is not supported, only window attention"
                .into(),
        );
    };
    let (hidden, ffn, vocab) =
        (dim("dim", p.dim)?, dim("hidden_dim", p.hidden_dim)?, dim("vocab_size", p.vocab_size)?);
    let n_layer = layers("n_layers", p.n_layers)?;
    if !n_layer.is_multiple_of(2) {
        return Err(format!(
            "n_layers {n_layer} is odd: expected as many self-decoder as cross-decoder layers"
        ));
    }
    let n_self = n_layer / 2;
    let head_dim = |name: &str, n: usize| {
        let divides = n > 0 && hidden.is_multiple_of(n);
        if divides { Ok(hidden / n) } else { Err(format!("dim {hidden} is not a multiple of {name} {n}")) }
    };
    let self_dim = head_dim("n_self_heads", p.n_self_heads)?;
    let cross_dim = head_dim("n_attn_heads", p.n_attn_heads)?;
    heads(p.n_self_heads, p.n_self_heads, self_dim)?;
    heads(p.n_attn_heads, p.n_attn_kv_heads, cross_dim)?;
    let mut notes = Vec::new();
    let context_length = match p.max_seq_len.and_then(|n| u64::try_from(n).ok()).filter(|&n| n > 0) {
        Some(n) => n,
        None => {
            notes.push(format!("params.json has no max_seq_len: context_length is set to {DEFAULT_CONTEXT}"));
            DEFAULT_CONTEXT
        }
    };

    let mut m = Metadata::default();
    m.string("general.architecture", "yoco-clsa");
    m.string("general.type", "model");
    let mut u32s = |key: &str, value: usize| m.u32(&format!("yoco-clsa.{key}"), value as u32);
    u32s("context_length", context("max_seq_len", context_length)? as usize);
    u32s("embedding_length", hidden);
    u32s("feed_forward_length", ffn);
    u32s("block_count", n_layer);
    u32s("self_decoder.block_count", n_self);
    u32s("vocab_size", vocab);
    u32s("attention.head_count", p.n_attn_heads);
    u32s("attention.head_count_kv", p.n_attn_kv_heads);
    u32s("attention.key_length", cross_dim);
    u32s("attention.value_length", cross_dim);
    u32s("self_decoder.attention.head_count", p.n_self_heads);
    u32s("self_decoder.attention.head_count_kv", p.n_self_heads);
    u32s("self_decoder.attention.key_length", self_dim);
    u32s("attention.sliding_window", dim("sliding_window", window)?);
    u32s("rope.dimension_count", self_dim);
    u32s("cross_decoder.rope.dimension_count", cross_dim);
    let theta = positive("rope_theta", p.rope_theta)?;
    m.f32("yoco-clsa.attention.layer_norm_rms_epsilon", positive("norm_eps", p.norm_eps)?);
    m.f32("yoco-clsa.rope.freq_base", theta);
    m.f32("yoco-clsa.embedding_scale", (hidden as f32).sqrt());

    let self_order = RowOrder::PairsToHalves { head_dim: self_dim };
    let cross_order = RowOrder::PairsToHalves { head_dim: cross_dim };
    let kv_width = p.n_attn_kv_heads * cross_dim;
    let mut list = List::default();
    list.computed("rope_freqs.weight", angle_factors(f64::from(theta), self_dim)).matrix(
        "token_embd.weight",
        "embed_tokens.weight",
        vocab,
        hidden,
    );
    for layer in 0..n_layer {
        let from = match layer.checked_sub(n_self) {
            None => format!("self_decoder.layers.{layer}"),
            Some(j) => format!("cross_decoder.layers.{j}"),
        };
        let to = |part: &str| format!("blk.{layer}.{part}.weight");
        let own = |part: &str| format!("{from}.{part}.weight");
        if layer == n_self {
            list.vector("shared_kv.norm.weight", "cross_decoder.kv_layer_norm.weight", hidden)
                .rows("shared_kv.attn_k.weight", "cross_decoder.k_proj.weight", kv_width, hidden, cross_order)
                .matrix("shared_kv.attn_v.weight", "cross_decoder.v_proj.weight", kv_width, hidden)
                .computed("shared_kv.rope_freqs.weight", angle_factors(f64::from(theta), cross_dim));
        }
        list.vector(to("attn_norm"), own("mixer_layer_norm"), hidden);
        if layer < n_self {
            list.rows(to("attn_q"), own("mixer.q_proj"), hidden, hidden, self_order)
                .rows(to("attn_k"), own("mixer.k_proj"), hidden, hidden, self_order)
                .matrix(to("attn_v"), own("mixer.v_proj"), hidden, hidden);
        } else {
            list.rows(to("attn_q"), own("mixer.q_proj"), hidden, hidden, cross_order);
        }
        list.matrix(to("attn_output"), own("mixer.out_proj"), hidden, hidden)
            .vector(to("ffn_norm"), own("final_layer_norm"), hidden)
            .matrix(to("ffn_gate"), own("ffn.fc1"), ffn, hidden)
            .matrix(to("ffn_up"), own("ffn.gate"), ffn, hidden)
            .matrix(to("ffn_down"), own("ffn.fc2"), hidden, ffn);
    }
    list.vector("output_norm.weight", "layer_norm.weight", hidden).matrix(
        "output.weight",
        "output_projection.weight",
        vocab,
        hidden,
    );
    Ok(Layout {
        family: "microsoft/unilm YOCO",
        metadata: m,
        tensors: list.0,
        vocab,
        n_gqa: 1,
        n_layer,
        embedding: "embed_tokens.weight",
        tied_output: None,
        notes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_give_the_inclusive_angles() {
        let (theta, d) = (10_000f64, 64);
        let factors = angle_factors(theta, d);
        assert_eq!(factors.len(), 32);
        for (j, &factor) in factors.iter().enumerate() {
            let angle = theta.powf(-2.0 * j as f64 / d as f64) / f64::from(factor);
            let expected = theta.powf(-(j as f64) / 31.0);
            assert!((angle / expected - 1.0).abs() < 1e-6, "pair {j}: {angle} {expected}");
        }
        assert_eq!(angle_factors(theta, 2), [1.0]);
    }
}

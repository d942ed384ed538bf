//! The canonical family: `"model_type": "yoco_clsa"` (model.md 4a), with an indexer or (YOCO, dense) without.
use serde::Deserialize;
use serde_json::Value;

use super::{Checked, Layout, List, context, dim, heads, layers, parse, positive, silu};
use crate::gguf::Metadata;

#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_self_decoder_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    sliding_window: Option<usize>,
    rope_theta: f64,
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    #[serde(default)]
    qk_norm: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    index_head_dim: Option<usize>,
    index_topk: Option<usize>,
    max_position_embeddings: u64,
    embed_scale: Option<f64>,
}

pub(super) fn layout(config: Value) -> Checked<Layout> {
    let c: Config = parse(config)?;
    let (vocab, hidden) = (dim("vocab_size", c.vocab_size)?, dim("hidden_size", c.hidden_size)?);
    let ffn = dim("intermediate_size", c.intermediate_size)?;
    let n_layer = layers("num_hidden_layers", c.num_hidden_layers)?;
    let n_self = layers("num_self_decoder_layers", c.num_self_decoder_layers)?;
    if n_self >= n_layer {
        return Err(format!(
            "num_self_decoder_layers {n_self}: expected fewer than num_hidden_layers {n_layer}"
        ));
    }
    heads(c.num_attention_heads, c.num_key_value_heads, c.head_dim)?;
    silu(c.hidden_act.as_deref())?;
    let window =
        c.sliding_window.ok_or("no sliding_window: only a self-decoder of window attention is supported")?;
    let indexer = match (c.index_head_dim, c.index_topk) {
        (Some(width), Some(top_k)) => Some((dim("index_head_dim", width)?, dim("index_topk", top_k)?)),
        (None, None) => None,
        _ => {
            return Err(
                "only one of index_head_dim and index_topk: expected both (CLSA) or none (YOCO, dense)"
                    .into(),
            );
        }
    };

    let mut m = Metadata::default();
    m.string("general.architecture", "yoco-clsa");
    m.string("general.type", "model");
    let mut u32s = |key: &str, value: usize| m.u32(&format!("yoco-clsa.{key}"), value as u32);
    u32s("context_length", context("max_position_embeddings", c.max_position_embeddings)? as usize);
    u32s("embedding_length", hidden);
    u32s("feed_forward_length", ffn);
    u32s("block_count", n_layer);
    u32s("self_decoder.block_count", n_self);
    u32s("vocab_size", vocab);
    u32s("attention.head_count", c.num_attention_heads);
    u32s("attention.head_count_kv", c.num_key_value_heads);
    u32s("attention.key_length", c.head_dim);
    u32s("attention.value_length", c.head_dim);
    u32s("attention.sliding_window", dim("sliding_window", window)?);
    u32s("rope.dimension_count", c.head_dim);
    if let Some((width, top_k)) = indexer {
        u32s("attention.indexer.head_count", 1);
        u32s("attention.indexer.key_length", width);
        u32s("attention.indexer.top_k", top_k);
    }
    m.f32("yoco-clsa.attention.layer_norm_rms_epsilon", positive("rms_norm_eps", c.rms_norm_eps)?);
    m.f32("yoco-clsa.rope.freq_base", positive("rope_theta", c.rope_theta)?);
    m.f32("yoco-clsa.embedding_scale", positive("embed_scale", c.embed_scale.unwrap_or(1.0))?);

    let (q_width, kv_width) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let mut list = List::default();
    list.matrix("token_embd.weight", "model.embed_tokens.weight", vocab, hidden);
    for layer in 0..n_layer {
        let (from, attention) = match layer.checked_sub(n_self) {
            None => (format!("model.self_decoder.layers.{layer}"), "self_attn"),
            Some(j) => (format!("model.cross_decoder.layers.{j}"), "cross_attn"),
        };
        let to = |part: &str| format!("blk.{layer}.{part}.weight");
        let own = |part: &str| format!("{from}.{attention}.{part}.weight");
        if layer == n_self {
            list.vector("shared_kv.norm.weight", "model.shared_kv.norm.weight", hidden)
                .matrix("shared_kv.attn_k.weight", "model.shared_kv.k_proj.weight", kv_width, hidden)
                .matrix("shared_kv.attn_v.weight", "model.shared_kv.v_proj.weight", kv_width, hidden);
            if let Some((width, _)) = indexer {
                list.matrix("indexer.attn_q.weight", "model.indexer.q_proj.weight", width, hidden).matrix(
                    "indexer.attn_k.weight",
                    "model.indexer.k_proj.weight",
                    width,
                    hidden,
                );
            }
        }
        list.vector(to("attn_norm"), format!("{from}.input_layernorm.weight"), hidden).matrix(
            to("attn_q"),
            own("q_proj"),
            q_width,
            hidden,
        );
        if layer < n_self {
            list.matrix(to("attn_k"), own("k_proj"), kv_width, hidden).matrix(
                to("attn_v"),
                own("v_proj"),
                kv_width,
                hidden,
            );
            if c.qk_norm {
                list.vector(to("attn_q_norm"), own("q_norm"), c.head_dim).vector(
                    to("attn_k_norm"),
                    own("k_norm"),
                    c.head_dim,
                );
            }
        }
        list.matrix(to("attn_output"), own("o_proj"), hidden, q_width)
            .vector(to("ffn_norm"), format!("{from}.post_attention_layernorm.weight"), hidden)
            .matrix(to("ffn_gate"), format!("{from}.mlp.gate_proj.weight"), ffn, hidden)
            .matrix(to("ffn_up"), format!("{from}.mlp.up_proj.weight"), ffn, hidden)
            .matrix(to("ffn_down"), format!("{from}.mlp.down_proj.weight"), hidden, ffn);
    }
    list.vector("output_norm.weight", "model.norm.weight", hidden);
    if !c.tie_word_embeddings {
        list.matrix("output.weight", "lm_head.weight", vocab, hidden);
    }
    Ok(Layout {
        family: "yoco_clsa",
        metadata: m,
        tensors: list.0,
        vocab,
        n_gqa: c.num_attention_heads / c.num_key_value_heads,
        n_layer,
        embedding: "model.embed_tokens.weight",
        tied_output: c.tie_word_embeddings.then_some("lm_head.weight"),
        notes: Vec::new(),
    })
}

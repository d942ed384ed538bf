//! Every family of checkpoints: each tensor of the file holds the right values, each key the right value.
mod common;

use clsa_convert::gguf::File;
use common::{Folder, permuted, values, yoco, yoco_config};
use safetensors::Dtype;
use serde_json::json;

/// Asserts that tensors of the file hold tensors of the checkpoint, and that there are no others but `computed`.
fn assert_holds(folder: &Folder, file: &File, pairs: &[(String, String)], computed: &[&str]) {
    for (name, source) in pairs {
        assert_eq!(values(file, name), folder.values(source), "{name}");
        let shape: Vec<u64> = folder.tensors[source].shape.iter().rev().map(|&n| n as u64).collect();
        assert_eq!(file.tensor(name).unwrap().shape, shape, "{name}");
    }
    let known = |n: &str| pairs.iter().any(|(p, _)| p == n) || computed.contains(&n);
    let extra: Vec<_> = file.tensors().iter().filter(|t| !known(&t.name)).map(|t| &t.name).collect();
    assert!(extra.is_empty(), "{extra:?}");
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(a, b)| (format!("{a}.weight"), format!("{b}.weight"))).collect()
}

fn layer(n: usize, prefix: &str, list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(a, b)| (format!("blk.{n}.{a}.weight"), format!("{prefix}.{b}.weight"))).collect()
}

const SELF: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const CROSS: [(&str, &str); 7] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "cross_attn.q_proj"),
    ("attn_output", "cross_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

fn yoco_pairs() -> Vec<(String, String)> {
    let mut all = pairs(&[
        ("token_embd", "model.embed_tokens"),
        ("shared_kv.norm", "model.shared_kv.norm"),
        ("shared_kv.attn_k", "model.shared_kv.k_proj"),
        ("shared_kv.attn_v", "model.shared_kv.v_proj"),
        ("indexer.attn_q", "model.indexer.q_proj"),
        ("indexer.attn_k", "model.indexer.k_proj"),
        ("output_norm", "model.norm"),
        ("output", "lm_head"),
    ]);
    for i in 0..2 {
        all.extend(layer(i, &format!("model.self_decoder.layers.{i}"), &SELF));
    }
    all.extend(layer(2, "model.cross_decoder.layers.0", &CROSS));
    all
}

#[test]
fn yoco_clsa_of_every_dtype_in_one_file_or_shards() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let folder = yoco(dtype);
        folder.write("config.json");
        assert_holds(&folder, &folder.convert_f32().unwrap(), &yoco_pairs(), &[]);
    }
    let folder = yoco(Dtype::BF16);
    folder.write_shards();
    let file = folder.convert_f32().unwrap();
    assert_holds(&folder, &file, &yoco_pairs(), &[]);
    let u32 = |key: &str| file.require::<u32>(&format!("yoco-clsa.{key}")).unwrap();
    assert_eq!(file.require::<&str>("general.architecture").unwrap(), "yoco-clsa");
    for (key, value) in [
        ("context_length", 256),
        ("embedding_length", 32),
        ("feed_forward_length", 48),
        ("block_count", 3),
        ("self_decoder.block_count", 2),
        ("vocab_size", 40),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 16),
        ("attention.value_length", 16),
        ("attention.sliding_window", 8),
        ("attention.indexer.head_count", 1),
        ("attention.indexer.key_length", 8),
        ("attention.indexer.top_k", 6),
        ("rope.dimension_count", 16),
    ] {
        assert_eq!(u32(key), value, "{key}");
    }
    let f32 = |key: &str| file.require::<f32>(&format!("yoco-clsa.{key}")).unwrap();
    assert_eq!(f32("rope.freq_base"), 10000.0);
    assert_eq!(f32("attention.layer_norm_rms_epsilon"), 1e-5);
    assert_eq!(f32("embedding_scale"), 1.0);
    assert_eq!(file.require::<u32>("tokenizer.ggml.eos_token_id").unwrap(), 2);
    assert!(
        file.get("tokenizer.ggml.tokens").is_none()
            && file.get("yoco-clsa.self_decoder.attention.head_count").is_none()
    );
}

#[test]
fn yoco_without_indexer_with_tied_embeddings() {
    let mut folder = yoco(Dtype::BF16);
    let config = folder.config.as_object_mut().unwrap();
    config.retain(|k, _| !k.starts_with("index_") && k != "qk_norm");
    config.insert("tie_word_embeddings".into(), json!(true));
    config.insert("embed_scale".into(), json!(2.5));
    folder.tensors.retain(|name, _| {
        !name.contains("indexer") && !name.contains("_norm.weight") && name != "lm_head.weight"
    });
    folder.add("model.norm.weight", &[32]);
    folder.write("config.json");
    let file = folder.convert_f32().unwrap();
    let mut expected = yoco_pairs();
    expected.retain(|(name, _)| {
        !name.contains("indexer") && !name.contains("q_norm") && !name.contains("k_norm")
    });
    expected.retain(|(name, _)| name != "output.weight");
    assert_holds(&folder, &file, &expected, &[]);
    assert!(file.get("yoco-clsa.attention.indexer.top_k").is_none());
    assert_eq!(file.require::<f32>("yoco-clsa.embedding_scale").unwrap(), 2.5);
}

#[test]
fn a_tied_output_may_be_there_twice_but_must_be_the_same() {
    let mut folder = yoco(Dtype::BF16);
    folder.config["tie_word_embeddings"] = json!(true);
    let embedding = folder.tensors["model.embed_tokens.weight"].clone();
    assert!(folder.error().contains("lm_head.weight differs from model.embed_tokens.weight"));
    folder.tensors.insert("lm_head.weight".into(), embedding);
    folder.write("config.json");
    assert!(folder.convert_f32().unwrap().tensor("output.weight").is_none());
}

fn unilm() -> Folder {
    let params = json!({"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_self_heads": 4, "n_attn_heads": 2,
        "n_attn_kv_heads": 1, "vocab_size": 40, "rope_theta": 10000.0, "norm_eps": 1e-6, "sliding_window": 8,
        "max_seq_len": 512});
    let mut f = Folder::new(params, Dtype::BF16);
    f.add("embed_tokens.weight", &[40, 32]);
    f.add("output_projection.weight", &[40, 32]);
    f.add("layer_norm.weight", &[32]);
    f.add("cross_decoder.kv_layer_norm.weight", &[32]);
    f.add("cross_decoder.k_proj.weight", &[16, 32]);
    f.add("cross_decoder.v_proj.weight", &[16, 32]);
    for half in ["self", "cross"] {
        for i in 0..2 {
            let p = |s: &str| format!("{half}_decoder.layers.{i}.{s}.weight");
            f.add(&p("mixer.q_proj"), &[32, 32]);
            if half == "self" {
                f.add(&p("mixer.k_proj"), &[32, 32]);
                f.add(&p("mixer.v_proj"), &[32, 32]);
            }
            f.add(&p("mixer.out_proj"), &[32, 32]);
            f.add(&p("mixer_layer_norm"), &[32]);
            f.add(&p("final_layer_norm"), &[32]);
            f.add(&p("ffn.fc1"), &[48, 32]);
            f.add(&p("ffn.gate"), &[48, 32]);
            f.add(&p("ffn.fc2"), &[32, 48]);
        }
    }
    f
}

/// Where a head's dimension i of rotate-half order is among interleaved pairs: first all even ones, then all odd ones.
fn interleaved(row: usize, d: usize) -> usize {
    let (head, i) = (row / d, row % d);
    head * d + if i < d / 2 { 2 * i } else { 2 * (i - d / 2) + 1 }
}

#[test]
fn unilm_yoco_with_its_peculiarities() {
    let folder = unilm();
    folder.write("params.json");
    let file = folder.convert_f32().unwrap();
    let mut same = pairs(&[
        ("token_embd", "embed_tokens"),
        ("output", "output_projection"),
        ("output_norm", "layer_norm"),
        ("shared_kv.norm", "cross_decoder.kv_layer_norm"),
        ("shared_kv.attn_v", "cross_decoder.v_proj"),
    ]);
    const BOTH: [(&str, &str); 6] = [
        ("attn_output", "mixer.out_proj"),
        ("attn_norm", "mixer_layer_norm"),
        ("ffn_norm", "final_layer_norm"),
        ("ffn_gate", "ffn.fc1"),
        ("ffn_up", "ffn.gate"),
        ("ffn_down", "ffn.fc2"),
    ];
    let mut moved =
        vec![("shared_kv.attn_k.weight".to_owned(), "cross_decoder.k_proj.weight".to_owned(), 16)];
    for i in 0..2 {
        same.extend(layer(i, &format!("self_decoder.layers.{i}"), &BOTH));
        same.extend(layer(i, &format!("self_decoder.layers.{i}"), &[("attn_v", "mixer.v_proj")]));
        same.extend(layer(2 + i, &format!("cross_decoder.layers.{i}"), &BOTH));
        for part in ["q", "k"] {
            let source = format!("self_decoder.layers.{i}.mixer.{part}_proj.weight");
            moved.push((format!("blk.{i}.attn_{part}.weight"), source, 8));
        }
        moved.push((
            format!("blk.{}.attn_q.weight", 2 + i),
            format!("cross_decoder.layers.{i}.mixer.q_proj.weight"),
            16,
        ));
    }
    for (name, source, d) in &moved {
        let expected = permuted(folder.values(source), 32, |row| interleaved(row, *d));
        assert_eq!(values(&file, name), expected, "{name}");
    }
    let mut computed: Vec<&str> = moved.iter().map(|(name, ..)| name.as_str()).collect();
    computed.extend(["rope_freqs.weight", "shared_kv.rope_freqs.weight"]);
    assert_holds(&folder, &file, &same, &computed);

    for (name, d) in [("rope_freqs.weight", 8usize), ("shared_kv.rope_freqs.weight", 16)] {
        let factors = values(&file, name);
        assert_eq!(factors.len(), d / 2);
        for (j, factor) in factors.iter().enumerate() {
            let usual = 10000f64.powf(-2.0 * j as f64 / d as f64);
            let inclusive = 10000f64.powf(-(j as f64) / (d / 2 - 1) as f64);
            assert!((usual / f64::from(*factor) / inclusive - 1.0).abs() < 1e-6, "{name} {j}");
        }
    }
    let u32 = |key: &str| file.require::<u32>(&format!("yoco-clsa.{key}")).unwrap();
    for (key, value) in [
        ("context_length", 512),
        ("block_count", 4),
        ("self_decoder.block_count", 2),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 16),
        ("self_decoder.attention.head_count", 4),
        ("self_decoder.attention.head_count_kv", 4),
        ("self_decoder.attention.key_length", 8),
        ("rope.dimension_count", 8),
        ("cross_decoder.rope.dimension_count", 16),
        ("attention.sliding_window", 8),
    ] {
        assert_eq!(u32(key), value, "{key}");
    }
    assert_eq!(file.require::<f32>("yoco-clsa.embedding_scale").unwrap(), 32f32.sqrt());
}

#[test]
fn unilm_params_that_are_not_supported() {
    let refuse = |key: &str, value: serde_json::Value| {
        let mut folder = unilm();
        folder.config[key] = value;
        folder.write("params.json");
        folder.convert_f32().expect_err(key).to_string()
    };
    assert!(refuse("sliding_window", json!(null)).contains("gated-retention"));
    assert!(refuse("n_layers", json!(3)).contains("odd"));
    assert!(refuse("n_self_heads", json!(5)).contains("not a multiple of n_self_heads"));
    assert!(refuse("n_self_heads", json!(0)).contains("n_self_heads"));
    assert!(refuse("n_attn_kv_heads", json!(0)).contains("KV heads"));
    assert!(refuse("dim", json!("32")).contains("params.json"));
}

/// A Transformer of 2 layers; `qwen3` with norms on q and k.
fn transformer(kind: &str, d: usize) -> Folder {
    let config = json!({"model_type": kind, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": d,
        "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "max_position_embeddings": 128, "tie_word_embeddings": false});
    let mut f = Folder::new(config, Dtype::BF16);
    f.add("model.embed_tokens.weight", &[40, 32]);
    f.add("model.norm.weight", &[32]);
    f.add("lm_head.weight", &[40, 32]);
    for i in 0..2 {
        let p = |s: &str| format!("model.layers.{i}.{s}.weight");
        f.add(&p("input_layernorm"), &[32]);
        f.add(&p("self_attn.q_proj"), &[4 * d, 32]);
        f.add(&p("self_attn.k_proj"), &[2 * d, 32]);
        f.add(&p("self_attn.v_proj"), &[2 * d, 32]);
        f.add(&p("self_attn.o_proj"), &[32, 4 * d]);
        if kind == "qwen3" {
            f.add(&p("self_attn.q_norm"), &[d]);
            f.add(&p("self_attn.k_norm"), &[d]);
        }
        f.add(&p("post_attention_layernorm"), &[32]);
        f.add(&p("mlp.gate_proj"), &[48, 32]);
        f.add(&p("mlp.up_proj"), &[48, 32]);
        f.add(&p("mlp.down_proj"), &[32, 48]);
    }
    f
}

fn transformer_pairs() -> Vec<(String, String)> {
    let mut all =
        pairs(&[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")]);
    (0..2).for_each(|i| all.extend(layer(i, &format!("model.layers.{i}"), &SELF)));
    all
}

#[test]
fn qwen3_keeps_its_rows() {
    let mut folder = transformer("qwen3", 16);
    // Old checkpoints carry what is computed.
    folder.add("model.layers.0.self_attn.rotary_emb.inv_freq", &[8]);
    folder.write("config.json");
    let file = folder.convert_f32().unwrap();
    assert_holds(&folder, &file, &transformer_pairs(), &[]);
    let u32 = |key: &str| file.require::<u32>(&format!("qwen3.{key}")).unwrap();
    assert_eq!((u32("attention.key_length"), u32("rope.dimension_count"), u32("vocab_size")), (16, 16, 40));
    assert_eq!(file.require::<f32>("qwen3.rope.freq_base").unwrap(), 500_000.0);
}

/// Where row r of interleaved pairs is in rotate-half order: the inverse of [`interleaved`].
fn halved(row: usize, d: usize) -> usize {
    let (head, i) = (row / d, row % d);
    head * d + i / 2 + if i % 2 == 1 { d / 2 } else { 0 }
}

#[test]
fn llama_interleaves_rows_of_q_and_k() {
    let mut folder = transformer("llama", 8);
    folder.config.as_object_mut().unwrap().remove("head_dim");
    folder.write("config.json");
    let file = folder.convert_f32().unwrap();
    let mut same = transformer_pairs();
    same.retain(|(name, _)| !["attn_q", "attn_k"].iter().any(|p| name.contains(p)));
    let mut moved = Vec::new();
    for i in 0..2 {
        for part in ["q", "k"] {
            let name = format!("blk.{i}.attn_{part}.weight");
            let source = folder.values(&format!("model.layers.{i}.self_attn.{part}_proj.weight"));
            assert_eq!(values(&file, &name), permuted(source, 32, |row| halved(row, 8)), "{name}");
            moved.push(name);
        }
    }
    assert_holds(&folder, &file, &same, &moved.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(file.require::<u32>("llama.rope.dimension_count").unwrap(), 8);
}

#[test]
fn llama3_scaling_becomes_factors_and_linear_a_key() {
    let mut folder = transformer("llama", 8);
    folder.config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    folder.write("config.json");
    let factors = values(&folder.convert_f32().unwrap(), "rope_freqs.weight");
    // Wavelengths 6.28, 167, 4443, 118147 against 64/4 = 16 and 64/1: the first is kept, the others stretched.
    assert_eq!(factors, [1.0, 8.0, 8.0, 8.0]);

    folder.config["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
    folder.write("config.json");
    let file = folder.convert_f32().unwrap();
    assert_eq!(file.require::<&str>("llama.rope.scaling.type").unwrap(), "linear");
    assert_eq!(file.require::<f32>("llama.rope.scaling.factor").unwrap(), 4.0);

    // Newer configurations keep everything in one place.
    let config = folder.config.as_object_mut().unwrap();
    config.remove("rope_scaling");
    config.remove("rope_theta");
    config.insert("rope_parameters".into(), json!({"rope_type": "default", "rope_theta": 1234.0}));
    folder.write("config.json");
    assert_eq!(folder.convert_f32().unwrap().require::<f32>("llama.rope.freq_base").unwrap(), 1234.0);
}

#[test]
fn configurations_that_are_not_supported_say_why() {
    let cases = [
        ("llama", "attention_bias", json!(true), "attention_bias"),
        ("llama", "mlp_bias", json!(true), "mlp_bias"),
        ("llama", "hidden_act", json!("gelu"), "hidden_act \"gelu\""),
        ("llama", "rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "\"yarn\""),
        ("llama", "rope_scaling", json!({"rope_type": "llama3"}), "no factor"),
        ("qwen3", "use_sliding_window", json!(true), "use_sliding_window"),
        ("qwen3", "num_key_value_heads", json!(3), "not a multiple of 3"),
        ("qwen3", "num_key_value_heads", json!(0), "KV heads"),
        ("qwen3", "head_dim", json!(15), "odd"),
        ("qwen3", "num_hidden_layers", json!(1u64 << 40), "num_hidden_layers"),
        ("qwen3", "vocab_size", json!(0), "vocab_size"),
        ("qwen3", "vocab_size", json!(-1), "config.json"),
        ("qwen3", "rms_norm_eps", json!(-1.0), "rms_norm_eps"),
        ("qwen3", "max_position_embeddings", json!(0), "max_position_embeddings"),
        ("qwen3", "model_type", json!("mamba"), "\"mamba\" is not supported"),
        ("qwen3", "model_type", json!(null), "no model_type"),
    ];
    for (kind, key, value, text) in cases {
        let mut folder = transformer(kind, 16);
        folder.config[key] = value;
        let error = folder.error();
        assert!(error.contains(text) && error.contains("config.json"), "{key}: {error}");
    }
    for (key, value, text) in [
        ("num_self_decoder_layers", json!(3), "fewer than num_hidden_layers 3"),
        ("sliding_window", json!(null), "sliding_window"),
        ("index_topk", json!(null), "only one of index_head_dim and index_topk"),
    ] {
        let mut folder = yoco(Dtype::BF16);
        folder.config[key] = value;
        assert!(folder.error().contains(text), "{key}: {}", folder.error());
    }
    let mut folder = Folder::new(yoco_config(), Dtype::BF16);
    folder.config.as_object_mut().unwrap().remove("head_dim");
    assert!(folder.error().contains("missing field `head_dim`"), "{}", folder.error());
}

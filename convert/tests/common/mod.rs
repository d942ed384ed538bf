//! Checkpoints written by tests, and their conversion.
#![allow(dead_code, reason = "each test file uses its own part")]
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use clsa_convert::{Mix, Model, Options, Plan, Recipe, Result, checkpoint::Checkpoint, gguf::File};
use ggml_kernels::quant::{self, Type};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// Runs without progress or abort.
pub const QUIET: Options<'_> = Options { threads: 2, abort: None, progress: &|_| () };

/// A tensor to be written: shape in the checkpoint's order, and values.
#[derive(Clone, Debug)]
pub struct Stored {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    pub dtype: Dtype,
}

/// A checkpoint folder in the making.
#[derive(Debug)]
pub struct Folder {
    pub dir: tempfile::TempDir,
    pub config: Value,
    pub tensors: BTreeMap<String, Stored>,
    dtype: Dtype,
}

impl Folder {
    pub fn new(config: Value, dtype: Dtype) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), config, tensors: BTreeMap::new(), dtype }
    }

    /// Adds a tensor of values that every dtype holds exactly, different for each tensor, row and column.
    pub fn add(&mut self, name: &str, shape: &[usize]) {
        let seed = name.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
        let n = shape.iter().product::<usize>() as u32;
        let value = |i: u32| {
            let h = (i.wrapping_add(seed)).wrapping_mul(2_654_435_761);
            // 8 bits of mantissa: exact in BF16.
            (f32::from((h >> 24) as u8) - 127.5) / 128.0
        };
        let values = (0..n).map(value).collect();
        self.tensors.insert(name.to_owned(), Stored { shape: shape.to_vec(), values, dtype: self.dtype });
    }

    pub fn values(&self, name: &str) -> &[f32] {
        &self.tensors[name].values
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes the configuration under `config_name` and everything into one file.
    pub fn write(&self, config_name: &str) {
        fs::write(self.path(config_name), self.config.to_string()).unwrap();
        self.write_shard("model.safetensors", self.tensors.iter());
    }

    /// Writes config.json and two shards with an index.
    pub fn write_shards(&self) {
        fs::write(self.path("config.json"), self.config.to_string()).unwrap();
        let mut map = serde_json::Map::new();
        for part in 0..2 {
            let file = format!("model-0000{}-of-00002.safetensors", part + 1);
            let half = self.tensors.iter().enumerate().filter(|(i, _)| i % 2 == part).map(|(_, t)| t);
            self.write_shard(&file, half.clone());
            map.extend(half.map(|(name, _)| (name.clone(), json!(file))));
        }
        let index = json!({"metadata": {}, "weight_map": map});
        fs::write(self.path("model.safetensors.index.json"), index.to_string()).unwrap();
    }

    fn write_shard<'a>(&self, file: &str, tensors: impl Iterator<Item = (&'a String, &'a Stored)>) {
        let bytes: Vec<(String, Vec<u8>, &Stored)> = tensors
            .map(|(name, t)| {
                let ty = match t.dtype {
                    Dtype::F16 => Type::F16,
                    Dtype::BF16 => Type::BF16,
                    _ => Type::F32,
                };
                let mut bytes = vec![0; ty.row_bytes(t.values.len()).unwrap()];
                quant::quantize(ty, &t.values, t.values.len(), None, &mut bytes);
                (name.clone(), bytes, t)
            })
            .collect();
        let views = bytes
            .iter()
            .map(|(name, bytes, t)| (name, TensorView::new(t.dtype, t.shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &self.path(file)).unwrap();
    }

    /// Converts the folder; returns the open file.
    pub fn convert(&self, recipe: &Recipe) -> Result<File> {
        convert(self.dir.path(), &self.path("out.gguf"), recipe)
    }

    /// Converts to F32.
    pub fn convert_f32(&self) -> Result<File> {
        self.convert(&Recipe::new(Mix::F32))
    }

    /// Writes config.json and one file, and expects an error.
    pub fn error(&self) -> String {
        self.write("config.json");
        self.convert_f32().expect_err("refused").to_string()
    }
}

pub fn convert(dir: &Path, out: &Path, recipe: &Recipe) -> Result<File> {
    let checkpoint = Checkpoint::open(dir)?;
    Plan::new(Model::from_checkpoint(&checkpoint)?, recipe, None)?.write(out, &QUIET)?;
    let file = File::open(out)?;
    file.verify(|_| ())?;
    Ok(file)
}

/// All values of a tensor of the file.
pub fn values(file: &File, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap_or_else(|| panic!("no {name}"));
    let mut values = vec![0.0; tensor.n_elements()];
    quant::dequantize(tensor.ty, file.data(tensor), &mut values);
    values
}

/// Rows of `columns` values in another order: row i of the result is row `from(i)`.
pub fn permuted(values: &[f32], columns: usize, from: impl Fn(usize) -> usize) -> Vec<f32> {
    (0..values.len() / columns).flat_map(|row| &values[from(row) * columns..][..columns]).copied().collect()
}

/// The canonical family's small configuration: 3 layers of which 2 are the self-decoder's.
pub fn yoco_config() -> Value {
    json!({
        "model_type": "yoco_clsa", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_self_decoder_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "sliding_window": 8, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "qk_norm": true, "tie_word_embeddings": false, "index_head_dim": 8, "index_topk": 6,
        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    })
}

/// A whole checkpoint of [`yoco_config`], names as model.md 4a has them.
pub fn yoco(dtype: Dtype) -> Folder {
    let mut f = Folder::new(yoco_config(), dtype);
    f.add("model.embed_tokens.weight", &[40, 32]);
    for i in 0..2 {
        let p = |s: &str| format!("model.self_decoder.layers.{i}.{s}.weight");
        f.add(&p("input_layernorm"), &[32]);
        f.add(&p("self_attn.q_proj"), &[64, 32]);
        f.add(&p("self_attn.k_proj"), &[32, 32]);
        f.add(&p("self_attn.v_proj"), &[32, 32]);
        f.add(&p("self_attn.o_proj"), &[32, 64]);
        f.add(&p("self_attn.q_norm"), &[16]);
        f.add(&p("self_attn.k_norm"), &[16]);
        f.add(&p("post_attention_layernorm"), &[32]);
        f.add(&p("mlp.gate_proj"), &[48, 32]);
        f.add(&p("mlp.up_proj"), &[48, 32]);
        f.add(&p("mlp.down_proj"), &[32, 48]);
    }
    f.add("model.shared_kv.norm.weight", &[32]);
    f.add("model.shared_kv.k_proj.weight", &[32, 32]);
    f.add("model.shared_kv.v_proj.weight", &[32, 32]);
    f.add("model.indexer.q_proj.weight", &[8, 32]);
    f.add("model.indexer.k_proj.weight", &[8, 32]);
    let p = |s: &str| format!("model.cross_decoder.layers.0.{s}.weight");
    f.add(&p("input_layernorm"), &[32]);
    f.add(&p("cross_attn.q_proj"), &[64, 32]);
    f.add(&p("cross_attn.o_proj"), &[32, 64]);
    f.add(&p("post_attention_layernorm"), &[32]);
    f.add(&p("mlp.gate_proj"), &[48, 32]);
    f.add(&p("mlp.up_proj"), &[48, 32]);
    f.add(&p("mlp.down_proj"), &[32, 48]);
    f.add("model.norm.weight", &[32]);
    f.add("lm_head.weight", &[40, 32]);
    f
}

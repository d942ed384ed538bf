//! Checkpoints that are damaged or do not fit: the error names tensor and file, what was expected and what was found.
mod common;

use std::fs;

use clsa_convert::{Error, Mix, Recipe};
use common::{Folder, Stored, yoco};
use safetensors::Dtype;

fn edited(edit: impl FnOnce(&mut Folder)) -> String {
    let mut folder = yoco(Dtype::BF16);
    edit(&mut folder);
    folder.error()
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    const Q: &str = "model.self_decoder.layers.1.self_attn.q_proj.weight";
    let missing = edited(|f| drop(f.tensors.remove(Q)));
    assert!(missing.contains(&format!("1 of 37 tensors are missing: expected {Q} [64, 32]")), "{missing}");
    let many = edited(|f| f.tensors.retain(|n, _| !n.contains("self_decoder")));
    assert!(many.contains("22 of 37 tensors are missing") && many.contains("and 17 more"), "{many}");
    let unknown = edited(|f| f.add("model.layers.0.router.weight", &[4, 4]));
    assert!(
        unknown.contains("1 tensors that yoco_clsa does not have: found model.layers.0.router.weight"),
        "{unknown}"
    );
    let bias = edited(|f| f.add("model.self_decoder.layers.0.self_attn.q_proj.bias", &[64]));
    assert!(bias.contains("biases are not supported"), "{bias}");
    let indexer = edited(|f| f.config.as_object_mut().unwrap().retain(|k, _| !k.starts_with("index_")));
    assert!(indexer.contains("config.json lacks index_head_dim"), "{indexer}");
    let norms = edited(|f| f.config["qk_norm"] = false.into());
    assert!(norms.contains("is qk_norm missing in config.json?"), "{norms}");
    let shape = edited(|f| f.tensors.get_mut(Q).unwrap().shape = vec![32, 64]);
    assert!(
        shape.contains(&format!("model.safetensors: tensor {Q}: expected shape [64, 32], found [32, 64]")),
        "{shape}"
    );
    let flat = edited(|f| f.tensors.get_mut(Q).unwrap().shape = vec![2048]);
    assert!(flat.contains("expected shape [64, 32], found [2048]"), "{flat}");
    let dtype = edited(|f| {
        f.tensors
            .insert(Q.into(), Stored { shape: vec![32, 32], values: vec![0.0; 1024], dtype: Dtype::I32 });
    });
    assert!(dtype.contains(&format!("tensor {Q}: expected type F32, F16 or BF16, found I32")), "{dtype}");
}

#[test]
fn values_that_are_not_finite_are_found_wherever_they_are() {
    for (name, at, position) in [
        ("model.embed_tokens.weight", 33, "[1, 1]"),
        ("model.norm.weight", 31, "[0, 31]"),
        ("model.cross_decoder.layers.0.mlp.down_proj.weight", 32 * 48 - 1, "[31, 47]"),
    ] {
        for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
                let mut folder = yoco(dtype);
                folder.tensors.get_mut(name).unwrap().values[at] = value;
                folder.write("config.json");
                // Converted, and copied as they are.
                for mix in [Mix::Q8_0, Mix::F32, Mix::F16, Mix::BF16] {
                    let error = folder.convert(&Recipe::new(mix)).unwrap_err();
                    let message =
                        format!("tensor {name}: expected finite values, found {text} at {position}");
                    assert!(error.to_string().contains(&message), "{dtype:?} to {mix}: {error}");
                    assert_eq!(error.exit_code(), 2);
                    assert!(!folder.path("out.gguf").exists());
                }
            }
        }
    }
}

#[test]
fn values_too_large_for_the_type_are_errors_not_infinities() {
    let mut folder = yoco(Dtype::F32);
    let name = "model.shared_kv.k_proj.weight";
    folder.tensors.get_mut(name).unwrap().values[40] = -1e9;
    folder.write("config.json");
    for mix in [Mix::F16, Mix::Q8_0, Mix::Q4_0, Mix::IQ4_NL] {
        let error = folder.convert(&Recipe::new(mix)).unwrap_err().to_string();
        assert!(
            error.contains(&format!("tensor {name}: -1000000000 at [1, 8] is more than")),
            "{mix}: {error}"
        );
    }
    for mix in [Mix::F32, Mix::BF16] {
        folder.convert(&Recipe::new(mix)).unwrap();
    }
    folder.tensors.get_mut(name).unwrap().values[40] = 1e30;
    folder.write("config.json");
    assert!(
        folder
            .convert(&Recipe::new(Mix::Q4_0))
            .unwrap_err()
            .to_string()
            .contains("is more than Q8_0 can hold")
    );
}

#[test]
fn indices_and_shards_must_agree() {
    let folder = yoco(Dtype::BF16);
    folder.write_shards();
    let index = folder.path("model.safetensors.index.json");
    let good = fs::read_to_string(&index).unwrap();
    let refused = |text: &str| {
        fs::write(&index, text).unwrap();
        folder.convert_f32().expect_err("refused").to_string()
    };
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let moved = good.replacen(first, "swap", 1).replacen(second, first, 1).replacen("swap", second, 1);
    assert!(refused(&moved).contains("is not in"), "{}", refused(&moved));
    assert!(
        refused(&good.replace("lm_head.weight", "lm_tail.weight"))
            .contains("tensor lm_tail.weight is not in")
    );
    assert!(
        refused(&good.replacen(first, "../model.safetensors", 1))
            .contains("expected the name of a file in the folder")
    );
    assert!(refused(&good.replacen(first, "gone.safetensors", 1)).contains("gone.safetensors"));
    assert!(
        refused(&good.replacen(&format!("\"{first}\""), "7", 1)).contains("expected a file name, found 7")
    );
    assert!(refused("{}").contains("weight_map"));
    assert!(refused("{\"weight_map\"").contains("index.json"));
    let mut without: serde_json::Value = serde_json::from_str(&good).unwrap();
    without["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
    assert!(refused(&without.to_string()).contains("model.norm.weight is in a shard but not in the index"));
    fs::copy(folder.path(first), folder.path("copy.safetensors")).unwrap();
    let twice = good.replacen(first, "copy.safetensors", 1);
    assert!(refused(&twice).contains("is in another shard too"), "{}", refused(&twice));
    fs::write(&index, &good).unwrap();
    folder.convert_f32().unwrap();
    let bytes = fs::read(folder.path(second)).unwrap();
    fs::write(folder.path(second), &bytes[..bytes.len() - 1]).unwrap();
    let cut = folder.convert_f32().unwrap_err().to_string();
    assert!(cut.contains(second) && cut.contains("not a whole safetensors file"), "{cut}");
}

#[test]
fn folders_that_are_no_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let message = |dir: &std::path::Path| {
        let e = common::convert(dir, &dir.join("out.gguf"), &Recipe::new(Mix::F32)).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        e.to_string()
    };
    assert!(message(&dir.path().join("nowhere")).contains("is not a folder"));
    assert!(message(dir.path()).contains("no *.safetensors file"));
    let folder = yoco(Dtype::F32);
    folder.write("config.json");
    fs::rename(folder.path("model.safetensors"), folder.path("a.safetensors")).unwrap();
    folder.convert_f32().unwrap();
    fs::copy(folder.path("a.safetensors"), folder.path("b.safetensors")).unwrap();
    assert!(message(folder.dir.path()).contains("2 safetensors files but no model.safetensors.index.json"));
    fs::remove_file(folder.path("b.safetensors")).unwrap();
    fs::remove_file(folder.path("config.json")).unwrap();
    assert!(message(folder.dir.path()).contains("neither config.json"));
    fs::write(folder.path("config.json"), "{\"model_type\": ").unwrap();
    assert!(message(folder.dir.path()).contains("config.json: EOF"));
}

#[test]
fn an_aborted_conversion_leaves_the_old_file() {
    let folder = yoco(Dtype::F32);
    folder.write("config.json");
    fs::write(folder.path("out.gguf"), "old").unwrap();
    let before = fs::read_dir(folder.dir.path()).unwrap().count();
    let checkpoint = clsa_convert::checkpoint::Checkpoint::open(folder.dir.path()).unwrap();
    let model = clsa_convert::Model::from_checkpoint(&checkpoint).unwrap();
    let plan = clsa_convert::Plan::new(model, &Recipe::new(Mix::F16), None).unwrap();
    let abort = std::sync::atomic::AtomicBool::new(false);
    // Stops after the first task.
    let progress = |_| abort.store(true, std::sync::atomic::Ordering::Relaxed);
    let options = clsa_convert::Options { threads: 1, abort: Some(&abort), progress: &progress };
    assert!(matches!(plan.write(&folder.path("out.gguf"), &options), Err(Error::Interrupted)));
    assert_eq!(fs::read_to_string(folder.path("out.gguf")).unwrap(), "old");
    assert_eq!(fs::read_dir(folder.dir.path()).unwrap().count(), before);
}

//! Conversion beside the public Python packages: `safetensors` writes what we read, `gguf` reads what we write.
mod common;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use clsa_convert::{Mix, Options, Plan, Recipe, gguf::File, synth};
use ggml_kernels::quant;
use serde_json::Value;

/// Runs a script of tests/python in the environment that `make python` makes.
fn python(script: &str, args: &[&Path]) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(root.join(".venv/bin/python"))
        .arg(root.join("tests/python").join(script))
        .args(args)
        .output()
        .expect(".venv is there: make python");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Lists a file with the package and compares metadata, names, types, shapes and all values with ours.
fn assert_package_agrees(path: &Path) {
    let values = path.with_extension("bin");
    let listed: Value =
        serde_json::from_slice(&python("dequantize.py", &[path, &values]).stdout).expect("JSON");
    let file = File::open(path).unwrap();
    let (theirs, mut at) = (fs::read(values).unwrap(), 0);
    let list = listed["tensors"].as_array().unwrap();
    assert_eq!(list.len(), file.tensors().len());
    for (t, found) in file.tensors().iter().zip(list) {
        assert_eq!(found["name"], t.name.as_str());
        assert_eq!(found["type"], t.ty.name(), "{}", t.name);
        assert_eq!(found["shape"], serde_json::json!(t.shape), "{}", t.name);
        let mut ours = vec![0.0; t.n_elements()];
        quant::dequantize(t.ty, file.data(t), &mut ours);
        for (i, (&x, bytes)) in ours.iter().zip(theirs[at..].chunks_exact(4)).enumerate() {
            let y = f32::from_le_bytes(bytes.try_into().unwrap());
            // The package multiplies in another order.
            assert!((x - y).abs() <= 1e-6 * x.abs().max(1e-3), "{} ({}) value {i}: {x} {y}", t.name, t.ty);
        }
        at += 4 * ours.len();
    }
    assert_eq!(at, theirs.len());
    let metadata = &listed["metadata"];
    assert_eq!(metadata.as_object().unwrap().len(), file.metadata().count());
    assert_eq!(metadata["general.architecture"], file.require::<&str>("general.architecture").unwrap());
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "clsa.checksum.xxh3"] {
        assert_eq!(metadata[key], serde_json::json!(file.require::<Vec<&str>>(key).unwrap()), "{key}");
    }
    assert_eq!(metadata["general.file_type"], file.require::<u32>("general.file_type").unwrap());
}

#[test]
#[ignore = "needs .venv: make python"]
fn the_gguf_package_reads_every_type_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for &mix in Mix::ALL {
        let recipe = Recipe { pure: true, ..Recipe::new(mix) };
        let plan = Plan::new(synth::model("clsa-tiny", 9).unwrap(), &recipe, None).unwrap();
        plan.write(&path, &Options { threads: 2, abort: None, progress: &|_| () }).unwrap();
        assert_package_agrees(&path);
    }
}

#[test]
#[ignore = "needs .venv: make python"]
fn the_gguf_package_reads_every_family() {
    for family in common::FAMILIES {
        assert_package_agrees(&common::convert(&common::golden_dir(family), "Q4_K_M").path());
    }
}

#[test]
#[ignore = "needs .venv: make python"]
fn we_read_what_the_safetensors_package_writes() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("checkpoint");
    python("checkpoint.py", &[Path::new("write"), &checkpoint]);
    let model = common::convert(&checkpoint, "F32");
    python("checkpoint.py", &[Path::new("check"), &checkpoint, &model.path()]);
}

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

/// Lists a file with the package and compares names, types, shapes and all values with ours. Returns the metadata it found.
fn assert_tensors_agree(path: &Path) -> Value {
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
    let metadata = listed["metadata"].clone();
    assert_eq!(metadata.as_object().unwrap().len(), file.metadata().count());
    metadata
}

/// The same of a model, and its metadata.
fn assert_package_agrees(path: &Path) {
    let (metadata, file) = (assert_tensors_agree(path), File::open(path).unwrap());
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

#[test]
#[ignore = "needs .venv: make python"]
fn the_gguf_package_reads_an_importance_matrix() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("imatrix.gguf");
    let model = common::convert(&common::golden_dir("yoco-clsa"), "F16");
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let output = Command::new(env!("CARGO_BIN_EXE_clsa"))
        .args(["imatrix", "--device", "cpu", "-t", "1", "-c", "64", "--chunks", "2", "-f", text, "-m"])
        .args([&model.path(), Path::new("-o"), &path])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata = assert_tensors_agree(&path);
    for (key, value) in [
        ("general.type", serde_json::json!("imatrix")),
        ("imatrix.chunk_count", 2.into()),
        ("imatrix.chunk_size", 64.into()),
        ("imatrix.datasets", serde_json::json!([text])),
    ] {
        assert_eq!(metadata[key], value, "{key}");
    }
    let (file, weights) = (File::open(&path).unwrap(), File::open(model.path()).unwrap());
    for name in ["blk.0.attn_q.weight", "blk.1.ffn_down.weight"] {
        let of = |kind: &str| file.tensor(&format!("{name}.{kind}")).unwrap();
        assert_eq!(
            of("in_sum2").shape[0],
            weights.tensor(name).unwrap().shape[0],
            "{name}: one sum for each column"
        );
        assert_eq!(of("counts").n_elements(), 1, "{name}");
    }
}

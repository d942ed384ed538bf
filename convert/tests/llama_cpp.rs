//! Our quantizer beside llama.cpp's own: the same types for every tensor of every mix, and the same bytes.
use std::path::Path;

use clsa_convert::{
    Mix, Model, Options, Plan, Recipe,
    gguf::{File, Metadata, TensorPlan, Writer},
    imatrix::Imatrix,
    synth,
};
use ggml_kernels::{
    llama::{self, quantize},
    quant::Type,
};

const QUIET: Options<'_> = Options { threads: 2, abort: None, progress: &|_| () };

/// A Transformer of random weights, and a folder for more.
fn source(mix: Mix) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("source.gguf");
    let model = synth::model("transformer-tiny", 3).unwrap();
    Plan::new(model, &Recipe::new(mix), None).unwrap().write(&path, &QUIET).unwrap();
    (dir, path)
}

fn ours(source: &Path, out: &Path, recipe: &Recipe, imatrix: Option<&Imatrix>) {
    let file = File::open(source).unwrap();
    Plan::new(Model::from_gguf(&file).unwrap(), recipe, imatrix).unwrap().write(out, &QUIET).unwrap();
    File::open(out).unwrap().verify(|_| ()).unwrap();
}

/// Names, types and bytes of all tensors must agree.
fn assert_same(what: &str, ours: &Path, theirs: &Path) {
    let (ours, theirs) = (File::open(ours).unwrap(), File::open(theirs).unwrap());
    assert_eq!(ours.tensors().len(), theirs.tensors().len());
    for t in theirs.tensors() {
        let mine = ours.tensor(&t.name).unwrap();
        assert_eq!((mine.ty, &mine.shape), (t.ty, &t.shape), "{what}: {}", t.name);
        assert!(ours.data(mine) == theirs.data(t), "{what}: bytes of {} ({}) differ", t.name, t.ty);
    }
    let file_type = |f: &File| f.require::<u32>("general.file_type").unwrap();
    assert_eq!(file_type(&ours), file_type(&theirs), "{what}");
}

#[test]
fn every_mix_gives_llama_cpps_types_and_bytes() {
    let few = [Mix::F32, Mix::F16, Mix::BF16, Mix::Q8_0, Mix::Q4_K_M];
    for (source_mix, mixes) in [(Mix::F32, Mix::ALL), (Mix::F16, &few), (Mix::BF16, &few)] {
        let (dir, source) = source(source_mix);
        let (a, b) = (dir.path().join("ours.gguf"), dir.path().join("theirs.gguf"));
        for &mix in mixes {
            ours(&source, &a, &Recipe::new(mix), None);
            let options = quantize::Options { file_type: mix.file_type(), threads: 2, ..Default::default() };
            assert!(quantize::file(&source, &b, &options), "{mix}");
            assert_same(&format!("{source_mix} to {mix}"), &a, &b);
        }
    }
}

#[test]
fn options_give_llama_cpps_types_and_bytes() {
    let (dir, source) = source(Mix::F32);
    let (a, b) = (dir.path().join("ours.gguf"), dir.path().join("theirs.gguf"));
    for (pure, output, token_embedding) in [
        (true, None, None),
        (false, Some(Type::Q8_0), None),
        (false, None, Some(Type::Q2_K)),
        (true, Some(Type::F16), Some(Type::Q5_1)),
    ] {
        let recipe = Recipe { pure, output, token_embedding, ..Recipe::new(Mix::Q4_K_M) };
        ours(&source, &a, &recipe, None);
        let file_type = Mix::Q4_K_M.file_type();
        let options =
            quantize::Options { file_type, threads: 1, pure, output, token_embedding, imatrix: &[] };
        assert!(quantize::file(&source, &b, &options));
        assert_same(&format!("{pure} {output:?} {token_embedding:?}"), &a, &b);
    }
}

/// Writes an importance matrix as llama-imatrix does; returns what it says.
fn write_imatrix(source: &Path, path: &Path) -> Vec<(String, Vec<f32>)> {
    let file = File::open(source).unwrap();
    let mut metadata = Metadata::default();
    metadata.string("general.type", "imatrix");
    let (mut plans, mut data, mut means) = (Vec::new(), Vec::new(), Vec::new());
    for (i, t) in
        file.tensors().iter().filter(|t| t.shape.len() == 2 && t.name.starts_with("blk.")).enumerate()
    {
        let sums: Vec<f32> = (0..t.row_len()).map(|c| 1.0 + ((c * 37 + i) % 101) as f32).collect();
        let plan = |suffix: &str, shape: Vec<u64>| TensorPlan {
            name: format!("{}{suffix}", t.name),
            shape,
            ty: Type::F32,
        };
        plans.push(plan(".in_sum2", vec![t.shape[0], 1]));
        plans.push(plan(".counts", vec![1, 1]));
        means.push((t.name.clone(), sums.iter().map(|s| s / 8.0).collect()));
        data.extend([sums, vec![8.0]]);
    }
    let mut writer = Writer::create(path, metadata, plans, None).unwrap();
    for values in data {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.append(&bytes).unwrap();
    }
    writer.finish().unwrap();
    means
}

#[test]
fn an_importance_matrix_gives_llama_cpps_types_and_bytes() {
    let (dir, source) = source(Mix::F32);
    let path = |name: &str| dir.path().join(name);
    let means = write_imatrix(&source, &path("imatrix.gguf"));
    let imatrix = Imatrix::open(&path("imatrix.gguf")).unwrap();
    assert_eq!(imatrix.len(), means.len());
    for mix in
        [Mix::Q4_0, Mix::Q5_0, Mix::Q2_K, Mix::Q3_K_M, Mix::Q4_K_M, Mix::Q6_K, Mix::IQ4_NL, Mix::IQ4_XS]
    {
        ours(&source, &path("ours.gguf"), &Recipe::new(mix), Some(&imatrix));
        let options = quantize::Options {
            file_type: mix.file_type(),
            threads: 2,
            imatrix: &means,
            ..Default::default()
        };
        assert!(quantize::file(&source, &path("theirs.gguf"), &options), "{mix}");
        assert_same(&format!("{mix} with an importance matrix"), &path("ours.gguf"), &path("theirs.gguf"));
    }
    // It does change something.
    ours(&source, &path("plain.gguf"), &Recipe::new(Mix::Q4_K_S), None);
    ours(&source, &path("weighed.gguf"), &Recipe::new(Mix::Q4_K_S), Some(&imatrix));
    let data = |p: &str| {
        let file = File::open(path(p)).unwrap();
        file.data(file.tensor("blk.0.ffn_up.weight").unwrap()).to_vec()
    };
    assert_ne!(data("plain.gguf"), data("weighed.gguf"));
}

#[test]
fn an_importance_matrix_of_another_model_is_refused() {
    let (dir, source) = source(Mix::F32);
    let path = dir.path().join("imatrix.gguf");
    let refuse = |name: &str, columns: u64, value: f32| {
        let mut metadata = Metadata::default();
        metadata.string("general.type", "imatrix");
        let plan =
            |suffix: &str, n| TensorPlan { name: format!("{name}{suffix}"), shape: vec![n], ty: Type::F32 };
        let mut w =
            Writer::create(&path, metadata, vec![plan(".in_sum2", columns), plan(".counts", 1)], None)
                .unwrap();
        (0..=columns).for_each(|_| w.append(&value.to_le_bytes()).unwrap());
        w.finish().unwrap();
        let file = File::open(&source).unwrap();
        let imatrix = Imatrix::open(&path)?;
        Plan::new(Model::from_gguf(&file).unwrap(), &Recipe::new(Mix::Q4_0), Some(&imatrix)).map(drop)
    };
    let message = |r: clsa_convert::Result<()>| r.unwrap_err().to_string();
    assert!(refuse("blk.0.attn_q.weight", 256, 1.0).is_ok());
    assert!(message(refuse("blk.0.attn_q.weight", 64, 1.0)).contains("expected 256 columns, found 64"));
    assert!(message(refuse("nothing.weight", 64, 1.0)).contains("none of its matrices"));
    assert!(message(refuse("blk.0.attn_q.weight", 256, f32::NAN)).contains("finite"));
    assert!(message(Imatrix::open(&source).map(drop)).contains("general.type"));
}

#[test]
fn llama_cpp_reads_our_tokenizers() {
    let (_dir, source) = source(Mix::F16);
    let vocab = llama::Vocab::open(&source).expect("llama.cpp loads the file");
    let file = File::open(&source).unwrap();
    let tokens: Vec<&str> = file.require("tokenizer.ggml.tokens").unwrap();
    let ids = vocab.tokenize("the in<|im_end|>", false, true);
    let texts: Vec<&str> = ids.iter().map(|&i| tokens[i as usize]).collect();
    assert_eq!(texts, ["the", "Ġ", "in", "<|im_end|>"]);
}

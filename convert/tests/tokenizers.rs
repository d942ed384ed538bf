//! Tokenizers, templates and sampling defaults on their way into the file.
mod common;

use std::fs;

use common::{Folder, yoco};
use safetensors::Dtype;
use serde_json::{Value, json};

/// A tokenizer of three special tokens, a few characters and a merge.
fn tokenizer() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true},
            {"id": 1, "content": "<s>", "special": true},
            {"id": 2, "content": "</s>", "special": true},
            {"id": 9, "content": "[NOTE]", "special": false},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
        "model": {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5}, "merges": [["a", "b"]]},
    })
}

/// A canonical checkpoint with tokenizer.json; the vocabulary has 40 rows.
fn folder(tokenizer: &Value) -> Folder {
    let folder = yoco(Dtype::BF16);
    folder.write("config.json");
    fs::write(folder.path("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder
}

fn write(folder: &Folder, name: &str, value: &Value) {
    fs::write(folder.path(name), value.to_string()).unwrap();
}

#[test]
fn byte_level_bpe_goes_in_twice() {
    let folder = folder(&tokenizer());
    let file = folder.convert_f32().unwrap();
    assert_eq!(file.require::<&str>("tokenizer.huggingface.json").unwrap(), tokenizer().to_string());
    assert_eq!(file.require::<&str>("tokenizer.ggml.model").unwrap(), "gpt2");
    assert_eq!(file.require::<&str>("tokenizer.ggml.pre").unwrap(), "gpt-2");
    let tokens: Vec<&str> = file.require("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.len(), 40);
    assert_eq!(tokens[..6], ["<unk>", "<s>", "</s>", "a", "b", "ab"]);
    assert_eq!((tokens[9], tokens[10], tokens[39]), ("[NOTE]", "[PAD10]", "[PAD39]"));
    let kinds: Vec<i32> = file.require("tokenizer.ggml.token_type").unwrap();
    assert_eq!(kinds[..11], [3, 3, 3, 1, 1, 1, 5, 5, 5, 4, 5]);
    assert_eq!(file.require::<Vec<&str>>("tokenizer.ggml.merges").unwrap(), ["a b"]);
    assert!(file.require::<bool>("tokenizer.ggml.add_bos_token").unwrap());
    assert!(!file.require::<bool>("tokenizer.ggml.add_eos_token").unwrap());
}

#[test]
fn special_tokens_and_sampling_defaults() {
    let folder = folder(&tokenizer());
    write(
        &folder,
        "tokenizer_config.json",
        &json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": null, "add_bos_token": false, "chat_template": "T"}),
    );
    write(
        &folder,
        "generation_config.json",
        &json!({"eos_token_id": [2, 9], "temperature": 0.5, "top_k": 20, "top_p": 0.75,
        "min_p": 0.125, "repetition_penalty": 1.5}),
    );
    let file = folder.convert_f32().unwrap();
    let u32 = |key: &str| file.require::<u32>(key).unwrap();
    assert_eq!(u32("tokenizer.ggml.bos_token_id"), 1);
    assert_eq!(u32("tokenizer.ggml.eos_token_id"), 2);
    assert_eq!(u32("tokenizer.ggml.unknown_token_id"), 0);
    // From config.json, as the tokenizer's files do not say.
    assert_eq!(u32("tokenizer.ggml.padding_token_id"), 2);
    assert!(!file.require::<bool>("tokenizer.ggml.add_bos_token").unwrap());
    assert_eq!(file.require::<Vec<u32>>("clsa.eos_token_ids").unwrap(), [2, 9]);
    assert_eq!(file.require::<&str>("tokenizer.chat_template").unwrap(), "T");
    let f32 = |key: &str| file.require::<f32>(&format!("clsa.sampling.{key}")).unwrap();
    assert_eq!(
        [f32("temperature"), f32("top_p"), f32("min_p"), f32("repetition_penalty")],
        [0.5, 0.75, 0.125, 1.5]
    );
    assert_eq!(u32("clsa.sampling.top_k"), 20);
    // Greedy: the most likely token, whatever stands beside it.
    write(&folder, "generation_config.json", &json!({"do_sample": false, "temperature": 0.5}));
    let file = folder.convert_f32().unwrap();
    assert_eq!(file.require::<f32>("clsa.sampling.temperature").unwrap(), 0.0);
    write(&folder, "generation_config.json", &json!({"do_sample": true, "temperature": 0.5}));
    let file = folder.convert_f32().unwrap();
    assert_eq!(file.require::<f32>("clsa.sampling.temperature").unwrap(), 0.5);
}

#[test]
fn templates_of_every_form() {
    let folder = folder(&tokenizer());
    let list = json!({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "U"}]});
    write(&folder, "tokenizer_config.json", &list);
    let file = folder.convert_f32().unwrap();
    assert_eq!(file.require::<&str>("tokenizer.chat_template").unwrap(), "D");
    assert_eq!(file.require::<&str>("tokenizer.chat_template.tool_use").unwrap(), "U");
    fs::write(folder.path("chat_template.jinja"), "J").unwrap();
    assert_eq!(folder.convert_f32().unwrap().require::<&str>("tokenizer.chat_template").unwrap(), "J");
}

#[test]
fn byte_fallback_bpe_becomes_a_sentencepiece_model() {
    let mut t = tokenizer();
    t["model"]["byte_fallback"] = json!(true);
    t["model"]["unk_token"] = json!("<unk>");
    t["model"]["vocab"]["<0x0A>"] = json!(6);
    let file = folder(&t).convert_f32().unwrap();
    assert_eq!(file.require::<&str>("tokenizer.ggml.model").unwrap(), "llama");
    let kinds: Vec<i32> = file.require("tokenizer.ggml.token_type").unwrap();
    assert_eq!(kinds[..7], [2, 3, 3, 1, 1, 1, 6]);
    let scores: Vec<f32> = file.require("tokenizer.ggml.scores").unwrap();
    assert_eq!(scores[3..6], [-1.0, -1.0, 0.0]);
    assert!(file.get("tokenizer.ggml.merges").is_none());
}

#[test]
fn what_cannot_be_stored_is_noted() {
    let note = |f: &Folder| {
        let checkpoint = clsa_convert::checkpoint::Checkpoint::open(f.dir.path()).unwrap();
        clsa_convert::Model::from_checkpoint(&checkpoint).unwrap().notes.join("\n")
    };
    assert_eq!(note(&folder(&tokenizer())), "");
    let mut t = tokenizer();
    t["pre_tokenizer"] = json!({"type": "Whitespace"});
    let unknown = folder(&t);
    assert!(note(&unknown).contains("tokenizer.ggml.pre is not written"));
    assert!(unknown.convert_f32().unwrap().get("tokenizer.ggml.pre").is_none());
    t["model"] = json!({"type": "Unigram", "vocab": [["a", -1.5]]});
    assert!(note(&folder(&t)).contains("a Unigram model"));
    let bare = yoco(Dtype::BF16);
    bare.write("config.json");
    assert!(note(&bare).contains("no tokenizer.json"));
}

#[test]
fn tokenizers_that_do_not_fit_are_errors() {
    let refused = |t: &Value| folder(t).convert_f32().unwrap_err().to_string();
    let mut t = tokenizer();
    t["model"]["vocab"]["z"] = json!(40);
    assert!(
        refused(&t).contains("tokenizer.json: token \"z\" has id 40: the model's vocabulary has 40 rows"),
        "{}",
        refused(&t)
    );
    t["model"]["vocab"]["z"] = json!(-1);
    assert!(refused(&t).contains("tokenizer.json"));
    assert!(refused(&json!([1, 2])).contains("tokenizer.json"));
    for (file, value, text) in [
        ("generation_config.json", json!({"temperature": -1.0}), "temperature: expected 0 to 100, found -1"),
        (
            "generation_config.json",
            json!({"eos_token_id": 40}),
            "eos_token_id 40: the vocabulary has 40 rows",
        ),
        ("generation_config.json", json!({"top_p": "high"}), "generation_config.json"),
        ("tokenizer_config.json", json!({"add_bos_token": 1}), "tokenizer_config.json"),
    ] {
        let folder = folder(&tokenizer());
        write(&folder, file, &value);
        let error = folder.convert_f32().unwrap_err().to_string();
        assert!(error.contains(text), "{file}: {error}");
    }
}

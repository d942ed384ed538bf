//! Our ids against those of the packages `tokenizers` and `sentencepiece` (stored in tests/data/tokenizers.json) and of
//! llama.cpp (linked, asked at test time), and one test per error.
use super::*;
use crate::gguf::{Metadata, Writer};
use ggml_kernels::llama;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

static DATA: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("../../tests/data/tokenizers.json")).unwrap());

fn texts() -> Vec<&'static str> {
    DATA["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect()
}

fn id_lists(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The tokenizer.json of a variant.
fn config(name: &str) -> Value {
    let mut config = DATA["variants"][name]["config"].clone();
    let mut model = DATA[config["model"]["is"].as_str().unwrap()].clone();
    model["ignore_merges"] = config["model"]["ignore_merges"].take();
    config["model"] = model;
    config
}

fn from_config(config: &Value) -> Result<Tokenizer> {
    Tokenizer::from_tokenizer_json(&config.to_string(), 1000)
}

/// Tokens by id, for `tokenizer.ggml.tokens`.
fn tokens(model: &Value) -> Vec<&str> {
    let vocab = model["vocab"].as_object().unwrap();
    let mut tokens = vec![""; vocab.len()];
    vocab.iter().for_each(|(text, id)| tokens[usize::try_from(id.as_u64().unwrap()).unwrap()] = text);
    tokens
}

fn merges() -> Vec<String> {
    let merges = DATA["byte_level"]["merges"].as_array().unwrap();
    merges.iter().map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap())).collect()
}

/// The byte-level vocabulary as a GGUF file has it: four control tokens first, two user-defined ones last.
fn gpt2_vocab<'a>(pre: &'a str, merges: &'a [String]) -> GgmlVocab<'a> {
    let mut tokens = tokens(&DATA["byte_level"]);
    let mut types = vec![1; tokens.len()];
    types[..4].fill(3);
    tokens.extend(["<think>", "</think>"]);
    types.extend([4, 4]);
    GgmlVocab {
        model: "gpt2",
        pre: Some(pre),
        tokens,
        types: Some(types),
        merges: Some(merges.iter().map(String::as_str).collect()),
        ..GgmlVocab::default()
    }
}

fn llama_vocab() -> GgmlVocab<'static> {
    GgmlVocab {
        model: "llama",
        tokens: tokens(&DATA["spm"]),
        scores: serde_json::from_value(DATA["scores"].clone()).unwrap(),
        types: serde_json::from_value(DATA["types"].clone()).unwrap(),
        unk: Some(0),
        ..GgmlVocab::default()
    }
}

/// The vocabulary as a GGUF file, opened by us and by llama.cpp.
fn both(vocab: &GgmlVocab<'_>, more: impl FnOnce(&mut Metadata)) -> (Tokenizer, llama::Vocab) {
    let mut m = Metadata::default();
    m.string("general.architecture", "llama");
    m.string("tokenizer.ggml.model", vocab.model);
    m.strings("tokenizer.ggml.tokens", &vocab.tokens);
    m.i32s("tokenizer.ggml.token_type", vocab.types.as_ref().unwrap());
    m.u32("tokenizer.ggml.bos_token_id", if vocab.model == "llama" { 1 } else { 2 });
    m.u32("tokenizer.ggml.eos_token_id", if vocab.model == "llama" { 2 } else { 3 });
    if let Some(pre) = vocab.pre {
        m.string("tokenizer.ggml.pre", pre);
    }
    if let Some(scores) = &vocab.scores {
        m.f32s("tokenizer.ggml.scores", scores);
    }
    if let Some(merges) = &vocab.merges {
        m.strings("tokenizer.ggml.merges", merges);
    }
    more(&mut m);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vocab.gguf");
    Writer::create(&path, m, Vec::new(), None).unwrap().finish().unwrap();
    let ours = Tokenizer::from_gguf(&File::open(&path).unwrap()).unwrap();
    (ours, llama::Vocab::open(&path).expect("llama.cpp opens it"))
}

fn theirs(vocab: &llama::Vocab, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
    let ids = vocab.tokenize(text, add_special, parse_special);
    ids.into_iter().map(|id| u32::try_from(id).unwrap()).collect()
}

const PRE: [&str; 4] = ["smollm", "gpt-2", "llama-bpe", "qwen2"];

#[test]
fn tokenizer_json_gives_the_ids_of_the_python_package() {
    let variants = DATA["variants"].as_object().unwrap();
    assert_eq!(variants.len(), 6);
    for (name, variant) in variants {
        let t = from_config(&config(name)).unwrap();
        let (special, plain) = (id_lists(&variant["special"]), id_lists(&variant["plain"]));
        for (i, text) in texts().into_iter().enumerate() {
            assert_eq!(t.encode(text, true).unwrap(), special[i], "{name} {text:?} with special tokens");
            assert_eq!(t.encode(text, false).unwrap(), plain[i], "{name} {text:?}");
            assert_eq!(
                t.decode(&special[i], false).unwrap(),
                variant["decoded"][i],
                "{name} {text:?} decoded"
            );
        }
    }
}

#[test]
fn ggml_byte_level_vocabulary_gives_the_ids_of_llama_cpp() {
    let merges = merges();
    for pre in PRE {
        let (ours, llama_cpp) = both(&gpt2_vocab(pre, &merges), |_| ());
        assert_eq!(ours.special.add_bos, pre == "llama-bpe");
        for text in texts() {
            for special in [false, true] {
                let ids = ours.encode(text, special).unwrap();
                assert_eq!(ids, theirs(&llama_cpp, text, false, special), "{pre} {text:?} {special}");
            }
            let begun = ours.begin(ours.encode(text, false).unwrap());
            assert_eq!(begun, theirs(&llama_cpp, text, true, false), "{pre} {text:?} with BOS");
        }
        for id in 0..u32::try_from(ours.len()).unwrap() {
            assert_eq!(
                ours.piece(id).unwrap(),
                llama_cpp.piece(i32::try_from(id).unwrap(), true),
                "{pre} token {id}"
            );
        }
    }
}

#[test]
fn ggml_sentencepiece_vocabulary_gives_the_ids_of_llama_cpp_and_sentencepiece() {
    let by_sentencepiece = id_lists(&DATA["sentencepiece"]);
    for prefix in [None, Some(true), Some(false)] {
        let vocab = GgmlVocab { add_space_prefix: prefix, ..llama_vocab() };
        let (ours, llama_cpp) = both(&vocab, |m| {
            if let Some(prefix) = prefix {
                m.bool("tokenizer.ggml.add_space_prefix", prefix);
            }
        });
        assert!(ours.special.add_bos);
        for (i, text) in texts().into_iter().enumerate() {
            for special in [false, true] {
                let ids = ours.encode(text, special).unwrap();
                assert_eq!(ids, theirs(&llama_cpp, text, false, special), "{text:?} {special}");
                // SentencePiece itself puts no space after user-defined symbols.
                if !special && prefix != Some(false) && !text.contains("think") && !text.is_empty() {
                    assert_eq!(ids, by_sentencepiece[i], "{text:?}");
                }
                if prefix != Some(false) && !special && !text.contains("think") {
                    assert_eq!(ours.decode(&ids, true).unwrap(), text.replace('▁', " "), "{text:?}");
                }
            }
            let begun = ours.begin(ours.encode(text, false).unwrap());
            assert_eq!(begun, theirs(&llama_cpp, text, true, false), "{text:?} with BOS");
        }
        for id in 0..u32::try_from(ours.len()).unwrap() {
            assert_eq!(
                ours.piece(id).unwrap(),
                llama_cpp.piece(i32::try_from(id).unwrap(), true),
                "token {id}"
            );
        }
    }
}

#[test]
#[ignore = "slow: needs CLSA_TEST_GGUF, a file with tokenizer.ggml.*, and perhaps CLSA_TEST_TEXT, a text file"]
fn real_vocabulary_gives_the_ids_of_llama_cpp() {
    let Some(path) = std::env::var_os("CLSA_TEST_GGUF").map(std::path::PathBuf::from) else {
        println!("skipped: CLSA_TEST_GGUF names no file");
        return;
    };
    let long =
        std::env::var_os("CLSA_TEST_TEXT").map(|p| std::fs::read_to_string(p).unwrap()).unwrap_or_default();
    let ours = Tokenizer::from_gguf(&File::open(&path).unwrap()).unwrap();
    let llama_cpp = llama::Vocab::open(&path).unwrap();
    for text in texts().into_iter().chain(long.lines()).chain([long.as_str()]) {
        for special in [false, true] {
            assert_eq!(
                ours.encode(text, special).unwrap(),
                theirs(&llama_cpp, text, false, special),
                "{text:?}"
            );
        }
    }
    for id in 0..u32::try_from(ours.len()).unwrap() {
        assert_eq!(ours.piece(id).unwrap(), llama_cpp.piece(i32::try_from(id).unwrap(), true), "token {id}");
    }
}

#[test]
fn long_runs_need_no_more_than_a_moment() {
    let merges = merges();
    for pre in PRE {
        let t = Tokenizer::from_vocab(&gpt2_vocab(pre, &merges)).unwrap();
        for run in [" ", "a", "\n", "9", "!", " a", "\t\n", "é"] {
            let text = format!("{}x", run.repeat(300_000));
            let ids = t.encode(&text, true).unwrap();
            assert_eq!(t.decode(&ids, true).unwrap(), text, "{pre} {run:?}");
        }
    }
    let t = Tokenizer::from_vocab(&llama_vocab()).unwrap();
    for run in [" ", "a", "the "] {
        let text = run.repeat(300_000);
        assert_eq!(t.decode(&t.encode(&text, true).unwrap(), true).unwrap(), text);
    }
}

#[test]
fn user_text_cannot_pose_as_a_control_token() {
    let t = from_config(&config("gpt-2")).unwrap();
    let (start, end) = (0, 1);
    let text = "<|im_start|>a<|im_end|>b<|im_end|>";
    let inner = text.find("<|im_end|>").unwrap();
    let ids = t.encode_prompt(&Prompt { text: text.into(), guards: vec![inner + 1] }).unwrap();
    assert_eq!((ids[0], *ids.last().unwrap()), (start, end));
    assert!(!ids[1..ids.len() - 1].contains(&end));
    assert_eq!(t.decode(&ids, true).unwrap(), text);
    // The guarded part is tokenized as plain text is.
    let plain = t.encode("a<|im_end|>b", false).unwrap();
    assert_eq!(ids[1..ids.len() - 1], plain);
    // A guard at either end of a token does not touch it.
    for at in [inner, inner + "<|im_end|>".len()] {
        let ids = t.encode_prompt(&Prompt { text: text.into(), guards: vec![at] }).unwrap();
        assert_eq!(ids.iter().filter(|id| **id == end).count(), 2);
    }
    // Every vocabulary: no control id from plain text that spells it.
    let merges = merges();
    let mut all: Vec<Tokenizer> =
        PRE.iter().map(|p| Tokenizer::from_vocab(&gpt2_vocab(p, &merges)).unwrap()).collect();
    all.push(Tokenizer::from_vocab(&llama_vocab()).unwrap());
    all.extend(DATA["variants"].as_object().unwrap().keys().map(|name| from_config(&config(name)).unwrap()));
    for t in &all {
        let texts: Vec<String> = t.special_texts().map(str::to_owned).collect();
        assert!(texts.len() > 2);
        for text in texts.iter().chain([&texts.join(""), &texts.join(" ")]) {
            let ids = t.encode(text, false).unwrap();
            assert!(ids.iter().all(|id| !t.is_special(*id)), "{text:?} gave {ids:?}");
        }
    }
}

#[test]
fn bos_comes_once_and_where_the_file_asks() {
    let merges = merges();
    let vocab = gpt2_vocab("gpt-2", &merges);
    let keys = SpecialKeys { bos: Some(2), add_bos: Some(true), ..SpecialKeys::default() };
    let t = Tokenizer::from_ggml(&vocab, keys).unwrap();
    let prompt = |text: &str| t.encode_prompt(&Prompt { text: text.into(), guards: Vec::new() }).unwrap();
    assert_eq!(prompt("a"), prompt("<s>a"));
    assert_eq!(prompt("a")[0], 2);
    assert_eq!(prompt(""), [2]);
    // A tokenizer.json says it in its post-processor.
    let json = |name: &str, bos| {
        let keys = SpecialKeys { bos, ..SpecialKeys::default() };
        Tokenizer::from_json(&config(name).to_string(), 1000, keys).unwrap().special.add_bos
    };
    assert!(json("llama-bpe", Some(2)));
    assert!(!json("llama-bpe", Some(3)) && !json("llama-bpe", None) && !json("gpt-2", Some(2)));
}

#[test]
fn stop_tokens_are_those_of_the_file_or_known_by_name() {
    let merges = merges();
    let vocab = gpt2_vocab("gpt-2", &merges);
    let stop = |keys| Tokenizer::from_ggml(&vocab, keys).unwrap().special.stop;
    assert_eq!(stop(SpecialKeys::default()), [1, 3]);
    assert_eq!(stop(SpecialKeys { eos: Some(2), eot: Some(0), ..SpecialKeys::default() }), [0, 1, 2, 3]);
    assert_eq!(
        stop(SpecialKeys { eos: Some(2), stop: Some(vec![9, 1]), ..SpecialKeys::default() }),
        [1, 2, 9]
    );
    let t = Tokenizer::from_ggml(&vocab, SpecialKeys::default()).unwrap();
    assert!(t.is_stop(1) && !t.is_stop(0) && !t.is_stop(u32::MAX));
}

#[test]
fn tokens_that_end_an_answer_are_control_tokens_whatever_their_type() {
    let merges = merges();
    for ty in [1, 3, 4] {
        let mut vocab = gpt2_vocab("gpt-2", &merges);
        vocab.types.as_mut().unwrap()[1] = ty;
        let (ours, llama_cpp) = both(&vocab, |_| ());
        assert!(ours.is_stop(1) && ours.is_special(1));
        for special in [false, true] {
            let text = "a<|im_end|>b";
            assert_eq!(ours.encode(text, special).unwrap(), theirs(&llama_cpp, text, false, special));
        }
    }
}

#[test]
fn stream_shows_special_tokens_only_when_asked() {
    let t = from_config(&config("gpt-2")).unwrap();
    let ids = t.encode("<|im_start|>é<think>", true).unwrap();
    let stream = |show| {
        let mut d = StreamDecoder::new(show);
        let text: String = ids.iter().map(|id| d.push(&t, *id).unwrap()).collect();
        text + &d.finish()
    };
    assert_eq!(stream(false), "é<think>");
    assert_eq!(stream(true), "<|im_start|>é<think>");
    let size = t.len();
    let id = u32::try_from(size).unwrap();
    assert_eq!(StreamDecoder::new(false).push(&t, id), Err(Error::IdOutOfRange { id, size }));
    assert_eq!(t.decode(&[u32::MAX], true), Err(Error::IdOutOfRange { id: u32::MAX, size }));
    // An id that the model has and the tokenizer has not: nothing.
    assert_eq!(t.decode(&[999], true).unwrap(), "");
}

/// The error of a vocabulary that was made unusable.
fn spoil(spoil: impl FnOnce(&mut GgmlVocab<'_>)) -> String {
    let merges = merges();
    let mut vocab = gpt2_vocab("gpt-2", &merges);
    spoil(&mut vocab);
    Tokenizer::from_vocab(&vocab).expect_err("a vocabulary that cannot be used").to_string()
}

fn spoil_llama(spoil: impl FnOnce(&mut GgmlVocab<'_>)) -> String {
    let mut vocab = llama_vocab();
    spoil(&mut vocab);
    Tokenizer::from_vocab(&vocab).expect_err("a vocabulary that cannot be used").to_string()
}

#[test]
fn unusable_ggml_vocabularies_are_errors() {
    let has = |error: String, part: &str| assert!(error.contains(part), "{error:?} lacks {part:?}");
    has(spoil(|v| v.tokens.clear()), "0 tokens, expected 1 to");
    has(spoil(|v| v.tokens[9] = ""), "token 9 \"\": is empty");
    has(spoil(|v| v.tokens[9] = v.tokens[8]), "token 9 \"%\": has the text of token 8");
    has(
        spoil(|v| v.types.as_mut().unwrap().truncate(5)),
        "token_type: 5 values, expected one for each of the 731",
    );
    has(spoil(|v| v.types.as_mut().unwrap()[7] = 7), "its type is 7, expected 1 to 6");
    has(spoil(|v| v.types.as_mut().unwrap()[7] = -1), "its type is -1");
    has(spoil(|v| v.types.as_mut().unwrap()[7] = 6), "is of the byte type, expected <0x00>");
    has(
        spoil(|v| v.model = "t5"),
        "model (tokenizer.ggml.model) `t5` is not supported; supported: gpt2, llama",
    );
    has(
        spoil(|v| v.pre = Some("tekken")),
        "`tekken` is not supported; supported: llama-bpe, qwen2, smollm, gpt-2",
    );
    has(spoil(|v| v.pre = None), "tokenizer.ggml.pre: is missing");
    has(spoil(|v| v.merges = None), "tokenizer.ggml.merges: is missing");
    for (merge, what) in [
        ("", "expected two tokens"),
        ("ab", "expected two tokens"),
        (" a", "expected two tokens"),
        ("a ", "expected two tokens"),
        ("a b c", "expected two tokens"),
        ("q zzz", "\"zzz\" is not a token"),
        ("zzz q", "\"zzz\" is not a token"),
        ("q q", "\"qq\" is not a token"),
    ] {
        has(spoil(|v| v.merges.as_mut().unwrap()[3] = merge), what);
        has(spoil(|v| v.merges.as_mut().unwrap()[3] = merge), "merge 3");
    }
}

#[test]
fn unusable_llama_vocabularies_are_errors() {
    let has = |error: String, part: &str| assert!(error.contains(part), "{error:?} lacks {part:?}");
    has(spoil_llama(|v| v.scores = None), "tokenizer.ggml.scores: is missing");
    has(spoil_llama(|v| v.scores.as_mut().unwrap().truncate(1)), "scores: 1 values, expected one for each");
    has(spoil_llama(|v| v.scores.as_mut().unwrap()[700] = f32::NAN), "its score is NaN");
    for bad in ["<0x-1>", "<0x100>", "<0xZZ>", "<0x>"] {
        let at = llama_vocab().tokens.iter().position(|t| *t == "<0x00>").unwrap();
        has(spoil_llama(|v| v.tokens[at] = bad), "is of the byte type, expected <0x00> to <0xFF>");
    }
    has(
        spoil_llama(|v| {
            let at = v.tokens.iter().position(|t| *t == "<0xAA>").unwrap();
            v.tokens[at] = "<0xab>";
        }),
        "is the same byte as token",
    );
    has(
        spoil_llama(|v| {
            v.types.as_mut().unwrap().iter_mut().filter(|t| **t == 6).for_each(|t| *t = 1);
            v.unk = Some(800);
        }),
        "no token for the byte <0x00>",
    );
}

#[test]
fn unusable_special_ids_are_errors() {
    let merges = merges();
    let vocab = gpt2_vocab("gpt-2", &merges);
    let error = |keys| Tokenizer::from_ggml(&vocab, keys).unwrap_err().to_string();
    let out = "731, expected less than the vocabulary's 731";
    for (key, keys) in [
        ("bos_token_id", SpecialKeys { bos: Some(731), ..SpecialKeys::default() }),
        ("eos_token_id", SpecialKeys { eos: Some(731), ..SpecialKeys::default() }),
        ("eot_token_id", SpecialKeys { eot: Some(731), ..SpecialKeys::default() }),
        ("eom_token_id", SpecialKeys { eom: Some(731), ..SpecialKeys::default() }),
        ("eos_token_ids", SpecialKeys { stop: Some(vec![3, 731]), ..SpecialKeys::default() }),
    ] {
        let e = error(keys);
        assert!(e.contains(out) && e.contains(key), "{e}");
    }
    let e = error(SpecialKeys { add_bos: Some(true), ..SpecialKeys::default() });
    assert!(e.contains("add_bos_token: is set, but"), "{e}");
    let e = error(SpecialKeys { add_eos: Some(true), ..SpecialKeys::default() });
    assert!(e.contains("add_eos_token: is set, but"), "{e}");
}

#[test]
fn unusable_tokenizer_json_is_an_error() {
    let check = |name: &str, spoil: &dyn Fn(&mut Value), part: &str| {
        let mut c = config(name);
        spoil(&mut c);
        let e = from_config(&c).expect_err(part).to_string();
        assert!(e.contains(part), "{e:?} lacks {part:?}");
    };
    let gpt2 = |spoil: &dyn Fn(&mut Value), part: &str| check("gpt-2", spoil, part);
    gpt2(&|c| c["model"]["type"] = json!("Unigram"), "model `Unigram` is not supported; supported: BPE");
    gpt2(&|c| c["model"] = json!(null), "tokenizer.huggingface.json: invalid type: null");
    gpt2(&|c| c["model"]["vocab"] = json!([["a", 1]]), "a map from token to id");
    gpt2(&|c| c["model"]["vocab"]["a"] = json!(-1), "invalid value");
    gpt2(&|c| c["model"]["vocab"]["zz"] = json!(1000), "its id is outside the model's vocabulary of 1000");
    gpt2(&|c| c["model"]["vocab"]["zz"] = json!(9), "has the id of token");
    gpt2(&|c| c["model"]["vocab"][""] = json!(900), "token 900 \"\": is empty");
    gpt2(&|c| c["model"]["dropout"] = json!(0.1), "drops merges at random");
    gpt2(
        &|c| c["model"]["continuing_subword_prefix"] = json!("##"),
        "continuing_subword_prefix is \"##\", expected none",
    );
    gpt2(&|c| c["model"]["end_of_word_suffix"] = json!("</w>"), "end_of_word_suffix is \"</w>\"");
    gpt2(&|c| c["model"]["unk_token"] = json!("zz"), "unk_token \"zz\" is not in the vocabulary");
    gpt2(&|c| c["model"]["merges"][0] = json!(["a"]), "fewer than two tokens");
    gpt2(&|c| c["model"]["merges"][0] = json!(["a", "b", "c"]), "more than two tokens");
    gpt2(&|c| c["model"]["merges"][0] = json!(["", "b"]), "merge 0 \" b\": one of its tokens is empty");
    gpt2(&|c| c["model"]["merges"][0] = json!("a b c"), "merge 0 \"a b c\": expected two tokens");
    gpt2(&|c| c["model"]["merges"][0] = json!(7), "a merge: \"left right\"");
    gpt2(&|c| c["model"]["merges"][1] = c["model"]["merges"][0].clone(), "merge 1");
    gpt2(&|c| c["model"]["merges"][0] = json!(["q", "q"]), "\"qq\" is not a token");
    gpt2(&|c| c["normalizer"] = json!({"type": "Precompiled"}), "normalizer `Precompiled` is not supported");
    gpt2(&|c| c["normalizer"] = json!({"kind": 1}), "normalizer `without a type`");
    gpt2(
        &|c| c["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0}),
        "pre-tokenizer `FixedLength`",
    );
    gpt2(&|c| c["decoder"] = json!({"type": "WordPiece"}), "decoder `WordPiece` is not supported");
    gpt2(&|c| c["decoder"] = json!({"type": "Fuse"}), "decoder `Fuse` is not supported");
    check(
        "qwen2",
        &|c| c["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("(a"),
        "tokenizer.huggingface.json",
    );
    gpt2(&|c| c["added_tokens"][0]["id"] = json!(1000), "outside the model's vocabulary");
    gpt2(&|c| c["added_tokens"][0]["id"] = json!(5), "has id 0 in the vocabulary");
    gpt2(&|c| c["added_tokens"][5]["id"] = json!(5), "has the id of token");
    gpt2(&|c| c["added_tokens"][1] = c["added_tokens"][0].clone(), "is added twice");
    for broken in ["", "{", "[]", r#"{"model": {"type": "BPE", "vocab": {"\ud800": 0}, "merges": []}}"#] {
        assert!(matches!(Tokenizer::from_tokenizer_json(broken, 10), Err(Error::Json(_))), "{broken}");
    }
    let twice = r#"{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}, "decoder": {"type": "ByteLevel"}}"#;
    let e = Tokenizer::from_tokenizer_json(twice, 10).unwrap_err().to_string();
    assert!(e.contains("token 1 \"a\": has the text of token 0"), "{e}");
}

#[test]
fn file_without_a_tokenizer_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.gguf");
    let mut m = Metadata::default();
    m.string("general.architecture", "llama");
    Writer::create(&path, m, Vec::new(), None).unwrap().finish().unwrap();
    let e = Tokenizer::from_gguf(&File::open(&path).unwrap()).unwrap_err();
    assert!(matches!(e, crate::Error::Tokenizer(Error::Missing)), "{e}");
    assert_eq!(e.exit_code(), 2);
}

#[test]
fn tokenizer_json_comes_before_ggml_keys() {
    let merges = merges();
    let (ours, _) = both(&gpt2_vocab("gpt-2", &merges), |m| {
        m.string("tokenizer.huggingface.json", &config("smollm").to_string());
    });
    // smollm splits digits, gpt-2 does not.
    assert_eq!(ours.encode("1969", false).unwrap().len(), 4);
    assert_eq!(ours.len(), 731);
}

/// Pieces of text that meet in tokens, splits and guards.
fn text() -> impl Strategy<Value = String> {
    let parts = "the| t|er|an| a|1|23|\n|\r\n|\t| |  |é|東京|👍|'s|'LL|.|<|im_|end|>|<\\|im_end\\|>|<think>|x|_|Привет|-|=";
    proptest::collection::vec(parts, 0..24).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn random_texts_give_the_ids_of_llama_cpp(text in text(), special: bool) {
        static BOTH: LazyLock<Vec<(Tokenizer, llama::Vocab)>> = LazyLock::new(|| {
            let merges = merges();
            let gpt2 = PRE.iter().map(|pre| both(&gpt2_vocab(pre, &merges), |_| ()));
            gpt2.chain([both(&llama_vocab(), |_| ())]).collect()
        });
        for (ours, llama_cpp) in BOTH.iter() {
            prop_assert_eq!(ours.encode(&text, special).unwrap(), theirs(llama_cpp, &text, false, special));
        }
    }

    /// No ids, tokens, types, scores or merges make it panic.
    #[test]
    fn random_vocabularies_are_taken_or_refused(
        tokens in proptest::collection::vec("[ab<0x1>▁Ġé -]{0,6}", 0..12),
        types in proptest::option::of(proptest::collection::vec(-1i32..8, 0..12)),
        scores in proptest::option::of(proptest::collection::vec(any::<f32>(), 0..12)),
        merges in proptest::collection::vec("[ab▁Ġ ]{0,5}", 0..4),
        model in "gpt2|llama|x",
        text in "[ab<0x1>▁é -]{0,20}",
    ) {
        let vocab = GgmlVocab {
            model: &model,
            pre: Some("qwen2"),
            tokens: tokens.iter().map(String::as_str).collect(),
            types,
            scores,
            merges: Some(merges.iter().map(String::as_str).collect()),
            ..GgmlVocab::default()
        };
        if let Ok(t) = Tokenizer::from_vocab(&vocab) {
            let ids = t.encode(&text, true).unwrap();
            prop_assert!(t.decode(&ids, true).is_ok());
        }
    }
}

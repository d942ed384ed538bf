//! Damaged and hostile files through the real binary: each is an error with exit code 2, never a panic, a signal or a success.
use std::{fs, path::Path, process::Command};

use serde_json::{Value, json};

/// Runs `clsa` with the arguments; it must refuse them with one error message.
fn refused(what: &str, args: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_clsa")).args(args).output().expect("the binary runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    // No exit code: a signal. 101: a panic.
    assert_eq!(output.status.code(), Some(2), "{what}: {args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{what}: {}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(stderr.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{what}: {stderr}");
}

fn golden(family: &str) -> String {
    format!("{}/tests/golden/{family}", env!("CARGO_MANIFEST_DIR"))
}

/// A valid file of every kind of value.
fn whole(dir: &Path, family: &str) -> Vec<u8> {
    let path = dir.join("whole.gguf");
    let output = Command::new(env!("CARGO_BIN_EXE_clsa"))
        .args(["convert", &golden(family), "--type", "q8_0", "-o"])
        .arg(&path)
        .output()
        .expect("the binary runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::read(path).unwrap()
}

/// Where `text` ends in `bytes`.
fn after(bytes: &[u8], text: &str) -> usize {
    let at = bytes.windows(text.len()).position(|w| w == text.as_bytes());
    at.unwrap_or_else(|| panic!("{text} is in the file")) + text.len()
}

fn patched(bytes: &[u8], at: usize, patch: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + patch.len()].copy_from_slice(patch);
    bytes
}

/// Numbers that no count or size can be.
const ABSURD: [u64; 6] = [u64::MAX, 1 << 63, (1 << 63) - 1, 1 << 61, 1 << 40, 0xffff_ffff];

#[test]
fn a_hundred_damaged_gguf_files() {
    let dir = tempfile::tempdir().unwrap();
    let good = whole(dir.path(), "yoco-clsa");
    let tensor = after(&good, "blk.0.attn_q.weight");
    let data = good.len() - 100_000;
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    let mut case = |what: String, bytes: Vec<u8>| cases.push((what, bytes));
    for cut in [
        0,
        1,
        3,
        4,
        7,
        8,
        12,
        16,
        20,
        23,
        24,
        31,
        32,
        40,
        100,
        1000,
        tensor - 30,
        tensor,
        tensor + 20,
        data,
        good.len() - 65,
    ] {
        case(format!("cut to {cut} bytes"), good[..cut].to_vec());
    }
    for i in 1..12 {
        let cut = good.len() * i / 12;
        case(format!("cut to {cut} bytes"), good[..cut].to_vec());
    }
    // Counts of tensors and keys; lengths of the first key, of a string, of arrays; dimensions and offset of a tensor.
    let places = [
        ("tensors", 8),
        ("keys", 16),
        ("length of a key", 24),
        ("length of a string", after(&good, "tokenizer.huggingface.json") + 4),
        ("length of an array of strings", after(&good, "tokenizer.ggml.tokens") + 8),
        ("length of an array of numbers", after(&good, "tokenizer.ggml.token_type") + 8),
        ("first dimension", tensor + 4),
        ("second dimension", tensor + 12),
        ("offset", tensor + 24),
    ];
    for (what, at) in places {
        for value in ABSURD {
            case(format!("{what}: {value}"), patched(&good, at, &value.to_le_bytes()));
        }
    }
    for (what, at, value) in [
        ("magic", 0, 0u32),
        ("version", 4, 1),
        ("version", 4, 4),
        ("big-endian version", 4, 3 << 24),
        ("value type", after(&good, "yoco-clsa.block_count"), 13),
        ("value type", after(&good, "yoco-clsa.block_count"), 9),
        ("element type", after(&good, "tokenizer.ggml.token_type") + 4, 9),
        ("element type", after(&good, "tokenizer.ggml.token_type") + 4, 77),
        ("dimensions", tensor, 0),
        ("dimensions", tensor, 5),
        ("tensor type", tensor + 20, 4),
        ("tensor type", tensor + 20, 999),
        ("offset", tensor + 24, 33),
        ("offset", tensor + 24, 0),
    ] {
        case(format!("{what}: {value}"), patched(&good, at, &value.to_le_bytes()));
    }
    case("not UTF-8".into(), patched(&good, after(&good, "general.architecture") + 12, &[0xff]));
    assert!(cases.len() >= 100, "{}", cases.len());
    let path = dir.path().join("bad.gguf");
    let (path, out) = (path.to_str().unwrap(), dir.path().join("out.gguf"));
    for (what, bytes) in cases {
        fs::write(path, bytes).unwrap();
        refused(&what, &["inspect", path]);
        refused(&what, &["verify", path]);
        refused(&what, &["quantize", path, out.to_str().unwrap(), "q4_0"]);
        refused(&what, &["run", "-m", path, "-p", "a", "-n", "1"]);
        assert!(!out.exists(), "{what}");
    }
}

#[test]
fn any_flipped_byte_is_found_by_verify() {
    let dir = tempfile::tempdir().unwrap();
    let good = whole(dir.path(), "yoco-dense");
    let path = dir.path().join("bad.gguf");
    for i in 0..100 {
        let at = good.len() * i / 100 + i % 7;
        fs::write(&path, patched(&good, at, &[good[at] ^ (1 << (i % 8))])).unwrap();
        refused(&format!("a flip at {at}"), &["verify", path.to_str().unwrap()]);
    }
}

#[test]
fn hyperparameters_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.gguf");
    for (family, architecture, keys) in [
        (
            "yoco-clsa",
            "yoco-clsa",
            &["self_decoder.block_count", "attention.sliding_window", "attention.indexer.key_length"][..],
        ),
        ("llama", "llama", &[]),
    ] {
        let good = whole(dir.path(), family);
        let shared = [
            "block_count",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "rope.dimension_count",
        ];
        for key in keys.iter().chain(&shared) {
            let at = after(&good, &format!("{architecture}.{key}")) + 4;
            // A window may be of any length.
            let values = if key.ends_with("sliding_window") { &[0][..] } else { &[0, 7, 1 << 20, u32::MAX] };
            for value in values {
                fs::write(&path, patched(&good, at, &value.to_le_bytes())).unwrap();
                refused(
                    &format!("{family}: {key} = {value}"),
                    &["run", "-m", path.to_str().unwrap(), "-p", "a", "-n", "1"],
                );
            }
        }
    }
}

#[test]
fn damaged_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("checkpoint");
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(golden("yoco-clsa")).unwrap() {
        let entry = entry.unwrap();
        fs::write(folder.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
    let out = dir.path().join("out.gguf");
    let convert = |what: &str| {
        refused(what, &["convert", folder.to_str().unwrap(), "--type", "q8_0", "-o", out.to_str().unwrap()]);
        assert!(!out.exists(), "{what}");
    };
    let mut cases: Vec<(&str, String, Vec<u8>)> = Vec::new();

    let tensors = fs::read(folder.join("model.safetensors")).unwrap();
    for cut in [0, 4, 8, 9, 100, tensors.len() / 2, tensors.len() - 1] {
        cases.push(("model.safetensors", format!("cut to {cut}"), tensors[..cut].to_vec()));
    }
    for value in ABSURD {
        cases.push((
            "model.safetensors",
            format!("header of {value} bytes"),
            patched(&tensors, 0, &value.to_le_bytes()),
        ));
    }
    cases.push(("model.safetensors", "a byte more".into(), [&tensors[..], &[0]].concat()));
    let header = String::from_utf8(
        tensors[8..8 + u64::from_le_bytes(tensors[..8].try_into().unwrap()) as usize].to_vec(),
    )
    .unwrap();
    let mut with_header = |what: &str, edit: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut map: serde_json::Map<String, Value> = serde_json::from_str(&header).unwrap();
        edit(&mut map);
        let text = serde_json::to_vec(&map).unwrap();
        let whole = [&(text.len() as u64).to_le_bytes()[..], &text, &tensors[8 + header.len()..]].concat();
        cases.push(("model.safetensors", what.into(), whole));
    };
    const NORM: &str = "model.norm.weight";
    with_header("offsets past the end", &|m| {
        m[NORM]["data_offsets"] = json!([1u64 << 40, (1u64 << 40) + 128])
    });
    with_header("offsets the wrong way round", &|m| m[NORM]["data_offsets"] = json!([200, 100]));
    with_header("negative offsets", &|m| m[NORM]["data_offsets"] = json!([-1, 4]));
    with_header("a shape that overflows", &|m| m[NORM]["shape"] = json!([1u64 << 40, 1u64 << 40]));
    with_header("a shape of other size", &|m| m[NORM]["shape"] = json!([7]));
    with_header("an unknown dtype", &|m| m[NORM]["dtype"] = json!("Q7"));
    with_header("no shape", &|m| drop(m[NORM].as_object_mut().unwrap().remove("shape")));
    with_header("a tensor of another name", &|m| {
        let norm = m.remove(NORM).unwrap();
        m.insert("model.morn.weight".into(), norm);
    });

    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("vocab_size", json!(u64::MAX)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(1u64 << 33)),
        ("intermediate_size", json!(-5)),
        ("num_hidden_layers", json!(4_000_000_000u64)),
        ("num_self_decoder_layers", json!(4000)),
        ("num_attention_heads", json!(3)),
        ("num_attention_heads", json!(1u64 << 62)),
        ("num_key_value_heads", json!(0)),
        ("head_dim", json!(1u64 << 63)),
        ("sliding_window", json!(0)),
        ("rope_theta", json!(-1)),
        ("rope_theta", json!(1e300)),
        ("rms_norm_eps", json!("small")),
        ("index_head_dim", json!(0)),
        ("max_position_embeddings", json!(1u64 << 40)),
        ("eos_token_id", json!(1u64 << 40)),
        ("model_type", json!("llama")),
        ("model_type", json!(7)),
    ] {
        let mut bad = config.clone();
        bad[key] = value.clone();
        cases.push(("config.json", format!("{key} = {value}"), bad.to_string().into_bytes()));
    }
    cases.push(("config.json", "not UTF-8".into(), vec![0xff, 0xfe]));
    cases.push(("config.json", "nested without end".into(), vec![b'['; 1 << 20]));
    cases.push((
        "tokenizer.json",
        "half of it".into(),
        fs::read(folder.join("tokenizer.json")).unwrap()[..500].to_vec(),
    ));
    cases.push(("tokenizer.json", "a list".into(), b"[1, 2, 3]".to_vec()));
    cases.push(("model.safetensors.index.json", "a list".into(), b"[]".to_vec()));
    let traversal = json!({"weight_map": {NORM: "../../../../etc/passwd"}}).to_string();
    cases.push(("model.safetensors.index.json", "a path out of the folder".into(), traversal.into_bytes()));

    for (name, what, bytes) in cases {
        let path = folder.join(name);
        let good = fs::read(&path).ok();
        fs::write(&path, bytes).unwrap();
        convert(&format!("{name}: {what}"));
        match good {
            Some(good) => fs::write(&path, good).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
    }
}

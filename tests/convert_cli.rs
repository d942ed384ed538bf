//! `clsa convert`, `quantize`, `synth`, `inspect` and `verify` as commands: exit codes, streams, sizes, interruption, memory.
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

fn clsa(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_clsa")).args(args).output().expect("the binary runs")
}

/// Runs the command; it must succeed.
fn ok(args: &[&str]) -> Output {
    let output = clsa(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn golden(family: &str) -> String {
    format!("{}/tests/golden/{family}", env!("CARGO_MANIFEST_DIR"))
}

fn folder() -> (tempfile::TempDir, impl Fn(&str) -> String) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().to_owned();
    (dir, move |name: &str| path.join(name).to_str().expect("UTF-8").to_owned())
}

const TYPES: &str = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K \
    IQ4_NL IQ4_XS";

#[test]
fn a_dry_run_tells_the_size_of_every_type() {
    let (_dir, path) = folder();
    let out = path("out.gguf");
    let checkpoint = golden("yoco-clsa");
    for ty in TYPES.split_whitespace().map(str::to_lowercase) {
        for source in [["convert", &checkpoint], ["synth", "clsa-tiny"]] {
            let args = [&source[..], &["-o", &out, "--type", &ty]].concat();
            let plan = text(&ok(&[&args[..], &["--dry-run"]].concat()).stdout);
            assert!(!Path::new(&out).exists(), "a dry run writes nothing");
            let converted = ok(&args);
            assert!(converted.stdout.is_empty(), "standard output is for results");
            let size = fs::metadata(&out).unwrap().len();
            assert!(plan.contains(&format!("final size: {size} bytes")), "{ty}: {size}\n{plan}");
            ok(&["verify", &out]);
            fs::remove_file(&out).unwrap();
        }
    }
}

#[test]
fn fallbacks_are_told_per_type_with_counts() {
    let plan = ok(&["convert", &golden("yoco-clsa"), "--dry-run", "--type", "q4_k_m"]);
    let told = text(&plan.stderr);
    assert!(
        told.contains("22 tensors of type Q5_0 instead of Q4_K: rows are not divisible by 256"),
        "{told}"
    );
    assert!(text(&plan.stdout).contains("(instead of Q6_K)"));
    let whole = ok(&["synth", "clsa-tiny", "--dry-run", "--type", "q4_k_m"]);
    assert_eq!(text(&whole.stderr), "", "every row of the preset is divisible by 256");
}

#[test]
fn options_choose_types() {
    let (_dir, path) = folder();
    let out = path("out.gguf");
    let types = |args: &[&str]| {
        ok(&[&["synth", "clsa-tiny", "-o", &out, "--type", "q4_0"], args].concat());
        let json = ok(&["inspect", &out, "--tensors", "--json"]).stdout;
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let tensors = json["tensors"].as_array().unwrap().clone();
        move |name: &str| {
            tensors.iter().find(|t| t["name"] == name).unwrap()["type"].as_str().unwrap().to_owned()
        }
    };
    let of = types(&["--tensor-type", "ffn_(up|gate)=q5_1", "--tensor-type", "blk\\.0\\.=f16"]);
    assert_eq!(
        [of("blk.0.ffn_up.weight"), of("blk.0.attn_q.weight"), of("blk.1.attn_q.weight")],
        ["Q5_1", "F16", "Q4_0"]
    );
    assert_eq!([of("output.weight"), of("shared_kv.attn_v.weight")], ["Q6_K", "Q8_0"]);
    let of = types(&["--output-tensor-type", "bf16", "--token-embedding-type", "q2_k"]);
    assert_eq!([of("output.weight"), of("token_embd.weight")], ["BF16", "Q2_K"]);
    let of = types(&["--pure"]);
    assert_eq!(
        [of("output.weight"), of("shared_kv.attn_v.weight"), of("output_norm.weight")],
        ["Q4_0", "Q4_0", "F32"]
    );
}

#[test]
fn quantizing_a_file_is_converting_its_checkpoint() {
    let (_dir, path) = folder();
    let (half, direct, twice) = (path("f32.gguf"), path("direct.gguf"), path("twice.gguf"));
    ok(&["convert", &golden("yoco-clsa"), "-o", &half, "--type", "f32"]);
    ok(&["convert", &golden("yoco-clsa"), "-o", &direct, "--type", "q4_k_m"]);
    ok(&["quantize", &half, &twice, "q4_k_m", "-t", "1"]);
    assert!(fs::read(&direct).unwrap() == fs::read(&twice).unwrap());
    // A quantized source is expanded first; the name of the output may be that of the input.
    ok(&["quantize", &direct, &direct, "q8_0"]);
    ok(&["verify", &direct]);
    assert!(text(&ok(&["inspect", &direct]).stdout).contains("general.file_type = 7"));
}

#[test]
fn random_weights_hang_on_the_seed_alone() {
    let (_dir, path) = folder();
    let make = |seed: &str, threads: &str| {
        let out = path("out.gguf");
        ok(&["synth", "yoco-tiny", "-o", &out, "--type", "q5_k_m", "--seed", seed, "-t", threads]);
        fs::read(out).unwrap()
    };
    let first = make("5", "1");
    assert!(first == make("5", "7"));
    assert!(first != make("6", "1"));
}

#[test]
fn wrong_arguments_and_files_have_exit_code_2() {
    let (_dir, path) = folder();
    let out = path("out.gguf");
    fs::write(path("text"), "no model").unwrap();
    for args in [
        &["convert"][..],
        &["convert", "/no/such/folder", "-o", &out],
        &["convert", &golden("yoco-clsa")],
        &["convert", &golden("yoco-clsa"), "-o", &out, "--type", "q9"],
        &["convert", &golden("yoco-clsa"), "-o", &out, "--tensor-type", "nothing=q8_0"],
        &["convert", &golden("yoco-clsa"), "-o", &out, "--tensor-type", "(=q8_0"],
        &["convert", &golden("yoco-clsa"), "-o", &out, "-t", "0"],
        &["convert", &golden("yoco-clsa"), "-o", &out, "--imatrix", &path("text")],
        &["synth", "clsa-5b", "-o", &out],
        &["quantize", &path("text"), &out, "q8_0"],
        &["quantize", &path("none"), &out, "q8_0"],
        &["inspect", &path("text")],
        &["verify", "/"],
    ] {
        let output = clsa(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty() && text(&output.stderr).starts_with("error: "), "{args:?}");
        assert!(!Path::new(&out).exists(), "{args:?}");
    }
    // Not the input's fault: exit code 1.
    let unwritable = clsa(&["synth", "clsa-tiny", "-o", "/proc/out.gguf"]);
    assert_eq!(unwritable.status.code(), Some(1), "{}", text(&unwritable.stderr));
}

#[test]
fn inspect_into_a_closed_pipe_is_no_failure() {
    let (_dir, path) = folder();
    let out = path("out.gguf");
    ok(&["synth", "clsa-tiny", "-o", &out]);
    let binary = env!("CARGO_BIN_EXE_clsa");
    let script = format!("'{binary}' inspect --json '{out}' | head -n 1; exit ${{PIPESTATUS[0]}}");
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).trim(), "{");
}

/// A qwen3 checkpoint of zeros, sparse on disk, with `layers` layers of 50 MB.
#[cfg(target_os = "linux")]
fn sparse_checkpoint(dir: &Path, layers: usize) -> PathBuf {
    use serde_json::json;
    let (hidden, ffn, vocab) = (1024u64, 3072u64, 256u64);
    let config = json!({"model_type": "qwen3", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 1024, "tie_word_embeddings": true});
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".into(), vec![hidden]),
    ];
    for i in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![1024, hidden]),
            ("self_attn.k_proj", vec![256, hidden]),
            ("self_attn.v_proj", vec![256, hidden]),
            ("self_attn.o_proj", vec![hidden, 1024]),
            ("self_attn.q_norm", vec![128]),
            ("self_attn.k_norm", vec![128]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ] {
            shapes.push((format!("model.layers.{i}.{name}.weight"), shape));
        }
    }
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in shapes {
        let bytes = shape.iter().product::<u64>() * 4;
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [at, at + bytes]}));
        at += bytes;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let folder = dir.join("checkpoint");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let file = folder.join("model.safetensors");
    fs::write(&file, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
    let open = fs::OpenOptions::new().write(true).open(&file).unwrap();
    open.set_len(8 + header.len() as u64 + at).unwrap();
    folder
}

/// The peak of a child's resident memory in MiB, and whether it succeeded.
#[cfg(target_os = "linux")]
fn peak_of(mut child: Child) -> (u64, bool) {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        let now = fs::read_to_string(&status).unwrap_or_default();
        let line = now.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        peak = line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0).max(peak);
        if let Some(status) = child.try_wait().unwrap() {
            return (peak / 1024, status.success());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Converts and verifies a checkpoint of `layers` layers; memory must stay far below the 1 GiB that is promised.
#[cfg(target_os = "linux")]
fn assert_little_memory(layers: usize) {
    let (dir, path) = folder();
    let out = path("out.gguf");
    let checkpoint = sparse_checkpoint(dir.path(), layers);
    let convert = ["convert", checkpoint.to_str().unwrap(), "-o", &out, "--type"];
    for args in [
        [&convert[..], &["q4_0"]].concat(),
        vec!["verify", &out],
        [&convert[..], &["f32", "--tensor-type", "ffn=q8_0"]].concat(),
    ] {
        let child = Command::new(env!("CARGO_BIN_EXE_clsa"))
            .args(&args)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        let (peak, succeeded) = peak_of(child.unwrap());
        assert!(succeeded, "{args:?}");
        assert!((1..=250).contains(&peak), "{args:?}: {peak} MiB");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_the_checkpoint() {
    // 400 MB.
    assert_little_memory(8);
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "slow: converts a checkpoint of 1.6 GB, more than the memory allowed"]
fn memory_does_not_grow_with_a_large_checkpoint() {
    assert_little_memory(34);
}

#[cfg(target_os = "linux")]
#[test]
fn an_interrupted_conversion_leaves_the_old_file() {
    let (dir, path) = folder();
    let checkpoint = sparse_checkpoint(dir.path(), 20);
    let outputs = dir.path().join("outputs");
    fs::create_dir(&outputs).unwrap();
    let out = outputs.join("out.gguf");
    for signal in ["INT", "TERM"] {
        fs::write(&out, "old").unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_clsa"))
            .args(["convert", checkpoint.to_str().unwrap(), "--type", "q2_k", "-o"])
            .arg(&out)
            .stderr(fs::File::create(path("stderr")).unwrap())
            .spawn()
            .unwrap();
        // The temporary file appears when the work begins.
        let start = Instant::now();
        while fs::read_dir(&outputs).unwrap().count() < 2 {
            assert!(
                start.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none(),
                "no work began"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130));
        assert!(fs::read_to_string(path("stderr")).unwrap().ends_with("\nerror: interrupted\n"));
        assert_eq!(fs::read_to_string(&out).unwrap(), "old");
        assert_eq!(fs::read_dir(&outputs).unwrap().count(), 1, "no temporary file is left");
    }
}

#[test]
fn a_failed_conversion_leaves_the_old_file() {
    let (dir, path) = folder();
    let checkpoint = dir.path().join("checkpoint");
    fs::create_dir(&checkpoint).unwrap();
    for entry in fs::read_dir(golden("yoco-dense")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), checkpoint.join(entry.file_name())).unwrap();
    }
    // The last two bytes of the data become NaN in F16 and BF16 alike.
    let file = checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let n = bytes.len();
    bytes[n - 2..].fill(0xff);
    fs::remove_file(&file).unwrap();
    fs::write(&file, bytes).unwrap();
    let out = path("out.gguf");
    fs::write(&out, "old").unwrap();
    let output = clsa(&["convert", checkpoint.to_str().unwrap(), "-o", &out]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("expected finite values, found NaN"), "{}", text(&output.stderr));
    assert_eq!(fs::read_to_string(&out).unwrap(), "old");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

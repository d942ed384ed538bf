//! Importance matrices: the CPU sees what the oracle and llama.cpp see, files go both ways, runs go on where they were cut off.
mod common;

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use clsa::backend::probe::{Probe, Seen};
use clsa::backend::{Backend, ggml::Ggml, reference::Reference};
use clsa::engine::{Engine, Options, Row};
use clsa::model::Model;
use clsa_convert::gguf::File;
use clsa_convert::imatrix::Sums;
use common::*;
use ggml_kernels::llama::run::{Llama, Params};
use ggml_kernels::quant::{self, Type};

/// What a probe sees of `tokens` in micro-batches of `chunk`, on `threads` threads or, without, in the oracle.
fn seen(model: &Model, threads: Option<usize>, tokens: &[u32], chunk: usize) -> HashMap<String, Seen> {
    let options = Options { max_outputs: Some(512), ..f32_options() };
    let (spec, probe) = (options.cache_spec(), Arc::new(Probe::default()));
    let backend: Box<dyn Backend> = match threads {
        Some(n) => {
            let mut cpu = Ggml::new(model.clone(), spec, n, Arc::default()).expect("the CPU backend");
            cpu.set_probe(Arc::clone(&probe));
            Box::new(cpu)
        }
        None => {
            let mut oracle = Reference::new(model.clone(), spec).expect("the reference");
            oracle.set_probe(Arc::clone(&probe));
            Box::new(oracle)
        }
    };
    let mut engine = Engine::new(model.clone(), backend, &options).expect("an engine");
    let seq = engine.create().expect("a sequence");
    for tokens in tokens.chunks(chunk) {
        let rows: Vec<Row> = tokens.iter().map(|&token| Row { seq, token, output: true }).collect();
        engine.run(&rows).expect("a micro-batch");
    }
    probe.drain()
}

fn assert_same(got: &HashMap<String, Seen>, want: &HashMap<String, Seen>, tolerance: f64, what: &str) {
    let mut names: Vec<_> = want.keys().collect();
    names.sort();
    assert!(!names.is_empty());
    for name in names {
        let (got, want) = (&got[name], &want[name]);
        assert_eq!(got.rows, want.rows, "{what}: {name}");
        let largest = want.sums.iter().fold(0f64, |m, v| m.max(*v));
        let worst = got.sums.iter().zip(&want.sums).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst <= tolerance * largest, "{what}: {name}: {worst} of {largest}");
    }
}

#[test]
fn the_cpu_sees_what_the_oracle_sees() {
    for family in FAMILIES {
        let model = convert(&golden_dir(family), "F32").open();
        let tokens = Random(4).tokens(100, model.config.vocab);
        let want = seen(&model, None, &tokens, 100);
        // Every matrix, and nothing else: embeddings that are not tied are not multiplied.
        let tied = model.weights.output.name == model.weights.token_embd.name;
        let matrices = model.weights.all().filter(|w| w.n_out > 1 && (tied || w.name != "token_embd.weight"));
        assert_eq!(want.len(), matrices.count(), "{family}");
        let got = seen(&model, Some(1), &tokens, 64);
        assert_same(&got, &want, 1e-4, family);
        // However many threads: the same sums, bit for bit.
        let three = seen(&model, Some(3), &tokens, 64);
        assert_same(&three, &got, 0.0, &format!("{family}, threads"));
    }
}

#[test]
fn llama_cpp_sees_the_same() {
    for family in ["llama", "qwen3"] {
        let file = convert(&golden_dir(family), "F32");
        let model = file.open();
        let tokens = Random(6).tokens(90, model.config.vocab);
        let heard = Arc::new(Mutex::new(HashMap::<String, Seen>::new()));
        let ear = Arc::clone(&heard);
        let observer = Box::new(move |name: &str, n_in: usize, x: &[f32]| {
            let mut heard = ear.lock().unwrap();
            let seen = heard.entry(name.to_owned()).or_default();
            seen.sums.resize(n_in, 0.0);
            for row in x.chunks_exact(n_in) {
                seen.rows += 1;
                seen.sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v) * f64::from(*v));
            }
        });
        let params = Params { context: 256, batch: 64, threads: 1, cache: Type::F32, flash_attention: false };
        let mut llama = Llama::observed(&file.path(), params, observer).expect("llama.cpp loads the file");
        llama.decode_all(&tokens, |_| true, |_, _| ()).expect("llama.cpp decodes");
        let want = heard.lock().unwrap();
        let got = seen(&model, Some(2), &tokens, 64);
        // Their cross-check is not empty: attention, feed-forward and output are all among them.
        assert_eq!(want.len(), got.len(), "{family}");
        assert_same(&got, &want, 2e-3, family);
    }
}

fn clsa(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_clsa")).args(args).output().expect("the binary runs")
}

fn ok(args: &[&str]) -> String {
    let output = clsa(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {stderr}");
    stderr
}

fn near(a: &Sums, b: &Sums) {
    assert_eq!((a.chunks, a.entries.len()), (b.chunks, b.entries.len()));
    for (name, x) in &a.entries {
        let y = &b.entries[name];
        assert_eq!(x.counts, y.counts, "{name}");
        for (x, y) in x.sums.iter().zip(&y.sums) {
            // Floats in files that were saved on the way.
            assert!((x - y).abs() <= 1e-5 * x.abs().max(1e-9), "{name}: {x} {y}");
        }
    }
}

#[test]
fn runs_go_on_merge_and_help() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let model = synth("clsa-tiny", "F32", 8);
    let source = model.path().to_str().expect("UTF-8").to_owned();
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("a text");
    let half = text.char_indices().nth(3000).map_or(text.len(), |(i, _)| i);
    std::fs::write(path("a.txt"), &text[..half]).expect("written");
    std::fs::write(path("b.txt"), &text[half..]).expect("written");
    let run = |text: &str, out: &str, more: &[&str]| {
        let (text, out) = (path(text), path(out));
        let args =
            ["imatrix", "-m", &source, "-c", "32", "-t", "1", "--device", "cpu", "-f", &text, "-o", &out];
        ok(&[&args[..], more].concat())
    };
    let open = |name: &str| Sums::open(Path::new(&path(name))).expect("an importance matrix");
    run("a.txt", "whole.gguf", &["--chunks", "6"]);
    // Cut off after two chunks, and gone on with.
    run("a.txt", "pieces.gguf", &["--chunks", "2", "--save-every", "1"]);
    let told = run("a.txt", "pieces.gguf", &["--chunks", "6"]);
    assert!(told.contains("2 of 6 chunks are there"), "{told}");
    near(&open("pieces.gguf"), &open("whole.gguf"));
    // Other text: two files added up are one after the other.
    run("b.txt", "b.gguf", &["--chunks", "3"]);
    run("b.txt", "both.gguf", &["--chunks", "3", "--in-file", &path("whole.gguf")]);
    ok(&[
        "imatrix",
        "--in-file",
        &path("whole.gguf"),
        "--in-file",
        &path("b.gguf"),
        "-o",
        &path("merged.gguf"),
    ]);
    near(&open("merged.gguf"), &open("both.gguf"));
    assert_eq!(open("both.gguf").datasets, [path("a.txt"), path("b.txt")]);
    // The output matrix only when asked for.
    assert!(!open("whole.gguf").entries.contains_key("output.weight"));
    run("a.txt", "output.gguf", &["--chunks", "1", "--process-output"]);
    assert!(
        ["output.weight", "token_embd.weight"].iter().any(|n| open("output.gguf").entries.contains_key(*n))
    );
    // Quantized with it, what is multiplied comes out nearer.
    let importance = open("whole.gguf");
    let error = |file: &str, name: &str| {
        let (file, original) = (File::open(path(file)).unwrap(), model.open());
        let (q, x) = (file.tensor(name).unwrap(), original.file.tensor(name).unwrap());
        let (mut a, mut b) = (vec![0.0; q.n_elements()], vec![0.0; q.n_elements()]);
        quant::dequantize(q.ty, file.data(q), &mut a);
        quant::dequantize(x.ty, original.file.data(x), &mut b);
        let columns = importance.entries[name].sums.iter().cycle();
        a.iter().zip(&b).zip(columns).map(|((a, b), w)| f64::from(a - b).powi(2) * w).sum::<f64>()
    };
    for mix in ["Q4_K_S", "IQ4_NL", "Q3_K_S", "Q2_K"] {
        ok(&["quantize", &source, &path("plain.gguf"), mix]);
        ok(&["quantize", &source, &path("weighed.gguf"), mix, "--imatrix", &path("whole.gguf")]);
        let sum = |file: &str| -> f64 {
            ["blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.1.attn_output.weight"]
                .map(|name| error(file, name))
                .iter()
                .sum()
        };
        let (plain, weighed) = (sum("plain.gguf"), sum("weighed.gguf"));
        println!("{mix}: weighed error {weighed:.3e}, without importance {plain:.3e}");
        assert!(weighed < plain, "{mix}");
    }
}

#[test]
fn bad_inputs_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let model = synth("clsa-tiny", "F32", 8);
    let source = model.path().to_str().expect("UTF-8").to_owned();
    std::fs::write(path("short.txt"), "Hello.").expect("written");
    let out = path("out.gguf");
    let short = path("short.txt");
    for (args, word) in [
        (vec!["-m", &source, "-f", &short], "one window needs 512"),
        (vec!["-m", &source, "-f", &short, "--in-file", &source], "general.type"),
        (vec!["-m", &source, "-f", &short, "-c", "2", "--device", "cuda"], "on the CPU only"),
        (vec!["-m", &source], "--file"),
    ] {
        let output = clsa(&[&["imatrix", "-o", &out][..], &args].concat());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(word), "{told}");
        assert!(!Path::new(&out).exists());
    }
}

#[test]
fn tuning_fits_a_size_and_goes_on() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let model = synth("clsa-tiny", "F16", 8);
    let source = model.path().to_str().expect("UTF-8").to_owned();
    let out = path("out.gguf");
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/formats.md");
    let run = |size: &str| {
        let args = ["quantize", &source, &out, "--tune", size, "--tune-text", text, "--tune-windows", "1"];
        clsa(&[&args[..], &["-t", "1"]].concat())
    };
    let sizes = ["Q4_0", "Q8_0"].map(|mix| {
        ok(&["quantize", &source, &path("plain.gguf"), mix, "--pure"]);
        std::fs::metadata(path("plain.gguf")).expect("a file").len()
    });
    let result = |size: u64| -> (u64, f64) {
        let output = run(&size.to_string());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let told = String::from_utf8(output.stdout).expect("UTF-8");
        let line = told.lines().last().expect("a last line");
        let kl = line.split_whitespace().nth(2).expect("a divergence").parse().expect("a number");
        (std::fs::metadata(&out).expect("a file").len(), kl)
    };
    let (small, large) = (result(sizes[0] * 21 / 20), result(sizes[1] * 21 / 20));
    println!("{small:?} {large:?} for {sizes:?}");
    assert!(small.0 <= sizes[0] * 21 / 20 && large.0 <= sizes[1] * 21 / 20 && small.0 < large.0);
    assert!(large.1 < small.1, "more bytes diverge less");
    // Measured once: the state serves both sizes, and gives the same file again.
    let state = std::fs::read_to_string(path("out.gguf.tune")).expect("a state file");
    let bytes = std::fs::read(&out).expect("a file");
    assert_eq!(result(sizes[1] * 21 / 20), large);
    assert_eq!(std::fs::read(&out).expect("a file"), bytes);
    // A measurement that is missing is made again, and the same.
    let lines: Vec<_> = state.lines().collect();
    std::fs::write(path("out.gguf.tune"), lines[..lines.len() - 1].join("\n") + "\n").expect("written");
    assert_eq!(result(sizes[1] * 21 / 20), large);
    assert_eq!(std::fs::read_to_string(path("out.gguf.tune")).expect("a state file"), state);
    let refused = run("1kB");
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("the smallest file has"));
    let left = std::fs::read_dir(dir.path())
        .expect("a folder")
        .filter(|e| e.as_ref().is_ok_and(|e| e.file_name().to_string_lossy().starts_with(".clsa")));
    assert_eq!(left.count(), 0, "nothing is left behind");
}

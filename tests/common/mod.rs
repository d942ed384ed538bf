//! What the tests of the whole share: models made from checkpoints and presets, engines over them, greedy text, distances.
#![allow(dead_code)] // Each test file uses its own part.
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clsa::backend::{Backend, cuda::Cuda, ggml::Ggml, reference::Reference};
use clsa::cache::CacheType;
use clsa::engine::{Engine, Options, Row, SeqId};
use clsa::model::Model;
use clsa_convert::checkpoint::Checkpoint;
use clsa_convert::{Mix, Plan, Recipe};

/// Families of `tests/golden/`.
pub const FAMILIES: [&str; 5] = ["yoco-clsa", "yoco-dense", "unilm", "llama", "qwen3"];

/// The folder of a tiny checkpoint.
pub fn golden_dir(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
}

/// A GGUF file that lives as long as this.
pub struct TempModel {
    dir: tempfile::TempDir,
}

impl TempModel {
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("model.gguf")
    }

    pub fn open(&self) -> Model {
        Model::open(&self.path()).expect("a model that was just written")
    }
}

fn write(model: clsa_convert::Model<'_>, mix: &str) -> TempModel {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = TempModel { dir };
    let plan = Plan::new(model, &Recipe::new(mix.parse::<Mix>().expect("a mix")), None).expect("a plan");
    let options = clsa_convert::Options { threads: 2, abort: None, progress: &|_| {} };
    plan.write(&out.path(), &options).expect("a model file");
    out
}

/// Converts a checkpoint folder.
pub fn convert(checkpoint: &Path, mix: &str) -> TempModel {
    let checkpoint = Checkpoint::open(checkpoint).expect("a checkpoint");
    write(clsa_convert::Model::from_checkpoint(&checkpoint).expect("a supported checkpoint"), mix)
}

/// The model of a GGUF file in other types.
pub fn requantize(file: &clsa_convert::gguf::File, mix: &str) -> TempModel {
    write(clsa_convert::Model::from_gguf(file).expect("a model"), mix)
}

/// A model of random weights in the shape of a preset.
pub fn synth(preset: &str, mix: &str, seed: u64) -> TempModel {
    write(clsa_convert::synth::model(preset, seed).expect("a preset"), mix)
}

/// What runs a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Reference,
    Ggml,
    Cuda,
}

/// Holds the GPU for one test at a time, so that the free memory that a test sees is its own.
pub struct Gpu {
    _turn: std::sync::MutexGuard<'static, ()>,
}

/// The GPU, or `None` with the reason on stderr.
pub fn gpu() -> Option<Gpu> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    match clsa::backend::cuda::availability() {
        Ok(()) => Some(Gpu { _turn: TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner) }),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}

/// Everything in f32, so that two backends can be told apart from two roundings.
pub fn f32_options() -> Options {
    Options {
        k: CacheType::F32,
        v: CacheType::F32,
        index: CacheType::F32,
        context: 1024,
        ..Options::default()
    }
}

pub fn engine(model: &Model, device: Device, options: &Options) -> Engine {
    let spec = options.cache_spec();
    let backend: Box<dyn Backend> = match device {
        Device::Cuda => Box::new(Cuda::new(model.clone(), spec, 0).expect("the GPU backend")),
        Device::Reference => Box::new(Reference::new(model.clone(), spec).expect("the reference")),
        Device::Ggml => Box::new(
            Ggml::new(model.clone(), spec, 2, Arc::new(AtomicBool::new(false))).expect("the CPU backend"),
        ),
    };
    Engine::new(model.clone(), backend, options).expect("an engine")
}

/// A checkpoint that a prompt leaves on its way holds the windows of a prompt that ends there, however few tokens follow it.
pub fn checkpoints_on_the_way(model: &Model, device: Device, options: &Options) {
    const AT: usize = 8192; // where prefill leaves one by itself
    let options = Options { context: AT + 128, max_rows: 512, n_seq: 1, ..options.clone() };
    let vocab = model.config.vocab as u32;
    let tokens: Vec<u32> = (0..AT as u32 + 128).map(|i| i * 7919 % vocab).collect();
    let mut windows = vec![];
    for len in [AT, AT + 10, AT + 100] {
        let mut engine = engine(model, device, &options);
        let seq = engine.create().expect("a sequence");
        engine.prefill(seq, &tokens[..len], |_| ControlFlow::Continue(())).expect("prefill");
        if len == AT {
            engine.checkpoint(seq).expect("a checkpoint");
        }
        let last = engine.checkpoints(seq).last().map(|(at, window)| (at, window.to_vec()));
        windows.push(last.expect("a checkpoint"));
    }
    assert_eq!(windows[0].0, AT);
    assert!(!windows[0].1.is_empty() && windows.iter().all(|w| *w == windows[0]), "not the windows at {AT}");
}

/// Appends `tokens` in micro-batches of at most `chunk` and returns the logits of the last.
pub fn prefill_in_chunks(engine: &mut Engine, seq: SeqId, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut logits = vec![];
    for (i, piece) in tokens.chunks(chunk).enumerate() {
        let last = (i + 1) * chunk >= tokens.len();
        let rows: Vec<Row> = (piece.iter().enumerate())
            .map(|(n, &token)| Row { seq, token, output: last && n + 1 == piece.len() })
            .collect();
        logits = engine.run(&rows).expect("prefill").to_vec();
    }
    logits
}

/// The most likely token; the lowest of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

/// `n` greedy tokens after logits that `seq` gave.
pub fn greedy_after(engine: &mut Engine, seq: SeqId, logits: &[f32], n: usize) -> Vec<u32> {
    let mut tokens = vec![argmax(logits)];
    while tokens.len() < n {
        let last = *tokens.last().expect("at least one");
        tokens.push(argmax(engine.step(&[(seq, last)]).expect("a step")));
    }
    tokens
}

/// Largest difference against the largest magnitude of `want`.
pub fn relative_difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().all(|v| v.is_finite()), "not finite");
    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|v| f64::from(v - max).exp()).sum();
    logits.iter().map(|v| f64::from(v - max) - sum.ln()).collect()
}

/// `KL(want || got)` in nats.
pub fn kl(got: &[f32], want: &[f32]) -> f64 {
    let (p, q) = (log_softmax(want), log_softmax(got));
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Logits of every position of `tokens`, `[tokens][vocab]`.
pub fn all_logits(model: &Model, device: Device, options: &Options, tokens: &[u32]) -> Vec<f32> {
    let options = Options { max_outputs: Some(options.max_rows), ..options.clone() };
    let mut engine = engine(model, device, &options);
    let seq = engine.create().expect("a sequence");
    let mut logits = vec![];
    for chunk in tokens.chunks(options.max_rows) {
        let rows: Vec<Row> = chunk.iter().map(|&token| Row { seq, token, output: true }).collect();
        logits.extend_from_slice(engine.run(&rows).expect("a micro-batch"));
    }
    logits
}

/// A small, fixed generator (SplitMix64), so that failures repeat.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn tokens(&mut self, n: usize, vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocab) as u32).collect()
    }
}

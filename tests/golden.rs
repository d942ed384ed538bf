//! The golden ladder: tiny checkpoints of every family are converted and run, and what comes out is held against what the
//! equations give (`tests/golden/make.py`, float64): hidden state after each sub-layer, selected positions, logits, greedy text.
mod common;

use std::sync::{Arc, Mutex};

use clsa::backend::{Backend, Batch, Memory, Record, Routing, reference::Reference};
use clsa::cache::PageTables;
use clsa::engine::{Engine, Options};
use clsa::error::Result;
use common::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

/// One prompt in one routing mode.
#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    mode: String,
    /// Positions that the last prompt token selects; absent where all are seen.
    selected: Option<Vec<u32>>,
    logits: Vec<f32>,
    greedy: Vec<u32>,
    /// Residual stream of the last prompt token after each sub-layer, in order.
    ladder: Option<serde_json::Map<String, serde_json::Value>>,
}

fn golden(family: &str) -> Golden {
    let path = golden_dir(family).join("golden.json");
    let text = std::fs::read_to_string(&path).expect("golden.json");
    serde_json::from_str(&text).expect("golden.json as make.py writes it")
}

fn options(mode: &str) -> Options {
    Options { routing: Some(mode.parse().expect("a routing mode")), ..f32_options() }
}

/// Names of the rungs and the last row after each.
type Rungs = Arc<Mutex<Vec<(String, Vec<f32>)>>>;

/// The reference, noting the last row of the residual stream after each verb.
struct Noting {
    inner: Reference,
    rungs: Rungs,
}

impl Noting {
    fn note(&self, name: String) {
        let row = self.inner.hidden().last().expect("a row").clone();
        self.rungs.lock().expect("no panic while noting").push((name, row));
    }
}

impl Backend for Noting {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn memory(&self) -> Memory {
        self.inner.memory()
    }
    fn begin(&mut self, b: &Batch, t: &PageTables, r: Routing, k: usize) -> Result<Record> {
        self.inner.begin(b, t, r, k)
    }
    fn embed(&mut self) -> Result<()> {
        self.inner.embed()?;
        self.note("embed".into());
        Ok(())
    }
    fn self_attention(&mut self, layer: usize) -> Result<()> {
        self.inner.self_attention(layer)?;
        self.note(format!("attention.{layer}"));
        Ok(())
    }
    fn feed_forward(&mut self, layer: usize) -> Result<()> {
        self.inner.feed_forward(layer)?;
        self.note(format!("feed_forward.{layer}"));
        Ok(())
    }
    fn append_shared(&mut self) -> Result<()> {
        self.inner.append_shared()
    }
    fn keep_outputs(&mut self) -> Result<()> {
        self.inner.keep_outputs()
    }
    fn route(&mut self) -> Result<()> {
        self.inner.route()
    }
    fn cross_attention(&mut self, layer: usize) -> Result<()> {
        self.inner.cross_attention(layer)?;
        self.note(format!("attention.{layer}"));
        Ok(())
    }
    fn logits(&mut self) -> Result<()> {
        self.inner.logits()
    }
    fn finish(&mut self) -> Result<&[f32]> {
        self.inner.finish()
    }
    fn selection(&mut self, output: usize) -> Result<Vec<u32>> {
        self.inner.selection(output)
    }
    fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        self.inner.copy_page(from, to)
    }
    fn read_page(&mut self, page: u32, rows: usize, out: &mut Vec<u8>) -> Result<()> {
        self.inner.read_page(page, rows, out)
    }
    fn write_page(&mut self, page: u32, rows: usize, bytes: &[u8]) -> Result<()> {
        self.inner.write_page(page, rows, bytes)
    }
    fn save_window(&mut self, slot: u32, len: usize) -> Result<Vec<u8>> {
        self.inner.save_window(slot, len)
    }
    fn load_window(&mut self, slot: u32, len: usize, bytes: &[u8]) -> Result<()> {
        self.inner.load_window(slot, len, bytes)
    }
}

#[test]
fn the_reference_climbs_the_ladder() {
    for family in FAMILIES {
        let file = convert(&golden_dir(family), "F32");
        for case in golden(family).cases {
            let Some(ladder) = &case.ladder else { continue };
            let (model, options, rungs) = (file.open(), options(&case.mode), Rungs::default());
            let inner = Reference::new(model.clone(), options.cache_spec()).expect("the reference");
            let backend = Noting { inner, rungs: rungs.clone() };
            let mut engine = Engine::new(model, Box::new(backend), &options).expect("an engine");
            let seq = engine.create().expect("a sequence");
            prefill_in_chunks(&mut engine, seq, &case.prompt, case.prompt.len());
            let rungs = rungs.lock().expect("no panic while noting");
            let names: Vec<_> = rungs.iter().map(|(name, _)| name).collect();
            assert_eq!(names, ladder.keys().collect::<Vec<_>>(), "{family} {}", case.mode);
            for (name, row) in rungs.iter() {
                let want: Vec<f32> = serde_json::from_value(ladder[name].clone()).expect("floats");
                let difference = relative_difference(row, &want);
                assert!(difference <= 1e-4, "{family} {} after {name}: {difference:.1e}", case.mode);
            }
        }
    }
}

/// Logits within `tolerance`, the same selected positions, the same greedy text, for every case of every family.
fn follows_the_equations(device: Device, chunk: usize, tolerance: f32) {
    for family in FAMILIES {
        let file = convert(&golden_dir(family), "F32");
        let mut worst = 0f32;
        for case in golden(family).cases {
            let what = format!("{device:?}, {family}, {}, {} tokens", case.mode, case.prompt.len());
            let mut engine = engine(&file.open(), device, &options(&case.mode));
            let seq = engine.create().expect("a sequence");
            let logits = prefill_in_chunks(&mut engine, seq, &case.prompt, chunk);
            let difference = relative_difference(&logits, &case.logits);
            assert!(difference <= tolerance, "{what}: logits differ by {difference:.1e}");
            worst = worst.max(difference);
            let selected = engine.selection(0).expect("a selection");
            assert_eq!(selected, case.selected.unwrap_or_default(), "{what}");
            let tokens = greedy_after(&mut engine, seq, &logits, case.greedy.len());
            assert_eq!(tokens, case.greedy, "{what}");
        }
        println!("{device:?}, {family}: largest relative logit difference {worst:.1e}");
    }
}

#[test]
fn the_reference_follows_the_equations() {
    follows_the_equations(Device::Reference, 512, 1e-4);
}

#[test]
fn ggml_follows_the_equations() {
    follows_the_equations(Device::Ggml, 512, 1e-3);
}

#[test]
fn ggml_follows_the_equations_in_ragged_chunks() {
    follows_the_equations(Device::Ggml, 37, 1e-3);
}

#[test]
fn cuda_follows_the_equations() {
    if let Some(_gpu) = gpu() {
        follows_the_equations(Device::Cuda, 512, 1e-3);
    }
}

#[test]
fn cuda_follows_the_equations_in_ragged_chunks() {
    if let Some(_gpu) = gpu() {
        follows_the_equations(Device::Cuda, 37, 1e-3);
    }
}

#[test]
fn a_layer_that_repeats_the_routing_selects_the_same() {
    let file = convert(&golden_dir("yoco-clsa"), "F32");
    let gpu = gpu();
    let cuda = gpu.as_ref().map(|_| Device::Cuda);
    let devices = [Device::Reference, Device::Ggml].into_iter().chain(cuda);
    for device in devices {
        for case in golden("yoco-clsa").cases.into_iter().filter(|c| c.mode == "clsa") {
            for mode in ["per-layer", "every-2", "every-4"] {
                let mut engine = engine(&file.open(), device, &options(mode));
                let seq = engine.create().expect("a sequence");
                let logits = prefill_in_chunks(&mut engine, seq, &case.prompt, 512);
                assert_eq!(
                    Some(engine.selection(0).expect("a selection")),
                    case.selected,
                    "{device:?} {mode}"
                );
                let difference = relative_difference(&logits, &case.logits);
                assert!(difference <= 1e-3, "{device:?} {mode}: {difference:.1e}");
            }
        }
    }
}

/// Mean KL to F32 over all positions of the prompts, on the CPU backend with its default caches.
#[test]
fn quantized_weights_stay_near() {
    // Bounds for these models, whose random weights make attention sharp: about three times what is measured.
    for (mix, bound) in [("F16", 1e-4), ("Q8_0", 2e-2), ("Q4_K_M", 0.5)] {
        for family in FAMILIES {
            let (exact, rounded) = (convert(&golden_dir(family), "F32"), convert(&golden_dir(family), mix));
            let (mut sum, mut count) = (0.0, 0);
            for case in golden(family).cases.iter().filter(|c| c.mode == "dense") {
                let options = options("dense");
                let want = all_logits(&exact.open(), Device::Ggml, &options, &case.prompt);
                let got = all_logits(&rounded.open(), Device::Ggml, &options, &case.prompt);
                let vocab = case.logits.len();
                sum += got.chunks(vocab).zip(want.chunks(vocab)).map(|(g, w)| kl(g, w)).sum::<f64>();
                count += case.prompt.len();
            }
            let mean = sum / f64::from(count as u32);
            println!("{mix}, {family}: mean KL to F32 {mean:.2e} over {count} positions");
            assert!(
                (0.0..bound).contains(&mean),
                "{mix}, {family}: mean KL {mean:.2e}, expected below {bound:.0e}"
            );
        }
    }
}

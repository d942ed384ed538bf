//! A real checkpoint against goldens that another implementation made of it: `make golden CHECKPOINT=DIR`.
//!
//! DIR holds a Hugging Face style checkpoint, `golden.json` (prompts, top-20 logits and 32 greedy tokens with shared top-k routing and
//! with every position) and `golden_topk.json` (positions selected for a middle and for the last prompt token).
mod common;

use std::path::{Path, PathBuf};

use clsa::backend::Routing;
use clsa::engine::Options;
use common::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    name: String,
    token_ids: Vec<u32>,
    sparse: Answer,
    dense: Answer,
}

#[derive(Deserialize)]
struct Answer {
    top20_ids: Vec<usize>,
    top20_logits: Vec<f32>,
    greedy32: Vec<u32>,
}

#[derive(Deserialize)]
struct Selected {
    name: String,
    last_selected: Vec<u32>,
    mid_pos: usize,
    mid_selected: Vec<u32>,
}

/// The checkpoint's folder; `None`, with a note, where none is named.
fn checkpoint() -> Option<PathBuf> {
    let dir = std::env::var_os("CLSA_GOLDEN_CHECKPOINT").map(PathBuf::from);
    if dir.is_none() {
        println!("skipped: CLSA_GOLDEN_CHECKPOINT names no checkpoint (make golden CHECKPOINT=DIR sets it)");
    }
    dir
}

fn goldens(dir: &Path) -> Vec<Golden> {
    let text = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    serde_json::from_str(&text).expect("prompts with answers")
}

fn options(routing: Routing) -> Options {
    Options { routing: Some(routing), context: 8192, ..f32_options() }
}

fn answers(dir: &Path, device: Device, longest: usize) {
    let model = convert(dir, "F32").open();
    for golden in goldens(dir).iter().filter(|g| g.token_ids.len() <= longest) {
        for (routing, want) in [(Routing::Clsa, &golden.sparse), (Routing::Dense, &golden.dense)] {
            let what = format!("{device:?}, {}, {} tokens, {routing}", golden.name, golden.token_ids.len());
            let mut engine = engine(&model, device, &options(routing));
            let seq = engine.create().expect("a sequence");
            let logits = prefill_in_chunks(&mut engine, seq, &golden.token_ids, 512);
            let of_top: Vec<f32> = want.top20_ids.iter().map(|&i| logits[i]).collect();
            let difference = relative_difference(&of_top, &want.top20_logits);
            println!("{what}: largest relative logit difference {difference:.1e}");
            assert!(difference < 1e-3, "{what}: {difference:.1e}");
            assert_eq!(greedy_after(&mut engine, seq, &logits, want.greedy32.len()), want.greedy32, "{what}");
        }
    }
}

#[test]
#[ignore = "slow: needs CLSA_GOLDEN_CHECKPOINT, see make golden"]
fn ggml_gives_the_golden_answers() {
    if let Some(dir) = checkpoint() {
        answers(&dir, Device::Ggml, usize::MAX);
    }
}

#[test]
#[ignore = "slow: needs CLSA_GOLDEN_CHECKPOINT, see make golden"]
fn the_reference_gives_the_golden_answers() {
    if let Some(dir) = checkpoint() {
        answers(&dir, Device::Reference, 3000);
    }
}

#[test]
#[ignore = "slow: needs CLSA_GOLDEN_CHECKPOINT, see make golden"]
fn the_gpu_gives_the_golden_answers() {
    if let (Some(dir), Some(_gpu)) = (checkpoint(), gpu()) {
        answers(&dir, Device::Cuda, usize::MAX);
    }
}

#[test]
#[ignore = "slow: needs CLSA_GOLDEN_CHECKPOINT, see make golden"]
fn routing_selects_the_golden_positions() {
    if let Some(dir) = checkpoint() {
        selections(&dir, Device::Ggml);
    }
}

#[test]
#[ignore = "slow: needs CLSA_GOLDEN_CHECKPOINT, see make golden"]
fn routing_on_the_gpu_selects_the_golden_positions() {
    if let (Some(dir), Some(_gpu)) = (checkpoint(), gpu()) {
        selections(&dir, Device::Cuda);
    }
}

fn selections(dir: &Path, device: Device) {
    let model = convert(dir, "F32").open();
    let text = std::fs::read_to_string(dir.join("golden_topk.json")).expect("golden_topk.json");
    let selected: Vec<Selected> = serde_json::from_str(&text).expect("selected positions");
    for (golden, want) in goldens(dir).iter().zip(&selected) {
        assert_eq!(golden.name, want.name);
        let mut engine = engine(&model, device, &options(Routing::Clsa));
        let seq = engine.create().expect("a sequence");
        for (end, positions) in
            [(want.mid_pos, &want.mid_selected), (golden.token_ids.len() - 1, &want.last_selected)]
        {
            let from = engine.len(seq);
            if end + 1 > from {
                prefill_in_chunks(&mut engine, seq, &golden.token_ids[from..=end], 512);
            }
            let got = engine.selection(0).expect("a selection");
            let common = got.iter().filter(|p| positions.binary_search(p).is_ok()).count();
            println!(
                "{device:?}, {}, position {end}: {common} of {} positions",
                golden.name,
                positions.len()
            );
            assert_eq!(got.len(), positions.len(), "{}", golden.name);
            // Two orders of summation may swap positions whose scores tie within rounding.
            assert!(positions.len() - common <= positions.len() / 256, "{}: {common}", golden.name);
        }
    }
}

#[test]
#[ignore = "slow: needs CLSA_GOLDEN_CHECKPOINT, see make golden"]
fn quantized_weights_stay_near() {
    let Some(dir) = checkpoint() else { return };
    let exact = convert(&dir, "F32");
    let goldens = goldens(&dir);
    let longest = goldens.iter().max_by_key(|g| g.token_ids.len()).expect("a prompt");
    let tokens = &longest.token_ids[..longest.token_ids.len().min(1024)];
    let options = Options { max_rows: 128, context: 1024, ..Options::default() };
    let want = all_logits(&exact.open(), Device::Ggml, &options, tokens);
    for (mix, bound) in [("F16", 1e-4), ("Q8_0", 1e-2), ("Q4_K_M", 0.2)] {
        let got = all_logits(&convert(&dir, mix).open(), Device::Ggml, &options, tokens);
        let vocab = want.len() / tokens.len();
        let sum: f64 = got.chunks(vocab).zip(want.chunks(vocab)).map(|(g, w)| kl(g, w)).sum();
        let mean = sum / tokens.len() as f64;
        println!("{mix}: mean KL to F32 {mean:.2e} over {} positions", tokens.len());
        assert!((0.0..bound).contains(&mean), "{mix}: mean KL {mean:.2e}, expected below {bound:.0e}");
    }
}

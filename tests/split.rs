//! A model cut into parts gives what it gives whole: the executor carries the hidden state, the shared rows and the selection over every cut.
mod common;

use std::sync::Arc;

use clsa::backend::cuda::{Cuda, KvDevice, Share};
use clsa::backend::split::Split;
use clsa::backend::{
    Part, Routing,
    ggml::{Ggml, Repack},
    reference::Reference,
};
use clsa::engine::{Engine, Options, Row, SeqId};
use clsa::model::Model;
use common::*;

const TOLERANCE: f32 = 1e-4;

/// An engine over parts that begin at these layers.
fn cut(model: &Model, parts: &[(Device, usize)], options: &Options) -> Engine {
    let (c, spec) = (&model.config, options.cache_spec());
    let ends = parts.iter().skip(1).map(|p| p.1).chain([c.n_layer]);
    let parts = parts.iter().zip(ends).map(|(&(device, start), end)| -> Box<dyn Part> {
        let (model, layers) = (model.clone(), start..end);
        match device {
            Device::Reference => Box::new(Reference::part(model, spec, layers).expect("the reference")),
            Device::Ggml => Box::new(
                Ggml::part(model, spec, 2, Arc::default(), layers, Repack::Off).expect("the CPU backend"),
            ),
            Device::Cuda => {
                let share = Share { ordinal: 0, layers, kv: KvDevice::Gpu };
                Box::new(Cuda::part(model, spec, &share).expect("the GPU backend"))
            }
        }
    });
    let split = Split::new(parts.collect(), c, &spec).expect("parts that follow each other");
    Engine::new(model.clone(), Box::new(split), options).expect("an engine")
}

/// Every place to cut once, and some to cut twice.
fn cuts(model: &Model, a: Device, b: Device) -> Vec<Vec<(Device, usize)>> {
    let n = model.config.n_layer;
    let twice = [(1, n - 1), (1, 2), (n - 2, n - 1)].into_iter().filter(|(i, j)| 0 < *i && i < j && *j < n);
    (1..n).map(|at| vec![(a, 0), (b, at)]).chain(twice.map(|(i, j)| vec![(a, 0), (b, i), (a, j)])).collect()
}

struct Seen {
    logits: Vec<f32>,
    selected: Vec<u32>,
    text: Vec<u32>,
}

fn look(engine: &mut Engine, tokens: &[u32], chunk: usize) -> Seen {
    let seq = engine.create().expect("a sequence");
    let logits = prefill_in_chunks(engine, seq, tokens, chunk);
    let selected = engine.selection(0).expect("a selection");
    let text = greedy_after(engine, seq, &logits, 8);
    engine.free(seq);
    Seen { logits, selected, text }
}

fn parts_give_what_the_whole_gives(a: Device, b: Device) {
    for family in FAMILIES {
        let model = convert(&golden_dir(family), "F32").open();
        let modes = if family == "yoco-clsa" {
            &[Routing::Clsa, Routing::Dense, Routing::Every(1), Routing::Every(2), Routing::Block(4)][..]
        } else {
            &[Routing::Dense][..]
        };
        let tokens = Random(21).tokens(330, model.config.vocab);
        for &mode in modes {
            let options = Options { routing: Some(mode), ..f32_options() };
            let want = look(&mut engine(&model, b, &options), &tokens, 512);
            for parts in cuts(&model, a, b) {
                let mut engine = cut(&model, &parts, &options);
                for chunk in [512, 100] {
                    let what = format!("{family}, {mode}, {parts:?}, chunks of {chunk}");
                    let got = look(&mut engine, &tokens, chunk);
                    let difference = relative_difference(&got.logits, &want.logits);
                    assert!(difference < TOLERANCE, "{what}: {difference:.1e}");
                    assert_eq!(got.selected, want.selected, "{what}");
                    assert_eq!(got.text, want.text, "{what}");
                }
            }
        }
    }
}

#[test]
fn the_reference_and_the_cpu_share_a_model() {
    parts_give_what_the_whole_gives(Device::Reference, Device::Ggml);
}

#[test]
fn the_cpu_shares_a_model_with_itself() {
    parts_give_what_the_whole_gives(Device::Ggml, Device::Ggml);
}

#[test]
fn the_gpu_and_the_cpu_share_a_model() {
    if let Some(_gpu) = gpu() {
        parts_give_what_the_whole_gives(Device::Cuda, Device::Ggml);
    }
}

#[test]
fn two_ranges_on_one_gpu_share_a_model() {
    if let Some(_gpu) = gpu() {
        parts_give_what_the_whole_gives(Device::Cuda, Device::Cuda);
    }
}

/// Several sequences in one batch, a fork in the middle of a page, a saved copy, a rewind.
fn detours(a: Device, b: Device) {
    for family in FAMILIES {
        let model = convert(&golden_dir(family), "F32").open();
        let options = Options { n_seq: 4, max_rows: 64, ..f32_options() };
        let mut random = Random(22);
        let prompts: Vec<Vec<u32>> = [150, 300].map(|n| random.tokens(n, model.config.vocab)).into();
        let more = random.tokens(20, model.config.vocab);
        let mut plain = engine(&model, b, &options);
        let want: Vec<Vec<u32>> = prompts
            .iter()
            .map(|p| {
                let seq = plain.create().expect("a sequence");
                let logits = prefill_in_chunks(&mut plain, seq, p, 64);
                let text = greedy_after(&mut plain, seq, &logits, 6);
                plain.free(seq);
                text
            })
            .collect();
        for parts in cuts(&model, a, b) {
            let mut engine = cut(&model, &parts, &options);
            let seqs: Vec<SeqId> = prompts.iter().map(|_| engine.create().expect("a sequence")).collect();
            let mut tokens = vec![];
            for (&seq, prompt) in seqs.iter().zip(&prompts) {
                tokens.push((seq, argmax(&prefill_in_chunks(&mut engine, seq, prompt, 64))));
            }
            let fork = engine.fork(seqs[0]).expect("a fork");
            let mut bytes = vec![];
            engine
                .export(seqs[1], |b| {
                    bytes.extend_from_slice(b);
                    Ok(())
                })
                .expect("an export");
            let copy = engine.create().expect("a sequence");
            engine.import(copy, 300, &bytes).expect("an import");
            tokens.extend([(fork, tokens[0].1), (copy, tokens[1].1)]);
            let mut texts: Vec<Vec<u32>> = tokens.iter().map(|t| vec![t.1]).collect();
            for _ in 1..6 {
                let logits = engine.step(&tokens).expect("a step of all").to_vec();
                for ((t, text), row) in
                    tokens.iter_mut().zip(&mut texts).zip(logits.chunks(model.config.vocab))
                {
                    t.1 = argmax(row);
                    text.push(t.1);
                }
            }
            let what = format!("{family}, {parts:?}");
            assert_eq!(texts, [&want[0], &want[1], &want[0], &want[1]].map(Clone::clone), "{what}");
            // Back to the prompt's end and on with other tokens, as a fresh sequence would.
            let at = engine.rewind(copy, 280).expect("a rewind");
            let text = [&prompts[1][at..280], &more].concat();
            let got = prefill_in_chunks(&mut engine, copy, &text, 64);
            let seq = plain.create().expect("a sequence");
            let fresh = prefill_in_chunks(&mut plain, seq, &[&prompts[1][..280], &more].concat(), 64);
            plain.free(seq);
            let difference = relative_difference(&got, &fresh);
            assert!(difference < TOLERANCE, "{what} after a rewind to {at}: {difference:.1e}");
        }
    }
}

#[test]
fn detours_lead_back_with_the_reference_and_the_cpu() {
    detours(Device::Reference, Device::Ggml);
}

#[test]
fn detours_lead_back_with_the_gpu_and_the_cpu() {
    if let Some(_gpu) = gpu() {
        detours(Device::Cuda, Device::Ggml);
    }
}

#[test]
#[expect(clippy::single_range_in_vec_init, reason = "lists of parts, some of one part")]
fn parts_must_follow_each_other() {
    let model = convert(&golden_dir("yoco-clsa"), "F32").open();
    let spec = f32_options().cache_spec();
    let part = |layers| -> Box<dyn Part> {
        Box::new(Reference::part(model.clone(), spec, layers).expect("the reference"))
    };
    let n = model.config.n_layer;
    for ranges in [vec![0..1], vec![0..2, 1..n], vec![1..n], vec![0..1, 2..n]] {
        let parts = ranges.iter().cloned().map(part).collect();
        assert!(Split::new(parts, &model.config, &spec).is_err(), "{ranges:?}");
    }
}

/// Rows in the middle of a batch whose logits are wanted, beside rows whose are not.
#[test]
fn outputs_anywhere_in_a_batch_cross_the_cuts() {
    let model = convert(&golden_dir("yoco-clsa"), "F32").open();
    let options = Options { max_outputs: Some(8), ..f32_options() };
    let tokens = Random(23).tokens(60, model.config.vocab);
    let run = |engine: &mut Engine| {
        let seq = engine.create().expect("a sequence");
        let rows: Vec<Row> =
            tokens.iter().enumerate().map(|(i, &token)| Row { seq, token, output: i % 11 == 5 }).collect();
        engine.run(&rows).expect("a batch").to_vec()
    };
    let want = run(&mut engine(&model, Device::Ggml, &options));
    for parts in cuts(&model, Device::Ggml, Device::Reference) {
        let got = run(&mut cut(&model, &parts, &options));
        let difference = relative_difference(&got, &want);
        assert!(difference < TOLERANCE, "{parts:?}: {difference:.1e}");
    }
}

/// The queries come from every part with cross layers, the index queries from the first, and each part times its own layers.
#[test]
fn queries_and_stages_come_from_all_parts() {
    let model = convert(&golden_dir("yoco-clsa"), "F32").open();
    let options = f32_options();
    let tokens = Random(24).tokens(40, model.config.vocab);
    let run = |engine: &mut Engine| {
        engine.keep_queries(true).expect("queries");
        let seq = engine.create().expect("a sequence");
        prefill_in_chunks(engine, seq, &tokens, 40);
        engine.queries().expect("queries")
    };
    let want = run(&mut engine(&model, Device::Ggml, &options));
    assert!(!want.index.is_empty());
    for parts in cuts(&model, Device::Ggml, Device::Reference) {
        let mut mixed = cut(&model, &parts, &options);
        let got = run(&mut mixed);
        assert_eq!(got.layers.len(), want.layers.len(), "{parts:?}");
        let difference = relative_difference(&got.layers.concat(), &want.layers.concat());
        assert!(difference < TOLERANCE, "{parts:?}: {difference:.1e}");
        let difference = relative_difference(&got.index, &want.index);
        assert!(difference < TOLERANCE, "{parts:?}: index {difference:.1e}");
        assert!(mixed.backend_mut().set_timing(true).is_err(), "{parts:?}: the reference has no clock");
    }
    for parts in cuts(&model, Device::Ggml, Device::Ggml) {
        let mut engine = cut(&model, &parts, &options);
        engine.backend_mut().set_timing(true).expect("clocks");
        let seq = engine.create().expect("a sequence");
        prefill_in_chunks(&mut engine, seq, &tokens, 40);
        let timings = engine.backend_mut().timings().expect("timings");
        for layer in 0..model.config.n_layer {
            assert!(
                timings.iter().any(|t| t.layer == Some(layer)),
                "{parts:?}: layer {layer} of {timings:?}"
            );
        }
    }
}

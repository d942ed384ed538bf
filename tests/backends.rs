//! The backends against each other, and the engine against itself: whatever the chunks, neighbours, caches, instruction set or
//! detours (fork, rewind, export), the same tokens give the same logits.
mod common;

use std::process::Command;

use clsa::backend::ggml::{Ggml, Repack};
use clsa::backend::{Backend, Routing};
use clsa::cache::CacheType;
use clsa::engine::{Engine, Options, Row, SeqId};
use clsa::model::Model;
use common::*;
use ggml_kernels::contracts::CLSA_AMX_ROWS;
use ggml_kernels::simd::Level;

/// Two ways of summing the same f32 values: 2.4e-6 measured.
const F32_TOLERANCE: f32 = 1e-4;
/// The same, where a sum that lies between two cache values may be rounded to either: 0 measured with AVX2 and AVX-512 kernels.
const ROUNDED_TOLERANCE: f32 = 1e-2;
/// The same of quantized weights on AMX, whose products of few and of many rows round x, and of many weights too, in ways of their own:
/// 1.8e-2 measured, of random weights.
const TILES_TOLERANCE: f32 = 4e-2;

const MODES: [Routing; 6] = [
    Routing::Clsa,
    Routing::Dense,
    Routing::Every(1),
    Routing::Every(2),
    Routing::Block(4),
    Routing::Block(64),
];

fn options(routing: Option<Routing>) -> Options {
    Options { routing, ..f32_options() }
}

fn start(model: &Model, device: Device, options: &Options) -> (Engine, SeqId) {
    let mut engine = engine(model, device, options);
    let seq = engine.create().expect("a sequence");
    (engine, seq)
}

fn assert_near(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    let difference = relative_difference(got, want);
    println!("{what}: largest relative logit difference {difference:.1e}");
    assert!(difference <= tolerance, "{what}: logits differ by {difference:.1e}, allowed {tolerance:.0e}");
}

/// A model of each family with small heads, and of each preset with heads of 64.
fn f32_models() -> Vec<(&'static str, Model)> {
    let goldens = FAMILIES.map(|family| (family, convert(&golden_dir(family), "F32").open()));
    let presets = ["clsa-tiny", "yoco-tiny", "transformer-tiny"].map(|p| (p, synth(p, "F32", 0).open()));
    goldens.into_iter().chain(presets).collect()
}

#[test]
fn ggml_equals_the_reference_in_every_mode_and_chunk_size() {
    let file = convert(&golden_dir("yoco-clsa"), "F32");
    let model = file.open();
    let tokens = Random(1).tokens(530, model.config.vocab);
    for mode in MODES {
        let options = options(Some(mode));
        let (mut oracle, seq) = start(&model, Device::Reference, &options);
        let want = prefill_in_chunks(&mut oracle, seq, &tokens, 512);
        let selected = oracle.selection(0).expect("a selection");
        let text = greedy_after(&mut oracle, seq, &want, 16);
        for chunk in [1, 7, 64, 512] {
            let what = format!("{mode}, chunks of {chunk}");
            let (mut engine, seq) = start(&model, Device::Ggml, &options);
            let got = prefill_in_chunks(&mut engine, seq, &tokens, chunk);
            assert_near(&got, &want, F32_TOLERANCE, &what);
            assert_eq!(engine.selection(0).expect("a selection"), selected, "{what}");
            assert_eq!(greedy_after(&mut engine, seq, &got, 16), text, "{what}");
        }
    }
}

#[test]
fn ggml_equals_the_reference_for_every_family_type_and_k() {
    let mut random = Random(2);
    for preset in ["clsa-tiny", "yoco-tiny", "transformer-tiny"] {
        for mix in ["F32", "F16", "Q8_0", "Q4_K_M"] {
            let model = synth(preset, mix, random.next()).open();
            for (n, k) in [(1, 1), (40, 7), (300, 64), (300, 4096)] {
                let tokens = random.tokens(n, model.config.vocab);
                let options = Options { top_k: Some(k), ..options(None) };
                let (mut oracle, seq) = start(&model, Device::Reference, &options);
                let want = prefill_in_chunks(&mut oracle, seq, &tokens, 512);
                let (mut engine, seq) = start(&model, Device::Ggml, &options);
                let got = prefill_in_chunks(&mut engine, seq, &tokens, 512);
                let what = format!("{preset} {mix}, {n} tokens, k {k}");
                // The CPU's matmuls round activations to the weights' block type; the oracle does not.
                if mix == "F32" {
                    assert_near(&got, &want, F32_TOLERANCE, &what);
                } else {
                    let distance = kl(&got, &want);
                    println!("{what}: KL {distance:.1e}");
                    assert!(distance < 5e-3, "{what}: KL {distance:.1e}");
                }
            }
        }
    }
}

#[test]
fn chunks_give_the_same_text_with_rounded_caches_and_weights() {
    for (mix, cache) in [("F16", CacheType::F16), ("Q8_0", CacheType::Q8_0), ("Q4_K_M", CacheType::Q8_0)] {
        let model = synth("clsa-tiny", mix, 3).open();
        let options = Options { k: cache, v: cache, index: CacheType::F16, ..options(None) };
        let tokens = Random(3).tokens(300, model.config.vocab);
        let (mut whole, seq) = start(&model, Device::Ggml, &options);
        let want = prefill_in_chunks(&mut whole, seq, &tokens, 512);
        let text = greedy_after(&mut whole, seq, &want, 16);
        for chunk in [1, 7, 64] {
            let what = format!("{mix}, {cache:?} cache, chunks of {chunk}");
            let (mut engine, seq) = start(&model, Device::Ggml, &options);
            let got = prefill_in_chunks(&mut engine, seq, &tokens, chunk);
            // With AMX, chunks below and above so many rows take different kernels: within the tolerance, near ties may fall
            // either way.
            let one_kernel = Level::chosen() != Ok(Level::Amx) || chunk >= CLSA_AMX_ROWS as usize;
            assert_near(&got, &want, if one_kernel { ROUNDED_TOLERANCE } else { TILES_TOLERANCE }, &what);
            if one_kernel {
                assert_eq!(greedy_after(&mut engine, seq, &got, 16), text, "{what}");
            }
        }
    }
}

#[test]
fn smaller_caches_stay_near() {
    for (family, model) in f32_models() {
        let tokens = Random(4).tokens(200, model.config.vocab);
        // Every position, so that a rounded index key cannot change what is attended to.
        let want = all_logits(&model, Device::Ggml, &options(Some(Routing::Dense)), &tokens);
        for (cache, bound) in [(CacheType::F16, 1e-4), (CacheType::Q8_0, 2e-2)] {
            let options = Options { k: cache, v: cache, ..options(Some(Routing::Dense)) };
            if options.cache_spec().check(&model.config).is_err() {
                continue; // Q8_0 needs heads of whole blocks.
            }
            let got = all_logits(&model, Device::Ggml, &options, &tokens);
            let vocab = model.config.vocab;
            let sum: f64 = got.chunks(vocab).zip(want.chunks(vocab)).map(|(g, w)| kl(g, w)).sum();
            let mean = sum / tokens.len() as f64;
            println!("{family}, {cache:?} cache: mean KL to F32 {mean:.1e}");
            assert!((0.0..bound).contains(&mean), "{family}, {cache:?} cache: mean KL {mean:.1e}");
        }
    }
}

#[test]
fn sequences_in_one_batch_do_not_see_each_other() {
    for family in FAMILIES {
        let model = convert(&golden_dir(family), "F32").open();
        let mut random = Random(5);
        let prompts: Vec<Vec<u32>> = [3, 290, 41].map(|n| random.tokens(n, model.config.vocab)).into();
        let options = Options { n_seq: prompts.len(), ..options(None) };
        let mut together = engine(&model, Device::Ggml, &options);
        let seqs: Vec<SeqId> = prompts.iter().map(|_| together.create().expect("a sequence")).collect();
        // Rows of all prompts interleaved, a few of each at a time; every last one is an output.
        let mut finals: Vec<Vec<f32>> = vec![vec![]; prompts.len()];
        let mut done = vec![0; prompts.len()];
        while done.iter().zip(&prompts).any(|(d, p)| *d < p.len()) {
            let (mut rows, mut outputs) = (vec![], vec![]);
            for (i, prompt) in prompts.iter().enumerate() {
                let end = (done[i] + [1, 90, 17][i]).min(prompt.len());
                for at in done[i]..end {
                    let output = at + 1 == prompt.len();
                    rows.push(Row { seq: seqs[i], token: prompt[at], output });
                    if output {
                        outputs.push(i);
                    }
                }
                done[i] = end;
            }
            let logits = together.run(&rows).expect("a mixed batch").to_vec();
            for (i, logits) in outputs.into_iter().zip(logits.chunks(model.config.vocab)) {
                finals[i] = logits.to_vec();
            }
        }
        let mut tokens: Vec<u32> = finals.iter().map(|l| argmax(l)).collect();
        let mut texts: Vec<Vec<u32>> = tokens.iter().map(|&t| vec![t]).collect();
        for _ in 1..12 {
            let step: Vec<(SeqId, u32)> = seqs.iter().copied().zip(tokens.iter().copied()).collect();
            let logits = together.step(&step).expect("a step of all").to_vec();
            tokens = logits.chunks(model.config.vocab).map(argmax).collect();
            texts.iter_mut().zip(&tokens).for_each(|(text, &t)| text.push(t));
        }
        for (i, prompt) in prompts.iter().enumerate() {
            let what = format!("{family}, prompt of {} tokens", prompt.len());
            let (mut alone, seq) = start(&model, Device::Ggml, &options);
            let want = prefill_in_chunks(&mut alone, seq, prompt, 512);
            assert_near(&finals[i], &want, F32_TOLERANCE, &what);
            assert_eq!(texts[i], greedy_after(&mut alone, seq, &want, 12), "{what}");
        }
    }
}

/// Logits after `tokens` in an engine that did nothing else.
fn fresh(model: &Model, options: &Options, tokens: &[u32]) -> Vec<f32> {
    let (mut engine, seq) = start(model, Device::Ggml, options);
    prefill_in_chunks(&mut engine, seq, tokens, 512)
}

#[test]
fn a_fork_goes_its_own_way() {
    for family in FAMILIES {
        let model = convert(&golden_dir(family), "F32").open();
        let mut random = Random(6);
        let options = Options { n_seq: 2, ..options(None) };
        // In the middle of a page, so that it must be copied before either writes to it.
        let past = random.tokens(300, model.config.vocab);
        let (left, right) = (random.tokens(30, model.config.vocab), random.tokens(270, model.config.vocab));
        let (mut engine, a) = start(&model, Device::Ggml, &options);
        prefill_in_chunks(&mut engine, a, &past, 512);
        let b = engine.fork(a).expect("a fork");
        let got_b = prefill_in_chunks(&mut engine, b, &right, 512);
        let got_a = prefill_in_chunks(&mut engine, a, &left, 512);
        assert_near(&got_a, &fresh(&model, &options, &[past.clone(), left].concat()), F32_TOLERANCE, family);
        assert_near(&got_b, &fresh(&model, &options, &[past, right].concat()), F32_TOLERANCE, family);
        let free = engine.free_pages();
        engine.free(b);
        engine.free(a);
        assert!(engine.free_pages() > free, "{family}: ended sequences give their pages back");
        assert_eq!(engine.free_pages(), options.cache_spec().n_pages, "{family}: every page is free again");
    }
}

#[test]
fn a_rewound_sequence_is_as_if_the_rest_had_not_been() {
    for family in FAMILIES {
        let model = convert(&golden_dir(family), "F32").open();
        let mut random = Random(7);
        let options = Options { max_rows: 64, ..options(None) };
        let tokens = random.tokens(700, model.config.vocab);
        let other = random.tokens(20, model.config.vocab);
        for checkpoints in [&[][..], &[130, 520][..]] {
            for to in [699, 690, 600, 520, 257, 256, 130, 5, 0] {
                let (mut engine, seq) = start(&model, Device::Ggml, &options);
                for chunk in tokens.chunks(10) {
                    prefill_in_chunks(&mut engine, seq, chunk, 10);
                    if checkpoints.contains(&engine.len(seq)) {
                        engine.checkpoint(seq).expect("a checkpoint");
                    }
                }
                let at = engine.rewind(seq, to).expect("a rewind");
                let what = format!("{family}, checkpoints {checkpoints:?}, to {to}, found at {at}");
                assert!(at <= to, "{what}");
                assert_eq!(engine.len(seq), at, "{what}");
                let nearest = checkpoints.iter().copied().filter(|c| *c <= to).max().unwrap_or(0);
                assert!(at >= nearest, "{what}: a checkpoint was nearer");
                let again = [&tokens[at..to], &other[..]].concat();
                let got = prefill_in_chunks(&mut engine, seq, &again, 64);
                let want = fresh(&model, &options_512(&options), &[&tokens[..to], &other[..]].concat());
                assert_near(&got, &want, F32_TOLERANCE, &what);
            }
        }
    }
}

fn options_512(options: &Options) -> Options {
    Options { max_rows: 512, ..options.clone() }
}

#[test]
fn a_prompt_leaves_checkpoints_on_its_way() {
    let file = convert(&golden_dir("yoco-clsa"), "Q4_K_M");
    checkpoints_on_the_way(&file.open(), Device::Ggml, &options(None));
}

#[test]
fn an_exported_sequence_lives_on_in_another_engine() {
    for (family, model) in f32_models() {
        for cache in [CacheType::F32, CacheType::F16, CacheType::Q8_0] {
            let index = if cache == CacheType::F32 { CacheType::F32 } else { CacheType::F16 };
            let options = Options { k: cache, v: cache, index, n_seq: 2, ..options(None) };
            if options.cache_spec().check(&model.config).is_err() {
                continue; // Q8_0 needs heads of whole blocks.
            }
            for n in [1, 12, 256, 300] {
                let tokens = Random(8).tokens(n, model.config.vocab);
                let (mut engine_a, seq_a) = start(&model, Device::Ggml, &options);
                let logits = prefill_in_chunks(&mut engine_a, seq_a, &tokens, 64);
                let mut bytes = vec![];
                let push = |piece: &[u8]| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                };
                engine_a.export(seq_a, push).expect("an export");
                let (row, window) = engine_a.export_sizes(n);
                assert_eq!(bytes.len(), n * row + window, "{family} {cache:?} {n}");
                let want = greedy_after(&mut engine_a, seq_a, &logits, 12);
                let (mut engine_b, _other) = start(&model, Device::Ggml, &options);
                let seq_b = engine_b.create().expect("a second sequence");
                assert!(engine_b.import(seq_b, n, &bytes[1..]).is_err(), "a byte is missing");
                assert!(engine_b.is_empty(seq_b), "{family}: a refused import leaves nothing");
                engine_b.import(seq_b, n, &bytes).expect("an import");
                let got = greedy_after(&mut engine_b, seq_b, &logits, 12);
                assert_eq!(got, want, "{family} {cache:?} {n}");
            }
        }
    }
}

#[test]
fn repacked_weights_give_the_same_bits() {
    let model = synth("clsa-tiny", "Q4_K_M", 3).open();
    let tokens = Random(3).tokens(100, model.config.vocab);
    let options = f32_options();
    let [(rows, plain), (groups, repacked)] = [Repack::Off, Repack::On].map(|repack| {
        let stop = std::sync::Arc::default();
        let layers = 0..model.config.n_layer;
        let backend =
            Ggml::part(model.clone(), options.cache_spec(), 2, stop, layers, repack).expect("a backend");
        let held = backend.memory().repacked;
        let mut engine = Engine::new(model.clone(), Box::new(backend), &options).expect("an engine");
        let seq = engine.create().expect("a sequence");
        // Many rows, few, and one.
        let mut logits = prefill_in_chunks(&mut engine, seq, &tokens[..95], 64);
        logits.extend(prefill_in_chunks(&mut engine, seq, &tokens[95..99], 4));
        logits.extend(prefill_in_chunks(&mut engine, seq, &tokens[99..], 1));
        (held, logits)
    });
    assert_eq!(plain, repacked);
    assert!(groups > rows + 100_000, "{groups} bytes of copies, {rows} without");
}

#[test]
fn heads_that_q8_0_cannot_hold_are_refused() {
    let model = convert(&golden_dir("yoco-clsa"), "F32").open();
    let options = Options { k: CacheType::Q8_0, v: CacheType::Q8_0, ..Options::default() };
    let stop = std::sync::Arc::default();
    let Err(error) = clsa::backend::ggml::Ggml::new(model, options.cache_spec(), 1, stop) else {
        panic!("heads of 16 are not whole blocks of 32");
    };
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("--cache-type-k f16"), "{error}");
}

#[test]
fn the_caches_are_bounded_and_say_so() {
    let model = convert(&golden_dir("yoco-clsa"), "F32").open();
    let options = Options { context: 300, ..options(None) };
    let (mut engine, seq) = start(&model, Device::Ggml, &options);
    let tokens = Random(9).tokens(301, model.config.vocab);
    let error = engine.prefill(seq, &tokens, |_| std::ops::ControlFlow::Continue(())).expect_err("too long");
    let message = error.to_string();
    assert!(message.contains("301") && message.contains("300"), "{message}");
    assert_eq!(error.exit_code(), 2);
    assert!(engine.is_empty(seq), "nothing was done");
    let outside = engine.run(&[Row { seq, token: model.config.vocab as u32, output: true }]);
    assert!(outside.expect_err("outside the vocabulary").to_string().contains("vocabulary"));
    prefill_in_chunks(&mut engine, seq, &tokens[..300], 512);
    assert!(engine.step(&[(seq, 1)]).is_err(), "the context is full");
    assert!(engine.create().is_err(), "one sequence only");
}

/// Run by [`every_simd_level_equals_the_reference`] in a process of its own for each level.
#[test]
fn the_chosen_simd_level_equals_the_reference() {
    for (mix, cache) in [("F32", CacheType::F32), ("F16", CacheType::F16), ("Q8_0", CacheType::Q8_0)] {
        let model = synth("clsa-tiny", mix, 10).open();
        let tokens = Random(10).tokens(600, model.config.vocab);
        let (mut oracle, seq) = start(&model, Device::Reference, &options(None));
        let want = prefill_in_chunks(&mut oracle, seq, &tokens, 512);
        let options = Options { k: cache, v: cache, index: cache_of_index(cache), ..options(None) };
        let (mut engine, seq) = start(&model, Device::Ggml, &options);
        if let Ok(level) = std::env::var("CLSA_SIMD") {
            let said = engine.backend().describe();
            assert!(said.to_lowercase().contains(&level), "asked for {level}, runs on {said}");
        }
        let got = prefill_in_chunks(&mut engine, seq, &tokens, 100);
        let distance = kl(&got, &want);
        println!("{mix}, {cache:?} cache: KL to the reference {distance:.1e}");
        assert!(distance < if cache == CacheType::F32 { 1e-12 } else { 1e-6 }, "{mix}: KL {distance:.1e}");
        if cache == CacheType::F32 {
            assert_near(&got, &want, F32_TOLERANCE, mix);
        }
    }
}

fn cache_of_index(cache: CacheType) -> CacheType {
    if cache == CacheType::F32 { CacheType::F32 } else { CacheType::F16 }
}

#[test]
fn every_simd_level_equals_the_reference() {
    let this = std::env::current_exe().expect("the path of this test");
    for level in Level::ALL.into_iter().filter(|l| l.available()) {
        let name = format!("{level}").to_lowercase();
        let out = Command::new(&this)
            .args(["--exact", "the_chosen_simd_level_equals_the_reference", "--nocapture"])
            .env("CLSA_SIMD", &name)
            .output()
            .expect("this test runs itself");
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{name}: {said}{}", String::from_utf8_lossy(&out.stderr));
        assert!(said.contains("1 passed"), "{name}: {said}");
        println!("{name}: {}", said.lines().filter(|l| l.contains("KL")).collect::<Vec<_>>().join("; "));
    }
}

//! The GPU backend against the CPU's on the same blocks, and against itself: chunks, batches, pages, windows. Skipped without a GPU.
mod common;

use clsa::backend::Routing;
use clsa::engine::{Engine, Options, Row, SeqId};
use common::*;

/// Attention over all positions: a routed selection may turn on the last bit of a score (the golden tests compare selections in f32).
fn f16_options() -> Options {
    Options { context: 1024, routing: Some(Routing::Dense), ..Options::default() }
}

/// Prompt of the longest golden-like length: past the window and past k.
fn prompt(engine: &Engine, n: usize, seed: u64) -> Vec<u32> {
    Random(seed).tokens(n, engine.model().config.vocab)
}

#[test]
fn quantized_weights_give_the_cpus_distribution() {
    let Some(_gpu) = gpu() else { return };
    // The CPU rounds activations to 8 bits for quantized weights; the GPU does not. Q8_0's own distance to F32 bounds the difference.
    for (mix, bound) in [("F32", 1e-6), ("F16", 1e-4), ("Q8_0", 2e-2), ("Q4_K_M", 5e-2), ("Q5_0", 2e-2)] {
        for family in FAMILIES {
            let file = convert(&golden_dir(family), mix);
            let options = if mix == "F32" {
                Options { routing: Some(Routing::Dense), ..f32_options() }
            } else {
                f16_options()
            };
            let tokens = prompt(&engine(&file.open(), Device::Ggml, &options), 150, 3);
            let want = all_logits(&file.open(), Device::Ggml, &options, &tokens);
            let got = all_logits(&file.open(), Device::Cuda, &options, &tokens);
            let vocab = want.len() / tokens.len();
            let pairs = got.chunks(vocab).zip(want.chunks(vocab));
            let mean = pairs.map(|(g, w)| kl(g, w)).sum::<f64>() / tokens.len() as f64;
            println!("{mix}, {family}: mean KL to the CPU {mean:.2e}");
            assert!(
                (-1e-9..bound).contains(&mean),
                "{mix}, {family}: mean KL {mean:.2e}, at most {bound:.0e}"
            );
        }
    }
}

#[test]
fn chunks_of_any_size_give_the_same_logits() {
    let Some(_gpu) = gpu() else { return };
    for family in FAMILIES {
        for mix in ["F16", "Q4_K_M"] {
            let file = convert(&golden_dir(family), mix);
            let mut whole = vec![];
            for chunk in [300, 100, 64, 7, 1] {
                let mut engine = engine(&file.open(), Device::Cuda, &f16_options());
                let tokens = prompt(&engine, 300, 5);
                let seq = engine.create().expect("a sequence");
                let logits = prefill_in_chunks(&mut engine, seq, &tokens, chunk);
                if whole.is_empty() {
                    whole.clone_from(&logits);
                }
                let difference = relative_difference(&logits, &whole);
                assert!(difference < 3e-2, "{family} {mix} in chunks of {chunk}: {difference:.1e}");
            }
        }
    }
}

/// Three sequences of different lengths.
fn several(engine: &mut Engine) -> Vec<(SeqId, u32)> {
    (0..3)
        .map(|i| {
            let tokens = prompt(engine, 90 + 70 * i, i as u64);
            let seq = engine.create().expect("a sequence");
            let logits = prefill_in_chunks(engine, seq, &tokens, 512);
            (seq, argmax(&logits))
        })
        .collect()
}

#[test]
fn sequences_decoded_together_are_decoded_as_alone() {
    let Some(_gpu) = gpu() else { return };
    for family in FAMILIES {
        let file = convert(&golden_dir(family), "F16");
        let options = Options { n_seq: 3, ..f16_options() };
        let (mut together, mut alone) =
            (engine(&file.open(), Device::Cuda, &options), engine(&file.open(), Device::Cuda, &options));
        let (mut a, mut b) = (several(&mut together), several(&mut alone));
        for step in 0..8 {
            let logits = together.step(&a).expect("a step").to_vec();
            let vocab = logits.len() / 3;
            for (i, ((_, token), (seq, own))) in a.iter_mut().zip(&mut b).enumerate() {
                let want = alone.step(&[(*seq, *own)]).expect("a step").to_vec();
                let difference = relative_difference(&logits[i * vocab..][..vocab], &want);
                assert!(difference < 2e-2, "{family}, step {step}, sequence {i}: {difference:.1e}");
                (*token, *own) = (argmax(&want), argmax(&want));
            }
        }
    }
}

#[test]
fn a_fork_and_a_saved_copy_go_on_as_the_original() {
    let Some(_gpu) = gpu() else { return };
    for family in FAMILIES {
        let file = convert(&golden_dir(family), "F16");
        let options = Options { n_seq: 3, ..f16_options() };
        let mut engine = engine(&file.open(), Device::Cuda, &options);
        let first = engine.create().expect("a sequence");
        let tokens = prompt(&engine, 333, 9);
        let logits = prefill_in_chunks(&mut engine, first, &tokens, 128);
        let fork = engine.fork(first).expect("a fork");
        let mut bytes = vec![];
        let write = |b: &[u8]| {
            bytes.extend_from_slice(b);
            Ok(())
        };
        engine.export(first, write).expect("an export");
        let copy = engine.create().expect("a sequence");
        engine.import(copy, tokens.len(), &bytes).expect("an import");
        let [a, b, c] = [first, fork, copy].map(|seq| greedy_after(&mut engine, seq, &logits, 12));
        assert_eq!(a, b, "{family}: fork");
        assert_eq!(a, c, "{family}: copy");
    }
}

#[test]
fn the_same_prompt_gives_the_same_logits_every_time() {
    let Some(_gpu) = gpu() else { return };
    let file = convert(&golden_dir("yoco-clsa"), "Q4_K_M");
    let mut engine = engine(&file.open(), Device::Cuda, &f16_options());
    let tokens = prompt(&engine, 400, 11);
    let mut first = vec![];
    for _ in 0..5 {
        let seq = engine.create().expect("a sequence");
        let rows: Vec<Row> = tokens
            .iter()
            .enumerate()
            .map(|(i, &token)| Row { seq, token, output: i + 1 == tokens.len() })
            .collect();
        let mut logits = engine.run(&rows).expect("prefill").to_vec();
        for _ in 0..4 {
            logits = engine.step(&[(seq, argmax(&logits))]).expect("a step").to_vec();
        }
        if first.is_empty() {
            first.clone_from(&logits);
        }
        assert!(first.iter().zip(&logits).all(|(a, b)| a.to_bits() == b.to_bits()), "a run differs");
        engine.free(seq);
    }
}

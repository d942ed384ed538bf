//! Evaluations against direct computations, on tiny models.
mod common;

use std::ops::ControlFlow;

use clsa::backend::Routing;
use clsa::engine::{Engine, Options, Row};
use clsa::eval::consistency;
use clsa::eval::coverage::{Coverage, Plan, measure};
use clsa::eval::ruler::{Prompter, Sources, Spec, Task, answers, sample};
use clsa::tokenizer::Tokenizer;
use common::*;

fn options(model: &clsa::model::Model) -> Options {
    let routing = Some(if model.config.indexer.is_some() { Routing::Clsa } else { Routing::Dense });
    Options { context: 512, max_rows: 32, max_outputs: Some(32), routing, ..f32_options() }
}

fn carry_on(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn backends_hand_out_the_same_queries() {
    for family in ["yoco-clsa", "yoco-dense", "unilm"] {
        let model = convert(&golden_dir(family), "F32").open();
        let c = model.config.clone();
        let tokens = Random(3).tokens(20, c.vocab);
        let of = |device| {
            let mut engine = engine(&model, device, &options(&model));
            let seq = engine.create().expect("a sequence");
            let rows: Vec<Row> =
                (tokens.iter().enumerate()).map(|(i, &token)| Row { seq, token, output: i >= 15 }).collect();
            engine.run(&rows).expect("a batch");
            let before = engine.queries().expect("queries");
            assert!(before.layers.is_empty(), "{family}: none were asked for");
            engine.rewind(seq, 10).expect("a rewind");
            engine.keep_queries(true).expect("a backend with queries");
            engine.run(&rows[10..]).expect("a batch");
            (engine.queries().expect("queries"), engine.shared_keys(seq, 3).expect("keys"))
        };
        let ((reference, (keys, index)), (ggml, (ggml_keys, _))) = (of(Device::Reference), of(Device::Ggml));
        assert_eq!(reference.layers.len(), c.n_layer - c.n_self, "{family}");
        for (a, b) in ggml.layers.iter().zip(&reference.layers) {
            assert_eq!(b.len(), 5 * c.cross_heads.q_width(), "{family}: five output rows");
            let difference = relative_difference(a, b);
            assert!(difference < 1e-4, "{family}: {difference:.1e}");
        }
        let width = c.indexer.map_or(0, |ix| ix.head_dim);
        assert_eq!((reference.index.len(), index.len()), (5 * width, 17 * width), "{family}");
        if width > 0 {
            assert!(relative_difference(&ggml.index, &reference.index) < 1e-4, "{family}");
        }
        assert_eq!(keys.len(), 17 * c.cross_heads.kv_width(), "{family}: positions 3 to 19");
        assert!(relative_difference(&ggml_keys, &keys) < 1e-4, "{family}");
    }
}

/// Share of the attention mass of the row at `p` that the engine's own selection of `k` holds, `[layer][head]`, in f64 and from scratch.
fn direct(engine: &mut Engine, tokens: &[u32], p: usize, k: usize, routing: Routing) -> Vec<Vec<f64>> {
    let c = engine.model().config.clone();
    let seq = engine.create().expect("a sequence");
    // The selection does not depend on what the cross layers do, the queries do.
    engine.set_routing(routing, k).expect("a routing mode");
    prefill_in_chunks(engine, seq, &tokens[..=p], 16);
    let selected = engine.selection(0).expect("a selection");
    engine.free(seq);
    let seq = engine.create().expect("a sequence");
    engine.set_routing(Routing::Dense, k).expect("dense");
    engine.keep_queries(true).expect("queries");
    prefill_in_chunks(engine, seq, &tokens[..=p], 16);
    let (queries, (keys, _)) =
        (engine.queries().expect("queries"), engine.shared_keys(seq, 0).expect("keys"));
    engine.free(seq);
    let (heads, d) = (c.cross_heads, c.cross_heads.head_dim);
    let group = heads.n_head / heads.n_kv;
    let of_head = |q: &[f32], h: usize| {
        let score = |s: usize| {
            let key = &keys[s * heads.kv_width() + h / group * d..][..d];
            let dot: f64 = key.iter().zip(&q[h * d..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            (dot / (d as f64).sqrt()).exp()
        };
        let all: f64 = (0..=p).map(score).sum();
        selected.iter().map(|s| score(*s as usize)).sum::<f64>() / all
    };
    queries.layers.iter().map(|q| (0..heads.n_head).map(|h| of_head(q, h)).collect()).collect()
}

fn check_against_direct(device: Device) {
    let model = synth("clsa-tiny", "F32", 7).open();
    let c = model.config.clone();
    let tokens = Random(11).tokens(120, c.vocab);
    let modes = vec![Routing::Clsa, Routing::Block(8)];
    let plan = Plan { modes: modes.clone(), ks: vec![8, 24], main: 0, len: 120, rows: 3 };
    let mut engine = engine(&model, device, &options(&model));
    engine.set_routing(Routing::Dense, 8).expect("dense");
    let found = measure(&mut engine, &tokens, &plan, carry_on).expect("a measurement");
    let heads = c.cross_heads.n_head;
    for (m, mode) in modes.iter().enumerate() {
        for (i, k) in plan.ks.iter().enumerate() {
            let rows: Vec<_> =
                plan.positions().iter().map(|p| direct(&mut engine, &tokens, *p, *k, *mode)).collect();
            for (l, layer) in found.modes[m].by_head[i].iter().enumerate() {
                for (h, got) in layer.iter().enumerate() {
                    let want = rows.iter().map(|r| r[l][h]).sum::<f64>() / rows.len() as f64;
                    assert!(
                        (got.mean() - want).abs() < 1e-4,
                        "{mode} k {k} layer {l} head {h}: {got:?} {want}"
                    );
                }
            }
            let all: f64 =
                rows.iter().flatten().flatten().sum::<f64>() / (rows.len() * rows[0].len() * heads) as f64;
            assert!((found.modes[m].all[i].mean() - all).abs() < 1e-4, "{mode} k {k}");
        }
    }
    for (i, k) in plan.ks.iter().enumerate() {
        let (mode, best) = (&found.modes[0], (found.best_shared[i].mean(), found.best_own[i].mean()));
        assert!(
            mode.all[i].mean() <= best.0 + 1e-6 && best.0 <= best.1 + 1e-6 && best.1 < 1.0,
            "k {k}: {best:?}"
        );
        assert!(mode.recall[i].iter().all(|r| (0.0..1.0).contains(&r.mean())), "k {k}: {:?}", mode.recall[i]);
        assert_eq!(mode.neighbours[i].count(), 3);
    }
    for (l, row) in found.layers.iter().enumerate() {
        assert_eq!(row[l].mean(), 1.0, "a layer agrees with itself");
        assert!(row.iter().enumerate().all(|(other, m)| m.mean() == found.layers[other][l].mean()));
    }
}

#[test]
fn coverage_is_what_a_direct_computation_gives_on_the_reference() {
    check_against_direct(Device::Reference);
}

#[test]
fn coverage_is_what_a_direct_computation_gives_on_the_cpu() {
    check_against_direct(Device::Ggml);
}

#[test]
fn everything_is_covered_by_every_position() {
    let model = synth("clsa-tiny", "Q8_0", 5).open();
    let tokens = Random(1).tokens(96, model.config.vocab);
    let plan =
        Plan { modes: vec![Routing::Clsa, Routing::Dense], ks: vec![4, 96, 1000], main: 1, len: 96, rows: 8 };
    let mut engine = engine(&model, Device::Ggml, &options(&model));
    let Coverage { modes, best_own, .. } =
        measure(&mut engine, &tokens, &plan, carry_on).expect("a measurement");
    let [clsa, dense] = &modes[..] else { panic!("two modes") };
    let whole = |m: &clsa::eval::Mean| (m.mean() - 1.0).abs() < 1e-6;
    assert!(dense.all.iter().all(whole), "dense routing selects every position: {:?}", dense.all);
    assert!(clsa.all[1..].iter().chain(&best_own[1..]).all(whole), "k of all positions selects them all");
    assert!(clsa.all[0].mean() < 0.9, "{:?}", clsa.all[0]);
    assert_eq!((clsa.beyond[0].count(), clsa.beyond[1].count()), (8, 0), "no row has more than 96 positions");
}

#[test]
fn models_without_an_indexer_have_no_coverage() {
    let model = convert(&golden_dir("yoco-dense"), "F32").open();
    let plan = Plan { modes: vec![Routing::Clsa], ks: vec![4], main: 0, len: 8, rows: 1 };
    let mut engine = engine(&model, Device::Ggml, &options(&model));
    let error = measure(&mut engine, &[0; 8], &plan, carry_on).expect_err("no indexer").to_string();
    assert!(error.contains("indexer"), "{error}");
}

#[test]
fn samples_fit_by_the_tokenizer_of_the_model() {
    let model = convert(&golden_dir("yoco-clsa"), "F32").open();
    let tokenizer = Tokenizer::from_gguf(&model.file).expect("a tokenizer");
    let prompter = Prompter { tokenizer: &tokenizer, template: None };
    let own = Task::ALL.into_iter().filter(|t| !matches!(t, Task::Qa1 | Task::Qa2)).map(Spec::Task);
    for spec in own.chain([Spec::Needle { depth: 0.3 }]) {
        for budget in [4096, 16_384] {
            let count = |s: &_| prompter.tokens(s).map(|t| t.len());
            let s = sample(spec, budget, 0, 1, &Sources::default(), count).expect("a sample");
            let tokens = prompter.tokens(&s).expect("tokens");
            let all = tokens.len() + spec.answer_tokens();
            assert!(all <= budget && all * 100 >= budget * 93, "{spec:?}: {all} of {budget}");
            let text = tokenizer.decode(&tokens, true).expect("a text");
            assert!(s.answers.iter().all(|a| text.contains(a)), "{spec:?}: nothing is cut off");
        }
    }
}

#[test]
fn answers_in_several_modes_are_those_of_each_mode_alone() {
    let model = synth("clsa-tiny", "F32", 3).open();
    let tokenizer = Tokenizer::from_gguf(&model.file).expect("a tokenizer");
    let prompt = Random(4).tokens(150, model.config.vocab);
    let modes = [(Routing::Clsa, 8), (Routing::Dense, 8), (Routing::Block(4), 16), (Routing::Clsa, 8)];
    let mut engine = engine(&model, Device::Ggml, &options(&model));
    let together = answers(&mut engine, &prompt, &modes, 40, &tokenizer, carry_on).expect("answers");
    assert_eq!(together[0], together[3]);
    for (mode, got) in modes.iter().zip(&together) {
        let alone = answers(&mut engine, &prompt, &[*mode], 40, &tokenizer, carry_on).expect("an answer");
        assert_eq!(&alone[0], got, "{mode:?}");
        // And without rewinding.
        engine.set_routing(mode.0, mode.1).expect("a mode");
        let seq = engine.create().expect("a sequence");
        let logits = prefill_in_chunks(&mut engine, seq, &prompt, 32);
        let mut tokens = greedy_after(&mut engine, seq, &logits, 40);
        engine.free(seq);
        let end = tokens.iter().position(|t| tokenizer.is_stop(*t)).unwrap_or(tokens.len());
        tokens.truncate(end);
        assert_eq!(
            (got.tokens, &got.text),
            (end, &tokenizer.decode(&tokens, false).expect("a text")),
            "{mode:?}"
        );
    }
}

#[test]
fn every_way_to_run_a_prompt_agrees() {
    let model = synth("clsa-tiny", "Q8_0", 3).open();
    let prompts: Vec<Vec<u32>> = [3, 40, 150].map(|n| Random(n as u64).tokens(n, model.config.vocab)).into();
    for device in [Device::Reference, Device::Ggml] {
        let on = |n_seq, max_rows| {
            let options = Options { n_seq, max_rows, max_outputs: None, ..options(&model) };
            engine(&model, device, &options)
        };
        let traces = consistency::baseline(&mut on(1, 64), &prompts, 8).expect("a baseline");
        let dir = tempfile::tempdir().expect("a folder");
        let all = [
            ("alone", consistency::alone(&mut on(1, 64), &traces)),
            ("chunks of 7", consistency::alone(&mut on(1, 7), &traces)),
            ("two", consistency::together(&mut on(2, 64), &traces)),
            ("three", consistency::together(&mut on(3, 16), &traces)),
            ("forked", consistency::forked(&mut on(2, 64), &traces)),
            ("restored", consistency::restored(|| Ok(on(1, 64)), dir.path(), &traces)),
        ];
        for (name, found) in all {
            let found = found.expect(name);
            assert_eq!((found.tokens, found.same), (24, 24), "{device:?} {name}: {found:?}");
            // The reference adds in one order whatever the batch is.
            let most = if device == Device::Reference { 0.0 } else { 1e-2 };
            assert!(found.within(most), "{device:?} {name}: {found:?}");
        }
        let other = synth("clsa-tiny", "Q8_0", 4).open();
        let mut other = engine(&other, device, &options(&model));
        let found = consistency::alone(&mut other, &traces).expect("another model");
        assert!(!found.within(0.1) && found.same < 24 && found.first_difference.is_some(), "{found:?}");
    }
}

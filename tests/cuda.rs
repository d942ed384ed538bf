//! The GPU backend against the CPU's on the same blocks, and against itself: chunks, batches, pages, windows. Skipped without a GPU.
mod common;

use std::ops::ControlFlow;
use std::sync::Arc;

use clsa::backend::Routing;
use clsa::backend::cuda::{Cuda, KvDevice, Share};
use clsa::backend::open::{self, Wanted, open};
use clsa::engine::{Engine, Options, Row, SeqId};
use clsa::error::Error;
use clsa::model::Model;
use clsa::placement::GpuLayers;
use clsa::sampler::Draw;
use common::*;

/// Attention over all positions: a routed selection may turn on the last bit of a score (the golden tests compare selections in f32).
fn f16_options() -> Options {
    Options { context: 1024, routing: Some(Routing::Dense), ..Options::default() }
}

/// Prompt of the longest golden-like length: past the window and past k.
fn prompt(engine: &Engine, n: usize, seed: u64) -> Vec<u32> {
    Random(seed).tokens(n, engine.model().config.vocab)
}

/// Mean KL over all positions.
fn mean_kl(got: &[f32], want: &[f32], vocab: usize) -> f64 {
    let pairs = got.chunks(vocab).zip(want.chunks(vocab));
    pairs.map(|(g, w)| kl(g, w)).sum::<f64>() / (want.len() / vocab) as f64
}

/// The oracle expands the same blocks and rounds nothing else; the GPU rounds activations to f16, the CPU, for quantized weights, to 8 bits.
#[test]
fn quantized_weights_give_the_distribution_of_their_blocks() {
    let Some(_gpu) = gpu() else { return };
    let mixes = [
        "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "Q4_K_M", "Q3_K_M", "Q2_K",
        "IQ4_NL", "IQ4_XS",
    ];
    for mix in mixes {
        for family in FAMILIES {
            let model = convert(&golden_dir(family), mix).open();
            let options = Options { routing: Some(Routing::Dense), ..f32_options() };
            let vocab = model.config.vocab;
            let tokens = Random(3).tokens(150, vocab);
            let want = all_logits(&model, Device::Reference, &options, &tokens);
            let [gpu, cpu] = [Device::Cuda, Device::Ggml]
                .map(|device| mean_kl(&all_logits(&model, device, &options, &tokens), &want, vocab));
            println!("{mix}, {family}: mean KL to exact activations: GPU {gpu:.2e}, CPU {cpu:.2e}");
            let bound = if mix == "F32" { 1e-6 } else { 1e-4 };
            assert!((-1e-9..bound).contains(&gpu), "{mix}, {family}: {gpu:.2e}, at most {bound:.0e}");
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

/// Tokens drawn on the GPU are those that the host draws from its logits, for the same random number.
#[test]
fn tokens_drawn_on_the_gpu_are_the_hosts() {
    let Some(_gpu) = gpu() else { return };
    let file = synth("clsa-tiny", "Q8_0", 4);
    let options = Options { n_seq: 6, ..f16_options() };
    let mut engine = engine(&file.open(), Device::Cuda, &options);
    let mut random = Random(31);
    // Twins: one of each pair gives its logits, the other a token.
    let twins: Vec<(SeqId, SeqId)> = (0..3)
        .map(|i| {
            let (a, tokens) = (engine.create().expect("a sequence"), prompt(&engine, 20 + i, i as u64));
            prefill_in_chunks(&mut engine, a, &tokens, 64);
            (a, engine.fork(a).expect("a fork"))
        })
        .collect();
    let mut next = [1, 2, 3];
    for step in 0..120 {
        let draws: Vec<Draw> = (0..3)
            .map(|i| {
                let at = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
                let of = |temperature, top_k, top_p, min_p| Draw { temperature, top_k, top_p, min_p, at };
                match (step + i) % 5 {
                    0 => Draw::GREEDY,
                    1 => of(0.8, 40, 0.95, 0.05),
                    2 => of(1.0, 0, 1.0, 0.0),
                    3 => of(1.5, 0, 0.9, 0.01),
                    _ => of(0.7, 500, 0.99, 0.0),
                }
            })
            .collect();
        let row = |seq, token| Row { seq, token, output: true };
        let plain: Vec<Row> = twins.iter().zip(next).map(|(t, token)| row(t.0, token)).collect();
        let drawn: Vec<Row> = twins.iter().zip(next).map(|(t, token)| row(t.1, token)).collect();
        let logits = engine.run(&plain).expect("a step").to_vec();
        let got = engine.run_drawn(&drawn, &draws).expect("a step");
        let vocab = logits.len() / 3;
        for (i, draw) in draws.iter().enumerate() {
            let want = draw.take(&logits[i * vocab..][..vocab]).expect("a token");
            assert_eq!(got[i], want, "step {step}, {draw:?}");
            next[i] = want;
        }
    }
}

#[test]
fn engines_in_several_threads_do_not_disturb_each_other() {
    let Some(_gpu) = gpu() else { return };
    let file = convert(&golden_dir("yoco-clsa"), "Q4_K_M");
    let model = file.open();
    let work = || {
        let mut engine = engine(&model, Device::Cuda, &Options { n_seq: 2, ..f16_options() });
        let (a, b) = (engine.create().expect("a sequence"), engine.create().expect("a sequence"));
        let tokens = prompt(&engine, 200, 17);
        // Recordings of many shapes, and a prompt that is not recorded.
        let mut all = prefill_in_chunks(&mut engine, a, &tokens, 100);
        for (i, piece) in tokens.chunks(9).enumerate() {
            prefill_in_chunks(&mut engine, b, &piece[..(i % 7 + 1).min(piece.len())], 9);
        }
        for token in 0..20 {
            all.extend_from_slice(engine.step(&[(a, token)]).expect("a step"));
        }
        all
    };
    let want = work();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    (0..6).all(|_| work().iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()))
                })
            })
            .collect();
        for thread in threads {
            assert!(thread.join().expect("no panic"), "an engine gave other logits beside others than alone");
        }
    });
}

/// Of a last micro-batch that is recorded (few rows), and of one that is not.
#[test]
fn a_prompt_leaves_checkpoints_on_its_way() {
    let Some(_gpu) = gpu() else { return };
    let file = convert(&golden_dir("yoco-clsa"), "Q4_K_M");
    checkpoints_on_the_way(&file.open(), Device::Cuda, &f16_options());
}

#[test]
fn keys_and_values_on_the_host_change_nothing() {
    let Some(_gpu) = gpu() else { return };
    for family in FAMILIES {
        let model = convert(&golden_dir(family), "F16").open();
        let options = Options { n_seq: 2, routing: None, ..f16_options() };
        let answers = [KvDevice::Gpu, KvDevice::Cpu].map(|kv| {
            let share = Share { ordinal: 0, layers: 0..model.config.n_layer, kv };
            let backend = Cuda::part(model.clone(), options.cache_spec(), &share).expect("the GPU backend");
            let mut engine = Engine::new(model.clone(), Box::new(backend), &options).expect("an engine");
            let seq = engine.create().expect("a sequence");
            let tokens = prompt(&engine, 300, 13);
            let mut all = prefill_in_chunks(&mut engine, seq, &tokens, 128);
            let fork = engine.fork(seq).expect("a fork");
            all.extend_from_slice(engine.step(&[(seq, 1), (fork, 2)]).expect("a step"));
            all
        });
        assert!(
            answers[0].iter().zip(&answers[1]).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{family}: logits differ"
        );
    }
}

/// An engine as the command line opens it, with so much GPU memory.
fn opened(
    model: &Model,
    options: &Options,
    device: &str,
    layers: GpuLayers,
    limit: u64,
) -> Result<Engine, Error> {
    let wanted = Wanted {
        device: device.parse().expect("a device"),
        gpu_layers: layers,
        gpu_memory: Some(limit),
        threads: 2,
        ..Wanted::default()
    };
    let opened: open::Opened = open(model, options.cache_spec(), &wanted, &Arc::default())?;
    println!("{}", opened.backend.describe());
    Engine::new(model.clone(), opened.backend, options)
}

#[test]
fn a_model_that_exceeds_the_gpu_runs() {
    let Some(_gpu) = gpu() else { return };
    let model = synth("clsa-tiny", "F16", 5).open();
    let options = Options { max_rows: 64, ..f16_options() };
    let answer = |mut engine: Engine| {
        let seq = engine.create().expect("a sequence");
        let tokens = prompt(&engine, 200, 19);
        let logits = prefill_in_chunks(&mut engine, seq, &tokens, 64);
        (engine.backend().describe(), logits)
    };
    let needs = |layers| {
        let share = Share { ordinal: 0, layers, kv: KvDevice::Gpu };
        let device = ggml_kernels::cuda::Device::open(0).expect("the GPU");
        Cuda::needs(&model, &options.cache_spec(), &share, &device).expect("sizes").total()
    };
    let (n, n_self) = (model.config.n_layer, model.config.n_self);
    let open = |device, layers, limit| opened(&model, &options, device, layers, limit);
    let (name, want) = answer(open("cuda:0", GpuLayers::Auto, u64::MAX).expect("all on the GPU"));
    assert!(!name.contains("CPU"), "{name}");
    for (limit, layers, parts) in [
        (needs(0..n) - 1, GpuLayers::Auto, 2),
        (needs(0..n_self), GpuLayers::Auto, 2),
        (needs(0..1), GpuLayers::Auto, 2),
        (u64::MAX, GpuLayers::First(n_self), 2),
        (needs(0..1) - 1, GpuLayers::Auto, 1),
    ] {
        let (name, got) = answer(open("cuda:0", layers, limit).expect("a part on the CPU"));
        assert!(name.contains("CPU") && name.split("; ").count() == parts, "{limit}: {name}");
        let difference = relative_difference(&got, &want);
        assert!(difference < 1e-2, "{name}: {difference:.1e}");
    }
    for (layers, limit) in [(GpuLayers::All, needs(0..n) - 1), (GpuLayers::First(1), needs(0..1) - 1)] {
        let Err(error) = open("cuda:0", layers, limit) else { panic!("{layers:?} in {limit} bytes") };
        assert!(error.to_string().contains("too little"), "{error}");
        assert_eq!(error.exit_code(), 1);
    }
    // Two ranges of one GPU, each with half of what is allowed.
    let (name, got) = answer(open("cuda:0,cuda:0", GpuLayers::All, 2 * needs(0..n) - 2).expect("two parts"));
    assert_eq!(name.matches("on CUDA 0").count(), 2, "{name}");
    assert!(relative_difference(&got, &want) < 1e-2, "{name}");
    // Two GPUs, of which none holds it alone.
    if ggml_kernels::cuda::Device::open(1).is_ok() {
        for device in ["cuda", "cuda:1,cuda:0"] {
            let (name, got) = answer(open(device, GpuLayers::All, needs(0..n) - 1).expect("two GPUs"));
            assert!(name.contains("on CUDA 0") && name.contains("on CUDA 1"), "{name}");
            assert!(relative_difference(&got, &want) < 1e-2, "{name}");
        }
    }
}

/// The k of top-k may be more than a short context holds.
#[test]
fn a_context_shorter_than_k_selects_everything() {
    let Some(_gpu) = gpu() else { return };
    let model = convert(&golden_dir("yoco-clsa"), "F32").open();
    let tokens = Random(25).tokens(200, model.config.vocab);
    let answers = [Device::Ggml, Device::Cuda].map(|device| {
        let options = Options { context: 256, top_k: Some(5000), ..f32_options() };
        let mut engine = engine(&model, device, &options);
        let seq = engine.create().expect("a sequence");
        let logits = prefill_in_chunks(&mut engine, seq, &tokens, 64);
        assert_eq!(engine.selection(0).expect("a selection").len(), 200, "{device:?}");
        logits
    });
    assert!(relative_difference(&answers[1], &answers[0]) < 1e-4);
}

#[test]
fn a_million_positions_give_finite_logits() {
    let Some(_gpu) = gpu() else { return };
    let model = synth("clsa-tiny", "Q8_0", 6).open();
    for routing in [Routing::Clsa, Routing::Dense] {
        let options =
            Options { context: 1 << 20, max_rows: 128, routing: Some(routing), ..Options::default() };
        let mut engine = engine(&model, Device::Cuda, &options);
        let seq = engine.create().expect("a sequence");
        engine.fill_random(seq, (1 << 20) - 120, 1).expect("room for all");
        let tokens = prompt(&engine, 117, 23);
        let logits = engine.prefill(seq, &tokens, |_| ControlFlow::Continue(())).expect("prefill").to_vec();
        assert!(logits.iter().all(|x| x.is_finite()), "{routing}: prefill");
        let mut token = argmax(&logits);
        for _ in 0..3 {
            let logits = engine.step(&[(seq, token)]).expect("a step");
            assert!(logits.iter().all(|x| x.is_finite()), "{routing}: decode");
            token = argmax(logits);
        }
        assert_eq!(engine.len(seq), 1 << 20);
    }
}

/// A question in SmolLM2's template and vocabulary.
const QUESTION: [u32; 40] = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182,
    2, 198, 1, 4093, 198, 1780, 314, 260, 3995, 3925, 281, 260, 3693, 817, 47, 2, 198, 1, 520, 9531, 198,
];

/// 256 greedy tokens of a real model on both, whatever the chunks, and the same on every run.
#[test]
#[ignore = "slow: needs CLSA_TEST_GGUF, smol-clsa-135m in F16 or F32"]
fn a_real_model_says_the_same_on_both() {
    let Some(_gpu) = gpu() else { return };
    let path = std::env::var_os("CLSA_TEST_GGUF").expect("CLSA_TEST_GGUF");
    let model = Model::open(path.as_ref()).expect("a model");
    let tokens = QUESTION.repeat(20);
    let options = Options { context: 4096, ..Options::default() };
    let run = |device, chunk| {
        let mut engine = engine(&model, device, &options);
        let seq = engine.create().expect("a sequence");
        let logits = prefill_in_chunks(&mut engine, seq, &tokens, chunk);
        greedy_after(&mut engine, seq, &logits, 256)
    };
    let want = run(Device::Ggml, 512);
    for chunk in [512, 512, 100, 33] {
        let got = run(Device::Cuda, chunk);
        let same = got.iter().zip(&want).take_while(|(a, b)| a == b).count();
        println!(
            "{} prompt tokens in chunks of {chunk}: {same} of 256 greedy tokens are the CPU's",
            tokens.len()
        );
        assert_eq!(same, 256, "chunks of {chunk}");
    }
}

/// `clsa batch` on the GPU: lines of the results by id.
fn batch_results(folder: &std::path::Path, jobs: &[&str], more: &[&str]) -> Result<Vec<String>, String> {
    let path = |name: &str| folder.join(name);
    let _ = std::fs::remove_file(path("results.jsonl"));
    std::fs::write(path("jobs.jsonl"), jobs.join("\n")).expect("jobs");
    let done = std::process::Command::new(env!("CARGO_BIN_EXE_clsa"))
        .args(["batch", "--device", "cuda", "--no-timings", "--quiet", "-m"])
        .arg(path("tiny.gguf"))
        .arg("-i")
        .arg(path("jobs.jsonl"))
        .arg("-o")
        .arg(path("results.jsonl"))
        .args(more)
        .env_remove("CLSA_CACHE_DIR")
        .output()
        .expect("clsa batch");
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).into_owned());
    }
    let text = std::fs::read_to_string(path("results.jsonl")).expect("results");
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    Ok(lines)
}

/// Products of few and of many rows take different kernels on a GPU. `--deterministic` holds that off: neither the other jobs in the file,
/// nor their order, nor an interruption (after which fewer are left) change an answer.
#[test]
fn deterministic_batches_depend_on_no_other_job() {
    let Some(_gpu) = gpu() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_clsa"))
        .args(["synth", "clsa-tiny", "--type", "Q4_K_M", "--seed", "3", "-o"])
        .arg(folder.path().join("tiny.gguf"))
        .output()
        .expect("clsa synth");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // Beginnings that several share, prompts of few rows and of several micro-batches, greedy answers and drawn ones.
    let document: String = (0..60).map(|i| format!("line {i} of a document. ")).collect();
    let jobs: Vec<String> = (0..16)
        .map(|i| {
            let shared = if i % 2 == 0 { document.as_str() } else { "" };
            let own = "x y ".repeat(1 + i * 31 % 97);
            let params = serde_json::json!({ "temperature": f64::from(u8::from(i % 5 == 4)) });
            let max = 20 + i * 13 % 60;
            let prompt = format!("{shared}{own}Question {i}?");
            serde_json::json!({ "id": i, "prompt": prompt, "max_tokens": max, "params": params }).to_string()
        })
        .collect();
    let jobs: Vec<&str> = jobs.iter().map(String::as_str).collect();
    let run = |jobs: &[&str], more: &[&str]| batch_results(folder.path(), jobs, more);
    let alone = ["--deterministic", "-ub", "256"];
    let whole = run(&jobs, &alone).expect("results");
    assert_eq!(whole.len(), 16);
    let reversed: Vec<&str> = jobs.iter().rev().copied().collect();
    assert_eq!(run(&reversed, &alone).expect("results"), whole);
    for (i, job) in jobs.iter().enumerate().step_by(3) {
        let result = run(&[job], &alone).expect("a result");
        assert!(whole.contains(&result[0]), "job {i}: {} alone", result[0]);
    }
    let together = run(&jobs, &["-np", "16", "-ub", "256"]).expect("results");
    let same = together.iter().filter(|line| whole.contains(line)).count();
    println!("{same} of 16 answers are the same with 16 sequences at a time");
    // What cannot hold beside it is refused.
    for more in [&["-np", "2"][..], &["--cache-dir", "cache"]] {
        let refused = run(&jobs, &[&alone[..], more].concat()).expect_err("a contradiction");
        assert!(refused.contains("--deterministic"), "{refused}");
    }
}

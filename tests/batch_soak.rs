//! A batch that never ends, in one process: random jobs, broken off at random, on one model. Memory must stay flat.
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clsa::backend::ggml::Ggml;
use clsa::batch::job::{Defaults, Documents, parse};
use clsa::batch::plan::Plan;
use clsa::batch::progress::{Progress, Show};
use clsa::batch::runner::Runner;
use clsa::batch::store::Store;
use clsa::engine::{Engine, Options};
use clsa::error::Error;
use clsa::sampler::SamplerParams;
use clsa::template::ChatTemplate;
use clsa::tokenizer::Tokenizer;

/// Resident memory of this process, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches("kB").trim().parse().expect("a number")
}

fn soak(seconds: u64) {
    let file = common::synth("clsa-tiny", "Q8_0", 3);
    let model = file.open();
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model.file).expect("a tokenizer"));
    let template = ChatTemplate::from_gguf(&model.file, &tokenizer);
    let folder = tempfile::tempdir().expect("a folder");
    let defaults = Defaults {
        params: SamplerParams::default(),
        max_tokens: 32,
        grammar: None,
        folder: folder.path().to_owned(),
    };
    let mut random = 7u64;
    let mut below = |n: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % n
    };
    let (started, mut shown) = (Instant::now(), Instant::now());
    let (mut rounds, mut done, mut cancelled, mut seen) = (0usize, 0usize, 0usize, vec![]);
    while started.elapsed() < Duration::from_secs(seconds) {
        rounds += 1;
        let n = 1 + below(24);
        let jobs = (0..n).map(|i| {
            let document = format!("Line of {}. ", below(3)).repeat(10 + below(2) * 60);
            let format = match below(6) {
                0 => r#", "response_format": {"type": "json_object"}"#,
                _ => "",
            };
            let line = format!(
                r#"{{"id": {i}, "prompt": "{document}{}", "max_tokens": {}{format}}}"#,
                "x".repeat(below(200)),
                below(60)
            );
            parse(&line, 1, &defaults, &mut Documents::new()).expect("a job")
        });
        let jobs: Vec<_> = jobs.collect();
        let (plan, failed) = Plan::new(jobs, &tokenizer, &template, model.config.vocab, true, true);
        assert!(failed.is_empty());
        let base = Options { max_rows: 64, ..Options::default() };
        let options = plan.sized(1 + below(6), 4096, &base);
        let leave = Arc::new(AtomicBool::new(false));
        let backend =
            Ggml::new(model.clone(), options.cache_spec(), 1, Arc::clone(&leave)).expect("a backend");
        let mut engine = Engine::new(model.clone(), Box::new(backend), &options).expect("an engine");
        engine.set_interrupt(Arc::clone(&leave));
        let store = Store::open(folder.path(), 4 << 20, &engine).expect("a store");
        // Broken off after some results: in order, or at once.
        let (finish, after, at_once) = (AtomicBool::new(false), below(2 * n), below(2) == 0);
        let mut ended = 0;
        let mut sink = |_: &_, _: &_| {
            ended += 1;
            if ended > after {
                let flag: &AtomicBool = if at_once { &leave } else { &finish };
                flag.store(true, Ordering::Relaxed);
            }
            Ok(())
        };
        let progress = Progress::new(Show::Nothing, n);
        let tokenizer = Arc::clone(&tokenizer);
        let mut runner =
            Runner::new(engine, tokenizer, plan, Some(store), progress, true, &mut sink).expect("a runner");
        match runner.run(&finish) {
            Ok(0) => {}
            Ok(_) | Err(Error::Interrupted) => cancelled += 1,
            Err(e) => panic!("{e}"),
        }
        drop(runner);
        done += ended;
        if shown.elapsed() >= Duration::from_secs(seconds.div_ceil(20)) || rounds == 20 {
            shown = Instant::now();
            seen.push(resident());
            println!(
                "{:6.0} s  {rounds} rounds, {done} jobs done, {cancelled} rounds cancelled, {} KiB resident",
                started.elapsed().as_secs_f64(),
                resident()
            );
        }
    }
    seen.push(resident());
    // What is there once everything has been used once, and a little for the allocator.
    let quarter = seen[..seen.len().div_ceil(4)].iter().max().expect("a figure");
    let last = seen[seen.len() / 2..].iter().max().expect("a figure");
    assert!(*last <= quarter + quarter / 10 + 4096, "memory grew: {seen:?} KiB");
    let files = std::fs::read_dir(folder.path()).expect("the folder").flatten();
    let bytes: u64 = files.map(|f| f.metadata().expect("a file").len()).sum();
    assert!(bytes <= 4 << 20, "the cache folder holds {bytes} bytes");
}

#[test]
fn memory_stays_flat_for_a_while() {
    soak(4);
}

#[test]
#[ignore = "slow: two hours, or CLSA_SOAK_SECONDS"]
fn memory_stays_flat_for_long() {
    let seconds =
        std::env::var("CLSA_SOAK_SECONDS").map_or(7200, |s| s.parse().expect("a number of seconds"));
    soak(seconds);
}

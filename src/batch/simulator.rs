//! The runner against a simple simulator: a backend whose pages hold tokens, and whose next token is a hash of all tokens before it. Any
//! page that is lost, mixed up, or missing shows in an answer.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::job::{Ask, Form, Job};
use super::plan::{Plan, Planned};
use super::progress::{Progress, Show};
use super::results::Outcome;
use super::runner::Runner;
use crate::backend::{Backend, Batch, Memory, Record, Routing};
use crate::cache::{PAGE, PageTables};
use crate::engine::{Engine, Options};
use crate::error::Result;
use crate::model::Model;
use crate::sampler::SamplerParams;
use crate::tokenizer::Tokenizer;

struct Simulator {
    pages: Vec<Vec<u32>>,
    /// What each slot's windows saw.
    windows: Vec<Vec<u32>>,
    logits: Vec<f32>,
    vocab: usize,
    eos: u32,
}

/// The token after `history`; every 24th or so ends the answer.
fn after(history: &[u32], vocab: usize, eos: u32) -> u32 {
    let bytes: Vec<u8> = history.iter().flat_map(|t| t.to_le_bytes()).collect();
    let hash = xxh3_64(&bytes);
    if hash.is_multiple_of(24) { eos } else { 20 + (hash >> 8) as u32 % (vocab as u32 - 20) }
}

impl Backend for Simulator {
    fn describe(&self) -> String {
        "simulator".into()
    }
    fn memory(&self) -> Memory {
        Memory::default()
    }
    fn begin(&mut self, batch: &Batch, tables: &PageTables, _: Routing, _: usize) -> Result<Record> {
        self.logits.clear();
        for r in 0..batch.tokens.len() {
            let (slot, pos) = (batch.slot[r] as usize, batch.pos[r] as usize);
            let table = &tables.entries[slot * tables.stride..][..tables.stride];
            self.pages[table[pos / PAGE] as usize][pos % PAGE] = batch.tokens[r];
            self.windows[slot].truncate(pos);
            self.windows[slot].push(batch.tokens[r]);
            if batch.outputs.contains(&(r as u32)) {
                let history: Vec<u32> =
                    (0..=pos).map(|p| self.pages[table[p / PAGE] as usize][p % PAGE]).collect();
                assert_eq!(history, self.windows[slot], "pages and windows of slot {slot}");
                let mut logits = vec![0.0; self.vocab];
                logits[after(&history, self.vocab, self.eos) as usize] = 1.0;
                self.logits.extend(logits);
            }
        }
        Ok(Record::Reused)
    }
    fn embed(&mut self) -> Result<()> {
        Ok(())
    }
    fn self_attention(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
    fn feed_forward(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
    fn append_shared(&mut self) -> Result<()> {
        Ok(())
    }
    fn keep_outputs(&mut self) -> Result<()> {
        Ok(())
    }
    fn route(&mut self) -> Result<()> {
        Ok(())
    }
    fn cross_attention(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
    fn logits(&mut self) -> Result<()> {
        Ok(())
    }
    fn finish(&mut self) -> Result<&[f32]> {
        Ok(&self.logits)
    }
    fn selection(&mut self, _: usize) -> Result<Vec<u32>> {
        Ok(vec![])
    }
    fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        self.pages[to as usize] = self.pages[from as usize].clone();
        Ok(())
    }
    fn read_page(&mut self, _: u32, _: usize, _: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }
    fn write_page(&mut self, _: u32, _: usize, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn save_window(&mut self, slot: u32, len: usize) -> Result<Vec<u8>> {
        Ok(self.windows[slot as usize][..len].iter().flat_map(|t| t.to_le_bytes()).collect())
    }
    fn load_window(&mut self, slot: u32, _: usize, bytes: &[u8]) -> Result<()> {
        let tokens = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        self.windows[slot as usize] = tokens.collect();
        Ok(())
    }
}

struct Tiny {
    _folder: tempfile::TempDir,
    model: Model,
    tokenizer: Arc<Tokenizer>,
}

static TINY: LazyLock<Tiny> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let model = clsa_convert::synth::model("clsa-tiny", 0).unwrap();
    let recipe = clsa_convert::Recipe::new("Q8_0".parse().unwrap());
    let plan = clsa_convert::Plan::new(model, &recipe, None).unwrap();
    plan.write(&path, &clsa_convert::Options { threads: 1, abort: None, progress: &|_| {} }).unwrap();
    let model = Model::open(&path).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model.file).unwrap());
    Tiny { _folder: folder, model, tokenizer }
});

/// What one job is made of: which beginnings it has, its own tokens, and how long its answer may be.
type Shape = (usize, usize, usize, usize);

/// Jobs whose prompts begin with a system prompt of `system` tokens and one of some documents.
fn jobs(shapes: &[Shape], system: usize) -> Vec<Planned> {
    let token =
        |seed: usize, i: usize| 20 + (xxh3_64(&[(seed * 7919 + i).to_le_bytes()].concat()) % 400) as u32;
    let text = |seed: usize, n: usize| (0..n).map(move |i| token(seed, i));
    (shapes.iter().enumerate())
        .map(|(i, &(document, document_len, own, max_tokens))| {
            // Documents 0 and 1 are long ones that several jobs share; the others are the job's own.
            let n = if document < 2 { 300 + 500 * document } else { document_len };
            let seed = if document < 2 { document + 1 } else { 1000 + i };
            let tokens = text(0, system).chain(text(seed, n)).chain(text(5000 + i, own + 1)).collect();
            let job = Job {
                id: format!("job {i}"),
                form: Form::Plain,
                ask: Ask::Prompt(String::new()),
                documents: vec![],
                params: SamplerParams { temperature: 0.0, ..SamplerParams::default() },
                max_tokens,
                stop: vec![],
                grammar: None,
            };
            Planned { job, tokens, prefix: None }
        })
        .collect()
}

/// What a job must say: token by token, alone.
fn expected(p: &Planned) -> (usize, String) {
    let Tiny { model, tokenizer, .. } = &*TINY;
    let (mut history, mut said) = (p.tokens.clone(), vec![]);
    while said.len() < p.job.max_tokens {
        let next = after(&history, model.config.vocab, tokenizer.special().stop[0]);
        if tokenizer.is_stop(next) {
            break;
        }
        history.push(next);
        said.push(next);
    }
    (said.len(), tokenizer.decode(&said, false).unwrap())
}

struct Ran {
    results: BTreeMap<String, (usize, String)>,
    refused: usize,
    left: usize,
    started: Vec<usize>,
}

/// Runs a plan with `extra` pages more than its largest job needs, until `cancel` jobs have ended. Checks that nothing is left behind.
fn run(planned: Vec<Planned>, parallel: usize, extra: usize, max_rows: usize, cancel: usize) -> Ran {
    let Tiny { model, tokenizer, .. } = &*TINY;
    let mut plan = Plan { jobs: planned, ..Plan::default() };
    plan.share();
    let base = Options { max_rows, ..Options::default() };
    let sized = plan.sized(parallel, 8192, &base);
    let longest = plan.jobs.iter().map(Planned::worst).max().unwrap();
    let options = Options { total_positions: Some(longest + extra * PAGE), ..sized };
    let spec = options.cache_spec();
    let backend = Simulator {
        pages: vec![vec![u32::MAX; PAGE]; spec.n_pages],
        windows: vec![vec![]; spec.n_slots],
        logits: vec![],
        vocab: model.config.vocab,
        eos: tokenizer.special().stop[0],
    };
    let engine = Engine::new(model.clone(), Box::new(backend), &options).unwrap();
    let (stop, mut results, mut refused) = (AtomicBool::new(false), BTreeMap::new(), 0);
    let mut sink = |job: &Job, outcome: &Result<Outcome, String>| {
        match outcome {
            Ok(o) => assert!(results.insert(job.id.clone(), (o.generated_tokens, o.text.clone())).is_none()),
            Err(_) => refused += 1,
        }
        stop.store(results.len() >= cancel, Ordering::Relaxed);
        Ok(())
    };
    let progress = Progress::new(Show::Nothing, 0);
    let mut runner =
        Runner::new(engine, Arc::clone(tokenizer), plan, None, progress, false, &mut sink).unwrap();
    let left = runner.run(&stop).expect("the pages suffice: every worst case is reserved");
    if left == 0 {
        assert_eq!(runner.engine().free_pages(), spec.n_pages, "pages that nobody gave back");
    }
    let started = std::mem::take(&mut runner.started);
    drop(runner);
    Ran { results, refused, left, started }
}

fn shapes() -> impl Strategy<Value = Vec<Shape>> {
    prop::collection::vec((0usize..5, 0usize..700, 0usize..80, 0usize..400), 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn every_job_says_what_it_says_alone(
        shapes in shapes(),
        system in prop_oneof![Just(0usize), 60usize..600],
        parallel in 1usize..9,
        extra in 0usize..40,
        max_rows in 16usize..300,
        cancel in 1usize..24,
    ) {
        let planned = jobs(&shapes, system);
        let want: BTreeMap<_, _> = planned.iter().map(|p| (p.job.id.clone(), expected(p))).collect();
        let parallel = parallel.min(max_rows);
        let whole = run(planned, parallel, extra, max_rows, usize::MAX);
        prop_assert_eq!((whole.left, whole.refused), (0, 0));
        prop_assert_eq!(&whole.results, &want);

        // Broken off after some results, and gone on with.
        let cut = run(jobs(&shapes, system), parallel, extra, max_rows, cancel);
        let rest: Vec<_> = jobs(&shapes, system).into_iter().filter(|p| !cut.results.contains_key(&p.job.id)).collect();
        prop_assert_eq!(rest.len(), cut.left);
        let mut all = cut.results;
        if !rest.is_empty() {
            all.extend(run(rest, parallel, extra, max_rows, usize::MAX).results);
        }
        prop_assert_eq!(&all, &want);
    }
}

/// A large job, for which all others must end, is let pass by few small ones only.
#[test]
fn a_large_job_does_not_starve() {
    for parallel in 1..6 {
        let mut shapes = vec![(2, 40, 10, 300); 40];
        shapes[3] = (2, 3000, 10, 300);
        let ran = run(jobs(&shapes, 0), parallel, 0, 64, usize::MAX);
        assert_eq!(ran.results.len(), 40);
        let at = ran.started.iter().position(|&job| job == 3).unwrap();
        assert!(at <= 3 + 2 * parallel, "the large job came {at}th, {parallel} at a time");
    }
}

/// Short prompts are not held up by a long one before them.
#[test]
fn a_short_job_ends_before_a_long_prompt() {
    let shapes = [(2, 7000, 10, 2), (2, 30, 1, 2), (2, 30, 1, 2)];
    let Tiny { .. } = &*TINY;
    let ran = run(jobs(&shapes, 0), 3, 40, 64, 2);
    assert!(
        ran.results.contains_key("job 1") && ran.results.contains_key("job 2"),
        "{:?}",
        ran.results.keys()
    );
}

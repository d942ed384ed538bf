//! `clsa batch`: a file of jobs in, a file of results out; killed at any moment it goes on where it was.
use std::collections::HashSet;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rayon::prelude::*;

use super::human_bytes;
use super::model::ModelArgs;
use super::sampling::SamplingArgs;
use crate::batch::job::{BadLine, Defaults, Form, Job, parse};
use crate::batch::prefix::{Prefix, shared_prefixes};
use crate::batch::results::Results;
use crate::batch::schedule::{Active, pages_needed, rows};
use crate::batch::{Answering, Next, is_of_the_job, tokenize};
use crate::cache::PAGE;
use crate::engine::{Engine, Options, Row, SeqId};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Model;
use crate::placement;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Arguments of `clsa batch`.
#[derive(Debug, Args)]
pub struct BatchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Jobs, one JSON object a line: OpenAI batch lines, or {"id", "prompt" or "messages", "documents", "params", "max_tokens", "stop"}
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,
    /// Results, appended as jobs end; jobs that it has are not done again
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Sequences at a time (-np); 0: as many as memory and the micro-batch allow, at most 32
    #[arg(long, value_name = "N", default_value_t = 0)]
    parallel: usize,
    /// Tokens to generate for jobs that do not say
    #[arg(short = 'n', long, value_name = "N", default_value_t = 512)]
    n_predict: usize,
    /// Leave times out of the results, so that equal jobs give equal files
    #[arg(long)]
    no_timings: bool,
    /// Count jobs, tokens, shared prefixes and memory, and run nothing
    #[arg(long)]
    dry_run: bool,
    /// No progress and no summary
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Shared tokens that make a prefix worth keeping.
const LEAST_PREFIX: usize = 64;
/// Sequences at a time when nothing was said.
const MOST_PARALLEL: usize = 32;
/// Slots beyond the jobs' own, for prefixes.
const PREFIX_SLOTS: usize = 8;

/// A job with its tokens.
struct Planned {
    job: Job,
    tokens: Vec<u32>,
    prefix: Option<usize>,
}

impl Planned {
    /// Positions it may come to hold.
    fn worst(&self) -> usize {
        self.tokens.len() + self.job.max_tokens
    }
}

/// Runs `clsa batch`.
///
/// # Errors
/// Those of files, the model and the engine; [`Error::Interrupted`] with what is done kept.
pub fn run(args: &BatchArgs) -> Result<()> {
    let stop = interrupt::requested()?;
    let model = args.model.open()?;
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model.file)?);
    // Only jobs with messages need one; they say so when it is missing or broken.
    let template = ChatTemplate::from_gguf(&model.file, &tokenizer);
    let mut results = Results::open(&args.output)?;
    let (jobs, bad, finished) = args.read(&model, &results)?;
    let (mut planned, failed) = args.plan(jobs, &tokenizer, template.as_ref().ok());
    let failed: Vec<_> = failed
        .into_iter()
        .map(|(job, what)| match (&template, job.ask) {
            (Err(e), crate::batch::job::Ask::Messages(_)) => (job.id, job.form, e.to_string()),
            _ => (job.id, job.form, what),
        })
        .collect();
    let context = args.context(&model);
    let prefixes = {
        let prompts: Vec<&[u32]> = planned.iter().map(|p| p.tokens.as_slice()).collect();
        let (prefixes, of_prompt) = shared_prefixes(&prompts, LEAST_PREFIX);
        planned.iter_mut().zip(of_prompt).for_each(|(p, prefix)| p.prefix = prefix);
        prefixes
    };
    let options = args.options(&model, &planned, &prefixes, context);
    if args.dry_run {
        args.describe(&model, &planned, &prefixes, &options, bad.len() + failed.len(), finished);
        return Ok(());
    }
    for bad in bad {
        let form = if bad.open_ai { Form::OpenAi } else { Form::Plain };
        results.push(&bad.id, form, &Err(bad.what))?;
    }
    for (id, form, what) in failed {
        results.push(&id, form, &Err(what))?;
    }
    if planned.is_empty() {
        return Ok(());
    }
    let engine = args.model.engine(&model, &options, Arc::default())?;
    Runner::new(args, engine, tokenizer, planned, prefixes, results).run(&stop)
}

impl BatchArgs {
    /// The jobs without a result yet, the bad lines, and how many have one.
    fn read(&self, model: &Model, results: &Results) -> Result<(Vec<Job>, Vec<BadLine>, usize)> {
        let text = std::fs::read_to_string(&self.input)
            .map_err(|source| Error::Io { path: self.input.clone(), source })?;
        let folder = self.input.parent().map_or_else(PathBuf::new, PathBuf::from);
        let defaults =
            Defaults { params: self.sampling.params(&model.file)?, max_tokens: self.n_predict, folder };
        let (mut jobs, mut bad, mut seen, mut finished) = (vec![], vec![], HashSet::new(), 0);
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let parsed = parse(line, i + 1, &defaults);
            let id = parsed.as_ref().map_or_else(|b| b.id.clone(), |j| j.id.clone());
            if !seen.insert(id.clone()) {
                return Err(Error::Input(format!(
                    "{}: line {}: the id \"{id}\" stands there before: ids must differ",
                    self.input.display(),
                    i + 1
                )));
            }
            match parsed {
                _ if results.has(&id) => finished += 1,
                Ok(job) => jobs.push(job),
                Err(b) => bad.push(b),
            }
        }
        Ok((jobs, bad, finished))
    }

    /// Tokens of every job, on all cores; jobs that have none come back with the reason.
    fn plan(
        &self,
        jobs: Vec<Job>,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
    ) -> (Vec<Planned>, Vec<(Job, String)>) {
        let tokens: Vec<_> = jobs.par_iter().map(|job| tokenize(job, tokenizer, template)).collect();
        let (mut planned, mut failed) = (vec![], vec![]);
        for (job, tokens) in jobs.into_iter().zip(tokens) {
            match tokens {
                Ok(tokens) => planned.push(Planned { job, tokens, prefix: None }),
                Err(what) => failed.push((job, what)),
            }
        }
        (planned, failed)
    }

    /// Positions that one job may have.
    fn context(&self, model: &Model) -> usize {
        match self.model.ctx_size {
            0 => model.config.context_length,
            n => n,
        }
    }

    /// Sizes the engine: as many sequences as were asked for, or as fit into half of the free memory.
    fn options(&self, model: &Model, planned: &[Planned], prefixes: &[Prefix], context: usize) -> Options {
        let base = self.model.options(model, 1);
        let longest = planned.iter().map(Planned::worst).max().unwrap_or(1).min(context);
        let mean = planned.iter().map(|p| p.worst().min(context)).sum::<usize>() / planned.len().max(1);
        let kept = prefixes.iter().map(|p| p.len).max().unwrap_or(0);
        let slots = if prefixes.is_empty() { 0 } else { PREFIX_SLOTS };
        let sized = |n: usize| {
            let total = (n * mean).max(longest) + slots * PAGE + kept + n * PAGE;
            Options { context: longest, n_seq: n + slots, total_positions: Some(total), ..base.clone() }
        };
        let most = planned.len().clamp(1, MOST_PARALLEL).min(base.max_rows);
        let n = match self.parallel {
            0 => {
                let free = placement::free_memory();
                let fits =
                    |n: &usize| placement::cache_bytes(&model.config, &sized(*n).cache_spec()) <= free / 2;
                (1..=most).rev().find(fits).unwrap_or(1)
            }
            n => n.min(base.max_rows),
        };
        sized(n)
    }

    fn describe(
        &self,
        model: &Model,
        planned: &[Planned],
        prefixes: &[Prefix],
        options: &Options,
        bad: usize,
        finished: usize,
    ) {
        let tokens: usize = planned.iter().map(|p| p.tokens.len()).sum();
        let answers: usize = planned.iter().map(|p| p.job.max_tokens).sum();
        let own: usize =
            planned.iter().map(|p| p.tokens.len() - p.prefix.map_or(0, |i| prefixes[i].len)).sum();
        let once: usize = prefixes.iter().map(|p| p.len - p.parent.map_or(0, |up| prefixes[up].len)).sum();
        eprintln!("jobs       {} to do, {finished} done before, {bad} that cannot be done", planned.len());
        eprintln!("tokens     {tokens} in prompts, at most {answers} in answers");
        eprintln!("prefixes   {} shared, which leaves {} prompt tokens to run", prefixes.len(), own + once);
        let spec = options.cache_spec();
        let bytes = placement::cache_bytes(&model.config, &spec);
        eprintln!("sequences  {} slots, {} positions in all", spec.n_slots, spec.n_pages * PAGE);
        eprintln!("memory     {} for caches", human_bytes(bytes));
    }
}

/// A sequence that runs: a prefix that is being built, or a job.
struct Sequence {
    seq: SeqId,
    kind: Kind,
    /// Prompt tokens in the cache.
    at: usize,
    /// The next token to decode.
    token: Option<u32>,
    age: u64,
    /// Pages that it may still take.
    reserved: usize,
}

enum Kind {
    Prefix(usize),
    Job(usize, Box<Answering>),
}

/// A shared prefix while jobs still need it.
struct Shared {
    prefix: Prefix,
    seq: Option<SeqId>,
    ready: bool,
    /// Jobs and longer prefixes that have not taken it yet.
    users: usize,
}

struct Runner<'a> {
    args: &'a BatchArgs,
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
    planned: Vec<Planned>,
    shared: Vec<Shared>,
    waiting: Vec<usize>,
    active: Vec<Sequence>,
    results: Results,
    parallel: usize,
    admitted: u64,
    bar: ProgressBar,
    totals: Totals,
}

#[derive(Default)]
struct Totals {
    prompt: usize,
    reused: usize,
    generated: usize,
    failed: usize,
}

impl<'a> Runner<'a> {
    fn new(
        args: &'a BatchArgs,
        engine: Engine,
        tokenizer: Arc<Tokenizer>,
        planned: Vec<Planned>,
        prefixes: Vec<Prefix>,
        results: Results,
    ) -> Self {
        let mut shared: Vec<Shared> =
            prefixes.into_iter().map(|prefix| Shared { prefix, seq: None, ready: false, users: 0 }).collect();
        for i in 0..shared.len() {
            if let Some(up) = shared[i].prefix.parent {
                shared[up].users += 1;
            }
        }
        planned.iter().filter_map(|p| p.prefix).for_each(|i| shared[i].users += 1);
        // Jobs of one prefix follow each other, so that few prefixes are kept at a time; otherwise in the order of the file.
        let mut waiting: Vec<usize> = (0..planned.len()).collect();
        waiting.sort_by_key(|&i| (planned[i].prefix.map_or(i, |p| shared[p].prefix.prompt), i));
        waiting.reverse();
        let parallel = engine.spec().n_slots - if shared.is_empty() { 0 } else { PREFIX_SLOTS };
        let target = if args.quiet || !std::io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} jobs  {msg}  {eta}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(planned.len() as u64), target).with_style(style);
        Self {
            args,
            engine,
            tokenizer,
            planned,
            shared,
            waiting,
            active: vec![],
            results,
            parallel: parallel.max(1),
            admitted: 0,
            bar,
            totals: Totals::default(),
        }
    }

    fn run(mut self, stop: &AtomicBool) -> Result<()> {
        let started = Instant::now();
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            if !stopping {
                self.admit()?;
            }
            // Prefixes serve jobs that will not come any more.
            if self.active.is_empty()
                || stopping && self.active.iter().all(|s| matches!(s.kind, Kind::Prefix(_)))
            {
                break;
            }
            self.step()?;
            let seconds = started.elapsed().as_secs_f64();
            self.bar.set_message(format!(
                "{} running, {} waiting; prompt {:.0} t/s, answers {:.1} t/s, reused {} tokens",
                self.active.len(),
                self.waiting.len(),
                self.totals.prompt as f64 / seconds,
                self.totals.generated as f64 / seconds,
                self.totals.reused
            ));
        }
        self.bar.finish_and_clear();
        if !self.args.quiet {
            let (t, seconds) = (&self.totals, started.elapsed().as_secs_f64());
            let done = self.planned.len() - self.waiting.len();
            eprintln!(
                "{done} jobs ({} failed) in {seconds:.1} s: {} prompt tokens run, {} reused, {} generated ({:.1} t/s end to end)",
                t.failed,
                t.prompt,
                t.reused,
                t.generated,
                t.generated as f64 / seconds
            );
        }
        if self.waiting.is_empty() {
            return Ok(());
        }
        eprintln!("{} jobs are left: the same command goes on with them", self.waiting.len());
        Err(Error::Interrupted)
    }

    /// Starts waiting jobs while there are slots and their worst case fits.
    fn admit(&mut self) -> Result<()> {
        let mut i = self.waiting.len();
        while i > 0 && self.jobs_running() < self.parallel {
            i -= 1;
            let index = self.waiting[i];
            match self.start(index)? {
                Started::Yes => {
                    self.waiting.remove(i);
                }
                Started::NotYet => {}
                Started::Again => i = self.waiting.len(),
                Started::Never(what) => {
                    self.waiting.remove(i);
                    self.release(self.planned[index].prefix);
                    self.fail(index, &what)?;
                }
            }
        }
        Ok(())
    }

    fn jobs_running(&self) -> usize {
        self.active.iter().filter(|s| matches!(s.kind, Kind::Job(..))).count()
    }

    fn pages_left(&self) -> usize {
        self.engine.free_pages().saturating_sub(self.active.iter().map(|s| s.reserved).sum())
    }

    fn start(&mut self, index: usize) -> Result<Started> {
        let p = &self.planned[index];
        if p.worst() > self.engine.context() {
            let e = Error::ContextFull { needed: p.worst(), context: self.engine.context() };
            return Ok(Started::Never(format!("{e} (prompt and max_tokens together)")));
        }
        if let Some(i) = p.prefix
            && !self.shared[i].ready
        {
            return self.start_prefix(i);
        }
        let p = &self.planned[index];
        let shared = p.prefix.map_or(0, |i| self.shared[i].prefix.len);
        let reserved = pages_needed(p.worst(), shared);
        if reserved > self.pages_left() {
            return self.wait_for_memory();
        }
        let answering = match Answering::new(&p.job, &p.tokens, shared, &self.tokenizer) {
            Ok(a) => Box::new(a),
            Err(e) if is_of_the_job(&e) => return Ok(Started::Never(e.to_string())),
            Err(e) => return Err(e),
        };
        let seq = match p.prefix.and_then(|i| self.shared[i].seq) {
            Some(from) => self.engine.fork(from)?,
            None => self.engine.create()?,
        };
        self.totals.reused += shared;
        self.release(self.planned[index].prefix);
        self.push(seq, Kind::Job(index, answering), shared, reserved);
        Ok(Started::Yes)
    }

    fn start_prefix(&mut self, i: usize) -> Result<Started> {
        if self.shared[i].seq.is_some() {
            return Ok(Started::NotYet);
        }
        let parent = self.shared[i].prefix.parent;
        if let Some(up) = parent
            && !self.shared[up].ready
        {
            return self.start_prefix(up);
        }
        let (len, below) = (self.shared[i].prefix.len, parent.map_or(0, |up| self.shared[up].prefix.len));
        let reserved = pages_needed(len, below);
        let kept = self.shared.iter().filter(|s| s.seq.is_some()).count();
        if reserved > self.pages_left() || kept >= PREFIX_SLOTS {
            return self.wait_for_memory();
        }
        let seq = match parent.and_then(|up| self.shared[up].seq) {
            Some(from) => self.engine.fork(from)?,
            None => self.engine.create()?,
        };
        self.totals.reused += below;
        self.release(parent);
        self.shared[i].seq = Some(seq);
        self.push(seq, Kind::Prefix(i), below, reserved);
        Ok(Started::NotYet)
    }

    fn push(&mut self, seq: SeqId, kind: Kind, at: usize, reserved: usize) {
        self.admitted += 1;
        self.active.push(Sequence { seq, kind, at, token: None, age: self.admitted, reserved });
    }

    /// Memory comes back when something that runs ends. When nothing runs, prefixes that nobody can use stand in the way: they go, and
    /// their jobs run alone.
    fn wait_for_memory(&mut self) -> Result<Started> {
        if !self.active.is_empty() {
            return Ok(Started::NotYet);
        }
        if self.shared.iter().any(|s| s.seq.is_some()) {
            for shared in &mut self.shared {
                if let Some(seq) = shared.seq.take() {
                    self.engine.free(seq);
                }
                (shared.ready, shared.users) = (false, 0);
            }
            self.planned.iter_mut().for_each(|p| p.prefix = None);
            return Ok(Started::Again);
        }
        Ok(Started::Never(
            "it needs more memory than the caches have: lower -np or max_tokens, or use -ctk q8_0 -ctv q8_0"
                .into(),
        ))
    }

    /// One user of a prefix less; the last one frees it.
    fn release(&mut self, prefix: Option<usize>) {
        let Some(shared) = prefix.map(|i| &mut self.shared[i]) else { return };
        shared.users = shared.users.saturating_sub(1);
        if shared.users == 0
            && shared.ready
            && let Some(seq) = shared.seq.take()
        {
            shared.ready = false;
            self.engine.free(seq);
        }
    }

    /// One micro-batch.
    fn step(&mut self) -> Result<()> {
        let max_rows = self.engine.spec().max_rows;
        let plan: Vec<Active> =
            self.active.iter().map(|s| Active { prompt_left: self.target(s) - s.at, age: s.age }).collect();
        let mut batch = vec![];
        let mut outputs = vec![];
        for (i, n) in rows(&plan, max_rows).into_iter().enumerate().filter(|(_, n)| *n > 0) {
            let s = &self.active[i];
            let is_job = matches!(s.kind, Kind::Job(..));
            if let Some(token) = s.token {
                batch.push(Row { seq: s.seq, token, output: true });
                outputs.push(i);
                continue;
            }
            let target = self.target(s);
            for (k, &token) in self.tokens(s)[s.at..s.at + n].iter().enumerate() {
                let output = is_job && s.at + k + 1 == target;
                batch.push(Row { seq: s.seq, token, output });
            }
            if is_job && s.at + n == target {
                outputs.push(i);
            }
            self.active[i].at += n;
            self.totals.prompt += n;
        }
        let vocab = self.engine.model().config.vocab;
        let logits = self.engine.run(&batch)?.to_vec();
        let mut ended = vec![];
        for (&i, logits) in outputs.iter().zip(logits.chunks_exact(vocab)) {
            let s = &mut self.active[i];
            let Kind::Job(_, answering) = &mut s.kind else { continue };
            match answering.next(&mut logits.to_vec(), &self.tokenizer) {
                Ok(Next::Token(token)) => {
                    s.token = Some(token);
                    self.totals.generated += 1;
                }
                Ok(Next::Done(reason)) => ended.push((i, Ok(reason))),
                Err(e) if is_of_the_job(&e) => ended.push((i, Err(e.to_string()))),
                Err(e) => return Err(e),
            }
        }
        self.settle(ended)
    }

    fn target(&self, s: &Sequence) -> usize {
        match &s.kind {
            Kind::Prefix(i) => self.shared[*i].prefix.len,
            Kind::Job(i, _) => self.planned[*i].tokens.len(),
        }
    }

    fn tokens(&self, s: &Sequence) -> &[u32] {
        match &s.kind {
            Kind::Prefix(i) => &self.planned[self.shared[*i].prefix.prompt].tokens,
            Kind::Job(i, _) => &self.planned[*i].tokens,
        }
    }

    /// Takes out what has ended, and counts what the others may still take.
    fn settle(&mut self, ended: Vec<(usize, Result<crate::generate::FinishReason, String>)>) -> Result<()> {
        for (i, reason) in ended.into_iter().rev() {
            let s = self.active.remove(i);
            self.engine.free(s.seq);
            let Kind::Job(index, answering) = s.kind else { continue };
            match reason {
                Ok(reason) => {
                    let job = &self.planned[index].job;
                    let outcome = answering.finish(reason, !self.args.no_timings);
                    self.results.push(&job.id, job.form, &Ok(outcome))?;
                    self.bar.inc(1);
                }
                Err(what) => self.fail(index, &what)?,
            }
        }
        let mut i = 0;
        while i < self.active.len() {
            let s = &self.active[i];
            let (at, held) = (self.engine.len(s.seq), self.engine.len(s.seq).div_ceil(PAGE));
            match &s.kind {
                Kind::Prefix(p) if at == self.target(s) => {
                    self.shared[*p].ready = true;
                    self.active.remove(i);
                    continue;
                }
                Kind::Prefix(p) => {
                    let len = self.shared[*p].prefix.len;
                    self.active[i].reserved = len.div_ceil(PAGE) - held;
                }
                Kind::Job(j, _) => {
                    let worst = self.planned[*j].worst();
                    self.active[i].reserved = worst.div_ceil(PAGE) - held;
                }
            }
            i += 1;
        }
        Ok(())
    }

    fn fail(&mut self, index: usize, what: &str) -> Result<()> {
        let job = &self.planned[index].job;
        self.totals.failed += 1;
        self.bar.inc(1);
        self.results.push(&job.id, job.form, &Err(what.to_owned()))
    }
}

/// What came of starting a job.
enum Started {
    /// It runs.
    Yes,
    /// Something must end first.
    NotYet,
    /// Memory was made free: look at all waiting jobs again.
    Again,
    /// It cannot run; why.
    Never(String),
}

//! The run: admits jobs, steps all running sequences at once, hands out results.
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::job::Job;
use super::plan::{LEAST_PREFIX, PREFIX_SLOTS, Plan};
use super::progress::{Progress, State};
use super::results::Outcome;
use super::schedule::{Active, pages_needed, rows};
use super::store::Store;
use super::{Answering, Next, is_of_the_job};
use crate::cache::PAGE;
use crate::engine::{Engine, Row, SeqId};
use crate::error::{Error, Result};
use crate::generate::FinishReason;
use crate::sampler::{Constraint, GrammarCompiler};
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;

/// Takes the result of a job: what it said, or why it failed.
pub type Sink<'a> = &'a mut dyn FnMut(&Job, &Result<Outcome, String>) -> Result<()>;

/// A sequence that runs: a prefix that is being built, or a job.
struct Sequence {
    seq: SeqId,
    kind: Kind,
    /// Prompt tokens in the cache, and how many of them were there at the start.
    at: usize,
    start: usize,
    /// The next token to decode.
    token: Option<u32>,
    age: u64,
    /// Pages that it may still take.
    reserved: usize,
}

/// What an answer goes on with.
enum Given<'a> {
    /// A token that was drawn where the model runs.
    Token(u32),
    /// Logits to choose by.
    Logits(&'a [f32]),
}

enum Kind {
    Prefix(usize),
    Job(usize, Box<Answering>),
}

/// A shared prefix while jobs still need it.
#[derive(Default)]
struct Shared {
    seq: Option<SeqId>,
    ready: bool,
    /// Jobs and longer prefixes that have not taken it yet.
    users: usize,
}

/// What came of starting a job.
enum Started {
    /// It runs.
    Yes,
    /// The prefix that it needs must be ready first.
    Prefix,
    /// A prefix that it needs became ready at once: try again.
    Again,
    /// Something must end first.
    Memory,
    /// It cannot run; why.
    Never(String),
}

/// A batch on an engine.
pub struct Runner<'a> {
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
    compiler: Option<GrammarCompiler>,
    plan: Plan,
    shared: Vec<Shared>,
    waiting: VecDeque<usize>,
    active: Vec<Sequence>,
    store: Option<Store>,
    sink: Sink<'a>,
    parallel: usize,
    admitted: u64,
    /// Jobs that were let past the first one that waits, for which memory was lacking.
    overtaken: usize,
    with_timings: bool,
    progress: Progress,
    row_bytes: u64,
    /// The person was told what an interrupt does.
    told: bool,
    /// Jobs in the order in which they were started.
    #[cfg(test)]
    pub(super) started: Vec<usize>,
}

/// Waiting jobs that are looked at, for each sequence at a time: one that does not fit must not hide small ones behind it.
const LOOK_AHEAD: usize = 4;

impl<'a> Runner<'a> {
    /// A run of `plan` on an engine that was sized for it. Results go to `sink`.
    ///
    /// # Errors
    /// A vocabulary that cannot have grammars, where jobs have them.
    pub fn new(
        engine: Engine,
        tokenizer: Arc<Tokenizer>,
        plan: Plan,
        store: Option<Store>,
        progress: Progress,
        with_timings: bool,
        sink: Sink<'a>,
    ) -> Result<Self> {
        let mut shared: Vec<Shared> = plan.prefixes.iter().map(|_| Shared::default()).collect();
        plan.prefixes.iter().filter_map(|p| p.parent).for_each(|up| shared[up].users += 1);
        plan.jobs.iter().filter_map(|p| p.prefix).for_each(|i| shared[i].users += 1);
        // Jobs of one prefix follow each other, so that few prefixes are kept at a time; otherwise in the order of the file.
        let mut first = vec![usize::MAX; plan.prefixes.len()];
        for (job, planned) in plan.jobs.iter().enumerate() {
            let mut next = planned.prefix;
            while let Some(i) = next {
                first[i] = first[i].min(job);
                next = plan.prefixes[i].parent;
            }
        }
        let mut waiting: Vec<usize> = (0..plan.jobs.len()).collect();
        waiting.sort_by_key(|&job| {
            // The branch of the tree, from its root.
            let mut branch = vec![];
            let mut next = plan.jobs[job].prefix;
            while let Some(i) = next {
                branch.push(first[i]);
                next = plan.prefixes[i].parent;
            }
            branch.reverse();
            branch.push(job);
            branch
        });
        let slots = if plan.prefixes.is_empty() { 0 } else { PREFIX_SLOTS };
        let compiler = match plan.jobs.iter().any(|p| p.job.grammar.is_some()) {
            true => Some(GrammarCompiler::new(&tokenizer)?),
            false => None,
        };
        Ok(Self {
            parallel: engine.spec().n_slots.saturating_sub(slots).max(1),
            row_bytes: engine.export_sizes(0).0 as u64,
            engine,
            tokenizer,
            compiler,
            plan,
            shared,
            waiting: waiting.into(),
            active: vec![],
            store,
            sink,
            admitted: 0,
            overtaken: 0,
            with_timings,
            progress,
            told: false,
            #[cfg(test)]
            started: vec![],
        })
    }

    /// Runs until all jobs have a result, or `stop` is set and what runs has ended. Returns how many jobs are left.
    ///
    /// # Errors
    /// Those of the engine and of `sink`; [`Error::Interrupted`] at the engine's own flag. Every result until then has been handed out, and
    /// prompts that were on their way are in the cache folder, where there is one.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<usize> {
        let result = self.work(stop);
        if result.is_err() {
            self.save_all();
        }
        let state = self.state();
        self.progress.summary(&state);
        result.map(|()| self.waiting.len())
    }

    fn work(&mut self, stop: &AtomicBool) -> Result<()> {
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            if !stopping {
                self.admit()?;
            }
            // Prefixes serve jobs that will not come any more.
            if self.active.is_empty() || stopping && self.jobs_running() == 0 {
                return Ok(());
            }
            if stopping && !std::mem::replace(&mut self.told, true) {
                let running = self.jobs_running();
                self.progress.note(&format!(
                    "interrupted: {running} running jobs are brought to their end; once more to leave at once"
                ));
            }
            self.step()?;
            #[cfg(test)]
            self.check_reserved();
            if self.progress.due() {
                let state = self.state();
                self.progress.show(&state);
            }
        }
    }

    /// Starts waiting jobs while there are slots and their worst case fits.
    fn admit(&mut self) -> Result<()> {
        let mut i = 0;
        while i < self.waiting.len().min(LOOK_AHEAD * self.parallel) && self.slots_taken() < self.parallel {
            let index = self.waiting[i];
            match self.start(index)? {
                Started::Yes => {
                    self.waiting.remove(i);
                    self.overtaken = if i == 0 { 0 } else { self.overtaken + 1 };
                }
                Started::Prefix => i += 1,
                Started::Again => {}
                // When nothing runs, prefixes that the first job does not need stand in its way.
                Started::Memory if i == 0 && self.active.is_empty() => match self.make_room(index) {
                    true => {}
                    false => self.refuse(i, index, "it needs more memory than the caches have: lower -np or max_tokens, or use -ctk q8_0 -ctv q8_0")?,
                },
                // Small jobs may pass a large one, but not for ever.
                Started::Memory if i == 0 && self.overtaken >= self.parallel => return Ok(()),
                Started::Memory => i += 1,
                Started::Never(what) => self.refuse(i, index, &what)?,
            }
        }
        Ok(())
    }

    fn refuse(&mut self, i: usize, index: usize, what: &str) -> Result<()> {
        self.waiting.remove(i);
        if i == 0 {
            self.overtaken = 0;
        }
        self.release(self.plan.jobs[index].prefix);
        self.end(index, Err(what.to_owned()))
    }

    /// Jobs without a result.
    #[must_use]
    pub fn left(&self) -> usize {
        self.waiting.len() + self.jobs_running()
    }

    /// The engine.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    fn jobs_running(&self) -> usize {
        self.active.iter().filter(|s| matches!(s.kind, Kind::Job(..))).count()
    }

    /// Jobs that run, and prefixes on their way: some job waits for each.
    fn slots_taken(&self) -> usize {
        self.active.len()
    }

    /// What is reserved for running sequences is there.
    #[cfg(test)]
    fn check_reserved(&self) {
        let reserved: usize = self.active.iter().map(|s| s.reserved).sum();
        let free = self.engine.free_pages();
        assert!(reserved <= free, "{reserved} pages are reserved, and {free} are free");
    }

    fn pages_left(&self) -> usize {
        self.engine.free_pages().saturating_sub(self.active.iter().map(|s| s.reserved).sum())
    }

    fn start(&mut self, index: usize) -> Result<Started> {
        let p = &self.plan.jobs[index];
        if p.worst() > self.engine.context() {
            let e = Error::ContextFull { needed: p.worst(), context: self.engine.context() };
            return Ok(Started::Never(format!("{e} (prompt and max_tokens together)")));
        }
        if let Some(i) = p.prefix
            && !self.shared[i].ready
        {
            return self.start_prefix(i);
        }
        let (p, shared) = (&self.plan.jobs[index], self.plan.shared(index));
        let reserved = pages_needed(p.worst(), shared);
        if reserved > self.pages_left() {
            return Ok(Started::Memory);
        }
        let answering = match self
            .constraint(index)
            .and_then(|c| Answering::new(&p.job, &p.tokens, &self.tokenizer, c))
        {
            Ok(a) => a,
            Err(e) if is_of_the_job(&e) => return Ok(Started::Never(e.to_string())),
            Err(e) => return Err(e),
        };
        let prefix = p.prefix;
        let seq = match prefix.and_then(|i| self.shared[i].seq) {
            Some(from) => self.engine.fork(from)?,
            None => self.engine.create()?,
        };
        self.progress.totals.reused += shared;
        self.release(prefix);
        let (mut at, mut reserved) = (shared, reserved);
        if prefix.is_none() && self.store.is_some() {
            // The last token runs in any case, for its logits.
            let tokens = self.plan.jobs[index].tokens.clone();
            at = self.read(seq, &tokens[..tokens.len() - 1], 0)?;
            reserved -= at.div_ceil(PAGE);
        }
        let mut answering = Box::new(answering);
        answering.set_reused(at);
        self.push(seq, Kind::Job(index, answering), at, reserved);
        #[cfg(test)]
        self.started.push(index);
        Ok(Started::Yes)
    }

    fn constraint(&self, index: usize) -> Result<Option<Box<dyn Constraint>>> {
        match (&self.plan.jobs[index].job.grammar, &self.compiler) {
            (Some(grammar), Some(compiler)) => Ok(Some(compiler.compile(grammar)?)),
            _ => Ok(None),
        }
    }

    fn start_prefix(&mut self, i: usize) -> Result<Started> {
        if self.shared[i].seq.is_some() {
            return Ok(Started::Prefix);
        }
        let parent = self.plan.prefixes[i].parent;
        if let Some(up) = parent
            && !self.shared[up].ready
        {
            return self.start_prefix(up);
        }
        let len = self.plan.prefixes[i].len;
        let below = len - self.plan.prefix_own(i);
        let kept = self.shared.iter().filter(|s| s.seq.is_some()).count();
        // A prefix that came from disk shares nothing with its parent.
        let from_disk = self.store.as_ref().and_then(|s| s.find(self.plan.prefix_tokens(i), below)).is_some();
        let mut reserved = pages_needed(len, if from_disk { 0 } else { below });
        if reserved > self.pages_left() || kept >= PREFIX_SLOTS {
            return Ok(Started::Memory);
        }
        let mut at = 0;
        let mut seq = None;
        if from_disk {
            let empty = self.engine.create()?;
            let tokens = self.plan.prefix_tokens(i).to_vec();
            at = self.read(empty, &tokens, below)?;
            match at {
                // It turned out to be damaged.
                0 if parent.is_some() => self.engine.free(empty),
                _ => seq = Some(empty),
            }
            reserved -= at.div_ceil(PAGE);
        }
        let seq = match (seq, parent.and_then(|up| self.shared[up].seq)) {
            (Some(seq), _) => seq,
            (None, Some(from)) => {
                at = below;
                self.progress.totals.reused += below;
                self.engine.fork(from)?
            }
            (None, None) => self.engine.create()?,
        };
        self.release(parent);
        self.shared[i].seq = Some(seq);
        self.push(seq, Kind::Prefix(i), at, reserved);
        if at == len {
            self.settle(vec![])?;
            return Ok(Started::Again);
        }
        Ok(Started::Prefix)
    }

    fn push(&mut self, seq: SeqId, kind: Kind, at: usize, reserved: usize) {
        self.admitted += 1;
        self.active.push(Sequence { seq, kind, at, start: at, token: None, age: self.admitted, reserved });
    }

    /// Reads the longest kept beginning of `tokens` into the empty `seq`, if it is longer than `least`.
    fn read(&mut self, seq: SeqId, tokens: &[u32], least: usize) -> Result<usize> {
        let (Some(store), progress) = (&mut self.store, &self.progress) else { return Ok(0) };
        let len = store.load(&mut self.engine, seq, tokens, least, &mut |text| progress.note(&text))?;
        self.progress.totals.read += len;
        Ok(len)
    }

    /// Pages that a sequence which has grown may still take; `None` while it holds only what it began with, of which a partly filled
    /// page is still to be copied.
    fn reserve(&self, s: &Sequence) -> Option<usize> {
        let len = self.engine.len(s.seq);
        let worst = match &s.kind {
            Kind::Prefix(i) => self.plan.prefixes[*i].len,
            Kind::Job(i, _) => self.plan.jobs[*i].worst(),
        };
        (len > s.start).then(|| worst.div_ceil(PAGE) - len.div_ceil(PAGE))
    }

    /// Frees prefixes that no running sequence needs, so that the first waiting job can run: first those that it does not need itself, then
    /// all, and it runs alone. Returns whether anything could be freed.
    fn make_room(&mut self, index: usize) -> bool {
        let mut needed = vec![];
        let mut next = self.plan.jobs[index].prefix;
        while let Some(i) = next {
            needed.push(i);
            next = self.plan.prefixes[i].parent;
        }
        let others: Vec<usize> =
            (0..self.shared.len()).filter(|i| self.shared[*i].seq.is_some() && !needed.contains(i)).collect();
        if others.is_empty() {
            if needed.is_empty() {
                return false;
            }
            self.plan.jobs[index].prefix = None;
            if let Some(shared) = needed.first().map(|&i| &mut self.shared[i]) {
                shared.users = shared.users.saturating_sub(1);
            }
        }
        for i in if others.is_empty() { needed } else { others } {
            self.shared[i].ready = false;
            if let Some(seq) = self.shared[i].seq.take() {
                self.engine.free(seq);
            }
        }
        true
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
        let started = Instant::now();
        let max_rows = self.engine.spec().max_rows;
        let plan: Vec<Active> =
            self.active.iter().map(|s| Active { prompt_left: self.target(s) - s.at, age: s.age }).collect();
        let (mut batch, mut outputs, mut grown) = (vec![], vec![], vec![]);
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
            grown.push((i, n));
        }
        let vocab = self.engine.model().config.vocab;
        let drawn = self.draw(&batch, &outputs)?;
        let logits = if drawn.is_none() { self.engine.run(&batch)? } else { &[] };
        for &(i, n) in &grown {
            self.active[i].at += n;
        }
        // Sampling is small for one sequence, and not for many over a large vocabulary.
        let (tokenizer, mut next) = (&*self.tokenizer, 0);
        let mut work = vec![];
        for (i, s) in self.active.iter_mut().enumerate() {
            if outputs.get(next) == Some(&i)
                && let Kind::Job(_, answering) = &mut s.kind
            {
                let given = match &drawn {
                    Some(tokens) => Given::Token(tokens[next]),
                    None => Given::Logits(&logits[next * vocab..(next + 1) * vocab]),
                };
                work.push((i, answering, given));
                next += 1;
            }
        }
        let sample = |(i, answering, given): (usize, &mut Box<Answering>, Given<'_>)| {
            let before = answering.generated();
            let next = match given {
                Given::Token(token) => answering.drawn(token, tokenizer),
                Given::Logits(logits) => answering.next(logits, tokenizer),
            };
            (i, next, answering.generated() - before)
        };
        let said: Vec<_> = if work.len() * vocab < PARALLEL_SAMPLING {
            work.into_iter().map(sample).collect()
        } else {
            work.into_par_iter().map(sample).collect()
        };
        let (mut ended, mut generated) = (vec![], 0);
        for (i, next, more) in said {
            generated += more;
            match next {
                Ok(Next::Token(token)) => self.active[i].token = Some(token),
                Ok(Next::Done(reason)) => ended.push((i, Ok(reason))),
                Err(e) if is_of_the_job(&e) => ended.push((i, Err(e.to_string()))),
                Err(e) => return Err(e),
            }
        }
        self.progress.step(grown.iter().map(|(_, n)| n).sum(), generated, started.elapsed());
        self.settle(ended)
    }

    /// Runs the micro-batch with the tokens of all its answers drawn where the model runs; `None` when a job's sampling wants the logits, or
    /// when a job's logits are broken, which concerns that job alone.
    fn draw(&mut self, batch: &[Row], outputs: &[usize]) -> Result<Option<Vec<u32>>> {
        let plan = |&i: &usize| match &self.active[i].kind {
            Kind::Job(_, answering) => answering.plan(),
            Kind::Prefix(_) => None,
        };
        let Some(draws) = outputs.iter().map(plan).collect::<Option<Vec<_>>>() else { return Ok(None) };
        match self.engine.run_drawn(batch, &draws) {
            Ok(tokens) => Ok(Some(tokens)),
            Err(Error::Sampler(_)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn target(&self, s: &Sequence) -> usize {
        match &s.kind {
            Kind::Prefix(i) => self.plan.prefixes[*i].len,
            Kind::Job(i, _) => self.plan.jobs[*i].tokens.len(),
        }
    }

    fn tokens(&self, s: &Sequence) -> &[u32] {
        match &s.kind {
            Kind::Prefix(i) => self.plan.prefix_tokens(*i),
            Kind::Job(i, _) => &self.plan.jobs[*i].tokens,
        }
    }

    /// Takes out what has ended, and counts what the others may still take.
    fn settle(&mut self, ended: Vec<(usize, Result<FinishReason, String>)>) -> Result<()> {
        let mut results = vec![];
        for (i, reason) in ended.into_iter().rev() {
            let s = self.active.remove(i);
            self.engine.free(s.seq);
            if let Kind::Job(index, answering) = s.kind {
                let outcome = reason.map(|reason| answering.finish(reason, self.with_timings));
                results.push((index, outcome));
            }
        }
        for (index, outcome) in results.into_iter().rev() {
            self.end(index, outcome)?;
        }
        let mut i = 0;
        while i < self.active.len() {
            let s = &self.active[i];
            if let Kind::Prefix(p) = s.kind
                && s.at == self.target(s)
            {
                let s = self.active.remove(i);
                self.shared[p].ready = true;
                self.save(&s);
                continue;
            }
            if let Some(reserved) = self.reserve(s) {
                self.active[i].reserved = reserved;
            }
            i += 1;
        }
        Ok(())
    }

    fn end(&mut self, index: usize, outcome: Result<Outcome, String>) -> Result<()> {
        let job = &self.plan.jobs[index].job;
        (self.sink)(job, &outcome)?;
        self.progress.job(&job.id, outcome.as_ref().err().map(String::as_str));
        // A large prompt is not needed any more.
        if !self.plan.prefixes.iter().any(|p| p.prompt == index) {
            self.plan.jobs[index].tokens = vec![];
        }
        Ok(())
    }

    /// Keeps the prompt tokens of a sequence in the cache folder.
    fn save(&mut self, s: &Sequence) {
        let tokens = self.tokens(s)[..s.at].to_vec();
        let (Some(store), progress) = (&mut self.store, &self.progress) else { return };
        if tokens.len() >= LEAST_PREFIX && self.engine.len(s.seq) == tokens.len() {
            store.save(&mut self.engine, s.seq, &tokens, &mut |text| progress.note(&text));
        }
    }

    /// Keeps the prompts that are on their way.
    fn save_all(&mut self) {
        for s in std::mem::take(&mut self.active) {
            if s.token.is_none() && s.at > s.start {
                self.save(&s);
            }
            self.active.push(s);
        }
    }

    fn state(&self) -> State {
        let own = |i: &usize| self.plan.jobs[*i].tokens.len().saturating_sub(self.plan.shared(*i));
        let unbuilt =
            (0..self.shared.len()).filter(|&i| self.shared[i].seq.is_none() && self.shared[i].users > 0);
        let active = self.active.iter().map(|s| self.target(s).saturating_sub(s.at)).sum::<usize>();
        let answers = |i: usize| self.plan.jobs[i].job.max_tokens;
        let running = self.active.iter().filter_map(|s| match &s.kind {
            Kind::Job(i, answering) => Some(answers(*i) - answering.generated().min(answers(*i))),
            Kind::Prefix(_) => None,
        });
        let used = self.engine.spec().n_pages - self.engine.free_pages();
        State {
            running: self.jobs_running(),
            waiting: self.waiting.len(),
            prompt_left: active
                + self.waiting.iter().map(own).sum::<usize>()
                + unbuilt.map(|i| self.plan.prefix_own(i)).sum::<usize>(),
            answers_left: running
                .chain(self.waiting.iter().map(|&i| answers(i)))
                .fold(0, usize::saturating_add),
            memory: (used * PAGE) as u64 * self.row_bytes,
        }
    }
}

/// Logits from which sampling is shared by all cores.
const PARALLEL_SAMPLING: usize = 1 << 18;

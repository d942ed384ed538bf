//! `clsa batch`: a file of jobs in, a file of results out; killed at any moment it goes on where it was.
use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Args;
use ggml_kernels::cuda;
use ggml_kernels::simd::Level;
use indicatif::HumanDuration;

use super::grammar::GrammarArgs;
use super::human_bytes;
use super::model::{Device, ModelArgs};
use super::sampling::SamplingArgs;
use crate::backend;
use crate::batch::estimate::{Rates, measure};
use crate::batch::job::{BadLine, Defaults, Documents, Job, name, parse};
use crate::batch::plan::Plan;
use crate::batch::progress::{Progress, Show};
use crate::batch::results::Results;
use crate::batch::runner::Runner;
use crate::batch::store::Store;
use crate::cache::PAGE;
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Model;
use crate::placement;
use crate::sampler::GrammarCompiler;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Arguments of `clsa batch`.
#[derive(Debug, Args)]
pub struct BatchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Jobs, one JSON object a line: OpenAI batch lines, or {"id", "prompt" or "messages", "documents", "params", "max_tokens",
    /// "stop", "response_format" or "json_schema" or "grammar"}
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,
    /// Results, appended as jobs end; jobs that it has are not done again
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Write results in the order of the jobs; those that end early wait in FILE.early
    #[arg(long)]
    ordered: bool,
    /// Sequences at a time (-np): a number, or auto: as many as memory and the micro-batch allow, at most 32
    #[arg(long, value_name = "N", default_value = "auto", value_parser = parallel)]
    parallel: usize,
    /// Tokens to generate for jobs that do not say
    #[arg(short = 'n', long, value_name = "N", default_value_t = 512)]
    n_predict: usize,
    /// Results depend on nothing but their jobs, to the last bit. Where kernels differ with the number of rows (on a GPU, or with AMX)
    /// that means one job at a time without shared prefixes; elsewhere it is so anyway
    #[arg(long)]
    deterministic: bool,
    /// Keep shared prefixes and documents in this folder for later runs
    #[arg(long, env = "CLSA_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Bytes that the folder may take, with K, M, G or T; what was not used for longest goes
    #[arg(long, env = "CLSA_CACHE_SIZE", value_name = "BYTES", default_value = "16G", value_parser = size)]
    cache_size: u64,
    /// Leave times out of the results, so that equal jobs give equal files
    #[arg(long)]
    no_timings: bool,
    /// Count jobs, tokens, shared prefixes and memory, estimate the time by a short measurement, and do no job
    #[arg(long)]
    dry_run: bool,
    /// No progress and no summary
    #[arg(long)]
    quiet: bool,
    /// Progress and summary as JSON lines on standard error
    #[arg(long, conflicts_with = "quiet")]
    log_json: bool,
    #[command(flatten)]
    grammar: GrammarArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

fn parallel(text: &str) -> Result<usize, String> {
    match text {
        "auto" => Ok(0),
        n => n.parse().map_err(|_| format!("expected a number or auto, found {n:?}")),
    }
}

/// Bytes with an optional binary unit.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        unit => return Err(format!("unknown unit {unit:?}: expected K, M, G or T")),
    };
    let n: u64 = digits.parse().map_err(|_| format!("expected a number of bytes, found {text:?}"))?;
    n.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than there can be"))
}

/// Runs `clsa batch`.
///
/// # Errors
/// Those of files, the model and the engine; [`Error::Interrupted`] with what is done kept.
pub fn run(args: &BatchArgs) -> Result<()> {
    let (finish, leave) = interrupt::graded()?;
    let text = std::fs::read_to_string(&args.input).map_err(|e| match e.kind() {
        ErrorKind::NotFound => Error::Input(format!("{}: no such file", args.input.display())),
        ErrorKind::InvalidData => Error::Input(format!("{}: not UTF-8 text", args.input.display())),
        _ => Error::Io { path: args.input.clone(), source: e },
    })?;
    let names = args.names(&text)?;
    let alone = args.alone()?;
    let model = args.model.open()?;
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model.file)?);
    // One for all jobs: what is wrong with it must not become the result of each.
    if let Some(grammar) = args.grammar.grammar()? {
        GrammarCompiler::new(&tokenizer)?.compile(&grammar)?;
    }
    // Only jobs with messages need one; they say so when it is missing or broken.
    let template = ChatTemplate::from_gguf(&model.file, &tokenizer);
    let results = Results::open(&args.output, args.ordered.then(|| names.clone()))?;
    let (jobs, bad) = args.read(&text, &names, &model, &results)?;
    drop(text);
    let finished = names.len() - jobs.len() - bad.len();
    let (plan, failed) =
        Plan::new(jobs, &tokenizer, &template, model.config.vocab, !alone, args.cache_dir.is_some());
    let (later, mut bad): (Vec<_>, Vec<_>) = bad.into_iter().partition(|b| b.later);
    bad.extend(failed.into_iter().map(|(job, what)| BadLine {
        id: job.id,
        form: job.form,
        what,
        later: false,
    }));
    if args.dry_run {
        return args.describe(&model, &plan, bad.len() + later.len(), finished, leave);
    }
    args.note(&plan, finished, bad.len());
    args.work(&model, tokenizer, plan, results, &bad, (&finish, leave))?;
    match later.first() {
        None => Ok(()),
        Some(BadLine { id, what, .. }) => Err(Error::Runtime(format!(
            "{} jobs were not done, the first one, \"{id}\", for {what}; the same command then goes on with them",
            later.len()
        ))),
    }
}

impl BatchArgs {
    /// Whether each job must run alone to give the bits that it gives alone.
    ///
    /// # Errors
    /// [`Error::Input`] when that contradicts other arguments.
    fn alone(&self) -> Result<bool> {
        let gpu = match &self.model.device {
            Device::Cuda(_) => true,
            Device::Auto => backend::cuda::availability().is_ok(),
            Device::Cpu | Device::Reference => false,
        };
        let amx = !matches!(self.model.device, Device::Reference) && Level::chosen() == Ok(Level::Amx);
        if !self.deterministic || !(gpu || amx) {
            return Ok(false);
        }
        let (here, other) = match gpu {
            true => ("on a GPU", "use --device cpu"),
            false => ("with AMX", "set CLSA_SIMD=avx512"),
        };
        if self.parallel > 1 {
            return Err(Error::Input(format!(
                "--deterministic is one job at a time {here}, where products of few and of many rows differ in their last bits, and -np \
                 is {}: leave one of the two out, or {other}",
                self.parallel
            )));
        }
        if let Some(folder) = &self.cache_dir {
            return Err(Error::Input(format!(
                "--deterministic {here} takes no prompts from {}: continued from there, they are cut into other micro-batches, whose \
                 products differ in their last bits: leave --cache-dir (or CLSA_CACHE_DIR) out, or {other}",
                folder.display()
            )));
        }
        Ok(true)
    }

    /// The ids of all lines.
    fn names(&self, text: &str) -> Result<Vec<String>> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let (mut names, mut seen) = (vec![], HashSet::new());
        for (i, line) in lines {
            let id = name(line, i + 1);
            if !seen.insert(id.clone()) {
                return Err(Error::Input(format!(
                    "{}: line {}: the id \"{id}\" stands there before: ids must differ",
                    self.input.display(),
                    i + 1
                )));
            }
            names.push(id);
        }
        Ok(names)
    }

    /// The jobs without a result yet, and the bad lines among those.
    fn read(
        &self,
        text: &str,
        names: &[String],
        model: &Model,
        results: &Results,
    ) -> Result<(Vec<Job>, Vec<BadLine>)> {
        let defaults = Defaults {
            params: self.sampling.params(&model.file)?,
            max_tokens: self.n_predict,
            grammar: self.grammar.grammar()?,
            folder: self.input.parent().map_or_else(PathBuf::new, PathBuf::from),
        };
        let (mut jobs, mut bad, mut documents) = (vec![], vec![], Documents::new());
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        for ((i, line), _) in lines.zip(names).filter(|(_, id)| !results.has(id)) {
            match parse(line, i + 1, &defaults, &mut documents) {
                Ok(job) => jobs.push(job),
                Err(b) => bad.push(b),
            }
        }
        Ok((jobs, bad))
    }

    /// Says what is known before the first job runs, beside the number of jobs.
    fn note(&self, plan: &Plan, finished: usize, bad: usize) {
        if self.quiet || self.log_json {
            return;
        }
        let output = self.output.display();
        if bad > 0 {
            eprintln!("note: {bad} lines are no jobs that can be done: their results in {output} say why");
        }
        match plan.jobs.len() {
            0 if finished > 0 => {
                eprintln!("note: nothing is left to do: {finished} jobs have their results in {output}")
            }
            left if finished > 0 => {
                eprintln!("note: {finished} jobs have their results in {output}, {left} are left")
            }
            _ => {}
        }
    }

    /// Does the jobs; when that fails nothing is lost, and what to do is said.
    fn work(
        &self,
        model: &Model,
        tokenizer: Arc<Tokenizer>,
        plan: Plan,
        mut results: Results,
        bad: &[BadLine],
        (finish, leave): (&AtomicBool, Arc<AtomicBool>),
    ) -> Result<()> {
        for BadLine { id, form, what, .. } in bad {
            results.push(id, *form, &Err(what.clone())).inspect_err(|e| self.remedy(e))?;
        }
        if plan.jobs.is_empty() {
            return results.close(true);
        }
        let (engine, _) = self.engine(model, &plan, leave)?;
        let store = match &self.cache_dir {
            Some(folder) => Some(Store::open(folder, self.cache_size, &engine)?),
            None => None,
        };
        let show = match (self.quiet, self.log_json) {
            (true, _) => Show::Nothing,
            (false, true) => Show::Json,
            (false, false) => Show::Person,
        };
        let progress = Progress::new(show, plan.jobs.len());
        let mut sink = |job: &Job, outcome: &_| results.push(&job.id, job.form, outcome);
        let mut runner = Runner::new(engine, tokenizer, plan, store, progress, !self.no_timings, &mut sink)?;
        let ran = runner.run(finish);
        let left = runner.left();
        drop(runner);
        match ran {
            Ok(0) => results.close(true).inspect_err(|e| self.remedy(e)),
            Ok(_) | Err(Error::Interrupted) => {
                results.close(false)?;
                eprintln!("{left} jobs are left: the same command goes on with them");
                Err(Error::Interrupted)
            }
            Err(e) => {
                self.remedy(&e);
                Err(e)
            }
        }
    }

    /// What to do about an error that ended the run.
    fn remedy(&self, e: &Error) {
        let what = match e {
            Error::Io { source, .. } => match source.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                    "make room on that disk"
                }
                _ => "see to that file",
            },
            Error::Memory { .. } => "lower -np, -ub or -c, or use -ctk q8_0 -ctv q8_0",
            _ => "see to that",
        };
        eprintln!(
            "stopped: the results so far are in {}; {what}, then the same command goes on",
            self.output.display()
        );
    }

    /// An engine for the plan, and how many jobs it runs at a time.
    fn engine(&self, model: &Model, plan: &Plan, leave: Arc<AtomicBool>) -> Result<(Engine, usize)> {
        let context = match self.model.ctx_size {
            0 => model.config.context_length,
            n => n,
        };
        let base = self.base(model, context);
        let mut n = match (self.alone()?, self.parallel) {
            (true, _) => 1,
            (false, 0) => plan.parallel(context, &base, &model.config, self.budget(model)),
            (false, n) => n.min(base.max_rows),
        };
        loop {
            match self.model.engine(model, &plan.sized(n, context, &base), Arc::clone(&leave)) {
                // What the device needs beside the caches was not known: fewer sequences may do.
                Err(Error::Memory { .. }) if self.parallel == 0 && n > 1 => n -= n.div_ceil(4),
                engine => return Ok((engine?, n)),
            }
        }
    }

    /// What does not depend on the plan.
    fn base(&self, model: &Model, context: usize) -> Options {
        // A context that is given is not worked out from the free memory.
        ModelArgs { ctx_size: context, ..self.model.clone() }.options(model, 1)
    }

    /// Bytes that caches may take.
    fn budget(&self, model: &Model) -> u64 {
        let gpu = match &self.model.device {
            Device::Cuda(_) => true,
            Device::Auto => backend::cuda::availability().is_ok(),
            Device::Cpu | Device::Reference => false,
        };
        let free = gpu.then(|| cuda::Device::open(0).and_then(|d| d.memory()).ok()).flatten();
        match free {
            // Scratch memory is not known before: see `engine`.
            Some((free, _)) => (free as u64).saturating_sub(model.file.len() as u64) / 10 * 9,
            None => placement::free_memory() / 2,
        }
    }

    fn describe(
        &self,
        model: &Model,
        plan: &Plan,
        bad: usize,
        finished: usize,
        leave: Arc<AtomicBool>,
    ) -> Result<()> {
        let (prompt, run, answers) = plan.totals();
        eprintln!("jobs       {} to do, {finished} done before, {bad} that cannot be done", plan.jobs.len());
        eprintln!("tokens     {prompt} in prompts, at most {answers} in answers");
        eprintln!("prefixes   {} shared, which leaves {run} prompt tokens to run", plan.prefixes.len());
        if plan.jobs.is_empty() {
            return Ok(());
        }
        let (mut engine, n) = self.engine(model, plan, leave)?;
        let spec = *engine.spec();
        let bytes = placement::cache_bytes(&model.config, &spec);
        eprintln!("sequences  {n} at a time, {} positions in all", spec.n_pages * PAGE);
        eprintln!("memory     {} for caches, on {}", human_bytes(bytes), engine.backend().describe());
        let Rates { prefill, decode, sequences, depth } = measure(&mut engine, n, prompt / plan.jobs.len())?;
        eprintln!(
            "measured   {prefill:.0} prompt tokens/s; {decode:.0} tokens/s by {sequences} sequences after {depth} tokens"
        );
        let seconds = (run as f64 / prefill + answers as f64 / decode).min(1e9);
        eprintln!(
            "time       at most about {} ({seconds:.0} s), by that short measurement",
            HumanDuration(Duration::from_secs_f64(seconds))
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_numbers_of_sequences() {
        assert_eq!((size("0"), size("12"), size("3k")), (Ok(0), Ok(12), Ok(3 << 10)));
        assert_eq!((size("16G"), size("1TiB"), size("7mb")), (Ok(16 << 30), Ok(1 << 40), Ok(7 << 20)));
        for bad in ["", "G", "1X", "-1", "1.5G", "99999999999T"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!((parallel("auto"), parallel("8")), (Ok(0), Ok(8)));
        assert!(parallel("many").is_err());
    }
}

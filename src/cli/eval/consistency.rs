//! `clsa eval batch-consistency`.
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

use super::perplexity::read_tokens;
use super::results::ResultArgs;
use crate::cli::count_bar;
use crate::cli::model::{Device, ModelArgs};
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};
use crate::eval::consistency::{Agreement, Trace, alone, baseline, forked, restored, together};
use crate::eval::ruler::generated_prose;
use crate::interrupt;
use crate::model::Model;
use crate::tokenizer::Tokenizer;

/// Arguments of `clsa eval batch-consistency`.
#[derive(Debug, Args)]
pub struct ConsistencyArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text that prompts are cut from; generated sentences without it
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens of each prompt
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "16,128,384,768")]
    lengths: Vec<usize>,
    /// Tokens to generate after each prompt
    #[arg(short = 'n', long, value_name = "N", default_value_t = 16)]
    n_predict: usize,
    /// Prompts at a time (-np) to compare with one
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "2,4")]
    parallel: Vec<usize>,
    /// Rows of micro-batches to compare with -ub
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "7,64,256")]
    chunks: Vec<usize>,
    /// Numbers of threads to compare with -t
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2")]
    thread_counts: Vec<usize>,
    /// Devices to compare with --device; reference needs -ctk f32 -ctv f32
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    devices: Vec<Device>,
    /// Difference of a logit that is still agreement
    #[arg(long, value_name = "X", default_value_t = TOLERANCE, value_parser = tolerance)]
    tolerance: f64,
    /// Prompts at most, for a quick look
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    #[command(flatten)]
    results: ResultArgs,
}

/// What sums in another order may come to, in logits, with activations rounded to bf16 (AMX) or f16 (GPUs): twice what was measured
/// (docs/evaluation.md).
const TOLERANCE: f64 = 0.1;

fn tolerance(text: &str) -> Result<f64, String> {
    let parsed = text.parse().ok().filter(|x: &f64| x.is_finite() && *x >= 0.0);
    parsed.ok_or_else(|| format!("found '{text}', expected a number from 0 on"))
}

/// A way to run the prompts.
#[derive(Clone, Debug)]
enum Way {
    /// Alone again, with nothing changed.
    Again,
    Parallel(usize),
    Chunks(usize),
    Threads(usize),
    Device(Device),
    Forked,
    Restored,
}

impl Way {
    fn name(&self) -> String {
        match self {
            Self::Again => "once more".into(),
            Self::Parallel(n) => format!("-np {n}"),
            Self::Chunks(n) => format!("-ub {n}"),
            Self::Threads(n) => format!("-t {n}"),
            Self::Device(d) => format!("--device {d}"),
            Self::Forked => "in a forked sequence".into(),
            Self::Restored => "from a saved session".into(),
        }
    }
}

/// Runs `clsa eval batch-consistency`.
///
/// # Errors
/// Those of the model and the engine; [`Error::Runtime`], after the table, when a way differs beyond the tolerance.
pub fn run(args: &ConsistencyArgs) -> Result<()> {
    let model = args.model.open()?;
    let prompts = args.prompts(&model)?;
    let settings = json!({
        "prompts": format!("{:016x}", xxh3_64(&prompts.iter().flatten().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())),
        "lengths": prompts.iter().map(Vec::len).collect::<Vec<_>>(),
        "tokens": args.n_predict,
        "routing": args.model.routing.first().map(ToString::to_string),
        "k": args.model.top_k_tokens,
        "caches": format!("{:?} {:?}", args.model.cache_type_k, args.model.cache_type_v),
        "device": format!("{:?}", args.model.device).to_lowercase(),
        "threads": args.model.threads(),
        "ubatch": args.model.ubatch_size,
    });
    let mut state = args.results.state(&model, "batch-consistency", settings.clone())?;
    let stop = interrupt::requested()?;
    let ways = args.ways();
    let mut traces: Option<Vec<Trace>> = None;
    let mut found: Vec<(String, Agreement)> = vec![];
    let bar = count_bar("batch-consistency", "ways");
    bar.set_length(ways.len() as u64);
    for way in ways {
        let name = way.name();
        let agreement = match state.get::<Agreement>(&name)? {
            Some(agreement) => agreement,
            None => {
                interrupt::check(&stop)?;
                let on = |changed: &ModelArgs, n_seq: usize| -> Result<Engine> {
                    changed.engine(&model, &args.options(&model, changed, n_seq), Arc::clone(&stop))
                };
                let traces = match &mut traces {
                    Some(traces) => traces,
                    none => none.insert(baseline(&mut on(&args.model, 1)?, &prompts, args.n_predict)?),
                };
                state.push(&name, &compare(args, &way, traces, on)?)?
            }
        };
        found.push((name, agreement));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let within = |(_, a): &&(String, Agreement)| a.within(args.tolerance);
    let of_way = |f: &(String, Agreement)| {
        let mut value = json!(f.1);
        value["way"] = json!(f.0);
        value["within_tolerance"] = json!(within(&f));
        value
    };
    let result = json!({
        "evaluation": "batch-consistency",
        "settings": settings,
        "tolerance": args.tolerance,
        "ways": found.iter().map(of_way).collect::<Vec<_>>(),
    });
    args.results.report(&result, |out| table(out, args, &prompts, &found))?;
    match found.iter().find(|f| !within(f)) {
        None => Ok(()),
        Some((name, a)) => Err(Error::Runtime(format!(
            "{name}: a logit differs by {:.3e}, the tolerance is {:.3e} (--tolerance)",
            a.largest, args.tolerance
        ))),
    }
}

fn compare(
    args: &ConsistencyArgs,
    way: &Way,
    traces: &[Trace],
    on: impl Fn(&ModelArgs, usize) -> Result<Engine>,
) -> Result<Agreement> {
    let same = || args.model.clone();
    match way.clone() {
        Way::Again => alone(&mut on(&same(), 1)?, traces),
        Way::Parallel(n) => together(&mut on(&same(), n)?, traces),
        Way::Chunks(n) => alone(&mut on(&ModelArgs { ubatch_size: n, ..same() }, 1)?, traces),
        Way::Threads(n) => alone(&mut on(&ModelArgs { threads: n, ..same() }, 1)?, traces),
        Way::Device(device) => alone(&mut on(&ModelArgs { device, ..same() }, 1)?, traces),
        Way::Forked => forked(&mut on(&same(), 2)?, traces),
        Way::Restored => {
            let io = |source| Error::Io { path: std::env::temp_dir(), source };
            let folder = tempfile::tempdir().map_err(io)?;
            restored(|| on(&same(), 1), folder.path(), traces)
        }
    }
}

impl ConsistencyArgs {
    fn ways(&self) -> Vec<Way> {
        let mut ways = vec![Way::Again];
        ways.extend(self.parallel.iter().map(|n| Way::Parallel(*n)));
        ways.extend(self.chunks.iter().map(|n| Way::Chunks(*n)));
        let threads = self.model.threads();
        ways.extend(self.thread_counts.iter().filter(|n| **n != threads).map(|n| Way::Threads(*n)));
        ways.extend(self.devices.iter().map(|d| Way::Device(d.clone())));
        ways.extend([Way::Forked, Way::Restored]);
        ways
    }

    fn prompts(&self, model: &Model) -> Result<Vec<Vec<u32>>> {
        let lists = [
            ("--parallel", &self.parallel),
            ("--chunks", &self.chunks),
            ("--thread-counts", &self.thread_counts),
            ("--lengths", &self.lengths),
        ];
        if let Some((flag, _)) = lists.iter().find(|(_, list)| list.contains(&0)) {
            return Err(Error::Input(format!("{flag}: found 0, expected numbers from 1 on")));
        }
        if self.n_predict == 0 {
            return Err(Error::Input("-n 0: nothing to compare: generate at least one token".into()));
        }
        let lengths = &self.lengths[..self.limit.unwrap_or(usize::MAX).min(self.lengths.len())];
        let needed: usize = lengths.iter().sum();
        let tokens = match &self.file {
            Some(file) => read_tokens(model, file)?,
            // A sentence has more tokens than ten.
            None => Tokenizer::from_gguf(&model.file)?.encode(&generated_prose(needed / 10 + 1), false)?,
        };
        if tokens.len() < needed || needed == 0 {
            return Err(Error::Input(format!(
                "the text has {} tokens, prompts of {lengths:?} need {needed}: give more text or smaller --lengths",
                tokens.len()
            )));
        }
        let mut rest = tokens.as_slice();
        let mut cut = |n: usize| {
            let (prompt, after) = rest.split_at(n);
            rest = after;
            prompt.to_vec()
        };
        Ok(lengths.iter().map(|n| cut(*n)).collect())
    }

    fn options(&self, model: &Model, on: &ModelArgs, n_seq: usize) -> Options {
        let mut options = on.options(model, n_seq);
        options.context = self.lengths.iter().max().unwrap_or(&1) + self.n_predict;
        options
    }
}

fn table(
    out: &mut dyn Write,
    args: &ConsistencyArgs,
    prompts: &[Vec<u32>],
    found: &[(String, Agreement)],
) -> io::Result<()> {
    let lengths: Vec<_> = prompts.iter().map(|p| p.len().to_string()).collect();
    writeln!(
        out,
        "prompts of {} tokens, {} tokens after each; against one at a time, -t {}",
        lengths.join(", "),
        args.n_predict,
        args.model.threads()
    )?;
    writeln!(out)?;
    writeln!(
        out,
        "| way                  | same tokens | largest difference | first other token    | within {:<7} |",
        args.tolerance
    )?;
    writeln!(
        out,
        "|:---------------------|------------:|-------------------:|:---------------------|:---------------|"
    )?;
    for (name, a) in found {
        let first = a
            .first_difference
            .map_or_else(|| "none".to_owned(), |(p, i)| format!("prompt {}, token {}", p + 1, i + 1));
        let largest = if a.unequal == 0 { "0, bit for bit".to_owned() } else { format!("{:.3e}", a.largest) };
        let verdict = if a.within(args.tolerance) { "yes" } else { "NO" };
        writeln!(
            out,
            "| {name:<20} | {:>11} | {largest:>18} | {first:<20} | {verdict:<14} |",
            format!("{}/{}", a.same, a.tokens)
        )?;
    }
    Ok(())
}

//! `clsa eval perplexity`.
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use ggml_kernels::llama::run::{Llama, Params};
use ggml_kernels::quant::Type;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::backend::Routing;
use crate::cache::CacheType;
use crate::cli::model::ModelArgs;
use crate::cli::{stdout_error, token_bar};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::eval::Mean;
use crate::eval::base::{Reader, Writer};
use crate::eval::divergence::{self, Divergence, Position};
use crate::eval::perplexity::{CrossEntropy, Windows, loss, run_window};
use crate::eval::state::State;
use crate::interrupt;
use crate::model::Model;
use crate::session::model_hash;
use crate::tokenizer::Tokenizer;

/// Arguments of `clsa eval perplexity`.
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text; not needed with --kl, whose file has the tokens
    #[arg(short, long, value_name = "FILE", required_unless_present = "kl")]
    file: Option<PathBuf>,
    /// Windows (of -c tokens each, 2048 without it) at most, for a quick look; more later go on with the same --state
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Score only the last N positions of each window, not its second half: quick at great depths
    #[arg(long, value_name = "N", conflicts_with_all = ["kl_base", "kl"], value_parser = clap::value_parser!(u32).range(1..))]
    score_last: Option<u32>,
    /// Save this model's logits as a reference
    #[arg(long, value_name = "FILE", conflicts_with = "kl")]
    kl_base: Option<PathBuf>,
    /// Compare with a reference that --kl-base saved
    #[arg(long, value_name = "FILE")]
    kl: Option<PathBuf>,
    /// Keep finished windows here; the same command goes on with the others
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Run llama.cpp itself instead, on the CPU (llama and qwen3 files)
    #[arg(long, conflicts_with = "routing")]
    peer: bool,
    /// Print one JSON object for each mode
    #[arg(long)]
    json: bool,
}

/// Positions of a window without -c.
const WINDOW: usize = 2048;

/// Runs `clsa eval perplexity`: each mode of `--routing`, the first one being the base of the differences.
///
/// # Errors
/// Those of the model and the engine; [`Error::Interrupted`].
pub fn run(args: &PerplexityArgs) -> Result<()> {
    let model = args.model.open()?;
    let modes = args.model.routings();
    if modes.len() > 1 && args.kl_base.is_some() {
        return Err(Error::Input("--kl-base saves the logits of one routing mode: give one".into()));
    }
    if args.limit == Some(0) {
        return Err(Error::Input("--limit 0: nothing to measure: give at least one window".into()));
    }
    let base = args.kl.as_deref().map(|path| Reader::open(path, model.config.vocab)).transpose()?;
    let last = args.score_last.map(|n| n as usize);
    let cut = match &base {
        Some(base) => base.cut(),
        None => Windows {
            len: if args.model.ctx_size == 0 { WINDOW } else { args.model.ctx_size },
            limit: None,
            last,
        },
    };
    if cut.len < 4 {
        return Err(Error::Input(format!("-c {}: a window needs at least 4 tokens", cut.len)));
    }
    let tokens = match (&base, &args.file) {
        (Some(base), _) => base.windows.concat(),
        (None, Some(file)) => read_tokens(&model, file)?,
        (None, None) => vec![],
    };
    // A state is of the whole text, so that a limit can grow.
    let mut windows = cut.cut(&tokens)?;
    let mut state = State::open(args.state.as_deref(), &args.settings(&model, cut, &windows))?;
    windows.truncate(args.limit.unwrap_or(usize::MAX));
    if !state.is_empty() {
        eprintln!("{} windows are done already", state.len());
    }
    let mut first: Option<Results> = None;
    for mode in modes {
        let results = args.mode(&model, mode, cut, &windows, &mut state)?;
        args.print(&results, cut, first.as_ref()).map_err(stdout_error)?;
        first.get_or_insert(results);
    }
    Ok(())
}

/// The tokens of a text file.
///
/// # Errors
/// [`Error::Io`]; those of the tokenizer.
pub fn read_tokens(model: &Model, file: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(file).map_err(|source| Error::Io { path: file.to_owned(), source })?;
    Ok(Tokenizer::from_gguf(&model.file)?.encode(&text, false)?)
}

/// What one window gave.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Window {
    losses: Vec<f64>,
    compared: Vec<Position>,
}

/// What one mode gave.
struct Results {
    routing: String,
    windows: Vec<Window>,
}

/// What runs the windows.
enum Runner {
    Ours(Box<Engine>),
    LlamaCpp(Llama),
}

impl Runner {
    /// Hands the logits of every scored position to `score`.
    fn window(
        &mut self,
        window: &[u32],
        first: usize,
        mut score: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Ours(engine) => run_window(engine, window, first, score),
            Self::LlamaCpp(llama) => {
                llama.clear();
                let mut failed = None;
                let scored = |p: usize| p >= first && p + 1 < window.len();
                let done = llama.decode_all(window, scored, |p, logits| {
                    if failed.is_none() {
                        failed = score(p, logits).err();
                    }
                });
                done.map_err(|e| Error::Runtime(format!("llama.cpp: {e}")))?;
                failed.map_or(Ok(()), Err)
            }
        }
    }
}

impl PerplexityArgs {
    /// What a state file is bound to.
    fn settings(&self, model: &Model, cut: Windows, windows: &[&[u32]]) -> Map<String, Value> {
        let mut text = xxhash_rust::xxh3::Xxh3::new();
        windows.iter().flat_map(|w| w.iter()).for_each(|t| text.update(&t.to_le_bytes()));
        let caches = [self.model.cache_type_k, self.model.cache_type_v].map(|t| format!("{t:?}"));
        // A reference is told from another by its size and its name: its tokens are part of the text.
        let base = self.kl.as_ref().map(|path| {
            let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
            format!("{} ({bytes} bytes)", path.display())
        });
        let settings = json!({
            "command": "perplexity",
            "model": model_hash(&model.file),
            "text": format!("{:032x}", text.digest128()),
            "window": cut.len,
            "first": cut.first(),
            "caches": caches,
            "top_k": self.model.top_k_tokens,
            "peer": self.peer,
            "kl": base,
            "kl_base": self.kl_base,
        });
        match settings {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    fn runner(&self, model: &Model, mode: Option<Routing>, len: usize) -> Result<Runner> {
        if self.peer {
            let params = Params {
                context: len.next_multiple_of(256) as u32,
                batch: 512,
                threads: self.model.threads() as i32,
                cache: match CacheType::from(self.model.cache_type_k) {
                    CacheType::F32 => Type::F32,
                    CacheType::F16 => Type::F16,
                    CacheType::Q8_0 => Type::Q8_0,
                },
                flash_attention: true,
            };
            return Llama::open(&self.model.path()?, params).map(Runner::LlamaCpp).map_err(Error::Input);
        }
        let of_mode = self.model.with_routing(mode);
        let mut options = of_mode.options(model, 1);
        options.context = len;
        options.max_outputs = Some(options.max_rows);
        let engine = of_mode.engine(model, &options, Arc::clone(&interrupt::requested()?))?;
        Ok(Runner::Ours(Box::new(engine)))
    }

    /// Evaluates one routing mode.
    fn mode(
        &self,
        model: &Model,
        mode: Option<Routing>,
        cut: Windows,
        windows: &[&[u32]],
        state: &mut State,
    ) -> Result<Results> {
        let vocab = model.config.vocab;
        let mut runner = self.runner(model, mode, cut.len)?;
        let routing = match &runner {
            Runner::Ours(engine) => engine.routing().0.to_string(),
            Runner::LlamaCpp(_) => "llama.cpp".to_owned(),
        };
        let item = |w: usize| format!("{routing} {w}");
        let mut results = vec![];
        while results.len() < windows.len()
            && let Some(window) = state.get::<Window>(&item(results.len()))?
        {
            results.push(window);
        }
        let mut writer = None;
        if let Some(path) = &self.kl_base {
            let (opened, done) = Writer::create(path, cut.len, vocab, windows, results.len())?;
            results.truncate(done);
            writer = Some(opened);
        }
        let mut base = self.kl.as_deref().map(|path| Reader::open(path, vocab)).transpose()?;
        base.as_mut().map_or(Ok(()), |b| b.skip(results.len()))?;
        let bar = self.bar(windows.len() * cut.len, results.len() * cut.len);
        let mut reference = vec![];
        for (w, window) in windows.iter().enumerate().skip(results.len()) {
            let mut result = Window::default();
            runner.window(window, cut.first(), |p, logits| {
                let next = window[p + 1];
                result.losses.push(loss(logits, next));
                if let Some(base) = &mut base {
                    base.next(&mut reference)?;
                    result.compared.push(Divergence::compare(&reference, logits, next));
                }
                writer.as_mut().map_or(Ok(()), |w| w.push(logits))
            })?;
            // The reference first: a window counts as done only with its logits.
            writer.as_mut().map_or(Ok(()), Writer::flush)?;
            state.push(&item(w), &result)?;
            results.push(result);
            bar.inc(cut.len as u64);
        }
        bar.finish_and_clear();
        writer.map_or(Ok(()), Writer::finish)?;
        Ok(Results { routing, windows: results })
    }

    fn bar(&self, len: usize, done: usize) -> ProgressBar {
        let bar = token_bar("perplexity");
        bar.set_length(len as u64);
        bar.set_position(done as u64);
        bar.reset_eta();
        bar
    }

    fn print(&self, results: &Results, cut: Windows, first: Option<&Results>) -> io::Result<()> {
        let summary = Summary::new(results, cut, first);
        let mut out = io::stdout().lock();
        if self.json { writeln!(out, "{}", summary.json(self.kl.is_some())) } else { summary.text(&mut out) }
    }
}

/// What is printed of a mode.
struct Summary<'a> {
    results: &'a Results,
    len: usize,
    loss: CrossEntropy,
    divergence: Option<divergence::Summary>,
    /// Loss against the first mode's, paired, in all and by eighth of the window.
    difference: Mean,
    difference_by_depth: [Mean; 8],
}

impl<'a> Summary<'a> {
    fn new(results: &'a Results, cut: Windows, first: Option<&Results>) -> Self {
        let (mut loss, mut divergence) = (CrossEntropy::default(), Divergence::default());
        let (mut difference, mut difference_by_depth) = (Mean::default(), [Mean::default(); 8]);
        for (w, window) in results.windows.iter().enumerate() {
            loss.window();
            let base = first.and_then(|f| f.windows.get(w));
            for (i, &l) in window.losses.iter().enumerate() {
                let p = cut.first() + i;
                loss.add(p, cut.len, l);
                if let Some(b) = base.and_then(|b| b.losses.get(i)) {
                    difference.push(l - b);
                    difference_by_depth[(p * 8 / cut.len).min(7)].push(l - b);
                }
            }
            window.compared.iter().for_each(|&p| divergence.add(p));
        }
        let compared = results.windows.iter().any(|w| !w.compared.is_empty());
        let divergence = compared.then(|| divergence.summary());
        Self { results, len: cut.len, loss, divergence, difference, difference_by_depth }
    }

    fn json(&self, compared: bool) -> Value {
        let mut object = Map::new();
        object.insert("routing".into(), json!(self.results.routing));
        object.insert("windows".into(), json!(self.results.windows.len()));
        object.insert("window_tokens".into(), json!(self.len));
        object.insert("cross_entropy".into(), json!(self.loss.summary()));
        if let Some(d) = self.divergence.as_ref().filter(|_| compared) {
            object.insert("divergence".into(), json!(d));
        }
        if self.difference.count() > 0 {
            let by_depth = |f: fn(&Mean) -> f64| -> Vec<_> {
                self.difference_by_depth.iter().map(|m| (m.count() > 0).then(|| f(m))).collect()
            };
            let d = json!({
                "loss": self.difference.mean(),
                "error": self.difference.error(),
                "by_depth": by_depth(Mean::mean),
                "by_depth_error": by_depth(Mean::error),
            });
            object.insert("difference_to_first_mode".into(), d);
        }
        Value::Object(object)
    }

    fn text(&self, out: &mut impl Write) -> io::Result<()> {
        let (s, n) = (self.loss.summary(), self.results.windows.len());
        writeln!(
            out,
            "routing {}: {n} windows of {} tokens, {} scored",
            self.results.routing, self.len, s.tokens
        )?;
        writeln!(out, "  cross-entropy   {:.5} ± {:.5} nats", s.loss, s.loss_error)?;
        writeln!(out, "  perplexity      {:.4} ± {:.4}", s.perplexity, s.perplexity_error)?;
        for (i, depth) in self.loss.by_depth.iter().enumerate().filter(|(_, m)| m.count() > 0) {
            let (from, to) = (self.len * i / 8, self.len * (i + 1) / 8);
            write!(out, "  depth {:<9} {:.4} ± {:.4}", format!("{from}-{to}"), depth.mean(), depth.error())?;
            match &self.difference_by_depth[i] {
                d if d.count() > 0 => writeln!(out, "  to first mode {:+.5} ± {:.5}", d.mean(), d.error())?,
                _ => writeln!(out)?,
            }
        }
        let windows: Vec<_> =
            self.loss.by_window.iter().map(|m| format!("{:.4} ± {:.4}", m.mean(), m.error())).collect();
        for (i, line) in windows.chunks(4).enumerate() {
            writeln!(out, "  window {:<8} {}", 4 * i, line.join("   "))?;
        }
        if self.difference.count() > 0 {
            let d = &self.difference;
            writeln!(out, "  to first mode   {:+.5} ± {:.5} nats", d.mean(), d.error())?;
        }
        self.divergence.as_ref().map_or(Ok(()), |d| divergence_text(d, out))
    }
}

fn divergence_text(d: &divergence::Summary, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "  KL to base      {:.6} ± {:.6} nats", d.kl_mean, d.kl_error)?;
    writeln!(
        out,
        "  KL quantiles    1 % {:.6}, 10 % {:.6}, median {:.6}, 90 % {:.6}, 95 % {:.6}, 99 % {:.6}, 99.9 % {:.6}, max {:.6}",
        d.kl_01, d.kl_10, d.kl_median, d.kl_90, d.kl_95, d.kl_99, d.kl_999, d.kl_max
    )?;
    writeln!(out, "  same top token  {:.2} ± {:.2} %", 100.0 * d.same_top, 100.0 * d.same_top_error)?;
    writeln!(
        out,
        "  change of p     mean {:+.3} ± {:.3} %, RMS {:.3} %",
        100.0 * d.probability_change,
        100.0 * d.probability_change_error,
        100.0 * d.probability_change_rms
    )?;
    writeln!(
        out,
        "  of p, quantiles 1 % {:+.3} %, 10 % {:+.3} %, median {:+.3} %, 90 % {:+.3} %, 99 % {:+.3} %",
        100.0 * d.probability_change_01,
        100.0 * d.probability_change_10,
        100.0 * d.probability_change_median,
        100.0 * d.probability_change_90,
        100.0 * d.probability_change_99
    )?;
    writeln!(out, "  loss change     {:+.5} ± {:.5} nats", d.loss_change, d.loss_change_error)
}

//! `clsa eval perplexity`.
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Map, json};

use crate::backend::Routing;
use crate::cli::model::ModelArgs;
use crate::cli::{stdout_error, token_bar};
use crate::error::{Error, Result};
use crate::eval::base::{Reader, Writer};
use crate::eval::divergence::Divergence;
use crate::eval::perplexity::{CrossEntropy, Windows, run_window};
use crate::interrupt;
use crate::model::Model;
use crate::tokenizer::Tokenizer;

/// Arguments of `clsa eval perplexity`.
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text; not needed with --kl, whose file has the tokens
    #[arg(short, long, value_name = "FILE", required_unless_present = "kl")]
    file: Option<PathBuf>,
    /// Windows at most, for a quick look
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Save this model's logits as a reference
    #[arg(long, value_name = "FILE", conflicts_with = "kl")]
    kl_base: Option<PathBuf>,
    /// Compare with a reference that --kl-base saved
    #[arg(long, value_name = "FILE")]
    kl: Option<PathBuf>,
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
    let tokens =
        args.file.as_deref().filter(|_| args.kl.is_none()).map(|f| read_tokens(&model, f)).transpose()?;
    let mut first_losses: Option<Vec<f64>> = None;
    for mode in modes {
        let losses = args.mode(&model, mode, tokens.as_deref(), first_losses.as_deref())?;
        first_losses.get_or_insert(losses);
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

impl PerplexityArgs {
    /// Evaluates one routing mode; returns the loss of each scored token.
    fn mode(
        &self,
        model: &Model,
        mode: Option<Routing>,
        tokens: Option<&[u32]>,
        base_losses: Option<&[f64]>,
    ) -> Result<Vec<f64>> {
        let vocab = model.config.vocab;
        let mut base = self.kl.as_deref().map(|path| Reader::open(path, vocab)).transpose()?;
        let cut = match &base {
            Some(base) => base.cut(),
            None => Windows {
                len: if self.model.ctx_size == 0 { WINDOW } else { self.model.ctx_size },
                limit: self.limit,
            },
        };
        if cut.len < 4 {
            return Err(Error::Input(format!("-c {}: a window needs at least 4 tokens", cut.len)));
        }
        let base_windows = base.as_ref().map(|b| b.windows.clone());
        let windows: Vec<&[u32]> = match (&base_windows, tokens) {
            (Some(windows), _) => {
                windows.iter().take(self.limit.unwrap_or(usize::MAX)).map(Vec::as_slice).collect()
            }
            (None, tokens) => cut.cut(tokens.unwrap_or_default())?,
        };
        let of_mode = self.model.with_routing(mode);
        let mut options = of_mode.options(model, 1);
        options.context = cut.len;
        options.max_outputs = Some(options.max_rows);
        let mut engine = of_mode.engine(model, &options, Arc::clone(&interrupt::requested()?))?;
        let mut writer =
            self.kl_base.as_deref().map(|path| Writer::create(path, cut.len, vocab, &windows)).transpose()?;
        let (mut loss, mut divergence, mut losses, mut reference) =
            (CrossEntropy::default(), Divergence::default(), vec![], vec![]);
        let bar = token_bar("perplexity");
        bar.set_length((windows.len() * cut.len) as u64);
        for window in &windows {
            run_window(&mut engine, window, cut.first(), |p, logits| {
                let next = window[p + 1];
                losses.push(loss.push(p, cut.len, logits, next));
                if let Some(base) = &mut base {
                    base.next(&mut reference)?;
                    divergence.push(&reference, logits, next);
                }
                writer.as_mut().map_or(Ok(()), |w| w.push(logits))
            })?;
            bar.inc(cut.len as u64);
        }
        bar.finish_and_clear();
        writer.map_or(Ok(()), Writer::finish)?;
        let mut difference = crate::eval::Mean::default();
        for (a, b) in losses.iter().zip(base_losses.unwrap_or_default()) {
            difference.push(a - b);
        }
        let routing = engine.routing().0.to_string();
        let compared = base.is_some().then(|| divergence.summary());
        self.print(&routing, windows.len(), cut.len, &loss, compared, difference).map_err(stdout_error)?;
        Ok(losses)
    }

    fn print(
        &self,
        routing: &str,
        windows: usize,
        len: usize,
        loss: &CrossEntropy,
        divergence: Option<crate::eval::divergence::Summary>,
        difference: crate::eval::Mean,
    ) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let s = loss.summary();
        if self.json {
            let mut object = Map::new();
            object.insert("routing".into(), json!(routing));
            object.insert("windows".into(), json!(windows));
            object.insert("window_tokens".into(), json!(len));
            object.insert("cross_entropy".into(), json!(s));
            if let Some(d) = divergence {
                object.insert("divergence".into(), json!(d));
            }
            if difference.count() > 0 {
                let d = json!({ "loss": difference.mean(), "error": difference.error() });
                object.insert("difference_to_first_mode".into(), d);
            }
            return writeln!(out, "{}", serde_json::Value::Object(object));
        }
        writeln!(out, "routing {routing}: {windows} windows of {len} tokens, {} scored", s.tokens)?;
        writeln!(out, "  cross-entropy   {:.5} ± {:.5} nats", s.loss, s.loss_error)?;
        writeln!(out, "  perplexity      {:.4} ± {:.4}", s.perplexity, s.perplexity_error)?;
        let depths: Vec<_> = s.loss_by_depth.iter().flatten().map(|l| format!("{l:.4}")).collect();
        writeln!(out, "  by depth        {} (eighths of the window that are scored)", depths.join(" "))?;
        if difference.count() > 0 {
            writeln!(out, "  to first mode   {:+.5} ± {:.5} nats", difference.mean(), difference.error())?;
        }
        if let Some(d) = divergence {
            writeln!(out, "  KL to base      {:.6} ± {:.6} nats", d.kl_mean, d.kl_error)?;
            writeln!(
                out,
                "  KL quantiles    median {:.6}, 90 % {:.6}, 99 % {:.6}, max {:.6}",
                d.kl_median, d.kl_90, d.kl_99, d.kl_max
            )?;
            writeln!(out, "  same top token  {:.2} ± {:.2} %", 100.0 * d.same_top, 100.0 * d.same_top_error)?;
            writeln!(
                out,
                "  change of p     mean {:+.3} %, RMS {:.3} %",
                100.0 * d.probability_change,
                100.0 * d.probability_change_rms
            )?;
            writeln!(out, "  loss change     {:+.5} ± {:.5} nats", d.loss_change, d.loss_change_error)?;
        }
        Ok(())
    }
}

//! `clsa eval ruler` and `clsa eval needle`.
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::results::{ResultArgs, percent};
use crate::backend::Routing;
use crate::cli::count_bar;
use crate::cli::model::ModelArgs;
use crate::error::{Error, Result};
use crate::eval::Mean;
use crate::eval::plot::HeatMap;
use crate::eval::ruler::qa::Questions;
use crate::eval::ruler::{Prompter, Sample, Sources, Spec, Task, answers, sample, sentences};
use crate::interrupt;
use crate::model::Model;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Arguments of `clsa eval ruler`.
#[derive(Debug, Args)]
pub struct RulerArgs {
    /// Tasks: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2; all whose files are
    /// there without it
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    tasks: Vec<Task>,
    /// Questions of qa_1: a JSON file like SQuAD's
    #[arg(long, value_name = "FILE")]
    squad: Option<PathBuf>,
    /// Questions of qa_2: a JSON file like HotpotQA's
    #[arg(long, value_name = "FILE")]
    hotpotqa: Option<PathBuf>,
    #[command(flatten)]
    samples: SampleArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    results: ResultArgs,
}

/// Arguments of `clsa eval needle`.
#[derive(Debug, Args)]
pub struct NeedleArgs {
    /// Where the needle stands, in per cent of the text
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,25,50,75,100", value_parser = clap::value_parser!(u8).range(0..=100))]
    depths: Vec<u8>,
    #[command(flatten)]
    samples: SampleArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    results: ResultArgs,
}

/// What samples are made of.
#[derive(Debug, Args)]
struct SampleArgs {
    /// Tokens of a sample, answer included, such as 4096 or 4K; 4K, 8K, ... up to -c or the model's context without it
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = length)]
    lengths: Vec<usize>,
    /// Samples for each cell of the table
    #[arg(long, value_name = "N", default_value_t = 10)]
    limit: usize,
    /// What random numbers begin with
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Text of the haystacks of prose; generated sentences without it
    #[arg(long, value_name = "FILE")]
    haystack: Option<PathBuf>,
    /// Give prompts as they are, without the chat template
    #[arg(long)]
    raw: bool,
}

fn length(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (text, 1),
    };
    (digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit)).filter(|n| (1..=1 << 24).contains(n)))
        .ok_or_else(|| format!("found '{text}', expected a number of tokens such as 4096 or 4K"))
}

/// Runs `clsa eval ruler`, in each mode of `--routing`.
///
/// # Errors
/// Those of the model, the files and the engine; [`Error::Interrupted`].
pub fn ruler(args: &RulerArgs) -> Result<()> {
    let sources = Sources {
        prose: args.samples.prose()?,
        squad: args.squad.as_deref().map(Questions::squad).transpose()?,
        hotpot: args.hotpotqa.as_deref().map(Questions::hotpotqa).transpose()?,
    };
    let mut tasks = args.tasks.clone();
    if tasks.is_empty() {
        tasks = Task::ALL.to_vec();
        for (task, there, flag) in [
            (Task::Qa1, sources.squad.is_some(), "--squad"),
            (Task::Qa2, sources.hotpot.is_some(), "--hotpotqa"),
        ] {
            if !there {
                eprintln!("{} is left out: give its questions with {flag}", task.name());
                tasks.retain(|t| *t != task);
            }
        }
    }
    let files = [&args.squad, &args.hotpotqa].map(|f| f.as_deref().map(fingerprint));
    let [squad, hotpotqa] = files.map(Option::transpose);
    let run = Run {
        name: "ruler",
        rows: tasks.into_iter().map(Spec::Task).collect(),
        sources,
        samples: &args.samples,
        model: &args.model,
        results: &args.results,
    };
    run.run(&json!({ "squad": squad?, "hotpotqa": hotpotqa? }))
}

/// Runs `clsa eval needle`, in each mode of `--routing`.
///
/// # Errors
/// As [`ruler`].
pub fn needle(args: &NeedleArgs) -> Result<()> {
    let run = Run {
        name: "needle",
        rows: args.depths.iter().map(|d| Spec::Needle { depth: f64::from(*d) / 100.0 }).collect(),
        sources: Sources { prose: args.samples.prose()?, ..Sources::default() },
        samples: &args.samples,
        model: &args.model,
        results: &args.results,
    };
    run.run(&json!({}))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

fn fingerprint(path: &Path) -> Result<String> {
    Ok(format!("{:016x}", xxh3_64(&read(path)?)))
}

impl SampleArgs {
    fn prose(&self) -> Result<Vec<String>> {
        let Some(path) = &self.haystack else { return Ok(vec![]) };
        let text = String::from_utf8(read(path)?)
            .map_err(|_| Error::Input(format!("{}: the haystack is not UTF-8 text", path.display())))?;
        let sentences = sentences(&text);
        if sentences.is_empty() {
            return Err(Error::Input(format!("{}: the haystack is empty", path.display())));
        }
        Ok(sentences)
    }

    fn lengths(&self, context: usize) -> Result<Vec<usize>> {
        let mut lengths = self.lengths.clone();
        if lengths.is_empty() {
            lengths = (12..=17).map(|bits| 1 << bits).filter(|n| *n <= context).collect();
        }
        lengths.sort_unstable();
        lengths.dedup();
        if lengths.is_empty() {
            return Err(Error::Input(format!(
                "the context of {context} positions is below the shortest length, 4096: give --lengths"
            )));
        }
        Ok(lengths)
    }
}

/// What one sample gave in one mode, as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outcome {
    score: f64,
    prompt_tokens: usize,
    answer: String,
    expected: Vec<String>,
}

/// One of the two evaluations.
struct Run<'a> {
    name: &'static str,
    rows: Vec<Spec>,
    sources: Sources,
    samples: &'a SampleArgs,
    model: &'a ModelArgs,
    results: &'a ResultArgs,
}

/// Scores by mode, row and length.
struct Scores {
    modes: Vec<String>,
    lengths: Vec<usize>,
    /// `[mode][row][length]`
    cells: Vec<Vec<Vec<Mean>>>,
}

impl Run<'_> {
    fn run(&self, more: &Value) -> Result<()> {
        let model = self.model.open()?;
        let tokenizer = Tokenizer::from_gguf(&model.file)?;
        let template = match self.samples.raw {
            true => None,
            false => Some(
                ChatTemplate::from_gguf(&model.file, &tokenizer)
                    .map_err(|e| Error::Input(format!("{e}; --raw gives the prompts without one")))?,
            ),
        };
        let prompter = Prompter { tokenizer: &tokenizer, template: template.as_ref() };
        let own = match self.model.ctx_size {
            0 => model.config.context_length,
            n => n,
        };
        let lengths = self.samples.lengths(own)?;
        let modes = self.modes(&model);
        let mut settings = json!({
            "seed": self.samples.seed,
            "prompts": if self.samples.raw { "raw" } else { "chat template" },
            "haystack": self.samples.haystack.as_deref().map(fingerprint).transpose()?,
            "k": modes[0].1,
            "caches": format!("{:?} {:?}", self.model.cache_type_k, self.model.cache_type_v),
        });
        if let (Value::Object(settings), Value::Object(more)) = (&mut settings, more) {
            settings.extend(more.clone());
        }
        let mut state = self.results.state(&model, self.name, settings.clone())?;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if longest > model.config.context_length {
            eprintln!(
                "the model was trained for {} positions, lengths go up to {longest}",
                model.config.context_length
            );
        }
        let count = |s: &Sample| Ok(prompter.tokens(s)?.len());
        // Lengths that a task does not fit are told before hours of others.
        for &spec in &self.rows {
            sample(spec, lengths[0], 0, self.samples.seed, &self.sources, count)?;
        }
        let stop = interrupt::requested()?;
        let mut engine = None;
        let mut scores = Scores {
            modes: modes.iter().map(|(m, _)| m.to_string()).collect(),
            cells: vec![vec![vec![Mean::default(); lengths.len()]; self.rows.len()]; modes.len()],
            lengths: lengths.clone(),
        };
        let bar = count_bar(self.name, "samples");
        bar.set_length((self.rows.len() * lengths.len() * self.samples.limit) as u64);
        for (l, &len) in lengths.iter().enumerate() {
            for (r, &spec) in self.rows.iter().enumerate() {
                for index in 0..self.samples.limit {
                    let item = |m: usize| format!("{} {len} {index} {}", spec.name(), scores.modes[m]);
                    let mut found: Vec<Option<Outcome>> =
                        (0..modes.len()).map(|m| state.get(&item(m))).collect::<Result<_>>()?;
                    let missing: Vec<usize> = (0..modes.len()).filter(|m| found[*m].is_none()).collect();
                    if missing.is_empty() {
                        bar.inc(1);
                        bar.reset_eta();
                    } else {
                        interrupt::check(&stop)?;
                        let sample = sample(spec, len, index, self.samples.seed, &self.sources, count)?;
                        let tokens = prompter.tokens(&sample)?;
                        let engine = match &mut engine {
                            Some(engine) => engine,
                            none => {
                                let on = self.model.with_routing(Some(modes[0].0));
                                let mut options = on.options(&model, 1);
                                options.context = longest;
                                none.insert(on.engine(&model, &options, Arc::clone(&stop))?)
                            }
                        };
                        let wanted: Vec<_> = missing.iter().map(|m| modes[*m]).collect();
                        let said =
                            answers(engine, &tokens, &wanted, spec.answer_tokens(), &tokenizer, |done| {
                                bar.set_message(format!(
                                    "{} {}, {done} of {} tokens",
                                    spec.name(),
                                    len,
                                    tokens.len()
                                ));
                                ControlFlow::Continue(())
                            })?;
                        for (m, answer) in missing.into_iter().zip(said) {
                            let outcome = Outcome {
                                score: spec.score(&answer.text, &sample.answers),
                                prompt_tokens: tokens.len(),
                                answer: answer.text,
                                expected: sample.answers.clone(),
                            };
                            found[m] = Some(state.push(&item(m), &outcome)?);
                        }
                        bar.inc(1);
                    }
                    for (m, outcome) in found.iter().enumerate() {
                        outcome.iter().for_each(|o| scores.cells[m][r][l].push(o.score));
                    }
                }
            }
        }
        bar.finish_and_clear();
        let result = self.json(&scores, &settings);
        self.results.report(&result, |out| self.table(out, &scores))?;
        match self.results.plots()? {
            Some(folder) => self.plot(folder, &scores),
            None => Ok(()),
        }
    }

    /// The routing modes with their k.
    fn modes(&self, model: &Model) -> Vec<(Routing, usize)> {
        let indexer = model.config.indexer;
        let top_k = self.model.top_k_tokens.unwrap_or(indexer.map_or(0, |ix| ix.top_k));
        let own = if indexer.is_some() { Routing::Clsa } else { Routing::Dense };
        self.model.routings().into_iter().map(|mode| (mode.unwrap_or(own), top_k)).collect()
    }

    fn json(&self, scores: &Scores, settings: &Value) -> Value {
        let mut all = vec![];
        for (mode, rows) in scores.modes.iter().zip(&scores.cells) {
            for (spec, row) in self.rows.iter().zip(rows) {
                for (len, m) in scores.lengths.iter().zip(row) {
                    all.push(json!({
                        "routing": mode,
                        "task": spec.name(),
                        "length": len,
                        "samples": m.count(),
                        "score": m.get(),
                        "error": m.error(),
                    }));
                }
            }
        }
        json!({ "evaluation": self.name, "settings": settings, "scores": all })
    }

    fn table(&self, out: &mut dyn Write, scores: &Scores) -> io::Result<()> {
        writeln!(out, "score in % ({} samples each, seed {})", self.samples.limit, self.samples.seed)?;
        for (mode, rows) in scores.modes.iter().zip(&scores.cells) {
            writeln!(out)?;
            write!(out, "| {:<16} |", format!("routing {mode}"))?;
            scores.lengths.iter().try_for_each(|len| write!(out, " {len:>12} |"))?;
            write!(out, "\n|:-----------------|")?;
            scores.lengths.iter().try_for_each(|_| write!(out, "-------------:|"))?;
            writeln!(out)?;
            for (spec, row) in self.rows.iter().zip(rows) {
                write!(out, "| {:<16} |", spec.name())?;
                for m in row {
                    write!(out, " {:>12} |", format!("{} ± {:.1}", percent(m.get()), 100.0 * m.error()))?;
                }
                writeln!(out)?;
            }
            write!(out, "| {:<16} |", "mean")?;
            for l in 0..scores.lengths.len() {
                write!(out, " {:>12} |", percent(mean_of_column(rows, l)))?;
            }
            writeln!(out)?;
        }
        Ok(())
    }

    fn plot(&self, folder: &Path, scores: &Scores) -> Result<()> {
        for (mode, rows) in scores.modes.iter().zip(&scores.cells) {
            HeatMap {
                title: format!("{}, routing {mode}", self.name),
                x: "tokens".into(),
                y: String::new(),
                columns: scores.lengths.iter().map(ToString::to_string).collect(),
                rows: self.rows.iter().map(|s| s.name()).collect(),
                cells: rows.iter().map(|row| row.iter().map(Mean::get).collect()).collect(),
            }
            .save(&folder.join(format!("{}-{mode}.svg", self.name)))?;
        }
        Ok(())
    }
}

/// Mean of the rows' scores at one length.
fn mean_of_column(rows: &[Vec<Mean>], l: usize) -> Option<f64> {
    let mut all = Mean::default();
    rows.iter().filter_map(|row| row[l].get()).for_each(|s| all.push(s));
    all.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_numbers_or_thousands() {
        assert_eq!((length("4096"), length("4K"), length("128k")), (Ok(4096), Ok(4096), Ok(131_072)));
        for bad in ["", "K", "-1", "4M", "0", "99999999999999999999K"] {
            assert!(length(bad).is_err(), "{bad}");
        }
    }
}

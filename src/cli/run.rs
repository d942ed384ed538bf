//! `clsa run`: one prompt, one answer; text on standard output and nothing else.
use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;

use super::grammar::GrammarArgs;
use super::model::ModelArgs;
use super::sampling::SamplingArgs;
use super::{stdout_error, token_bar};
use crate::error::{Error, Result};
use crate::generate::{Answer, FinishReason, Limits, Listener, generate};
use crate::interrupt;
use crate::sampler::{GrammarCompiler, Sampler};
use crate::session::Session;
use crate::tokenizer::Tokenizer;

/// Arguments of `clsa run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The prompt; standard input without -p and -f
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// A file with the prompt
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens to generate; without it until the model ends or the context is full
    #[arg(short = 'n', long, value_name = "N")]
    n_predict: Option<usize>,
    /// End the answer at this text, which is not part of it (repeatable)
    #[arg(short = 'r', long, value_name = "TEXT", visible_alias = "reverse-prompt")]
    stop: Vec<String>,
    /// Do not read control tokens in the prompt as such
    #[arg(long)]
    no_special: bool,
    /// Go on past the tokens that end an answer
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object: text, tokens, finish_reason, timings
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    grammar: GrammarArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs `clsa run`.
///
/// # Errors
/// Those of the model, the engine and the sampler; [`Error::Interrupted`] after what was said until then.
pub fn run(args: &RunArgs) -> Result<()> {
    let stop = interrupt::requested()?;
    args.grammar.check(&args.stop, args.ignore_eos)?;
    let grammar = args.grammar.grammar()?;
    let text = args.text()?;
    let model = args.model.open()?;
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model.file)?);
    let prompt = tokenizer.begin(tokenizer.encode(&text, !args.no_special)?);
    let params = args.sampling.params(&model.file)?;
    let mut sampler = Sampler::new(params, Arc::clone(&tokenizer))?;
    if let Some(grammar) = &grammar {
        sampler.set_constraint(Some(GrammarCompiler::new(&tokenizer)?.compile(grammar)?));
    }
    let options = args.model.options(&model, 1);
    let mut session = Session::new(args.model.engine(&model, &options, stop)?)?;
    let limits = Limits {
        max_tokens: args.n_predict,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        show_special: false,
    };
    let mut printer = Printer { bar: token_bar("prompt"), silent: args.json, failed: None };
    let answer = generate(&mut session, &tokenizer, &mut sampler, &prompt, &limits, &mut printer)?;
    printer.bar.finish_and_clear();
    if let Some(e) = printer.failed {
        return Err(stdout_error(e));
    }
    args.report(&session, &sampler, &prompt, &answer)?;
    match answer.finish_reason {
        FinishReason::Interrupted => Err(Error::Interrupted),
        _ => Ok(()),
    }
}

impl RunArgs {
    fn text(&self) -> Result<String> {
        let (path, text) = match (&self.prompt, &self.file) {
            (Some(text), _) => return Ok(text.clone()),
            (None, Some(path)) => (path.clone(), std::fs::read_to_string(path)),
            (None, None) if io::stdin().is_terminal() => {
                return Err(Error::Input(
                    "no prompt: give -p TEXT, -f FILE, or text on standard input".into(),
                ));
            }
            (None, None) => {
                let mut text = String::new();
                ("standard input".into(), io::stdin().read_to_string(&mut text).map(|_| text))
            }
        };
        text.map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => {
                Error::Input(format!("{}: the prompt is not UTF-8 text", path.display()))
            }
            io::ErrorKind::NotFound => Error::Input(format!("{}: no such file", path.display())),
            _ => Error::Io { path, source: e },
        })
    }

    fn report(&self, session: &Session, sampler: &Sampler, prompt: &[u32], answer: &Answer) -> Result<()> {
        let t = answer.timings;
        let mut out = io::stdout().lock();
        if self.json {
            let (routing, top_k) = session.engine().routing();
            let result = json!({
                "text": answer.text,
                "tokens": answer.tokens,
                "prompt_tokens": prompt.len(),
                "finish_reason": answer.finish_reason,
                "seed": sampler.seed(),
                "routing": routing.to_string(),
                "top_k_tokens": top_k,
                "timings": t,
                "prompt_per_second": t.prompt_rate(),
                "generated_per_second": t.generate_rate(),
            });
            return writeln!(out, "{result}").map_err(stdout_error);
        }
        if !answer.text.ends_with('\n') {
            writeln!(out).map_err(stdout_error)?;
        }
        if answer.finish_reason == FinishReason::ContextFull {
            eprintln!(
                "note: the answer ends because the context of {} tokens is full: raise -c",
                session.engine().context()
            );
        }
        if self.model.verbose {
            eprintln!(
                "prompt {} tokens, {:.1} t/s; generated {} tokens, {:.1} t/s; seed {}",
                prompt.len(),
                t.prompt_rate(),
                t.generated,
                t.generate_rate(),
                sampler.seed()
            );
        }
        Ok(())
    }
}

/// Streams text to standard output.
struct Printer {
    bar: ProgressBar,
    silent: bool,
    failed: Option<io::Error>,
}

impl Listener for Printer {
    fn prompt(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        if done == total {
            self.bar.finish_and_clear();
        }
        ControlFlow::Continue(())
    }

    fn text(&mut self, text: &str) -> ControlFlow<()> {
        if self.silent {
            return ControlFlow::Continue(());
        }
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                self.failed = Some(e);
                ControlFlow::Break(())
            }
        }
    }
}

//! The loop that every command shares: prompt -> sampler -> text, until something ends it.
use std::ops::ControlFlow;
use std::time::Instant;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::sampler::{Sampler, StopMatcher};
use crate::session::{Session, Synced};
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// When an answer ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Tokens to generate at most; `None`: until the model ends or the context is full.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Goes on past the tokens that end an answer.
    pub ignore_eos: bool,
    /// Shows control tokens in the text.
    pub show_special: bool,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop text came.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
    /// The context is full.
    ContextFull,
    /// The user broke it off.
    Interrupted,
}

/// What an answer took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Prompt tokens that were in the cache already.
    pub prompt_reused: usize,
    /// Prompt tokens that were run.
    pub prompt_processed: usize,
    /// Seconds for them.
    pub prompt_seconds: f64,
    /// Tokens generated.
    pub generated: usize,
    /// Seconds for them.
    pub generate_seconds: f64,
}

impl Timings {
    /// Prompt tokens per second; 0 when nothing was run.
    #[must_use]
    pub fn prompt_rate(&self) -> f64 {
        if self.prompt_processed == 0 { 0.0 } else { self.prompt_processed as f64 / self.prompt_seconds }
    }

    /// Generated tokens per second; 0 when there are none.
    #[must_use]
    pub fn generate_rate(&self) -> f64 {
        if self.generated == 0 { 0.0 } else { self.generated as f64 / self.generate_seconds }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What it took.
    pub timings: Timings,
}

/// What a caller hears while an answer is made; breaking off ends it with what there is.
pub trait Listener {
    /// `done` of `total` prompt tokens are processed.
    fn prompt(&mut self, _done: usize, _total: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    /// The logits of another token are there, and what routing selected for it.
    fn step(&mut self, _session: &mut Session) -> Result<()> {
        Ok(())
    }
    /// More text, in whole characters.
    fn text(&mut self, _text: &str) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Nobody listens.
impl Listener for () {}

/// Answers `prompt`. `sampler` hears the prompt tokens first, so that penalties see them.
///
/// An interruption ends the answer with what there is: [`FinishReason::Interrupted`].
///
/// # Errors
/// [`Error::ContextFull`] when the prompt does not fit; those of the engine and the sampler.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    sampler: &mut Sampler,
    prompt: &[u32],
    limits: &Limits,
    listener: &mut impl Listener,
) -> Result<Answer> {
    let mut answer = Answer {
        text: String::new(),
        tokens: vec![],
        finish_reason: FinishReason::Interrupted,
        timings: Timings::default(),
    };
    let started = Instant::now();
    match session.sync(prompt, |done, total| listener.prompt(done, total)) {
        Ok(Synced { reused, processed }) => {
            (answer.timings.prompt_reused, answer.timings.prompt_processed) = (reused, processed);
        }
        Err(Error::Interrupted) => return Ok(answer),
        Err(e) => return Err(e),
    }
    answer.timings.prompt_seconds = started.elapsed().as_secs_f64();
    sampler.set_history(prompt);

    let started = Instant::now();
    let mut decoder = StreamDecoder::new(limits.show_special);
    let mut stops = StopMatcher::new(limits.stop.iter().cloned());
    let emit = |listener: &mut dyn Listener, text: &str, answer: &mut Answer| {
        answer.text.push_str(text);
        if text.is_empty() { ControlFlow::Continue(()) } else { listener.text(text) }
    };
    // The next token, where the backend has drawn it.
    let mut drawn = None;
    answer.finish_reason = loop {
        if limits.max_tokens.is_some_and(|n| answer.tokens.len() >= n) {
            break FinishReason::Length;
        }
        listener.step(session)?;
        let token = match drawn.take() {
            Some(token) => token,
            None => sampler.sample(session.logits())?,
        };
        if tokenizer.is_stop(token) && !limits.ignore_eos {
            break FinishReason::Stop;
        }
        sampler.accept(token)?;
        answer.tokens.push(token);
        let text = stops.push(&decoder.push(tokenizer, token)?);
        if emit(listener, &text, &mut answer).is_break() {
            break FinishReason::Interrupted;
        }
        if stops.found().is_some() {
            break FinishReason::Stop;
        }
        // The last token asked for needs no successor.
        if limits.max_tokens.is_none_or(|n| answer.tokens.len() < n) {
            let pushed = match sampler.plan() {
                Some(draw) => session.push_drawn(token, draw).map(|next| {
                    sampler.drawn();
                    drawn = Some(next);
                }),
                None => session.push(token),
            };
            match pushed {
                Ok(()) => {}
                Err(Error::ContextFull { .. }) => break FinishReason::ContextFull,
                Err(Error::Interrupted) => break FinishReason::Interrupted,
                Err(e) => return Err(e),
            }
        }
    };
    if stops.found().is_none() {
        let rest = stops.push(&decoder.finish()) + &stops.finish();
        let _ = emit(listener, &rest, &mut answer);
    }
    answer.timings.generated = answer.tokens.len();
    answer.timings.generate_seconds = started.elapsed().as_secs_f64();
    Ok(answer)
}

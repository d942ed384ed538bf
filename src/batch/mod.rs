//! Many jobs at a time: chunked prefill between the decode steps of all running sequences, shared prefixes run once.
pub mod estimate;
pub mod job;
pub mod plan;
pub mod prefix;
pub mod progress;
pub mod results;
pub mod runner;
pub mod schedule;
#[cfg(test)]
mod simulator;
pub mod store;

use std::sync::Arc;
use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64;

use self::job::{Ask, Job};
use self::results::Outcome;
use crate::error::{Error, Result};
use crate::generate::{FinishReason, Timings};
use crate::sampler::{Constraint, Draw, Sampler, StopMatcher};
use crate::template::{ChatTemplate, Message, RenderOptions};
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// The token ids of a job's prompt.
///
/// Documents stand before the first user message (or before a plain prompt), so that jobs about the same documents begin alike.
///
/// # Errors
/// Why it has none, in words.
pub fn tokenize(
    job: &Job,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<Vec<u32>, String> {
    let documents: String = job.documents.iter().map(|d| format!("{}\n\n", d.trim_end())).collect();
    let ids = match &job.ask {
        Ask::Prompt(text) => {
            let ids = tokenizer.encode(&format!("{documents}{text}"), false).map_err(|e| e.to_string())?;
            tokenizer.begin(ids)
        }
        Ask::Messages(messages) => {
            let template = template.ok_or("the model has no chat template: use \"prompt\"")?;
            let messages = with_documents(messages, &documents)?;
            let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
            let prompt = template.render(&messages, &options).map_err(|e| e.to_string())?;
            tokenizer.encode_prompt(&prompt).map_err(|e| e.to_string())?
        }
    };
    if ids.is_empty() { Err("the prompt has no tokens".into()) } else { Ok(ids) }
}

fn with_documents(messages: &[Message], documents: &str) -> Result<Vec<Message>, String> {
    let mut messages = messages.to_vec();
    if documents.is_empty() {
        return Ok(messages);
    }
    let user =
        messages.iter_mut().find(|m| m.role == "user").ok_or("documents need a message of the user")?;
    let text = user.text().ok_or("documents need a message of the user that is text")?;
    *user = Message { content: format!("{documents}{text}").into(), ..user.clone() };
    Ok(messages)
}

/// How many of a job's prompt tokens do not depend on what follows its documents: what is worth keeping for other questions. 0 without
/// documents.
#[must_use]
pub fn document_tokens(
    job: &Job,
    tokens: &[u32],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> usize {
    if job.documents.is_empty() {
        return 0;
    }
    // The same documents before another question: what both prompts begin with.
    let other =
        |text: &str| format!("{}?", text.chars().next().map_or('?', |c| if c == 'Q' { 'W' } else { 'Q' }));
    let ask = match &job.ask {
        Ask::Prompt(text) => Ask::Prompt(other(text)),
        Ask::Messages(messages) => {
            let mut messages = messages.clone();
            let Some(user) = messages.iter_mut().find(|m| m.role == "user") else { return 0 };
            let text = other(&user.text().unwrap_or_default());
            *user = Message { content: text.into(), ..user.clone() };
            Ask::Messages(messages)
        }
    };
    let job = Job { ask, ..job.clone() };
    let Ok(other) = tokenize(&job, tokenizer, template) else { return 0 };
    tokens.iter().zip(&other).take_while(|(a, b)| a == b).count()
}

/// The answer to one job as it grows.
pub struct Answering {
    sampler: Sampler,
    decoder: StreamDecoder,
    stops: StopMatcher,
    text: String,
    tokens: usize,
    max_tokens: usize,
    prompt_tokens: usize,
    reused: usize,
    logits: Vec<f32>,
    started: Instant,
    first: Option<Instant>,
}

/// What one more token does to an answer.
pub enum Next {
    /// It goes on with this token.
    Token(u32),
    /// It has ended.
    Done(FinishReason),
}

impl Answering {
    /// An answer to `prompt`, which `constraint` may bind. Without a seed of its own a job takes one from its name, so that it says
    /// the same in every run.
    ///
    /// # Errors
    /// Those of the sampler.
    pub fn new(
        job: &Job,
        prompt: &[u32],
        tokenizer: &Arc<Tokenizer>,
        constraint: Option<Box<dyn Constraint>>,
    ) -> Result<Self> {
        let mut params = job.params.clone();
        params.seed.get_or_insert(xxh3_64(job.id.as_bytes()));
        let mut sampler = Sampler::new(params, Arc::clone(tokenizer))?;
        sampler.set_history(prompt);
        sampler.set_constraint(constraint);
        Ok(Self {
            sampler,
            decoder: StreamDecoder::new(false),
            stops: StopMatcher::new(job.stop.iter().cloned()),
            text: String::new(),
            tokens: 0,
            max_tokens: job.max_tokens,
            prompt_tokens: prompt.len(),
            reused: 0,
            logits: vec![],
            started: Instant::now(),
            first: None,
        })
    }

    /// Says how many prompt tokens were in a cache.
    pub fn set_reused(&mut self, reused: usize) {
        self.reused = reused;
    }

    /// Tokens so far.
    #[must_use]
    pub fn generated(&self) -> usize {
        self.tokens
    }

    /// Takes the logits after the prompt, or after the last token.
    ///
    /// # Errors
    /// Those of the sampler.
    pub fn next(&mut self, logits: &[f32], tokenizer: &Tokenizer) -> Result<Next> {
        if self.max_tokens == 0 {
            return self.take(0, tokenizer);
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        let token = self.sampler.sample(&mut self.logits)?;
        self.take(token, tokenizer)
    }

    /// How the next token is drawn, where the backend can do it.
    #[must_use]
    pub fn plan(&self) -> Option<Draw> {
        self.sampler.plan()
    }

    /// Takes the token that was drawn by [`Self::plan`].
    ///
    /// # Errors
    /// Those of the sampler.
    pub fn drawn(&mut self, token: u32, tokenizer: &Tokenizer) -> Result<Next> {
        self.sampler.drawn();
        self.take(token, tokenizer)
    }

    fn take(&mut self, token: u32, tokenizer: &Tokenizer) -> Result<Next> {
        self.first.get_or_insert_with(Instant::now);
        if self.max_tokens == 0 {
            return Ok(Next::Done(FinishReason::Length));
        }
        if tokenizer.is_stop(token) {
            return Ok(Next::Done(FinishReason::Stop));
        }
        self.sampler.accept(token)?;
        self.tokens += 1;
        self.text += &self.stops.push(&self.decoder.push(tokenizer, token)?);
        if self.stops.found().is_some() {
            return Ok(Next::Done(FinishReason::Stop));
        }
        if self.tokens >= self.max_tokens {
            return Ok(Next::Done(FinishReason::Length));
        }
        Ok(Next::Token(token))
    }

    /// The result.
    #[must_use]
    pub fn finish(mut self, finish_reason: FinishReason, with_timings: bool) -> Outcome {
        if self.stops.found().is_none() {
            let rest = self.decoder.finish();
            self.text += &self.stops.push(&rest);
            self.text += &self.stops.finish();
        }
        let first = self.first.unwrap_or_else(Instant::now);
        let timings = Timings {
            prompt_reused: self.reused,
            prompt_processed: self.prompt_tokens - self.reused,
            prompt_seconds: (first - self.started).as_secs_f64(),
            generated: self.tokens,
            generate_seconds: first.elapsed().as_secs_f64(),
        };
        Outcome {
            text: self.text,
            finish_reason,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.tokens,
            timings: with_timings.then_some(timings),
        }
    }
}

/// Whether an error is the job's own, so that the others go on.
#[must_use]
pub fn is_of_the_job(e: &Error) -> bool {
    matches!(e, Error::Sampler(_) | Error::Tokenizer(_) | Error::ContextFull { .. })
}

//! Many jobs at a time: chunked prefill between the decode steps of all running sequences, shared prefixes run once.
pub mod job;
pub mod prefix;
pub mod results;
pub mod schedule;

use std::sync::Arc;
use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64;

use self::job::{Ask, Job};
use self::results::Outcome;
use crate::error::{Error, Result};
use crate::generate::{FinishReason, Timings};
use crate::sampler::{Sampler, StopMatcher};
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
    /// An answer to `prompt`, of which `reused` tokens were in a cache. Without a seed of its own a job takes one from its name, so that
    /// it says the same in every run.
    ///
    /// # Errors
    /// Those of the sampler.
    pub fn new(job: &Job, prompt: &[u32], reused: usize, tokenizer: &Arc<Tokenizer>) -> Result<Self> {
        let mut params = job.params.clone();
        params.seed.get_or_insert(xxh3_64(job.id.as_bytes()));
        let mut sampler = Sampler::new(params, Arc::clone(tokenizer))?;
        sampler.set_history(prompt);
        Ok(Self {
            sampler,
            decoder: StreamDecoder::new(false),
            stops: StopMatcher::new(job.stop.iter().cloned()),
            text: String::new(),
            tokens: 0,
            max_tokens: job.max_tokens,
            prompt_tokens: prompt.len(),
            reused,
            started: Instant::now(),
            first: None,
        })
    }

    /// Takes the logits after the prompt, or after the last token.
    ///
    /// # Errors
    /// Those of the sampler.
    pub fn next(&mut self, logits: &mut [f32], tokenizer: &Tokenizer) -> Result<Next> {
        self.first.get_or_insert_with(Instant::now);
        if self.max_tokens == 0 {
            return Ok(Next::Done(FinishReason::Length));
        }
        let token = self.sampler.sample(logits)?;
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
    matches!(e, Error::Sampler(_) | Error::Tokenizer(_) | Error::ContextFull { .. } | Error::Input(_))
}

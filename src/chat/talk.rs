//! A conversation with a model: from messages to prompt tokens, to an answer, to a file; no terminal in sight.
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::conversation::{Conversation, documents_block};
use super::format::Format;
use super::route::Looked;
use crate::error::{Error, Result};
use crate::generate::{self, Answer, FinishReason, Limits, generate};
use crate::sampler::{Grammar, GrammarCompiler, Sampler, SamplerParams, SamplerState};
use crate::session::{FileError, Identity, Session, SessionFile};
use crate::tokenizer::{Prompt, Tokenizer};

/// A conversation with a model.
pub struct Talk {
    session: Session,
    tokenizer: Arc<Tokenizer>,
    sampler: Sampler,
    format: Format,
    identity: Identity,
    /// What was said.
    pub conversation: Conversation,
    /// When answers end.
    pub limits: Limits,
    /// Drops the oldest turns whole when the context is full, instead of an error.
    pub context_shift: bool,
    /// What every answer must look like.
    grammar: Option<(GrammarCompiler, Grammar)>,
    known: Option<Known>,
}

/// The tokens of the prompt and answer that the model was last given and made. The same text in the next prompt keeps these tokens,
/// also where the tokenizer would cut the answer otherwise than the model did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    text: String,
    tokens: Vec<u32>,
    /// Bytes of text and their tokens at the ends of prompts and answers, ascending: a later prompt may part from the text there.
    ends: Vec<(usize, usize)>,
}

impl Known {
    /// The tokens of as much of `text` as is known, and its length.
    fn beginning(&self, text: &str) -> Option<(usize, &[u32])> {
        let same = self.text.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        let (bytes, tokens) = *self.ends.iter().rev().find(|(bytes, _)| *bytes <= same)?;
        Some((bytes, &self.tokens[..tokens]))
    }
}

/// What a session file holds beside caches and tokens.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    conversation: Conversation,
    sampler: SamplerState,
    known: Option<Known>,
}

/// What a turn was.
#[derive(Clone, Debug)]
pub struct Turn {
    /// The answer.
    pub answer: Answer,
    /// What the router selected for it.
    pub looked: Looked,
}

/// What a caller hears while an answer is made.
pub trait Audience {
    /// `done` of `total` prompt tokens are processed.
    fn prompt(&mut self, done: usize, total: usize) -> ControlFlow<()>;
    /// The answer begins, after this prompt.
    fn begin(&mut self, prompt: &str);
    /// More of the answer.
    fn text(&mut self, text: &str) -> ControlFlow<()>;
    /// The oldest `turns` turns were dropped to make room.
    fn dropped(&mut self, turns: usize);
}

/// A rendered prompt and its tokens.
struct Rendered {
    text: String,
    tokens: Vec<u32>,
    /// Tokens before the last message's own text: where it is most likely edited.
    edge: usize,
}

impl Talk {
    /// A new conversation on `session`.
    ///
    /// # Errors
    /// Sampling parameters that cannot be used.
    pub fn new(
        session: Session,
        tokenizer: Arc<Tokenizer>,
        format: Format,
        params: SamplerParams,
    ) -> Result<Self> {
        let identity = Identity::new(session.engine(), format.source());
        Ok(Self {
            sampler: Sampler::new(params, Arc::clone(&tokenizer))?,
            session,
            tokenizer,
            format,
            identity,
            conversation: Conversation::default(),
            limits: Limits::default(),
            context_shift: false,
            grammar: None,
            known: None,
        })
    }

    /// The session underneath.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How messages become a prompt.
    #[must_use]
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// The sampling parameters.
    #[must_use]
    pub fn params(&self) -> &SamplerParams {
        self.sampler.params()
    }

    /// The seed in use.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.sampler.seed()
    }

    /// Sets a sampling parameter. The random numbers go on, except for a new seed.
    ///
    /// # Errors
    /// As [`SamplerParams::set`].
    pub fn set_param(&mut self, name: &str, value: &str) -> Result<()> {
        let mut params = self.sampler.params().clone();
        params.set(name, value)?;
        self.set_params(params)
    }

    /// Replaces the sampling parameters. The random numbers go on, except for a new seed.
    ///
    /// # Errors
    /// Parameters that cannot be used; nothing changes then.
    pub fn set_params(&mut self, params: SamplerParams) -> Result<()> {
        self.sampler = if params.seed == self.sampler.params().seed {
            let state = SamplerState { params, ..self.sampler.state() };
            Sampler::restore(state, Arc::clone(&self.tokenizer))?
        } else {
            Sampler::new(params, Arc::clone(&self.tokenizer))?
        };
        Ok(())
    }

    /// Lets only answers come that `grammar` allows.
    ///
    /// # Errors
    /// A grammar that cannot be used.
    pub fn set_grammar(&mut self, grammar: &Grammar) -> Result<()> {
        let compiler = GrammarCompiler::new(&self.tokenizer)?;
        compiler.compile(grammar)?;
        self.grammar = Some((compiler, grammar.clone()));
        Ok(())
    }

    /// Tokens of a text, as a document would take.
    ///
    /// # Errors
    /// Text that cannot be tokenized.
    pub fn count_tokens(&self, text: &str) -> Result<usize> {
        Ok(self.tokenizer.encode(text, false)?.len())
    }

    /// Tokens that the next prompt would have, were `text` said now.
    ///
    /// # Errors
    /// A template that fails.
    pub fn count_prompt(&self, text: &str) -> Result<usize> {
        let mut next = self.conversation.clone();
        next.say(text);
        Ok(self.render(&next)?.tokens.len())
    }

    /// Answers the last message. The answer, also one that was broken off, becomes part of the conversation if it is not empty.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when the prompt does not fit, and turns may not or cannot be dropped; a template that fails; errors of
    /// the engine. The conversation then still awaits the answer.
    pub fn answer(&mut self, audience: &mut impl Audience) -> Result<Turn> {
        let mut turn: Option<Turn> = None;
        let constraint = self.grammar.as_ref().map(|(compiler, grammar)| compiler.compile(grammar));
        self.sampler.set_constraint(constraint.transpose()?);
        loop {
            let made = turn.as_ref().map_or(&[][..], |t| &t.answer.tokens);
            let mut rendered = self.fitting(made.len(), turn.is_some(), audience)?;
            rendered.tokens.extend_from_slice(made);
            if turn.is_none() {
                audience.begin(&rendered.text);
            }
            let more = self.generate(&rendered, made.len(), audience)?;
            let full = more.answer.finish_reason == FinishReason::ContextFull;
            let grown = !more.answer.tokens.is_empty();
            let whole = match turn.take() {
                None => more,
                Some(before) => before.and(more),
            };
            if !(full && grown && self.context_shift && self.conversation.clone().drop_oldest()) {
                self.remember(&rendered, &whole.answer);
                return Ok(whole);
            }
            turn = Some(whole);
        }
    }

    /// The prompt, after dropping the oldest turns where that is asked for and needed.
    fn fitting(&mut self, extra: usize, full: bool, audience: &mut impl Audience) -> Result<Rendered> {
        let context = self.session.engine().context();
        let mut rendered = self.render(&self.conversation)?;
        let fits = |rendered: &Rendered, room: usize| rendered.tokens.len() + extra <= room;
        if !full && fits(&rendered, context) {
            return Ok(rendered);
        }
        // Once turns must go, enough go that the next ones need not go at once.
        let room = context - context / 4;
        let mut dropped = 0;
        while self.context_shift && !fits(&rendered, room) && self.conversation.drop_oldest() {
            dropped += 1;
            rendered = self.render(&self.conversation)?;
        }
        if dropped > 0 {
            self.known = None;
            audience.dropped(dropped);
        }
        if !fits(&rendered, context) {
            return Err(Error::ContextFull { needed: rendered.tokens.len() + extra, context });
        }
        Ok(rendered)
    }

    fn generate(&mut self, rendered: &Rendered, made: usize, audience: &mut impl Audience) -> Result<Turn> {
        let mut hearing = Hearing { audience, looked: Looked::default(), done: 0, interrupted: false };
        let (mut early, started) = (0, Instant::now());
        // A checkpoint before the last message's own text, where much stands before it, lets it be edited at no cost.
        if rendered.edge > self.session.common_prefix(&rendered.tokens) + MUCH && made == 0 {
            let total = rendered.tokens.len() - self.session.common_prefix(&rendered.tokens);
            let synced = self.session.sync(&rendered.tokens[..rendered.edge], |done, _| {
                generate::Listener::prompt(&mut hearing, done, total)
            });
            match synced {
                Ok(synced) => early = synced.processed,
                // The next call sees the same flag, and returns an empty answer.
                Err(Error::Interrupted) => hearing.interrupted = true,
                Err(e) => return Err(e),
            }
            hearing.done = early;
        }
        let seconds = started.elapsed().as_secs_f64();
        let limits = Limits {
            max_tokens: self.limits.max_tokens.map(|n| n.saturating_sub(made)),
            ..self.limits.clone()
        };
        let mut answer = generate(
            &mut self.session,
            &self.tokenizer,
            &mut self.sampler,
            &rendered.tokens,
            &limits,
            &mut hearing,
        )?;
        let t = &mut answer.timings;
        t.prompt_reused = t.prompt_reused.saturating_sub(early);
        t.prompt_processed += early;
        t.prompt_seconds += seconds;
        Ok(Turn { looked: hearing.looked, answer })
    }

    fn remember(&mut self, rendered: &Rendered, answer: &Answer) {
        if answer.text.is_empty() {
            return;
        }
        self.conversation.answer(&answer.text);
        let (mut text, mut tokens) = (rendered.text.clone(), rendered.tokens.clone());
        let kept = self.known.as_ref().and_then(|k| k.beginning(&text).map(|(bytes, _)| (k, bytes)));
        let mut ends: Vec<_> =
            kept.iter().flat_map(|(k, bytes)| k.ends.iter().filter(|(at, _)| at <= bytes)).copied().collect();
        ends.push((text.len(), tokens.len()));
        // An answer that a stop text cut, or with control tokens in it, has other tokens than its text.
        if self.tokenizer.decode(&answer.tokens, true).is_ok_and(|said| said == answer.text) {
            text += &answer.text;
            tokens.extend_from_slice(&answer.tokens);
            ends.push((text.len(), tokens.len()));
        }
        ends.dedup();
        self.known = Some(Known { text, tokens, ends });
    }

    /// Renders a conversation and finds its tokens.
    fn render(&self, conversation: &Conversation) -> Result<Rendered> {
        let prompt = self.format.render(conversation)?;
        let tokens = self.encode(&prompt)?;
        let own = conversation.messages.last().map_or("", |m| m.text.trim());
        let edge = prompt.text.rfind(own).filter(|_| !own.is_empty()).unwrap_or(0);
        let edge = self.tokens_within(&tokens, edge);
        Ok(Rendered { text: prompt.text, tokens, edge })
    }

    fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let Some((at, known)) = self.known.as_ref().and_then(|k| k.beginning(&prompt.text)) else {
            return Ok(self.tokenizer.encode_prompt(prompt)?);
        };
        if at == prompt.text.len() {
            return Ok(known.to_vec());
        }
        let guards = prompt.guards.iter().filter(|&&g| g > at).map(|g| g - at).collect();
        let rest = Prompt { text: prompt.text[at..].to_owned(), guards };
        let mut more = self.tokenizer.encode_prompt(&rest)?;
        let special = self.tokenizer.special();
        if let Some(bos) = special.bos.filter(|bos| special.add_bos && more.first() == Some(bos)) {
            // The rest does not begin the sequence, unless the template itself says so.
            let piece = self.tokenizer.piece(bos)?;
            if !rest.text.as_bytes().starts_with(piece) {
                more.remove(0);
            }
        }
        Ok([known, &more].concat())
    }

    /// How many of the tokens lie within the first `bytes` of the text.
    fn tokens_within(&self, tokens: &[u32], bytes: usize) -> usize {
        let special = self.tokenizer.special();
        let added = tokens.first().filter(|first| special.add_bos && special.bos == Some(**first));
        let mut left = bytes + added.and_then(|&bos| self.tokenizer.piece(bos).ok()).map_or(0, <[u8]>::len);
        tokens
            .iter()
            .take_while(|&&id| {
                let len = self.tokenizer.piece(id).map_or(0, <[u8]>::len);
                let within = len <= left;
                left = left.saturating_sub(len);
                within
            })
            .count()
    }

    /// Runs the pending documents, as the beginning of the next message, so that their processing is done when it comes.
    /// `progress` may break off; what was run stays.
    ///
    /// # Errors
    /// [`Error::Interrupted`], [`Error::ContextFull`], errors of the template and the engine.
    pub fn prepare(&mut self, progress: impl FnMut(usize, usize) -> ControlFlow<()>) -> Result<usize> {
        let tokens = self.prepared_tokens()?;
        self.session.sync(&tokens, progress)?;
        Ok(tokens.len())
    }

    /// The tokens that [`Self::prepare`] runs: those that do not depend on what is said next.
    ///
    /// # Errors
    /// Errors of the template.
    pub fn prepared_tokens(&self) -> Result<Vec<u32>> {
        const TEXT: &str = "Question";
        let block = documents_block(&self.conversation.pending);
        let mut next = self.conversation.clone();
        next.say(TEXT);
        let prompt = self.format.render(&next)?;
        let mut tokens = self.encode(&prompt)?;
        let end = prompt.text.rfind(TEXT).map_or(0, |at| at - (block.len() - block.trim_end().len()).min(at));
        tokens.truncate(self.tokens_within(&tokens, end).saturating_sub(1).max(1));
        Ok(tokens)
    }

    /// Forgets all messages; the system prompt stays.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn clear(&mut self) -> Result<()> {
        let system = self.conversation.system.take();
        self.conversation = Conversation { system, ..Conversation::default() };
        self.known = None;
        self.session.clear()
    }

    /// Saves caches and history to a session file. Returns its size.
    ///
    /// # Errors
    /// As [`Session::save`].
    pub fn save(&mut self, path: &Path) -> Result<u64> {
        let state = State {
            conversation: self.conversation.clone(),
            sampler: self.sampler.state(),
            known: self.known.clone(),
        };
        let state = serde_json::to_value(state)
            .map_err(|e| Error::Runtime(format!("the conversation cannot be written: {e}")))?;
        self.session.save(path, &self.identity, state)
    }

    /// Goes on from a session file, if it fits; otherwise nothing changes.
    ///
    /// # Errors
    /// As [`SessionFile::open`] and [`Session::load`].
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let damaged = |what| FileError::Damaged { path: path.to_owned(), what };
        let file = SessionFile::open(path)?;
        let state = State::deserialize(&file.contents().state).map_err(|e| damaged(e.to_string()))?;
        let vocab = self.tokenizer.len();
        if let Some(k) = &state.known {
            if k.tokens.iter().any(|&id| id as usize >= vocab) {
                return Err(damaged(format!("a token is outside the vocabulary of {vocab}")).into());
            }
            let inside = |&(bytes, tokens): &(usize, usize)| {
                k.text.is_char_boundary(bytes) && tokens <= k.tokens.len()
            };
            if !k.ends.iter().all(inside) {
                return Err(damaged("the ends of messages lie outside of its text".into()).into());
            }
        }
        let sampler = Sampler::restore(state.sampler, Arc::clone(&self.tokenizer))?;
        self.session.load(&file, &self.identity)?;
        self.sampler = sampler;
        self.conversation = state.conversation;
        self.known = state.known;
        Ok(())
    }
}

/// Tokens before the last message's own text from which on a checkpoint of their own pays.
const MUCH: usize = 64;

impl Turn {
    /// This turn, gone on with after room was made.
    fn and(mut self, more: Self) -> Self {
        let (a, b) = (&mut self.answer, more.answer);
        a.text += &b.text;
        a.tokens.extend(b.tokens);
        a.finish_reason = b.finish_reason;
        a.timings.prompt_processed += b.timings.prompt_processed;
        a.timings.prompt_seconds += b.timings.prompt_seconds;
        a.timings.generated += b.timings.generated;
        a.timings.generate_seconds += b.timings.generate_seconds;
        // Positions have moved: only the last part's are those of the tokens now there.
        self.looked = more.looked;
        self
    }
}

/// Passes on what is heard, and counts what was selected.
struct Hearing<'a, A> {
    audience: &'a mut A,
    looked: Looked,
    done: usize,
    interrupted: bool,
}

impl<A: Audience> generate::Listener for Hearing<'_, A> {
    fn prompt(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        if self.interrupted {
            return ControlFlow::Break(());
        }
        self.audience.prompt(self.done + done, self.done + total)
    }

    fn step(&mut self, session: &mut Session) -> Result<()> {
        self.looked.add(&session.engine_mut().selection(0)?);
        Ok(())
    }

    fn text(&mut self, text: &str) -> ControlFlow<()> {
        self.audience.text(text)
    }
}

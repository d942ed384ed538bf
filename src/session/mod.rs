//! One conversation over an engine: what its cache holds, and how a changed text reuses what stayed the same.
mod file;
mod identity;

use std::ops::ControlFlow;
use std::path::Path;

use serde_json::Value;

use crate::engine::{Engine, Row, SeqId};
use crate::error::{Error, Result};
use crate::sampler::Draw;

pub use file::{Contents, Error as FileError, SessionFile, VERSION, write};
pub use identity::{Identity, model_hash};

/// A sequence together with the tokens that its cache holds.
pub struct Session {
    engine: Engine,
    seq: SeqId,
    tokens: Vec<u32>,
    /// Logits after the last token.
    logits: Vec<f32>,
    /// Logits after the prompt that was last synced, so that another answer to it costs nothing.
    prompt: Option<(usize, Vec<f32>)>,
}

/// What [`Session::sync`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// Tokens of the text that were in the cache already.
    pub reused: usize,
    /// Tokens that were run.
    pub processed: usize,
}

impl Session {
    /// An empty conversation on `engine`.
    ///
    /// # Errors
    /// As [`Engine::create`].
    pub fn new(mut engine: Engine) -> Result<Self> {
        let seq = engine.create()?;
        Ok(Self { engine, seq, tokens: vec![], logits: vec![], prompt: None })
    }

    /// The engine underneath.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The engine underneath.
    pub fn engine_mut(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// The sequence that this conversation is.
    #[must_use]
    pub fn seq(&self) -> SeqId {
        self.seq
    }

    /// Tokens in the cache.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Logits after the last token, `[vocab]`; a sampler may work on them in place.
    pub fn logits(&mut self) -> &mut [f32] {
        &mut self.logits
    }

    /// How many leading tokens of `text` a [`Self::sync`] would find in the cache.
    #[must_use]
    pub fn common_prefix(&self, text: &[u32]) -> usize {
        self.tokens.iter().zip(text).take_while(|(a, b)| a == b).count()
    }

    /// Makes the cache hold exactly `text` and the logits those after its last token: the common prefix stays, the rest is run.
    /// `progress` hears (tokens done, tokens to do) and may break off.
    ///
    /// # Errors
    /// [`Error::ContextFull`] before anything is changed; [`Error::Interrupted`], after which the cache holds a shorter prefix of
    /// `text`, from which a later call goes on.
    pub fn sync(
        &mut self,
        text: &[u32],
        mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Synced> {
        if text.is_empty() {
            return Err(Error::Input("an empty prompt has no next token: give at least one token".into()));
        }
        if text.len() > self.engine.context() {
            return Err(Error::ContextFull { needed: text.len(), context: self.engine.context() });
        }
        let common = self.common_prefix(text);
        if common == text.len() && self.restore(common)? {
            return Ok(Synced { reused: common, processed: 0 });
        }
        // The end of an answer is where the next turn is most likely to be edited.
        self.engine.checkpoint(self.seq)?;
        // At least the last token runs, for its logits.
        let start = self.engine.rewind(self.seq, common.min(text.len() - 1))?;
        self.tokens.truncate(start);
        self.prompt = None;
        let todo = text.len() - start;
        let seq = self.seq;
        let result =
            self.engine.prefill(seq, &text[start..], |done| progress(done, todo)).map(<[f32]>::to_vec);
        // Also after an interruption the cache holds a prefix of the text.
        self.tokens.extend_from_slice(&text[start..self.engine.len(seq)]);
        self.logits = result?;
        self.engine.checkpoint(seq)?;
        self.prompt = Some((text.len(), self.logits.clone()));
        Ok(Synced { reused: start, processed: todo })
    }

    /// Cuts back to `len` tokens whose logits are known.
    fn restore(&mut self, len: usize) -> Result<bool> {
        let Some((at, logits)) = &self.prompt else { return Ok(false) };
        if *at != len {
            return Ok(false);
        }
        if self.tokens.len() > len {
            let logits = logits.clone();
            let start = self.engine.rewind(self.seq, len)?;
            self.tokens.truncate(start);
            if start < len {
                return Ok(false);
            }
            self.logits = logits;
        } else {
            self.logits.clone_from(logits);
        }
        Ok(true)
    }

    /// Appends one token; the logits are those after it.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when the context holds no more; as [`Engine::run`].
    pub fn push(&mut self, token: u32) -> Result<()> {
        let logits = self.engine.step(&[(self.seq, token)])?;
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.tokens.push(token);
        Ok(())
    }

    /// Appends one token and draws the next one where the model runs. [`Self::logits`] is empty afterwards.
    ///
    /// # Errors
    /// As [`Self::push`] and [`Engine::run_drawn`].
    pub fn push_drawn(&mut self, token: u32, draw: Draw) -> Result<u32> {
        let next = self.engine.run_drawn(&[Row { seq: self.seq, token, output: true }], &[draw])?;
        self.logits.clear();
        self.tokens.push(token);
        Ok(next[0])
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn clear(&mut self) -> Result<()> {
        self.engine.rewind(self.seq, 0)?;
        self.tokens.clear();
        self.logits.clear();
        self.prompt = None;
        Ok(())
    }

    /// Saves the caches, the tokens and the application's `state` to `path`, bound to `identity`. The file appears whole or not at
    /// all. Returns its size.
    ///
    /// # Errors
    /// [`Error::Io`], and what the backend reports.
    pub fn save(&mut self, path: &Path, identity: &Identity, state: Value) -> Result<u64> {
        let routing = self.routing();
        let logits = self.prompt.as_ref().map(|(at, logits)| (*at, routing, logits.clone()));
        let lens: Vec<usize> = self.engine.checkpoints(self.seq).map(|(len, _)| len).collect();
        let kept = worth_saving(&lens, self.tokens.len());
        let contents = Contents { tokens: self.tokens.clone(), logits, state };
        file::write(path, identity, &contents, &mut self.engine, self.seq, &kept)
    }

    /// Takes the place of everything here with what `file` holds, if it fits; otherwise nothing changes.
    ///
    /// # Errors
    /// As [`SessionFile::check`]. When the device itself fails the session is empty afterwards.
    pub fn load(&mut self, file: &SessionFile, identity: &Identity) -> Result<()> {
        file.check(identity, &self.engine)?;
        self.clear()?;
        if let Err(error) = file.import(&mut self.engine, self.seq) {
            self.clear()?;
            return Err(error);
        }
        let Contents { tokens, logits, .. } = file.contents();
        self.tokens.clone_from(tokens);
        let routing = self.routing();
        let usable = logits.as_ref().filter(|(_, by, _)| *by == routing);
        self.prompt = usable.map(|(at, _, logits)| (*at, logits.clone()));
        if let Some((_, logits)) = self.prompt.as_ref().filter(|(at, _)| *at == tokens.len()) {
            self.logits.clone_from(logits);
        }
        Ok(())
    }

    /// Makes an empty session hold `len` positions of random cache rows, without running the model: for timing at depth.
    ///
    /// # Errors
    /// As [`Engine::import`].
    pub fn fill_random(&mut self, len: usize, seed: u64) -> Result<()> {
        self.engine.fill_random(self.seq, len, seed)?;
        let vocab = self.engine.model().config.vocab;
        self.tokens = (0..len).map(|i| (i % vocab) as u32).collect();
        Ok(())
    }

    /// What logits depend on beside the cache.
    fn routing(&self) -> String {
        let (routing, top_k) = self.engine.routing();
        format!("{routing} {top_k}")
    }
}

/// Which checkpoints go into a file: the last few, where the next edit is most likely, and ever fewer farther back.
fn worth_saving(lens: &[usize], len: usize) -> Vec<usize> {
    const LAST: usize = 4;
    const MOST: usize = 8;
    let mut kept: Vec<usize> = vec![];
    for &at in lens.iter().rev() {
        let far = kept.last().is_none_or(|&last| len - at >= 2 * (len - last));
        if kept.len() < LAST || (far && kept.len() < MOST) {
            kept.push(at);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_saved_densely_at_the_end_only() {
        assert!(worth_saving(&[], 10).is_empty());
        assert_eq!(worth_saving(&[1, 2, 3], 10), [3, 2, 1]);
        let every: Vec<usize> = (0..100).map(|i| i * 100).collect();
        assert_eq!(worth_saving(&every, 10_000), [9900, 9800, 9700, 9600, 9200, 8400, 6800, 3600]);
    }
}

//! Cross-entropy of a text, window by window.
//!
//! The text is cut into windows of `n` tokens; in each, the tokens of the second half are scored, so that every scored token has at least
//! n/2 tokens before it (as llama-perplexity does).
use serde::Serialize;

use super::{Mean, log_sum_exp};
use crate::engine::{Engine, Row};
use crate::error::{Error, Result};

/// Cuts tokens into windows and says which positions are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window.
    pub len: usize,
    /// Windows at most.
    pub limit: Option<usize>,
    /// Score only this many positions at the end of a window.
    pub last: Option<usize>,
}

impl Windows {
    /// The first position whose logits are scored, against the token after it.
    #[must_use]
    pub fn first(&self) -> usize {
        match self.last {
            Some(n) => (self.len - 1).saturating_sub(n),
            None => self.len / 2,
        }
    }

    /// Whole windows in `tokens`.
    ///
    /// # Errors
    /// [`Error::Input`] when there is not even one.
    pub fn cut<'a>(&self, tokens: &'a [u32]) -> Result<Vec<&'a [u32]>> {
        let windows: Vec<_> = tokens.chunks_exact(self.len).take(self.limit.unwrap_or(usize::MAX)).collect();
        if windows.is_empty() {
            return Err(Error::Input(format!(
                "the text has {} tokens, one window needs {}: give more text or a smaller -c",
                tokens.len(),
                self.len
            )));
        }
        Ok(windows)
    }
}

/// Runs one window from an empty sequence and hands (position, logits `[vocab]`) of every scored position to `score`.
///
/// # Errors
/// As [`Engine::run`], and those of `score`.
pub fn run_window(
    engine: &mut Engine,
    window: &[u32],
    first: usize,
    mut score: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let seq = engine.create()?;
    let (vocab, step) = (engine.model().config.vocab, engine.spec().max_rows.min(engine.spec().max_outputs));
    let result = (|| {
        let mut at = 0;
        while at < window.len() {
            let end = (at + step).min(window.len());
            // The last token's logits would predict a token of the next window.
            let scored = |p: usize| p >= first && p + 1 < window.len();
            let rows: Vec<Row> =
                (at..end).map(|p| Row { seq, token: window[p], output: scored(p) }).collect();
            let logits = engine.run(&rows)?;
            for (p, logits) in (at..end).filter(|p| scored(*p)).zip(logits.chunks_exact(vocab)) {
                score(p, logits)?;
            }
            at = end;
        }
        Ok(())
    })();
    engine.free(seq);
    result
}

/// Cross-entropy of `logits` against the token that came, in nats.
#[must_use]
pub fn loss(logits: &[f32], next: u32) -> f64 {
    log_sum_exp(logits) - f64::from(logits[next as usize])
}

/// Cross-entropy over windows, in all, by depth and by window.
#[derive(Clone, Debug, Default)]
pub struct CrossEntropy {
    /// Of every scored token, in nats.
    pub all: Mean,
    /// By eighth of the window.
    pub by_depth: [Mean; 8],
    /// By window.
    pub by_window: Vec<Mean>,
}

/// What is printed of a [`CrossEntropy`].
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Scored tokens.
    pub tokens: u64,
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Its standard error.
    pub loss_error: f64,
    /// exp(loss).
    pub perplexity: f64,
    /// Its standard error.
    pub perplexity_error: f64,
    /// Mean cross-entropy by eighth of the window; `None` where nothing was scored.
    pub loss_by_depth: Vec<Option<f64>>,
    /// Standard errors of these.
    pub loss_by_depth_error: Vec<Option<f64>>,
    /// Mean cross-entropy of each window.
    pub loss_by_window: Vec<f64>,
    /// Standard errors of these.
    pub loss_by_window_error: Vec<f64>,
}

impl CrossEntropy {
    /// Begins another window.
    pub fn window(&mut self) {
        self.by_window.push(Mean::default());
    }

    /// Scores `logits` at position `p` of a window of `len` tokens against the token that follows.
    pub fn push(&mut self, p: usize, len: usize, logits: &[f32], next: u32) {
        self.add(p, len, loss(logits, next));
    }

    /// Takes in the loss at position `p` of a window of `len` tokens.
    pub fn add(&mut self, p: usize, len: usize, loss: f64) {
        self.all.push(loss);
        self.by_depth[(p * 8 / len).min(7)].push(loss);
        if let Some(window) = self.by_window.last_mut() {
            window.push(loss);
        }
    }

    /// For printing.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let (loss, error) = (self.all.mean(), self.all.error());
        Summary {
            tokens: self.all.count(),
            loss,
            loss_error: error,
            perplexity: loss.exp(),
            perplexity_error: loss.exp() * error,
            loss_by_depth: self.by_depth.iter().map(|m| (m.count() > 0).then(|| m.mean())).collect(),
            loss_by_depth_error: self.by_depth.iter().map(|m| (m.count() > 0).then(|| m.error())).collect(),
            loss_by_window: self.by_window.iter().map(Mean::mean).collect(),
            loss_by_window_error: self.by_window.iter().map(Mean::error).collect(),
        }
    }
}

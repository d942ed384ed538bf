//! From logits to the next token.
mod candidates;
mod constraint;
mod draw;
mod grammar;
mod history;
mod math;
mod params;
mod rng;
mod stop;
#[cfg(test)]
mod tests;

pub use constraint::{Constraint, TokenSet};
pub use draw::Draw;
pub use grammar::{Grammar, GrammarCompiler};
pub use params::SamplerParams;
pub use rng::{Rng, random_seed};
pub use stop::StopMatcher;

use crate::tokenizer::Tokenizer;
use candidates::{Candidate, Candidates, sigma_floor};
use history::History;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Parameters that cannot be used, or logits from which no token can be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No parameter has this name.
    #[error("{name:?} is no sampling parameter; there are: {known}")]
    UnknownParameter {
        /// The name.
        name: String,
        /// All names.
        known: String,
    },
    /// A parameter's value is not one, or out of range.
    #[error("{name}: expected {expected}, found {found:?}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// The value.
        found: String,
        /// Its range.
        expected: &'static str,
    },
    /// A parameter in a file.
    #[error("{key}: {error}")]
    Key {
        /// The metadata key.
        key: String,
        /// What is wrong.
        error: Box<Self>,
    },
    /// A logit bias for a token that does not exist.
    #[error("logit-bias: token {id} is outside the vocabulary of {size}")]
    BiasOutOfRange {
        /// The token.
        id: u32,
        /// Tokens that exist.
        size: usize,
    },
    /// The model's output is broken.
    #[error(
        "the logit of token {id} is {value}: the model's output is broken (damaged weights, or a numerical overflow)"
    )]
    NotFinite {
        /// The token.
        id: usize,
        /// NaN or +inf.
        value: f32,
    },
    /// Every token is excluded.
    #[error(
        "no token is left to choose from: every logit is -inf (a grammar or logit biases exclude all tokens)"
    )]
    NothingLeft,
    /// A grammar cannot be used.
    #[error("the grammar cannot be used: {0}")]
    Grammar(String),
    /// A constraint failed.
    #[error("the grammar cannot go on: {0}")]
    Constraint(String),
}

impl Error {
    /// The process exit code: 1 run-time failure, 2 bad arguments or input file.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFinite { .. } | Self::NothingLeft | Self::Constraint(_) => 1,
            _ => 2,
        }
    }
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Log probabilities (natural) by the model's own logits, before biases, penalties and filters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// Of the token that was taken.
    pub chosen: f32,
    /// Of the most probable tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What must be kept, beside the tokens themselves, to go on exactly where a sampler stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplerState {
    /// The parameters.
    pub params: SamplerParams,
    /// The seed in use.
    pub seed: u64,
    /// The random numbers to come.
    pub rng: Rng,
    /// Mirostat's current surprise bound, in bits.
    pub mu: f32,
}

/// Chooses tokens by [`SamplerParams`]. Equal seeds and logits give equal tokens on every platform.
pub struct Sampler {
    params: SamplerParams,
    seed: u64,
    rng: Rng,
    mu: f32,
    tokenizer: Arc<Tokenizer>,
    history: History,
    constraint: Option<Box<dyn Constraint>>,
    candidates: Candidates,
    logprobs: Option<Logprobs>,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler")
            .field("params", &self.params)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}

impl Sampler {
    /// A sampler with an empty history. Without a seed in `params` it takes a random one: see [`Self::seed`].
    ///
    /// # Errors
    /// [`Error::Parameter`] and [`Error::BiasOutOfRange`].
    pub fn new(params: SamplerParams, tokenizer: Arc<Tokenizer>) -> Result<Self> {
        let seed = params.seed.unwrap_or_else(random_seed);
        let mu = 2.0 * params.mirostat_tau;
        Self::restore(SamplerState { params, seed, rng: Rng::new(seed), mu }, tokenizer)
    }

    /// A sampler that goes on where [`Self::state`] was taken, once the same tokens are accepted again.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn restore(state: SamplerState, tokenizer: Arc<Tokenizer>) -> Result<Self> {
        let SamplerState { params, seed, rng, mu } = state;
        params.validate()?;
        let size = tokenizer.len();
        if let Some((id, _)) = params.logit_bias.iter().find(|(id, _)| **id as usize >= size) {
            return Err(Error::BiasOutOfRange { id: *id, size });
        }
        let history = History::new(&params, &tokenizer);
        let candidates = Candidates::default();
        Ok(Self { params, seed, rng, mu, tokenizer, history, constraint: None, candidates, logprobs: None })
    }

    /// What must be kept, beside the tokens themselves, to go on from here.
    #[must_use]
    pub fn state(&self) -> SamplerState {
        SamplerState { params: self.params.clone(), seed: self.seed, rng: self.rng.clone(), mu: self.mu }
    }

    /// The parameters.
    #[must_use]
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// The seed in use: the given one, or the random one that was taken.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Lets only tokens come that `constraint` allows; `None` lets all come.
    pub fn set_constraint(&mut self, constraint: Option<Box<dyn Constraint>>) {
        self.constraint = constraint;
    }

    /// The constraint in force.
    #[must_use]
    pub fn constraint(&self) -> Option<&dyn Constraint> {
        self.constraint.as_deref()
    }

    /// Forgets the history and takes `tokens` in its place, for example after a turn was undone. The constraint and the random
    /// numbers stay as they are.
    pub fn set_history(&mut self, tokens: &[u32]) {
        self.history = History::new(&self.params, &self.tokenizer);
        tokens.iter().for_each(|id| self.history.push(*id));
    }

    /// Adds a token of the prompt to the history.
    pub fn accept_prompt(&mut self, id: u32) {
        self.history.push(id);
    }

    /// Adds a generated token to the history, and moves the constraint on.
    ///
    /// # Errors
    /// [`Error::Constraint`].
    pub fn accept(&mut self, id: u32) -> Result<()> {
        self.history.push(id);
        self.constraint.as_mut().map_or(Ok(()), |c| c.accept(id))
    }

    /// Chooses a token by `logits` `[vocab]`, which are changed. The token is not accepted yet.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::NothingLeft`], [`Error::Constraint`].
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32> {
        let raw = self.before(logits)?;
        if let Some(constraint) = &mut self.constraint {
            constraint.mask()?.apply(logits);
        }
        for (id, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = if *bias <= -1000.0 { f32::NEG_INFINITY } else { *logit + bias };
            }
        }
        self.history.penalize(&self.params, logits);
        self.history.dry(&self.params, logits);
        let id = if self.params.temperature == 0.0 { math::argmax(logits)? } else { self.draw(logits)?.id };
        if let Some((values, normalizer)) = raw {
            let chosen = values.get(id as usize).map_or(f32::NEG_INFINITY, |x| *x - normalizer);
            self.logprobs.get_or_insert_default().chosen = chosen;
        }
        Ok(id)
    }

    /// The next token's draw, where a device can do all that the parameters ask for: no constraint, bias, penalty or log probabilities, and
    /// no filters beside top-k, top-p and min-p. [`Draw::take`] then gives what [`Self::sample`] would. The random numbers move on when
    /// [`Self::drawn`] says that it was done.
    #[must_use]
    pub fn plan(&self) -> Option<Draw> {
        let p = &self.params;
        let untouched = self.constraint.is_none()
            && p.logprobs < 0
            && p.logit_bias.is_empty()
            && p.repeat_penalty == 1.0
            && p.presence_penalty == 0.0
            && p.frequency_penalty == 0.0
            && p.dry_multiplier == 0.0;
        if untouched && p.temperature == 0.0 {
            return Some(Draw::GREEDY);
        }
        let plain = p.mirostat == 0 && p.typical_p >= 1.0 && p.top_n_sigma <= 0.0 && p.xtc_probability == 0.0;
        (untouched && plain).then(|| Draw {
            temperature: p.temperature,
            top_k: usize::try_from(p.top_k).unwrap_or(0),
            top_p: p.top_p,
            min_p: p.min_p,
            at: self.rng.clone().next_f64(),
        })
    }

    /// The draw that [`Self::plan`] gave was done.
    pub fn drawn(&mut self) {
        if self.params.temperature != 0.0 {
            self.rng.next_f64();
        }
    }

    /// Log probabilities of the last sampled token, where [`SamplerParams::logprobs`] asks for them.
    #[must_use]
    pub fn logprobs(&self) -> Option<&Logprobs> {
        self.logprobs.as_ref()
    }

    /// Where log probabilities are wanted: those of the best tokens, and for the one to be chosen the unchanged logits and the
    /// logarithm of their sum.
    fn before(&mut self, logits: &[f32]) -> Result<Option<(Vec<f32>, f32)>> {
        let Ok(n) = usize::try_from(self.params.logprobs) else { return Ok(None) };
        let top = math::max(logits)?;
        if top == f32::NEG_INFINITY {
            return Err(Error::NothingLeft);
        }
        let normalizer = (f64::from(top) + math::sum_exp(logits, top).ln()) as f32;
        let mut best = Vec::new();
        if n > 0 {
            self.candidates.take(logits, n, f32::NEG_INFINITY);
            best.extend(self.candidates.as_slice().iter().map(|c| (c.id, c.logit - normalizer)));
        }
        self.logprobs = Some(Logprobs { chosen: f32::NEG_INFINITY, top: best });
        Ok(Some((logits.to_vec(), normalizer)))
    }

    fn draw(&mut self, logits: &[f32]) -> Result<Candidate> {
        let top = math::max(logits)?;
        if top == f32::NEG_INFINITY {
            return Err(Error::NothingLeft);
        }
        match self.params.mirostat {
            0 => self.filter(logits, top),
            1 => self.mirostat_1(logits),
            _ => self.mirostat_2(logits),
        }
        let chosen = self.candidates.pick(self.rng.next_f64()).ok_or(Error::NothingLeft)?;
        if self.params.mirostat > 0 {
            let surprise = -chosen.p.log2();
            self.mu -= self.params.mirostat_eta * (surprise - self.params.mirostat_tau);
        }
        Ok(chosen)
    }

    /// The filters in their order, then the temperature.
    fn filter(&mut self, logits: &[f32], top: f32) {
        let p = &self.params;
        let c = &mut self.candidates;
        c.take(logits, usize::try_from(p.top_k).unwrap_or(0), sigma_floor(logits, top, p.top_n_sigma));
        c.typical(p.typical_p);
        c.top_p(p.top_p);
        c.min_p(p.min_p);
        if p.xtc_probability > 0.0 && self.rng.next_f64() < f64::from(p.xtc_probability) {
            c.xtc(p.xtc_threshold);
        }
        c.softmax(p.temperature);
    }

    /// Mirostat (arXiv 2007.14966), algorithm 1: estimates how the probabilities fall off from the 100 best tokens, and keeps as
    /// many tokens as give the surprise mu.
    fn mirostat_1(&mut self, logits: &[f32]) {
        const BEST: usize = 100;
        let c = &mut self.candidates;
        c.take(logits, 0, f32::NEG_INFINITY);
        let n = logits.len() as f64;
        c.softmax(self.params.temperature);
        let mut best = c.clone();
        best.top_k(BEST);
        let (mut sum_tb, mut sum_tt) = (0.0, 0.0);
        for (rank, pair) in best.as_slice().windows(2).enumerate() {
            let t = ((rank + 2) as f64 / (rank + 1) as f64).ln();
            let b = (f64::from(pair[0].p) / f64::from(pair[1].p)).ln();
            if b.is_finite() {
                sum_tb += t * b;
                sum_tt += t * t;
            }
        }
        let s = sum_tb / sum_tt;
        let e = s - 1.0;
        let k = (e * f64::from(self.mu).exp2() / (1.0 - n.powf(-e))).powf(1.0 / s);
        // Not a number, for probabilities that do not fall off: keep the best.
        let k = if k.is_finite() { k.clamp(1.0, n) as usize } else { 1 };
        c.top_k(k);
        c.softmax(self.params.temperature);
    }

    /// Mirostat, algorithm 2: keeps the tokens whose surprise is at most mu, and the best in any case.
    fn mirostat_2(&mut self, logits: &[f32]) {
        let c = &mut self.candidates;
        c.take(logits, 0, f32::NEG_INFINITY);
        c.softmax(self.params.temperature);
        let least = (-self.mu).exp2();
        let kept = c.as_slice().iter().filter(|c| c.p >= least).count();
        c.top_k(kept.max(1));
        c.softmax(self.params.temperature);
    }
}

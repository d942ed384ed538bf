//! Timing of prefill and decode, in llama-bench's manner.
pub mod breakdown;
pub mod chart;
pub mod check;
pub mod contest;
pub mod limits;
pub mod list;
pub mod peer;
pub mod plot;
pub mod report;

use std::ops::ControlFlow;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::backend::Routing;
use crate::engine::{Engine, Row, SeqId};
use crate::error::Result;
use crate::sampler::Draw;

/// What one row of the table times. Data formats call the fields as llama-bench does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Test {
    /// Tokens of prompt to process.
    #[serde(rename = "n_prompt")]
    pub prompt: usize,
    /// Tokens to generate.
    #[serde(rename = "n_gen")]
    pub generate: usize,
    /// Positions in the cache before.
    #[serde(rename = "n_depth")]
    pub depth: usize,
    /// Sequences at a time.
    #[serde(rename = "n_sequences")]
    pub sequences: usize,
}

impl Test {
    /// `pp512`, `tg128`, `pp512+tg128`; ` @ d8192`; ` x4`.
    #[must_use]
    pub fn name(&self) -> String {
        let mut name = match (self.prompt, self.generate) {
            (p, 0) => format!("pp{p}"),
            (0, n) => format!("tg{n}"),
            (p, n) => format!("pp{p}+tg{n}"),
        };
        if self.depth > 0 {
            name += &format!(" @ d{}", self.depth);
        }
        if self.sequences > 1 {
            name += &format!(" x{}", self.sequences);
        }
        name
    }

    /// Positions that one sequence must hold.
    #[must_use]
    pub fn context(&self) -> usize {
        self.depth + self.prompt + self.generate
    }

    /// Tokens of all sequences that one repetition processes.
    #[must_use]
    pub fn tokens(&self) -> usize {
        (self.prompt + self.generate) * self.sequences
    }
}

/// How caches come to hold the depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Fill {
    /// Process a prompt of that length
    Prefill,
    /// Random rows, marked in the output: quick, and a step costs the same
    Random,
}

/// A deterministic stream of token ids.
struct Tokens {
    state: u64,
    vocab: u64,
}

impl Tokens {
    fn new(vocab: usize) -> Self {
        Self { state: 42, vocab: vocab as u64 }
    }

    fn next(&mut self) -> u32 {
        // Numerical Recipes' linear congruential generator: any spread of tokens will do.
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % self.vocab) as u32
    }

    fn take(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// One engine under test.
pub struct Bench {
    engine: Engine,
    tokens: Tokens,
    /// Prompt tokens handed over at a time.
    batch: usize,
    /// Sequences at `depth`, from the last test.
    ready: Vec<SeqId>,
    depth: usize,
}

impl Bench {
    /// Wraps an engine. Prompts are handed over `batch` tokens at a time (0: at once); the logits of the last of them are computed.
    #[must_use]
    pub fn new(engine: Engine, batch: usize) -> Self {
        let tokens = Tokens::new(engine.model().config.vocab);
        let batch = if batch == 0 { usize::MAX } else { batch };
        Self { engine, tokens, batch, ready: vec![], depth: 0 }
    }

    /// Changes the routing mode; what the caches hold serves every mode.
    ///
    /// # Errors
    /// As [`Engine::set_routing`].
    pub fn set_routing(&mut self, routing: Routing) -> Result<()> {
        let (_, top_k) = self.engine.routing();
        self.engine.set_routing(routing, top_k)
    }

    /// Prompt tokens handed over at a time; 0: all at once.
    #[must_use]
    pub fn batch(&self) -> usize {
        if self.batch == usize::MAX { 0 } else { self.batch }
    }

    /// Compares the engine with the reference, in its present mode. See [`check::against_reference`].
    ///
    /// # Errors
    /// As there.
    pub fn check(&mut self) -> Result<f64> {
        self.forget();
        check::against_reference(&mut self.engine)
    }

    /// The engine underneath.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Brings `test.sequences` sequences to `test.depth`.
    ///
    /// # Errors
    /// As [`Engine::prefill`].
    pub fn prepare(&mut self, test: &Test, fill: Fill) -> Result<()> {
        if self.depth == test.depth && self.ready.len() == test.sequences {
            return Ok(());
        }
        self.forget();
        for i in 0..test.sequences {
            let seq = self.engine.create()?;
            match fill {
                _ if test.depth == 0 => {}
                Fill::Random => self.engine.fill_random(seq, test.depth, 1 + i as u64)?,
                Fill::Prefill => {
                    let prompt = self.tokens.take(test.depth);
                    self.engine.prefill(seq, &prompt, |_| ControlFlow::Continue(()))?;
                    self.engine.checkpoint(seq)?;
                }
            }
            self.ready.push(seq);
        }
        self.depth = test.depth;
        Ok(())
    }

    /// Runs the test once from the prepared depth; returns (seconds of prompt processing, seconds of generation).
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn run(&mut self, test: &Test) -> Result<(f64, f64)> {
        let sequences = self.ready.clone();
        let started = Instant::now();
        if test.prompt > 0 {
            for &seq in &sequences {
                let prompt = self.tokens.take(test.prompt);
                for part in prompt.chunks(self.batch) {
                    self.engine.prefill(seq, part, |_| ControlFlow::Continue(()))?;
                }
            }
        }
        let prompt_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        for _ in 0..test.generate {
            // The greedy draw is a part of the step, as it is of a chat; the tokens that follow are the stream's, so that every run
            // does the same work.
            let row = |&seq| Row { seq, token: self.tokens.next(), output: true };
            let rows: Vec<Row> = sequences.iter().map(row).collect();
            self.engine.run_drawn(&rows, &vec![Draw::GREEDY; rows.len()])?;
        }
        let generate_seconds = started.elapsed().as_secs_f64();
        self.rewind(test)?;
        Ok((prompt_seconds, generate_seconds))
    }

    /// Ends the sequences of the last test.
    fn forget(&mut self) {
        self.ready.drain(..).for_each(|seq| self.engine.free(seq));
    }

    /// Back to the prepared depth.
    fn rewind(&mut self, test: &Test) -> Result<()> {
        for &seq in &self.ready {
            let at = self.engine.rewind(seq, test.depth)?;
            if at != test.depth {
                // The windows moved on and no checkpoint was kept: prepare anew next time.
                self.depth = usize::MAX;
            }
        }
        Ok(())
    }
}

/// Mean and sample standard deviation.
#[must_use]
pub fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return (mean, 0.0);
    }
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
    (mean, variance.sqrt())
}

/// The median; NaN of nothing.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_named_as_llama_bench_names_them() {
        let test = |prompt, generate, depth, sequences| Test { prompt, generate, depth, sequences };
        assert_eq!(test(512, 0, 0, 1).name(), "pp512");
        assert_eq!(test(0, 128, 8192, 1).name(), "tg128 @ d8192");
        assert_eq!(test(512, 128, 0, 4).name(), "pp512+tg128 x4");
    }

    #[test]
    fn deviation_is_the_samples() {
        assert_eq!(mean_and_deviation(&[2.0, 4.0]), (3.0, std::f64::consts::SQRT_2));
        assert_eq!(mean_and_deviation(&[2.0]), (2.0, 0.0));
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0])), (2.0, 2.5));
    }
}

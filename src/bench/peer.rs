//! llama.cpp itself on a Transformer file, timed in the same run as ours.
use std::path::Path;
use std::time::Instant;

use ggml_kernels::llama::run::{Llama, Params};
use ggml_kernels::quant::Type;

use super::{Fill, Test, Tokens};
use crate::error::{Error, Result};

/// A file in llama.cpp: CPU, flash attention on, f16 cache, weights repacked as it likes.
pub struct Peer {
    llama: Llama,
    tokens: Tokens,
}

impl Peer {
    /// Loads the file for sequences of `context` positions.
    ///
    /// # Errors
    /// [`Error::Input`] when llama.cpp does not take it.
    pub fn open(path: &Path, context: usize, batch: usize, threads: usize) -> Result<Self> {
        let params = Params {
            context: context.next_multiple_of(256) as u32,
            batch: batch as u32,
            threads: threads as i32,
            cache: Type::F16,
            flash_attention: true,
        };
        let llama = Llama::open(path, params).map_err(Error::Input)?;
        let tokens = Tokens::new(llama.vocab());
        Ok(Self { llama, tokens })
    }

    /// Brings the sequence to `depth` positions: by processing a prompt, or, at random, by processing its beginning and storing what
    /// came of it again and again.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn prepare(&mut self, depth: usize, fill: Fill) -> Result<()> {
        self.llama.truncate(depth);
        if fill == Fill::Random && self.llama.len() < depth {
            let start = self.tokens.take(Llama::REPEATED.min(depth));
            self.llama.fill(&start, depth).map_err(failed)?;
        }
        let missing = self.tokens.take(depth - self.llama.len());
        if missing.is_empty() { Ok(()) } else { self.decode(&missing) }
    }

    /// Runs a test of one sequence; returns (seconds of prompt processing, seconds of generation).
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn run(&mut self, test: &Test) -> Result<(f64, f64)> {
        let started = Instant::now();
        if test.prompt > 0 {
            let prompt = self.tokens.take(test.prompt);
            self.decode(&prompt)?;
        }
        let prompt_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        for _ in 0..test.generate {
            let token = self.tokens.next();
            self.decode(&[token])?;
        }
        Ok((prompt_seconds, started.elapsed().as_secs_f64()))
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<()> {
        self.llama.decode(tokens).map(|_| ()).map_err(failed)
    }
}

fn failed(e: String) -> Error {
    Error::Runtime(format!("llama.cpp: {e}"))
}

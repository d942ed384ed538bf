//! llama.cpp itself on a Transformer file, timed in the same run as ours.
use std::path::Path;
use std::time::Instant;

use ggml_kernels::llama::run::{Llama, Params};
use ggml_kernels::quant::Type;

use super::{Test, Tokens};
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

    /// Brings the sequence to `depth` positions, by processing a prompt.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn prepare(&mut self, depth: usize) -> Result<()> {
        self.llama.truncate(depth);
        let missing = self.tokens.take(depth - self.llama.len());
        if missing.is_empty() { Ok(()) } else { self.decode(&missing) }
    }

    /// Runs a test of one sequence; returns its seconds.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn run(&mut self, test: &Test) -> Result<f64> {
        let started = Instant::now();
        if test.prompt > 0 {
            let prompt = self.tokens.take(test.prompt);
            self.decode(&prompt)?;
        }
        for _ in 0..test.generate {
            let token = self.tokens.next();
            self.decode(&[token])?;
        }
        Ok(started.elapsed().as_secs_f64())
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<()> {
        self.llama.decode(tokens).map(|_| ()).map_err(|e| Error::Runtime(format!("llama.cpp: {e}")))
    }
}

//! Tokens drawn on the GPU: a step then brings a few bytes to the host instead of the logits.
use ggml_kernels::contracts::*;
use ggml_kernels::cuda::ops::{sample, sample_state_bytes};
use ggml_kernels::cuda::{Buffer, Device, Pinned, Stream};

use crate::error::Result;
use crate::sampler::Draw;

/// Rows of one launch.
const ROWS: usize = 64;
/// The most tokens that the kernel sorts, best first, before it draws; of more it draws by id.
const SORTED: usize = 2048;

/// What the sample kernel reads and writes.
pub struct Sampling {
    rows: Buffer<clsa_sample_row>,
    staged: Pinned<clsa_sample_row>,
    state: Buffer<u8>,
    /// Tokens, then statuses, of one launch: the kernel writes them across the bus, at the same address for both (unified addressing).
    out: Pinned<u32>,
}

/// Whether the kernel lays the probabilities end to end in the same order as the host.
pub fn draws_alike(draw: &Draw, vocab: usize) -> bool {
    let by_id = draw.top_k == 0 && vocab > SORTED;
    draw.temperature == 0.0 || by_id || (1..=SORTED).contains(&draw.top_k)
}

impl Sampling {
    /// For up to `most` draws of a step.
    pub fn new(device: &Device, most: usize) -> Result<Self> {
        Ok(Self {
            rows: device.zeros(most)?,
            staged: device.pinned(most)?,
            state: device.zeros(sample_state_bytes(ROWS))?,
            out: device.pinned(2 * ROWS)?,
        })
    }

    /// Bytes on the device.
    pub fn bytes(most: usize) -> u64 {
        (most * size_of::<clsa_sample_row>() + sample_state_bytes(ROWS)) as u64
    }

    /// Queues the copy of what the draws ask for. The draws before must be done.
    pub fn stage(&mut self, stream: &Stream, draws: &[Draw]) -> Result<()> {
        for (to, d) in self.staged.iter_mut().zip(draws) {
            *to = clsa_sample_row {
                temperature: d.temperature,
                top_p: d.top_p,
                min_p: d.min_p,
                top_k: d.top_k as i32,
                at: d.at,
                seed: 0,
                counter: 0,
            };
        }
        Ok(self.rows.write_async(0, &self.staged, draws.len(), stream)?)
    }

    /// Draws a token from each of `draws` rows of `logits`, `[draws][vocab]` in device memory, as [`Self::stage`] had it; `None` where
    /// they are broken or all excluded. Waits.
    ///
    /// # Safety
    /// `logits` has that many rows.
    pub unsafe fn draw(
        &mut self,
        stream: &Stream,
        logits: *const f32,
        vocab: usize,
        draws: usize,
    ) -> Result<Vec<Option<u32>>> {
        let mut tokens = vec![];
        for first in (0..draws).step_by(ROWS) {
            let n = ROWS.min(draws - first);
            let out = self.out.as_mut_ptr();
            let op = clsa_sample_cuda {
                n_rows: n as i32,
                n_vocab: vocab as i32,
                logits: logits.wrapping_add(first * vocab),
                rows: self.rows.at(first),
                state: self.state.ptr().cast(),
                tokens: out,
                status: out.wrapping_add(n),
            };
            // SAFETY: `out` holds ROWS tokens and statuses; the logits are the caller's promise.
            unsafe { sample(stream, &op) }?;
            stream.synchronize()?;
            let (token, status) = self.out[..2 * n].split_at(n);
            tokens.extend(token.iter().zip(status).map(|(t, s)| (*s == CLSA_SAMPLE_OK).then_some(*t)));
        }
        Ok(tokens)
    }
}

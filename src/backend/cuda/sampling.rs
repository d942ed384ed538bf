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
    /// Tokens, then statuses, of one launch.
    out: Buffer<u32>,
    host: Pinned<u32>,
}

/// Whether the kernel lays the probabilities end to end in the same order as the host.
pub fn draws_alike(draw: &Draw, vocab: usize) -> bool {
    let by_id = draw.top_k == 0 && vocab > SORTED;
    draw.temperature == 0.0 || by_id || (1..=SORTED).contains(&draw.top_k)
}

impl Sampling {
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            rows: device.zeros(ROWS)?,
            staged: device.pinned(ROWS)?,
            state: device.zeros(sample_state_bytes(ROWS))?,
            out: device.zeros(2 * ROWS)?,
            host: device.pinned(2 * ROWS)?,
        })
    }

    /// Bytes on the device.
    pub fn bytes() -> u64 {
        (ROWS * (size_of::<clsa_sample_row>() + 8) + sample_state_bytes(ROWS)) as u64
    }

    /// Draws a token from each row of `logits`, `[draws][vocab]` in device memory; `None` where they are broken or all excluded. Waits.
    ///
    /// # Safety
    /// `logits` has that many rows.
    pub unsafe fn draw(
        &mut self,
        stream: &Stream,
        logits: *const f32,
        vocab: usize,
        draws: &[Draw],
    ) -> Result<Vec<Option<u32>>> {
        let mut tokens = vec![];
        for (pass, draws) in draws.chunks(ROWS).enumerate() {
            let n = draws.len();
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
            self.rows.write_async(0, &self.staged, n, stream)?;
            let op = clsa_sample_cuda {
                n_rows: n as i32,
                n_vocab: vocab as i32,
                logits: logits.wrapping_add(pass * ROWS * vocab),
                rows: self.rows.ptr(),
                state: self.state.ptr().cast(),
                tokens: self.out.ptr(),
                status: self.out.at(n),
            };
            // SAFETY: buffers of ROWS rows; the logits are the caller's promise.
            unsafe { sample(stream, &op) }?;
            self.out.read_async(0, &mut self.host, 2 * n, stream)?;
            stream.synchronize()?;
            let (token, status) = self.host[..2 * n].split_at(n);
            tokens.extend(token.iter().zip(status).map(|(t, s)| (*s == CLSA_SAMPLE_OK).then_some(*t)));
        }
        Ok(tokens)
    }
}

//! Launch of sample, and its random numbers.
use super::{Executor, Launch, Result, ensure};
use crate::contracts::*;
use crate::cuda::Pod;

/// Threads of a block (sample.cu).
const THREADS: usize = 1024;
/// Logits that a block looks at, at least.
const LOGITS_PER_BLOCK: usize = 2 * THREADS;

// SAFETY: plain numbers without padding; every bit pattern is valid.
unsafe impl Pod for clsa_sample_row {}
const _: () = assert!(size_of::<clsa_sample_row>() == 4 * 4 + 3 * 8);

/// Bytes of state for `rows` rows, zero at first.
#[must_use]
pub fn sample_state_bytes(rows: usize) -> usize {
    rows * size_of::<clsa_sample_state>()
}

/// Queues `op` (sample_cuda.h), whose pointers are device addresses.
///
/// # Errors
/// A shape that cannot be, or a failure of the driver.
///
/// # Safety
/// The pointers of `op` are valid on the executor's device for the shapes that the header states until the work is done.
pub unsafe fn sample(on: &impl Executor, op: &clsa_sample_cuda) -> Result<()> {
    ensure(op.n_rows > 0 && op.n_vocab > 0, || format!("sample: {} rows of {}", op.n_rows, op.n_vocab))?;
    let rows = op.n_rows as usize;
    let splits =
        (op.n_vocab as usize).div_ceil(LOGITS_PER_BLOCK).clamp(1, (on.multiprocessors() * 2 / rows).max(1));
    let launch = Launch::new(1, THREADS).grid(splits, rows, 1).shared(CLSA_SAMPLE_SHARED as usize);
    // SAFETY: the kernel's parameter struct; its addresses are the caller's promise.
    unsafe { on.run("sample", launch, op) }
}

/// The random number that sample draws for `seed` and `counter`: Philox4x32-10 of key `seed` and counter (`counter`, 0), the first 64
/// bits shifted right by 11, times 2^-53.
#[must_use]
pub fn philox_uniform(seed: u64, counter: u64) -> f64 {
    let x = philox([counter as u32, (counter >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(x[1]) << 32 | u64::from(x[0]);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
fn philox(mut x: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (a, b) = (u64::from(x[0]) * 0xd251_1f53, u64::from(x[2]) * 0xcd9e_8d57);
        x = [(b >> 32) as u32 ^ x[1] ^ key[0], b as u32, (a >> 32) as u32 ^ x[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with Random123.
    #[test]
    fn philox_gives_the_published_numbers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox(pi, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}

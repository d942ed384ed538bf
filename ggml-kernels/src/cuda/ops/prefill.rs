//! Launches of attention for many rows of the same sequences, and of what comes right before it.
use half::f16;

use super::attention::{Heads, aligned, fast, same_heads, same_place};
use super::{Executor, Launch, Result, rope_append};
use crate::contracts::*;

/// Rows (token, head) of a tile, its threads, and the positions of a tile of keys (prefill_attention.cuh).
const ROWS: usize = 128;
const THREADS: usize = 256;
const KEYS: usize = 64;
/// Threads of a block (prefill_hopper.cu): two for each row.
const HOPPER_THREADS: usize = 2 * CLSA_PREFILL_HOPPER_ROWS as usize;

/// Queues `op` (attention.h) for a batch of many rows of the same sequences, whose pointers are device addresses. False when no kernel
/// takes this shape (a cache of f32, a head dim other than 64 and 128): then [`DecodeScratch::attention`] does, row by row.
///
/// # Errors
/// A shape that cannot be, or a failure of the driver.
///
/// # Safety
/// The pointers of `op` are valid on the executor's device until the work is done; positions lie within the page tables.
pub unsafe fn attention_prefill(on: &impl Executor, op: &clsa_attention) -> Result<bool> {
    let heads = Heads::new(op.n_head, op.n_kv, op.d)?;
    same_place(&op.k, &op.v, heads)?;
    aligned(op.q, op.out)?;
    let (fast, k, v) = fast(&op.k, &op.v, heads.d)?;
    if hopper(on, op, heads)? {
        // SAFETY: the caller's.
        unsafe { launch_hopper(on, heads, clsa_prefill_cuda { op: *op, ..Default::default() }) }?;
        return Ok(true);
    }
    let tokens = ROWS / (heads.n_head / heads.n_kv);
    if !fast || tokens == 0 {
        return Ok(false);
    }
    let params = clsa_attention_cuda { op: *op, tokens: tokens as i32, ..Default::default() };
    let launch = Launch::new(1, THREADS)
        .grid((op.batch.n_rows as usize).div_ceil(tokens), heads.n_kv, 1)
        .shared(4 * KEYS * heads.d * 2);
    // SAFETY: the kernel's parameter struct; its addresses are the caller's promise.
    unsafe { on.run(&format!("attention_prefill_{k}_{v}_d{}", heads.d), launch, &params) }?;
    Ok(true)
}

/// The kernel for compute capability 9.0, of builds with code for that very architecture (`90a`).
const HOPPER: &str = "attention_prefill_hopper";

/// Whether there is one, and it takes the shape.
fn hopper(on: &impl Executor, op: &clsa_attention, heads: Heads) -> Result<bool> {
    let (fast, k, v) = fast(&op.k, &op.v, heads.d)?;
    let group = heads.n_head / heads.n_kv;
    Ok(fast
        && (k, v, heads.d) == ("f16", "f16", 128)
        && group <= CLSA_PREFILL_HOPPER_ROWS as usize
        && on.has(HOPPER))
}

unsafe fn launch_hopper(on: &impl Executor, heads: Heads, params: clsa_prefill_cuda) -> Result<()> {
    let tokens = CLSA_PREFILL_HOPPER_ROWS as usize / (heads.n_head / heads.n_kv);
    let params = clsa_prefill_cuda { tokens: tokens as i32, ..params };
    let launch = Launch::new(1, HOPPER_THREADS)
        .grid((params.op.batch.n_rows as usize).div_ceil(tokens), heads.n_kv, 1)
        .shared(CLSA_PREFILL_HOPPER_SHARED as usize);
    // SAFETY: the kernel's parameter struct; its addresses are the caller's promise.
    unsafe { on.run(HOPPER, launch, &params) }
}

/// Queues `append` (rope_append.h) and then `op` over the same caches for a batch of many rows of the same sequences, where one kernel
/// can turn the queries on their way; `op.q` and `append.q_out` are not used. Results go to `out`, `[n_rows][n_head * d]` f16 clamped to
/// its range, where given, else to `op.out`. False, with nothing queued, where no kernel can: then [`rope_append`] and
/// [`attention_prefill`] do.
///
/// # Errors
/// A shape that cannot be, or a failure of the driver.
///
/// # Safety
/// As [`attention_prefill`], for both ops and `out`.
pub unsafe fn append_attention_prefill(
    on: &impl Executor,
    append: &clsa_rope_append,
    op: &clsa_attention,
    out: Option<*mut f16>,
) -> Result<bool> {
    let heads = Heads::new(op.n_head, op.n_kv, op.d)?;
    same_place(&op.k, &op.v, heads)?;
    aligned(append.q, op.out)?;
    same_heads(append, op)?;
    // A lane turns the pairs that it holds.
    let turns = append.cos.is_null() || append.interleaved != 0 || append.n_rot == append.d;
    if !hopper(on, op, heads)? || !turns {
        return Ok(false);
    }
    let params = clsa_prefill_cuda {
        op: clsa_attention { q: append.q, ..*op },
        q_norm: append.q_norm,
        cos: append.cos,
        sin: append.sin,
        out_f16: out.map_or(std::ptr::null_mut(), <*mut f16>::cast),
        eps: append.eps,
        n_rot: append.n_rot,
        interleaved: append.interleaved,
        tokens: 0,
    };
    // SAFETY: the caller's.
    unsafe {
        rope_append::rope_append(on, &clsa_rope_append { q: std::ptr::null(), ..*append })?;
        launch_hopper(on, heads, params)?;
    }
    Ok(true)
}

//! Launch of rope_append.
use super::{Executor, Launch, Result, ensure, type_name};
use crate::contracts::*;

/// Threads of a block (rope_append.cu): a warp per head.
const THREADS: usize = 128;

/// Queues `op` (rope_append.h), whose pointers are device addresses.
///
/// # Errors
/// A shape that cannot be, or a failure of the driver.
///
/// # Safety
/// The pointers of `op` are valid on the executor's device until the work is done; the page tables name pages of the pools, and the
/// positions lie within them.
pub unsafe fn rope_append(on: &impl Executor, op: &clsa_rope_append) -> Result<()> {
    let heads = shape(op)?;
    let blocks = (heads as usize).div_ceil(THREADS / 32);
    let launch = Launch::new(1, THREADS)
        .grid(blocks, op.batch.n_rows as usize, 1)
        .shared(THREADS / 32 * op.d as usize * size_of::<f32>());
    // SAFETY: the kernel's parameter struct; its addresses are the caller's promise.
    unsafe { on.run("rope_append", launch, op) }
}

/// Heads of q, k and v in all, of a shape that can be.
pub(super) fn shape(op: &clsa_rope_append) -> Result<i32> {
    ensure(op.d > 0 && op.d <= CLSA_MAX_D as i32, || format!("rope_append: head dim {}", op.d))?;
    ensure(op.cos.is_null() || (op.n_rot % 2 == 0 && (0..=op.d).contains(&op.n_rot)), || {
        format!("rope_append: {} of {} dimensions rotated", op.n_rot, op.d)
    })?;
    let mut heads = if op.q.is_null() { 0 } else { op.n_head };
    for rows in [&op.k_cache, &op.v_cache] {
        if rows.base.is_null() {
            continue;
        }
        heads += op.n_kv;
        let kind = type_name(rows.type_)?;
        ensure(rows.width == op.n_kv * op.d && (kind != "q8_0" || op.d % CLSA_QK8_0 as i32 == 0), || {
            format!("rope_append: {kind} rows of {} for {} heads of {}", rows.width, op.n_kv, op.d)
        })?;
    }
    Ok(heads)
}

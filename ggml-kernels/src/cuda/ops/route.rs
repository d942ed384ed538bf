//! Launches of route: scores, pooling in block mode, selection.
use super::{Carver, Executor, Launch, Result, ensure, type_name};
use crate::contracts::*;

/// Threads of the scoring and pooling kernels, and of the selecting kernel (route.cu).
const SCORE_THREADS: usize = 512;
const SELECT_THREADS: usize = 1024;
const HISTOGRAM: usize = CLSA_ROUTE_BINS as usize * 4;

/// Scratch of route for `rows` rows at a time of up to `max_positions` positions; larger batches go in several passes.
#[derive(Clone, Copy, Debug)]
pub struct RouteScratch {
    rows: usize,
    max_positions: usize,
    base: *mut u8,
}

// SAFETY: a device address, no host memory.
unsafe impl Send for RouteScratch {}

impl RouteScratch {
    /// Bytes for that many rows and positions: 6 1/8 bytes a position, 48 KiB a row.
    #[must_use]
    pub fn bytes(rows: usize, max_positions: usize) -> usize {
        let mut carver = Carver::new(std::ptr::null_mut());
        Self { rows, max_positions, base: std::ptr::null_mut() }.carve(&mut carver);
        carver.used
    }

    /// Uses the device memory at `base`, of [`Self::bytes`], all zero at first.
    #[must_use]
    pub fn new(base: *mut u8, rows: usize, max_positions: usize) -> Self {
        Self { rows, max_positions, base }
    }

    fn carve(&self, carver: &mut Carver) -> clsa_route_cuda {
        let positions = self.max_positions.next_multiple_of(1024);
        clsa_route_cuda {
            max_positions: positions as i32,
            // First what must be zero, so that its place does not depend on the number of positions.
            histogram: carver.take(self.rows * CLSA_ROUTE_BINS as usize),
            state: carver.take(self.rows),
            candidates: carver.take(self.rows * CLSA_ROUTE_CANDIDATES as usize),
            bitmap: carver.take(self.rows * positions / 32),
            scores: carver.take(self.rows * positions),
            pooled: carver.take(self.rows * positions / 2),
            ..Default::default()
        }
    }

    /// Queues `op` (route.h), whose pointers are device addresses. `one_sequence`: consecutive rows mostly belong to one sequence
    /// (not so in a decode batch), so that a pass over its keys is shared by several of them.
    ///
    /// # Errors
    /// A shape that cannot be, or a failure of the driver.
    ///
    /// # Safety
    /// The pointers of `op` and this scratch are valid on the executor's device until the work is done, every position is below
    /// `max_positions`, and nothing else uses the scratch meanwhile.
    pub unsafe fn route(&self, on: &impl Executor, op: &clsa_route, one_sequence: bool) -> Result<()> {
        let block = op.block.max(1);
        let units = (op.k / block).max(1);
        let columns = op.k.max(block);
        ensure(op.k > 0 && op.n_columns >= columns, || {
            format!("route: k {} with {} columns, {columns} wanted", op.k, op.n_columns)
        })?;
        ensure(units as usize <= self.max_positions, || format!("route: {units} of {}", self.max_positions))?;
        // SAFETY: the caller's.
        unsafe { self.launch(on, op, one_sequence, false) }
    }

    /// Only the scores of route, as f32, for timing and tests: row r's lie at [`Self::scores`].
    ///
    /// # Errors
    /// As [`Self::route`]; the batch must not exceed the scratch's rows.
    ///
    /// # Safety
    /// As [`Self::route`].
    pub unsafe fn score(&self, on: &impl Executor, op: &clsa_route, one_sequence: bool) -> Result<()> {
        ensure(op.batch.n_rows as usize <= self.rows, || format!("score: {} rows", op.batch.n_rows))?;
        // SAFETY: the caller's.
        unsafe { self.launch(on, op, one_sequence, true) }
    }

    /// Device address of the scores of scratch row `row`, one per position.
    #[must_use]
    pub fn scores(&self, row: usize) -> *mut f32 {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let p = self.carve(&mut Carver::new(self.base));
        p.scores.cast::<f32>().wrapping_add(row * p.max_positions as usize)
    }

    unsafe fn launch(
        &self,
        on: &impl Executor,
        op: &clsa_route,
        one_sequence: bool,
        raw: bool,
    ) -> Result<()> {
        ensure(op.keys.ring == 0 && op.d > 0 && op.keys.width == op.d, || {
            format!("route: paged keys of {} values wanted, ring {} of {}", op.d, op.keys.ring, op.keys.width)
        })?;
        let kind = type_name(op.keys.type_)?;
        // 16-byte loads of f16 rows.
        let wide = kind == "q8_0"
            || (op.keys.row_stride.is_multiple_of(16) && op.keys.page_stride.is_multiple_of(16));
        let kernel = match op.d {
            64 | 128 if kind != "f32" && wide => format!("route_score_{kind}_d{}", op.d),
            _ => format!("route_score_{kind}"),
        };
        let group = if one_sequence { CLSA_ROUTE_GROUP as usize } else { 1 };
        let base = self.carve(&mut Carver::new(self.base));
        let n_rows = op.batch.n_rows as usize;
        for first in (0..n_rows).step_by(self.rows) {
            let rows = self.rows.min(n_rows - first);
            let params = clsa_route_cuda {
                op: *op,
                first_row: first as i32,
                n_rows: rows as i32,
                group: group as i32,
                raw: raw.into(),
                ..base
            };
            let groups = rows.div_ceil(group);
            let tiles = (base.max_positions as usize).div_ceil(16);
            // One block on each multiprocessor for a single row; more, smaller ones for many, so that the last wave is short.
            let blocks = on.multiprocessors() * if groups > 1 { 4 } else { 1 };
            let splits = (blocks / groups).clamp(1, tiles.div_ceil(SCORE_THREADS / 32));
            let launch = Launch::new(1, SCORE_THREADS).grid(splits, groups, 1).shared(group * HISTOGRAM);
            // SAFETY: the kernel's parameter struct; its addresses are the caller's promise.
            unsafe { on.run(&kernel, launch, &params)? };
            if raw {
                continue;
            }
            if op.block > 1 {
                let units = base.max_positions as usize / op.block as usize;
                let launch = Launch::new(1, SCORE_THREADS).shared(HISTOGRAM).grid(
                    units.div_ceil(SCORE_THREADS).clamp(1, 64),
                    rows,
                    1,
                );
                // SAFETY: as above.
                unsafe { on.run("route_pool", launch, &params)? };
            }
            let most = base.max_positions as usize / op.block.max(1) as usize;
            let splits = (most.div_ceil(SELECT_THREADS)).clamp(1, (on.multiprocessors() / rows).max(1));
            let launch = Launch::new(1, SELECT_THREADS)
                .grid(splits, rows, 1)
                .shared(CLSA_ROUTE_SELECT_SHARED as usize);
            // SAFETY: as above.
            unsafe { on.run("route_select", launch, &params)? };
        }
        Ok(())
    }
}

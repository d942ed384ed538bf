//! Launches of attention and gather_attention.
use super::{Carver, Executor, Launch, Result, ensure, type_name};
use crate::contracts::*;

/// Threads of the decode kernels and of the gathering kernel (decode_attention.cuh, gather_attention.cu).
const DECODE_THREADS: usize = 256;
const DECODE_WARPS: usize = DECODE_THREADS / 32;
const GATHER_THREADS: usize = 256;
/// Waves of blocks at most when positions are split.
const WAVES: usize = 4;
/// What a block's start, its warps' sums and their hand-over take, in the time of a tile (docs/gpu-notes.md).
const WAVE_TILES: usize = 3;

/// Scratch of the decode kernels: what the splits of a row leave for the block that combines them.
#[derive(Clone, Copy, Debug)]
pub struct DecodeScratch {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: a device address, no host memory.
unsafe impl Send for DecodeScratch {}

/// The heads of an attention op.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub n_head: usize,
    pub n_kv: usize,
    pub d: usize,
}

impl Heads {
    pub fn new(n_head: i32, n_kv: i32, d: i32) -> Result<Self> {
        ensure(n_kv > 0 && n_head > 0 && n_head % n_kv == 0, || format!("{n_head} heads over {n_kv}"))?;
        ensure(d > 0 && d % 16 == 0 && d <= CLSA_MAX_D as i32, || {
            format!("head dim {d}: a multiple of 16 up to {CLSA_MAX_D}")
        })?;
        Ok(Self { n_head: n_head as usize, n_kv: n_kv as usize, d: d as usize })
    }
    /// Query heads a block takes: what the kernels' registers hold.
    fn tile(self, fast: bool) -> usize {
        let most = if fast || self.d <= 128 { CLSA_HEAD_TILE as usize } else { 1024 / self.d };
        most.min(self.n_head / self.n_kv)
    }
    /// Blocks of one row and split.
    fn blocks(self, fast: bool) -> usize {
        self.n_kv * (self.n_head / self.n_kv).div_ceil(self.tile(fast))
    }
    /// Blocks that share the `positions` of each row: those that take the fewest tiles of 16 positions one after another, where every
    /// wave of blocks costs [`WAVE_TILES`] more.
    fn splits(self, on: &impl Executor, rows: usize, positions: usize, fast: bool) -> usize {
        let (blocks, slots) = (rows * self.blocks(fast), on.multiprocessors() * resident(self.d));
        // A window may begin within a tile: one more.
        let tiles = positions.div_ceil(16) + 1;
        let most = tiles.div_ceil(DECODE_WARPS).min(slots * WAVES / blocks).min(CLSA_MAX_SPLITS as usize);
        let cost = |splits: usize| {
            (blocks * splits).div_ceil(slots) * (tiles.div_ceil(DECODE_WARPS * splits) + WAVE_TILES)
        };
        (1..=most).min_by_key(|&splits| cost(splits)).unwrap_or(1)
    }
    fn split(self, base: *mut u8, rows: usize, splits: usize, fast: bool) -> (clsa_split, usize) {
        let mut carver = Carver::new(base);
        let parts = if splits > 1 { rows * self.n_head * splits } else { 0 };
        let split = clsa_split {
            // First, so that its zeros are never written over by another shape's parts.
            tickets: carver.take(TICKETS),
            partial: carver.take(parts * self.d),
            bounds: carver.take(parts * 2),
            splits: splits as i32,
            head_tile: self.tile(fast) as i32,
        };
        (split, carver.used)
    }
    fn shared(self, fast: bool) -> usize {
        let words =
            DECODE_WARPS * self.tile(fast) * (self.d + 4) + DECODE_WARPS * CLSA_HEAD_TILE as usize * 2 + 4;
        words * 4
    }
}

/// Decode blocks that a multiprocessor holds at a time, by their registers.
fn resident(d: usize) -> usize {
    if d <= 64 { 2 } else { 1 }
}

/// Tickets held: one per row and block of heads when positions are split, of which there are at most `WAVES` waves.
const TICKETS: usize = 16384;

/// Whether the kernels on f16 fragments take these rows, and the names of their types.
pub(super) fn fast(k: &clsa_rows, v: &clsa_rows, d: usize) -> Result<(bool, &'static str, &'static str)> {
    let (k_name, v_name) = (type_name(k.type_)?, type_name(v.type_)?);
    let wide = |rows: &clsa_rows, name| {
        name == "q8_0"
            || (name == "f16" && rows.row_stride.is_multiple_of(16) && rows.page_stride.is_multiple_of(16))
    };
    Ok(((d == 64 || d == 128) && wide(k, k_name) && wide(v, v_name), k_name, v_name))
}

/// Head dims of the general kernels.
fn general(d: usize) -> &'static str {
    match d {
        0..=64 => "d64",
        65..=128 => "d128",
        129..=256 => "d256",
        _ => "d512",
    }
}

/// The kernels read q and write out 16 bytes at a time.
pub(super) fn aligned(q: *const f32, out: *const f32) -> Result<()> {
    ensure(q.addr().is_multiple_of(16) && out.addr().is_multiple_of(16), || {
        format!("attention: q at {q:p} and out at {out:p}, multiples of 16 wanted")
    })
}

/// Checks that `append` writes what `op` reads, heads and caches.
pub(super) fn same_heads(append: &clsa_rope_append, op: &clsa_attention) -> Result<()> {
    ensure(
        !append.q.is_null()
            && (append.n_head, append.n_kv, append.d) == (op.n_head, op.n_kv, op.d)
            && (append.k_cache.base, append.v_cache.base) == (op.k.base, op.v.base),
        || "q, k and v of the same heads and caches wanted".into(),
    )
}

pub(super) fn same_place(k: &clsa_rows, v: &clsa_rows, heads: Heads) -> Result<()> {
    let width = (heads.n_kv * heads.d) as i32;
    ensure(k.width == width && v.width == width && k.ring == v.ring, || {
        format!(
            "rows of {} and {} values in rings of {} and {}, {width} wanted",
            k.width, v.width, k.ring, v.ring
        )
    })
}

/// How a decode batch is launched.
struct Plan {
    split: clsa_split,
    variant: String,
    launch: Launch,
}

impl DecodeScratch {
    /// Bytes for ops of this many heads on a device of that many multiprocessors, whatever the rows and positions.
    #[must_use]
    pub fn bytes(multiprocessors: usize, n_head: usize, n_kv: usize, d: usize) -> usize {
        // Splits are more than one only while rows * blocks * splits fits the waves; a block has n_head / blocks heads.
        let row_splits = multiprocessors * resident(d) * WAVES / n_kv;
        TICKETS * 4 + (row_splits * n_head * (d + 2) * 4).next_multiple_of(256) + 512
    }

    /// Uses the `bytes` of device memory at `base`, all zero at first; several shapes may share it one after another.
    #[must_use]
    pub fn new(base: *mut u8, bytes: usize) -> Self {
        Self { base, bytes }
    }

    fn split(&self, heads: Heads, rows: usize, splits: usize, fast: bool) -> Result<clsa_split> {
        let (split, used) = heads.split(self.base, rows, splits, fast);
        ensure(used <= self.bytes && (splits == 1 || rows * heads.blocks(fast) <= TICKETS), || {
            format!("decode attention: {used} bytes of scratch wanted, {} given", self.bytes)
        })?;
        Ok(split)
    }

    /// Queues `op` (attention.h) row by row, whose pointers are device addresses: for decode batches.
    ///
    /// # Errors
    /// A shape that cannot be, or a failure of the driver.
    ///
    /// # Safety
    /// The pointers of `op` and this scratch are valid on the executor's device until the work is done, positions lie within the page
    /// tables, and nothing else uses the scratch meanwhile.
    pub unsafe fn attention(&self, on: &impl Executor, op: &clsa_attention) -> Result<()> {
        let plan = self.plan(on, op, op.q)?;
        let params = clsa_attention_cuda { op: *op, split: plan.split, ..Default::default() };
        // SAFETY: the kernel's parameter struct; its addresses are the caller's promise.
        unsafe { on.run(&format!("attention_decode_{}", plan.variant), plan.launch, &params) }
    }

    /// Queues `append` (rope_append.h) and then `op` over the same caches in one launch, for decode batches: `op.q` and `append.q_out`
    /// are not used.
    ///
    /// # Errors
    /// As [`Self::attention`].
    ///
    /// # Safety
    /// As [`Self::attention`], for both; and no two rows of the batch belong to the same sequence, since the rows' blocks do not wait
    /// for each other. What the caches hold of the sequences, and the batch's positions, slots and tables, were written before the
    /// kernels of this step, of which those in front of this one may still run when it reads them.
    pub unsafe fn append_attention(
        &self,
        on: &impl Executor,
        append: &clsa_rope_append,
        op: &clsa_attention,
    ) -> Result<()> {
        super::rope_append::shape(append)?;
        same_heads(append, op)?;
        let plan = self.plan(on, op, append.q)?;
        let params = clsa_append_attention_cuda { append: *append, op: *op, split: plan.split };
        // SAFETY: as above.
        unsafe { on.run(&format!("attention_append_{}", plan.variant), plan.launch, &params) }
    }

    fn plan(&self, on: &impl Executor, op: &clsa_attention, q: *const f32) -> Result<Plan> {
        let heads = Heads::new(op.n_head, op.n_kv, op.d)?;
        same_place(&op.k, &op.v, heads)?;
        aligned(q, op.out)?;
        let (fast, k, v) = fast(&op.k, &op.v, heads.d)?;
        let rows = op.batch.n_rows as usize;
        let most = match (op.window, op.k.ring) {
            (w, _) if w > 0 => w as usize,
            (_, ring) if ring > 0 => ring as usize,
            _ => op.batch.table_stride as usize * CLSA_PAGE as usize,
        };
        let splits = heads.splits(on, rows, most, fast);
        Ok(Plan {
            split: self.split(heads, rows, splits, fast)?,
            variant: if fast { format!("{k}_{v}_d{}", heads.d) } else { format!("any_{}", general(heads.d)) },
            launch: Launch::new(1, DECODE_THREADS)
                .grid(splits, heads.blocks(fast), rows)
                .shared(heads.shared(fast)),
        })
    }

    /// Queues `op` (gather_attention.h), whose pointers are device addresses: over the rows that [`Gathered::gather`] put side by
    /// side for the same batch and selection, or through the selection itself. `settled`: this is not the first such op since they were
    /// gathered and since the selection was made; those rows are then read before the kernels in front of this one are done.
    ///
    /// # Errors
    /// A shape that cannot be, or a failure of the driver.
    ///
    /// # Safety
    /// As [`Self::attention`]; every count is at least 1 and at most `n_columns`. Where `settled`, a `gather_attention` of the same rows
    /// stands between the gathering and this one: it waits, and only then lets the kernels after it start.
    pub unsafe fn gather_attention(
        &self,
        on: &impl Executor,
        op: &clsa_gather_attention,
        gathered: Option<&Gathered>,
        settled: bool,
    ) -> Result<()> {
        let heads = Heads::new(op.n_head, op.n_kv, op.d)?;
        same_place(&op.k, &op.v, heads)?;
        ensure(op.k.ring == 0, || format!("gather_attention: paged rows wanted, ring of {}", op.k.ring))?;
        aligned(op.q, op.out)?;
        let (fast, k, v) = fast(&op.k, &op.v, heads.d)?;
        let rows = op.batch.n_rows as usize;
        let splits = heads.splits(on, rows, op.n_columns as usize, fast);
        let split = self.split(heads, rows, splits, fast)?;
        let params = match gathered {
            Some(g) => clsa_gather_cuda { split, settled: settled.into(), ..g.params(op)? },
            None => clsa_gather_cuda { op: *op, split, ..Default::default() },
        };
        let name = match (gathered, fast) {
            (Some(_), true) => format!("attend_gathered_d{}", heads.d),
            (Some(_), false) => format!("attend_gathered_any_{}", general(heads.d)),
            (None, true) => format!("attend_selected_{k}_{v}_d{}", heads.d),
            (None, false) => format!("attend_selected_any_{}", general(heads.d)),
        };
        let launch =
            Launch::new(1, DECODE_THREADS).grid(splits, heads.blocks(fast), rows).shared(heads.shared(fast));
        // SAFETY: as above.
        unsafe { on.run(&name, launch, &params) }
    }
}

/// Room for the selected K and V rows of a batch side by side, f16 (f32 where the cache is f32).
#[derive(Clone, Copy, Debug)]
pub struct Gathered {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: a device address, no host memory.
unsafe impl Send for Gathered {}

/// The type that rows of a type are gathered as.
fn gathered_type(kind: i32) -> u32 {
    if kind == CLSA_F32 as i32 { CLSA_F32 } else { CLSA_F16 }
}

impl Gathered {
    /// Bytes for `rows` rows of `columns` positions, each a K and a V row of `width` values of types `k` and `v` (enum clsa_type).
    #[must_use]
    pub fn bytes(rows: usize, columns: usize, width: usize, k: u32, v: u32) -> usize {
        let size =
            |kind: u32| (rows * columns * width * if kind == CLSA_F32 { 4 } else { 2 }).next_multiple_of(256);
        size(k) + size(v)
    }

    /// Uses the `bytes` of device memory at `base`.
    #[must_use]
    pub fn new(base: *mut u8, bytes: usize) -> Self {
        Self { base, bytes }
    }

    /// Whether `op`'s batch fits.
    #[must_use]
    pub fn holds(&self, op: &clsa_gather_attention) -> bool {
        let width = (op.n_kv * op.d) as usize;
        let (rows, columns) = (op.batch.n_rows as usize, op.n_columns as usize);
        Self::bytes(rows, columns, width, gathered_type(op.k.type_), gathered_type(op.v.type_)) <= self.bytes
    }

    fn params(&self, op: &clsa_gather_attention) -> Result<clsa_gather_cuda> {
        ensure(self.holds(op), || {
            format!("gather: {} rows of {} columns in {} bytes", op.batch.n_rows, op.n_columns, self.bytes)
        })?;
        let (k_type, v_type) = (gathered_type(op.k.type_), gathered_type(op.v.type_));
        let values =
            [op.batch.n_rows, op.n_columns, op.n_kv, op.d].into_iter().map(|n| n as usize).product::<usize>();
        let mut carver = Carver::new(self.base);
        Ok(clsa_gather_cuda {
            op: *op,
            k: carver.take::<u8>(values * if k_type == CLSA_F32 { 4 } else { 2 }),
            v: carver.take::<u8>(values * if v_type == CLSA_F32 { 4 } else { 2 }),
            k_type: k_type as i32,
            v_type: v_type as i32,
            ..Default::default()
        })
    }

    /// Queues the gathering of `op`'s selection, once per token; `op.q` and `op.out` are not used.
    ///
    /// # Errors
    /// The batch does not fit, or a failure of the driver.
    ///
    /// # Safety
    /// As [`DecodeScratch::gather_attention`].
    pub unsafe fn gather(&self, on: &impl Executor, op: &clsa_gather_attention) -> Result<()> {
        let heads = Heads::new(op.n_head, op.n_kv, op.d)?;
        same_place(&op.k, &op.v, heads)?;
        let wide = |rows: &clsa_rows| {
            rows.type_ != CLSA_F16 as i32
                || (rows.row_stride.is_multiple_of(16) && rows.page_stride.is_multiple_of(16))
        };
        ensure(op.k.ring == 0 && wide(&op.k) && wide(&op.v), || {
            format!(
                "gather: paged rows in strides of 16 bytes wanted, {} and {}",
                op.k.row_stride, op.v.row_stride
            )
        })?;
        let params = self.params(op)?;
        let blocks = (op.n_columns as usize).div_ceil(GATHER_THREADS / 32);
        let launch = Launch::new(1, GATHER_THREADS).grid(blocks, op.batch.n_rows as usize, 1);
        // SAFETY: as above.
        unsafe { on.run("gather_rows", launch, &params) }
    }
}

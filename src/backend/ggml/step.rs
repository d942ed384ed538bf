//! What varies from batch to batch. Graphs point here, so that one graph serves every batch of its shape.
use std::cell::UnsafeCell;

use ggml_kernels::contracts::clsa_batch;
use ggml_kernels::ops::{Op, Ops, Scratch};

use crate::backend::Batch;
use crate::cache::{CacheSpec, PageTables};
use crate::config::{Config, Rope};
use crate::model::Model;

/// Positions and slots of some rows, and their rotary angles.
struct Rows {
    n: usize,
    pos: Box<[i32]>,
    slot: Box<[i32]>,
    rope: Angles,
    cross_rope: Angles,
}

/// cos and sin of each row's position, `[rows][n_rot/2]`.
#[derive(Default)]
struct Angles {
    cos: Box<[f32]>,
    sin: Box<[f32]>,
}

struct Step {
    tokens: Box<[i32]>,
    outputs: Box<[i32]>,
    /// Every row of the batch, and its output rows.
    all: Rows,
    kept: Rows,
    tables: Box<[u32]>,
    table_stride: usize,
    n_slots: usize,
    count: Box<[i32]>,
    scratch: Scratch,
}

/// State that the custom nodes of every graph share.
pub struct Shared {
    step: UnsafeCell<Step>,
    /// The kernels in use.
    pub ops: &'static Ops,
    /// Pieces that every op is cut into.
    pub pieces: usize,
    /// Angle per position of each rotated pair.
    frequencies: Vec<f64>,
    cross_frequencies: Vec<f64>,
}

// SAFETY: `step` is written only through `set`, `grow_scratch` and by nodes that run. The first two need a backend that is borrowed
// mutably while no graph runs; during a run, kernels write only `count` and `scratch`, through pointers, by their own contracts.
unsafe impl Sync for Shared {}
// SAFETY: owns all it points to.
unsafe impl Send for Shared {}

/// `base^(-2j/n_rot) / factor_j / linear_scale`
fn frequencies(rope: &Rope, factors: Option<Vec<f32>>) -> Vec<f64> {
    (0..rope.n_rot / 2)
        .map(|j| {
            f64::from(rope.base).powf(-2.0 * j as f64 / rope.n_rot as f64)
                / factors.as_ref().map_or(1.0, |f| f64::from(f[j]))
                / f64::from(rope.linear_scale)
        })
        .collect()
}

impl Rows {
    fn new(n: usize, rope: usize, cross_rope: usize) -> Self {
        let floats = |width| vec![0.0; n * width].into_boxed_slice();
        let angles = |width| Angles { cos: floats(width), sin: floats(width) };
        let ints = || vec![0; n].into_boxed_slice();
        Self { n: 0, pos: ints(), slot: ints(), rope: angles(rope), cross_rope: angles(cross_rope) }
    }

    fn set(&mut self, rows: impl Iterator<Item = (u32, u32)>, shared: &Shared) {
        self.n = 0;
        for (pos, slot) in rows {
            let r = self.n;
            (self.pos[r], self.slot[r]) = (pos as i32, slot as i32);
            self.rope.set(r, pos, &shared.frequencies);
            self.cross_rope.set(r, pos, &shared.cross_frequencies);
            self.n += 1;
        }
    }
}

impl Angles {
    fn set(&mut self, row: usize, pos: u32, frequencies: &[f64]) {
        for (j, f) in frequencies.iter().enumerate() {
            // f64: at a million positions an f32 angle would be off by a tenth of a radian.
            let (sin, cos) = (f64::from(pos) * f).sin_cos();
            self.cos[row * frequencies.len() + j] = cos as f32;
            self.sin[row * frequencies.len() + j] = sin as f32;
        }
    }
}

impl Shared {
    pub fn new(model: &Model, spec: &CacheSpec, pieces: usize, ops: &'static Ops) -> Self {
        let c: &Config = &model.config;
        let factors = |w: Option<&crate::model::Weight>| w.map(|w| model.values(w));
        let shared_memory = model.weights.shared.as_ref();
        let frequencies_of = frequencies(&c.rope, factors(model.weights.rope_freqs.as_ref()));
        let cross_frequencies = c.cross_rope.as_ref().map_or_else(Vec::new, |rope| {
            frequencies(rope, factors(shared_memory.and_then(|s| s.rope_freqs.as_ref())))
        });
        let rows = |n| Rows::new(n, frequencies_of.len(), cross_frequencies.len());
        let step = Step {
            tokens: vec![0; spec.max_rows].into(),
            outputs: vec![0; spec.max_outputs].into(),
            all: rows(spec.max_rows),
            kept: rows(spec.max_outputs),
            tables: vec![0; spec.n_slots * spec.pages_per_slot].into(),
            table_stride: spec.pages_per_slot,
            n_slots: spec.n_slots,
            count: vec![0; spec.max_outputs].into(),
            scratch: Scratch::new(0),
        };
        Self { step: UnsafeCell::new(step), ops, pieces, frequencies: frequencies_of, cross_frequencies }
    }

    /// Takes a batch.
    ///
    /// # Safety
    /// No graph runs.
    pub unsafe fn set(&self, batch: &Batch, tables: &PageTables) {
        // SAFETY: the caller vouches that nobody else reads or writes.
        let step = unsafe { &mut *self.step.get() };
        for (to, token) in step.tokens.iter_mut().zip(&batch.tokens) {
            *to = *token as i32;
        }
        for (to, row) in step.outputs.iter_mut().zip(&batch.outputs) {
            *to = *row as i32;
        }
        step.all.set(batch.pos.iter().copied().zip(batch.slot.iter().copied()), self);
        let kept = batch.outputs.iter().map(|&r| (batch.pos[r as usize], batch.slot[r as usize]));
        step.kept.set(kept, self);
        step.tables[..tables.entries.len()].copy_from_slice(&tables.entries);
    }

    /// Makes the scratch memory large enough for an op.
    ///
    /// # Safety
    /// No graph runs.
    pub unsafe fn grow_scratch(&self, op: &impl Op) {
        // SAFETY: the caller vouches that nobody else reads or writes.
        let step = unsafe { &mut *self.step.get() };
        let wanted = op.scratch_bytes(self.pieces);
        if step.scratch.len() < wanted {
            step.scratch = Scratch::new(wanted);
        }
    }

    /// Runs thread `ith`'s share of an op.
    ///
    /// # Safety
    /// As [`Ops::run`], except for the scratch memory, which is this one.
    ///
    /// # Panics
    /// When the op does not fit its own contract, which the engine rules out.
    pub unsafe fn run<P: Op>(&self, op: &P, ith: usize, nth: usize) {
        if ith == 0
            && let Err(e) = op.check()
        {
            panic!("{e}");
        }
        // SAFETY: the caller's; the scratch changes only while no graph runs.
        unsafe { self.ops.run(op, ith, nth, &(*self.step.get()).scratch) }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        // SAFETY: lengths change only while the backend is borrowed mutably.
        let step = unsafe { &*self.step.get() };
        let angles = (self.frequencies.len() + self.cross_frequencies.len()) * 8;
        ((step.all.pos.len() + step.kept.pos.len()) * (angles + 8) + step.scratch.len()) as u64
    }

    /// The token array, `[max_rows]`.
    pub fn tokens(&self) -> *mut i32 {
        // SAFETY: as above.
        unsafe { (*self.step.get()).tokens.as_mut_ptr() }
    }

    /// The array of output rows, `[max_outputs]`.
    pub fn outputs(&self) -> *mut i32 {
        // SAFETY: as above.
        unsafe { (*self.step.get()).outputs.as_mut_ptr() }
    }

    /// The array that route fills with the number of selected positions, `[max_outputs]`.
    pub fn counts(&self) -> *mut i32 {
        // SAFETY: as above.
        unsafe { (*self.step.get()).count.as_mut_ptr() }
    }

    /// Selected positions of an output row.
    pub fn count(&self, output: usize) -> usize {
        // SAFETY: no graph runs while the backend answers.
        unsafe { &*self.step.get() }.count.get(output).map_or(0, |&n| n.max(0) as usize)
    }

    /// The rows of the batch, or only its output rows.
    pub fn batch(&self, kept: bool) -> clsa_batch {
        // SAFETY: read-only during a run.
        let step = unsafe { &*self.step.get() };
        let rows = if kept { &step.kept } else { &step.all };
        clsa_batch {
            n_rows: rows.n as i32,
            table_stride: step.table_stride as i32,
            n_slots: step.n_slots as i32,
            reserved: 0,
            pos: rows.pos.as_ptr(),
            slot: rows.slot.as_ptr(),
            tables: step.tables.as_ptr(),
        }
    }

    /// cos and sin of the rows, of the self-decoder's or of the cross-decoder's rotary encoding.
    pub fn angles(&self, kept: bool, cross: bool) -> (*const f32, *const f32) {
        // SAFETY: read-only during a run.
        let step = unsafe { &*self.step.get() };
        let rows = if kept { &step.kept } else { &step.all };
        let angles = if cross { &rows.cross_rope } else { &rows.rope };
        (angles.cos.as_ptr(), angles.sin.as_ptr())
    }
}

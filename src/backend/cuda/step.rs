//! What varies from batch to batch, in device memory: recorded graphs read it there.
use ggml_kernels::contracts::{clsa_angles, clsa_batch};
use ggml_kernels::cuda::{Buffer, Device, Pinned, Stream, matmul};

use crate::backend::Batch;
use crate::cache::{CacheSpec, PageTables};
use crate::config::Rope;
use crate::error::Result;

/// Positions, slots and rotary angles of some rows.
struct Angles {
    frequencies: Buffer<f64>,
    cos: Buffer<f32>,
    sin: Buffer<f32>,
}

/// The batch in hand.
pub struct Step {
    /// tokens, pos, slot of each row; row number, pos, slot of each output row: one copy brings all of them.
    staged: Pinned<u32>,
    words: Buffer<u32>,
    host_tables: Vec<u32>,
    staged_tables: Pinned<u32>,
    tables: Buffer<u32>,
    table_stride: usize,
    n_slots: usize,
    rope: Option<Angles>,
    cross_rope: Option<Angles>,
    n: usize,
    outputs: usize,
}

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

impl Angles {
    fn new(device: &Device, rope: &Rope, factors: Option<Vec<f32>>, rows: usize) -> Result<Self> {
        let frequencies = device.upload(&frequencies(rope, factors))?;
        let n = rows * frequencies.len();
        Ok(Self { frequencies, cos: device.zeros(n)?, sin: device.zeros(n)? })
    }
    fn bytes(&self) -> usize {
        self.frequencies.bytes() + self.cos.bytes() + self.sin.bytes()
    }
    fn compute(&self, stream: &Stream, batch: &clsa_batch) -> Result<()> {
        let p = clsa_angles {
            pos: batch.pos,
            frequencies: self.frequencies.ptr(),
            cos: self.cos.ptr(),
            sin: self.sin.ptr(),
            n_rows: batch.n_rows,
            half: self.frequencies.len() as i32,
        };
        // SAFETY: room for max_rows rows; positions of n_rows rows were staged.
        Ok(unsafe { matmul::angles(stream, p) }?)
    }
}

/// A rotary encoding and the optional divisors of its frequencies.
pub type Rotation<'a> = Option<(&'a Rope, Option<Vec<f32>>)>;

impl Step {
    pub fn new(
        device: &Device,
        spec: &CacheSpec,
        rope: Rotation<'_>,
        cross_rope: Rotation<'_>,
    ) -> Result<Self> {
        let words = 3 * (spec.max_rows + spec.max_outputs);
        let table = spec.n_slots * spec.pages_per_slot;
        let angles = |r: Rotation<'_>| {
            r.filter(|(rope, _)| rope.n_rot > 0)
                .map(|(rope, factors)| Angles::new(device, rope, factors, spec.max_rows))
                .transpose()
        };
        Ok(Self {
            staged: device.pinned(words)?,
            words: device.zeros(words)?,
            host_tables: vec![0; table],
            staged_tables: device.pinned(table)?,
            tables: device.zeros(table)?,
            table_stride: spec.pages_per_slot,
            n_slots: spec.n_slots,
            rope: angles(rope)?,
            cross_rope: angles(cross_rope)?,
            n: 0,
            outputs: 0,
        })
    }

    pub fn bytes(&self) -> u64 {
        let angles = [&self.rope, &self.cross_rope].into_iter().flatten().map(Angles::bytes).sum::<usize>();
        (self.words.bytes() + self.tables.bytes() + angles) as u64
    }

    /// Queues the copy of a batch. The work of the one before must be done.
    pub fn set(&mut self, stream: &Stream, batch: &Batch, tables: &PageTables) -> Result<()> {
        let (n, o) = (batch.tokens.len(), batch.outputs.len());
        (self.n, self.outputs) = (n, o);
        self.staged[..n].copy_from_slice(&batch.tokens);
        self.staged[n..2 * n].copy_from_slice(&batch.pos);
        self.staged[2 * n..3 * n].copy_from_slice(&batch.slot);
        for (i, &row) in batch.outputs.iter().enumerate() {
            let row_of = row as usize;
            self.staged[3 * n + i] = row;
            self.staged[3 * n + o + i] = batch.pos[row_of];
            self.staged[3 * n + 2 * o + i] = batch.slot[row_of];
        }
        self.words.write_async(0, &self.staged, 3 * (n + o), stream)?;
        if self.host_tables != tables.entries {
            self.host_tables.copy_from_slice(&tables.entries);
            self.staged_tables.copy_from_slice(&tables.entries);
            self.tables.write_async(0, &self.staged_tables, tables.entries.len(), stream)?;
        }
        Ok(())
    }

    /// Queues the rotary angles of the rows.
    pub fn compute_angles(&self, stream: &Stream) -> Result<()> {
        let batch = self.batch(false);
        self.rope.iter().chain(&self.cross_rope).try_for_each(|a| a.compute(stream, &batch))
    }
    /// Queues the cross-decoder's angles again, of the output rows.
    pub fn compute_kept_angles(&self, stream: &Stream) -> Result<()> {
        self.cross_rope.iter().try_for_each(|a| a.compute(stream, &self.batch(true)))
    }

    /// Tokens of the rows.
    pub fn tokens(&self) -> *const u32 {
        self.words.ptr()
    }
    /// Numbers of the output rows.
    pub fn output_rows(&self) -> *const i32 {
        self.words.at(3 * self.n).cast()
    }

    /// The rows of the batch, or only its output rows.
    pub fn batch(&self, kept: bool) -> clsa_batch {
        let (n, pos) = if kept { (self.outputs, 3 * self.n + self.outputs) } else { (self.n, self.n) };
        clsa_batch {
            n_rows: n as i32,
            table_stride: self.table_stride as i32,
            n_slots: self.n_slots as i32,
            reserved: 0,
            pos: self.words.at(pos).cast(),
            slot: self.words.at(pos + n).cast(),
            tables: self.tables.ptr(),
        }
    }

    /// cos and sin of the rows in hand; null without rotation.
    pub fn angles(&self, cross: bool) -> (*const f32, *const f32) {
        let angles = if cross { &self.cross_rope } else { &self.rope };
        angles.as_ref().map_or((std::ptr::null(), std::ptr::null()), |a| {
            (a.cos.ptr().cast_const(), a.sin.ptr().cast_const())
        })
    }
}

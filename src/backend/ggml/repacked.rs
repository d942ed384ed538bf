//! Weights copied into the order in which the kernels read them fastest, in huge pages.
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ggml_kernels::contracts::{clsa_matmul, clsa_pack};
use ggml_kernels::limits;
use ggml_kernels::matmul::{self, HugePages};
use ggml_kernels::ops::{Op, Ops, Scratch};

use crate::error::{Error, Result};
use crate::model::{Model, Weight};

/// Whether to keep a repacked copy of the quantized weights: it is as large as they are and takes a moment to make, prompts and
/// answers then go faster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Repack {
    /// When the copy fits into half of the free memory and, by a measurement, is paid back within a hundred tokens of an answer
    Auto,
    /// Always
    On,
    /// Never
    #[default]
    Off,
}

/// The copies.
pub struct Repacked {
    memory: HugePages,
    /// By offset in the file.
    at: HashMap<usize, Range<usize>>,
    time: Duration,
}

/// Groups of 16 rows that one thread repacks at a time.
const GROUPS: usize = 16;
/// Bytes of weights that [`pays`] measures with.
const SAMPLE: usize = 24 << 20;
/// Generated tokens within which repacking shall have paid for itself.
const PAID_BACK: f64 = 100.0;

/// Matrices that products of `layers` read: the embedding only where it is the output, too.
fn matrices<'a>(model: &'a Model, layers: &Range<usize>) -> impl Iterator<Item = (&'a Weight, usize)> {
    let w = &model.weights;
    let output = layers.end == w.layers.len() && w.output.offset == w.token_embd.offset;
    let embedding = (!output).then_some(w.token_embd.offset);
    w.of(layers.clone())
        .filter(move |w| w.n_out > 1 && Some(w.offset) != embedding)
        .filter_map(|w| Some((w, matmul::repacked_bytes(w.ty, w.n_out, w.n_in)?)))
}

impl Repacked {
    /// The copies of the weights of `layers` that `repack` asks for; `free` bytes of memory are there for them.
    ///
    /// # Errors
    /// [`Error::Memory`] when they are wanted in any case and the memory is not to be had.
    pub fn new(
        model: &Model,
        layers: &Range<usize>,
        repack: Repack,
        free: u64,
        threads: usize,
        ops: &Ops,
    ) -> Result<Option<Self>> {
        let bytes: usize = matrices(model, layers).map(|(_, size)| size).sum();
        let wanted = match repack {
            Repack::Off => false,
            Repack::On => true,
            Repack::Auto => bytes as u64 <= free / 2 && pays(model, layers, ops),
        };
        if !wanted || bytes == 0 {
            return Ok(None);
        }
        let error = |e: String| Error::Memory {
            what: "the repacked copy of the weights".into(),
            needed: bytes as u64,
            free,
            remedy: format!("use --repack off ({e})"),
        };
        if bytes as u64 > free {
            return Err(error("it is as large as the weights".into()));
        }
        let started = Instant::now();
        let mut memory = HugePages::new(bytes).map_err(|e| error(e.to_string()))?;
        let at = copy(model, layers, &mut memory, threads);
        Ok(Some(Self { memory, at, time: started.elapsed() }))
    }

    /// The copy of a weight.
    pub fn get(&self, w: &Weight) -> Option<&[u8]> {
        self.at.get(&w.offset).map(|at| &self.memory[at.clone()])
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// How long making it took.
    pub fn time(&self) -> Duration {
        self.time
    }
}

/// Repacks every matrix to its place, which is returned.
fn copy(
    model: &Model,
    layers: &Range<usize>,
    mut memory: &mut [u8],
    threads: usize,
) -> HashMap<usize, Range<usize>> {
    let (mut at, mut jobs, mut start) = (HashMap::new(), vec![], 0);
    for (w, size) in matrices(model, layers) {
        at.insert(w.offset, start..start + size);
        start += size;
        let n_groups = w.n_out.div_ceil(16);
        for first in (0..n_groups).step_by(GROUPS) {
            let groups = first..(first + GROUPS).min(n_groups);
            let (mine, rest) = std::mem::take(&mut memory).split_at_mut(size / n_groups * groups.len());
            memory = rest;
            jobs.push((w, groups, mine));
        }
    }
    let jobs = Mutex::new(jobs.into_iter());
    let work = || {
        loop {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((w, groups, out)) = job else { return };
            matmul::repack(w.ty, model.bytes(w), w.n_out, w.n_in, groups, out);
        }
    };
    std::thread::scope(|scope| {
        (1..threads).for_each(|_| drop(scope.spawn(work)));
        work();
    });
    at
}

/// Measures, on part of the largest matrix: what repacking costs, and what a product of one row then saves.
fn pays(model: &Model, layers: &Range<usize>, ops: &Ops) -> bool {
    let Some((w, _)) = matrices(model, layers).max_by_key(|(_, size)| *size) else { return false };
    let row = w.bytes / w.n_out;
    let n_out = (SAMPLE / row).min(w.n_out) / 16 * 16;
    if n_out == 0 {
        return false;
    }
    let rows = &model.bytes(w)[..n_out * row];
    let Ok(mut groups) = HugePages::new(rows.len()) else { return false };
    // The first pass brings the file's pages in, and the copy's.
    let (x, mut y) = (vec![1.0; w.n_in], vec![0.0; n_out]);
    let cost = [0, 1].map(|_| {
        let started = Instant::now();
        matmul::repack(w.ty, rows, n_out, w.n_in, 0..n_out / 16, &mut groups[..rows.len()]);
        started.elapsed()
    })[1];
    let mut seconds = |repacked: bool| {
        let mut p = clsa_matmul { n_mat: 1, ..Default::default() };
        p.x = clsa_pack {
            n_rows: 1,
            n_in: w.n_in as i32,
            forms: matmul::forms(ops.level, 1, [w.ty]),
            x: x.as_ptr(),
            x_stride: w.n_in,
            ..Default::default()
        };
        p.mat[0] = if repacked {
            matmul::repacked_matrix(w.ty, &groups[..rows.len()], n_out, w.n_in, y.as_mut_ptr(), n_out)
        } else {
            matmul::matrix(w.ty, rows, n_out, w.n_in, y.as_mut_ptr(), n_out)
        };
        if p.check().is_err() {
            return f64::INFINITY;
        }
        let scratch = Scratch::of(&p, 1);
        // As in a step, weights come from memory: some machines have a last-level cache that would hold the sample many times over.
        limits::flush(if repacked { &groups[..rows.len()] } else { rows });
        let started = Instant::now();
        // SAFETY: checked above; the slices have the shapes of the contract, and one thread does all of it.
        unsafe { ops.run(&p, 0, 1, &scratch) };
        started.elapsed().as_secs_f64()
    };
    let mut best = |repacked| (0..3).map(|_| seconds(repacked)).fold(f64::INFINITY, f64::min);
    let saved = best(false) - best(true);
    cost.as_secs_f64() < PAID_BACK * saved
}

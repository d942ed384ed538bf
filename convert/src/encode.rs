//! From sources to bytes of the file: reading, quantizing and writing overlap, and memory stays bounded whatever the size.
//!
//! Rows are cut into tasks of some 100,000 values for the threads, and tasks gathered into slabs of some megabytes for the writer,
//! so that at most three slabs exist at a time: one being filled, one waiting, one being written.
use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};

use ggml_kernels::quant::{self, Type};
use rayon::prelude::*;

use crate::{
    Error, Result,
    gguf::Writer,
    model::{Source, Tensor},
    random::Pool,
};

/// Values of a task: 512 KiB as floats, within a core's L2 cache.
const TASK_VALUES: usize = 128 << 10;
/// Values of a slab.
const SLAB_VALUES: usize = 8 << 20;
/// Magnitude from which squares overflow in ggml's quantizers.
const TOO_LARGE: f32 = 1e18;

/// How the work is run.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Worker threads, at least 1.
    pub threads: usize,
    /// Set to stop with [`Error::Interrupted`].
    pub abort: Option<&'a AtomicBool>,
    /// Told of bytes done, from any thread; their sum is [`crate::Plan::work`].
    pub progress: &'a (dyn Fn(u64) + Sync),
}

/// A tensor and what becomes of it.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub tensor: &'a Tensor<'a>,
    pub ty: Type,
    pub row_bytes: usize,
    /// Importance of each column.
    pub imatrix: Option<&'a [f32]>,
}

impl Job<'_> {
    /// Bytes that a row counts for in the progress: what is read, or, where nothing is, what is written.
    pub(crate) fn row_work(&self) -> usize {
        match self.tensor.source {
            Source::Mapped { ty, .. } => ty.row_bytes(self.tensor.row_len()).unwrap_or(0),
            _ => self.row_bytes,
        }
    }
}

/// Rows of one job, and where in the slab they go.
#[derive(Debug)]
struct Task {
    job: usize,
    rows: Range<usize>,
}

/// Cuts jobs into slabs of tasks.
struct Slabs<'a> {
    jobs: &'a [Job<'a>],
    job: usize,
    row: usize,
}

impl Iterator for Slabs<'_> {
    type Item = Vec<Task>;
    fn next(&mut self) -> Option<Vec<Task>> {
        let (mut tasks, mut values) = (Vec::new(), 0);
        while values < SLAB_VALUES {
            let Some(job) = self.jobs.get(self.job) else { break };
            let (row_len, n_rows) = (job.tensor.row_len(), job.tensor.n_rows());
            let end = n_rows.min(self.row + (TASK_VALUES / row_len).max(1));
            values += (end - self.row) * row_len;
            tasks.push(Task { job: self.job, rows: self.row..end });
            self.row = end;
            if end == n_rows {
                (self.job, self.row) = (self.job + 1, 0);
            }
        }
        (!tasks.is_empty()).then_some(tasks)
    }
}

/// Encodes all jobs into `writer`, in order.
pub(crate) fn run(jobs: &[Job<'_>], writer: Writer<'_>, options: &Options<'_>) -> Result<()> {
    let threads = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads.max(1))
        .build()
        .map_err(|e| Error::Runtime(format!("cannot start threads: {e}")))?;
    let pools = threads.install(|| random_pools(jobs));
    let (send, receive) = mpsc::sync_channel::<(Vec<u8>, Vec<usize>)>(1);
    let (give_back, spare) = mpsc::channel::<Vec<u8>>();
    let writer = std::thread::scope(|scope| {
        let writing = scope.spawn(move || write(writer, receive, give_back));
        let mut encoded = Ok(());
        for tasks in (Slabs { jobs, job: 0, row: 0 }) {
            let pieces: Vec<usize> = tasks.iter().map(|t| t.rows.len() * jobs[t.job].row_bytes).collect();
            let mut slab: Vec<u8> = spare.try_recv().unwrap_or_default();
            slab.resize(pieces.iter().sum(), 0);
            encoded = threads.install(|| encode_slab(jobs, &pools, &tasks, &pieces, &mut slab, options));
            release(jobs, &tasks);
            // The writer hangs up only when it has failed.
            if encoded.is_err() || send.send((slab, pieces)).is_err() {
                break;
            }
        }
        drop(send);
        let written =
            writing.join().unwrap_or_else(|_| Err(Error::Runtime("the writing thread failed".into())));
        encoded.and(written)
    })?;
    writer.finish()
}

/// Writes slabs as they come and gives their memory back.
fn write<'a>(
    mut writer: Writer<'a>,
    slabs: mpsc::Receiver<(Vec<u8>, Vec<usize>)>,
    give_back: mpsc::Sender<Vec<u8>>,
) -> Result<Writer<'a>> {
    for (slab, pieces) in slabs {
        let mut rest = slab.as_slice();
        for len in pieces {
            let (piece, after) = rest.split_at(len);
            writer.append(piece)?;
            rest = after;
        }
        let _ = give_back.send(slab);
    }
    Ok(writer)
}

/// Encodes the tasks of a slab, each into its own piece.
fn encode_slab(
    jobs: &[Job<'_>],
    pools: &RandomPools,
    tasks: &[Task],
    pieces: &[usize],
    mut slab: &mut [u8],
    options: &Options<'_>,
) -> Result<()> {
    let mut work = Vec::with_capacity(tasks.len());
    for (task, &len) in tasks.iter().zip(pieces) {
        let (out, after) = std::mem::take(&mut slab).split_at_mut(len);
        work.push((task, out));
        slab = after;
    }
    work.into_par_iter().with_max_len(1).try_for_each_init(Vec::new, |scratch, (task, out)| {
        if options.abort.is_some_and(|a| a.load(Ordering::Relaxed)) {
            return Err(Error::Interrupted);
        }
        let job = &jobs[task.job];
        encode_rows(job, task.rows.clone(), pools, scratch, out)?;
        (options.progress)((task.rows.len() * job.row_work()) as u64);
        Ok(())
    })
}

/// Pools of random runs by type, run length and deviation.
type RandomPools = HashMap<(Type, usize, u32), Pool>;

fn random_key(job: &Job<'_>, deviation: f32) -> (Type, usize, u32) {
    (job.ty, Pool::run_len(job.tensor.row_len()), deviation.to_bits())
}

fn random_pools(jobs: &[Job<'_>]) -> RandomPools {
    let mut pools = RandomPools::new();
    for job in jobs {
        if let Source::Random { deviation, .. } = job.tensor.source {
            let make = || Pool::new(job.ty, job.tensor.row_len(), deviation);
            pools.entry(random_key(job, deviation)).or_insert_with(make);
        }
    }
    pools
}

/// Drops the source's pages that the tasks have read.
fn release(jobs: &[Job<'_>], tasks: &[Task]) {
    for task in tasks {
        let tensor = jobs[task.job].tensor;
        if let Source::Mapped { mapping, at, ty, .. } = &tensor.source {
            let row = ty.row_bytes(tensor.row_len()).unwrap_or(0);
            mapping.release(at + task.rows.start * row..at + task.rows.end * row);
        }
    }
}

fn encode_rows(
    job: &Job<'_>,
    rows: Range<usize>,
    pools: &RandomPools,
    scratch: &mut Vec<f32>,
    out: &mut [u8],
) -> Result<()> {
    let row_len = job.tensor.row_len();
    match &job.tensor.source {
        Source::Random { deviation, seed } => {
            let Some(pool) = pools.get(&random_key(job, *deviation)) else {
                return Err(Error::Runtime(format!("no random values for {}", job.tensor.name)));
            };
            for (row, out) in rows.zip(out.chunks_exact_mut(job.row_bytes)) {
                pool.fill(*seed, row, out);
            }
            Ok(())
        }
        Source::Values(values) => {
            quantize(job, &rows, &values[rows.start * row_len..rows.end * row_len], out)
        }
        Source::Mapped { mapping, at, ty, order, .. } => {
            let source_row = ty.row_bytes(row_len).unwrap_or(0);
            let bytes = |row: usize| &mapping[at + order.source_row(row) * source_row..][..source_row];
            if *ty == job.ty {
                for (row, out) in rows.clone().zip(out.chunks_exact_mut(job.row_bytes)) {
                    out.copy_from_slice(bytes(row));
                }
                return check_copied(job, &rows, out, scratch);
            }
            scratch.resize(rows.len() * row_len, 0.0);
            for (row, values) in rows.clone().zip(scratch.chunks_exact_mut(row_len)) {
                quant::dequantize(*ty, bytes(row), values);
            }
            quantize(job, &rows, scratch, out)
        }
    }
}

/// Values that were not converted must be finite too.
fn check_copied(job: &Job<'_>, rows: &Range<usize>, out: &[u8], scratch: &mut Vec<f32>) -> Result<()> {
    if job.ty.is_quantized() {
        return if quant::is_finite(job.ty, out) {
            Ok(())
        } else {
            Err(not_finite(job, "an infinite or NaN block scale"))
        };
    }
    scratch.resize(rows.len() * job.tensor.row_len(), 0.0);
    quant::dequantize(job.ty, out, scratch);
    check_finite(job, rows, scratch)
}

fn quantize(job: &Job<'_>, rows: &Range<usize>, values: &[f32], out: &mut [u8]) -> Result<()> {
    check_finite(job, rows, values)?;
    if job.ty == Type::F32 || job.ty == Type::BF16 {
        quant::quantize(job.ty, values, job.tensor.row_len(), None, out);
        return Ok(());
    }
    let fits = largest(values) < TOO_LARGE && {
        quant::quantize(job.ty, values, job.tensor.row_len(), job.imatrix, out);
        quant::is_finite(job.ty, out)
    };
    if fits { Ok(()) } else { Err(too_large(job, rows, values)) }
}

/// The largest magnitude; infinite when there is a NaN.
fn largest(values: &[f32]) -> f32 {
    // As integers, so that the loop runs on whole vectors: magnitudes order like their bits, and NaN lies above infinity.
    let bits = values.iter().map(|v| v.to_bits() & 0x7fff_ffff).fold(0, u32::max);
    f32::from_bits(bits.min(f32::INFINITY.to_bits()))
}

fn check_finite(job: &Job<'_>, rows: &Range<usize>, values: &[f32]) -> Result<()> {
    if largest(values).is_finite() {
        return Ok(());
    }
    let i = values.iter().position(|v| !v.is_finite()).unwrap_or(0);
    let value = values.get(i).copied().unwrap_or(f32::NAN);
    Err(not_finite(job, &format!("{value} at {}", position(job, rows, i))))
}

fn not_finite(job: &Job<'_>, found: &str) -> Error {
    Error::Input(format!(
        "tensor {}: expected finite values, found {found}: the source is damaged",
        source_name(job)
    ))
}

fn too_large(job: &Job<'_>, rows: &Range<usize>, values: &[f32]) -> Error {
    let largest = largest(values);
    let i = values.iter().position(|v| v.abs() >= largest).unwrap_or(0);
    Error::Input(format!(
        "tensor {}: {} at {} is more than {} can hold: give this tensor BF16 or F32 with --tensor-type",
        source_name(job),
        values.get(i).copied().unwrap_or(largest),
        position(job, rows, i),
        job.ty
    ))
}

/// Row and column of value `i` of `rows`, in the source's terms.
fn position(job: &Job<'_>, rows: &Range<usize>, i: usize) -> String {
    let row = rows.start + i / job.tensor.row_len();
    let row = if let Source::Mapped { order, .. } = &job.tensor.source { order.source_row(row) } else { row };
    format!("[{row}, {}]", i % job.tensor.row_len())
}

fn source_name<'a>(job: &'a Job<'_>) -> &'a str {
    if let Source::Mapped { name, .. } = &job.tensor.source { name } else { &job.tensor.name }
}

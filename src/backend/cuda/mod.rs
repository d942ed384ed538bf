//! The GPU backend: quantized weights in device memory, paged caches, and one CUDA graph for each shape of a decode step.
//!
//! A batch of up to 64 rows reads the quantized planes directly and is recorded the first time its shape is seen; later batches of that
//! shape replay the graph, whose kernels find everything that varies in device memory. A batch of more rows (a prompt) expands one
//! weight at a time to f16 for cuBLASLt.
mod caches;
mod clock;
mod linear;
mod sampling;
mod scratch;
mod step;
mod weights;

use std::collections::HashMap;
use std::ops::Range;

use ggml_kernels::contracts::*;
use ggml_kernels::cuda::blas::Blas;
use ggml_kernels::cuda::matmul::{self, Mode};
use ggml_kernels::cuda::ops::{append_attention_prefill, attention_prefill, rope_append};
use ggml_kernels::cuda::{self, Device, Graph, Pinned, Stream};

pub use self::caches::KvDevice;

use self::caches::Memory as CacheMemory;
use self::clock::Clock;
use self::linear::Input;
use self::sampling::{Sampling, draws_alike};
use self::scratch::{FEW, Scratch, Sizes};
use self::step::Step;
use self::weights::Weights;
use super::caches::Caches;
use super::{Backend, Batch, Memory, Part, Record, Routing, Stage, Timing};
use crate::cache::{CacheSpec, PAGE, PageTables};
use crate::config::{Config, Heads};
use crate::error::{Error, Result};
use crate::model::{Model, Weight};
use crate::placement::{self, Needs};
use crate::sampler::Draw;

impl From<cuda::Error> for Error {
    fn from(e: cuda::Error) -> Self {
        match e {
            cuda::Error::Unavailable(_) => Self::Input(e.to_string()),
            cuda::Error::OutOfMemory { needed, free, .. } => Self::Memory {
                what: "a GPU buffer".into(),
                needed: needed as u64,
                free: free as u64,
                remedy: "lower -c or -ub, or use -ctk q8_0 -ctv q8_0".into(),
            },
            other => Self::Runtime(other.to_string()),
        }
    }
}

/// Whether this build and this machine can run on a GPU.
///
/// # Errors
/// What is missing.
pub fn availability() -> Result<()> {
    Ok(cuda::availability().map(drop)?)
}

/// Free bytes of the first GPU; `None` without one.
#[must_use]
pub fn free_memory() -> Option<u64> {
    let device = Device::open(0).ok()?;
    device.memory().ok().map(|(free, _)| free as u64)
}

/// What decides the kernels of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    outputs: usize,
    routing: Routing,
    top_k: usize,
    /// Runs of rows of one sequence are long enough for the prompt kernels.
    runs: bool,
    /// Consecutive output rows share a sequence.
    one_sequence: bool,
    /// No two rows share a sequence: a decode batch.
    distinct: bool,
}

/// What the verbs of the batch in hand have done so far.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    recording: bool,
    /// Only the output rows are left, in a buffer of their own.
    kept: bool,
    moved: bool,
    routed: bool,
    /// Some layer has attended to the selection since it was made.
    settled: bool,
    logits: bool,
    /// Attention left its results as f16 rows in `a16`.
    halves: bool,
}

/// A recorded step.
struct Ready {
    graph: Graph,
    state: State,
    age: u64,
}

/// Graphs kept for reuse.
const MAX_GRAPHS: usize = 64;
/// Rows of one sequence from which the prompt kernels pay.
const LONG_RUN: usize = 16;

/// What of a model a GPU holds, and which one.
#[derive(Clone, Debug)]
pub struct Share {
    /// Its number.
    pub ordinal: usize,
    /// The layers.
    pub layers: Range<usize>,
    /// Where K and V of the shared memory lie.
    pub kv: KvDevice,
}

/// x and the selection from the part before, page-locked, and x for the part after.
struct Carried {
    x: Pinned<f32>,
    selected: Pinned<u32>,
    count: Pinned<i32>,
    out: Pinned<f32>,
}

/// The model, or some of its layers, on one GPU.
pub struct Cuda {
    model: Model,
    spec: CacheSpec,
    layers: Range<usize>,
    stream: Stream,
    weights: Weights,
    caches: Caches<CacheMemory>,
    carried: Carried,
    step: Step,
    s: Scratch,
    blas: Option<Blas>,
    graphs: HashMap<Shape, Ready>,
    shape: Shape,
    state: State,
    age: u64,
    clock: Option<Clock>,
    logits_host: Pinned<f32>,
    sampling: Sampling,
    device: Device,
}

impl Cuda {
    /// The whole model, with all caches, on GPU `ordinal`: see [`Self::part`].
    ///
    /// # Errors
    /// As [`Self::part`].
    pub fn new(model: Model, spec: CacheSpec, ordinal: usize) -> Result<Self> {
        let layers = 0..model.config.n_layer;
        Self::part(model, spec, &Share { ordinal, layers, kv: KvDevice::Gpu })
    }

    /// Plans the memory, then uploads the weights of some layers of `model` and reserves caches and scratch memory for the largest
    /// micro-batch.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no usable GPU, [`Error::Memory`] with the plan when it does not fit.
    pub fn part(model: Model, spec: CacheSpec, share: &Share) -> Result<Self> {
        let Share { ordinal, layers, kv } = share.clone();
        let device = Device::open(ordinal)?;
        let c: &Config = &model.config;
        spec.check(c)?;
        let memory = Self::needs(&model, &spec, share, &device)?;
        let free = device.memory()?.0 as u64;
        if memory.total() > free {
            let device = format!("cuda:{ordinal}");
            return Err(Error::Placement {
                table: placement::table(&[Needs { device, layers, memory, free }]),
                remedy:
                    "lower -c, -np, -ub or -ngl, use -ctk q8_0 -ctv q8_0, --kv-device cpu or --device cpu"
                        .into(),
            });
        }
        let sizes = Self::sizes(&model, &spec, &device);
        let stream = device.stream()?;
        let factors = |w: Option<&Weight>| w.map(|w| model.values(w));
        let cross_factors = model.weights.shared.as_ref().and_then(|s| s.rope_freqs.as_ref());
        let rope = Some((&c.rope, factors(model.weights.rope_freqs.as_ref())));
        let cross_rope = c.cross_rope.as_ref().map(|rope| (rope, factors(cross_factors)));
        let shape = Shape {
            rows: 0,
            outputs: 0,
            routing: Routing::Dense,
            top_k: 0,
            runs: false,
            one_sequence: false,
            distinct: false,
        };
        Ok(Self {
            weights: Weights::upload(&device, &stream, &model, &layers)?,
            caches: Caches::new(c, &spec, &layers, |kind, n| CacheMemory::new(&device, kv, kind, n))?,
            carried: Carried {
                x: device.pinned(if layers.start > 0 { spec.max_rows * c.hidden } else { 0 })?,
                selected: device.pinned(0)?,
                count: device.pinned(spec.max_outputs)?,
                out: device.pinned(if layers.end < c.n_layer { spec.max_rows * c.hidden } else { 0 })?,
            },
            layers,
            step: Step::new(&device, &spec, rope, cross_rope)?,
            s: Scratch::new(&device, sizes, spec.max_outputs)?,
            blas: Blas::open(&device)?,
            graphs: HashMap::new(),
            shape,
            state: State::default(),
            age: 0,
            clock: None,
            logits_host: device.pinned(spec.max_outputs * c.vocab)?,
            sampling: Sampling::new(&device, spec.max_outputs)?,
            stream,
            device,
            model,
            spec,
        })
    }

    fn sizes(model: &Model, spec: &CacheSpec, device: &Device) -> Sizes {
        let top_k = model.config.indexer.map_or(0, |ix| ix.top_k);
        Sizes::new(model, spec, device.multiprocessors(), top_k)
    }

    /// Bytes that a share takes on its GPU.
    ///
    /// # Errors
    /// [`Error::Input`] for a matrix that the kernels cannot take.
    pub fn needs(model: &Model, spec: &CacheSpec, share: &Share, device: &Device) -> Result<Memory> {
        let sizes = Self::sizes(model, spec, device);
        Ok(Memory {
            weights: weights::bytes(model, &share.layers)?,
            cache: placement::device_cache_bytes(&model.config, spec, &share.layers, share.kv),
            scratch: sizes.bytes() + Blas::WORKSPACE as u64 + Sampling::bytes(spec.max_outputs),
            ..Memory::default()
        })
    }

    /// Rows in hand, and their residual stream.
    fn rows(&self) -> (usize, *mut f32) {
        let n = if self.state.kept { self.shape.outputs } else { self.shape.rows };
        (n, if self.state.moved { self.s.kept.ptr() } else { self.s.x.ptr() })
    }

    fn residual(&self, norm: &Weight) -> Input {
        let (n, x) = self.rows();
        Input { x, n, norm: self.weights.vector(norm), eps: self.model.config.rms_eps, scale: 1.0 }
    }

    /// Attention over a contiguous range of positions.
    fn attention(&self, heads: Heads, window: usize, (k, v): (clsa_rows, clsa_rows)) -> clsa_attention {
        clsa_attention {
            batch: self.step.batch(self.state.kept),
            n_head: heads.n_head as i32,
            n_kv: heads.n_kv as i32,
            d: heads.head_dim as i32,
            window: window as i32,
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
            q: self.s.q.ptr(),
            out: self.s.attended.ptr(),
            k,
            v,
        }
    }

    /// A rope_append of nothing: parts are filled in by the callers.
    fn append(&self, heads: Heads) -> clsa_rope_append {
        clsa_rope_append {
            batch: self.step.batch(self.state.kept),
            n_head: heads.n_head as i32,
            n_kv: heads.n_kv as i32,
            d: heads.head_dim as i32,
            eps: self.model.config.rms_eps,
            ..Default::default()
        }
    }

    /// Ends a stage of the step, where stages are timed.
    fn mark(&mut self, stage: Stage, layer: Option<usize>) -> Result<()> {
        let recording = self.state.recording;
        match &mut self.clock {
            Some(clock) => clock.mark(&self.stream, recording, stage, layer),
            None => Ok(()),
        }
    }

    fn selection_columns(&self) -> usize {
        self.shape.routing.columns(self.shape.top_k)
    }

    fn gather_op(&self) -> clsa_gather_attention {
        let heads = self.model.config.cross_heads;
        let (k, v) = self.caches.shared();
        clsa_gather_attention {
            batch: self.step.batch(true),
            n_head: heads.n_head as i32,
            n_kv: heads.n_kv as i32,
            d: heads.head_dim as i32,
            n_columns: self.selection_columns() as i32,
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
            q: self.s.q.ptr(),
            out: self.s.attended.ptr(),
            k,
            v,
            selected: self.s.selected.ptr(),
            count: self.s.count.ptr(),
        }
    }
}

impl Cuda {
    /// Whether work is queued now, to run at once or into a recording; not where a recording serves.
    fn queues(&self) -> bool {
        self.state.recording || self.shape.rows > FEW
    }

    /// Copies the selected rows side by side, where they fit.
    fn gather(&mut self) -> Result<()> {
        self.state.settled = false;
        let op = self.gather_op();
        if self.s.gathered.holds(&op) {
            // SAFETY: buffers and caches of this backend; the selection names positions of the sequences.
            unsafe { self.s.gathered.gather(&self.stream, &op) }?;
        }
        Ok(())
    }

    /// The logits of the output rows, on the host.
    fn fetch_logits(&mut self) -> Result<&[f32]> {
        let n = if self.state.logits { self.shape.outputs * self.model.config.vocab } else { 0 };
        if n > 0 {
            self.s.logits.read_async(0, &mut self.logits_host, n, &self.stream)?;
        }
        self.stream.synchronize()?;
        Ok(&self.logits_host[..n])
    }

    /// Ends the recording, if there is one, and queues the graph of the present shape.
    fn launch(&mut self) -> Result<()> {
        self.age += 1;
        if std::mem::take(&mut self.state.recording) {
            let graph = self.stream.end_capture()?;
            if self.graphs.len() >= MAX_GRAPHS {
                let oldest = self.graphs.iter().min_by_key(|(_, r)| r.age).map(|(shape, _)| *shape);
                oldest.and_then(|shape| self.graphs.remove(&shape));
            }
            self.graphs.insert(self.shape, Ready { graph, state: self.state, age: 0 });
        }
        if let Some(ready) = self.graphs.get_mut(&self.shape) {
            ready.age = self.age;
            // SAFETY: the graph's buffers belong to this backend; those that are replaced clear the graphs.
            unsafe { ready.graph.launch(&self.stream) }?;
        }
        Ok(())
    }
}

impl Shape {
    fn new(batch: &Batch, routing: Routing, top_k: usize) -> Self {
        let changes = batch.slot.windows(2).filter(|w| w[0] != w[1]).count();
        let outputs: Vec<u32> = batch.outputs.iter().map(|&r| batch.slot[r as usize]).collect();
        let mut slots = batch.slot.clone();
        slots.sort_unstable();
        Self {
            rows: batch.tokens.len(),
            outputs: batch.outputs.len(),
            routing,
            top_k,
            runs: batch.slot.len() >= LONG_RUN * (changes + 1),
            one_sequence: outputs.windows(2).any(|w| w[0] == w[1]),
            distinct: slots.windows(2).all(|w| w[0] != w[1]),
        }
    }
}

impl Backend for Cuda {
    fn describe(&self) -> String {
        let (major, minor) = self.device.capability();
        let blas = if self.blas.is_some() { "" } else { ", without cuBLASLt (prompts are slower)" };
        format!("CUDA {}, {} (compute {major}.{minor}){blas}", self.device.ordinal(), self.device.name())
    }

    fn memory(&self) -> Memory {
        Memory {
            weights: self.weights.bytes(),
            cache: self.caches.bytes(),
            scratch: self.s.bytes()
                + self.step.bytes()
                + Blas::WORKSPACE as u64
                + Sampling::bytes(self.spec.max_outputs),
            ..Memory::default()
        }
    }

    fn begin(
        &mut self,
        batch: &Batch,
        tables: &PageTables,
        routing: Routing,
        top_k: usize,
    ) -> Result<Record> {
        if std::mem::take(&mut self.state).recording {
            self.stream.abandon_capture();
        }
        // More positions than a sequence can have cannot be selected.
        let top_k = top_k.min(self.spec.pages_per_slot * PAGE);
        self.shape = Shape::new(batch, routing, top_k);
        self.step.set(&self.stream, batch, tables)?;
        if self.clock.is_some() {
            // Events belong to one graph: each step is recorded anew.
            self.graphs.remove(&self.shape);
        }
        if let Some(ready) = self.graphs.get(&self.shape) {
            self.state = State { recording: false, ..ready.state };
            return Ok(Record::Reused);
        }
        let selected = self.spec.max_outputs * self.selection_columns();
        if selected > self.s.selected.len() {
            self.stream.synchronize()?;
            self.graphs.clear();
            self.s.selected = self.device.zeros(selected)?;
            if self.layers.start > self.model.config.n_self {
                self.carried.selected = self.device.pinned(selected)?;
            }
        }
        if self.shape.rows <= FEW {
            self.stream.begin_capture()?;
            self.state.recording = true;
        }
        if let Some(clock) = &mut self.clock {
            clock.start(&self.stream, self.state.recording)?;
        }
        Ok(Record::Needed)
    }

    fn embed(&mut self) -> Result<()> {
        let p = clsa_embed {
            matrix: self.weights.matrix(&self.model.weights.token_embd).view(),
            tokens: self.step.tokens(),
            out: self.s.x.ptr(),
            n_rows: self.shape.rows as i32,
            scale: self.model.config.embed_scale,
        };
        // SAFETY: x holds max_rows rows; the engine checked the tokens, and the kernel does again.
        unsafe { matmul::embed(&self.stream, p) }?;
        self.step.compute_angles(&self.stream)?;
        self.mark(Stage::Embedding, None)
    }

    fn self_attention(&mut self, i: usize) -> Result<()> {
        let (c, weights) = (self.model.config.clone(), self.model.weights.clone());
        let layer = &weights.layers[i];
        let (wk, wv) =
            layer.kv.as_ref().ok_or_else(|| Error::Runtime(format!("layer {i} has no keys of its own")))?;
        let out = [(&layer.q, self.s.q.ptr()), (wk, self.s.k.ptr()), (wv, self.s.v.ptr())];
        self.linear(self.residual(&layer.attn_norm), &out, Mode::Store)?;
        let (cos, sin) = self.step.angles(false);
        let (k_cache, v_cache) = self.caches.layer(i);
        let norms = layer.qk_norm.as_ref();
        let op = clsa_rope_append {
            n_rot: c.rope.n_rot as i32,
            interleaved: c.rope.interleaved.into(),
            q: self.s.q.ptr(),
            q_out: self.s.q.ptr(),
            k: self.s.k.ptr(),
            v: self.s.v.ptr(),
            q_norm: norms.map_or(std::ptr::null(), |(q, _)| self.weights.vector(q)),
            k_norm: norms.map_or(std::ptr::null(), |(_, k)| self.weights.vector(k)),
            cos,
            sin,
            k_cache,
            v_cache,
            ..self.append(c.self_heads)
        };
        let attention = self.attention(c.self_heads, c.window.unwrap_or(0), (k_cache, v_cache));
        self.mark(Stage::SelfProjections, Some(i))?;
        let halves = self.expands(&[&layer.o]).then(|| self.s.a16.ptr());
        // SAFETY: buffers and caches of this backend, sized for max_rows; the engine's page tables name pages of the pools.
        unsafe {
            if self.shape.distinct {
                self.s.decode.append_attention(&self.stream, &op, &attention)?;
            } else if self.shape.runs && append_attention_prefill(&self.stream, &op, &attention, halves)? {
                self.state.halves = halves.is_some();
            } else {
                rope_append(&self.stream, &op)?;
                if !(self.shape.runs && attention_prefill(&self.stream, &attention)?) {
                    self.s.decode.attention(&self.stream, &attention)?;
                }
            }
        }
        self.mark(Stage::SelfAttention, Some(i))?;
        self.output(&layer.o)?;
        self.mark(Stage::SelfProjections, Some(i))
    }

    fn feed_forward(&mut self, i: usize) -> Result<()> {
        let weights = self.model.weights.clone();
        self.gated(&weights.layers[i])?;
        self.mark(Stage::FeedForward, Some(i))
    }

    fn append_shared(&mut self) -> Result<()> {
        let (c, weights) = (self.model.config.clone(), self.model.weights.clone());
        let shared = weights
            .shared
            .as_ref()
            .ok_or_else(|| Error::Runtime("a Transformer has no shared memory".into()))?;
        let mut out = vec![(&shared.k, self.s.k.ptr()), (&shared.v, self.s.v.ptr())];
        if let Some((wq, wk)) = &shared.indexer {
            out.extend([(wk, self.s.index_key.ptr()), (wq, self.s.index_query.ptr())]);
        }
        self.linear(self.residual(&shared.norm), &out, Mode::Store)?;
        let (k_cache, v_cache) = self.caches.shared();
        let (cos, sin) = self.step.angles(true);
        let op = clsa_rope_append {
            n_rot: c.cross_rope.as_ref().map_or(0, |r| r.n_rot as i32),
            interleaved: c.cross_rope.as_ref().is_some_and(|r| r.interleaved).into(),
            k: self.s.k.ptr(),
            v: self.s.v.ptr(),
            cos,
            sin,
            k_cache,
            v_cache,
            ..self.append(c.cross_heads)
        };
        // SAFETY: buffers and caches of this backend, sized for max_rows.
        unsafe { rope_append(&self.stream, &op) }?;
        if let Some(ix) = c.indexer {
            let op = clsa_rope_append {
                k: self.s.index_key.ptr(),
                k_cache: self.caches.index(),
                ..self.append(Heads { n_head: 1, n_kv: 1, head_dim: ix.head_dim })
            };
            // SAFETY: as above.
            unsafe { rope_append(&self.stream, &op) }?;
        }
        self.mark(Stage::SharedMemory, None)
    }

    fn keep_outputs(&mut self) -> Result<()> {
        self.state.kept = true;
        if self.shape.outputs == self.shape.rows {
            return Ok(());
        }
        let select = |x: *const f32, out: *mut f32, cols: usize| clsa_select_rows {
            x,
            rows: self.step.output_rows(),
            out,
            n_rows: self.shape.outputs as i32,
            cols: cols as i32,
        };
        let c = &self.model.config;
        // SAFETY: both sides hold that many rows; output rows are rows of the batch.
        unsafe {
            matmul::select_rows(&self.stream, select(self.s.x.ptr(), self.s.kept.ptr(), c.hidden))?;
            if let Some(ix) = c.indexer {
                let p = select(self.s.index_query.ptr(), self.s.index_kept.ptr(), ix.head_dim);
                matmul::select_rows(&self.stream, p)?;
            }
        }
        self.state.moved = true;
        self.step.compute_kept_angles(&self.stream)?;
        self.mark(Stage::Other, None)
    }

    fn route(&mut self) -> Result<()> {
        let d = self.model.config.indexer.map_or(0, |ix| ix.head_dim);
        let block = if let Routing::Block(b) = self.shape.routing { b } else { 0 };
        let op = clsa_route {
            batch: self.step.batch(true),
            d: d as i32,
            k: self.shape.top_k as i32,
            block: block as i32,
            n_columns: self.selection_columns() as i32,
            q: if self.state.moved { self.s.index_kept.ptr() } else { self.s.index_query.ptr() },
            keys: self.caches.index(),
            selected: self.s.selected.ptr(),
            count: self.s.count.ptr(),
        };
        // SAFETY: buffers and caches of this backend; positions lie below pages_per_slot pages.
        unsafe { self.s.route.route(&self.stream, &op, self.shape.one_sequence) }?;
        self.state.routed = true;
        self.gather()?;
        self.mark(Stage::Routing, None)
    }

    fn cross_attention(&mut self, j: usize) -> Result<()> {
        let (c, weights) = (self.model.config.clone(), self.model.weights.clone());
        let layer = &weights.layers[j];
        let q = self.s.q.ptr();
        self.linear(self.residual(&layer.attn_norm), &[(&layer.q, q)], Mode::Store)?;
        if let Some(rope) = &c.cross_rope {
            let (cos, sin) = self.step.angles(true);
            let op = clsa_rope_append {
                n_rot: rope.n_rot as i32,
                interleaved: rope.interleaved.into(),
                q,
                q_out: q,
                cos,
                sin,
                ..self.append(c.cross_heads)
            };
            // SAFETY: buffers of this backend, sized for max_rows.
            unsafe { rope_append(&self.stream, &op) }?;
        }
        self.mark(Stage::CrossProjections, Some(j))?;
        if self.state.routed {
            let op = self.gather_op();
            let settled = std::mem::replace(&mut self.state.settled, true);
            let gathered = self.s.gathered.holds(&op).then_some(&self.s.gathered);
            // SAFETY: as in `route`, which filled the selection.
            unsafe { self.s.decode.gather_attention(&self.stream, &op, gathered, settled) }?;
        } else {
            let op = self.attention(c.cross_heads, 0, self.caches.shared());
            // SAFETY: as above.
            unsafe { self.s.decode.attention(&self.stream, &op) }?;
        }
        self.mark(Stage::CrossAttention, Some(j))?;
        self.output(&layer.o)?;
        self.mark(Stage::CrossProjections, Some(j))
    }

    fn logits(&mut self) -> Result<()> {
        let weights = self.model.weights.clone();
        let out = [(&weights.output, self.s.logits.ptr())];
        self.linear(self.residual(&weights.output_norm), &out, Mode::Store)?;
        self.state.logits = true;
        self.mark(Stage::Logits, None)
    }

    fn finish(&mut self) -> Result<&[f32]> {
        self.launch()?;
        self.fetch_logits()
    }

    fn finish_drawn(&mut self, draws: &[Draw]) -> Result<Vec<u32>> {
        let vocab = self.model.config.vocab;
        let alike = draws.iter().all(|d| draws_alike(d, vocab));
        if alike {
            // Before the step: a copy after it would stand between the logits and the draw.
            self.sampling.stage(&self.stream, draws)?;
        }
        self.launch()?;
        if self.state.logits && alike {
            // SAFETY: the logits of the output rows, one for each draw.
            let tokens =
                unsafe { self.sampling.draw(&self.stream, self.s.logits.ptr(), vocab, draws.len()) }?;
            if let Some(tokens) = tokens.into_iter().collect() {
                return Ok(tokens);
            }
        }
        // The host says what is wrong with them.
        let logits = self.fetch_logits()?;
        Ok(logits.chunks(vocab).zip(draws).map(|(row, d)| d.take(row)).collect::<Result<_, _>>()?)
    }

    fn set_timing(&mut self, on: bool) -> Result<()> {
        self.stream.synchronize()?;
        self.graphs.clear();
        self.clock = if on { Some(Clock::new(&self.device)?) } else { None };
        Ok(())
    }
    fn timings(&mut self) -> Result<Vec<Timing>> {
        self.clock.as_ref().map_or_else(|| Ok(vec![]), Clock::timings)
    }

    fn selection(&mut self, output: usize) -> Result<Vec<u32>> {
        if !self.state.routed || output >= self.shape.outputs {
            return Ok(vec![]);
        }
        let mut count = [0];
        self.s.count.read(output, &mut count)?;
        let mut selected = vec![0; count[0].max(0) as usize];
        self.s.selected.read(output * self.selection_columns(), &mut selected)?;
        Ok(selected)
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        self.caches.copy_page(from, to)
    }
    fn read_page(&mut self, page: u32, rows: usize, out: &mut Vec<u8>) -> Result<()> {
        self.caches.read_page(page, rows, out)
    }
    fn write_page(&mut self, page: u32, rows: usize, bytes: &[u8]) -> Result<()> {
        self.caches.write_page(page, rows, bytes)
    }
    fn save_window(&mut self, slot: u32, len: usize) -> Result<Vec<u8>> {
        self.caches.save_window(slot, len)
    }
    fn records(&self, rows: usize) -> bool {
        rows <= FEW
    }
    fn load_window(&mut self, slot: u32, len: usize, bytes: &[u8]) -> Result<()> {
        self.caches.load_window(slot, len, bytes)
    }

    fn copy_window(&mut self, from: u32, to: u32, len: usize) -> Result<()> {
        self.caches.copy_window(from, to, len)
    }
}

impl Part for Cuda {
    fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    fn receive(&mut self, x: &[f32], kept: bool) -> Result<()> {
        self.carried.x[..x.len()].copy_from_slice(x);
        if !self.queues() {
            return Ok(());
        }
        self.s.x.write_async(0, &self.carried.x, x.len(), &self.stream)?;
        self.state.kept = kept;
        if kept {
            self.step.compute_kept_angles(&self.stream)
        } else {
            self.step.compute_angles(&self.stream)
        }
    }

    fn receive_selection(&mut self, selected: &[Vec<u32>]) -> Result<()> {
        let columns = self.selection_columns();
        for (i, from) in selected.iter().enumerate() {
            self.carried.selected[i * columns..][..from.len()].copy_from_slice(from);
            self.carried.count[i] = from.len() as i32;
        }
        if !self.queues() {
            return Ok(());
        }
        let n = selected.len();
        self.s.selected.write_async(0, &self.carried.selected, n * columns, &self.stream)?;
        self.s.count.write_async(0, &self.carried.count, n, &self.stream)?;
        self.state.routed = true;
        self.gather()
    }

    fn hand_over(&mut self) -> Result<&[f32]> {
        self.launch()?;
        let n = self.rows().0 * self.model.config.hidden;
        let x = if self.state.moved { &self.s.kept } else { &self.s.x };
        x.read_async(0, &mut self.carried.out, n, &self.stream)?;
        self.stream.synchronize()?;
        Ok(&self.carried.out[..n])
    }

    fn read_rows(&mut self, batch: &Batch, tables: &PageTables, out: &mut Vec<u8>) -> Result<()> {
        self.caches.read_rows(batch, tables, out)
    }

    fn write_rows(&mut self, batch: &Batch, tables: &PageTables, bytes: &[u8]) -> Result<()> {
        self.caches.write_rows(batch, tables, bytes)
    }
}

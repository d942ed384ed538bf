//! The CPU backend: a ggml graph per batch shape, with our kernels as its custom nodes.
mod caches;
mod clock;
mod graph;
mod linear;
mod nodes;
mod repacked;
mod step;
mod team;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ggml_kernels::ggml as g;
use ggml_kernels::ops::Ops;

use self::caches::Anonymous;
use self::clock::Clock;
use self::graph::{Arena, Context, Graph, Node, Runner};
pub use self::repacked::Repack;
use self::repacked::Repacked;
use self::step::Shared;
use self::team::Team;
use super::caches::Caches;
use super::cuda::KvDevice;
use super::probe::Probe;
use super::split::record_part;
use super::{Backend, Batch, Memory, Part, Queries, Record, Routing, Stage, Timing};
use crate::cache::{CacheSpec, PageTables};
use crate::error::{Error, Result};
use crate::model::{Model, Weight};
use crate::placement;

/// The model on this machine's cores.
pub struct Ggml {
    model: Model,
    spec: CacheSpec,
    layers: Range<usize>,
    shared: Arc<Shared>,
    caches: Caches<Anonymous>,
    /// x from the part before, `[max_rows][hidden]`, and what was selected there, `[max_outputs][columns]`.
    received: Box<[f32]>,
    received_selection: Box<[u32]>,
    embedding: Node,
    // Norm vectors in f32, by offset in the file.
    vectors: HashMap<usize, Box<[f32]>>,
    repacked: Option<Repacked>,
    _context: Context,
    team: Arc<Mutex<Team>>,
    clock: Arc<Clock>,
    threads: usize,
    runner: Runner,
    arena: Arena,
    interrupt: Arc<AtomicBool>,
    graphs: HashMap<Shape, Ready>,
    shape: Shape,
    recording: Option<Recording>,
    probe: Option<Arc<Probe>>,
}

/// What decides the nodes of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    outputs: usize,
    routing: Routing,
    top_k: usize,
    /// Whether the queries of the output rows are kept.
    queries: bool,
}

/// A graph that can be run again for any batch of its shape.
struct Ready {
    graph: Graph,
    /// Logits, or x where other parts go on.
    result: Option<Node>,
    selected: Option<Node>,
    queries: KeptQueries,
    age: u64,
}

/// Nodes whose values are kept for [`Backend::queries`].
#[derive(Default)]
struct KeptQueries {
    layers: Vec<Node>,
    index: Option<Node>,
}

/// A graph that the verbs are filling.
struct Recording {
    graph: Graph,
    x: Node,
    /// Rows of `x`; whether they are the output rows only.
    kept: bool,
    /// The self-decoder's result, of the rows of `x`: what the indexer sees.
    memory: Option<Node>,
    selected: Option<Node>,
    queries: KeptQueries,
    result: Option<Node>,
}

/// Pieces that an op is cut into: several for each thread, so that one which is held up does not hold up the others; one where there is
/// nobody to share with.
fn pieces(threads: usize) -> usize {
    if threads == 1 { 1 } else { 4 * threads }
}

/// Graphs kept for reuse: decode at a few batch sizes, the full micro-batch, and the last odd ones.
const MAX_GRAPHS: usize = 12;

impl Ggml {
    /// Maps the weights and reserves caches and scratch memory for the largest micro-batch.
    ///
    /// # Errors
    /// [`Error::Memory`] when the caches cannot be had.
    pub fn new(model: Model, spec: CacheSpec, threads: usize, interrupt: Arc<AtomicBool>) -> Result<Self> {
        let layers = 0..model.config.n_layer;
        Self::part(model, spec, threads, interrupt, layers, Repack::Off)
    }

    /// Some layers only, with a repacked copy of their weights if `repack` says so.
    ///
    /// # Errors
    /// [`Error::Memory`] when the caches, or copies asked for, cannot be had.
    pub fn part(
        model: Model,
        spec: CacheSpec,
        threads: usize,
        interrupt: Arc<AtomicBool>,
        layers: Range<usize>,
        repack: Repack,
    ) -> Result<Self> {
        let c = &model.config;
        spec.check(c)?;
        let context = Context::new(1)?;
        let w = &model.weights.token_embd;
        let data = model.bytes(w).as_ptr().cast_mut().cast();
        // SAFETY: the loader checked that the map holds n_out rows of n_in values of this type; `self.model` keeps the map, and weights
        // are only read.
        let embedding = unsafe { context.tensor(w.ty.to_ggml() as g::ggml_type, w.n_in, w.n_out, data) };
        let vectors = model.weights.all().filter(|w| w.n_out == 1);
        let vectors = vectors.map(|w| (w.offset, model.values(w).into_boxed_slice())).collect();
        let team = Team::new(threads)
            .map_err(|e| Error::Runtime(format!("could not start {threads} threads: {e}")))?;
        let ops = Ops::best().map_err(|e| Error::Input(e.to_string()))?;
        let own = placement::device_cache_bytes(c, &spec, &layers, KvDevice::Gpu);
        let free = placement::free_memory().saturating_sub(own);
        let repacked = Repacked::new(&model, &layers, repack, free, threads, ops)?;
        let caches = Caches::new(c, &spec, &layers, |_, bytes| Anonymous::new(bytes))?;
        let received = if layers.start > 0 { spec.max_rows * c.hidden } else { 0 };
        let shared = Arc::new(Shared::new(&model, &spec, pieces(threads), ops));
        let mut backend = Self {
            layers,
            caches,
            received: vec![0.0; received].into(),
            received_selection: Box::default(),
            shared,
            embedding,
            vectors,
            repacked,
            _context: context,
            team: Arc::new(Mutex::new(team)),
            clock: Arc::default(),
            threads,
            runner: Runner::new()?,
            arena: Arena::new(),
            interrupt,
            graphs: HashMap::new(),
            shape: Shape { rows: 0, outputs: 0, routing: Routing::Dense, top_k: 0, queries: false },
            recording: None,
            probe: None,
            model,
            spec,
        };
        backend.reserve()?;
        Ok(backend)
    }

    /// From now on `probe` sees what enters each product.
    pub fn set_probe(&mut self, probe: Arc<Probe>) {
        self.probe = Some(probe);
        // Graphs recorded so far have no node for it.
        self.graphs.clear();
    }

    /// Places the largest graph once, so that scratch memory is held from the start and does not grow.
    fn reserve(&mut self) -> Result<()> {
        let (rows, outputs) = (self.spec.max_rows, self.spec.max_outputs);
        let c = self.model.config.clone();
        let routing = if c.indexer.is_some() { Routing::Clsa } else { Routing::Dense };
        let batch = Batch {
            tokens: vec![0; rows],
            pos: vec![0; rows],
            slot: vec![0; rows],
            outputs: (0..outputs as u32).collect(),
        };
        let tables =
            PageTables { stride: self.spec.pages_per_slot, entries: vec![0; self.spec.pages_per_slot] };
        let top_k = c.indexer.map_or(0, |ix| ix.top_k);
        record_part(self, &c, &batch, &tables, routing, top_k)?;
        self.ready()?;
        Ok(())
    }

    /// A norm's weights; they live as long as the backend.
    fn vector(&self, w: &Weight) -> *const f32 {
        self.vectors[&w.offset].as_ptr()
    }

    fn recording(&mut self) -> &mut Recording {
        self.recording.as_mut().expect("verbs are called after begin() asked for a recording")
    }

    /// Ends the recording, if there is one, and returns the graph for the present shape.
    fn ready(&mut self) -> Result<&mut Ready> {
        let age = self.graphs.values().map(|r| r.age).max().unwrap_or(0) + 1;
        if let Some(Recording { mut graph, x, result, selected, queries, .. }) = self.recording.take() {
            match result {
                Some(result) => graph.keep(result),
                None => graph.expand(x),
            }
            if self.arena.place(&mut graph)? {
                self.graphs.clear();
            }
            if self.graphs.len() >= MAX_GRAPHS {
                let oldest = self.graphs.iter().min_by_key(|(_, r)| r.age).map(|(shape, _)| *shape);
                oldest.and_then(|shape| self.graphs.remove(&shape));
            }
            self.graphs.insert(self.shape, Ready { graph, result, selected, queries, age });
        }
        let ready =
            self.graphs.get_mut(&self.shape).ok_or_else(|| Error::Runtime("no batch was begun".into()))?;
        ready.age = age;
        Ok(ready)
    }
}

impl Backend for Ggml {
    fn describe(&self) -> String {
        format!("CPU, {} threads, {}", self.threads, self.shared.ops.level)
    }

    fn memory(&self) -> Memory {
        Memory {
            weights: self.model.weights.of(self.layers.clone()).map(|w| w.bytes as u64).sum(),
            repacked: self.vectors.values().map(|v| v.len() as u64 * 4).sum::<u64>()
                + self.repacked.as_ref().map_or(0, |r| r.bytes() as u64),
            repack_time: self.repacked.as_ref().map_or(Duration::ZERO, Repacked::time),
            cache: self.caches.bytes(),
            scratch: self.arena.bytes() as u64 + self.shared.bytes() + self.received.len() as u64 * 4,
        }
    }

    fn begin(
        &mut self,
        batch: &Batch,
        tables: &PageTables,
        routing: Routing,
        top_k: usize,
    ) -> Result<Record> {
        // SAFETY: no graph runs while the backend is borrowed mutably.
        unsafe { self.shared.set(batch, tables) };
        let (rows, outputs) = (batch.tokens.len(), batch.outputs.len());
        self.shape = Shape { rows, outputs, routing, top_k, ..self.shape };
        if self.graphs.contains_key(&self.shape) {
            return Ok(Record::Reused);
        }
        let (team, clock) = (Arc::clone(&self.team), Arc::clone(&self.clock));
        let graph = Graph::new(64 + 24 * self.model.config.n_layer, team, self.shared.pieces, clock)?;
        // `embed` replaces this placeholder before anything reads it.
        let x = Node(std::ptr::null_mut());
        self.recording = Some(Recording {
            graph,
            x,
            kept: outputs == rows,
            memory: None,
            selected: None,
            queries: KeptQueries::default(),
            result: None,
        });
        Ok(Record::Needed)
    }

    fn embed(&mut self) -> Result<()> {
        let embedding = self.embedding;
        let (scale, rows, tokens) = (self.model.config.embed_scale, self.shape.rows, self.shared.tokens());
        let rec = self.recording();
        // SAFETY: the token array has max_rows entries and lives as long as the backend.
        let tokens = unsafe { rec.graph.input(g::GGML_TYPE_I32, rows, 1, tokens.cast()) };
        rec.x = rec.graph.rows(embedding, tokens);
        if scale != 1.0 {
            rec.x = rec.graph.scale(rec.x, scale);
        }
        Ok(())
    }

    fn self_attention(&mut self, i: usize) -> Result<()> {
        let weights = Arc::clone(&self.model.weights);
        let layer = &weights.layers[i];
        let (wk, wv) = layer.kv.as_ref().expect("the loader gives self layers k and v");
        let qkv = self.linear(&[&layer.q, wk, wv], Some(&layer.attn_norm));
        let (append, attention, out) =
            (self.self_append(i), self.self_attend(i), self.linear(&[&layer.o], None));
        let rec = self.recording();
        rec.graph.label(Stage::SelfProjections, Some(i));
        let qkv = qkv.node(&mut rec.graph, rec.x, None);
        let q = append.node(&mut rec.graph, qkv);
        rec.graph.label(Stage::SelfAttention, Some(i));
        let o = attention.node(&mut rec.graph, q);
        rec.graph.label(Stage::SelfProjections, Some(i));
        rec.x = out.node(&mut rec.graph, o, Some(rec.x));
        Ok(())
    }

    fn feed_forward(&mut self, i: usize) -> Result<()> {
        let weights = Arc::clone(&self.model.weights);
        let ffn = &weights.layers[i].ffn;
        let gate_up = self.linear(&[&ffn.gate, &ffn.up], Some(&ffn.norm)).swiglu();
        let down = self.linear(&[&ffn.down], None);
        let rec = self.recording();
        rec.graph.label(Stage::FeedForward, Some(i));
        rec.x = gate_up.then(down, &mut rec.graph, rec.x, Some(rec.x));
        Ok(())
    }

    fn append_shared(&mut self) -> Result<()> {
        let weights = Arc::clone(&self.model.weights);
        let shared = weights.shared.as_ref().expect("the loader gives a YOCO model its shared memory");
        let kv = self.linear(&[&shared.k, &shared.v], Some(&shared.norm));
        let append = self.shared_append();
        let index = (shared.indexer.as_ref())
            .map(|(_, wk)| (self.linear(&[wk], Some(&shared.norm)), self.index_append()));
        let rec = self.recording();
        rec.graph.label(Stage::SharedMemory, None);
        let kv = kv.node(&mut rec.graph, rec.x, None);
        let stored = append.node(&mut rec.graph, kv);
        rec.graph.expand(stored);
        if let Some((key, append)) = index {
            let key = key.node(&mut rec.graph, rec.x, None);
            let stored = append.node(&mut rec.graph, key);
            rec.graph.expand(stored);
        }
        rec.memory = Some(rec.x);
        Ok(())
    }

    fn keep_outputs(&mut self) -> Result<()> {
        let (outputs, indices) = (self.shape.outputs, self.shared.outputs());
        let rec = self.recording();
        if rec.kept {
            return Ok(());
        }
        // SAFETY: the array of output rows has max_outputs entries and lives as long as the backend.
        let indices = unsafe { rec.graph.input(g::GGML_TYPE_I32, outputs, 1, indices.cast()) };
        rec.x = rec.graph.rows(rec.x, indices);
        rec.memory = rec.memory.map(|_| rec.x);
        rec.kept = true;
        Ok(())
    }

    fn route(&mut self) -> Result<()> {
        let weights = Arc::clone(&self.model.weights);
        let shared = weights.shared.as_ref().expect("the loader gives a YOCO model its shared memory");
        let (wq, _) = shared.indexer.as_ref().expect("the engine routes only where there is an indexer");
        let (query, route) = (self.linear(&[wq], Some(&shared.norm)), self.route_op());
        let rec = self.recording();
        rec.graph.label(Stage::Scoring, None);
        let memory = rec.memory.expect("append_shared comes before route");
        let q = query.node(&mut rec.graph, memory, None);
        rec.graph.label(Stage::TopK, None);
        rec.selected = Some(route.node(&mut rec.graph, q));
        Ok(())
    }

    fn cross_attention(&mut self, j: usize) -> Result<()> {
        let weights = Arc::clone(&self.model.weights);
        let layer = &weights.layers[j];
        let (query, out) = (self.linear(&[&layer.q], Some(&layer.attn_norm)), self.linear(&[&layer.o], None));
        let rope = self.model.config.cross_rope.is_some().then(|| self.cross_rope());
        let (gather, dense) = (self.gather(), self.cross_attend());
        let keep = self.shape.queries;
        let index = (weights.shared.as_ref().and_then(|s| Some((&s.norm, &s.indexer.as_ref()?.0))))
            .filter(|_| keep && self.recording().queries.index.is_none())
            .map(|(norm, wq)| self.linear(&[wq], Some(norm)));
        let rec = self.recording();
        rec.graph.label(Stage::CrossProjections, Some(j));
        let mut q = query.node(&mut rec.graph, rec.x, None);
        if let Some(rope) = rope {
            q = rope.node(&mut rec.graph, q);
        }
        if keep {
            rec.graph.keep(q);
            rec.queries.layers.push(q);
        }
        if let (Some(index), Some(memory)) = (index, rec.memory) {
            let q = index.node(&mut rec.graph, memory, None);
            rec.graph.keep(q);
            rec.queries.index = Some(q);
        }
        rec.graph.label(Stage::CrossAttention, Some(j));
        let o = match rec.selected {
            Some(selected) => gather.node(&mut rec.graph, q, selected),
            None => dense.node(&mut rec.graph, q),
        };
        rec.graph.label(Stage::CrossProjections, Some(j));
        rec.x = out.node(&mut rec.graph, o, Some(rec.x));
        Ok(())
    }

    fn logits(&mut self) -> Result<()> {
        let weights = Arc::clone(&self.model.weights);
        let output = self.linear(&[&weights.output], Some(&weights.output_norm));
        let rec = self.recording();
        rec.graph.label(Stage::Logits, None);
        rec.result = Some(output.node(&mut rec.graph, rec.x, None));
        Ok(())
    }

    fn finish(&mut self) -> Result<&[f32]> {
        self.ready()?;
        let ready = self.graphs.get_mut(&self.shape).expect("ready() has just put it there");
        self.runner.run(&mut ready.graph, &self.interrupt)?;
        let Some(result) = ready.result else { return Ok(&[]) };
        // SAFETY: the node holds rows * width floats in the arena, which stays until the next run.
        Ok(unsafe { std::slice::from_raw_parts(result.data::<f32>(), result.rows() * result.width()) })
    }

    fn set_timing(&mut self, on: bool) -> Result<()> {
        self.clock.switch(on);
        // Routing is recorded with, or without, its scores apart.
        self.graphs.clear();
        Ok(())
    }

    fn timings(&mut self) -> Result<Vec<Timing>> {
        Ok(self.clock.take())
    }

    fn selection(&mut self, output: usize) -> Result<Vec<u32>> {
        let Some(selected) = self.graphs.get(&self.shape).and_then(|r| r.selected) else { return Ok(vec![]) };
        if output >= selected.rows() {
            return Ok(vec![]);
        }
        let count = self.shared.count(output).min(selected.width());
        // SAFETY: row `output` of the node has `width` positions, of which `count` are set.
        Ok(unsafe {
            std::slice::from_raw_parts(selected.data::<u32>().add(output * selected.width()), count)
        }
        .to_vec())
    }

    fn keep_queries(&mut self, keep: bool) -> Result<()> {
        self.shape.queries = keep;
        Ok(())
    }

    fn queries(&mut self) -> Result<Queries> {
        let Some(ready) = self.graphs.get(&self.shape) else { return Ok(Queries::default()) };
        let values = |node: &Node| {
            // SAFETY: the node holds rows * width floats in the arena, which stays until the next run.
            unsafe { std::slice::from_raw_parts(node.data::<f32>(), node.rows() * node.width()) }.to_vec()
        };
        let KeptQueries { layers, index } = &ready.queries;
        Ok(Queries {
            layers: layers.iter().map(values).collect(),
            index: index.as_ref().map_or_else(Vec::new, values),
        })
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

    fn load_window(&mut self, slot: u32, len: usize, bytes: &[u8]) -> Result<()> {
        self.caches.load_window(slot, len, bytes)
    }

    fn copy_window(&mut self, from: u32, to: u32, len: usize) -> Result<()> {
        self.caches.copy_window(from, to, len)
    }
}

impl Part for Ggml {
    fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    fn receive(&mut self, x: &[f32], kept: bool) -> Result<()> {
        self.received[..x.len()].copy_from_slice(x);
        let (hidden, data) = (self.model.config.hidden, self.received.as_mut_ptr());
        if let Some(rec) = &mut self.recording {
            // SAFETY: the array holds max_rows rows and lives as long as the backend.
            rec.x = unsafe { rec.graph.input(g::GGML_TYPE_F32, hidden, x.len() / hidden, data.cast()) };
            rec.kept |= kept;
        }
        Ok(())
    }

    fn receive_selection(&mut self, selected: &[Vec<u32>]) -> Result<()> {
        let columns = self.shape.routing.columns(self.shape.top_k);
        if self.received_selection.len() < self.spec.max_outputs * columns {
            self.received_selection = vec![0; self.spec.max_outputs * columns].into();
            self.graphs.clear();
        }
        for (i, (to, from)) in self.received_selection.chunks_mut(columns).zip(selected).enumerate() {
            to[..from.len()].copy_from_slice(from);
            // SAFETY: no graph runs; there are max_outputs counts.
            unsafe { self.shared.counts().add(i).write(from.len() as i32) };
        }
        let data = self.received_selection.as_mut_ptr();
        if let Some(rec) = &mut self.recording {
            // SAFETY: as in `receive`; graphs that point to an older array are gone.
            let node = unsafe { rec.graph.input(g::GGML_TYPE_I32, columns, selected.len(), data.cast()) };
            rec.selected = Some(node);
        }
        Ok(())
    }

    fn hand_over(&mut self) -> Result<&[f32]> {
        if let Some(rec) = &mut self.recording {
            rec.result = Some(rec.x);
        }
        self.finish()
    }

    fn read_rows(&mut self, batch: &Batch, tables: &PageTables, out: &mut Vec<u8>) -> Result<()> {
        self.caches.read_rows(batch, tables, out)
    }

    fn write_rows(&mut self, batch: &Batch, tables: &PageTables, bytes: &[u8]) -> Result<()> {
        self.caches.write_rows(batch, tables, bytes)
    }
}

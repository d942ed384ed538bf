//! A model cut into contiguous ranges of layers, each on a backend of its own: the executor passes the verbs on to the part that holds
//! the layer, and carries over each cut what the layers after it need.
//!
//! Over a cut go the residual stream `x`; within the cross-decoder also the K and V rows that the batch added to the shared memory
//! (each part with cross layers keeps a copy of it), and the selection.
use std::ops::Range;

use super::{Backend, Batch, Memory, Part, Queries, Record, Routing, Timing};
use crate::cache::{CacheSpec, CacheType, PageTables, pools_of};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::sampler::Draw;

/// Several backends that together hold a model.
pub struct Split {
    parts: Vec<Held>,
    /// The part with the shared memory's projections and the indexer: that of the first cross layer. A Transformer has none.
    owner: Option<usize>,
    n_self: usize,
    /// Bytes that one position of a self layer takes in a saved window.
    window_row: usize,
    window: Option<usize>,
    batch: Batch,
    tables: PageTables,
    routing: Routing,
    top_k: usize,
    /// The part whose turn it is.
    at: usize,
    /// Whether that part wants the verbs.
    record: Record,
    /// Whether only the output rows are left.
    kept: bool,
    x: Vec<f32>,
    rows: Vec<u8>,
}

struct Held {
    part: Box<dyn Part>,
    layers: Range<usize>,
    /// Bytes that one position takes in a saved page.
    page_row: usize,
}

/// Calls the verbs of one part for a batch, as if the parts before had done theirs with nothing but zeros: to reserve memory.
///
/// # Errors
/// What the part reports.
pub fn record_part(
    part: &mut dyn Part,
    c: &Config,
    batch: &Batch,
    tables: &PageTables,
    routing: Routing,
    top_k: usize,
) -> Result<()> {
    let layers = part.layers();
    if layers == (0..c.n_layer) {
        return crate::model::record(part, c, batch, tables, routing, top_k);
    }
    if part.begin(batch, tables, routing, top_k)? == Record::Reused {
        return Ok(());
    }
    let kept = layers.start > c.n_self;
    if layers.start == 0 {
        part.embed()?;
    } else {
        let rows = if kept { batch.outputs.len() } else { batch.tokens.len() };
        part.receive(&vec![0.0; rows * c.hidden], kept)?;
    }
    if kept && routing != Routing::Dense {
        part.receive_selection(&vec![vec![0]; batch.outputs.len()])?;
    }
    for layer in layers.clone() {
        if layer < c.n_self {
            part.self_attention(layer)?;
        } else {
            if layer == c.n_self {
                part.append_shared()?;
                part.keep_outputs()?;
                if routing != Routing::Dense {
                    part.route()?;
                }
            }
            part.cross_attention(layer)?;
        }
        if layer + 1 == c.n_self && !c.is_yoco() {
            part.keep_outputs()?;
        }
        part.feed_forward(layer)?;
    }
    if layers.end == c.n_layer { part.logits() } else { Ok(()) }
}

impl Split {
    /// Joins `parts`, whose layers follow each other and are all of the model's.
    ///
    /// # Errors
    /// [`Error::Runtime`] when they are not.
    pub fn new(parts: Vec<Box<dyn Part>>, c: &Config, spec: &CacheSpec) -> Result<Self> {
        let mut next = 0;
        let mut held = vec![];
        for part in parts {
            let layers = part.layers();
            if layers.start != next || layers.is_empty() {
                return Err(Error::Runtime(format!("found layers {layers:?} where {next} comes next")));
            }
            next = layers.end;
            let pools = pools_of(c, spec, &layers);
            let page_row = pools.iter().map(|p| p.cache_type.row_bytes(p.width)).sum();
            held.push(Held { part, layers, page_row });
        }
        if next != c.n_layer {
            return Err(Error::Runtime(format!("found {next} layers, the model has {}", c.n_layer)));
        }
        let owner = held.iter().position(|h| h.layers.contains(&c.n_self)).filter(|_| c.is_yoco());
        let row = |ty: CacheType| ty.row_bytes(c.self_heads.kv_width());
        Ok(Self {
            parts: held,
            owner,
            n_self: c.n_self,
            window_row: row(spec.k) + row(spec.v),
            window: c.window,
            batch: Batch::default(),
            tables: PageTables { stride: 0, entries: vec![] },
            routing: Routing::Dense,
            top_k: 0,
            at: 0,
            record: Record::Needed,
            kept: false,
            x: vec![],
            rows: vec![],
        })
    }

    /// The part that holds a layer, brought to its turn; `None` when its recording serves.
    fn turn(&mut self, layer: usize) -> Result<Option<&mut (dyn Part + 'static)>> {
        while !self.parts[self.at].layers.contains(&layer) {
            self.cross()?;
        }
        Ok(self.current())
    }

    fn current(&mut self) -> Option<&mut (dyn Part + 'static)> {
        (self.record == Record::Needed).then(|| &mut *self.parts[self.at].part)
    }

    /// Ends the present part's turn and carries what the next one needs over the cut.
    fn cross(&mut self) -> Result<()> {
        if self.at + 1 == self.parts.len() {
            return Err(Error::Runtime("no part holds the layer whose turn it is".into()));
        }
        self.x.clear();
        self.x.extend_from_slice(self.parts[self.at].part.hand_over()?);
        self.spread()?;
        self.at += 1;
        let to = &mut *self.parts[self.at].part;
        self.record = to.begin(&self.batch, &self.tables, self.routing, self.top_k)?;
        to.receive(&self.x, self.kept)?;
        let Some(owner) = self.owner.filter(|&o| o < self.at) else { return Ok(()) };
        if self.routing != Routing::Dense {
            let outputs = 0..self.batch.outputs.len();
            let selected =
                outputs.map(|i| self.parts[owner].part.selection(i)).collect::<Result<Vec<_>>>()?;
            self.parts[self.at].part.receive_selection(&selected)?;
        }
        Ok(())
    }

    /// Copies the rows that the batch added to the shared memory to every other part that reads them.
    fn spread(&mut self) -> Result<()> {
        let Some(owner) = self.owner.filter(|&o| o == self.at && o + 1 < self.parts.len()) else {
            return Ok(());
        };
        self.rows.clear();
        self.parts[owner].part.read_rows(&self.batch, &self.tables, &mut self.rows)?;
        for held in &mut self.parts[owner + 1..] {
            held.part.write_rows(&self.batch, &self.tables, &self.rows)?;
        }
        Ok(())
    }
}

impl Backend for Split {
    fn describe(&self) -> String {
        let parts = self.parts.iter();
        let each =
            parts.map(|h| format!("layers {}-{} on {}", h.layers.start, h.layers.end - 1, h.part.describe()));
        each.collect::<Vec<_>>().join("; ")
    }

    fn memory(&self) -> Memory {
        self.parts.iter().map(|h| h.part.memory()).fold(Memory::default(), |a, b| Memory {
            weights: a.weights + b.weights,
            repacked: a.repacked + b.repacked,
            repack_time: a.repack_time + b.repack_time,
            cache: a.cache + b.cache,
            scratch: a.scratch + b.scratch,
        })
    }

    /// Recordings are the parts' own affair: the verbs are always wanted here, and passed on where a part wants them.
    fn begin(
        &mut self,
        batch: &Batch,
        tables: &PageTables,
        routing: Routing,
        top_k: usize,
    ) -> Result<Record> {
        self.batch.clone_from(batch);
        self.tables.clone_from(tables);
        (self.routing, self.top_k, self.at, self.kept) = (routing, top_k, 0, false);
        self.record = self.parts[0].part.begin(batch, tables, routing, top_k)?;
        Ok(Record::Needed)
    }

    fn embed(&mut self) -> Result<()> {
        self.turn(0)?.map_or(Ok(()), Backend::embed)
    }

    fn self_attention(&mut self, layer: usize) -> Result<()> {
        self.turn(layer)?.map_or(Ok(()), |p| p.self_attention(layer))
    }

    fn feed_forward(&mut self, layer: usize) -> Result<()> {
        self.turn(layer)?.map_or(Ok(()), |p| p.feed_forward(layer))
    }

    fn append_shared(&mut self) -> Result<()> {
        self.turn(self.n_self)?.map_or(Ok(()), Backend::append_shared)
    }

    fn keep_outputs(&mut self) -> Result<()> {
        self.kept = true;
        self.current().map_or(Ok(()), Backend::keep_outputs)
    }

    /// Later parts have the selection of the first routing; repeating it would give the same.
    fn route(&mut self) -> Result<()> {
        if self.owner != Some(self.at) {
            return Ok(());
        }
        self.current().map_or(Ok(()), Backend::route)
    }

    fn cross_attention(&mut self, layer: usize) -> Result<()> {
        self.turn(layer)?.map_or(Ok(()), |p| p.cross_attention(layer))
    }

    fn logits(&mut self) -> Result<()> {
        self.current().map_or(Ok(()), Backend::logits)
    }

    fn finish(&mut self) -> Result<&[f32]> {
        let at = self.at;
        if self.batch.outputs.is_empty() {
            self.parts[at].part.finish()?;
            self.spread()?;
            return Ok(&[]);
        }
        self.parts[at].part.finish()
    }

    fn finish_drawn(&mut self, draws: &[Draw]) -> Result<Vec<u32>> {
        if self.batch.outputs.is_empty() {
            self.finish()?;
            return Ok(vec![]);
        }
        self.parts[self.at].part.finish_drawn(draws)
    }

    /// Every part has its own clock; what lies between their turns is on none.
    fn set_timing(&mut self, on: bool) -> Result<()> {
        let done = self.parts.iter_mut().try_for_each(|h| h.part.set_timing(on));
        if done.is_err() {
            self.parts.iter_mut().try_for_each(|h| h.part.set_timing(false))?;
        }
        done
    }

    fn timings(&mut self) -> Result<Vec<Timing>> {
        let mut all = vec![];
        // Parts after the present one had no turn.
        for held in &mut self.parts[..=self.at] {
            all.append(&mut held.part.timings()?);
        }
        Ok(all)
    }

    fn keep_queries(&mut self, keep: bool) -> Result<()> {
        let n_self = self.n_self;
        let mut cross = self.parts.iter_mut().filter(|h| h.layers.end > n_self);
        let done = cross.try_for_each(|h| h.part.keep_queries(keep));
        if done.is_err() {
            self.parts.iter_mut().try_for_each(|h| h.part.keep_queries(false))?;
        }
        done
    }

    fn queries(&mut self) -> Result<Queries> {
        let mut all = Queries::default();
        // Parts after the present one had no turn.
        for held in self.parts[..=self.at].iter_mut().filter(|h| h.layers.end > self.n_self) {
            let mut own = held.part.queries()?;
            all.layers.append(&mut own.layers);
            all.index.append(&mut own.index);
        }
        Ok(all)
    }

    fn selection(&mut self, output: usize) -> Result<Vec<u32>> {
        self.owner.map_or(Ok(vec![]), |o| self.parts[o].part.selection(output))
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        self.parts.iter_mut().try_for_each(|h| h.part.copy_page(from, to))
    }

    fn read_page(&mut self, page: u32, rows: usize, out: &mut Vec<u8>) -> Result<()> {
        match self.owner {
            Some(owner) => self.parts[owner].part.read_page(page, rows, out),
            None => self.parts.iter_mut().try_for_each(|h| h.part.read_page(page, rows, out)),
        }
    }

    fn write_page(&mut self, page: u32, rows: usize, bytes: &[u8]) -> Result<()> {
        let mut at = 0;
        for held in &mut self.parts {
            let mine = &bytes[at..at + rows * held.page_row];
            held.part.write_page(page, rows, mine)?;
            // Copies of the shared memory begin with the same K and V rows.
            at += if self.owner.is_some() { 0 } else { mine.len() };
        }
        Ok(())
    }

    /// A part may see fewer rows than the whole.
    fn records(&self, _: usize) -> bool {
        self.parts.iter().any(|held| held.part.records(1))
    }

    fn save_window(&mut self, slot: u32, len: usize) -> Result<Vec<u8>> {
        let mut out = vec![];
        for held in &mut self.parts {
            out.append(&mut held.part.save_window(slot, len)?);
        }
        Ok(out)
    }

    fn load_window(&mut self, slot: u32, len: usize, bytes: &[u8]) -> Result<()> {
        let Some(window) = self.window else { return Ok(()) };
        let layer = len.min(window - 1) * self.window_row;
        let mut rest = bytes;
        for held in &mut self.parts {
            let own = held.layers.end.min(self.n_self).saturating_sub(held.layers.start);
            let (mine, others) = rest.split_at(own * layer);
            held.part.load_window(slot, len, mine)?;
            rest = others;
        }
        Ok(())
    }

    fn copy_window(&mut self, from: u32, to: u32, len: usize) -> Result<()> {
        self.parts.iter_mut().try_for_each(|held| held.part.copy_window(from, to, len))
    }
}

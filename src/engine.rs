//! Sequences over one backend: which pages they hold, what is appended to them, and how they are rewound.
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ggml_kernels::quant;

use crate::backend::{Backend, Batch, Queries, Routing};
use crate::cache::{CacheSpec, CacheType, PAGE, PagePool, PageTables, PoolKind, RandomRows, pools, ring_len};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::model::{Model, record};
use crate::sampler::Draw;

/// A live sequence of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(u32);

/// What an engine is sized for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Positions that one sequence may hold.
    pub context: usize,
    /// Sequences alive at a time.
    pub n_seq: usize,
    /// Positions of all sequences together; `None`: `context * n_seq`.
    pub total_positions: Option<usize>,
    /// Rows of a micro-batch.
    pub max_rows: usize,
    /// Rows of a micro-batch whose logits may be wanted; `None`: one for each sequence.
    pub max_outputs: Option<usize>,
    /// Type of cached keys.
    pub k: CacheType,
    /// Type of cached values.
    pub v: CacheType,
    /// Type of index keys.
    pub index: CacheType,
    /// How cross layers choose positions; `None`: `clsa` with an indexer, `dense` without.
    pub routing: Option<Routing>,
    /// Positions that routing selects; `None`: the model's own.
    pub top_k: Option<usize>,
    /// Bytes of window checkpoints that one sequence may keep.
    pub checkpoint_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            context: 8192,
            n_seq: 1,
            total_positions: None,
            max_rows: 512,
            max_outputs: None,
            k: CacheType::F16,
            v: CacheType::F16,
            index: CacheType::F16,
            routing: None,
            top_k: None,
            checkpoint_bytes: 256 << 20,
        }
    }
}

impl Options {
    /// The caches that a backend must hold for these options.
    #[must_use]
    pub fn cache_spec(&self) -> CacheSpec {
        let pages_per_slot = self.context.div_ceil(PAGE);
        let total = self.total_positions.unwrap_or(pages_per_slot * PAGE * self.n_seq);
        CacheSpec {
            n_slots: self.n_seq,
            n_pages: total.div_ceil(PAGE).max(pages_per_slot),
            pages_per_slot,
            max_rows: self.max_rows,
            max_outputs: self.max_outputs.unwrap_or(self.n_seq).clamp(1, self.max_rows),
            k: self.k,
            v: self.v,
            index: self.index,
        }
    }
}

/// The windows of a sequence at some length, from which it can be continued.
struct Checkpoint {
    len: usize,
    window: Arc<[u8]>,
}

#[derive(Default)]
struct Sequence {
    len: usize,
    /// One past the highest position whose window rows were written since the last restore.
    high: usize,
    /// The oldest position whose window rows were there at the last restore.
    low: usize,
    pages: Vec<u32>,
    checkpoints: Vec<Checkpoint>,
}

/// A row of a batch: a token to append to a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The sequence it continues.
    pub seq: SeqId,
    /// The token.
    pub token: u32,
    /// Whether its logits are wanted.
    pub output: bool,
}

/// A model on a backend, with its live sequences.
pub struct Engine {
    model: Model,
    backend: Box<dyn Backend>,
    spec: CacheSpec,
    routing: Routing,
    top_k: usize,
    context: usize,
    checkpoint_bytes: usize,
    pool: PagePool,
    tables: PageTables,
    sequences: Vec<Option<Sequence>>,
    batch: Batch,
    interrupt: Arc<AtomicBool>,
}

impl Engine {
    /// An engine over `backend`, which was made for `options.cache_spec()`.
    ///
    /// # Errors
    /// [`Error::Input`] when the routing mode needs an indexer that the model has not.
    pub fn new(model: Model, backend: Box<dyn Backend>, options: &Options) -> Result<Self> {
        let spec = options.cache_spec();
        let c = &model.config;
        let routing =
            options.routing.unwrap_or(if c.indexer.is_some() { Routing::Clsa } else { Routing::Dense });
        let top_k = options.top_k.unwrap_or(c.indexer.map_or(0, |ix| ix.top_k));
        check_routing(c, routing, top_k)?;
        Ok(Self {
            routing,
            top_k,
            context: options.context,
            checkpoint_bytes: options.checkpoint_bytes,
            pool: PagePool::new(spec.n_pages),
            tables: PageTables {
                stride: spec.pages_per_slot,
                entries: vec![0; spec.n_slots * spec.pages_per_slot],
            },
            sequences: (0..spec.n_slots).map(|_| None).collect(),
            batch: Batch::default(),
            interrupt: Arc::default(),
            model,
            backend,
            spec,
        })
    }

    /// The model that runs here.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The device that it runs on.
    #[must_use]
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// The same, to change what does not concern its sequences.
    pub fn backend_mut(&mut self) -> &mut dyn Backend {
        &mut *self.backend
    }

    /// The caches.
    #[must_use]
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// The routing mode and the k of top-k.
    #[must_use]
    pub fn routing(&self) -> (Routing, usize) {
        (self.routing, self.top_k)
    }

    /// Changes the routing mode and the k of top-k from the next batch on. The caches stay: what they hold depends on neither.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn set_routing(&mut self, routing: Routing, top_k: usize) -> Result<()> {
        check_routing(&self.model.config, routing, top_k)?;
        (self.routing, self.top_k) = (routing, top_k);
        Ok(())
    }

    /// Positions that a sequence may hold.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// Pages nobody holds.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.pool.free()
    }

    /// Set it from anywhere to stop the work in hand at the next micro-batch with [`Error::Interrupted`].
    #[must_use]
    pub fn interrupt(&self) -> Arc<AtomicBool> {
        self.interrupt.clone()
    }

    /// Replaces the flag of [`Self::interrupt`], so that several engines share one.
    pub fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.interrupt = flag;
    }

    /// A new, empty sequence.
    ///
    /// # Errors
    /// [`Error::Runtime`] when all slots are in use.
    pub fn create(&mut self) -> Result<SeqId> {
        let slot = self.sequences.iter().position(Option::is_none).ok_or_else(|| {
            Error::Runtime(format!("all {} sequences are in use: raise -np or free one", self.spec.n_slots))
        })?;
        self.sequences[slot] = Some(Sequence::default());
        Ok(SeqId(slot as u32))
    }

    /// Ends a sequence and frees its pages.
    pub fn free(&mut self, seq: SeqId) {
        if let Some(s) = self.sequences.get_mut(seq.0 as usize).and_then(Option::take) {
            s.pages.iter().for_each(|&p| self.pool.release(p));
        }
    }

    /// A second sequence with the same past: pages are shared, windows copied.
    ///
    /// # Errors
    /// As [`Self::create`], and what the backend reports.
    pub fn fork(&mut self, from: SeqId) -> Result<SeqId> {
        let to = self.create()?;
        let len = self.len(from);
        self.backend.copy_window(from.0, to.0, len)?;
        let pages = self.sequence(from).pages.clone();
        pages.iter().for_each(|&p| self.pool.share(p));
        let checkpoints = (self.sequence(from).checkpoints.iter())
            .map(|c| Checkpoint { len: c.len, window: c.window.clone() })
            .collect();
        *self.sequence_mut(to) = Sequence { len, high: len, low: self.window_start(len), pages, checkpoints };
        self.write_table(to);
        Ok(to)
    }

    /// Positions that a sequence holds.
    #[must_use]
    pub fn len(&self, seq: SeqId) -> usize {
        self.sequence(seq).len
    }

    /// Whether a sequence holds nothing yet.
    #[must_use]
    pub fn is_empty(&self, seq: SeqId) -> bool {
        self.len(seq) == 0
    }

    /// Appends `tokens` in micro-batches. Returns the logits of the last one. `progress` hears the number done so far after each
    /// micro-batch and may break off, which is [`Error::Interrupted`]; what was appended until then stays.
    ///
    /// # Errors
    /// [`Error::ContextFull`] before anything is done, when the tokens do not fit.
    pub fn prefill(
        &mut self,
        seq: SeqId,
        tokens: &[u32],
        mut progress: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<&[f32]> {
        self.check_room(seq, tokens.len())?;
        let (mut done, mut due) = (0, None);
        while tokens.len() - done > self.spec.max_rows {
            self.run_beside(&rows_of(seq, &tokens[done..done + self.spec.max_rows], false), due.take())?;
            done += self.spec.max_rows;
            if self.len(seq) / CHECKPOINT_EVERY > (self.len(seq) - self.spec.max_rows) / CHECKPOINT_EVERY {
                due = Some(seq);
            }
            if progress(done).is_break() {
                due.map_or(Ok(()), |seq| self.checkpoint(seq))?;
                return Err(Error::Interrupted);
            }
        }
        let logits = self.run_beside(&rows_of(seq, &tokens[done..], true), due)?;
        let _ = progress(tokens.len());
        Ok(logits)
    }

    /// One token for each of several sequences; returns `[tokens][vocab]` logits.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn step(&mut self, tokens: &[(SeqId, u32)]) -> Result<&[f32]> {
        let rows: Vec<Row> = tokens.iter().map(|&(seq, token)| Row { seq, token, output: true }).collect();
        self.run(&rows)
    }

    /// Appends any mix of rows, at most `max_rows`, as one micro-batch. Rows of one sequence stand in their order. Returns the logits
    /// of the output rows.
    ///
    /// # Errors
    /// [`Error::ContextFull`], [`Error::Memory`] when the pages run out, [`Error::Input`] for a token outside the vocabulary,
    /// [`Error::Interrupted`]; the sequences are then as they were.
    pub fn run(&mut self, rows: &[Row]) -> Result<&[f32]> {
        self.run_beside(rows, None)
    }

    /// [`Self::run`], and a checkpoint of `due` as it was before the rows: while they are worked on, where the backend queues them, since a
    /// ring holds the windows before a micro-batch until the one after it.
    fn run_beside(&mut self, rows: &[Row], mut due: Option<SeqId>) -> Result<&[f32]> {
        let (routing, top_k) = (self.routing, self.top_k);
        if self.backend.records(rows.len()) {
            due.take().map_or(Ok(()), |seq| self.checkpoint(seq))?;
        }
        let begun = self.begin(rows).and_then(|grown| {
            let (config, backend) = (&self.model.config, &mut *self.backend);
            record(backend, config, &self.batch, &self.tables, routing, top_k).map(|()| grown)
        });
        // Also where the rows failed: whoever broke off may want to return to here.
        let saved = due.map_or(Ok(()), |seq| self.checkpoint(seq));
        let result = match &begun {
            Ok(_) => self.backend.finish(),
            Err(_) => Ok(&[][..]),
        };
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let grown = begun?;
        saved?;
        let logits = result?;
        grow(&mut self.sequences, &grown);
        Ok(logits)
    }

    /// The same, and draws a token for each output row; the logits do not come to the host where the backend can draw itself.
    ///
    /// # Errors
    /// As [`Self::run`], and [`Error::Sampler`] for logits from which no token can be taken.
    pub fn run_drawn(&mut self, rows: &[Row], draws: &[Draw]) -> Result<Vec<u32>> {
        let grown = self.begin(rows)?;
        assert_eq!(draws.len(), self.batch.outputs.len(), "a draw for each output row");
        let (routing, top_k) = (self.routing, self.top_k);
        let result =
            record(&mut *self.backend, &self.model.config, &self.batch, &self.tables, routing, top_k)
                .and_then(|()| self.backend.finish_drawn(draws));
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let tokens = result?;
        grow(&mut self.sequences, &grown);
        Ok(tokens)
    }

    /// Makes `rows` the batch in hand and room for them; returns the sequences with the lengths they will have.
    fn begin(&mut self, rows: &[Row]) -> Result<Vec<(SeqId, usize)>> {
        assert!(
            rows.len() <= self.spec.max_rows,
            "a micro-batch of {} rows, at most {}",
            rows.len(),
            self.spec.max_rows
        );
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        self.batch = Batch::default();
        let mut grown: Vec<(SeqId, usize)> = vec![];
        for row in rows {
            if row.token as usize >= self.model.config.vocab {
                return Err(Error::Input(format!(
                    "token {} is outside the vocabulary of {}",
                    row.token, self.model.config.vocab
                )));
            }
            let at = match grown.iter_mut().find(|(s, _)| *s == row.seq) {
                Some((_, len)) => len,
                None => {
                    grown.push((row.seq, self.len(row.seq)));
                    &mut grown.last_mut().expect("just pushed").1
                }
            };
            if row.output {
                self.batch.outputs.push(self.batch.tokens.len() as u32);
            }
            self.batch.tokens.push(row.token);
            self.batch.pos.push(*at as u32);
            self.batch.slot.push(row.seq.0);
            *at += 1;
        }
        for &(seq, len) in &grown {
            self.reserve(seq, len)?;
        }
        Ok(grown)
    }

    /// Positions selected for output row `output` of the last batch, ascending; empty when nothing was routed.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn selection(&mut self, output: usize) -> Result<Vec<u32>> {
        self.backend.selection(output)
    }

    /// Whether batches from now on keep the queries of their output rows for [`Self::queries`].
    ///
    /// # Errors
    /// [`Error::Input`] on a device that does not hand them out.
    pub fn keep_queries(&mut self, keep: bool) -> Result<()> {
        self.backend.keep_queries(keep)
    }

    /// What the output rows of the last batch asked of the shared memory.
    ///
    /// # Errors
    /// As [`Self::keep_queries`].
    pub fn queries(&mut self) -> Result<Queries> {
        self.backend.queries()
    }

    /// The shared keys of a sequence's positions from `from` on: K rows `[positions][n_kv * d]` and index keys `[positions][d_idx]` (empty
    /// without an indexer), as the caches hold them.
    ///
    /// # Errors
    /// [`Error::Input`] for a Transformer, which has no shared memory; what the backend reports.
    pub fn shared_keys(&mut self, seq: SeqId, from: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        if !self.model.config.is_yoco() {
            return Err(Error::Input("a Transformer has no shared memory: use a YOCO model".into()));
        }
        let (len, pages) = (self.len(seq), self.sequence(seq).pages.clone());
        let pools = pools(&self.model.config, &self.spec);
        let (mut keys, mut index, mut bytes) = (vec![], vec![], vec![]);
        for (i, page) in pages.into_iter().enumerate().skip(from / PAGE) {
            let rows = PAGE.min(len - i * PAGE);
            let first = from.saturating_sub(i * PAGE).min(rows);
            bytes.clear();
            self.backend.read_page(page, rows, &mut bytes)?;
            let mut at = 0;
            for pool in &pools {
                let row = pool.cache_type.row_bytes(pool.width);
                let to = match pool.kind {
                    PoolKind::K => Some(&mut keys),
                    PoolKind::Index => Some(&mut index),
                    PoolKind::V => None,
                };
                if let Some(to) = to {
                    let old: usize = to.len();
                    to.resize(old + (rows - first) * pool.width, 0.0);
                    quant::dequantize(
                        pool.cache_type.quant(),
                        &bytes[at + first * row..at + rows * row],
                        &mut to[old..],
                    );
                }
                at += rows * row;
            }
        }
        Ok((keys, index))
    }

    /// Cuts a sequence back to at most `len` positions and returns the length it has now: less than `len` when the windows have moved
    /// on and the nearest checkpoint is older, in which case the caller appends the tokens in between again.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn rewind(&mut self, seq: SeqId, len: usize) -> Result<usize> {
        let s = self.sequence(seq);
        if len >= s.len {
            return Ok(s.len);
        }
        let window_alive = self.model.config.window.is_none_or(|window| {
            let oldest = s.high.saturating_sub(ring_len(window, self.spec.max_rows)).max(s.low);
            (len + 1).saturating_sub(window) >= oldest
        });
        let mut restored = len;
        if !window_alive {
            let checkpoint = s.checkpoints.iter().rev().find(|c| c.len <= len);
            let (at, window) = checkpoint.map_or((0, Arc::from([])), |c| (c.len, c.window.clone()));
            if at > 0 {
                self.backend.load_window(seq.0, at, &window)?;
            }
            restored = at;
            let low = self.window_start(at);
            let s = self.sequence_mut(seq);
            (s.high, s.low) = (at, low);
        }
        let kept = restored.div_ceil(PAGE);
        let s = self.sequence_mut(seq);
        s.len = restored;
        s.checkpoints.retain(|c| c.len <= restored);
        let dropped = s.pages.split_off(kept.min(s.pages.len()));
        dropped.into_iter().for_each(|p| self.pool.release(p));
        Ok(restored)
    }

    /// Remembers the windows at the present length, so that [`Self::rewind`] can return exactly here.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn checkpoint(&mut self, seq: SeqId) -> Result<()> {
        let len = self.len(seq);
        if self.model.config.window.is_none()
            || self.sequence(seq).checkpoints.last().is_some_and(|c| c.len == len)
        {
            return Ok(());
        }
        let window: Arc<[u8]> = self.backend.save_window(seq.0, len)?.into();
        let budget = self.checkpoint_bytes;
        let s = self.sequence_mut(seq);
        s.checkpoints.push(Checkpoint { len, window });
        while s.checkpoints.len() > 1 && s.checkpoints.iter().map(|c| c.window.len()).sum::<usize>() > budget
        {
            // Older ones thin out: the least missed is the one with close neighbours far from the end.
            let missed = |i: usize| {
                let before = if i == 0 { 0 } else { s.checkpoints[i - 1].len };
                (s.checkpoints[i + 1].len - before) as f64 / (len - s.checkpoints[i].len) as f64
            };
            let least = (0..s.checkpoints.len() - 1).min_by(|&a, &b| missed(a).total_cmp(&missed(b)));
            s.checkpoints.remove(least.unwrap_or(0));
        }
        Ok(())
    }

    /// Lengths that [`Self::rewind`] can return to exactly, and the windows there, oldest first.
    pub fn checkpoints(&self, seq: SeqId) -> impl Iterator<Item = (usize, &[u8])> {
        self.sequence(seq).checkpoints.iter().map(|c| (c.len, &*c.window))
    }

    /// Adds a checkpoint from a session file, in increasing `len`, which is at most the sequence's.
    ///
    /// # Panics
    /// When `window` has not the size of [`Self::export_sizes`], or `len` is out of order.
    pub fn add_checkpoint(&mut self, seq: SeqId, len: usize, window: &[u8]) {
        assert_eq!(window.len(), self.export_sizes(len).1, "the windows at {len} positions");
        let s = self.sequence_mut(seq);
        let last = s.checkpoints.last().map(|c| c.len);
        assert!(len <= s.len && last.is_none_or(|last| last < len), "a checkpoint at {len} after {last:?}");
        s.checkpoints.push(Checkpoint { len, window: window.into() });
    }

    /// Writes what a sequence holds, for a session file: its pages row by row and its windows.
    ///
    /// # Errors
    /// What the backend reports, and errors of `out`.
    pub fn export(&mut self, seq: SeqId, mut out: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (len, pages) = (self.len(seq), self.sequence(seq).pages.clone());
        let mut bytes = vec![];
        for (i, page) in pages.into_iter().enumerate() {
            bytes.clear();
            self.backend.read_page(page, PAGE.min(len - i * PAGE), &mut bytes)?;
            out(&bytes)?;
        }
        out(&self.backend.save_window(seq.0, len)?)
    }

    /// The reverse of [`Self::export`] into an empty sequence: `bytes` is everything it wrote for `len` positions.
    ///
    /// # Errors
    /// [`Error::Input`] when the size does not fit, [`Error::ContextFull`], [`Error::Memory`]; the sequence is then still empty.
    pub fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<()> {
        assert!(self.is_empty(seq), "a session is imported into an empty sequence");
        let (page_row, window) = self.export_sizes(len);
        if bytes.len() != len * page_row + window {
            return Err(Error::Input(format!(
                "the session holds {} bytes of cache, expected {} for {len} positions",
                bytes.len(),
                len * page_row + window
            )));
        }
        self.check_room(seq, len)?;
        self.reserve(seq, len)?;
        let (rows, window) = bytes.split_at(len * page_row);
        let pages = self.sequence(seq).pages.clone();
        for (i, page) in pages.into_iter().enumerate() {
            let n = PAGE.min(len - i * PAGE);
            self.backend.write_page(page, n, &rows[i * PAGE * page_row..][..n * page_row])?;
        }
        self.backend.load_window(seq.0, len, window)?;
        let low = self.window_start(len);
        let s = self.sequence_mut(seq);
        (s.len, s.high, s.low) = (len, len, low);
        Ok(())
    }

    /// Makes an empty sequence hold `len` positions of random cache rows (uniform in -1..1, by `seed`), without running the model: for
    /// timing at depth.
    ///
    /// # Errors
    /// As [`Self::import`].
    pub fn fill_random(&mut self, seq: SeqId, len: usize, seed: u64) -> Result<()> {
        assert!(self.is_empty(seq), "only an empty sequence is filled");
        self.check_room(seq, len)?;
        self.reserve(seq, len)?;
        let mut random = RandomRows::new(seed);
        let mut bytes = vec![];
        let pools = pools(&self.model.config, &self.spec);
        for (i, page) in self.sequence(seq).pages.clone().into_iter().enumerate() {
            let rows = PAGE.min(len - i * PAGE);
            bytes.clear();
            pools.iter().for_each(|p| random.push(p.cache_type, rows * p.width, &mut bytes));
            self.backend.write_page(page, rows, &bytes)?;
        }
        bytes.clear();
        if let Some(window) = self.model.config.window {
            let values = len.min(window - 1) * self.model.config.self_heads.kv_width();
            for _ in 0..self.model.config.n_self {
                random.push(self.spec.k, values, &mut bytes);
                random.push(self.spec.v, values, &mut bytes);
            }
        }
        self.backend.load_window(seq.0, len, &bytes)?;
        let low = self.window_start(len);
        let s = self.sequence_mut(seq);
        (s.len, s.high, s.low) = (len, len, low);
        self.checkpoint(seq)
    }

    /// Bytes of [`Self::export`] for each position, and of the windows at `len`.
    #[must_use]
    pub fn export_sizes(&self, len: usize) -> (usize, usize) {
        let c = &self.model.config;
        let row = pools(c, &self.spec).iter().map(|p| p.cache_type.row_bytes(p.width)).sum();
        let window = c.window.map_or(0, |w| {
            let width = c.self_heads.kv_width();
            c.n_self * len.min(w - 1) * (self.spec.k.row_bytes(width) + self.spec.v.row_bytes(width))
        });
        (row, window)
    }

    /// The oldest position whose window rows a sequence of `len` positions needs.
    fn window_start(&self, len: usize) -> usize {
        self.model.config.window.map_or(0, |window| (len + 1).saturating_sub(window))
    }

    fn check_room(&self, seq: SeqId, more: usize) -> Result<()> {
        let needed = self.len(seq) + more;
        if needed > self.context {
            return Err(Error::ContextFull { needed, context: self.context });
        }
        Ok(())
    }

    /// Makes room for positions up to `len`; a partly filled page that others hold too is copied first.
    fn reserve(&mut self, seq: SeqId, len: usize) -> Result<()> {
        if len > self.context {
            return Err(Error::ContextFull { needed: len, context: self.context });
        }
        let (old, held) = (self.sequence(seq).len, self.sequence(seq).pages.len());
        if !old.is_multiple_of(PAGE) && len > old {
            let last = self.sequence(seq).pages[old / PAGE];
            if self.pool.is_shared(last) {
                let own = self.take_page()?;
                self.backend.copy_page(last, own)?;
                self.pool.release(last);
                self.sequence_mut(seq).pages[old / PAGE] = own;
                self.write_table(seq);
            }
        }
        for _ in held..len.div_ceil(PAGE) {
            let page = self.take_page()?;
            self.sequence_mut(seq).pages.push(page);
        }
        if self.sequence(seq).pages.len() != held {
            self.write_table(seq);
        }
        Ok(())
    }

    fn take_page(&mut self) -> Result<u32> {
        self.pool.take().ok_or_else(|| Error::Memory {
            what: format!("one more page of {PAGE} positions"),
            needed: (PAGE * self.export_sizes(0).0) as u64,
            free: 0,
            remedy: "lower -np or -c, or end a sequence".into(),
        })
    }

    fn write_table(&mut self, seq: SeqId) {
        let start = seq.0 as usize * self.tables.stride;
        let pages = &self.sequences[seq.0 as usize].as_ref().expect("a live sequence").pages;
        self.tables.entries[start..start + pages.len()].copy_from_slice(pages);
    }

    fn sequence(&self, seq: SeqId) -> &Sequence {
        self.sequences[seq.0 as usize].as_ref().expect("a live sequence")
    }

    fn sequence_mut(&mut self, seq: SeqId) -> &mut Sequence {
        self.sequences[seq.0 as usize].as_mut().expect("a live sequence")
    }
}

/// Sequences whose rows have been appended.
fn grow(sequences: &mut [Option<Sequence>], grown: &[(SeqId, usize)]) {
    for &(seq, len) in grown {
        if let Some(s) = &mut sequences[seq.0 as usize] {
            s.len = len;
            s.high = s.high.max(len);
        }
    }
}

/// Whether a model can choose positions so.
fn check_routing(c: &Config, routing: Routing, top_k: usize) -> Result<()> {
    if c.indexer.is_none() && routing != Routing::Dense {
        return Err(Error::Input(format!(
            "routing '{routing}' needs an indexer, which this model has not: use --routing dense"
        )));
    }
    if routing != Routing::Dense && top_k == 0 {
        return Err(Error::Input("top-k routing needs at least one position: raise --top-k-tokens".into()));
    }
    Ok(())
}

/// Positions between the checkpoints that prefill takes by itself.
const CHECKPOINT_EVERY: usize = 8192;

/// Rows that append `tokens` to one sequence.
fn rows_of(seq: SeqId, tokens: &[u32], last_output: bool) -> Vec<Row> {
    let last = tokens.len().wrapping_sub(1);
    (tokens.iter().enumerate())
        .map(|(i, &token)| Row { seq, token, output: last_output && i == last })
        .collect()
}

//! The oracle: plain f32, one row after another, written from the equations of model.md alone. Never optimised.
use std::ops::Range;
use std::sync::Arc;

use ggml_kernels::quant;

use super::probe::Probe;
use super::{Backend, Batch, Memory, Part, Queries, Record, Routing};
use crate::cache::{CacheSpec, CacheType, PAGE, PageTables, Pool, pools_of};
use crate::config::{Heads, Rope};
use crate::error::{Error, Result};
use crate::model::{Model, Weight};

/// Rows of one slot by position.
type Rows = Vec<Vec<f32>>;

/// Evaluates the model in f32, whatever the weights are stored as.
pub struct Reference {
    model: Model,
    layers: Range<usize>,
    /// What each of `pools` holds.
    shapes: Vec<Pool>,
    /// `[pool][page * PAGE + position in page][width]`
    pools: Vec<Vec<f32>>,
    /// `[self layer][slot]` of K and V by position, YOCO only.
    windows: Vec<Vec<(Rows, Rows)>>,
    batch: Batch,
    tables: PageTables,
    routing: Routing,
    top_k: usize,
    /// Rows of `batch` that `x` still holds.
    rows: Vec<usize>,
    x: Vec<Vec<f32>>,
    /// qidx of every row, from `append_shared`.
    index_queries: Vec<Vec<f32>>,
    selections: Vec<Vec<u32>>,
    /// Queries of every cross layer so far, when they are asked for.
    queries: Option<Vec<Vec<f32>>>,
    logits: Vec<f32>,
    probe: Option<Arc<Probe>>,
    handed: Vec<f32>,
}

impl Reference {
    /// Caches are f32 here; any other type in `spec` is refused, because the oracle does not round.
    pub fn new(model: Model, spec: CacheSpec) -> Result<Self> {
        let layers = 0..model.config.n_layer;
        Self::part(model, spec, layers)
    }

    /// Some layers only.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn part(model: Model, spec: CacheSpec, layers: Range<usize>) -> Result<Self> {
        if [spec.k, spec.v, spec.index].iter().any(|t| *t != CacheType::F32) {
            return Err(Error::Input("the reference backend keeps f32 caches: use -ctk f32 -ctv f32".into()));
        }
        let c = &model.config;
        let shapes = pools_of(c, &spec, &layers);
        let pools = shapes.iter().map(|p| vec![0.0; spec.n_pages * PAGE * p.width]).collect();
        let own = (layers.start..layers.end.min(c.n_self)).len();
        let windows = if c.is_yoco() { vec![vec![(vec![], vec![]); spec.n_slots]; own] } else { vec![] };
        Ok(Self {
            layers,
            shapes,
            pools,
            windows,
            batch: Batch::default(),
            tables: PageTables { stride: 0, entries: vec![] },
            routing: Routing::Dense,
            top_k: 0,
            rows: vec![],
            x: vec![],
            index_queries: vec![],
            selections: vec![],
            queries: None,
            logits: vec![],
            probe: None,
            handed: vec![],
            model,
        })
    }

    /// From now on `probe` sees what enters each product.
    pub fn set_probe(&mut self, probe: Arc<Probe>) {
        self.probe = Some(probe);
    }

    /// The residual stream after the last verb: every row of the batch, or, after `keep_outputs`, its output rows.
    #[must_use]
    pub fn hidden(&self) -> &[Vec<f32>] {
        &self.x
    }

    /// `W x` of every row.
    fn linear(&self, w: &Weight, x: &[Vec<f32>]) -> Vec<Vec<f32>> {
        if let Some(input) = self.probe.as_ref().map(|p| p.input(&[w])) {
            x.iter().for_each(|row| input.add(row, None, 0, 1));
        }
        let bytes = self.model.bytes(w);
        let row_bytes = w.bytes / w.n_out;
        let mut out = vec![vec![0.0; w.n_out]; x.len()];
        let mut row = vec![0.0; w.n_in];
        for o in 0..w.n_out {
            quant::dequantize(w.ty, &bytes[o * row_bytes..][..row_bytes], &mut row);
            for (y, x) in out.iter_mut().zip(x) {
                y[o] = dot(&row, x);
            }
        }
        out
    }

    fn normed(&self, w: &Weight) -> Vec<Vec<f32>> {
        let w = self.model.values(w);
        self.x.iter().map(|x| rms_norm(x, &w, self.model.config.rms_eps)).collect()
    }

    fn add(&mut self, y: &[Vec<f32>]) {
        for (x, y) in self.x.iter_mut().zip(y) {
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        }
    }

    /// Turns every head of row `r` by its position.
    fn rope(&self, heads: &mut [f32], head_dim: usize, rope: &Rope, factors: Option<&Weight>, r: usize) {
        let factors = factors.map(|w| self.model.values(w));
        let half = rope.n_rot / 2;
        for head in heads.chunks_mut(head_dim) {
            for j in 0..half {
                let frequency = f64::from(rope.base).powf(-2.0 * j as f64 / rope.n_rot as f64)
                    / f64::from(factors.as_ref().map_or(1.0, |f| f[j]))
                    / f64::from(rope.linear_scale);
                let (sin, cos) = (f64::from(self.batch.pos[r]) * frequency).sin_cos();
                let (a, b) = if rope.interleaved { (2 * j, 2 * j + 1) } else { (j, j + half) };
                let (x, y) = (f64::from(head[a]), f64::from(head[b]));
                head[a] = (x * cos - y * sin) as f32;
                head[b] = (x * sin + y * cos) as f32;
            }
        }
    }

    /// Where position `pos` of row `r`'s sequence lies in a pool of this width.
    fn at(&self, r: usize, pos: usize, width: usize) -> std::ops::Range<usize> {
        let slot = self.batch.slot[r] as usize;
        let page = self.tables.entries[slot * self.tables.stride + pos / PAGE] as usize;
        let start = (page * PAGE + pos % PAGE) * width;
        start..start + width
    }

    fn store(&mut self, pool: usize, r: usize, row: &[f32]) {
        let at = self.at(r, self.batch.pos[r] as usize, row.len());
        self.pools[pool][at].copy_from_slice(row);
    }

    fn pool_row(&self, pool: usize, r: usize, pos: usize, width: usize) -> &[f32] {
        &self.pools[pool][self.at(r, pos, width)]
    }

    fn window_of(&self, layer: usize, r: usize) -> &(Rows, Rows) {
        &self.windows[layer - self.layers.start][self.batch.slot[r] as usize]
    }
}

impl Backend for Reference {
    fn describe(&self) -> String {
        "reference (scalar f32)".into()
    }

    fn memory(&self) -> Memory {
        let cache = self.pools.iter().map(|p| p.len() as u64 * 4).sum();
        let weights = self.model.weights.of(self.layers.clone()).map(|w| w.bytes as u64).sum();
        Memory { weights, cache, ..Memory::default() }
    }

    fn begin(
        &mut self,
        batch: &Batch,
        tables: &PageTables,
        routing: Routing,
        top_k: usize,
    ) -> Result<Record> {
        self.batch = batch.clone();
        self.tables = tables.clone();
        self.routing = routing;
        self.top_k = top_k;
        self.rows = (0..batch.tokens.len()).collect();
        self.selections.clear();
        self.logits.clear();
        if let Some(queries) = &mut self.queries {
            queries.clear();
        }
        Ok(Record::Needed)
    }

    fn embed(&mut self) -> Result<()> {
        let w = self.model.weights.token_embd.clone();
        let row_bytes = w.bytes / w.n_out;
        let scale = self.model.config.embed_scale;
        self.x.clear();
        for &token in &self.batch.tokens {
            let mut x = vec![0.0; w.n_in];
            quant::dequantize(w.ty, &self.model.bytes(&w)[token as usize * row_bytes..][..row_bytes], &mut x);
            x.iter_mut().for_each(|v| *v *= scale);
            self.x.push(x);
        }
        Ok(())
    }

    fn self_attention(&mut self, i: usize) -> Result<()> {
        let (c, weights) = (self.model.config.clone(), self.model.weights.clone());
        let layer = &weights.layers[i];
        let heads = c.self_heads;
        // A Transformer's own pools of this layer.
        let own = 2 * (i - self.layers.start);
        let a = self.normed(&layer.attn_norm);
        let (wk, wv) = layer.kv.as_ref().expect("the loader gives self layers k and v");
        let (mut q, mut k, v) = (self.linear(&layer.q, &a), self.linear(wk, &a), self.linear(wv, &a));
        for r in 0..self.rows.len() {
            if let Some((q_norm, k_norm)) = &layer.qk_norm {
                norm_heads(&mut q[r], &self.model.values(q_norm), c.rms_eps);
                norm_heads(&mut k[r], &self.model.values(k_norm), c.rms_eps);
            }
            self.rope(&mut q[r], heads.head_dim, &c.rope, weights.rope_freqs.as_ref(), r);
            self.rope(&mut k[r], heads.head_dim, &c.rope, weights.rope_freqs.as_ref(), r);
            if c.is_yoco() {
                let (slot, pos) = (self.batch.slot[r] as usize, self.batch.pos[r] as usize);
                let (ks, vs) = &mut self.windows[i - self.layers.start][slot];
                ks.resize(ks.len().max(pos + 1), vec![]);
                vs.resize(vs.len().max(pos + 1), vec![]);
                (ks[pos], vs[pos]) = (k[r].clone(), v[r].clone());
            } else {
                self.store(own, r, &k[r]);
                self.store(own + 1, r, &v[r]);
            }
        }
        let o: Vec<_> = (0..self.rows.len())
            .map(|r| {
                let t = self.batch.pos[r] as usize;
                let first = c.window.map_or(0, |w| (t + 1).saturating_sub(w));
                let key = |s: usize| {
                    if c.is_yoco() {
                        self.window_of(i, r).0[s].as_slice()
                    } else {
                        self.pool_row(own, r, s, heads.kv_width())
                    }
                };
                let value = |s: usize| {
                    if c.is_yoco() {
                        self.window_of(i, r).1[s].as_slice()
                    } else {
                        self.pool_row(own + 1, r, s, heads.kv_width())
                    }
                };
                attend(&q[r], heads, first..=t, key, value)
            })
            .collect();
        let y = self.linear(&layer.o, &o);
        self.add(&y);
        Ok(())
    }

    fn feed_forward(&mut self, i: usize) -> Result<()> {
        let weights = self.model.weights.clone();
        let ffn = &weights.layers[i].ffn;
        let b = self.normed(&ffn.norm);
        let (mut gate, up) = (self.linear(&ffn.gate, &b), self.linear(&ffn.up, &b));
        for (g, u) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
            *g = *g / (1.0 + (-*g).exp()) * u;
        }
        let y = self.linear(&ffn.down, &gate);
        self.add(&y);
        Ok(())
    }

    fn append_shared(&mut self) -> Result<()> {
        let (c, weights) = (self.model.config.clone(), self.model.weights.clone());
        let shared = weights.shared.as_ref().expect("the loader gives a YOCO model its shared memory");
        let h = self.normed(&shared.norm);
        let (mut k, v) = (self.linear(&shared.k, &h), self.linear(&shared.v, &h));
        for r in 0..self.rows.len() {
            if let Some(rope) = &c.cross_rope {
                self.rope(&mut k[r], c.cross_heads.head_dim, rope, shared.rope_freqs.as_ref(), r);
            }
            self.store(0, r, &k[r]);
            self.store(1, r, &v[r]);
        }
        if let Some((wq, wk)) = &shared.indexer {
            for (r, key) in self.linear(wk, &h).iter().enumerate() {
                self.store(2, r, key);
            }
            self.index_queries = self.linear(wq, &h);
        }
        Ok(())
    }

    fn keep_outputs(&mut self) -> Result<()> {
        self.rows = self.batch.outputs.iter().map(|&r| r as usize).collect();
        self.x = self.rows.iter().map(|&r| self.x[r].clone()).collect();
        Ok(())
    }

    fn route(&mut self) -> Result<()> {
        let width =
            self.model.config.indexer.expect("the engine routes only where there is an indexer").head_dim;
        self.selections = self
            .rows
            .iter()
            .map(|&r| {
                let t = self.batch.pos[r] as usize;
                let q = &self.index_queries[r];
                let scores: Vec<f32> = (0..=t).map(|s| dot(q, self.pool_row(2, r, s, width))).collect();
                select(&scores, self.top_k, self.routing)
            })
            .collect();
        Ok(())
    }

    fn cross_attention(&mut self, j: usize) -> Result<()> {
        let (c, weights) = (self.model.config.clone(), self.model.weights.clone());
        let (layer, heads) = (&weights.layers[j], c.cross_heads);
        let a = self.normed(&layer.attn_norm);
        let mut q = self.linear(&layer.q, &a);
        let factors = weights.shared.as_ref().and_then(|s| s.rope_freqs.as_ref());
        let o: Vec<_> = (self.rows.iter().enumerate())
            .map(|(n, &r)| {
                if let Some(rope) = &c.cross_rope {
                    self.rope(&mut q[n], heads.head_dim, rope, factors, r);
                }
                let key = |s: usize| self.pool_row(0, r, s, heads.kv_width());
                let value = |s: usize| self.pool_row(1, r, s, heads.kv_width());
                match self.selections.get(n) {
                    Some(set) => attend(&q[n], heads, set.iter().map(|&s| s as usize), key, value),
                    None => attend(&q[n], heads, 0..=self.batch.pos[r] as usize, key, value),
                }
            })
            .collect();
        if let Some(queries) = &mut self.queries {
            queries.push(q.concat());
        }
        let y = self.linear(&layer.o, &o);
        self.add(&y);
        Ok(())
    }

    fn logits(&mut self) -> Result<()> {
        let weights = self.model.weights.clone();
        let h = self.normed(&weights.output_norm);
        self.logits = self.linear(&weights.output, &h).concat();
        Ok(())
    }

    fn finish(&mut self) -> Result<&[f32]> {
        Ok(&self.logits)
    }

    fn selection(&mut self, output: usize) -> Result<Vec<u32>> {
        Ok(self.selections.get(output).cloned().unwrap_or_default())
    }

    fn keep_queries(&mut self, keep: bool) -> Result<()> {
        self.queries = keep.then(Vec::new);
        Ok(())
    }

    fn queries(&mut self) -> Result<Queries> {
        let Some(layers) = self.queries.clone().filter(|layers| !layers.is_empty()) else {
            return Ok(Queries::default());
        };
        // The indexer lies with the first cross layer.
        let indexer = self.model.config.indexer.is_some() && self.layers.contains(&self.model.config.n_self);
        let indexed = self.rows.iter().filter(|_| indexer);
        let index = indexed.flat_map(|&r| self.index_queries[r].clone()).collect();
        Ok(Queries { layers, index })
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        for (pool, shape) in self.pools.iter_mut().zip(&self.shapes) {
            let page = PAGE * shape.width;
            pool.copy_within(from as usize * page..(from as usize + 1) * page, to as usize * page);
        }
        Ok(())
    }

    fn read_page(&mut self, page: u32, rows: usize, out: &mut Vec<u8>) -> Result<()> {
        for (pool, shape) in self.pools.iter().zip(&self.shapes) {
            let start = page as usize * PAGE * shape.width;
            push_floats(out, &pool[start..start + rows * shape.width]);
        }
        Ok(())
    }

    fn write_page(&mut self, page: u32, rows: usize, bytes: &[u8]) -> Result<()> {
        let mut values = floats(bytes);
        for (pool, shape) in self.pools.iter_mut().zip(&self.shapes) {
            let start = page as usize * PAGE * shape.width;
            pool[start..start + rows * shape.width].iter_mut().zip(&mut values).for_each(|(to, v)| *to = v);
        }
        Ok(())
    }

    fn save_window(&mut self, slot: u32, len: usize) -> Result<Vec<u8>> {
        let mut out = vec![];
        for layer in &self.windows {
            let (k, v) = &layer[slot as usize];
            for rows in [k, v] {
                for row in &rows[window_start(self.model.config.window, len)..len] {
                    push_floats(&mut out, row);
                }
            }
        }
        Ok(out)
    }

    fn load_window(&mut self, slot: u32, len: usize, bytes: &[u8]) -> Result<()> {
        let width = self.model.config.self_heads.kv_width();
        let first = window_start(self.model.config.window, len);
        let mut values = floats(bytes);
        for layer in &mut self.windows {
            let (k, v) = &mut layer[slot as usize];
            for rows in [k, v] {
                rows.clear();
                rows.resize(first, vec![]);
                rows.extend((first..len).map(|_| values.by_ref().take(width).collect::<Vec<_>>()));
            }
        }
        Ok(())
    }
}

impl Part for Reference {
    fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    fn receive(&mut self, x: &[f32], kept: bool) -> Result<()> {
        if kept {
            self.rows = self.batch.outputs.iter().map(|&r| r as usize).collect();
        }
        self.x = x.chunks(self.model.config.hidden).map(<[f32]>::to_vec).collect();
        Ok(())
    }

    fn receive_selection(&mut self, selected: &[Vec<u32>]) -> Result<()> {
        self.selections = selected.to_vec();
        Ok(())
    }

    fn hand_over(&mut self) -> Result<&[f32]> {
        self.handed = self.x.concat();
        Ok(&self.handed)
    }

    fn read_rows(&mut self, batch: &Batch, tables: &PageTables, out: &mut Vec<u8>) -> Result<()> {
        (self.batch, self.tables) = (batch.clone(), tables.clone());
        for pool in 0..2 {
            for (r, &pos) in batch.pos.iter().enumerate() {
                push_floats(out, self.pool_row(pool, r, pos as usize, self.shapes[pool].width));
            }
        }
        Ok(())
    }

    fn write_rows(&mut self, batch: &Batch, tables: &PageTables, bytes: &[u8]) -> Result<()> {
        (self.batch, self.tables) = (batch.clone(), tables.clone());
        let mut values = floats(bytes);
        for pool in 0..2 {
            for r in 0..batch.pos.len() {
                let row: Vec<f32> = values.by_ref().take(self.shapes[pool].width).collect();
                self.store(pool, r, &row);
            }
        }
        Ok(())
    }
}

fn window_start(window: Option<usize>, len: usize) -> usize {
    window.map_or(0, |w| (len + 1).saturating_sub(w))
}

fn push_floats(out: &mut Vec<u8>, values: &[f32]) {
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight partial sums in f32: near the order of SIMD kernels, and fast enough for tests.
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `w * x / sqrt(mean(x^2) + eps)`
fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(w).map(|(x, w)| (f64::from(*x) * scale) as f32 * w).collect()
}

fn norm_heads(heads: &mut [f32], w: &[f32], eps: f32) {
    for head in heads.chunks_mut(w.len()) {
        let normed = rms_norm(head, w, eps);
        head.copy_from_slice(&normed);
    }
}

/// `o[h] = softmax_s( q[h] . k_s[g(h)] / sqrt(d) ) v_s[g(h)]` over the positions given.
fn attend<'a>(
    q: &[f32],
    heads: Heads,
    positions: impl Iterator<Item = usize> + Clone,
    key: impl Fn(usize) -> &'a [f32],
    value: impl Fn(usize) -> &'a [f32],
) -> Vec<f32> {
    let d = heads.head_dim;
    let mut out = vec![0.0; q.len()];
    for h in 0..heads.n_head {
        let g = h / (heads.n_head / heads.n_kv);
        let q = &q[h * d..(h + 1) * d];
        let scores: Vec<f32> =
            positions.clone().map(|s| dot(q, &key(s)[g * d..(g + 1) * d]) / (d as f32).sqrt()).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = scores.iter().map(|s| f64::from((s - max).exp())).sum();
        for (s, score) in positions.clone().zip(&scores) {
            let p = (f64::from((score - max).exp()) / sum) as f32;
            out[h * d..(h + 1) * d]
                .iter_mut()
                .zip(&value(s)[g * d..(g + 1) * d])
                .for_each(|(o, v)| *o += p * v);
        }
    }
    out
}

/// The k positions with the largest scores, equal scores by lower position; in block mode whole blocks by mean score.
fn select(scores: &[f32], k: usize, routing: Routing) -> Vec<u32> {
    let order = |scores: &[f32], k: usize| {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        // A NaN counts as -inf, -0 equals +0; the sort is stable, so that the lower position stays first.
        let value = |i: usize| if scores[i].is_nan() { f32::NEG_INFINITY } else { scores[i] + 0.0 };
        order.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
        order.truncate(k);
        order.sort_unstable();
        order
    };
    let positions: Vec<usize> = match routing {
        Routing::Block(block) if scores.len() > k => {
            let means: Vec<f32> =
                scores.chunks(block).map(|c| c.iter().sum::<f32>() / c.len() as f32).collect();
            let blocks = order(&means, (k / block).max(1));
            blocks.iter().flat_map(|b| b * block..((b + 1) * block).min(scores.len())).collect()
        }
        _ => order(scores, k),
    };
    positions.iter().map(|&s| s as u32).collect()
}

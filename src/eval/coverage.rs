//! How much of the dense attention the selected positions hold (arXiv 2606.06467, table 4).
//!
//! For chosen rows of a text, every cross layer's attention over all positions is computed from the queries and keys that the engine
//! used; then the positions that routing selects are held against it, for many k at once.
use std::ops::ControlFlow;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Mean;
use crate::backend::{Queries, Routing};
use crate::config::Config;
use crate::engine::{Engine, Row};
use crate::error::{Error, Result};

/// Parts of a window that depth is told by.
pub const DEPTHS: usize = 8;

/// What is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Selections to measure: `clsa`, `dense` or `block-B`. Other modes select as `clsa` does, only more often.
    pub modes: Vec<Routing>,
    /// Numbers of positions that are selected, increasing.
    pub ks: Vec<usize>,
    /// The index in `ks` for which layers are compared.
    pub main: usize,
    /// Positions of a window.
    pub len: usize,
    /// Rows measured in a window, evenly spread over it.
    pub rows: usize,
}

impl Plan {
    /// Checks the plan.
    ///
    /// # Errors
    /// [`Error::Input`] for a mode that has no selection of its own, a k of 0 or none at all, or more rows than positions.
    pub fn check(&self) -> Result<()> {
        if let Some(mode) = self.modes.iter().find(|m| matches!(m, Routing::Every(_))) {
            return Err(Error::Input(format!(
                "routing {mode} selects the same positions as clsa, only more often: measure clsa, dense or block-B"
            )));
        }
        if self.ks.first().is_none_or(|k| *k == 0) || !self.ks.is_sorted_by(|a, b| a < b) {
            return Err(Error::Input(format!("--k {:?}: give increasing numbers from 1 on", self.ks)));
        }
        if self.rows == 0 || 2 * self.rows > self.len {
            return Err(Error::Input(format!(
                "--rows {}: a window of {} tokens has room for 1 to {}",
                self.rows,
                self.len,
                self.len / 2
            )));
        }
        Ok(())
    }

    /// The measured positions, increasing; each has a neighbour before it that is not one of them.
    #[must_use]
    pub fn positions(&self) -> Vec<usize> {
        (1..=self.rows).map(|i| i * self.len / self.rows - 1).collect()
    }
}

/// What one selection rule holds, by k.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OfMode {
    /// Share of the attention mass, mean of all layers and heads: of every row.
    pub all: Vec<Mean>,
    /// The same, of rows with more than k positions before their end.
    pub beyond: Vec<Mean>,
    /// `[k][depth]`, of every row.
    pub by_depth: Vec<Vec<Mean>>,
    /// `[k][layer][head]`, of every row.
    pub by_head: Vec<Vec<Vec<Mean>>>,
    /// `[k][layer]` share of the layer's own top-k that is selected; rows with more than k positions.
    pub recall: Vec<Vec<Mean>>,
    /// `[k]` share of the previous token's selection that is selected again; rows with more than k positions.
    pub neighbours: Vec<Mean>,
}

/// The whole measurement. Values of several windows are merged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    /// In the order of [`Plan::modes`].
    pub modes: Vec<OfMode>,
    /// `[k]` mass of the k positions that hold most of all layers and heads together: no shared selection holds more.
    pub best_shared: Vec<Mean>,
    /// `[k]` mass of each layer's own top-k, mean of the layers.
    pub best_own: Vec<Mean>,
    /// `[layer][layer]` share of one layer's own top-k that is in the other's, at the main k; rows with more positions than that.
    pub layers: Vec<Vec<Mean>>,
}

impl Coverage {
    /// Nothing measured yet.
    #[must_use]
    pub fn new(plan: &Plan, n_layer: usize, n_head: usize) -> Self {
        let (m, k) = (Mean::default(), plan.ks.len());
        let mode = OfMode {
            all: vec![m; k],
            beyond: vec![m; k],
            by_depth: vec![vec![m; DEPTHS]; k],
            by_head: vec![vec![vec![m; n_head]; n_layer]; k],
            recall: vec![vec![m; n_layer]; k],
            neighbours: vec![m; k],
        };
        Self {
            modes: vec![mode; plan.modes.len()],
            best_shared: vec![m; k],
            best_own: vec![m; k],
            layers: vec![vec![m; n_layer]; n_layer],
        }
    }

    /// Takes the values of another measurement by the same plan.
    ///
    /// # Errors
    /// [`Error::Input`] when its shape is another, which is a damaged state file.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        let (mine, theirs) = (self.cells_mut(), other.clone());
        let mut theirs = theirs;
        let theirs = theirs.cells_mut();
        if mine.len() != theirs.len() {
            return Err(Error::Input("the state file holds a measurement of another shape".into()));
        }
        mine.into_iter().zip(theirs).for_each(|(a, b)| a.merge(b));
        Ok(())
    }

    fn cells_mut(&mut self) -> Vec<&mut Mean> {
        let mut cells: Vec<&mut Mean> = vec![];
        for m in &mut self.modes {
            cells.extend(m.all.iter_mut().chain(&mut m.beyond).chain(&mut m.neighbours));
            cells.extend(m.by_depth.iter_mut().chain(&mut m.recall).flatten());
            cells.extend(m.by_head.iter_mut().flatten().flatten());
        }
        cells.extend(self.best_shared.iter_mut().chain(&mut self.best_own));
        cells.extend(self.layers.iter_mut().flatten());
        cells
    }
}

/// Measures one window from an empty sequence; `progress` hears the number of positions that are done.
///
/// # Errors
/// As [`Engine::run`]; [`Error::Input`] for a model without an indexer or a device that does not hand out queries.
pub fn measure(
    engine: &mut Engine,
    window: &[u32],
    plan: &Plan,
    progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Coverage> {
    if engine.model().config.indexer.is_none() {
        return Err(Error::Input("coverage needs a model with an indexer, which this one has not".into()));
    }
    engine.keep_queries(true)?;
    let seq = engine.create()?;
    let result = run(engine, seq, window, plan, progress);
    engine.free(seq);
    engine.keep_queries(false)?;
    result
}

fn run(
    engine: &mut Engine,
    seq: crate::engine::SeqId,
    window: &[u32],
    plan: &Plan,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Coverage> {
    let config = engine.model().config.clone();
    let chosen = plan.positions();
    let wanted = |p: usize| chosen.binary_search(&p).is_ok() || chosen.binary_search(&(p + 1)).is_ok();
    let n_layer = config.n_layer - config.n_self;
    let mut all = Coverage::new(plan, n_layer, config.cross_heads.n_head);
    let mut past = Past { config, keys: vec![], index: vec![] };
    let mut before: Option<(usize, Vec<Ranking>)> = None;
    let (most_rows, most_outputs) = (engine.spec().max_rows, engine.spec().max_outputs);
    let mut at = 0;
    while at < window.len() {
        let mut rows: Vec<Row> = vec![];
        let mut outputs = vec![];
        for (p, &token) in window.iter().enumerate().skip(at).take(most_rows) {
            if wanted(p) && outputs.len() == most_outputs {
                break;
            }
            outputs.extend(wanted(p).then_some(p));
            rows.push(Row { seq, token, output: wanted(p) });
        }
        engine.run(&rows)?;
        let (keys, index) = engine.shared_keys(seq, at)?;
        past.keys.extend(keys);
        past.index.extend(index);
        let queries = if outputs.is_empty() { Queries::default() } else { engine.queries()? };
        for (n, &p) in outputs.iter().enumerate() {
            let rankings = past.rankings(&queries, n, p, &plan.modes);
            if chosen.binary_search(&p).is_ok() {
                let previous = before.as_ref().filter(|(at, _)| at + 1 == p).map(|(_, r)| r.as_slice());
                past.add(&queries, n, p, &rankings, previous, plan, &mut all);
            }
            before = Some((p, rankings));
        }
        at += rows.len();
        if progress(at).is_break() {
            return Err(Error::Interrupted);
        }
    }
    Ok(all)
}

/// Positions in the order in which a rule selects them.
struct Ranking {
    order: Vec<u32>,
    /// `ends[i]`: positions after i + 1 blocks; empty where positions are selected one by one.
    ends: Vec<usize>,
    block: usize,
    dense: bool,
}

impl Ranking {
    /// By index scores of all positions; larger first, equal ones by lower position (model.md section 1).
    fn new(scores: &[f32], mode: Routing) -> Self {
        let (mut order, mut ends, mut block) = (by_score(scores), vec![], 1);
        if let Routing::Block(width) = mode {
            let means: Vec<f32> =
                scores.chunks(width).map(|c| c.iter().sum::<f32>() / c.len() as f32).collect();
            block = width;
            order.clear();
            for b in by_score(&means) {
                let start = b as usize * width;
                order.extend((start..(start + width).min(scores.len())).map(|s| s as u32));
                ends.push(order.len());
            }
        }
        Self { order, ends, block, dense: mode == Routing::Dense }
    }

    /// How many positions of the order a selection of k takes.
    fn taken(&self, k: usize) -> usize {
        let n = self.order.len();
        if self.dense || k >= n {
            return n;
        }
        match self.ends.get((k / self.block).max(1) - 1) {
            Some(end) => *end,
            None => k,
        }
    }
}

/// Indices, largest value first and equal ones by index; a NaN counts as the least.
fn by_score(scores: &[f32]) -> Vec<u32> {
    let value = |i: u32| {
        let s = scores[i as usize];
        // -0 equals +0.
        if s.is_nan() { f32::NEG_INFINITY } else { s + 0.0 }
    };
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| value(b).total_cmp(&value(a)).then(a.cmp(&b)));
    order
}

/// The shared keys so far.
struct Past {
    config: Arc<Config>,
    keys: Vec<f32>,
    index: Vec<f32>,
}

/// What a layer's attention of one row gives.
struct OfLayer {
    /// `[mode][k][head]`
    held: Vec<Vec<Vec<f64>>>,
    /// `[mode][k]`
    recall: Vec<Vec<f64>>,
    /// `[k]`
    own: Vec<f64>,
    /// Mean of the heads, `[position]`.
    mass: Vec<f32>,
    /// The layer's own top-k at the main k, as bits.
    top: Vec<u64>,
}

impl Past {
    fn rankings(&self, queries: &Queries, n: usize, p: usize, modes: &[Routing]) -> Vec<Ranking> {
        let width = self.config.indexer.map_or(0, |ix| ix.head_dim);
        let q = &queries.index[n * width..][..width];
        let scores: Vec<f32> =
            self.index[..(p + 1) * width].chunks_exact(width).map(|key| dot(q, key)).collect();
        modes.iter().map(|mode| Ranking::new(&scores, *mode)).collect()
    }

    /// Softmax over all positions up to `p` of each head of one layer, `[head][position]`.
    fn attention(&self, q: &[f32], p: usize) -> Vec<Vec<f32>> {
        let heads = self.config.cross_heads;
        let (d, scale) = (heads.head_dim, 1.0 / (heads.head_dim as f32).sqrt());
        let of_head = |h: usize| {
            let (q, g) = (&q[h * d..][..d], h / (heads.n_head / heads.n_kv));
            let rows = self.keys[..(p + 1) * heads.kv_width()].chunks_exact(heads.kv_width());
            let mut mass: Vec<f32> = rows.map(|row| dot(q, &row[g * d..][..d]) * scale).collect();
            let max = mass.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for m in &mut mass {
                *m = (*m - max).exp();
                sum += f64::from(*m);
            }
            mass.iter_mut().for_each(|m| *m = (f64::from(*m) / sum) as f32);
            mass
        };
        (0..heads.n_head).map(of_head).collect()
    }

    fn of_layer(&self, q: &[f32], p: usize, rankings: &[Ranking], plan: &Plan) -> OfLayer {
        let attention = self.attention(q, p);
        let n_head = attention.len() as f32;
        let mass: Vec<f32> = (0..=p).map(|s| attention.iter().map(|a| a[s]).sum::<f32>() / n_head).collect();
        let own = by_score(&mass);
        let taken = |ranking: &Ranking| plan.ks.iter().map(|&k| ranking.taken(k)).collect::<Vec<_>>();
        let sizes: Vec<usize> = plan.ks.iter().map(|&k| k.min(p + 1)).collect();
        let held = (rankings.iter())
            .map(|r| {
                let of_head: Vec<_> = attention.iter().map(|a| prefix_sums(a, &r.order, &taken(r))).collect();
                (0..plan.ks.len()).map(|k| of_head.iter().map(|held| held[k]).collect()).collect()
            })
            .collect();
        let recall = (rankings.iter())
            .map(|r| {
                let rank = ranks(&r.order);
                let found = |(&n, taken): (&usize, usize)| {
                    own[..n].iter().filter(|s| (rank[**s as usize] as usize) < taken).count() as f64
                        / n as f64
                };
                sizes.iter().zip(taken(r)).map(found).collect()
            })
            .collect();
        let mut top = vec![0; (p + 1).div_ceil(64)];
        own[..sizes[plan.main]].iter().for_each(|&s| top[s as usize / 64] |= 1 << (s % 64));
        OfLayer { held, recall, own: prefix_sums(&mass, &own, &sizes), mass, top }
    }

    /// Adds row `n` of `queries`, at position `p`.
    #[expect(clippy::too_many_arguments, reason = "one row, its neighbour, and where it goes")]
    fn add(
        &self,
        queries: &Queries,
        n: usize,
        p: usize,
        rankings: &[Ranking],
        previous: Option<&[Ranking]>,
        plan: &Plan,
        to: &mut Coverage,
    ) {
        let width = self.config.cross_heads.q_width();
        let layers: Vec<OfLayer> = (queries.layers.par_iter())
            .map(|q| self.of_layer(&q[n * width..][..width], p, rankings, plan))
            .collect();
        let n_layer = layers.len() as f64;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n_layer;
        for (i, &k) in plan.ks.iter().enumerate() {
            let beyond = p + 1 > k;
            for (m, of_mode) in to.modes.iter_mut().enumerate() {
                for (l, layer) in layers.iter().enumerate() {
                    layer.held[m][i].iter().zip(&mut of_mode.by_head[i][l]).for_each(|(h, to)| to.push(*h));
                    if beyond {
                        of_mode.recall[i][l].push(layer.recall[m][i]);
                    }
                }
                let heads = self.config.cross_heads.n_head as f64;
                let held = mean(&mut layers.iter().map(|l| l.held[m][i].iter().sum::<f64>() / heads));
                of_mode.all[i].push(held);
                of_mode.by_depth[i][(p * DEPTHS / plan.len).min(DEPTHS - 1)].push(held);
                if beyond {
                    of_mode.beyond[i].push(held);
                }
                if let Some(previous) = previous.filter(|_| beyond) {
                    of_mode.neighbours[i].push(overlap(&previous[m], &rankings[m], k));
                }
            }
            to.best_own[i].push(mean(&mut layers.iter().map(|l| l.own[i])));
        }
        let shared: Vec<f32> =
            (0..=p).map(|s| layers.iter().map(|l| l.mass[s]).sum::<f32>() / n_layer as f32).collect();
        let sizes: Vec<usize> = plan.ks.iter().map(|&k| k.min(p + 1)).collect();
        let best = prefix_sums(&shared, &by_score(&shared), &sizes);
        best.iter().zip(&mut to.best_shared).for_each(|(held, to)| to.push(*held));
        if p + 1 > plan.ks[plan.main] {
            for (a, row) in layers.iter().zip(&mut to.layers) {
                for (b, cell) in layers.iter().zip(row) {
                    let both: u32 = a.top.iter().zip(&b.top).map(|(a, b)| (a & b).count_ones()).sum();
                    cell.push(f64::from(both) / plan.ks[plan.main] as f64);
                }
            }
        }
    }
}

/// Share of what `a` selects that `b` selects too.
fn overlap(a: &Ranking, b: &Ranking, k: usize) -> f64 {
    let (rank, taken) = (ranks(&b.order), b.taken(k));
    let selected = &a.order[..a.taken(k)];
    selected.iter().filter(|s| (rank[**s as usize] as usize) < taken).count() as f64 / selected.len() as f64
}

/// Place of every index in `order`.
fn ranks(order: &[u32]) -> Vec<u32> {
    let mut ranks = vec![0; order.len()];
    order.iter().enumerate().for_each(|(rank, &s)| ranks[s as usize] = rank as u32);
    ranks
}

/// Sums of `values` over the first `ends[i]` of `order`; `ends` does not decrease.
fn prefix_sums(values: &[f32], order: &[u32], ends: &[usize]) -> Vec<f64> {
    let (mut at, mut sum) = (0, 0.0);
    let to = |&end: &usize| {
        sum += order[at..end].iter().map(|&s| f64::from(values[s as usize])).sum::<f64>();
        at = end;
        sum
    };
    ends.iter().map(to).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (a16, b16) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a16.remainder().iter().zip(b16.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a16.zip(b16) {
        for i in 0..LANES {
            sums[i] = a[i].mul_add(b[i], sums[i]);
        }
    }
    sums.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(modes: &[Routing], ks: &[usize], len: usize, rows: usize) -> Plan {
        Plan { modes: modes.to_vec(), ks: ks.to_vec(), main: 0, len, rows }
    }

    #[test]
    fn rankings_select_as_routing_does() {
        let scores = [0.5, f32::NAN, 2.0, 2.0, -0.0, 0.0, 1.0];
        let clsa = Ranking::new(&scores, Routing::Clsa);
        assert_eq!(clsa.order, [2, 3, 6, 0, 4, 5, 1]);
        assert_eq!((clsa.taken(3), clsa.taken(7), clsa.taken(100)), (3, 7, 7));
        assert_eq!(Ranking::new(&scores, Routing::Dense).taken(1), 7);
        // Blocks {0, 1}, {2, 3}, {4, 5}, {6}: the NaN makes the first the least.
        let block = Ranking::new(&scores, Routing::Block(2));
        assert_eq!(block.order, [2, 3, 6, 4, 5, 0, 1]);
        assert_eq!((block.taken(1), block.taken(2), block.taken(5), block.taken(6)), (2, 2, 3, 5));
    }

    #[test]
    fn overlaps_are_shares_of_the_earlier_selection() {
        let ranking = |scores: &[f32]| Ranking::new(scores, Routing::Clsa);
        let (a, b) = (ranking(&[3.0, 2.0, 1.0]), ranking(&[3.0, 1.0, 0.0, 2.0]));
        assert_eq!(overlap(&a, &b, 2), 0.5);
        assert_eq!(overlap(&a, &b, 1), 1.0);
        assert_eq!(overlap(&a, &b, 4), 1.0);
    }

    #[test]
    fn rows_are_spread_and_keep_their_neighbours() {
        for (len, rows) in [(8, 4), (100, 7), (8192, 64), (2, 1)] {
            let plan = plan(&[Routing::Clsa], &[1], len, rows);
            plan.check().unwrap();
            let positions = plan.positions();
            assert_eq!((positions.len(), *positions.last().unwrap()), (rows, len - 1));
            assert!(positions[0] > 0 && positions.windows(2).all(|w| w[0] + 1 < w[1]), "{positions:?}");
        }
    }

    #[test]
    fn plans_that_measure_nothing_are_refused() {
        for bad in [
            plan(&[Routing::Every(4)], &[1], 8, 1),
            plan(&[Routing::Clsa], &[], 8, 1),
            plan(&[Routing::Clsa], &[0, 1], 8, 1),
            plan(&[Routing::Clsa], &[2, 2], 8, 1),
            plan(&[Routing::Clsa], &[1], 8, 5),
            plan(&[Routing::Clsa], &[1], 8, 0),
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn measurements_merge_cell_by_cell() {
        let plan = plan(&[Routing::Clsa, Routing::Block(4)], &[1, 2], 8, 1);
        let mut a = Coverage::new(&plan, 2, 3);
        let mut b = a.clone();
        b.modes[1].by_head[1][0][2].push(0.5);
        b.layers[1][0].push(0.25);
        a.merge(&b).unwrap();
        a.merge(&b).unwrap();
        assert_eq!((a.modes[1].by_head[1][0][2].count(), a.layers[1][0].get()), (2, Some(0.25)));
        assert!(a.merge(&Coverage::new(&plan, 3, 3)).is_err());
    }
}

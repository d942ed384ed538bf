//! Our kernels as custom nodes: each fills its op's contract struct from the batch in hand and calls the kernel on every thread.
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::Arc;

use ggml_kernels::contracts::{
    clsa_attention, clsa_gather_attention, clsa_rope_append, clsa_route, clsa_rows, clsa_score,
};
use ggml_kernels::ggml as g;

use super::Ggml;
use super::graph::{Graph, Node};
use super::step::Shared;
use crate::backend::{Routing, Stage};
use crate::cache::PAGE;
use crate::config::{Heads, Rope};

/// No cache: the op leaves this part out.
fn no_rows() -> clsa_rows {
    clsa_rows { base: ptr::null_mut(), ..clsa_rows::default() }
}

/// `rope_append` of some of q, k, v.
pub struct Append {
    shared: Arc<Shared>,
    heads: Heads,
    rope: Option<Rope>,
    cross: bool,
    kept: bool,
    eps: f32,
    has_q: bool,
    norms: Option<(*const f32, *const f32)>,
    k: clsa_rows,
    v: clsa_rows,
}

// SAFETY: the pointers are to norm vectors and caches, which live as long as the backend that runs the node.
unsafe impl Send for Append {}
// SAFETY: as above; the kernel's contract divides what is written among the threads.
unsafe impl Sync for Append {}

impl Append {
    /// `source` holds `[rows][width]` of q, k, v, or those of them that there are, one after the other; the result is the rotated q, or
    /// nothing of interest.
    pub fn node(self, graph: &mut Graph, source: Node) -> Node {
        let rows = source.rows();
        let (width, dst_rows) = if self.has_q { (self.heads.q_width(), rows) } else { (1, 1) };
        graph.custom(g::GGML_TYPE_F32, width, dst_rows, &[source], move |dst, sources, ith, nth| {
            self.run(dst, sources[0], ith, nth);
        })
    }

    fn run(&self, dst: Node, source: Node, ith: usize, nth: usize) {
        let (rows, source) = (source.rows(), source.data::<f32>().cast_const());
        let k = if self.has_q { source.wrapping_add(rows * self.heads.q_width()) } else { source };
        let v = k.wrapping_add(rows * self.heads.kv_width());
        let (cos, sin) = match self.rope {
            Some(_) => self.shared.angles(self.kept, self.cross),
            None => (ptr::null(), ptr::null()),
        };
        let (q_norm, k_norm) = self.norms.unwrap_or((ptr::null(), ptr::null()));
        let op = clsa_rope_append {
            batch: self.shared.batch(self.kept),
            n_head: self.heads.n_head as i32,
            n_kv: self.heads.n_kv as i32,
            d: self.heads.head_dim as i32,
            n_rot: self.rope.map_or(0, |r| r.n_rot as i32),
            interleaved: i32::from(self.rope.is_some_and(|r| r.interleaved)),
            eps: self.eps,
            q: if self.has_q { source } else { ptr::null() },
            q_out: if self.has_q { dst.data() } else { ptr::null_mut() },
            k: if self.k.base.is_null() { ptr::null() } else { k },
            v: if self.v.base.is_null() { ptr::null() } else { v },
            q_norm,
            k_norm,
            cos,
            sin,
            k_cache: self.k,
            v_cache: self.v,
        };
        // SAFETY: sources and destination have the shapes of the contract by construction of the node, the arrays of the batch have
        // n_rows entries, and the scratch was grown for this op.
        unsafe { self.shared.run(&op, ith, nth) }
    }
}

/// `attention` over a contiguous range of positions.
pub struct Attend {
    shared: Arc<Shared>,
    heads: Heads,
    window: usize,
    kept: bool,
    k: clsa_rows,
    v: clsa_rows,
}

// SAFETY: as for Append.
unsafe impl Send for Attend {}
// SAFETY: as for Append.
unsafe impl Sync for Attend {}

impl Attend {
    pub fn node(self, graph: &mut Graph, q: Node) -> Node {
        // SAFETY: nodes are recorded while no graph runs.
        unsafe {
            let sized = self.op(q.rows(), ptr::null(), ptr::null_mut());
            self.shared.grow_scratch(&sized);
        }
        graph.custom(g::GGML_TYPE_F32, q.width(), q.rows(), &[q], move |dst, sources, ith, nth| {
            let op = self.op(dst.rows(), sources[0].data(), dst.data());
            // SAFETY: as in Append::run.
            unsafe { self.shared.run(&op, ith, nth) }
        })
    }

    fn op(&self, rows: usize, q: *const f32, out: *mut f32) -> clsa_attention {
        let mut batch = self.shared.batch(self.kept);
        batch.n_rows = rows as i32;
        clsa_attention {
            batch,
            n_head: self.heads.n_head as i32,
            n_kv: self.heads.n_kv as i32,
            d: self.heads.head_dim as i32,
            window: self.window as i32,
            scale: scale(self.heads),
            q,
            out,
            k: self.k,
            v: self.v,
        }
    }
}

/// `route`: the selection for each output row.
pub struct Route {
    shared: Arc<Shared>,
    keys: clsa_rows,
    k: usize,
    block: usize,
}

// SAFETY: as for Append.
unsafe impl Send for Route {}
// SAFETY: as for Append.
unsafe impl Sync for Route {}

impl Route {
    pub fn node(self, graph: &mut Graph, q: Node) -> Node {
        // Block mode takes whole blocks, at least one.
        let columns = if self.block > 1 { self.k.max(self.block) } else { self.k };
        // SAFETY: nodes are recorded while no graph runs.
        unsafe {
            let sized = self.op(q.rows(), columns, ptr::null(), ptr::null_mut());
            self.shared.grow_scratch(&sized);
        }
        let alone = graph.is_timed().then(|| ScoresAlone::new(&self));
        let node = graph.custom(g::GGML_TYPE_I32, columns, q.rows(), &[q], move |dst, sources, ith, nth| {
            let op = self.op(dst.rows(), columns, sources[0].data(), dst.data());
            // SAFETY: as in Append::run.
            unsafe { self.shared.run(&op, ith, nth) }
        });
        if let Some(alone) = alone {
            graph.time_alone(Stage::Scoring, move |dst, sources, ith, nth| {
                alone.run(dst, sources[0], ith, nth)
            });
        }
        graph.keep(node);
        node
    }

    fn op(&self, rows: usize, columns: usize, q: *const f32, selected: *mut u32) -> clsa_route {
        let mut batch = self.shared.batch(true);
        batch.n_rows = rows as i32;
        clsa_route {
            batch,
            d: self.keys.width,
            k: self.k as i32,
            block: self.block as i32,
            n_columns: columns as i32,
            q,
            keys: self.keys,
            selected,
            count: self.shared.counts(),
        }
    }
}

/// The scores of all index keys without a selection, to be timed apart: `route` selects while it scores.
struct ScoresAlone {
    shared: Arc<Shared>,
    keys: clsa_rows,
    /// One for each position of a slot.
    scores: Box<[UnsafeCell<f32>]>,
}

// SAFETY: as for Append.
unsafe impl Send for ScoresAlone {}
// SAFETY: as for Append; nobody reads the scores.
unsafe impl Sync for ScoresAlone {}

impl ScoresAlone {
    fn new(route: &Route) -> Self {
        let positions = route.shared.batch(true).table_stride as usize * PAGE;
        let scores = (0..positions).map(|_| UnsafeCell::new(0.0)).collect();
        Self { shared: Arc::clone(&route.shared), keys: route.keys, scores }
    }

    fn run(&self, dst: Node, query: Node, ith: usize, nth: usize) {
        let (batch, d) = (self.shared.batch(true), self.keys.width);
        for r in 0..dst.rows() {
            // SAFETY: the batch has a position and a slot for each output row.
            let (pos, slot) = unsafe { (*batch.pos.add(r), *batch.slot.add(r)) };
            let q = query.data::<f32>().wrapping_add(r * d as usize);
            let out = UnsafeCell::raw_get(self.scores.as_ptr());
            let op = clsa_score { batch, d, slot, start: 0, n: pos + 1, q, out, keys: self.keys };
            // SAFETY: as in Append::run; there is a score for every position of a slot.
            unsafe { self.shared.run(&op, ith, nth) }
        }
    }
}

/// `gather_attention` over the selected positions.
pub struct Gather {
    shared: Arc<Shared>,
    heads: Heads,
    k: clsa_rows,
    v: clsa_rows,
}

// SAFETY: as for Append.
unsafe impl Send for Gather {}
// SAFETY: as for Append.
unsafe impl Sync for Gather {}

impl Gather {
    pub fn node(self, graph: &mut Graph, q: Node, selected: Node) -> Node {
        // SAFETY: nodes are recorded while no graph runs.
        unsafe {
            let sized = self.op(q.rows(), selected.width(), ptr::null(), ptr::null_mut(), ptr::null());
            self.shared.grow_scratch(&sized);
        }
        graph.custom(g::GGML_TYPE_F32, q.width(), q.rows(), &[q, selected], move |dst, sources, ith, nth| {
            let [q, selected] = [sources[0], sources[1]];
            let op = self.op(dst.rows(), selected.width(), q.data(), dst.data(), selected.data());
            // SAFETY: as in Append::run; positions come from `route` over the same batch.
            unsafe { self.shared.run(&op, ith, nth) }
        })
    }

    fn op(
        &self,
        rows: usize,
        columns: usize,
        q: *const f32,
        out: *mut f32,
        selected: *const u32,
    ) -> clsa_gather_attention {
        let mut batch = self.shared.batch(true);
        batch.n_rows = rows as i32;
        clsa_gather_attention {
            batch,
            n_head: self.heads.n_head as i32,
            n_kv: self.heads.n_kv as i32,
            d: self.heads.head_dim as i32,
            n_columns: columns as i32,
            scale: scale(self.heads),
            q,
            out,
            k: self.k,
            v: self.v,
            selected,
            count: self.shared.counts(),
        }
    }
}

/// `1/sqrt(d)`
fn scale(heads: Heads) -> f32 {
    1.0 / (heads.head_dim as f32).sqrt()
}

impl Ggml {
    fn append(&self, heads: Heads, rope: Option<Rope>) -> Append {
        Append {
            shared: self.shared.clone(),
            heads,
            rope,
            cross: false,
            kept: false,
            eps: self.model.config.rms_eps,
            has_q: false,
            norms: None,
            k: no_rows(),
            v: no_rows(),
        }
    }

    /// q, k, v of self layer `i`.
    pub(super) fn self_append(&self, i: usize) -> Append {
        let c = &self.model.config;
        let norms = self.model.weights.layers[i].qk_norm.as_ref();
        let (k, v) = self.caches.layer(i);
        Append {
            has_q: true,
            norms: norms.map(|(q, k)| (self.vector(q), self.vector(k))),
            k,
            v,
            ..self.append(c.self_heads, Some(c.rope))
        }
    }

    /// Shared K and V.
    pub(super) fn shared_append(&self) -> Append {
        let c = &self.model.config;
        let (k, v) = self.caches.shared();
        Append { cross: true, k, v, ..self.append(c.cross_heads, c.cross_rope) }
    }

    /// The index key.
    pub(super) fn index_append(&self) -> Append {
        let k = self.caches.index();
        let heads = Heads { n_head: 1, n_kv: 1, head_dim: k.width as usize };
        Append { k, ..self.append(heads, None) }
    }

    /// q of a cross layer, where it has a position encoding.
    pub(super) fn cross_rope(&self) -> Append {
        let c = &self.model.config;
        Append { cross: true, kept: true, has_q: true, ..self.append(c.cross_heads, c.cross_rope) }
    }

    /// Attention of self layer `i`.
    pub(super) fn self_attend(&self, i: usize) -> Attend {
        let c = &self.model.config;
        let (k, v) = self.caches.layer(i);
        let window = c.window.unwrap_or(0);
        Attend { shared: self.shared.clone(), heads: c.self_heads, window, kept: false, k, v }
    }

    /// Dense attention of a cross layer.
    pub(super) fn cross_attend(&self) -> Attend {
        let (k, v) = self.caches.shared();
        let heads = self.model.config.cross_heads;
        Attend { shared: self.shared.clone(), heads, window: 0, kept: true, k, v }
    }

    /// The selection of positions.
    pub(super) fn route_op(&self) -> Route {
        let block = if let Routing::Block(block) = self.shape.routing { block } else { 0 };
        Route { shared: self.shared.clone(), keys: self.caches.index(), k: self.shape.top_k, block }
    }

    /// Sparse attention of a cross layer.
    pub(super) fn gather(&self) -> Gather {
        let (k, v) = self.caches.shared();
        Gather { shared: self.shared.clone(), heads: self.model.config.cross_heads, k, v }
    }
}

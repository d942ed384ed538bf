//! Matrix products as custom nodes (ggml-kernels/include/matmul.h): up to four weights over the same rows, with the norm before them and
//! the residual or the gate after them in the same op.
use std::ptr;
use std::sync::Arc;

use ggml_kernels::contracts::{
    CLSA_EPILOGUE_NONE, CLSA_EPILOGUE_SWIGLU, CLSA_MAX_MATRICES, clsa_matmul, clsa_matrix, clsa_pack,
};
use ggml_kernels::ggml as g;
use ggml_kernels::matmul;
use ggml_kernels::quant::Type;

use super::Ggml;
use super::graph::{Graph, Node};
use super::step::Shared;
use crate::backend::probe::Input;
use crate::model::Weight;

/// A weight as the kernels take it.
#[derive(Clone, Copy)]
struct Matrix {
    data: *const u8,
    bytes: usize,
    ty: Type,
    n_out: usize,
    repacked: bool,
}

/// One to four products of the same rows.
pub struct Linear {
    shared: Arc<Shared>,
    matrices: Vec<Matrix>,
    n_in: usize,
    /// RMSNorm before the products: weights and epsilon.
    norm: Option<(*const f32, f32)>,
    swiglu: bool,
    /// Who wants to see the rows.
    probe: Option<Arc<Input>>,
}

// SAFETY: the pointers are into the memory map, the repacked weights and to norm vectors, which the backend keeps alive and nobody writes.
unsafe impl Send for Linear {}
// SAFETY: as above; the kernels divide what is written among the pieces.
unsafe impl Sync for Linear {}

/// Values that packed rows may be moved by to lie on a cache line.
const ALIGN_FLOATS: usize = 16;

fn aligned(data: *mut u8) -> *mut u8 {
    data.wrapping_add(data.align_offset(64))
}

impl Linear {
    /// `silu(W0 x) * (W1 x)` instead of both products.
    pub fn swiglu(self) -> Self {
        Self { swiglu: true, ..self }
    }

    /// The products of the rows of `x`. The result holds `[rows][n_out]` of one product after the other; with `add`, `add + W x`.
    pub fn node(self, graph: &mut Graph, x: Node, add: Option<Node>) -> Node {
        let packed = self.packed(graph, x);
        self.product(graph, x.rows(), Some(x), packed, add)
    }

    /// `next` of these products: as two nodes, but rows that `next` reads rounded for tiles never stand in memory unrounded.
    pub fn then(self, next: Self, graph: &mut Graph, x: Node, add: Option<Node>) -> Node {
        let (rows, n_out) = (x.rows(), self.matrices[0].n_out);
        let forms = |l: &Self| l.pack(rows, ptr::null(), ptr::null_mut()).forms;
        let same = matmul::is_tiled(forms(&self)) && forms(&self) == forms(&next);
        let joined = self.swiglu && same && n_out.is_multiple_of(32);
        if !joined || next.norm.is_some() || next.probe.is_some() {
            let y = self.node(graph, x, None);
            return next.node(graph, y, add);
        }
        let packed = self.packed(graph, x);
        // SAFETY: nodes are recorded while no graph runs.
        unsafe {
            self.shared.grow_scratch(&self.op(rows, ptr::null(), ptr::null_mut(), ptr::null_mut(), None))
        };
        let floats = next.packed_floats(rows);
        let sources: Vec<_> = [Some(x), packed].into_iter().flatten().collect();
        let y = graph.custom(g::GGML_TYPE_F32, floats, 1, &sources, move |dst, sources, ith, nth| {
            let mut op = self.op(rows, sources[0].data(), aligned(sources[1].data()), ptr::null_mut(), None);
            op.y_packed = aligned(dst.data());
            // SAFETY: as in `product`; the destination has room for the packed rows and their alignment.
            unsafe { self.shared.run(&op, ith, nth) }
        });
        next.product(graph, rows, None, Some(y), add)
    }

    /// The packed rows of `x`, if the product wants an op of its own for that.
    fn packed(&self, graph: &mut Graph, x: Node) -> Option<Node> {
        debug_assert_eq!(x.width(), self.n_in);
        self.probe_node(graph, x);
        (x.rows() > self.private_rows()).then(|| self.pack_node(graph, x))
    }

    /// The products of `rows` rows: of x, of packed ones, or of both.
    fn product(
        self,
        graph: &mut Graph,
        rows: usize,
        x: Option<Node>,
        packed: Option<Node>,
        add: Option<Node>,
    ) -> Node {
        let width =
            if self.swiglu { self.matrices[0].n_out } else { self.matrices.iter().map(|m| m.n_out).sum() };
        // SAFETY: nodes are recorded while no graph runs.
        unsafe {
            self.shared.grow_scratch(&self.op(rows, ptr::null(), ptr::null_mut(), ptr::null_mut(), None))
        };
        let sources: Vec<_> = [x, packed, add].into_iter().flatten().collect();
        let (has_x, has_pack, has_add) = (x.is_some(), packed.is_some(), add.is_some());
        graph.custom(g::GGML_TYPE_F32, width, rows, &sources, move |dst, sources, ith, nth| {
            let x = if has_x { sources[0].data::<f32>().cast_const() } else { ptr::null() };
            let packed = if has_pack { aligned(sources[usize::from(has_x)].data()) } else { ptr::null_mut() };
            let add = has_add.then(|| sources[sources.len() - 1].data::<f32>().cast_const());
            let op = self.op(rows, x, packed, dst.data(), add);
            // SAFETY: sources and destination have the shapes of the contract by construction of the node; weights lie in the map.
            unsafe { self.shared.run(&op, ith, nth) }
        })
    }

    /// Rows that every piece of the op packs for itself: beyond two, what the pieces do again and again costs more than an op of its own.
    fn private_rows(&self) -> usize {
        if self.shared.pieces == 1 { matmul::PRIVATE_ROWS } else { 2 }
    }

    /// A node that shows the rows of `x`, after the norm, to the probe, if there is one.
    fn probe_node(&self, graph: &mut Graph, x: Node) {
        let Some(input) = self.probe.clone() else { return };
        // SAFETY: norm vectors have n_in floats and live as long as the backend.
        let vector = |w| unsafe { std::slice::from_raw_parts::<f32>(w, self.n_in) }.to_vec();
        let norm = self.norm.map(|(w, eps)| (vector(w), eps));
        let seen = graph.custom(g::GGML_TYPE_F32, 1, 1, &[x], move |_, sources, ith, nth| {
            let x = sources[0];
            // SAFETY: the node holds [rows][n_in] floats.
            let x = unsafe { std::slice::from_raw_parts(x.data::<f32>(), x.rows() * x.width()) };
            input.add(x, norm.as_ref().map(|(w, eps)| (w.as_slice(), *eps)), ith, nth);
        });
        graph.expand(seen);
    }

    fn pack_node(&self, graph: &mut Graph, x: Node) -> Node {
        let pack = self.pack(x.rows(), ptr::null(), ptr::null_mut());
        // SAFETY: nodes are recorded while no graph runs.
        unsafe { self.shared.grow_scratch(&pack) };
        let floats = self.packed_floats(x.rows());
        let me =
            Self { matrices: self.matrices.clone(), shared: Arc::clone(&self.shared), probe: None, ..*self };
        graph.custom(g::GGML_TYPE_F32, floats, 1, &[x], move |dst, sources, ith, nth| {
            let pack = me.pack(sources[0].rows(), sources[0].data(), aligned(dst.data()));
            // SAFETY: the destination has room for the packed rows and their alignment.
            unsafe { me.shared.run(&pack, ith, nth) }
        })
    }

    /// Floats that hold the packed form of `rows` rows, wherever they begin.
    fn packed_floats(&self, rows: usize) -> usize {
        let forms = self.pack(rows, ptr::null(), ptr::null_mut()).forms;
        matmul::packed_bytes(rows, self.n_in, forms).div_ceil(4) + ALIGN_FLOATS
    }

    fn pack(&self, rows: usize, x: *const f32, packed: *mut u8) -> clsa_pack {
        let (norm, eps) = self.norm.unwrap_or((ptr::null(), 0.0));
        clsa_pack {
            n_rows: rows as i32,
            n_in: self.n_in as i32,
            forms: matmul::forms(self.shared.ops.level, rows, self.matrices.iter().map(|m| m.ty)),
            eps,
            x,
            x_stride: self.n_in,
            norm,
            packed,
        }
    }

    fn op(
        &self,
        rows: usize,
        x: *const f32,
        packed: *mut u8,
        y: *mut f32,
        add: Option<*const f32>,
    ) -> clsa_matmul {
        let mut mat = [clsa_matrix::default(); CLSA_MAX_MATRICES as usize];
        let mut at = 0;
        for (to, m) in mat.iter_mut().zip(&self.matrices) {
            // SAFETY: the loader checked that the map holds these bytes, or they are the repacked copy; the backend keeps both.
            let bytes = unsafe { std::slice::from_raw_parts(m.data, m.bytes) };
            let matrix = if m.repacked { matmul::repacked_matrix } else { matmul::matrix };
            *to = matrix(m.ty, bytes, m.n_out, self.n_in, y.wrapping_add(at), m.n_out);
            to.add = add.unwrap_or(ptr::null());
            to.add_stride = m.n_out;
            at += rows * m.n_out;
        }
        clsa_matmul {
            x: self.pack(rows, x, packed),
            n_mat: self.matrices.len() as i32,
            epilogue: if self.swiglu { CLSA_EPILOGUE_SWIGLU } else { CLSA_EPILOGUE_NONE } as i32,
            mat,
            ..clsa_matmul::default()
        }
    }
}

impl Ggml {
    /// The products of `weights` with `RMS(x; norm)`, or with x itself.
    pub(super) fn linear(&self, weights: &[&Weight], norm: Option<&Weight>) -> Linear {
        let matrix = |w: &&Weight| {
            let copy = self.repacked.as_ref().and_then(|r| r.get(w));
            let bytes = copy.unwrap_or_else(|| self.model.bytes(w));
            Matrix {
                data: bytes.as_ptr(),
                bytes: bytes.len(),
                ty: w.ty,
                n_out: w.n_out,
                repacked: copy.is_some(),
            }
        };
        Linear {
            shared: Arc::clone(&self.shared),
            matrices: weights.iter().map(matrix).collect(),
            n_in: weights[0].n_in,
            norm: norm.map(|w| (self.vector(w), self.model.config.rms_eps)),
            swiglu: false,
            probe: self.probe.as_ref().map(|p| p.input(weights)),
        }
    }
}

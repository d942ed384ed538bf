//! Working memory: sized once, for the largest micro-batch.
use ggml_kernels::cuda::ops::{DecodeScratch, Gathered, RouteScratch};
use ggml_kernels::cuda::{Buffer, Device, matmul};
use ggml_kernels::quant::Type;
use half::f16;

use crate::backend::caches::type_number;
use crate::cache::{CacheSpec, PAGE};
use crate::config::Config;
use crate::error::Result;
use crate::model::{Layer, Model};

/// Rows whose selected K and V are copied side by side before the cross layers read them: few enough that the copies stay in the
/// level-2 cache.
const GATHERED_ROWS: usize = 4;
/// Rows that routing works on at a time.
const ROUTED_ROWS: usize = 64;
/// Rows of the kernels that read quantized planes directly.
pub const FEW: usize = ggml_kernels::contracts::CLSA_MATMUL_ROWS as usize;

/// Values of every buffer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sizes {
    /// Residual stream, and its output rows.
    x: usize,
    kept: usize,
    /// Queries; attention outputs; keys; values.
    q: usize,
    kv: usize,
    index: usize,
    index_kept: usize,
    /// f32 activations of layers whose weights cannot be multiplied from f16, or not in one launch.
    normed: usize,
    gate: usize,
    up: usize,
    /// f16 activations: of `hidden` or q_width, of the feed-forward, gate and up side by side; a weight expanded.
    a16: usize,
    h16: usize,
    gu16: usize,
    w16: usize,
    logits: usize,
    route_rows: usize,
    positions: usize,
    route: usize,
    decode: usize,
    gathered: usize,
}

/// Whether gate and up go through one launch.
pub fn glu_in_one(l: &Layer) -> bool {
    l.ffn.gate.ty == l.ffn.up.ty && l.ffn.gate.ty != Type::F32 && l.ffn.down.ty != Type::F32
}

impl Sizes {
    pub fn new(model: &Model, spec: &CacheSpec, multiprocessors: usize, top_k: usize) -> Self {
        let c: &Config = &model.config;
        let (rows, outputs) = (spec.max_rows, spec.max_outputs);
        let layers = &model.weights.layers;
        let q_width = c.self_heads.q_width().max(c.cross_heads.q_width());
        let kv_width = c.self_heads.kv_width().max(c.cross_heads.kv_width());
        let index = c.indexer.map_or(0, |ix| ix.head_dim);
        let any_f32 = model.weights.all().any(|w| w.n_out > 1 && w.ty == Type::F32);
        let split = layers.iter().any(|l| !glu_in_one(l));
        let many = rows > FEW;
        let wide = c.hidden.max(q_width);
        let f16_rows = |cols: usize| {
            let few = matmul::packed_len(rows.min(FEW), cols);
            if many { few.max(rows * cols) } else { few }
        };
        let largest = model
            .weights
            .all()
            .filter(|w| {
                w.offset != model.weights.output.offset && w.offset != model.weights.token_embd.offset
            })
            .map(|w| w.n_in * w.n_out)
            .max()
            .unwrap_or(0);
        let heads = [c.self_heads, c.cross_heads];
        let columns = top_k.max(1);
        let kv_types = (type_number(spec.k), type_number(spec.v));
        let route_rows = outputs.min(ROUTED_ROWS);
        let positions = spec.pages_per_slot * PAGE;
        Self {
            x: rows * c.hidden,
            kept: outputs * c.hidden,
            q: rows * q_width,
            kv: rows * kv_width,
            index: rows * index,
            index_kept: outputs * index,
            normed: if any_f32 { rows * wide.max(c.ffn) } else { 0 },
            gate: if split { rows * c.ffn } else { c.ffn },
            up: if split { rows * c.ffn } else { 0 },
            a16: f16_rows(wide),
            h16: f16_rows(c.ffn),
            gu16: if many { rows * 2 * c.ffn } else { 0 },
            w16: if many { largest.max(2 * c.ffn * c.hidden) } else { 0 },
            logits: outputs * c.vocab,
            route_rows,
            positions,
            route: if index > 0 { RouteScratch::bytes(route_rows, positions) } else { 0 },
            decode: heads
                .map(|h| DecodeScratch::bytes(multiprocessors, h.n_head, h.n_kv, h.head_dim))
                .into_iter()
                .max()
                .unwrap_or(0),
            gathered: if index > 0 {
                Gathered::bytes(
                    outputs.min(GATHERED_ROWS),
                    columns,
                    c.cross_heads.kv_width(),
                    kv_types.0,
                    kv_types.1,
                )
            } else {
                0
            },
        }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        let floats = self.x
            + self.kept
            + 2 * self.q
            + 2 * self.kv
            + 2 * self.index
            + self.index_kept
            + self.normed
            + self.gate
            + self.up
            + self.logits;
        let halves = self.a16 + self.h16 + self.gu16 + self.w16;
        (floats * 4 + halves * 2 + self.route + self.decode + self.gathered) as u64
    }
}

/// The buffers.
pub struct Scratch {
    pub sizes: Sizes,
    pub x: Buffer<f32>,
    pub kept: Buffer<f32>,
    pub q: Buffer<f32>,
    pub attended: Buffer<f32>,
    pub k: Buffer<f32>,
    pub v: Buffer<f32>,
    pub index_key: Buffer<f32>,
    pub index_query: Buffer<f32>,
    pub index_kept: Buffer<f32>,
    pub normed: Buffer<f32>,
    pub gate: Buffer<f32>,
    pub up: Buffer<f32>,
    pub a16: Buffer<f16>,
    pub h16: Buffer<f16>,
    pub gu16: Buffer<f16>,
    pub w16: Buffer<f16>,
    pub logits: Buffer<f32>,
    pub selected: Buffer<u32>,
    pub count: Buffer<i32>,
    pub route: RouteScratch,
    pub decode: DecodeScratch,
    pub gathered: Gathered,
    // What the three above point into.
    held: [Buffer<u8>; 3],
}

impl Scratch {
    pub fn new(device: &Device, sizes: Sizes, outputs: usize) -> Result<Self> {
        let s = sizes;
        let held = [device.zeros(s.route)?, device.zeros(s.decode)?, device.zeros(s.gathered)?];
        Ok(Self {
            x: device.zeros(s.x)?,
            kept: device.zeros(s.kept)?,
            q: device.zeros(s.q)?,
            attended: device.zeros(s.q)?,
            k: device.zeros(s.kv)?,
            v: device.zeros(s.kv)?,
            index_key: device.zeros(s.index)?,
            index_query: device.zeros(s.index)?,
            index_kept: device.zeros(s.index_kept)?,
            normed: device.zeros(s.normed)?,
            gate: device.zeros(s.gate)?,
            up: device.zeros(s.up)?,
            a16: device.zeros(s.a16)?,
            h16: device.zeros(s.h16)?,
            gu16: device.zeros(s.gu16)?,
            w16: device.zeros(s.w16)?,
            logits: device.zeros(s.logits)?,
            selected: device.zeros(0)?,
            count: device.zeros(outputs)?,
            route: RouteScratch::new(held[0].ptr(), s.route_rows.max(1), s.positions),
            decode: DecodeScratch::new(held[1].ptr(), s.decode),
            gathered: Gathered::new(held[2].ptr(), s.gathered),
            held,
            sizes,
        })
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let held: usize = self.held.iter().map(Buffer::bytes).sum();
        self.sizes.bytes() - (self.sizes.route + self.sizes.decode + self.sizes.gathered) as u64
            + (held + self.selected.bytes() + self.count.bytes()) as u64
    }
}

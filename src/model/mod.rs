//! A model file as typed weights over its memory map, and the forward pass.
mod forward;
mod load;
mod metadata;

use std::ops::Range;
use std::sync::Arc;

use ggml_kernels::quant::Type;

use crate::config::Config;
use crate::gguf;

pub use forward::record;

/// A weight as it lies in the file. A matrix maps `n_in` values to `n_out`; a vector has `n_out == 1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Name in the file.
    pub name: String,
    /// Type of its blocks.
    pub ty: Type,
    /// Values of a row (ggml's ne[0]).
    pub n_in: usize,
    /// Rows (ggml's ne[1]).
    pub n_out: usize,
    /// First byte, from the start of the file.
    pub offset: usize,
    /// Bytes.
    pub bytes: usize,
}

/// Gated feed-forward, `Wdown( silu(Wgate b) * (Wup b) )`, `b = RMS(x; norm)`.
#[derive(Clone, Debug)]
pub struct FeedForward {
    /// `ffn_norm` `[hidden]`
    pub norm: Weight,
    /// `ffn_gate` `[ffn, hidden]`
    pub gate: Weight,
    /// `ffn_up` `[ffn, hidden]`
    pub up: Weight,
    /// `ffn_down` `[hidden, ffn]`
    pub down: Weight,
}

/// One layer. Cross-decoder layers have no k, v of their own.
#[derive(Clone, Debug)]
pub struct Layer {
    /// `attn_norm` `[hidden]`
    pub attn_norm: Weight,
    /// `attn_q` `[n_head * d, hidden]`
    pub q: Weight,
    /// `attn_k`, `attn_v` `[n_kv * d, hidden]`; `None` in the cross-decoder
    pub kv: Option<(Weight, Weight)>,
    /// `attn_q_norm`, `attn_k_norm` `[d]`
    pub qk_norm: Option<(Weight, Weight)>,
    /// `attn_output` `[hidden, n_head * d]`
    pub o: Weight,
    /// The feed-forward.
    pub ffn: FeedForward,
}

/// What writes the shared memory.
#[derive(Clone, Debug)]
pub struct SharedMemory {
    /// `shared_kv.norm` `[hidden]`
    pub norm: Weight,
    /// `shared_kv.attn_k` `[n_kv * d, hidden]`
    pub k: Weight,
    /// `shared_kv.attn_v` `[n_kv * d, hidden]`
    pub v: Weight,
    /// `indexer.attn_q`, `indexer.attn_k` `[d_idx, hidden]`
    pub indexer: Option<(Weight, Weight)>,
    /// `shared_kv.rope_freqs` `[n_rot/2]`
    pub rope_freqs: Option<Weight>,
}

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `token_embd` `[vocab, hidden]`
    pub token_embd: Weight,
    /// Every layer, self-decoder first.
    pub layers: Vec<Layer>,
    /// `None` in a Transformer.
    pub shared: Option<SharedMemory>,
    /// `output_norm` `[hidden]`
    pub output_norm: Weight,
    /// `output` `[vocab, hidden]`; `token_embd` where embeddings are tied.
    pub output: Weight,
    /// `rope_freqs` `[n_rot/2]`: divisors of the self-decoder's angles.
    pub rope_freqs: Option<Weight>,
}

/// A model file, mapped and checked. Cheap to clone.
#[derive(Clone)]
pub struct Model {
    /// Its shape.
    pub config: Arc<Config>,
    /// Its weights.
    pub weights: Arc<Weights>,
    /// Its file: metadata and bytes.
    pub file: Arc<gguf::File>,
}

impl Model {
    /// The bytes of a weight, in the memory map.
    #[must_use]
    pub fn bytes(&self, w: &Weight) -> &[u8] {
        &self.file.mapping()[w.offset..w.offset + w.bytes]
    }

    /// The values of a weight in f32: for vectors, which are small.
    #[must_use]
    pub fn values(&self, w: &Weight) -> Vec<f32> {
        let mut out = vec![0.0; w.n_in * w.n_out];
        ggml_kernels::quant::dequantize(w.ty, self.bytes(w), &mut out);
        out
    }
}

impl Weights {
    /// Every weight once (a tied output is its embedding).
    pub fn all(&self) -> impl Iterator<Item = &Weight> {
        self.of(0..self.layers.len())
    }

    /// Those that a backend with these layers needs: the embedding comes with the first layer, the output with the last, the
    /// projections of the shared memory with the first cross layer.
    pub fn of(&self, layers: Range<usize>) -> impl Iterator<Item = &Weight> {
        let (first, last) = (layers.start == 0, layers.end == self.layers.len());
        let tied = first && self.output.offset == self.token_embd.offset;
        let n_self = self.layers.iter().position(|l| l.kv.is_none());
        let shared = n_self.is_some_and(|at| layers.contains(&at));
        (first.then_some(&self.token_embd).into_iter())
            .chain(self.layers[layers].iter().flat_map(layer_weights))
            .chain(self.shared.iter().filter(move |_| shared).flat_map(shared_weights))
            .chain(last.then_some(&self.output_norm))
            .chain((last && !tied).then_some(&self.output))
            .chain(self.rope_freqs.iter().filter(move |_| first))
    }
}

fn layer_weights(l: &Layer) -> impl Iterator<Item = &Weight> {
    [&l.attn_norm, &l.q, &l.o, &l.ffn.norm, &l.ffn.gate, &l.ffn.up, &l.ffn.down]
        .into_iter()
        .chain(l.kv.iter().flat_map(|(k, v)| [k, v]))
        .chain(l.qk_norm.iter().flat_map(|(q, k)| [q, k]))
}

fn shared_weights(s: &SharedMemory) -> impl Iterator<Item = &Weight> {
    [&s.norm, &s.k, &s.v].into_iter().chain(s.indexer.iter().flat_map(|(q, k)| [q, k])).chain(&s.rope_freqs)
}

//! The shape of a model, read from GGUF metadata with every invariant checked (model.md section 5).

/// Which family a file belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// YOCO decoder-decoder, with or without an indexer.
    YocoClsa,
    /// Transformer with rotary pairs (2j, 2j+1), as llama.cpp stores it.
    Llama,
    /// Transformer with per-head q/k norm and rotary pairs (j, j + d/2).
    Qwen3,
}

/// Heads of one kind of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads; divides `n_head`.
    pub n_kv: usize,
    /// Values per head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of all query heads, `n_head * head_dim`.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.n_head * self.head_dim
    }
    /// Width of one cached K or V row, `n_kv * head_dim`.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.n_kv * self.head_dim
    }
}

/// Rotary position encoding: dimension pair j of position t turns by `t * base^(-2j/n_rot) / factor_j / linear_scale`.
/// `factor_j` comes from the optional tensor `rope_freqs.weight`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// `rope.freq_base`.
    pub base: f32,
    /// Rotated dimensions per head.
    pub n_rot: usize,
    /// Pairs (2j, 2j+1) instead of (j, j + n_rot/2).
    pub interleaved: bool,
    /// `rope.scaling.factor` of linear scaling, 1 without.
    pub linear_scale: f32,
}

/// The lightning-free single-head indexer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indexer {
    /// Width of an index key, d_idx.
    pub head_dim: usize,
    /// Positions that routing selects, k.
    pub top_k: usize,
}

/// The shape of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The family.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward.
    pub ffn: usize,
    /// All layers, L.
    pub n_layer: usize,
    /// Layers of the self-decoder, Ls. Equal to `n_layer` in a Transformer, which has no shared memory.
    pub n_self: usize,
    /// Heads of the self-decoder (or of every Transformer layer).
    pub self_heads: Heads,
    /// Heads of the cross-decoder and of the shared memory.
    pub cross_heads: Heads,
    /// Window of the self-decoder, counting the position itself; `None`: all positions (Transformer).
    pub window: Option<usize>,
    /// Position encoding of the self-decoder.
    pub rope: Rope,
    /// Position encoding of the cross-decoder's q and of the shared K (microsoft/unilm YOCO); `None`: NoPE.
    pub cross_rope: Option<Rope>,
    /// Epsilon of every RMSNorm.
    pub rms_eps: f32,
    /// Per-head RMSNorm of q and k in the self-decoder.
    pub qk_norm: bool,
    /// The indexer; `None` for YOCO (dense) and Transformers.
    pub indexer: Option<Indexer>,
    /// Positions the model was trained for.
    pub context_length: usize,
    /// Factor on embeddings.
    pub embed_scale: f32,
}

impl Config {
    /// Whether the model is a decoder-decoder with a shared memory.
    #[must_use]
    pub fn is_yoco(&self) -> bool {
        self.n_self < self.n_layer
    }
}

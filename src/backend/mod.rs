//! What a device must be able to do, in the model's own verbs at the grain of a sub-layer.
//!
//! A backend owns the weights and caches on its device and the residual stream `x` of the batch in hand. The forward pass
//! ([`crate::model::record`]) calls the verbs in the order of the equations; a backend may run each at once, or record them and
//! run everything in [`Backend::finish`].
mod caches;
pub mod cuda;
pub mod ggml;
pub mod open;
pub mod probe;
pub mod reference;
pub mod split;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::cache::PageTables;
use crate::error::{Error, Result};
use crate::sampler::Draw;

/// How cross-decoder layers choose the positions they attend to (model.md section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Routing {
    /// Scored and selected once per token, shared by all cross layers: the paper's method.
    Clsa,
    /// Every position: YOCO (dense).
    Dense,
    /// Scoring and top-k repeated before every `n`-th cross layer: 1 is `per-layer`, 4 is `every-4`.
    Every(usize),
    /// Keys pooled by mean over blocks of this many positions, top k/B blocks, once per token.
    Block(usize),
}

/// One micro-batch: row r is token `tokens[r]` at position `pos[r]` of the sequence in `slot[r]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Positions; those of one sequence are consecutive and increasing.
    pub pos: Vec<u32>,
    /// Slots of the sequences.
    pub slot: Vec<u32>,
    /// Rows whose logits are wanted, increasing; may be empty (prefill that is not at its end).
    pub outputs: Vec<u32>,
}

/// Whether the verbs must be called for this batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Call the verbs in order.
    Needed,
    /// A recorded graph of the same shape serves; go straight to [`Backend::finish`].
    Reused,
}

/// Bytes a backend holds, by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Weights, memory-mapped or uploaded.
    pub weights: u64,
    /// Weights repacked into a second copy.
    pub repacked: u64,
    /// How long that copy took to make.
    pub repack_time: std::time::Duration,
    /// Shared memory, index keys and windows.
    pub cache: u64,
    /// Everything that a step needs besides.
    pub scratch: u64,
}

impl Memory {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.repacked + self.cache + self.scratch
    }
}

/// A stage of a step or prompt, for [`Backend::timings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Rows of the embedding matrix.
    Embedding,
    /// Norm, q, k, v and output projections of the self-decoder, and what rotates and stores k and v.
    SelfProjections,
    /// Attention of the self-decoder, or of a Transformer.
    SelfAttention,
    /// Gated feed-forward.
    FeedForward,
    /// Norm and projections of the shared K, V and index key, and storing them.
    SharedMemory,
    /// Index query, and the scores of all index keys.
    Scoring,
    /// Selection of the best positions.
    TopK,
    /// Scoring, selection and the copy of the selected rows, where a device does not tell them apart.
    Routing,
    /// Norm, q and output projections of the cross-decoder.
    CrossProjections,
    /// Attention of the cross-decoder to the selected, or all, positions.
    CrossAttention,
    /// Last norm and output matrix.
    Logits,
    /// Choosing a token.
    Sampling,
    /// Everything between.
    Other,
}

impl Stage {
    /// Every part, in the order of a step.
    pub const ALL: [Self; 13] = [
        Self::Embedding,
        Self::SelfProjections,
        Self::SelfAttention,
        Self::FeedForward,
        Self::SharedMemory,
        Self::Scoring,
        Self::TopK,
        Self::Routing,
        Self::CrossProjections,
        Self::CrossAttention,
        Self::Logits,
        Self::Sampling,
        Self::Other,
    ];
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Embedding => "embedding",
            Self::SelfProjections => "self projections",
            Self::SelfAttention => "self attention",
            Self::FeedForward => "feed forward",
            Self::SharedMemory => "shared memory",
            Self::Scoring => "scoring",
            Self::TopK => "top-k",
            Self::Routing => "scoring and top-k",
            Self::CrossProjections => "cross projections",
            Self::CrossAttention => "cross attention",
            Self::Logits => "logits",
            Self::Sampling => "sampling",
            Self::Other => "other",
        })
    }
}

/// What one stage of a step took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The stage.
    pub stage: Stage,
    /// The layer, where the stage belongs to one.
    pub layer: Option<usize>,
    /// Its time.
    pub seconds: f64,
}

/// What the cross-decoder asked of the shared memory: queries of a batch's output rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Queries {
    /// For each cross layer `[outputs][n_head * d]`, as attention takes them: turned by their position where the model does so.
    pub layers: Vec<Vec<f32>>,
    /// Index queries, `[outputs][d_idx]`; empty without an indexer.
    pub index: Vec<f32>,
}

/// The verbs of a model on one device.
///
/// Layer indices run over the whole model: self-decoder `0..n_self`, cross-decoder `n_self..n_layer`.
pub trait Backend: Send {
    /// Name and instruction set, for people.
    fn describe(&self) -> String;
    /// Bytes held.
    fn memory(&self) -> Memory;

    /// Takes the batch: tokens, positions, page tables of the slots, routing mode and the k of top-k.
    fn begin(&mut self, batch: &Batch, tables: &PageTables, routing: Routing, top_k: usize)
    -> Result<Record>;
    /// `x = E[token] * embed_scale`.
    fn embed(&mut self) -> Result<()>;
    /// `x += Wo attention(RMS(x))` over the layer's own cache, after appending this batch's k and v to it.
    fn self_attention(&mut self, layer: usize) -> Result<()>;
    /// `x += Wdown( silu(Wgate b) * (Wup b) )`, `b = RMS(x; ffn_norm)`.
    fn feed_forward(&mut self, layer: usize) -> Result<()>;
    /// `H = RMS(x; shared_kv.norm)`; appends K, V and the index key of every row; keeps qidx of the output rows for [`Self::route`].
    fn append_shared(&mut self) -> Result<()>;
    /// Drops every row of `x` that is not an output: prefill stops here for them.
    fn keep_outputs(&mut self) -> Result<()>;
    /// Scores all index keys and selects S for each remaining row.
    fn route(&mut self) -> Result<()>;
    /// `x += Wo attention(RMS(x))` over the selected (or, `dense`, all) rows of the shared memory.
    fn cross_attention(&mut self, layer: usize) -> Result<()>;
    /// `logits = Wout RMS(x; output_norm)`.
    fn logits(&mut self) -> Result<()>;
    /// Runs what was recorded; returns the logits of the output rows, `[outputs.len()][vocab]`.
    fn finish(&mut self) -> Result<&[f32]>;

    /// Runs what was recorded and draws a token for each output row, one of `draws` each. A device that can do so leaves the logits where
    /// they are.
    fn finish_drawn(&mut self, draws: &[Draw]) -> Result<Vec<u32>> {
        let logits = self.finish()?;
        let vocab = logits.len() / draws.len().max(1);
        let rows = logits.chunks(vocab.max(1)).zip(draws);
        Ok(rows.map(|(row, draw)| draw.take(row)).collect::<Result<_, _>>()?)
    }

    /// Starts or stops the clock on the stages of a step.
    ///
    /// # Errors
    /// [`Error::Input`] where a backend has none.
    fn set_timing(&mut self, on: bool) -> Result<()> {
        let none = || Error::Input(format!("{} has no clock for the stages of a step", self.describe()));
        if on { Err(none()) } else { Ok(()) }
    }
    /// What each stage of the last [`Self::finish`] took, in the order of the verbs; empty unless the clock is on.
    fn timings(&mut self) -> Result<Vec<Timing>> {
        Ok(vec![])
    }

    /// Positions that the last [`Self::route`] selected for output row `output` (index into `Batch::outputs`), ascending.
    /// Empty when nothing was routed.
    fn selection(&mut self, output: usize) -> Result<Vec<u32>>;

    /// Whether batches from now on keep the queries of their output rows for [`Self::queries`].
    ///
    /// # Errors
    /// [`Error::Input`] on a device that does not hand them out.
    fn keep_queries(&mut self, keep: bool) -> Result<()> {
        if keep { Err(no_queries(&self.describe())) } else { Ok(()) }
    }

    /// The queries of the last batch, which [`Self::keep_queries`] asked for; empty where nothing was kept.
    ///
    /// # Errors
    /// As [`Self::keep_queries`].
    fn queries(&mut self) -> Result<Queries> {
        Err(no_queries(&self.describe()))
    }

    /// Copies a page in every pool (copy-on-write of a shared, partly filled page).
    fn copy_page(&mut self, from: u32, to: u32) -> Result<()>;
    /// Bytes of the first `rows` positions of a page: for each pool in the order of [`crate::cache::pools`], `rows` rows.
    fn read_page(&mut self, page: u32, rows: usize, out: &mut Vec<u8>) -> Result<()>;
    /// The reverse of [`Self::read_page`].
    fn write_page(&mut self, page: u32, rows: usize, bytes: &[u8]) -> Result<()>;
    /// Bytes of a slot's windows for a sequence of `len` positions: per self layer the K rows, then the V rows, of the last
    /// `min(len, window - 1)` positions in increasing position. Empty for a Transformer.
    fn save_window(&mut self, slot: u32, len: usize) -> Result<Vec<u8>>;
    /// Whether the verbs of a batch of `rows` rows may only record it: then nothing runs before [`Self::finish`], and until then caches
    /// must not be read.
    fn records(&self, rows: usize) -> bool {
        let _ = rows;
        false
    }
    /// The reverse of [`Self::save_window`], into any slot.
    fn load_window(&mut self, slot: u32, len: usize, bytes: &[u8]) -> Result<()>;
    /// Gives slot `to` the windows of slot `from`, of a sequence of `len` positions.
    fn copy_window(&mut self, from: u32, to: u32, len: usize) -> Result<()> {
        let window = self.save_window(from, len)?;
        self.load_window(to, len, &window)
    }
}

fn no_queries(device: &str) -> Error {
    Error::Input(format!("{device} does not hand out the queries of attention: use --device cpu"))
}

/// A backend that may hold some layers of a model only, and works with others on the rest ([`split::Split`]).
///
/// The embedding lies with the first layer, the shared memory's projections and the indexer with the first cross layer, the output
/// matrix with the last layer; K and V of the shared memory lie wherever there are cross layers.
pub trait Part: Backend {
    /// The layers held here.
    fn layers(&self) -> Range<usize>;
    /// Stands in the place of [`Backend::embed`]: x comes from the part before, every row of the batch or, where `kept`, its output
    /// rows, `[rows][hidden]`. Comes after [`Backend::begin`] for every batch, also where a recording serves.
    fn receive(&mut self, x: &[f32], kept: bool) -> Result<()>;
    /// Stands in the place of [`Backend::route`]: the positions selected for each output row, ascending. After every
    /// [`Self::receive`] where something was routed.
    fn receive_selection(&mut self, selected: &[Vec<u32>]) -> Result<()>;
    /// Runs what was recorded and returns x for the part after, `[rows in hand][hidden]`.
    fn hand_over(&mut self) -> Result<&[f32]>;
    /// Appends the K, then the V that the batch's rows have in the shared memory, as they are stored.
    fn read_rows(&mut self, batch: &Batch, tables: &PageTables, out: &mut Vec<u8>) -> Result<()>;
    /// The reverse of [`Self::read_rows`]. Comes before [`Backend::begin`].
    fn write_rows(&mut self, batch: &Batch, tables: &PageTables, bytes: &[u8]) -> Result<()>;
}

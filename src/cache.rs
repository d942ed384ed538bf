//! The caches: windows, and the ONE shared memory cut into pages that sequences hold by reference.
use std::ops::Range;

use ggml_kernels::quant;

use crate::config::Config;
use crate::error::{Error, Result};

/// Positions of a page.
pub const PAGE: usize = ggml_kernels::contracts::CLSA_PAGE as usize;

/// The largest head dim and index key width.
pub const MAX_HEAD_DIM: usize = ggml_kernels::contracts::CLSA_MAX_D as usize;

/// What a cached value is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// 32-bit floats, for parity tests.
    F32,
    /// Half floats, the default.
    F16,
    /// 8-bit blocks of 32 with an f16 scale.
    Q8_0,
}

impl CacheType {
    /// The same as a type of weights.
    #[must_use]
    pub fn quant(self) -> quant::Type {
        match self {
            Self::F32 => quant::Type::F32,
            Self::F16 => quant::Type::F16,
            Self::Q8_0 => quant::Type::Q8_0,
        }
    }

    /// Bytes of a row of `width` values. Q8_0 needs a width divisible by 32.
    #[must_use]
    pub fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::F32 => width * 4,
            Self::F16 => width * 2,
            Self::Q8_0 => width / 32 * 34,
        }
    }
}

/// How much cache a backend must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSpec {
    /// Sequences alive at a time.
    pub n_slots: usize,
    /// Pages in the pools.
    pub n_pages: usize,
    /// Pages that one sequence may hold (columns of a page table).
    pub pages_per_slot: usize,
    /// Rows of the largest micro-batch.
    pub max_rows: usize,
    /// Output rows of the largest micro-batch.
    pub max_outputs: usize,
    /// Type of cached K rows, of the windows too.
    pub k: CacheType,
    /// Type of cached V rows, of the windows too.
    pub v: CacheType,
    /// Type of index keys.
    pub index: CacheType,
}

impl CacheSpec {
    /// Whether the kernels have these head dims and index key width in these types: multiples of 16 up to
    /// [`MAX_HEAD_DIM`], of 32 in Q8_0.
    ///
    /// # Errors
    /// [`Error::Input`] that names the width and, where a type is at fault, the remedy.
    pub fn check(&self, c: &Config) -> Result<()> {
        let shared =
            [("keys", self.k), ("values", self.v)].map(|(what, ty)| (what, c.cross_heads.head_dim, ty));
        let own = [("keys", self.k), ("values", self.v)].map(|(what, ty)| (what, c.self_heads.head_dim, ty));
        let index = c.indexer.map(|ix| ("index keys", ix.head_dim, self.index));
        for (what, width, ty) in own.into_iter().chain(shared).chain(index) {
            if !width.is_multiple_of(16) || !(1..=MAX_HEAD_DIM).contains(&width) {
                return Err(Error::Input(format!(
                    "{what} of {width} values per head: only multiples of 16 up to {MAX_HEAD_DIM} are supported"
                )));
            }
            if ty == CacheType::Q8_0 && !width.is_multiple_of(32) {
                return Err(Error::Input(format!(
                    "{what} of {width} values per head are not whole blocks of q8_0, which are 32 values: use \
                     --cache-type-k f16 --cache-type-v f16"
                )));
            }
        }
        Ok(())
    }
}

/// One paged pool of rows: what a page holds for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The layer it belongs to; `None`: the shared memory.
    pub layer: Option<usize>,
    /// What its rows are.
    pub kind: PoolKind,
    /// Values in a row.
    pub width: usize,
    /// How they are stored.
    pub cache_type: CacheType,
}

/// What the rows of a pool are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolKind {
    /// Keys of all KV heads.
    K,
    /// Values of all KV heads.
    V,
    /// Index keys.
    Index,
}

/// The paged pools of a model, in the order in which a page is saved: shared K, V, index keys; or, for a Transformer, K and V of
/// each layer.
#[must_use]
pub fn pools(config: &Config, spec: &CacheSpec) -> Vec<Pool> {
    pools_of(config, spec, &(0..config.n_layer))
}

/// Those of them that a backend with these layers holds. Shared K and V lie wherever there are cross layers, index keys with the
/// first one.
#[must_use]
pub fn pools_of(config: &Config, spec: &CacheSpec, layers: &Range<usize>) -> Vec<Pool> {
    let kv = |layer, width| {
        [
            Pool { layer, kind: PoolKind::K, width, cache_type: spec.k },
            Pool { layer, kind: PoolKind::V, width, cache_type: spec.v },
        ]
    };
    if config.is_yoco() {
        if layers.end <= config.n_self {
            return vec![];
        }
        let mut pools = kv(None, config.cross_heads.kv_width()).to_vec();
        if let Some(indexer) = config.indexer.filter(|_| layers.contains(&config.n_self)) {
            let width = indexer.head_dim;
            pools.push(Pool { layer: None, kind: PoolKind::Index, width, cache_type: spec.index });
        }
        pools
    } else {
        layers.clone().flat_map(|i| kv(Some(i), config.self_heads.kv_width())).collect()
    }
}

/// Positions that a slot's ring holds: the window and one micro-batch, so that a whole batch is appended before any of its rows
/// attends.
#[must_use]
pub fn ring_len(window: usize, max_rows: usize) -> usize {
    (window + max_rows).next_multiple_of(64)
}

/// Page tables of all slots, `[n_slots][pages_per_slot]`, as the kernels read them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageTables {
    /// Entries of one slot.
    pub stride: usize,
    /// Page numbers; an entry past a sequence's length is 0 and not read.
    pub entries: Vec<u32>,
}

/// Hands out pages and counts who holds them.
#[derive(Debug)]
pub struct PagePool {
    holders: Vec<u32>,
    free: Vec<u32>,
}

impl PagePool {
    /// A pool of `n` free pages.
    #[must_use]
    pub fn new(n: usize) -> Self {
        Self { holders: vec![0; n], free: (0..n as u32).rev().collect() }
    }

    /// Pages nobody holds.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// A page with one holder; `None` when all are held.
    pub fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.holders[page as usize] = 1;
        Some(page)
    }

    /// One more holder.
    pub fn share(&mut self, page: u32) {
        self.holders[page as usize] += 1;
    }

    /// Whether somebody else holds the page too, so that it must be copied before it is written.
    #[must_use]
    pub fn is_shared(&self, page: u32) -> bool {
        self.holders[page as usize] > 1
    }

    /// One holder less; the last one frees the page.
    pub fn release(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }
}

/// Random cache rows, uniform in -1..1, in any cache type.
pub(crate) struct RandomRows {
    state: u64,
    values: Vec<f32>,
}

impl RandomRows {
    pub fn new(seed: u64) -> Self {
        Self { state: seed, values: vec![] }
    }

    /// Appends `n` values in `ty`.
    pub fn push(&mut self, ty: CacheType, n: usize, out: &mut Vec<u8>) {
        self.values.clear();
        self.values.extend((0..n).map(|_| {
            // splitmix64 (Steele, Lea, Flood 2014).
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 * (2.0 / (1 << 24) as f32) - 1.0
        }));
        let at = out.len();
        out.resize(at + ty.row_bytes(n), 0);
        quant::quantize(ty.quant(), &self.values, n, None, &mut out[at..]);
    }
}

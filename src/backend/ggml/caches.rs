//! Pools and windows in anonymous memory, which the system hands out as it is first written.
use std::ops::Range;

use ggml_kernels::contracts::{CLSA_F16, CLSA_F32, CLSA_Q8_0, clsa_rows};
use memmap2::MmapMut;

use crate::cache::{CacheSpec, CacheType, PAGE, pools, ring_len};
use crate::config::Config;
use crate::error::{Error, Result};

/// All cached rows of a CPU backend.
pub struct Caches {
    /// In the order of [`pools`].
    pools: Vec<Rows>,
    /// K and V of each self layer; empty for a Transformer.
    windows: Vec<(Rows, Rows)>,
    window: usize,
}

/// Rows of one kind, and the memory they lie in.
struct Rows {
    memory: MmapMut,
    view: clsa_rows,
}

// SAFETY: `view.base` points into `memory`, which moves with it and is only written by kernels that a &mut backend runs.
unsafe impl Send for Rows {}

impl Rows {
    fn new(
        what: &str,
        ty: CacheType,
        width: usize,
        count: usize,
        per_page: usize,
        ring: usize,
    ) -> Result<Self> {
        if ty == CacheType::Q8_0 && !width.is_multiple_of(32) {
            return Err(Error::Input(format!(
                "a q8_0 cache needs rows divisible by 32, {what} has {width} values: use f16"
            )));
        }
        let row_stride = ty.row_bytes(width);
        let page_stride = row_stride * per_page;
        let bytes = page_stride * count;
        let mut memory = MmapMut::map_anon(bytes.max(1)).map_err(|e| Error::Memory {
            what: format!("the cache of {what}"),
            needed: bytes as u64,
            free: 0,
            remedy: format!("lower -c or use -ctk q8_0 -ctv q8_0 ({e})"),
        })?;
        // Reads of large pages are half as fast again; where the system has none, nothing changes.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let view = clsa_rows {
            base: memory.as_mut_ptr(),
            row_stride,
            page_stride,
            type_: match ty {
                CacheType::F32 => CLSA_F32,
                CacheType::F16 => CLSA_F16,
                CacheType::Q8_0 => CLSA_Q8_0,
            } as i32,
            width: width as i32,
            ring: ring as i32,
            reserved: 0,
            bytes,
        };
        Ok(Self { memory, view })
    }

    fn page(&self, page: u32, rows: usize) -> Range<usize> {
        let start = page as usize * self.view.page_stride;
        start..start + rows * self.view.row_stride
    }
}

/// Byte ranges of ring positions in increasing position.
fn ring(view: &clsa_rows, slot: u32, positions: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let clsa_rows { row_stride, page_stride, ring, .. } = *view;
    positions.map(move |p| {
        let start = slot as usize * page_stride + p % ring as usize * row_stride;
        start..start + row_stride
    })
}

impl Caches {
    pub fn new(c: &Config, spec: &CacheSpec) -> Result<Self> {
        let pools = pools(c, spec)
            .iter()
            .map(|p| Rows::new("the shared memory", p.cache_type, p.width, spec.n_pages, PAGE, 0))
            .collect::<Result<_>>()?;
        let width = c.self_heads.kv_width();
        let windows = match c.window {
            None => vec![],
            Some(window) => {
                let ring = ring_len(window, spec.max_rows);
                let rows = |ty| Rows::new("the windows", ty, width, spec.n_slots, ring, ring);
                (0..c.n_self).map(|_| Ok((rows(spec.k)?, rows(spec.v)?))).collect::<Result<_>>()?
            }
        };
        Ok(Self { pools, windows, window: c.window.unwrap_or(0) })
    }

    pub fn bytes(&self) -> u64 {
        let windows = self.windows.iter().flat_map(|(k, v)| [k, v]);
        self.pools.iter().chain(windows).map(|r| r.memory.len() as u64).sum()
    }

    /// K and V of the shared memory.
    pub fn shared(&self) -> (clsa_rows, clsa_rows) {
        (self.pools[0].view, self.pools[1].view)
    }

    /// Index keys.
    pub fn index(&self) -> clsa_rows {
        self.pools[2].view
    }

    /// K and V that self layer `i` attends to: its window, or a Transformer layer's own pools.
    pub fn layer(&self, i: usize) -> (clsa_rows, clsa_rows) {
        match self.windows.get(i) {
            Some((k, v)) => (k.view, v.view),
            None => (self.pools[2 * i].view, self.pools[2 * i + 1].view),
        }
    }

    pub fn copy_page(&mut self, from: u32, to: u32) {
        for pool in &mut self.pools {
            let (from, to) = (pool.page(from, PAGE), pool.page(to, PAGE).start);
            pool.memory.copy_within(from, to);
        }
    }

    pub fn read_page(&self, page: u32, rows: usize, out: &mut Vec<u8>) {
        for pool in &self.pools {
            out.extend_from_slice(&pool.memory[pool.page(page, rows)]);
        }
    }

    pub fn write_page(&mut self, page: u32, rows: usize, mut bytes: &[u8]) {
        for pool in &mut self.pools {
            let to = pool.page(page, rows);
            let (mine, rest) = bytes.split_at(to.len());
            pool.memory[to].copy_from_slice(mine);
            bytes = rest;
        }
    }

    /// Positions whose window rows a sequence of `len` positions still needs.
    fn alive(&self, len: usize) -> Range<usize> {
        (len + 1).saturating_sub(self.window)..len
    }

    pub fn save_window(&self, slot: u32, len: usize) -> Vec<u8> {
        let mut out = vec![];
        for rows in self.windows.iter().flat_map(|(k, v)| [k, v]) {
            ring(&rows.view, slot, self.alive(len)).for_each(|at| out.extend_from_slice(&rows.memory[at]));
        }
        out
    }

    pub fn load_window(&mut self, slot: u32, len: usize, mut bytes: &[u8]) {
        let alive = self.alive(len);
        for rows in self.windows.iter_mut().flat_map(|(k, v)| [k, v]) {
            let Rows { memory, view } = rows;
            for at in ring(view, slot, alive.clone()) {
                let (mine, rest) = bytes.split_at(at.len());
                memory[at].copy_from_slice(mine);
                bytes = rest;
            }
        }
    }
}

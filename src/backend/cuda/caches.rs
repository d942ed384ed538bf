//! Pools and windows in device memory.
use std::ops::Range;

use ggml_kernels::contracts::{CLSA_F16, CLSA_F32, CLSA_Q8_0, clsa_rows};
use ggml_kernels::cuda::{Buffer, Device, Stream};

use crate::cache::{CacheSpec, CacheType, PAGE, pools, ring_len};
use crate::config::Config;
use crate::error::{Error, Result};

/// All cached rows of a GPU.
pub struct Caches {
    /// In the order of [`pools`].
    pools: Vec<Rows>,
    /// K and V of each self layer; empty for a Transformer.
    windows: Vec<(Rows, Rows)>,
    window: usize,
}

/// Rows of one kind, and the memory they lie in.
struct Rows {
    memory: Buffer<u8>,
    view: clsa_rows,
}

// SAFETY: `view.base` is a device address into `memory`, which moves with it.
unsafe impl Send for Rows {}

/// The number of a cache type in `enum clsa_type`.
pub fn type_number(ty: CacheType) -> u32 {
    match ty {
        CacheType::F32 => CLSA_F32,
        CacheType::F16 => CLSA_F16,
        CacheType::Q8_0 => CLSA_Q8_0,
    }
}

impl Rows {
    fn new(
        device: &Device,
        ty: CacheType,
        width: usize,
        count: usize,
        per_page: usize,
        ring: usize,
    ) -> Result<Self> {
        if ty == CacheType::Q8_0 && !width.is_multiple_of(32) {
            return Err(Error::Input(format!(
                "a q8_0 cache needs rows divisible by 32, found rows of {width} values: use f16"
            )));
        }
        let row_stride = ty.row_bytes(width);
        let page_stride = row_stride * per_page;
        let bytes = page_stride * count;
        // Zeros: rows never written are masked, but kernels may load them beside others.
        let memory = device.zeros::<u8>(bytes)?;
        let view = clsa_rows {
            base: memory.ptr(),
            row_stride,
            page_stride,
            type_: type_number(ty) as i32,
            width: width as i32,
            ring: ring as i32,
            reserved: 0,
            bytes,
        };
        Ok(Self { memory, view })
    }

    fn page(&self, page: u32) -> usize {
        page as usize * self.view.page_stride
    }
}

/// Byte ranges of ring positions in increasing position, neighbours joined.
fn ring(view: &clsa_rows, slot: u32, positions: Range<usize>) -> Vec<Range<usize>> {
    let clsa_rows { row_stride, page_stride, ring, .. } = *view;
    let at = |p: usize| slot as usize * page_stride + p % ring as usize * row_stride;
    let mut ranges: Vec<Range<usize>> = vec![];
    for p in positions {
        match ranges.last_mut() {
            Some(last) if last.end == at(p) && p % ring as usize != 0 => last.end += row_stride,
            _ => ranges.push(at(p)..at(p) + row_stride),
        }
    }
    ranges
}

impl Caches {
    pub fn new(device: &Device, c: &Config, spec: &CacheSpec) -> Result<Self> {
        let pools = pools(c, spec)
            .iter()
            .map(|p| Rows::new(device, p.cache_type, p.width, spec.n_pages, PAGE, 0))
            .collect::<Result<_>>()?;
        let width = c.self_heads.kv_width();
        let windows = match c.window {
            None => vec![],
            Some(window) => {
                let ring = ring_len(window, spec.max_rows);
                let rows = |ty| Rows::new(device, ty, width, spec.n_slots, ring, ring);
                (0..c.n_self).map(|_| Ok((rows(spec.k)?, rows(spec.v)?))).collect::<Result<_>>()?
            }
        };
        Ok(Self { pools, windows, window: c.window.unwrap_or(0) })
    }

    pub fn bytes(&self) -> u64 {
        let windows = self.windows.iter().flat_map(|(k, v)| [k, v]);
        self.pools.iter().chain(windows).map(|r| r.memory.bytes() as u64).sum()
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

    pub fn copy_page(&mut self, from: u32, to: u32, stream: &Stream) -> Result<()> {
        for pool in &mut self.pools {
            let (from, to, len) = (pool.page(from), pool.page(to), pool.view.page_stride);
            pool.memory.copy_within_async(from, to, len, stream)?;
        }
        Ok(stream.synchronize()?)
    }

    pub fn read_page(&self, page: u32, rows: usize, out: &mut Vec<u8>) -> Result<()> {
        for pool in &self.pools {
            let start = out.len();
            out.resize(start + rows * pool.view.row_stride, 0);
            pool.memory.read(pool.page(page), &mut out[start..])?;
        }
        Ok(())
    }

    pub fn write_page(&mut self, page: u32, rows: usize, mut bytes: &[u8]) -> Result<()> {
        for pool in &mut self.pools {
            let at = pool.page(page);
            let (mine, rest) = bytes.split_at(rows * pool.view.row_stride);
            pool.memory.write(at, mine)?;
            bytes = rest;
        }
        Ok(())
    }

    /// Positions whose window rows a sequence of `len` positions still needs.
    fn alive(&self, len: usize) -> Range<usize> {
        (len + 1).saturating_sub(self.window)..len
    }

    pub fn save_window(&self, slot: u32, len: usize) -> Result<Vec<u8>> {
        let mut out = vec![];
        for rows in self.windows.iter().flat_map(|(k, v)| [k, v]) {
            for at in ring(&rows.view, slot, self.alive(len)) {
                let start = out.len();
                out.resize(start + at.len(), 0);
                rows.memory.read(at.start, &mut out[start..])?;
            }
        }
        Ok(out)
    }

    pub fn load_window(&mut self, slot: u32, len: usize, mut bytes: &[u8]) -> Result<()> {
        let alive = self.alive(len);
        for rows in self.windows.iter_mut().flat_map(|(k, v)| [k, v]) {
            for at in ring(&rows.view, slot, alive.clone()) {
                let (mine, rest) = bytes.split_at(at.len());
                rows.memory.write(at.start, mine)?;
                bytes = rest;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_read_in_at_most_two_pieces() {
        let view = clsa_rows { row_stride: 10, page_stride: 80, ring: 8, ..Default::default() };
        assert_eq!(ring(&view, 0, 0..8), vec![0..80]);
        assert_eq!(ring(&view, 1, 5..11), vec![130..160, 80..110]);
        assert_eq!(ring(&view, 2, 3..3), Vec::<Range<usize>>::new());
    }
}

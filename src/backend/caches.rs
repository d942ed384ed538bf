//! Pools and windows of cached rows, whatever memory they lie in.
use std::ops::Range;

use ggml_kernels::contracts::{CLSA_F16, CLSA_F32, CLSA_Q8_0, clsa_rows};

use super::Batch;
use crate::cache::{CacheSpec, CacheType, PAGE, PageTables, Pool, PoolKind, pools_of, ring_len};
use crate::config::Config;
use crate::error::{Error, Result};

/// Memory that cached rows lie in. Ranges are within its length.
pub trait Store {
    /// Where the backend's kernels find it.
    fn base(&self) -> *mut u8;
    /// Bytes of it.
    fn bytes(&self) -> usize;
    /// Copies out.
    fn read(&self, at: usize, out: &mut [u8]) -> Result<()>;
    /// Copies in.
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()>;
    /// Copies within; the ranges do not overlap.
    fn copy_within(&mut self, from: usize, to: usize, len: usize) -> Result<()>;
}

/// All cached rows of a backend with some layers of a model.
pub struct Caches<S> {
    /// In the order of [`pools_of`].
    pools: Vec<(Pool, Rows<S>)>,
    /// K and V of each self layer; empty for a Transformer.
    windows: Vec<(Rows<S>, Rows<S>)>,
    window: usize,
    first_layer: usize,
}

/// Rows of one kind, and the memory they lie in.
struct Rows<S> {
    memory: S,
    view: clsa_rows,
}

// SAFETY: `view.base` is an address into `memory`, which moves with it and is only written by kernels that a &mut backend runs.
unsafe impl<S: Send> Send for Rows<S> {}

/// The number of a cache type in `enum clsa_type`.
#[must_use]
pub fn type_number(ty: CacheType) -> u32 {
    match ty {
        CacheType::F32 => CLSA_F32,
        CacheType::F16 => CLSA_F16,
        CacheType::Q8_0 => CLSA_Q8_0,
    }
}

impl<S: Store> Rows<S> {
    fn new(
        ty: CacheType,
        width: usize,
        count: usize,
        per_page: usize,
        ring: usize,
        make: impl FnOnce(usize) -> Result<S>,
    ) -> Result<Self> {
        if ty == CacheType::Q8_0 && !width.is_multiple_of(32) {
            return Err(Error::Input(format!(
                "a q8_0 cache needs rows divisible by 32, found rows of {width} values: use f16"
            )));
        }
        let row_stride = ty.row_bytes(width);
        let page_stride = row_stride * per_page;
        let bytes = page_stride * count;
        let memory = make(bytes)?;
        let view = clsa_rows {
            base: memory.base(),
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

    fn append_to(&self, at: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        let start = out.len();
        out.resize(start + at.len(), 0);
        self.memory.read(at.start, &mut out[start..])
    }

    /// Writes the front of `bytes` and returns the rest.
    fn take_from<'a>(&mut self, at: Range<usize>, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let (mine, rest) = bytes.split_at(at.len());
        self.memory.write(at.start, mine)?;
        Ok(rest)
    }
}

/// Byte ranges of rows, neighbours joined.
fn joined(starts: impl Iterator<Item = usize>, row_stride: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = vec![];
    for at in starts {
        match ranges.last_mut() {
            Some(last) if last.end == at => last.end += row_stride,
            _ => ranges.push(at..at + row_stride),
        }
    }
    ranges
}

/// Byte ranges of ring positions in increasing position.
fn ring(view: &clsa_rows, slot: u32, positions: Range<usize>) -> Vec<Range<usize>> {
    let clsa_rows { row_stride, page_stride, ring, .. } = *view;
    let at = |p: usize| slot as usize * page_stride + p % ring as usize * row_stride;
    joined(positions.map(at), row_stride)
}

/// Byte ranges of a batch's rows in a pool, in the order of the batch.
fn appended(view: &clsa_rows, batch: &Batch, tables: &PageTables) -> Vec<Range<usize>> {
    let at = |(&slot, &pos): (&u32, &u32)| {
        let page = tables.entries[slot as usize * tables.stride + pos as usize / PAGE];
        page as usize * view.page_stride + pos as usize % PAGE * view.row_stride
    };
    joined(batch.slot.iter().zip(&batch.pos).map(at), view.row_stride)
}

impl<S: Store> Caches<S> {
    /// The caches of `layers`, in memory that `make` gives for a pool of that kind, or for windows, of so many bytes.
    pub fn new(
        c: &Config,
        spec: &CacheSpec,
        layers: &Range<usize>,
        make: impl Fn(Option<PoolKind>, usize) -> Result<S>,
    ) -> Result<Self> {
        let pools = pools_of(c, spec, layers)
            .into_iter()
            .map(|p| {
                let rows =
                    Rows::new(p.cache_type, p.width, spec.n_pages, PAGE, 0, |n| make(Some(p.kind), n))?;
                Ok((p, rows))
            })
            .collect::<Result<_>>()?;
        let width = c.self_heads.kv_width();
        let windows = match c.window {
            None => vec![],
            Some(window) => {
                let ring = ring_len(window, spec.max_rows);
                let rows = |ty| Rows::new(ty, width, spec.n_slots, ring, ring, |n| make(None, n));
                let own = layers.start..layers.end.min(c.n_self);
                own.map(|_| Ok((rows(spec.k)?, rows(spec.v)?))).collect::<Result<_>>()?
            }
        };
        Ok(Self { pools, windows, window: c.window.unwrap_or(0), first_layer: layers.start })
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let windows = self.windows.iter().flat_map(|(k, v)| [k, v]);
        self.pools.iter().map(|(_, r)| r).chain(windows).map(|r| r.memory.bytes() as u64).sum()
    }

    /// K and V of the shared memory.
    pub fn shared(&self) -> (clsa_rows, clsa_rows) {
        (self.pools[0].1.view, self.pools[1].1.view)
    }

    /// Index keys.
    pub fn index(&self) -> clsa_rows {
        self.pools[2].1.view
    }

    /// K and V that self layer `i` attends to: its window, or a Transformer layer's own pools.
    pub fn layer(&self, i: usize) -> (clsa_rows, clsa_rows) {
        let i = i - self.first_layer;
        match self.windows.get(i) {
            Some((k, v)) => (k.view, v.view),
            None => (self.pools[2 * i].1.view, self.pools[2 * i + 1].1.view),
        }
    }

    /// [`super::Backend::copy_page`]
    pub fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        for (_, pool) in &mut self.pools {
            let (from, to, len) = (pool.page(from), pool.page(to), pool.view.page_stride);
            pool.memory.copy_within(from, to, len)?;
        }
        Ok(())
    }

    /// [`super::Backend::read_page`]
    pub fn read_page(&self, page: u32, rows: usize, out: &mut Vec<u8>) -> Result<()> {
        for (_, pool) in &self.pools {
            let start = pool.page(page);
            pool.append_to(start..start + rows * pool.view.row_stride, out)?;
        }
        Ok(())
    }

    /// [`super::Backend::write_page`]
    pub fn write_page(&mut self, page: u32, rows: usize, mut bytes: &[u8]) -> Result<()> {
        for (_, pool) in &mut self.pools {
            let start = pool.page(page);
            bytes = pool.take_from(start..start + rows * pool.view.row_stride, bytes)?;
        }
        Ok(())
    }

    /// [`super::Part::read_rows`]
    pub fn read_rows(&self, batch: &Batch, tables: &PageTables, out: &mut Vec<u8>) -> Result<()> {
        for (_, pool) in self.pools.iter().filter(|(p, _)| p.kind != PoolKind::Index) {
            for at in appended(&pool.view, batch, tables) {
                pool.append_to(at, out)?;
            }
        }
        Ok(())
    }

    /// [`super::Part::write_rows`]
    pub fn write_rows(&mut self, batch: &Batch, tables: &PageTables, mut bytes: &[u8]) -> Result<()> {
        for (_, pool) in self.pools.iter_mut().filter(|(p, _)| p.kind != PoolKind::Index) {
            for at in appended(&pool.view, batch, tables) {
                bytes = pool.take_from(at, bytes)?;
            }
        }
        Ok(())
    }

    /// Positions whose window rows a sequence of `len` positions still needs.
    fn alive(&self, len: usize) -> Range<usize> {
        (len + 1).saturating_sub(self.window)..len
    }

    /// [`super::Backend::save_window`]
    pub fn save_window(&self, slot: u32, len: usize) -> Result<Vec<u8>> {
        let alive = self.alive(len).len();
        let bytes = |(k, v): &(Rows<_>, Rows<_>)| alive * (k.view.row_stride + v.view.row_stride);
        let mut out = Vec::with_capacity(self.windows.iter().map(bytes).sum());
        for rows in self.windows.iter().flat_map(|(k, v)| [k, v]) {
            for at in ring(&rows.view, slot, self.alive(len)) {
                rows.append_to(at, &mut out)?;
            }
        }
        Ok(out)
    }

    /// [`super::Backend::load_window`]
    pub fn load_window(&mut self, slot: u32, len: usize, mut bytes: &[u8]) -> Result<()> {
        let alive = self.alive(len);
        for rows in self.windows.iter_mut().flat_map(|(k, v)| [k, v]) {
            for at in ring(&rows.view, slot, alive.clone()) {
                bytes = rows.take_from(at, bytes)?;
            }
        }
        Ok(())
    }

    /// [`super::Backend::copy_window`]
    pub fn copy_window(&mut self, from: u32, to: u32, len: usize) -> Result<()> {
        let alive = self.alive(len);
        for rows in self.windows.iter_mut().flat_map(|(k, v)| [k, v]) {
            let pieces = |slot| ring(&rows.view, slot, alive.clone());
            for (from, to) in pieces(from).into_iter().zip(pieces(to)) {
                rows.memory.copy_within(from.start, to.start, from.len())?;
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

    #[test]
    fn rows_of_a_batch_are_found_through_the_page_tables() {
        let view = clsa_rows { row_stride: 10, page_stride: 10 * PAGE, ..Default::default() };
        let tables = PageTables { stride: 2, entries: vec![3, 1, 0, 0] };
        let page = PAGE as u32;
        let batch =
            Batch { pos: vec![page - 2, page - 1, page, 5], slot: vec![0, 0, 0, 1], ..Batch::default() };
        let at = |page: usize, row: usize| (page * PAGE + row) * 10;
        let want = vec![at(3, PAGE - 2)..at(4, 0), at(1, 0)..at(1, 1), at(0, 5)..at(0, 6)];
        assert_eq!(appended(&view, &batch, &tables), want);
    }
}

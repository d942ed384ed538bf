//! Caches and batches to try the kernels on: paged pools with pages out of order, rings, several sequences, every cache type.
use ggml_kernels::contracts::*;
use ggml_kernels::ops::{Op, Ops, Scratch, run_team};
use half::f16;
use memmap2::MmapMut;

/// A small deterministic generator (xorshift64*).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
    /// About normal: a sum of four uniforms, variance 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| (self.next() >> 40) as f32 / (1u32 << 24) as f32 - 0.5).sum();
        sum * 3f32.sqrt()
    }
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

pub const TYPES: [u32; 3] = [CLSA_F32, CLSA_F16, CLSA_Q8_0];

/// Bytes of a row, and what reading it back gives.
pub fn encode(values: &[f32], cache_type: u32) -> (Vec<u8>, Vec<f32>) {
    match cache_type {
        CLSA_F32 => (values.iter().flat_map(|x| x.to_le_bytes()).collect(), values.to_vec()),
        CLSA_F16 => {
            let half: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            (half.iter().flat_map(|x| x.to_le_bytes()).collect(), half.iter().map(|x| x.to_f32()).collect())
        }
        _ => {
            let (mut bytes, mut read) = (Vec::new(), Vec::new());
            for block in values.chunks(32) {
                let d = block.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
                let inverse = if d >= f32::MIN_POSITIVE { 1.0 / d } else { 0.0 };
                let half = f16::from_f32(d);
                bytes.extend(half.to_le_bytes());
                for x in block {
                    let q = (x * inverse).round_ties_even() as i8;
                    bytes.push(q as u8);
                    read.push(half.to_f32() * f32::from(q));
                }
            }
            (bytes, read)
        }
    }
}

/// Memory of a pool, aligned, with odd strides.
pub struct Pool {
    memory: MmapMut,
    pub rows: clsa_rows,
}

impl Pool {
    /// `ring` 0: paged, `units` pages; otherwise `units` rings.
    pub fn new(rng: &mut Rng, cache_type: u32, width: usize, ring: usize, units: usize) -> Self {
        let row_gap = 4 * rng.below(5);
        let page_gap = 4 * rng.below(5);
        Self::with_gaps(cache_type, width, ring, units, row_gap, page_gap)
    }
    /// As a cache is laid out in earnest (for benchmarks).
    #[allow(dead_code)]
    pub fn tight(cache_type: u32, width: usize, ring: usize, units: usize) -> Self {
        Self::with_gaps(cache_type, width, ring, units, 0, 0)
    }
    fn with_gaps(
        cache_type: u32,
        width: usize,
        ring: usize,
        units: usize,
        row_gap: usize,
        page_gap: usize,
    ) -> Self {
        let row_stride = encode(&vec![0.0; width], cache_type).0.len() + row_gap;
        let held = if ring > 0 { ring } else { CLSA_PAGE as usize };
        let page_stride = held * row_stride + page_gap;
        let mut memory = MmapMut::map_anon((units * page_stride).next_multiple_of(8)).unwrap();
        #[cfg(target_os = "linux")]
        memory.advise(memmap2::Advice::HugePage).unwrap();
        memory.fill(u8::MAX); // rows that were never written hold NaN in every type, so that reading one shows
        let rows = clsa_rows {
            base: memory.as_mut_ptr(),
            row_stride,
            page_stride,
            type_: cache_type as i32,
            width: width as i32,
            ring: ring as i32,
            reserved: 0,
            bytes: memory.len(),
        };
        Self { memory, rows }
    }
    fn at(&self, batch: &Batch, slot: usize, pos: usize) -> usize {
        let r = &self.rows;
        if r.ring > 0 {
            return slot * r.page_stride + pos % r.ring as usize * r.row_stride;
        }
        let page = batch.tables[slot * batch.stride + pos / CLSA_PAGE as usize] as usize;
        page * r.page_stride + pos % CLSA_PAGE as usize * r.row_stride
    }
    /// All of the memory (for benchmarks).
    #[allow(dead_code)]
    pub fn bytes(&self) -> &[u8] {
        &self.memory
    }
    pub fn read(&mut self, batch: &Batch, slot: usize, pos: usize, bytes: usize) -> Vec<u8> {
        let at = self.at(batch, slot, pos);
        self.memory[at..at + bytes].to_vec()
    }
    /// Stores a row; returns what reading it back gives.
    pub fn write(&mut self, batch: &Batch, slot: usize, pos: usize, values: &[f32]) -> Vec<f32> {
        let (bytes, read) = encode(values, self.rows.type_ as u32);
        self.put(batch, slot, pos, &bytes);
        read
    }
    /// Stores the bytes of a row.
    pub fn put(&mut self, batch: &Batch, slot: usize, pos: usize, bytes: &[u8]) {
        let at = self.at(batch, slot, pos);
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }
    /// Fills positions `from..to` of a sequence with random rows; returns them, `[to][width]` with zeros before `from`.
    pub fn fill(&mut self, rng: &mut Rng, batch: &Batch, slot: usize, from: usize, to: usize) -> Vec<f32> {
        let width = self.rows.width as usize;
        let mut all = vec![0.0; from * width];
        for pos in from..to {
            let values = rng.normals(width);
            all.extend(self.write(batch, slot, pos, &values));
        }
        all
    }
}

/// Rows of a batch over page tables that are out of order.
#[derive(Clone)]
pub struct Batch {
    pub pos: Vec<i32>,
    pub slot: Vec<i32>,
    pub tables: Vec<u32>,
    pub stride: usize,
    pub n_slots: usize,
}

impl Batch {
    /// Sequences as (first position, number of rows), each in a slot of its own, in random order of slots.
    pub fn new(rng: &mut Rng, sequences: &[(usize, usize)]) -> Self {
        let longest = sequences.iter().map(|(first, n)| first + n).max().unwrap();
        let stride = longest.div_ceil(CLSA_PAGE as usize) + rng.below(2);
        let n_slots = sequences.len() + rng.below(2);
        let mut tables: Vec<u32> = (0..(n_slots * stride) as u32).collect();
        shuffle(rng, &mut tables);
        let mut slots: Vec<i32> = (0..n_slots as i32).collect();
        shuffle(rng, &mut slots);
        let (mut pos, mut slot) = (vec![], vec![]);
        for (&(first, n), &s) in sequences.iter().zip(&slots) {
            pos.extend(first as i32..(first + n) as i32);
            slot.extend(std::iter::repeat_n(s, n));
        }
        Self { pos, slot, tables, stride, n_slots }
    }
    pub fn n_pages(&self) -> usize {
        self.tables.len()
    }
    pub fn n_rows(&self) -> usize {
        self.pos.len()
    }
    /// Rows `rows` of the batch alone.
    pub fn part(&self, rows: std::ops::Range<usize>) -> Self {
        Self { pos: self.pos[rows.clone()].to_vec(), slot: self.slot[rows].to_vec(), ..self.clone() }
    }
    pub fn raw(&self) -> clsa_batch {
        clsa_batch {
            n_rows: self.pos.len() as i32,
            table_stride: self.stride as i32,
            n_slots: self.n_slots as i32,
            reserved: 0,
            pos: self.pos.as_ptr(),
            slot: self.slot.as_ptr(),
            tables: self.tables.as_ptr(),
        }
    }
}

pub fn shuffle<T>(rng: &mut Rng, of: &mut [T]) {
    for i in (1..of.len()).rev() {
        of.swap(i, rng.below(i + 1));
    }
}

/// Runs an op whose pointers the caller keeps alive.
pub fn run<P: Op>(ops: &Ops, p: &P, nth: usize) {
    p.check().unwrap();
    let scratch = Scratch::of(p, nth);
    // SAFETY: the tests fill every pointer of `p` with vectors of the stated shapes that outlive this call.
    unsafe { run_team(ops, p, nth, &scratch) };
}

/// Largest difference over the largest value.
pub fn relative_error(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let scale = wanted.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    found
        .iter()
        .zip(wanted)
        .fold(0f32, |m, (a, b)| if (a - b).is_nan() { f32::NAN } else { m.max((a - b).abs()) })
        / scale
}

/// The bits, for comparisons that must be exact.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// One head of attention in f64 over the keys `s` in `keys`, rows of `width` values, at dimensions `from..from + d`.
pub fn softmax_head(
    q: &[f32],
    scale: f32,
    k: &[f32],
    v: &[f32],
    width: usize,
    from: usize,
    keys: impl Iterator<Item = usize> + Clone,
) -> Vec<f32> {
    let d = q.len();
    let row = |of: &'_ [f32], s: usize| -> Vec<f64> {
        of[s * width + from..s * width + from + d].iter().map(|&x| f64::from(x)).collect()
    };
    let score: Vec<f64> = keys
        .clone()
        .map(|s| row(k, s).iter().zip(q).map(|(a, &b)| a * f64::from(b)).sum::<f64>() * f64::from(scale))
        .collect();
    let max = score.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut sum, mut out) = (0.0, vec![0.0; d]);
    for (s, x) in keys.zip(score) {
        let e = (x - max).exp();
        sum += e;
        for (o, x) in out.iter_mut().zip(row(v, s)) {
            *o += e * x;
        }
    }
    out.iter().map(|x| (x / sum) as f32).collect()
}

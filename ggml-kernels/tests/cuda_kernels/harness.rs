//! Where a kernel test runs, memory on both sides, random data, and the pools of cache rows.
use ggml_kernels::contracts::*;
use ggml_kernels::cuda::ops::Executor;
use ggml_kernels::cuda::{Buffer, Device, Launch, Pod, Result, Stream};
use ggml_kernels::ops::{Op, Ops, Scratch, run_team};
use ggml_kernels::simd::Level;

/// A place that runs kernels.
pub enum Target {
    /// The first GPU.
    Gpu(Device, Stream),
    /// The CPU emulator, threads in order or backwards.
    #[cfg(feature = "cuda-emulator")]
    Emulator {
        /// Blocks, warps and lanes in the opposite order.
        backwards: bool,
    },
}

/// Runs `test` on the GPU, if there is one, and on the emulator, if it is built in.
pub fn on_each_target(test: impl Fn(&Target)) {
    match Device::open(0).and_then(|d| d.stream().map(|s| Target::Gpu(d, s))) {
        Ok(gpu) => test(&gpu),
        Err(e) => eprintln!("skipped on the GPU: {e}"),
    }
    #[cfg(feature = "cuda-emulator")]
    {
        static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for backwards in [false, true] {
            test(&Target::Emulator { backwards });
        }
    }
    #[cfg(not(feature = "cuda-emulator"))]
    eprintln!("skipped on the emulator: it needs --features cuda-emulator");
}

#[cfg(feature = "cuda-emulator")]
unsafe extern "C" {
    fn clsa_emulate(
        name: *const std::ffi::c_char,
        grid: *const u32,
        block: *const u32,
        shared: usize,
        params: *const std::ffi::c_void,
        backwards: std::ffi::c_int,
    ) -> std::ffi::c_int;
    fn clsa_emulate_alloc(bytes: usize) -> *mut u8;
    fn clsa_emulate_free(p: *mut u8, bytes: usize);
}

impl Executor for Target {
    fn multiprocessors(&self) -> usize {
        match self {
            Self::Gpu(_, stream) => stream.multiprocessors(),
            // Few, so that blocks take several turns.
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator { .. } => 3,
        }
    }
    fn has(&self, name: &str) -> bool {
        match self {
            Self::Gpu(_, stream) => stream.has(name),
            // What one architecture alone can do has no second definition.
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator { .. } => name != "attention_prefill_hopper",
        }
    }
    unsafe fn run<P: Copy>(&self, name: &str, launch: Launch, params: &P) -> Result<()> {
        match self {
            // SAFETY: the caller's.
            Self::Gpu(_, stream) => unsafe { stream.run(name, launch, params) },
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator { backwards } => {
                let c_name = std::ffi::CString::new(name).expect("kernel name");
                // SAFETY: the parameter struct outlives the call; the rest is the caller's.
                let status = unsafe {
                    clsa_emulate(
                        c_name.as_ptr(),
                        launch.grid.as_ptr(),
                        launch.block.as_ptr(),
                        launch.shared,
                        std::ptr::from_ref(params).cast(),
                        (*backwards).into(),
                    )
                };
                assert_eq!(status, 0, "{name} on the emulator: 1 no such kernel or shape, 2 deadlock");
                Ok(())
            }
        }
    }
}

impl Target {
    pub fn wait(&self) {
        match self {
            Self::Gpu(_, stream) => stream.synchronize().expect("kernels ran"),
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator { .. } => {}
        }
    }
}

enum Memory<T: Pod> {
    Gpu(Buffer<T>),
    #[cfg(feature = "cuda-emulator")]
    Guarded(*mut T),
}

/// Values on the host and on the target.
pub struct Dual<T: Pod + Default> {
    pub host: Vec<T>,
    device: Memory<T>,
}

impl<T: Pod + Default> Dual<T> {
    pub fn new(target: &Target, host: Vec<T>) -> Self {
        let device = match target {
            Target::Gpu(device, _) => Memory::Gpu(device.upload(&host).expect("upload")),
            #[cfg(feature = "cuda-emulator")]
            Target::Emulator { .. } => {
                // SAFETY: the allocation holds the values, which are plain.
                unsafe {
                    let p = clsa_emulate_alloc(size_of_val(&host[..])).cast::<T>();
                    std::ptr::copy_nonoverlapping(host.as_ptr(), p, host.len());
                    Memory::Guarded(p)
                }
            }
        };
        Self { host, device }
    }
    /// Memory of `len` values for results: every byte 0xff, NaN as a float.
    pub fn poisoned(target: &Target, len: usize) -> Self {
        let mut host = vec![T::default(); len];
        // SAFETY: any bit pattern is a T.
        unsafe { std::ptr::write_bytes(host.as_mut_ptr(), 0xff, len) };
        Self::new(target, host)
    }
    /// Address for the CPU's kernels.
    pub fn h(&mut self) -> *mut T {
        self.host.as_mut_ptr()
    }
    /// Address for the target's kernels.
    pub fn d(&self) -> *mut T {
        match &self.device {
            Memory::Gpu(b) => b.ptr(),
            #[cfg(feature = "cuda-emulator")]
            Memory::Guarded(p) => *p,
        }
    }
    /// What the target's memory holds now.
    pub fn fetch(&self) -> Vec<T> {
        match &self.device {
            Memory::Gpu(b) => b.to_vec().expect("download"),
            #[cfg(feature = "cuda-emulator")]
            // SAFETY: the allocation holds as many values as `host`.
            Memory::Guarded(p) => unsafe { std::slice::from_raw_parts(*p, self.host.len()) }.to_vec(),
        }
    }
}

impl<T: Pod + Default> Drop for Dual<T> {
    fn drop(&mut self) {
        #[cfg(feature = "cuda-emulator")]
        if let Memory::Guarded(p) = self.device {
            // SAFETY: made by `clsa_emulate_alloc` with the same size.
            unsafe { clsa_emulate_free(p.cast(), size_of_val(&self.host[..])) }
        }
    }
}

/// Small deterministic generator (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }
    /// In 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.bits()) * n as u64) >> 32) as usize
    }
    /// About normal, mean 0, deviation 1.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.bits() as f32 / 4_294_967_296.0).sum::<f32>() - 6.0
    }
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// Bytes of `width` values of a type.
pub fn row_bytes(kind: u32, width: usize) -> usize {
    match kind {
        CLSA_F32 => width * 4,
        CLSA_F16 => width * 2,
        _ => width / 32 * 34,
    }
}

/// Stores values as the cache does.
pub fn encode(kind: u32, values: &[f32], out: &mut [u8]) {
    match kind {
        CLSA_F32 => out.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes()),
        CLSA_F16 => out
            .as_chunks_mut::<2>()
            .0
            .iter_mut()
            .zip(values)
            .for_each(|(o, v)| *o = half::f16::from_f32(*v).to_le_bytes()),
        _ => {
            for (block, x) in out.chunks_exact_mut(34).zip(values.chunks_exact(32)) {
                let d = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                block[..2].copy_from_slice(&half::f16::from_f32(d).to_le_bytes());
                for (o, v) in block[2..].iter_mut().zip(x) {
                    *o = if d == 0.0 { 0 } else { (v / d).round_ties_even() as i8 as u8 };
                }
            }
        }
    }
}

/// A pool of rows on both sides, with what its description says.
pub struct Pool {
    bytes: Dual<u64>,
    desc: clsa_rows,
}

impl Pool {
    /// `units` pages (or slots' rings of `ring` positions) of rows of `width` values. Every byte is 0xff.
    pub fn new(target: &Target, kind: u32, width: usize, units: usize, ring: usize) -> Self {
        let row_stride = row_bytes(kind, width);
        let page_stride = row_stride * if ring > 0 { ring } else { CLSA_PAGE as usize };
        let desc = clsa_rows {
            row_stride,
            page_stride,
            type_: kind as i32,
            width: width as i32,
            ring: ring as i32,
            bytes: page_stride * units,
            ..Default::default()
        };
        Self { bytes: Dual::poisoned(target, (page_stride * units).div_ceil(8)), desc }
    }
    pub fn host(&mut self) -> clsa_rows {
        clsa_rows { base: self.bytes.h().cast(), ..self.desc }
    }
    pub fn device(&self) -> clsa_rows {
        clsa_rows { base: self.bytes.d().cast(), ..self.desc }
    }
    /// Fills the row of `pos` on the host side; [`Self::upload`] carries it over.
    pub fn set(&mut self, tables: &[u32], table_stride: usize, slot: usize, pos: usize, values: &[f32]) {
        let d = self.desc;
        let (unit, row) = if d.ring > 0 {
            (slot, pos % d.ring as usize)
        } else {
            (tables[slot * table_stride + pos / 256] as usize, pos % 256)
        };
        let at = unit * d.page_stride + row * d.row_stride;
        // SAFETY: plain bytes of the vector.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(
                self.bytes.host.as_mut_ptr().cast::<u8>(),
                self.bytes.host.len() * 8,
            )
        };
        encode(d.type_ as u32, values, &mut bytes[at..at + d.row_stride]);
    }
    /// Fills every f16 of the pool at random: magnitudes 0.5 to 1, either sign.
    #[allow(dead_code)] // benches/cuda_ops.rs uses it
    pub fn fill_f16(&mut self, target: &Target, random: &mut Random) {
        assert_eq!(self.desc.type_, CLSA_F16 as i32);
        for word in &mut self.bytes.host {
            let bits = u64::from(random.bits()) << 32 | u64::from(random.bits());
            *word = (bits & 0x83ff_83ff_83ff_83ff) | 0x3800_3800_3800_3800;
        }
        self.upload(target);
    }
    pub fn upload(&mut self, target: &Target) {
        let host = std::mem::take(&mut self.bytes.host);
        self.bytes = Dual::new(target, host);
    }
    /// Bytes of both sides.
    pub fn both(&self) -> (&[u64], Vec<u64>) {
        (&self.bytes.host, self.bytes.fetch())
    }
}

/// Sequences of given lengths with shuffled pages, and the rows of a batch.
pub struct Sequences {
    pub lens: Vec<usize>,
    pub table_stride: usize,
    pub n_pages: usize,
    pub tables: Dual<u32>,
    pub pos: Dual<i32>,
    pub slot: Dual<i32>,
}

impl Sequences {
    /// Slot s holds `lens[s]` positions; `rows` are (slot, position).
    pub fn new(target: &Target, random: &mut Random, lens: &[usize], rows: &[(usize, usize)]) -> Self {
        let pages = |len: usize| len.div_ceil(256);
        let n_pages: usize = lens.iter().map(|&l| pages(l)).sum();
        let mut order: Vec<u32> = (0..n_pages as u32).collect();
        for i in (1..n_pages).rev() {
            order.swap(i, random.below(i + 1));
        }
        let table_stride = lens.iter().map(|&l| pages(l)).max().unwrap_or(0).max(1);
        let mut tables = vec![0; table_stride * lens.len()];
        let mut next = order.into_iter();
        for (s, &len) in lens.iter().enumerate() {
            for entry in &mut tables[s * table_stride..][..pages(len)] {
                *entry = next.next().expect("as many as counted");
            }
        }
        Self {
            lens: lens.to_vec(),
            table_stride,
            n_pages,
            tables: Dual::new(target, tables),
            pos: Dual::new(target, rows.iter().map(|r| r.1 as i32).collect()),
            slot: Dual::new(target, rows.iter().map(|r| r.0 as i32).collect()),
        }
    }
    fn batch(&self) -> clsa_batch {
        clsa_batch {
            n_rows: self.pos.host.len() as i32,
            table_stride: self.table_stride as i32,
            n_slots: self.lens.len() as i32,
            ..Default::default()
        }
    }
    pub fn host(&mut self) -> clsa_batch {
        clsa_batch { pos: self.pos.h(), slot: self.slot.h(), tables: self.tables.h(), ..self.batch() }
    }
    pub fn device(&self) -> clsa_batch {
        clsa_batch { pos: self.pos.d(), slot: self.slot.d(), tables: self.tables.d(), ..self.batch() }
    }
    /// A pool with every position of every sequence filled by `value(slot, pos)`.
    pub fn pool(
        &self,
        target: &Target,
        kind: u32,
        width: usize,
        ring: usize,
        mut values: impl FnMut(usize, usize) -> Vec<f32>,
    ) -> Pool {
        let units = if ring > 0 { self.lens.len() } else { self.n_pages };
        let mut pool = Pool::new(target, kind, width, units, ring);
        for (slot, &len) in self.lens.iter().enumerate() {
            let first = if ring > 0 { len.saturating_sub(ring) } else { 0 };
            for pos in first..len {
                pool.set(&self.tables.host, self.table_stride, slot, pos, &values(slot, pos));
            }
        }
        pool.upload(target);
        pool
    }
}

/// Runs the scalar reference of an op on host memory.
pub fn reference<P: Op>(p: &P) {
    p.check().expect("shape");
    let ops = Ops::at(Level::Ref).expect("the references run everywhere");
    // SAFETY: checked, and the tests' buffers have the shapes they state.
    unsafe { run_team(ops, p, 1, &Scratch::of(p, 1)) };
}

/// Largest difference, relative to the norm of the reference per row of `width`; NaN counts as infinite.
pub fn relative_error(out: &[f32], reference: &[f32], width: usize) -> f32 {
    assert_eq!(out.len(), reference.len());
    let mut worst = 0f32;
    for (o, r) in out.chunks(width).zip(reference.chunks(width)) {
        let error: f32 = o.iter().zip(r).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
        let norm: f32 = r.iter().map(|b| b * b).sum::<f32>().sqrt();
        let relative = error / norm.max(1e-20);
        worst = if relative.is_nan() { f32::INFINITY } else { worst.max(relative) };
    }
    worst
}

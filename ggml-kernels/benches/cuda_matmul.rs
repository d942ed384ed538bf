//! The matrix kernels in the order of a decode step of the 4B shape, as one CUDA graph: bytes, the limit they give, the time.
//! The first product is checked before anything is timed. `cargo bench --bench cuda_matmul [-- TYPE ...]`
use ggml_kernels::cuda::limits;
use ggml_kernels::cuda::matmul::{self, Mode, Packed, Product, Row, Spread};
use ggml_kernels::cuda::{Buffer, Device, Matrix, Result, Stream, Uploader};
use ggml_kernels::quant::{self, Type};

const HIDDEN: usize = 2560;
const KV: usize = 512;
const FFN: usize = 7680;
const LAYERS: usize = 32;

struct Layer {
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

/// Uniform within +-0.01, so that the residual stream stays small over many replays.
fn noise(n: usize, mut seed: u64) -> Vec<f32> {
    let next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 0.01
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// Rows of random blocks: a few hundred made by ggml's quantizer, repeated.
fn matrix(up: &mut Uploader<'_>, device: &Device, ty: Type, rows: usize, cols: usize) -> Result<Matrix> {
    let values = noise(64 * cols, (rows * cols) as u64);
    let mut blocks = vec![0; 64 * ty.row_bytes(cols).expect("whole blocks")];
    quant::quantize(ty, &values, cols, None, &mut blocks);
    let all = blocks.repeat(rows / 64);
    let mut m = Matrix::new(device, ty, rows, cols)?;
    up.upload(&mut m, &all, |_| ())?;
    Ok(m)
}

impl Layer {
    fn new(up: &mut Uploader<'_>, device: &Device, ty: Type) -> Result<Self> {
        let mut make = |rows, cols| matrix(up, device, ty, rows, cols);
        Ok(Self {
            q: make(HIDDEN, HIDDEN)?,
            k: make(KV, HIDDEN)?,
            v: make(KV, HIDDEN)?,
            o: make(HIDDEN, HIDDEN)?,
            gate: make(FFN, HIDDEN)?,
            up: make(FFN, HIDDEN)?,
            down: make(HIDDEN, FFN)?,
        })
    }
    fn bytes(&self) -> usize {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down].map(Matrix::bytes).iter().sum()
    }
}

/// Median milliseconds of a replay.
fn time(stream: &Stream, record: impl FnOnce() -> Result<()>) -> Result<f64> {
    // SAFETY: all buffers live in `main`.
    Ok(unsafe { limits::graph_seconds(stream, record) }? * 1e3)
}

struct Buffers {
    x: Buffer<f32>,
    q: Buffer<f32>,
    k: Buffer<f32>,
    v: Buffer<f32>,
    h: Buffer<f32>,
    norm: Buffer<f32>,
    a: Buffer<half::f16>,
    hp: Buffer<half::f16>,
}

/// Which products of a layer to time.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    All,
    Qkv,
    O,
    Glu,
    Down,
}

fn one_row(s: &Stream, layers: &[Layer], b: &Buffers, kind: Kind, spread: [Spread; 3]) -> Result<()> {
    for l in layers {
        let row = |x: &Buffer<f32>, norm: bool| Row {
            x: x.ptr(),
            norm: if norm { b.norm.ptr() } else { std::ptr::null_mut() },
            eps: 1e-5,
        };
        let out = |matrix, to: &Buffer<f32>| Product { matrix, out: to.ptr() };
        let on = |k| kind == k || kind == Kind::All;
        // SAFETY: all buffers live in `main`.
        unsafe {
            if on(Kind::Qkv) {
                let qkv = [out(&l.q, &b.q), out(&l.k, &b.k), out(&l.v, &b.v)];
                matmul::matvec_with(s, row(&b.x, true), &qkv, Mode::Store, spread[0])?;
            }
            if on(Kind::O) {
                matmul::matvec_with(s, row(&b.q, false), &[out(&l.o, &b.x)], Mode::Add, spread[0])?;
            }
            if on(Kind::Glu) {
                let glu = [out(&l.gate, &b.h), out(&l.up, &b.h)];
                matmul::matvec_with(s, row(&b.x, true), &glu, Mode::Glu, spread[1])?;
            }
            if on(Kind::Down) {
                matmul::matvec_with(s, row(&b.h, false), &[out(&l.down, &b.x)], Mode::Add, spread[2])?;
            }
        }
    }
    Ok(())
}

fn rows(s: &Stream, layers: &[Layer], b: &Buffers, n: usize) -> Result<()> {
    for l in layers {
        let out = |matrix, to: &Buffer<f32>| Product { matrix, out: to.ptr() };
        let a = Packed { a: b.a.ptr(), rows: n, scale: 1.0 };
        let h = Packed { a: b.hp.ptr(), rows: n, scale: 1.0 };
        let none = (std::ptr::null_mut(), 1.0);
        // SAFETY: all buffers live in `main`.
        unsafe {
            let qkv = [out(&l.q, &b.q), out(&l.k, &b.k), out(&l.v, &b.v)];
            matmul::matmul(s, a, &qkv, Mode::Store, none)?;
            matmul::matmul(s, a, &[out(&l.o, &b.x)], Mode::Add, none)?;
            let glu = [out(&l.gate, &b.h), out(&l.up, &b.h)];
            matmul::matmul(s, a, &glu, Mode::Glu, (b.hp.ptr(), 1e-3))?;
            matmul::matmul(s, h, &[out(&l.down, &b.x)], Mode::Add, none)?;
        }
    }
    Ok(())
}

fn check(stream: &Stream, l: &Layer, b: &Buffers, ty: Type) -> Result<()> {
    // The matrix repeats its first 64 rows.
    let values = noise(64 * HIDDEN, (HIDDEN * HIDDEN) as u64);
    let mut blocks = vec![0; 64 * ty.row_bytes(HIDDEN).expect("whole blocks")];
    quant::quantize(ty, &values, HIDDEN, None, &mut blocks);
    let mut exact = vec![0.0; values.len()];
    quant::dequantize(ty, &blocks, &mut exact);
    let x = b.x.to_vec()?;
    let row = Row { x: b.x.ptr(), norm: std::ptr::null(), eps: 0.0 };
    // SAFETY: the buffers live in `main`.
    unsafe { matmul::matvec(stream, row, &[Product { matrix: &l.q, out: b.q.ptr() }], Mode::Store) }?;
    stream.synchronize()?;
    for (r, y) in b.q.to_vec()?[..HIDDEN].iter().enumerate() {
        let w = &exact[r % 64 * HIDDEN..][..HIDDEN];
        let sum: f64 = w.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        assert!((f64::from(*y) - sum).abs() < 1e-5, "{ty} row {r}: {y}, expected {sum}");
    }
    Ok(())
}

fn main() -> Result<()> {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(e) => {
            eprintln!("skipped: {e}");
            return Ok(());
        }
    };
    let named: Vec<Type> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let types = if named.is_empty() { vec![Type::Q4_K, Type::Q6_K, Type::Q8_0] } else { named };
    let stream = device.stream()?;
    let rate = limits::copy_rate(&stream)? / 1e12;
    println!("{}, {} multiprocessors, copy {rate:.2} TB/s", device.name(), device.multiprocessors());
    let mut b = Buffers {
        x: device.upload(&noise(64 * HIDDEN, 1))?,
        q: device.upload(&noise(64 * HIDDEN, 2))?,
        k: device.upload(&noise(64 * KV, 3))?,
        v: device.upload(&noise(64 * KV, 4))?,
        h: device.upload(&noise(64 * FFN, 5))?,
        norm: device.upload(&noise(HIDDEN, 6))?,
        a: device
            .upload(&noise(64 * HIDDEN, 7).iter().map(|&v| half::f16::from_f32(v)).collect::<Vec<_>>())?,
        hp: device.upload(&noise(64 * FFN, 8).iter().map(|&v| half::f16::from_f32(v)).collect::<Vec<_>>())?,
    };
    for ty in types {
        let mut uploader = Uploader::new(&stream)?;
        let layers =
            (0..LAYERS).map(|_| Layer::new(&mut uploader, &device, ty)).collect::<Result<Vec<_>>>()?;
        stream.synchronize()?;
        let bytes: usize = layers.iter().map(Layer::bytes).sum();
        b.x.write(0, &noise(64 * HIDDEN, 1))?;
        check(&stream, &layers[0], &b, ty)?;
        let limit = bytes as f64 / rate / 1e9;
        println!("{ty}: {LAYERS} layers, {:.3} GB, limit {limit:.3} ms at the copy rate", bytes as f64 / 1e9);
        let show = |what: String, ms: f64| {
            let share = limit / ms * 100.0;
            println!("  {what:<44} {ms:7.3} ms {:6.2} TB/s {share:5.1} %", bytes as f64 / ms / 1e9);
        };
        let spread = |warps, blocks| Spread { warps, blocks };
        let tiles = [(HIDDEN + 2 * KV) / 16, FFN / 8, HIDDEN / 16];
        let own = tiles.map(|tiles| Spread::of(ty, tiles, device.multiprocessors()));
        let most = Spread::most_warps(ty);
        for all in [
            own,
            [spread(most, 2), spread(5, 4), spread(most, 2)],
            [spread(5, 4), spread(5, 4), spread(most, 2)],
            [spread(8, 2), spread(5, 4), spread(8, 2)],
        ] {
            let ms = time(&stream, || one_row(&stream, &layers, &b, Kind::All, all))?;
            let text = all.map(|s| format!("{}x{}", s.warps, s.blocks)).join(" ");
            show(format!("1 row, {text}"), ms);
        }
        let l = &layers[0];
        for (kind, name, bytes) in [
            (Kind::Qkv, "qkv", l.q.bytes() + l.k.bytes() + l.v.bytes()),
            (Kind::O, "o", l.o.bytes()),
            (Kind::Glu, "gate up", 2 * l.gate.bytes()),
            (Kind::Down, "down", l.down.bytes()),
        ] {
            for (warps, blocks) in [(most, 1), (most, 2), (5, 2), (5, 3), (5, 4)] {
                let s = [spread(warps, blocks); 3];
                let ms = time(&stream, || one_row(&stream, &layers, &b, kind, s))?;
                let us = ms * 1e3 / LAYERS as f64;
                let limit = bytes as f64 / rate / 1e6;
                println!(
                    "  {name:<8} {warps:>2}x{blocks}: {us:6.2} us each, limit {limit:5.2} us, {:5.1} %",
                    limit / us * 100.0
                );
            }
        }
        for n in [2, 8, 16, 32, 64] {
            let ms = time(&stream, || rows(&stream, &layers, &b, n))?;
            show(format!("{n} rows"), ms);
        }
    }
    Ok(())
}

//! The matrix kernels against f64 sums over ggml's own dequantization, every type, ragged shapes. Skipped without a GPU.
use ggml_kernels::contracts::*;
use ggml_kernels::cuda::matmul::{self, Mode, Packed, Product, Row};
use ggml_kernels::cuda::{Buffer, Device, Matrix, Stream, Uploader};
use ggml_kernels::quant::{self, Type};

/// A GPU, or `None` with the reason on stderr.
fn gpu() -> Option<(Device, Stream)> {
    match Device::open(0) {
        Ok(device) => {
            let stream = device.stream().expect("stream");
            Some((device, stream))
        }
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

/// Uniform in -1..1 (SplitMix64).
struct Noise(u64);
impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// A random matrix on the device, and its dequantized values.
fn matrix(stream: &Stream, ty: Type, rows: usize, cols: usize, noise: &mut Noise) -> (Matrix, Vec<f32>) {
    let values = noise.vec(rows * cols);
    let mut blocks = vec![0; rows * ty.row_bytes(cols).expect("whole blocks")];
    quant::quantize(ty, &values, cols, None, &mut blocks);
    let mut exact = vec![0.0; rows * cols];
    quant::dequantize(ty, &blocks, &mut exact);
    let mut matrix = Matrix::new(stream.device(), ty, rows, cols).expect("matrix");
    Uploader::new(stream).expect("buffers").upload(&mut matrix, &blocks, |_| ()).expect("upload");
    stream.synchronize().expect("upload");
    (matrix, exact)
}

fn product(w: &[f32], x: &[f32], cols: usize) -> Vec<f64> {
    let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| dot(w, x))).collect()
}

fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let cols = w.len();
    x.chunks(cols)
        .flat_map(|x| {
            let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / cols as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            x.iter().zip(w).map(move |(&v, &w)| (f64::from(v) * scale * f64::from(w)) as f32)
        })
        .collect()
}

/// ||found - expected|| / ||expected||; NaN counts as infinite.
fn difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|d| d * d).sum::<f64>().sqrt();
    let d = norm(&mut found.iter().zip(expected).map(|(&a, &b)| f64::from(a) - b))
        / norm(&mut expected.iter().copied());
    if d.is_nan() { f64::INFINITY } else { d }
}

fn check(what: &str, found: &[f32], expected: &[f64], limit: f64) {
    let d = difference(found, expected);
    assert!(d < limit, "{what}: relative difference {d:.2e}, at most {limit:.0e}");
}

fn quantized() -> impl Iterator<Item = Type> {
    Type::ALL.iter().copied().filter(|&t| t != Type::F32)
}

/// Rounding of weights and activations to f16, and the order of sums.
const LIMIT: f64 = 1e-3;
/// An output buffer full of what no product gives.
fn poisoned(device: &Device, n: usize) -> Buffer<f32> {
    device.upload(&vec![f32::NAN; n]).expect("buffer")
}

fn columns(ty: Type) -> [usize; 4] {
    if ty.block_len() == 256 { [256, 768, 2560, 10_496] } else { [640, 608, 2560, 10_400] }
}

#[test]
fn dequantized_planes_are_the_weights() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(1);
    for ty in quantized() {
        let (rows, cols) = (37, columns(ty)[1]);
        let (m, exact) = matrix(&stream, ty, rows, cols, &mut noise);
        let out = device.upload(&vec![half::f16::NAN; rows * cols]).expect("buffer");
        // SAFETY: room for all rows.
        unsafe { m.dequantize(&stream, out.ptr()) }.expect("launch");
        stream.synchronize().expect("run");
        let scale = ggml_kernels::cuda::weight_scale(ty);
        let found: Vec<f32> = out.to_vec().expect("read").iter().map(|v| v.to_f32() / scale).collect();
        let exact: Vec<f64> = exact.iter().map(|&v| f64::from(v)).collect();
        check(&format!("{ty}"), &found, &exact, 6e-4);
    }
}

#[test]
fn matvec_is_the_product() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(2);
    for ty in quantized() {
        for cols in columns(ty) {
            for rows in [24, 75, 6000] {
                if rows == 6000 && (ty != Type::Q4_K && ty != Type::Q8_0 || cols > 1000) {
                    continue; // more tiles than blocks
                }
                if rows > 24 && cols > 8000 {
                    continue; // columns beyond those that a warp asks for at once: a few rows show it
                }
                let (m, exact) = matrix(&stream, ty, rows, cols, &mut noise);
                let (x, norm) = (noise.vec(cols), noise.vec(cols));
                let (dx, dn) = (device.upload(&x).expect("x"), device.upload(&norm).expect("norm"));
                for (mode, normed) in [(Mode::Store, false), (Mode::Store, true), (Mode::Add, false)] {
                    let what = format!("{ty} {rows}x{cols} {mode:?} norm {normed}");
                    let a = if normed { rms_norm(&x, &norm, 1e-5) } else { x.clone() };
                    let mut expected = product(&exact, &a, cols);
                    let out = if mode == Mode::Add {
                        let before = noise.vec(rows);
                        expected.iter_mut().zip(&before).for_each(|(y, &b)| *y += f64::from(b));
                        device.upload(&before).expect("out")
                    } else {
                        poisoned(&device, rows)
                    };
                    let norm = if normed { dn.ptr().cast_const() } else { std::ptr::null() };
                    let row = Row { x: dx.ptr(), norm, eps: 1e-5 };
                    let products = [Product { matrix: &m, out: out.ptr() }];
                    // SAFETY: all buffers live until the wait.
                    unsafe { matmul::matvec(&stream, row, &products, mode) }.expect("launch");
                    stream.synchronize().expect("run");
                    check(&what, &out.to_vec().expect("read"), &expected, LIMIT);
                }
            }
        }
    }
}

/// Activations keep their precision whatever their size: a power of two goes through bit by bit, and neither overflows nor vanishes.
#[test]
fn matvec_takes_activations_of_any_size() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(10);
    let (rows, cols) = (40, 2560);
    let x = noise.vec(cols);
    for ty in quantized() {
        let (m, _) = matrix(&stream, ty, rows, cols, &mut noise);
        let times = |factor: f32| {
            let dx = device.upload(&x.iter().map(|v| v * factor).collect::<Vec<_>>()).expect("x");
            let out = poisoned(&device, rows);
            let row = Row { x: dx.ptr(), norm: std::ptr::null(), eps: 0.0 };
            // SAFETY: all buffers live until the wait.
            unsafe { matmul::matvec(&stream, row, &[Product { matrix: &m, out: out.ptr() }], Mode::Store) }
                .expect("launch");
            stream.synchronize().expect("run");
            out.to_vec().expect("read")
        };
        let plain = times(1.0);
        for factor in [2f32.powi(-40), 2f32.powi(60)] {
            let expected: Vec<f32> = plain.iter().map(|y| y * factor).collect();
            assert!(times(factor) == expected, "{ty}: other bits for activations times {factor:e}");
        }
        assert!(times(0.0).iter().all(|&y| y == 0.0), "{ty}: a row of zeros");
        assert!(times(f32::NAN).iter().all(|y| y.is_nan()), "{ty}: NaN does not get lost");
    }
}

#[test]
fn matrices_of_several_types_share_their_activations() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(3);
    let cols = 768;
    let x = noise.vec(cols);
    let dx = device.upload(&x).expect("x");
    let shapes = [(Type::Q4_K, 40), (Type::Q6_K, 17), (Type::F16, 5), (Type::Q8_0, 64)];
    let matrices = shapes.map(|(ty, rows)| matrix(&stream, ty, rows, cols, &mut noise));
    let outs = shapes.map(|(_, rows)| poisoned(&device, rows));
    let products: Vec<_> =
        matrices.iter().zip(&outs).map(|((m, _), out)| Product { matrix: m, out: out.ptr() }).collect();
    let row = Row { x: dx.ptr(), norm: std::ptr::null(), eps: 0.0 };
    // SAFETY: all buffers live until the wait.
    unsafe { matmul::matvec(&stream, row, &products, Mode::Store) }.expect("launch");
    stream.synchronize().expect("run");
    for ((_, exact), out) in matrices.iter().zip(&outs) {
        check("mixed", &out.to_vec().expect("read"), &product(exact, &x, cols), LIMIT);
    }
}

/// Launches of several types run at the same time; what comes after them waits for all.
#[test]
fn launches_beside_each_other_end_before_the_next() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(9);
    let cols = 2560;
    // The first launch takes longest, the others end before it.
    let shapes = [(Type::Q4_K, 2048), (Type::Q6_K, 256), (Type::Q8_0, 256)];
    let matrices = shapes.map(|(ty, rows)| matrix(&stream, ty, rows, cols, &mut noise).0);
    let back = matrix(&stream, Type::Q4_K, cols, cols, &mut noise).0;
    let (norm, start) = (device.upload(&noise.vec(cols)).expect("norm"), noise.vec(cols));
    let run = |steps: usize, alone: bool| {
        let (x, y) = (device.upload(&start).expect("x"), poisoned(&device, cols));
        let row = |x: &Buffer<f32>| Row { x: x.ptr(), norm: norm.ptr(), eps: 1e-5 };
        let mut first = 0;
        let products = matrices.each_ref().map(|matrix| {
            let out = y.at(first);
            first += matrix.rows();
            Product { matrix, out }
        });
        for _ in 0..steps {
            for now in products.chunks(if alone { 1 } else { products.len() }) {
                // SAFETY: all buffers live until the wait.
                unsafe { matmul::matvec(&stream, row(&x), now, Mode::Store) }.expect("launch");
                if alone {
                    stream.synchronize().expect("run");
                }
            }
            let out = [Product { matrix: &back, out: x.ptr() }];
            // SAFETY: as above.
            unsafe { matmul::matvec(&stream, row(&y), &out, Mode::Store) }.expect("launch");
        }
        stream.synchronize().expect("run");
        x.to_vec().expect("read")
    };
    let expected = run(100, true);
    assert!(expected.iter().all(|v| v.is_finite()));
    assert!(run(100, false) == expected, "launches beside each other give other bits");
}

/// silu(gate) * up
fn gated(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(&g, &u)| g / (1.0 + (-g).exp()) * u).collect()
}

#[test]
fn gate_and_up_are_one_launch() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(4);
    for ty in [Type::Q4_K, Type::Q6_K, Type::Q8_0, Type::BF16] {
        let (rows, cols) = (83, 768);
        let ((gate, wg), (up, wu)) =
            (matrix(&stream, ty, rows, cols, &mut noise), matrix(&stream, ty, rows, cols, &mut noise));
        let x = noise.vec(cols);
        let dx = device.upload(&x).expect("x");
        let out = poisoned(&device, rows);
        let products =
            [Product { matrix: &gate, out: out.ptr() }, Product { matrix: &up, out: std::ptr::null_mut() }];
        let row = Row { x: dx.ptr(), norm: std::ptr::null(), eps: 0.0 };
        // SAFETY: all buffers live until the wait.
        unsafe { matmul::matvec(&stream, row, &products, Mode::Glu) }.expect("launch");
        stream.synchronize().expect("run");
        let expected = gated(&product(&wg, &x, cols), &product(&wu, &x, cols));
        check(&format!("{ty}"), &out.to_vec().expect("read"), &expected, 2.0 * LIMIT);
    }
}

/// Packs rows and returns the device buffer, its padding poisoned first.
fn packed(
    device: &Device,
    stream: &Stream,
    x: &[f32],
    norm: Option<&[f32]>,
    cols: usize,
) -> Buffer<half::f16> {
    let rows = x.len() / cols;
    let dx = device.upload(x).expect("x");
    let dn = device.upload(norm.unwrap_or(&[])).expect("norm");
    let out = device.upload(&vec![half::f16::NAN; matmul::packed_len(rows, cols)]).expect("buffer");
    let p = clsa_gpu_pack {
        x: dx.ptr(),
        norm: dn.ptr(),
        out: out.ptr().cast(),
        eps: 1e-5,
        scale: 0.5,
        n_rows: rows as i32,
        n_padded: matmul::padded(rows) as i32,
        cols: cols as i32,
        packed: 1,
    };
    // SAFETY: all buffers live until the wait.
    unsafe { matmul::pack(stream, p) }.expect("launch");
    stream.synchronize().expect("run");
    out
}

#[test]
fn matmul_is_the_product() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(5);
    for ty in quantized() {
        for (n, rows, cols) in [(2, 33, 0), (8, 300, 1), (9, 75, 1), (32, 530, 2), (33, 20, 1), (64, 160, 2)]
        {
            let cols = columns(ty)[cols];
            let (m, exact) = matrix(&stream, ty, rows, cols, &mut noise);
            let (x, norm) = (noise.vec(n * cols), noise.vec(cols));
            for (mode, normed) in [(Mode::Store, true), (Mode::Add, false)] {
                let a = packed(&device, &stream, &x, normed.then_some(&norm), cols);
                let mut expected =
                    product(&exact, &if normed { rms_norm(&x, &norm, 1e-5) } else { x.clone() }, cols);
                let out = if mode == Mode::Add {
                    let before = noise.vec(n * rows);
                    expected.iter_mut().zip(&before).for_each(|(y, &b)| *y += f64::from(b));
                    device.upload(&before).expect("out")
                } else {
                    poisoned(&device, n * rows)
                };
                let products = [Product { matrix: &m, out: out.ptr() }];
                let a = Packed { a: a.ptr(), rows: n, scale: 0.5 };
                let none = (std::ptr::null_mut(), 1.0);
                // SAFETY: all buffers live until the wait.
                unsafe { matmul::matmul(&stream, a, &products, mode, none) }.expect("launch");
                stream.synchronize().expect("run");
                check(
                    &format!("{ty} {n} x {rows}x{cols} {mode:?}"),
                    &out.to_vec().expect("read"),
                    &expected,
                    LIMIT,
                );
            }
        }
    }
}

#[test]
fn gated_rows_feed_the_next_product() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(6);
    for n in [3, 17, 50] {
        let (ffn, cols) = (608, 512);
        let ((gate, wg), (up, wu)) = (
            matrix(&stream, Type::Q4_K, ffn, cols, &mut noise),
            matrix(&stream, Type::Q4_K, ffn, cols, &mut noise),
        );
        let (down, wd) = matrix(&stream, Type::Q5_0, 90, ffn, &mut noise);
        let x = noise.vec(n * cols);
        let a = packed(&device, &stream, &x, None, cols);
        // The columns past the last group stay poisoned.
        let h = device.upload(&vec![half::f16::NAN; matmul::packed_len(n, ffn)]).expect("h");
        let out = poisoned(&device, n * 90);
        let none = std::ptr::null_mut();
        let glu = [Product { matrix: &gate, out: none }, Product { matrix: &up, out: none }];
        let last = [Product { matrix: &down, out: out.ptr() }];
        let a = Packed { a: a.ptr(), rows: n, scale: 0.5 };
        let b = Packed { a: h.ptr(), rows: n, scale: 0.125 };
        // SAFETY: all buffers live until the wait.
        unsafe {
            matmul::matmul(&stream, a, &glu, Mode::Glu, (h.ptr(), 0.125)).expect("launch");
            matmul::matmul(&stream, b, &last, Mode::Store, (std::ptr::null_mut(), 1.0)).expect("launch");
        }
        stream.synchronize().expect("run");
        let hidden = gated(&product(&wg, &x, cols), &product(&wu, &x, cols));
        let hidden: Vec<f32> = hidden.iter().map(|&v| v as f32).collect();
        check(&format!("{n} rows"), &out.to_vec().expect("read"), &product(&wd, &hidden, ffn), 2.0 * LIMIT);
    }
}

#[test]
fn f32_matrices_are_multiplied_in_f32() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(7);
    for (n, rows, cols) in [(1, 5, 32), (3, 77, 96), (70, 40, 160)] {
        let (m, exact) = matrix(&stream, Type::F32, rows, cols, &mut noise);
        let x = noise.vec(n * cols);
        let (dx, out) = (device.upload(&x).expect("x"), poisoned(&device, n * rows));
        let p = Product { matrix: &m, out: out.ptr() };
        // SAFETY: all buffers live until the wait.
        unsafe { matmul::matmul_f32(&stream, dx.ptr(), n, p, Mode::Store) }.expect("launch");
        stream.synchronize().expect("run");
        check("f32", &out.to_vec().expect("read"), &product(&exact, &x, cols), 1e-6);
    }
}

#[test]
fn norm_glu_and_embed_are_their_equations() {
    let Some((device, stream)) = gpu() else { return };
    let mut noise = Noise(8);
    let (n, cols, vocab) = (5, 608, 100);
    let (x, w) = (noise.vec(n * cols), noise.vec(cols));
    let (dx, dw, out) =
        (device.upload(&x).expect("x"), device.upload(&w).expect("w"), poisoned(&device, n * cols));
    let p = clsa_norm {
        x: dx.ptr(),
        norm: dw.ptr(),
        out: out.ptr(),
        eps: 1e-5,
        n_rows: n as i32,
        cols: cols as i32,
    };
    // SAFETY: all buffers live until the wait.
    unsafe { matmul::norm(&stream, p) }.expect("launch");
    stream.synchronize().expect("run");
    let f64s = |v: Vec<f32>| -> Vec<f64> { v.into_iter().map(f64::from).collect() };
    check("norm", &out.to_vec().expect("read"), &f64s(rms_norm(&x, &w, 1e-5)), 1e-6);

    let gu = noise.vec(n * 2 * cols);
    let (dgu, h) = (device.upload(&gu).expect("gu"), poisoned(&device, n * cols));
    let p = clsa_glu {
        gate: dgu.ptr().cast(),
        up: dgu.at(cols).cast(),
        out: h.ptr().cast(),
        in_scale: 1.0,
        scale: 0.5,
        n_rows: n as i32,
        ffn: cols as i32,
        stride: 2 * cols as i32,
        in_f16: 0,
        out_f32: 1,
        reserved: 0,
    };
    // SAFETY: all buffers live until the wait.
    unsafe { matmul::glu(&stream, p) }.expect("launch");
    stream.synchronize().expect("run");
    let expected: Vec<f64> = gu
        .chunks(2 * cols)
        .flat_map(|r| gated(&f64s(r[..cols].to_vec()), &f64s(r[cols..].to_vec())))
        .map(|v| v * 0.5)
        .collect();
    check("glu", &h.to_vec().expect("read"), &expected, 1e-5);

    for &ty in Type::ALL {
        let cols = columns(ty)[1];
        let (m, exact) = matrix(&stream, ty, vocab, cols, &mut noise);
        let tokens = [0u32, 99, 41];
        let (dt, out) = (device.upload(&tokens).expect("tokens"), poisoned(&device, 3 * cols));
        let p = clsa_embed { matrix: m.view(), tokens: dt.ptr(), out: out.ptr(), n_rows: 3, scale: 1.5 };
        // SAFETY: all buffers live until the wait.
        unsafe { matmul::embed(&stream, p) }.expect("launch");
        let expected: Vec<f64> = tokens
            .iter()
            .flat_map(|&t| exact[t as usize * cols..][..cols].iter().map(|&v| f64::from(v) * 1.5))
            .collect();
        stream.synchronize().expect("run");
        check(&format!("embed {ty}"), &out.to_vec().expect("read"), &expected, 6e-4);
    }
}

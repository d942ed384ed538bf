//! pack and matmul of every instruction set against the f64 product of the dequantized weights.
use ggml_kernels::{
    contracts::*,
    ggml,
    matmul::{self, PRIVATE_ROWS},
    ops::{Op, Ops, Scratch, run_team},
    quant::{self, Type},
};
use proptest::prelude::*;
use std::cell::RefCell;

const EPS: f32 = 1e-5;

#[derive(Clone)]
#[repr(align(64))]
struct Line([u8; 64]);

/// Pseudo-random values with a few large ones, as activations have; deterministic.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|i| {
            let gauss = (0..6).map(|_| uniform()).sum::<f32>();
            if i % 97 == 13 { gauss * 20.0 } else { gauss }
        })
        .collect()
}

/// A quantized matrix and what it stands for.
struct Weights {
    ty: Type,
    n_out: usize,
    bytes: Vec<u8>,
    repacked: Option<Vec<u8>>,
    values: Vec<f32>, // [n_out][n_in]
}

impl Weights {
    fn new(ty: Type, n_out: usize, n_in: usize, seed: u64) -> Self {
        let mut bytes = vec![0; n_out * ty.row_bytes(n_in).unwrap()];
        quant::quantize(ty, &values(n_out * n_in, seed), n_in, None, &mut bytes);
        let mut back = vec![0.0; n_out * n_in];
        quant::dequantize(ty, &bytes, &mut back);
        let repacked = matmul::repacked_bytes(ty, n_out, n_in).map(|size| {
            let mut out = vec![0; size];
            let half = n_out.div_ceil(16) / 2; // in two parts
            let (a, b) = out.split_at_mut(size / n_out.div_ceil(16) * half);
            matmul::repack(ty, &bytes, n_out, n_in, 0..half, a);
            matmul::repack(ty, &bytes, n_out, n_in, half..n_out.div_ceil(16), b);
            out
        });
        Self { ty, n_out, bytes, repacked, values: back }
    }
}

#[derive(Clone, Default)]
struct Call<'a> {
    mats: Vec<&'a Weights>,
    add: Option<&'a [f32]>,
    norm: Option<&'a [f32]>,
    swiglu: bool,
    /// Pack with an op of its own even where matmul could.
    pack: bool,
    /// Repacked weights.
    groups: bool,
    /// Results in the form of the rows, where tiles multiply them.
    y_packed: Option<&'a RefCell<Vec<Line>>>,
}

fn forms(ops: &Ops, call: &Call, rows: usize) -> i32 {
    matmul::forms(ops.level, rows, call.mats.iter().map(|w| w.ty))
}

/// The products of `rows` rows of x on `nth` threads: one vector [rows][n_out] for each matrix (one for swiglu).
fn product(ops: &Ops, call: &Call, x: &[f32], rows: usize, nth: usize) -> Vec<Vec<f32>> {
    let n_in = x.len() / rows;
    let forms = forms(ops, call, rows);
    let mut packed = vec![Line([0; 64]); matmul::packed_bytes(rows, n_in, forms).div_ceil(64)];
    let mut p = clsa_matmul {
        x: clsa_pack {
            n_rows: rows as i32,
            n_in: n_in as i32,
            forms,
            eps: EPS,
            x: x.as_ptr(),
            x_stride: n_in,
            norm: call.norm.map_or(std::ptr::null(), <[f32]>::as_ptr),
            packed: std::ptr::null_mut(),
        },
        n_mat: call.mats.len() as i32,
        epilogue: if call.swiglu { CLSA_EPILOGUE_SWIGLU } else { CLSA_EPILOGUE_NONE } as i32,
        ..Default::default()
    };
    if call.pack || rows > PRIVATE_ROWS {
        p.x.packed = packed.as_mut_ptr().cast();
        run(ops, &p.x, nth);
        p.x.x = std::ptr::null(); // what was packed is all that matmul may read
    }
    // One column more than there are outputs, to see what is written beside them.
    let mut out: Vec<Vec<f32>> = call.mats.iter().map(|w| vec![7.5; rows * (w.n_out + 1)]).collect();
    for (m, (w, y)) in p.mat.iter_mut().zip(call.mats.iter().zip(&mut out)) {
        *m = match &w.repacked {
            Some(r) if call.groups => {
                matmul::repacked_matrix(w.ty, r, w.n_out, n_in, y.as_mut_ptr(), w.n_out + 1)
            }
            _ => matmul::matrix(w.ty, &w.bytes, w.n_out, n_in, y.as_mut_ptr(), w.n_out + 1),
        };
        if let Some(add) = call.add {
            (m.add, m.add_stride) = (add.as_ptr(), add.len() / rows);
        }
    }
    if let Some(y) = call.y_packed.filter(|_| matmul::is_tiled(forms)) {
        let mut y = y.borrow_mut();
        *y = vec![Line([0x7f; 64]); matmul::packed_bytes(rows, call.mats[0].n_out, forms).div_ceil(64)];
        (p.y_packed, p.mat[0].y) = (y.as_mut_ptr().cast(), std::ptr::null_mut());
    }
    run(ops, &p, nth);
    if call.swiglu {
        out.truncate(1);
    }
    for y in &mut out {
        let width = y.len() / rows;
        assert!(y.chunks(width).all(|row| row[width - 1] == 7.5), "wrote past a row");
        *y = y.chunks(width).flat_map(|row| &row[..width - 1]).copied().collect();
    }
    out
}

fn run<P: Op>(ops: &Ops, p: &P, nth: usize) {
    p.check().unwrap();
    // SAFETY: checked above; the callers' slices have the shapes that the headers state.
    unsafe { run_team(ops, p, nth, &Scratch::of(p, nth)) };
}

/// RMS(x; norm) in f64.
fn normed(x: &[f32], norm: Option<&[f32]>) -> Vec<f64> {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    let inv = 1.0 / (mean + f64::from(EPS)).sqrt();
    match norm {
        Some(w) => x.iter().zip(w).map(|(&v, &w)| f64::from(v) * inv * f64::from(w)).collect(),
        None => x.iter().map(|&v| f64::from(v)).collect(),
    }
}

/// H v of the Hadamard matrix of 64, for each 64 values (zeros behind the last).
fn rotated(v: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut v: Vec<f64> = v.collect();
    v.resize(v.len().next_multiple_of(64), 0.0);
    for piece in v.chunks_mut(64) {
        for h in [1, 2, 4, 8, 16, 32] {
            for i in (0..64).filter(|i| i & h == 0) {
                (piece[i], piece[i + h]) = (piece[i] + piece[i + h], piece[i] - piece[i + h]);
            }
        }
    }
    v
}

/// As [`oracle`] for form I8: half a step of x and of the weights in each block of 128, after their rotation, and sums in f32.
fn oracle_i8(w: &[f32], x: &[f64]) -> (f64, f64) {
    let y = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * x).sum();
    let (w, x) = (rotated(w.iter().map(|&w| f64::from(w))), rotated(x.iter().map(|x| x / 64.0)));
    let (mut bound, mut magnitude) = (0.0, 0.0);
    for (w, x) in w.chunks(128).zip(x.chunks(128)) {
        let max = |v: &[f64]| v.iter().fold(0f64, |m, v| m.max(v.abs()));
        let (step_w, step_x) = (max(w) / 253.9, max(x) / 253.9); // halves of them
        for (w, x) in w.iter().zip(x) {
            bound += w.abs() * step_x + x.abs() * step_w + step_x * step_w;
        }
        magnitude += max(w) * max(x) * 128.0;
    }
    (y, bound + magnitude * (w.len() as f64 / 64.0 + 16.0) * f64::from(f32::EPSILON))
}

/// The product of one output with one row in f64, and the largest error that rounding x to int8 (form Q8), or x and weights to bf16
/// (form BF16), and sums in f32 can make: half a step of each block of x per weight, or 2^-8 of x and of the weight, and n roundings
/// of the sum of magnitudes (weights with a minimum are a difference of two sums, the larger of which is bounded by 16 steps of the
/// weights: hence the factor).
fn oracle(w: &[f32], x: &[f64], forms: i32) -> (f64, f64) {
    let [q8, bf16, i8] = [CLSA_FORM_Q8, CLSA_FORM_BF16, CLSA_FORM_I8].map(|form| forms & form as i32 != 0);
    if i8 {
        return oracle_i8(w, x);
    }
    let (mut y, mut bound, mut magnitude) = (0.0, 0.0, 0.0);
    for (wb, xb) in w.chunks(32).zip(x.chunks(32)) {
        let max = xb.iter().fold(0f64, |m, v| m.max(v.abs()));
        let widest = wb.iter().fold(0f64, |m, &v| m.max(f64::from(v).abs()));
        for (&wi, &xi) in wb.iter().zip(xb) {
            y += f64::from(wi) * xi;
            bound += if q8 { f64::from(wi).abs() * max / 253.9 } else { 0.0 };
            bound += if bf16 { (f64::from(wi) * xi).abs() * (2.0 / 256.0 + 1.0 / 65536.0) } else { 0.0 };
            magnitude += widest * max;
        }
    }
    (y, bound + magnitude * (w.len() as f64 / 16.0 + 8.0) * f64::from(f32::EPSILON))
}

fn silu(z: f64) -> f64 {
    z / (1.0 + (-z).exp())
}

/// All of a call against the oracle.
fn compare(ops: &Ops, call: &Call, x: &[f32], rows: usize, nth: usize) {
    let n_in = x.len() / rows;
    let got = product(ops, call, x, rows, nth);
    let all = forms(ops, call, rows);
    // All in the same tiles, or each weight in the form of its type.
    let form = |w: &Weights| if matmul::is_tiled(all) { all } else { matmul::forms(ops.level, 1, [w.ty]) };
    for (r, x) in x.chunks(n_in).enumerate() {
        let x = normed(x, call.norm);
        let each = |w: &Weights, o: usize| oracle(&w.values[o * n_in..][..n_in], &x, form(w));
        for (w, y) in call.mats.iter().zip(&got) {
            for o in 0..w.n_out {
                let (mut wanted, mut bound) = each(w, o);
                if call.swiglu {
                    let up = each(call.mats[1], o);
                    // |silu'| < 1.1, |silu(z)| <= |z|
                    bound = 1.1 * bound * (up.0.abs() + up.1)
                        + wanted.abs() * up.1
                        + 1e-5 * (wanted * up.0).abs();
                    wanted = silu(wanted) * up.0;
                } else if let Some(add) = call.add {
                    wanted += f64::from(add[r * (add.len() / rows) + o]);
                    bound += 1e-6 * wanted.abs();
                }
                let y = f64::from(y[r * w.n_out + o]);
                assert!(
                    (y - wanted).abs() <= bound + 1e-30,
                    "{} {} [{} x {n_in}], row {r} of {rows}, output {o}, {nth} threads: {y} for {wanted} +- {bound}",
                    ops.level,
                    w.ty,
                    w.n_out
                );
            }
        }
    }
}

fn any_type() -> impl Strategy<Value = Type> {
    prop::sample::select(Type::ALL)
}

/// Values of a row: ragged for float types, up to 20 blocks of 32 or 4 of 256.
fn width(block_len: usize, blocks: usize) -> usize {
    match block_len {
        1 => blocks * 37,
        32 => blocks * 32,
        _ => (blocks % 4 + 1) * 256,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..Default::default() })]

    /// Every type, level, ragged shape and number of threads; the way the calls are put together.
    #[test]
    fn products_are_right(
        ty in any_type(), other in any_type(), blocks in 1usize..21, n_out in 1usize..150, rows in 1usize..80, nth in 1usize..5,
        seed: u64, norm: bool, add: bool, swiglu: bool, pack: bool, groups: bool,
    ) {
        let n_in = width(ty.block_len().max(other.block_len()), blocks);
        let x = values(rows * n_in, seed ^ 1);
        let (w, v) = (Weights::new(ty, n_out, n_in, seed ^ 2), Weights::new(other, if swiglu { n_out } else { 21 }, n_in, seed ^ 3));
        let weights: Vec<f32> = values(n_in, seed ^ 4).iter().map(|v| 1.0 + v).collect();
        let residual = values(rows * n_out.max(21), seed ^ 5);
        let call = Call {
            mats: vec![&w, &v],
            add: (add && !swiglu).then_some(&residual),
            norm: norm.then_some(&weights),
            swiglu,
            pack,
            groups,
            ..Default::default()
        };
        for ops in Ops::all() {
            compare(ops, &call, &x, rows, nth);
        }
    }

    /// A row's bits depend neither on the other rows, nor on the number of threads, nor on who packs, nor on the other matrices.
    #[test]
    fn bits_are_the_rows_own(
        ty in any_type(), blocks in 1usize..21, n_out in 1usize..50, rows in 2usize..30, nth in 1usize..5, seed: u64,
    ) {
        let n_in = width(ty.block_len(), blocks);
        let x = values(rows * n_in, seed ^ 1);
        let (w, v) = (Weights::new(ty, n_out, n_in, seed ^ 2), Weights::new(ty, 40, n_in, seed ^ 3));
        let weights = values(n_in, seed ^ 4);
        for ops in Ops::all() {
            let call = Call { mats: vec![&v, &w], norm: Some(&weights), pack: true, ..Default::default() };
            let all = product(ops, &call, &x, rows, nth);
            let alone = Call { mats: vec![&w], norm: Some(&weights), ..Default::default() };
            for r in [0, rows / 2, rows - 1] {
                let one = product(ops, &alone, &x[r * n_in..][..n_in], 1, 1);
                prop_assert_eq!(&one[0][..], &all[1][r * n_out..][..n_out], "{} {} row {} of {}", ops.level, ty, r, rows);
                let one = product(ops, &Call { groups: true, ..alone.clone() }, &x[r * n_in..][..n_in], 1, nth);
                prop_assert_eq!(&one[0][..], &all[1][r * n_out..][..n_out], "{} {} repacked, row {}", ops.level, ty, r);
            }
            let few = rows.min(PRIVATE_ROWS);
            let one = product(ops, &alone, &x[..few * n_in], few, 2);
            prop_assert_eq!(&one[0][..], &all[1][..few * n_out], "{} {} {} rows", ops.level, ty, few);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    /// The same of many rows, which some levels multiply in a way of their own; rows of several thousand values among them.
    #[test]
    fn bits_of_many_rows_are_the_rows_own(
        ty in any_type(), blocks in 1usize..21, long in 0usize..3, n_out in 1usize..150, rows in 32usize..100, from in 0usize..68,
        nth in 1usize..5, seed: u64,
    ) {
        let n_in = if long == 0 { 4096 } else { width(ty.block_len(), blocks) };
        let x = values(rows * n_in, seed ^ 1);
        let w = Weights::new(ty, n_out, n_in, seed ^ 2);
        for ops in Ops::all() {
            let call = Call { mats: vec![&w], ..Default::default() };
            let all = product(ops, &call, &x, rows, nth);
            let from = from.min(rows - 32);
            let part = product(ops, &Call { groups: true, ..call }, &x[from * n_in..], rows - from, 1);
            prop_assert_eq!(&part[0][..], &all[0][from * n_out..], "{} {} rows {}..{}", ops.level, ty, from, rows);
        }
    }
}

/// Results that are packed at once are, bit by bit, those that `pack` makes of the results.
#[test]
fn packed_results_are_those_of_pack() {
    let shapes = [(32, 32, 1), (49, 96, 3), (64, 64, 2), (97, 160, 4), (33, 1504, 3), (64, 512, 2)];
    for ((rows, n_out, nth), other) in shapes.into_iter().flat_map(|s| [(s, Type::Q6_K), (s, Type::Q8_0)]) {
        let n_in = 512;
        let x = values(rows * n_in, 1);
        let (gate, up) = (Weights::new(Type::Q4_K, n_out, n_in, 2), Weights::new(other, n_out, n_in, 3));
        for ops in Ops::all() {
            let packed = RefCell::new(vec![]);
            let call =
                Call { mats: vec![&gate, &up], swiglu: true, groups: rows % 2 == 0, ..Default::default() };
            let y = product(ops, &call, &x, rows, nth);
            product(ops, &Call { y_packed: Some(&packed), ..call.clone() }, &x, rows, nth);
            let forms = forms(ops, &call, rows);
            if !matmul::is_tiled(forms) {
                continue;
            }
            let mut wanted = vec![Line([0; 64]); packed.borrow().len()];
            let pack = clsa_pack {
                n_rows: rows as i32,
                n_in: n_out as i32,
                forms,
                x: y[0].as_ptr(),
                x_stride: n_out,
                packed: wanted.as_mut_ptr().cast(),
                ..Default::default()
            };
            run(ops, &pack, 1);
            let (wanted, got): (Vec<_>, Vec<_>) =
                (wanted.iter().map(|l| l.0).collect(), packed.borrow().iter().map(|l| l.0).collect());
            assert!(wanted == got, "{}: {rows} rows, {n_out} outputs, {nth} threads", ops.level);
        }
    }
}

/// The error against the exact product is no larger than that of ggml's own kernels, which round x to Q8_0 or Q8_K.
#[test]
fn error_is_at_most_ggmls() {
    let (n_out, n_in) = (96, 1024);
    for (&ty, rows) in Type::ALL.iter().flat_map(|ty| [(ty, 16), (ty, 48)]) {
        let x = values(rows * n_in, 1);
        let w = Weights::new(ty, n_out, n_in, 2);
        let theirs = ggml_product(&w, &x, rows);
        let exact: Vec<f64> = x
            .chunks(n_in)
            .flat_map(|x| {
                w.values
                    .chunks(n_in)
                    .map(move |w| w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>())
            })
            .collect();
        let rms = |y: &[f32]| {
            let (mut error, mut all) = (0.0, 0.0);
            for (&y, &e) in y.iter().zip(&exact) {
                error += (f64::from(y) - e).powi(2);
                all += e * e;
            }
            (error / all).sqrt()
        };
        for ops in Ops::all() {
            let ours = product(ops, &Call { mats: vec![&w], ..Default::default() }, &x, rows, 2);
            let (ours, theirs) = (rms(&ours[0]), rms(&theirs));
            println!("{ty:7} {}, {rows} rows: relative RMS error {ours:.2e}, ggml {theirs:.2e}", ops.level);
            assert!(
                ours <= 1.01 * theirs + 1e-7,
                "{ty} {}, {rows} rows: {ours:.3e}, ggml {theirs:.3e}",
                ops.level
            );
        }
    }
}

/// ggml's own product: x rounded as its kernel of this type wants it, then its dot products.
fn ggml_product(w: &Weights, x: &[f32], rows: usize) -> Vec<f32> {
    let n_in = x.len() / rows;
    let row_bytes = w.bytes.len() / w.n_out;
    let mut out = vec![0.0; rows * w.n_out];
    // SAFETY: look-ups in ggml's tables; buffers have the sizes that they state.
    unsafe {
        ggml::ggml_cpu_init();
        let traits = *ggml::ggml_get_type_traits_cpu(w.ty.to_ggml());
        let other = traits.vec_dot_type;
        let mut packed = vec![0f32; n_in + 64];
        for (x, out) in x.chunks(n_in).zip(out.chunks_mut(w.n_out)) {
            if other == ggml::GGML_TYPE_F32 {
                packed[..n_in].copy_from_slice(x);
            } else {
                let from_float = (*ggml::ggml_get_type_traits_cpu(other)).from_float.unwrap();
                from_float(x.as_ptr(), packed.as_mut_ptr().cast(), n_in as i64);
            }
            for (o, y) in out.iter_mut().enumerate() {
                let row = w.bytes.as_ptr().add(o * row_bytes);
                traits.vec_dot.unwrap()(n_in as i32, y, 0, row.cast(), 0, packed.as_ptr().cast(), 0, 1);
            }
        }
    }
    out
}

/// A NaN or an infinity in x shows in every output of its row, and in no other row.
#[test]
fn nothing_hides_a_nan() {
    let n_in = 256;
    for (&ty, rows) in Type::ALL.iter().flat_map(|ty| [(ty, 3), (ty, 40)]) {
        let w = Weights::new(ty, 33, n_in, 5);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = values(rows * n_in, 6);
            x[n_in + 77] = bad;
            for ops in Ops::all() {
                let y = product(ops, &Call { mats: vec![&w], ..Default::default() }, &x, rows, 2);
                for (r, y) in y[0].chunks(33).enumerate() {
                    assert!(
                        y.iter().all(|v| v.is_finite() == (r != 1)),
                        "{} {ty} {bad} row {r}: {y:?}",
                        ops.level
                    );
                }
            }
        }
    }
}

/// A NaN or an infinity among the weights shows in its output, in every row, and in no other output.
#[test]
fn nothing_hides_a_nan_of_the_weights() {
    let (n_in, n_out, output) = (320, 33, 21);
    for (rows, bad) in [3, 40].into_iter().flat_map(|rows| [(rows, 0x7e00u16), (rows, 0x7c00)]) {
        let x = values(rows * n_in, 6);
        let mut w = Weights::new(Type::Q4_0, n_out, n_in, 5);
        let at = output * w.bytes.len() / n_out + 7 * Type::Q4_0.block_bytes(); // the scale of block 7, of its row's 10
        w.bytes[at..at + 2].copy_from_slice(&bad.to_le_bytes());
        for ops in Ops::all() {
            let y = product(ops, &Call { mats: vec![&w], ..Default::default() }, &x, rows, 2);
            for (i, y) in y[0].iter().enumerate() {
                assert_eq!(
                    y.is_finite(),
                    i % n_out != output,
                    "{} {bad:x}, {rows} rows: {y} at {i}",
                    ops.level
                );
            }
        }
    }
}

/// Rows of zeros are zeros; the largest values of every type do not overflow anything inside.
#[test]
fn extremes() {
    for &ty in Type::ALL {
        let n_in = 512;
        let flat: Vec<f32> = (0..n_in).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let mut w = Weights::new(ty, 17, n_in, 5);
        quant::quantize(ty, &flat.repeat(17), n_in, None, &mut w.bytes);
        quant::dequantize(ty, &w.bytes, &mut w.values);
        for ops in Ops::all() {
            let call = Call { mats: vec![&w], ..Default::default() };
            compare(ops, &call, &flat, 1, 1);
            compare(ops, &call, &[flat.clone(), vec![1.0; n_in]].concat(), 2, 1);
            assert_eq!(product(ops, &call, &vec![0.0; n_in], 1, 1)[0], [0.0; 17], "{} {ty}", ops.level);
        }
    }
}

#[test]
fn checks_name_what_is_wrong() {
    let (w, x, mut y) = (vec![0u8; 18 * 2 * 4], vec![0f32; 64], vec![0f32; 4]);
    let mut good = clsa_matmul { n_mat: 1, ..Default::default() };
    good.x = clsa_pack {
        n_rows: 1,
        n_in: 64,
        x: x.as_ptr(),
        x_stride: 64,
        forms: CLSA_FORM_Q8 as i32,
        ..Default::default()
    };
    good.mat[0] = matmul::matrix(Type::Q4_0, &w, 4, 64, y.as_mut_ptr(), 4);
    good.check().unwrap();
    let wrong = |what: &str, change: &dyn Fn(&mut clsa_matmul)| {
        let mut p = good;
        change(&mut p);
        let error = p.check().unwrap_err().to_string();
        assert!(error.contains(what), "{error} for {what}");
    };
    wrong("0 rows", &|p| p.x.n_rows = 0);
    wrong("blocks of 32", &|p| p.x.n_in = 65);
    wrong("forms 0", &|p| p.x.forms = 0);
    wrong("not both", &|p| p.x.forms = (CLSA_FORM_BF16 | CLSA_FORM_I8) as i32);
    wrong("too many", &|p| (p.x.n_rows, p.x.n_in) = (1 << 20, 1 << 10));
    wrong("not aligned", &|p| p.x.packed = 8 as *mut u8);
    wrong("overlap", &|p| p.x.x_stride = 63);
    wrong("neither", &|p| p.x.x = std::ptr::null());
    wrong("want packing", &|p| p.x.n_rows = PRIVATE_ROWS as i32 + 1);
    wrong("epilogue", &|p| p.epilogue = 9);
    wrong("0 matrices", &|p| p.n_mat = 0);
    wrong("1 matrices", &|p| p.epilogue = CLSA_EPILOGUE_SWIGLU as i32);
    wrong("gate and up", &|p| (p.n_mat, p.epilogue) = (2, CLSA_EPILOGUE_SWIGLU as i32));
    wrong("packed results of 4 outputs", &|p| p.y_packed = 64 as *mut u8);
    wrong("layout 2", &|p| p.mat[0].layout = 2);
    wrong("type 99", &|p| p.mat[0].type_ = 99);
    wrong("no weights", &|p| p.mat[0].w = std::ptr::null());
    wrong("not blocks of Q4_K", &|p| p.mat[0].type_ = Type::Q4_K.to_ggml() as i32);
    wrong("y is null", &|p| p.mat[0].y_stride = 3);
    wrong("rows to add", &|p| (p.mat[0].add, p.mat[0].add_stride) = (x.as_ptr(), 3));
    let pack = clsa_pack { packed: std::ptr::null_mut(), ..good.x };
    assert!(pack.check().unwrap_err().to_string().contains("null"));
}

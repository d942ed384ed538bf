//! The attention, routing and sampling kernels at the sizes of the 4B shape: each result is checked against the scalar reference
//! first, then timed as part of one CUDA graph; bytes (or operations) and the time they need at least stand beside.
//!
//! `cargo bench -p ggml-kernels --bench cuda_ops [-- NAME ...]`: only the entries whose names contain one of the words.
// Without the emulator the target is always a GPU.
#![allow(irrefutable_let_patterns)]
#[allow(dead_code)]
#[path = "../tests/cuda_kernels/harness.rs"]
mod harness;

use ggml_kernels::contracts::*;
use ggml_kernels::cuda::ops::{
    DecodeScratch, Executor, Gathered, RouteScratch, attention_prefill, rope_append, sample,
    sample_state_bytes,
};
use ggml_kernels::cuda::{Device, Result, limits};
use harness::*;

const N_HEAD: usize = 20;
const N_KV: usize = 4;
const D: usize = 128;
const TOP_K: usize = 2048;
const WINDOW: usize = 512;
const VOCAB: usize = 100_352;

struct Bench {
    target: Target,
    only: Vec<String>,
    /// Bytes per microsecond that a device-to-device copy moves, read plus written.
    copy: f64,
}

impl Bench {
    fn device(&self) -> &Device {
        match &self.target {
            Target::Gpu(device, _) => device,
            #[cfg(feature = "cuda-emulator")]
            Target::Emulator { .. } => unreachable!("timed on a GPU"),
        }
    }
    fn wanted(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|w| name.contains(w.as_str()))
    }
    /// Microseconds of one `launch`, from the median replay of a graph of `n`.
    fn time(&self, n: usize, launch: impl Fn(usize) -> Result<()>) -> Result<f64> {
        let Target::Gpu(_, stream) = &self.target else { unreachable!("timed on a GPU") };
        // SAFETY: the callers' buffers outlive this function.
        Ok(unsafe { limits::graph_seconds(stream, || (0..n).try_for_each(launch)) }? * 1e6 / n as f64)
    }
    fn bytes(&self, name: &str, bytes: usize, us: f64) {
        let limit = bytes as f64 / self.copy;
        println!(
            "{name:<44} {:>9.2} MB {limit:>9.2} us at copy rate {us:>9.2} us {:>5.0} %",
            bytes as f64 / 1e6,
            100.0 * limit / us
        );
    }
}

/// The batch of one of its rows, for a reference that need not do all.
fn one_row(batch: clsa_batch, row: usize) -> clsa_batch {
    // SAFETY: rows lie within the batch's arrays.
    unsafe { clsa_batch { n_rows: 1, pos: batch.pos.add(row), slot: batch.slot.add(row), ..batch } }
}

/// Sequences whose last position is the row; the tables name pages below `distinct` over and over.
fn decode_sequences(target: &Target, n: usize, len: usize, distinct: usize) -> Sequences {
    let rows: Vec<_> = (0..n).map(|s| (s, len - 1)).collect();
    let mut seq = Sequences::new(target, &mut Random::new(1), &vec![len; n], &rows);
    let tables = seq.tables.host.iter().map(|page| page % distinct as u32).collect();
    seq.tables = Dual::new(target, tables);
    seq.n_pages = distinct;
    seq
}

fn route(b: &Bench, n: usize, len: usize) -> Result<()> {
    let name = format!("route: {n} x {len}");
    if !b.wanted(&name) {
        return Ok(());
    }
    let t = &b.target;
    let mut random = Random::new(3);
    let mut seq = decode_sequences(t, n, len, n * len.div_ceil(256));
    let mut keys = Pool::new(t, CLSA_F16, D, seq.n_pages, 0);
    keys.fill_f16(t, &mut random);
    let mut q = Dual::new(t, random.normals(n * D));
    let (mut selected, mut count) = (Dual::<u32>::poisoned(t, n * TOP_K), Dual::<i32>::poisoned(t, n));
    let shape = clsa_route { d: D as i32, k: TOP_K as i32, n_columns: TOP_K as i32, ..Default::default() };
    let op = clsa_route {
        batch: seq.device(),
        q: q.d(),
        keys: keys.device(),
        selected: selected.d(),
        count: count.d(),
        ..shape
    };
    let scratch = b.device().zeros::<u8>(RouteScratch::bytes(n, len))?;
    let route = RouteScratch::new(scratch.ptr(), n, len);
    // SAFETY: buffers of these shapes live to the end of this function.
    unsafe { route.route(t, &op, false)? };
    t.wait();
    let (got, counts) = (selected.fetch(), count.fetch());
    for row in [0, n - 1] {
        let host = clsa_route {
            batch: one_row(seq.host(), row),
            // SAFETY: the row lies within the arrays.
            q: unsafe { q.h().add(row * D) },
            keys: keys.host(),
            selected: selected.h(),
            count: count.h(),
            ..shape
        };
        reference(&host);
        assert_eq!(counts[row] as usize, TOP_K);
        let want = &selected.host[..TOP_K];
        let same = got[row * TOP_K..][..TOP_K].iter().filter(|p| want.binary_search(p).is_ok()).count();
        assert!(same + 2 >= TOP_K, "row {row}: {same} of {TOP_K} positions");
    }
    let bytes = n * len * D * 2;
    // SAFETY: as above.
    b.bytes(&format!("{name}: score"), bytes, b.time(10, |_| unsafe { route.score(t, &op, false) })?);
    // SAFETY: as above.
    b.bytes(
        &format!("{name}: score and select"),
        bytes,
        b.time(10, |_| unsafe { route.route(t, &op, false) })?,
    );
    Ok(())
}

fn sparse(b: &Bench, n: usize) -> Result<()> {
    let name = format!("selected: {n} x {TOP_K} of 131072");
    if !b.wanted(&name) {
        return Ok(());
    }
    let t = &b.target;
    let mut random = Random::new(5);
    let mut seq = decode_sequences(t, n, 131_072, 512);
    let (mut k, mut v) = (Pool::new(t, CLSA_F16, N_KV * D, 512, 0), Pool::new(t, CLSA_F16, N_KV * D, 512, 0));
    k.fill_f16(t, &mut random);
    v.fill_f16(t, &mut random);
    let mut q = Dual::new(t, random.normals(n * N_HEAD * D));
    let mut out = Dual::<f32>::poisoned(t, n * N_HEAD * D);
    // Every 64th position, shifted by up to 63.
    let picks = (0..n * TOP_K).map(|i| (i % TOP_K * 64 + random.below(64)) as u32).collect();
    let mut selected = Dual::<u32>::new(t, picks);
    let mut count = Dual::new(t, vec![TOP_K as i32; n]);
    let shape = clsa_gather_attention {
        n_head: N_HEAD as i32,
        n_kv: N_KV as i32,
        d: D as i32,
        n_columns: TOP_K as i32,
        scale: 1.0 / (D as f32).sqrt(),
        ..Default::default()
    };
    let op = clsa_gather_attention {
        batch: seq.device(),
        q: q.d(),
        out: out.d(),
        k: k.device(),
        v: v.device(),
        selected: selected.d(),
        count: count.d(),
        ..shape
    };
    let bytes = Gathered::bytes(n, TOP_K, N_KV * D, CLSA_F16, CLSA_F16);
    let compact = b.device().zeros::<u8>(bytes)?;
    let gathered = Gathered::new(compact.ptr(), bytes);
    let size = DecodeScratch::bytes(t.multiprocessors(), N_HEAD, N_KV, D);
    let zeros = b.device().zeros::<u8>(size)?;
    let scratch = DecodeScratch::new(zeros.ptr(), size);
    for compact in [true, false] {
        // SAFETY: buffers of these shapes live to the end of this function.
        unsafe {
            gathered.gather(t, &op)?;
            scratch.gather_attention(t, &op, compact.then_some(&gathered), true)?;
        }
        t.wait();
        let got = out.fetch();
        for row in [0, n - 1] {
            // SAFETY: the row lies within the arrays.
            let host = unsafe {
                clsa_gather_attention {
                    batch: one_row(seq.host(), row),
                    q: q.h().add(row * N_HEAD * D),
                    out: out.h(),
                    k: k.host(),
                    v: v.host(),
                    selected: selected.h().add(row * TOP_K),
                    count: count.h(),
                    ..shape
                }
            };
            reference(&host);
            let width = N_HEAD * D;
            let error = relative_error(&got[row * width..][..width], &out.host[..width], D);
            assert!(error < 1e-3, "row {row}: error {error}");
        }
    }
    // SAFETY: as above.
    let us = b.time(4, |_| unsafe { gathered.gather(t, &op) })?;
    b.bytes(&format!("{name}: gather"), 2 * bytes, us);
    // SAFETY: as above.
    let us = b.time(16, |_| unsafe { scratch.gather_attention(t, &op, Some(&gathered), true) })?;
    b.bytes(&format!("{name}: attend, gathered"), bytes, us);
    // SAFETY: as above.
    let us = b.time(16, |_| unsafe { scratch.gather_attention(t, &op, None, true) })?;
    b.bytes(&format!("{name}: attend, not gathered"), bytes, us);
    Ok(())
}

/// Decode (one row per sequence) or prefill (`rows` of one sequence) over a window or everything.
fn dense(b: &Bench, n: usize, rows: usize, len: usize, window: usize) -> Result<()> {
    let kind = if window > 0 { "window" } else { "dense" };
    let name = if rows > 1 {
        format!("{kind} prefill: {rows} rows to {len}")
    } else {
        format!("{kind} decode: {n} x {len}")
    };
    if !b.wanted(&name) {
        return Ok(());
    }
    let t = &b.target;
    let mut random = Random::new(6);
    let ring = if window > 0 { (window + rows).next_multiple_of(64) } else { 0 };
    // Each layer has its own cache, so that a replay does not find everything in L2.
    let layers = if rows > 1 || window == 0 { 1 } else { 16 };
    let distinct = n * len.div_ceil(256);
    let mut seq = decode_sequences(t, n, len, distinct);
    if rows > 1 {
        seq.pos = Dual::new(t, (len - rows..len).map(|p| p as i32).collect());
        seq.slot = Dual::new(t, vec![0; rows]);
    }
    let mut pools: Vec<(Pool, Pool)> = (0..layers)
        .map(|_| {
            let units = if ring > 0 { n } else { distinct };
            let mut k = Pool::new(t, CLSA_F16, N_KV * D, units, ring);
            let mut v = Pool::new(t, CLSA_F16, N_KV * D, units, ring);
            k.fill_f16(t, &mut random);
            v.fill_f16(t, &mut random);
            (k, v)
        })
        .collect();
    let total = seq.pos.host.len();
    let mut q = Dual::new(t, random.normals(total * N_HEAD * D));
    let mut out = Dual::<f32>::poisoned(t, total * N_HEAD * D);
    let shape = clsa_attention {
        n_head: N_HEAD as i32,
        n_kv: N_KV as i32,
        d: D as i32,
        window: window as i32,
        scale: 1.0 / (D as f32).sqrt(),
        ..Default::default()
    };
    let ops: Vec<clsa_attention> = pools
        .iter()
        .map(|(k, v)| clsa_attention {
            batch: seq.device(),
            q: q.d(),
            out: out.d(),
            k: k.device(),
            v: v.device(),
            ..shape
        })
        .collect();
    let size = DecodeScratch::bytes(t.multiprocessors(), N_HEAD, N_KV, D);
    let zeros = b.device().zeros::<u8>(size)?;
    let scratch = DecodeScratch::new(zeros.ptr(), size);
    let launch = |i: usize| {
        // SAFETY: buffers of these shapes live to the end of this function.
        unsafe {
            if rows > 1 {
                assert!(attention_prefill(t, &ops[i % layers])?);
                Ok(())
            } else {
                scratch.attention(t, &ops[i % layers])
            }
        }
    };
    launch(0)?;
    t.wait();
    let got = out.fetch();
    for row in [0, total / 2, total - 1] {
        // SAFETY: the row lies within the arrays.
        let host = unsafe {
            clsa_attention {
                batch: one_row(seq.host(), row),
                q: q.h().add(row * N_HEAD * D),
                out: out.h(),
                k: pools[0].0.host(),
                v: pools[0].1.host(),
                ..shape
            }
        };
        reference(&host);
        let width = N_HEAD * D;
        let error = relative_error(&got[row * width..][..width], &out.host[..width], D);
        assert!(error < 3e-3, "row {row}: error {error}");
    }
    let seen = |pos: usize| if window > 0 { window.min(pos + 1) } else { pos + 1 };
    if rows > 1 {
        let pairs: usize = (len - rows..len).map(seen).sum();
        let flop = 4.0 * (pairs * N_HEAD * D) as f64;
        let us = b.time(2, launch)?;
        println!("{name:<44} {:>9.2} GFLOP {us:>37.2} us {:>5.0} TFLOP/s", flop / 1e9, flop / us / 1e6);
    } else {
        let us = b.time(16, launch)?;
        b.bytes(&name, n * seen(len - 1) * N_KV * D * 4, us);
    }
    Ok(())
}

fn append(b: &Bench, rows: usize) -> Result<()> {
    let name = format!("rope_append: {rows} rows");
    if !b.wanted(&name) {
        return Ok(());
    }
    let t = &b.target;
    let mut random = Random::new(8);
    let mut seq = decode_sequences(t, 1, rows, rows.div_ceil(256));
    seq.pos = Dual::new(t, (0..rows as i32).collect());
    seq.slot = Dual::new(t, vec![0; rows]);
    let width = N_KV * D;
    let (mut k_pool, mut v_pool) =
        (Pool::new(t, CLSA_F16, width, seq.n_pages, 0), Pool::new(t, CLSA_F16, width, seq.n_pages, 0));
    let mut q = Dual::new(t, random.normals(rows * N_HEAD * D));
    let mut q_out = Dual::<f32>::poisoned(t, rows * N_HEAD * D);
    let (mut k, mut v) =
        (Dual::new(t, random.normals(rows * width)), Dual::new(t, random.normals(rows * width)));
    let (mut q_norm, mut k_norm) = (Dual::new(t, random.normals(D)), Dual::new(t, random.normals(D)));
    let (mut cos, mut sin) =
        (Dual::new(t, random.normals(rows * D / 2)), Dual::new(t, random.normals(rows * D / 2)));
    let shape = clsa_rope_append {
        n_head: N_HEAD as i32,
        n_kv: N_KV as i32,
        d: D as i32,
        n_rot: D as i32,
        eps: 1e-6,
        ..Default::default()
    };
    let op = clsa_rope_append {
        batch: seq.device(),
        q: q.d(),
        q_out: q_out.d(),
        k: k.d(),
        v: v.d(),
        q_norm: q_norm.d(),
        k_norm: k_norm.d(),
        cos: cos.d(),
        sin: sin.d(),
        k_cache: k_pool.device(),
        v_cache: v_pool.device(),
        ..shape
    };
    // SAFETY: buffers of these shapes live to the end of this function.
    unsafe { rope_append(t, &op)? };
    t.wait();
    reference(&clsa_rope_append {
        batch: seq.host(),
        q: q.h(),
        q_out: q_out.h(),
        k: k.h(),
        v: v.h(),
        q_norm: q_norm.h(),
        k_norm: k_norm.h(),
        cos: cos.h(),
        sin: sin.h(),
        k_cache: k_pool.host(),
        v_cache: v_pool.host(),
        ..shape
    });
    let error = relative_error(&q_out.fetch(), &q_out.host, D);
    assert!(error < 1e-5, "error {error}");
    let bytes = rows * (N_HEAD * D * 8 + width * 2 * 6 + D * 4);
    // SAFETY: as above.
    b.bytes(&name, bytes, b.time(16, |_| unsafe { rope_append(t, &op) })?);
    Ok(())
}

fn sampling(b: &Bench, rows: usize, temperature: f32, top_k: i32, top_p: f32) -> Result<()> {
    let name = format!("sample: {rows} rows, T {temperature}, k {top_k}, p {top_p}");
    if !b.wanted(&name) {
        return Ok(());
    }
    let t = &b.target;
    let logits: Vec<f32> = Random::new(9).normals(rows * VOCAB).iter().map(|x| x * 2.5).collect();
    let params = clsa_sample_row { temperature, top_p, min_p: 0.05, top_k, at: 0.0, seed: 1, counter: 0 };
    let logits = Dual::new(t, logits);
    let params = Dual::new(t, vec![params; rows]);
    let state = Dual::<u64>::new(t, vec![0; sample_state_bytes(rows) / 8]);
    let (tokens, status) = (Dual::<u32>::poisoned(t, rows), Dual::<u32>::poisoned(t, rows));
    let op = clsa_sample_cuda {
        n_rows: rows as i32,
        n_vocab: VOCAB as i32,
        logits: logits.d(),
        rows: params.d(),
        state: state.d().cast(),
        tokens: tokens.d(),
        status: status.d(),
    };
    // SAFETY: buffers of these shapes live to the end of this function.
    unsafe { sample(t, &op)? };
    t.wait();
    assert_eq!(status.fetch(), vec![CLSA_SAMPLE_OK; rows]);
    // With 0 as its random number a row takes the first that is left: the best, unless tokens are drawn in the order of ids.
    if temperature == 0.0 || top_k > 0 {
        for (token, row) in tokens.fetch().iter().zip(logits.host.chunks(VOCAB)) {
            assert!(row.iter().all(|x| *x <= row[*token as usize]), "token {token} is not the best");
        }
    }
    // SAFETY: as above.
    b.bytes(&name, rows * VOCAB * 4, b.time(8, |_| unsafe { sample(t, &op) })?);
    Ok(())
}

fn main() -> Result<()> {
    let (device, stream) = match Device::open(0).and_then(|d| d.stream().map(|s| (d, s))) {
        Ok(gpu) => gpu,
        Err(e) => {
            eprintln!("skipped: {e}");
            return Ok(());
        }
    };
    println!("{}, {} multiprocessors", device.name(), device.multiprocessors());
    let copy = limits::copy_rate(&stream)? / 1e6;
    let target = Target::Gpu(device, stream);
    println!("device-to-device copy: {:.2} TB/s read plus written", copy / 1e6);
    let only = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let b = Bench { target, only, copy };
    for (n, len) in [(1, 8192), (1, 131_072), (1, 1_048_576), (32, 131_072)] {
        route(&b, n, len)?;
    }
    sparse(&b, 1)?;
    sparse(&b, 32)?;
    dense(&b, 1, 1, 4096, WINDOW)?;
    dense(&b, 32, 1, 4096, WINDOW)?;
    dense(&b, 1, 1, 131_072, 0)?;
    dense(&b, 4, 1, 32_768, 0)?;
    dense(&b, 1, 8192, 16_384, WINDOW)?;
    dense(&b, 1, 8192, 32_768, 0)?;
    append(&b, 1)?;
    append(&b, 8192)?;
    sampling(&b, 1, 0.0, 0, 1.0)?;
    sampling(&b, 1, 0.8, 40, 0.95)?;
    sampling(&b, 32, 0.8, 40, 0.95)?;
    sampling(&b, 1, 0.8, 0, 0.95)?;
    Ok(())
}

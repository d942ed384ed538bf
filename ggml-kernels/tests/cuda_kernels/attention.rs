//! attention and gather_attention against the scalar references.
use crate::harness::*;
use ggml_kernels::contracts::*;
use ggml_kernels::cuda::ops::{
    DecodeScratch, Executor, Gathered, append_attention_prefill, attention_prefill,
};

#[derive(Clone)]
pub struct Shape {
    pub k: u32,
    pub v: u32,
    pub n_head: usize,
    pub n_kv: usize,
    pub d: usize,
    pub window: usize,
    pub ring: usize,
    /// Slots' lengths.
    pub lens: Vec<usize>,
    /// (slot, position)
    pub rows: Vec<(usize, usize)>,
}

impl Shape {
    fn decode(n_head: usize, n_kv: usize, d: usize, lens: &[usize]) -> Self {
        let rows = lens.iter().enumerate().map(|(s, &l)| (s, l - 1)).collect();
        Self { k: CLSA_F16, v: CLSA_F16, n_head, n_kv, d, window: 0, ring: 0, lens: lens.to_vec(), rows }
    }
    /// Relative error allowed: f32 arithmetic, or weights (and q8_0 values, when `gathered`) rounded to f16.
    fn tolerance(&self, gathered: bool) -> f32 {
        let general = self.k == CLSA_F32 || self.v == CLSA_F32 || ![64, 128].contains(&self.d);
        let rounded = gathered && (self.k == CLSA_Q8_0 || self.v == CLSA_Q8_0);
        if general && !rounded { 2e-6 } else { 6e-4 }
    }
}

/// What both ops need on both sides.
struct Data {
    seq: Sequences,
    k: Pool,
    v: Pool,
    q: Dual<f32>,
    out: Dual<f32>,
    scratch: Dual<u8>,
}

impl Data {
    fn new(target: &Target, s: &Shape) -> Self {
        let mut random = Random::new(s.d as u64 * 31 + s.n_head as u64);
        let seq = Sequences::new(target, &mut random, &s.lens, &s.rows);
        let width = s.n_kv * s.d;
        let mut filled = |kind| {
            seq.pool(target, kind, width, s.ring, |_, _| {
                random.normals(width).into_iter().map(|x| x * 1.5 + 0.1).collect()
            })
        };
        let (k, v) = (filled(s.k), filled(s.v));
        let n = s.rows.len() * s.n_head * s.d;
        let bytes = DecodeScratch::bytes(target.multiprocessors(), s.n_head, s.n_kv, s.d);
        Self {
            k,
            v,
            q: Dual::new(target, random.normals(n)),
            out: Dual::poisoned(target, n),
            scratch: Dual::new(target, vec![0; bytes]),
            seq,
        }
    }
    fn scratch(&self) -> DecodeScratch {
        DecodeScratch::new(self.scratch.d(), self.scratch.host.len())
    }
}

fn check_attention(target: &Target, s: &Shape) {
    check(target, s, false);
}

fn check(target: &Target, s: &Shape, prefill: bool) {
    let mut data = Data::new(target, s);
    let common = clsa_attention {
        n_head: s.n_head as i32,
        n_kv: s.n_kv as i32,
        d: s.d as i32,
        window: s.window as i32,
        scale: 1.0 / (s.d as f32).sqrt(),
        ..Default::default()
    };
    let host = clsa_attention {
        batch: data.seq.host(),
        q: data.q.h(),
        out: data.out.h(),
        k: data.k.host(),
        v: data.v.host(),
        ..common
    };
    reference(&host);
    let device = clsa_attention {
        batch: data.seq.device(),
        q: data.q.d(),
        out: data.out.d(),
        k: data.k.device(),
        v: data.v.device(),
        ..common
    };
    let mut before: Option<Vec<f32>> = None;
    for _ in 0..2 {
        // SAFETY: buffers of these shapes live until the wait.
        unsafe {
            if prefill {
                assert!(attention_prefill(target, &device).expect("attention"), "a fast shape");
            } else {
                data.scratch().attention(target, &device).expect("attention");
            }
        }
        target.wait();
        let out = data.out.fetch();
        let error = relative_error(&out, &data.out.host, s.d);
        // Prefill rounds q to f16 too.
        let tolerance = if prefill { 1.5e-3 } else { s.tolerance(false) };
        assert!(error < tolerance, "error {error}");
        assert!(before.replace(out.clone()).is_none_or(|b| b == out), "not the same twice");
    }
}

fn check_gather(target: &Target, s: &Shape, columns: usize) {
    let mut data = Data::new(target, s);
    let mut random = Random::new(5);
    let (mut selected, mut count) = (Vec::new(), Vec::new());
    for &(_, pos) in &s.rows {
        // A random subset, ascending; all when there are not more than columns.
        let mut all: Vec<u32> = (0..=pos as u32).collect();
        while all.len() > columns {
            all.remove(random.below(all.len()));
        }
        count.push(all.len() as i32);
        all.resize(columns, u32::MAX);
        selected.extend(all);
    }
    let (mut selected, mut count) = (Dual::new(target, selected), Dual::new(target, count));
    let common = clsa_gather_attention {
        n_head: s.n_head as i32,
        n_kv: s.n_kv as i32,
        d: s.d as i32,
        n_columns: columns as i32,
        scale: 1.0 / (s.d as f32).sqrt(),
        ..Default::default()
    };
    let host = clsa_gather_attention {
        batch: data.seq.host(),
        q: data.q.h(),
        out: data.out.h(),
        k: data.k.host(),
        v: data.v.host(),
        selected: selected.h(),
        count: count.h(),
        ..common
    };
    reference(&host);
    let device = clsa_gather_attention {
        batch: data.seq.device(),
        q: data.q.d(),
        out: data.out.d(),
        k: data.k.device(),
        v: data.v.device(),
        selected: selected.d(),
        count: count.d(),
        ..common
    };
    let bytes = Gathered::bytes(s.rows.len(), columns, s.n_kv * s.d, s.k, s.v);
    let compact = Dual::<u8>::poisoned(target, bytes);
    let gathered = Gathered::new(compact.d(), bytes);
    for use_gathered in [true, false] {
        // SAFETY: as above.
        unsafe {
            if use_gathered {
                gathered.gather(target, &device).expect("gather");
            }
            data.scratch()
                .gather_attention(target, &device, use_gathered.then_some(&gathered), false)
                .expect("gather_attention");
        }
        target.wait();
        let first = data.out.fetch();
        let error = relative_error(&first, &data.out.host, s.d);
        assert!(error < s.tolerance(use_gathered), "gathered {use_gathered}: error {error}");
        // SAFETY: as above; the gathering is done.
        unsafe { data.scratch().gather_attention(target, &device, use_gathered.then_some(&gathered), true) }
            .expect("gather_attention");
        target.wait();
        assert!(data.out.fetch() == first, "gathered {use_gathered}: rows read early give other bits");
    }
}

#[test]
fn dense_decode_of_ragged_sequences() {
    on_each_target(|target| {
        check_attention(target, &Shape::decode(5, 1, 128, &[1000]));
        check_attention(target, &Shape::decode(9, 3, 64, &[1, 15, 16, 17, 300, 256, 257]));
        check_attention(target, &Shape::decode(4, 4, 64, &[33, 70]));
        check_attention(target, &Shape::decode(24, 2, 64, &[100]));
    });
}

#[test]
fn window_decode_in_rings_and_pages() {
    on_each_target(|target| {
        let base = Shape { window: 100, ..Shape::decode(10, 2, 128, &[1, 99, 100, 101, 450, 512, 700]) };
        check_attention(target, &base);
        check_attention(target, &Shape { ring: 128, ..base.clone() });
        check_attention(target, &Shape { ring: 107, window: 33, ..base.clone() });
        check_attention(target, &Shape { window: 1, ..base });
    });
}

#[test]
fn each_cache_type_and_head_dim() {
    on_each_target(|target| {
        for k in [CLSA_F32, CLSA_F16, CLSA_Q8_0] {
            for v in [CLSA_F32, CLSA_F16, CLSA_Q8_0] {
                for (d, n_head) in [(64, 3), (128, 5)] {
                    let shape = Shape { k, v, ..Shape::decode(n_head, 1, d, &[70, 150]) };
                    check_attention(target, &shape);
                    check_gather(target, &shape, 80);
                }
            }
        }
        for (d, kind) in [(32, CLSA_F16), (80, CLSA_F16), (96, CLSA_Q8_0), (256, CLSA_F16), (512, CLSA_F32)] {
            let shape = Shape { k: kind, v: kind, ..Shape::decode(10, 2, d, &[70, 9]) };
            check_attention(target, &shape);
            check_gather(target, &shape, 16);
        }
    });
}

#[test]
fn selected_positions_of_ragged_sequences() {
    on_each_target(|target| {
        check_gather(target, &Shape::decode(20, 4, 128, &[600]), 256);
        check_gather(target, &Shape::decode(9, 3, 64, &[1, 15, 64, 65, 300, 513]), 64);
        check_gather(target, &Shape::decode(9, 1, 64, &[40]), 33);
    });
}

#[test]
fn prefill_over_windows_and_pages() {
    on_each_target(|target| {
        let span = |slot: usize, from: usize, to: usize| (from..to).map(move |p| (slot, p));
        let base = Shape {
            window: 100,
            lens: vec![400],
            rows: span(0, 300, 370).collect(),
            ..Shape::decode(5, 1, 128, &[])
        };
        check(target, &base, true);
        check(target, &Shape { window: 0, ..base.clone() }, true);
        check(target, &Shape { ring: 256, lens: vec![370], ..base.clone() }, true);
        check(target, &Shape { ring: 210, lens: vec![370], k: CLSA_Q8_0, ..base.clone() }, true);
        // From the start, several sequences within a tile, heads that do not divide the tile.
        let rows: Vec<_> = span(1, 0, 30).chain(span(0, 63, 70)).chain(span(2, 500, 540)).collect();
        let ragged = Shape { n_head: 9, n_kv: 3, d: 64, lens: vec![70, 30, 540], rows, ..base.clone() };
        check(target, &ragged, true);
        check(target, &Shape { window: 0, v: CLSA_Q8_0, ..ragged.clone() }, true);
        check(target, &Shape { window: 1, n_head: 4, n_kv: 4, ..ragged }, true);
    });
}

#[test]
fn prefill_does_not_depend_on_the_batch() {
    on_each_target(|target| {
        let run = |rows: Vec<(usize, usize)>| {
            let shape = Shape { window: 100, lens: vec![400], rows, ..Shape::decode(3, 1, 64, &[]) };
            let data = Data::new(target, &shape);
            // One query for every row: the result depends on the position alone.
            let one: Vec<f32> = data.q.host[..3 * 64].to_vec();
            let q = Dual::new(target, shape.rows.iter().flat_map(|_| one.clone()).collect::<Vec<f32>>());
            let op = clsa_attention {
                batch: data.seq.device(),
                n_head: 3,
                n_kv: 1,
                d: 64,
                window: 100,
                scale: 0.125,
                q: q.d(),
                out: data.out.d(),
                k: data.k.device(),
                v: data.v.device(),
            };
            // SAFETY: as above.
            assert!(unsafe { attention_prefill(target, &op) }.expect("attention"));
            target.wait();
            data.out.fetch()
        };
        let whole = run((200..330).map(|p| (0, p)).collect());
        let part = run((260..330).map(|p| (0, p)).collect());
        assert!(whole[60 * 192..] == part[..], "a row's result depends on its batch");
    });
}

/// Which op is checked.
#[derive(Clone, Copy, PartialEq)]
enum Rows {
    /// One of each sequence.
    Decode,
    /// Many of each sequence.
    Prefill,
    /// The same, with results in f16.
    Halves,
}

/// rope_append and attention in one, against one after the other.
fn check_append(target: &Target, s: &Shape, norm: bool, interleaved: bool, rows: Rows) {
    let mut data = Data::new(target, s);
    let mut random = Random::new(77);
    let (n, width) = (s.rows.len(), s.n_kv * s.d);
    let mut k = Dual::new(target, random.normals(n * width));
    let mut v = Dual::new(target, random.normals(n * width));
    let mut q_out = Dual::<f32>::poisoned(target, n * s.n_head * s.d);
    let (mut q_norm, mut k_norm) =
        (Dual::new(target, random.normals(s.d)), Dual::new(target, random.normals(s.d)));
    let angles = random.normals(n * s.d / 2);
    let mut cos = Dual::new(target, angles.iter().map(|a| a.cos()).collect());
    let mut sin = Dual::new(target, angles.iter().map(|a| a.sin()).collect());
    let heads = clsa_rope_append {
        n_head: s.n_head as i32,
        n_kv: s.n_kv as i32,
        d: s.d as i32,
        n_rot: s.d as i32,
        interleaved: interleaved.into(),
        eps: 1e-5,
        ..Default::default()
    };
    let shape = clsa_attention {
        n_head: heads.n_head,
        n_kv: heads.n_kv,
        d: heads.d,
        window: s.window as i32,
        scale: 1.0 / (s.d as f32).sqrt(),
        ..Default::default()
    };
    let mut host = clsa_rope_append {
        batch: data.seq.host(),
        q: data.q.h(),
        q_out: q_out.h(),
        k: k.h(),
        v: v.h(),
        cos: cos.h(),
        sin: sin.h(),
        k_cache: data.k.host(),
        v_cache: data.v.host(),
        ..heads
    };
    let mut device = clsa_rope_append {
        batch: data.seq.device(),
        q: data.q.d(),
        k: k.d(),
        v: v.d(),
        cos: cos.d(),
        sin: sin.d(),
        k_cache: data.k.device(),
        v_cache: data.v.device(),
        ..heads
    };
    if norm {
        (host.q_norm, host.k_norm) = (q_norm.h(), k_norm.h());
        (device.q_norm, device.k_norm) = (q_norm.d(), k_norm.d());
    }
    reference(&host);
    reference(&clsa_attention {
        batch: host.batch,
        q: q_out.h(),
        out: data.out.h(),
        k: host.k_cache,
        v: host.v_cache,
        ..shape
    });
    let op = clsa_attention {
        batch: device.batch,
        out: data.out.d(),
        k: device.k_cache,
        v: device.v_cache,
        ..shape
    };
    let halves = Dual::<u16>::poisoned(target, n * s.n_head * s.d);
    let out = (rows == Rows::Halves).then(|| halves.d().cast());
    // SAFETY: buffers of these shapes live until the wait; of a decode batch every row has its own sequence.
    unsafe {
        if rows == Rows::Decode {
            data.scratch().append_attention(target, &device, &op).expect("append_attention");
        } else if !append_attention_prefill(target, &device, &op, out).expect("append_attention_prefill") {
            assert!(!target.has("attention_prefill_hopper"), "a shape of that kernel");
            return;
        }
    }
    target.wait();
    let got = match rows {
        Rows::Halves => halves.fetch().into_iter().map(|h| half::f16::from_bits(h).to_f32()).collect(),
        _ => data.out.fetch(),
    };
    let error = relative_error(&got, &data.out.host, s.d);
    // A cached value may round to the neighbour of the reference's.
    let tolerance = match rows {
        Rows::Decode if s.k == CLSA_Q8_0 || s.v == CLSA_Q8_0 => 3e-3,
        Rows::Decode => s.tolerance(false).max(1e-5),
        _ => 2e-3,
    };
    assert!(error < tolerance, "error {error}");
    for (kind, pool) in [(s.k, &data.k), (s.v, &data.v)] {
        let (want, got) = pool.both();
        crate::rope_append::same_rows(kind, want, &got);
    }
}

#[test]
fn append_and_attend_in_one_launch() {
    on_each_target(|target| {
        let base = Shape { window: 100, ring: 128, ..Shape::decode(10, 2, 128, &[1, 16, 101, 450, 512]) };
        check_append(target, &base, true, false, Rows::Decode);
        check_append(
            target,
            &Shape { n_head: 9, n_kv: 3, d: 64, ring: 0, ..base.clone() },
            false,
            false,
            Rows::Decode,
        );
        check_append(
            target,
            &Shape { n_head: 24, n_kv: 2, d: 64, window: 0, ring: 0, ..base.clone() },
            true,
            true,
            Rows::Decode,
        );
        for (k, v, d) in [(CLSA_Q8_0, CLSA_F16, 128), (CLSA_F32, CLSA_F32, 64), (CLSA_F16, CLSA_F16, 256)] {
            check_append(target, &Shape { k, v, d, ..base.clone() }, true, false, Rows::Decode);
        }
    });
}

/// The kernel for compute capability 9.0: rows that fill blocks and that do not, several sequences in a block, windows and none, rings
/// that tiles do not divide, every way to turn.
#[test]
fn append_and_attend_to_many_rows() {
    on_each_target(|target| {
        let span = |slot: usize, from: usize, to: usize| (from..to).map(move |p| (slot, p));
        let base = Shape {
            window: 100,
            lens: vec![400],
            rows: span(0, 130, 400).collect(),
            ..Shape::decode(10, 2, 128, &[])
        };
        for rows in [Rows::Prefill, Rows::Halves] {
            check_append(target, &base, true, false, rows);
            check_append(target, &Shape { window: 0, n_head: 4, n_kv: 4, ..base.clone() }, false, true, rows);
            check_append(target, &Shape { ring: 384, ..base.clone() }, true, true, rows);
            check_append(
                target,
                &Shape { ring: 390, n_head: 7, n_kv: 1, ..base.clone() },
                false,
                false,
                rows,
            );
            let ragged: Vec<_> = span(1, 0, 30).chain(span(0, 63, 70)).chain(span(2, 400, 540)).collect();
            check_append(
                target,
                &Shape { n_head: 9, n_kv: 3, lens: vec![70, 30, 540], rows: ragged, ..base.clone() },
                true,
                false,
                rows,
            );
        }
    });
}

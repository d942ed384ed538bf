//! rope_append: q and every byte that it must not touch; cache rows within one unit of the stored type's last place.
use crate::harness::*;
use ggml_kernels::contracts::*;
use ggml_kernels::cuda::ops::rope_append;

struct Shape {
    k: u32,
    v: u32,
    n_head: usize,
    n_kv: usize,
    d: usize,
    n_rot: usize,
    interleaved: bool,
    norm: bool,
    ring: usize,
    /// Without q: an index key's append.
    q: bool,
}

fn check(target: &Target, s: &Shape) {
    let mut random = Random::new(s.d as u64 + 3);
    let rows = [(0, 300), (0, 301), (1, 0), (2, 255), (2, 256)];
    let n = rows.len();
    let mut seq = Sequences::new(target, &mut random, &[302, 1, 257], &rows);
    let width = s.n_kv * s.d;
    let pages = if s.ring > 0 { 3 } else { seq.n_pages };
    let mut k_pool = Pool::new(target, s.k, width, pages, s.ring);
    let mut v_pool = Pool::new(target, s.v, width, pages, s.ring);
    let mut q = Dual::new(target, random.normals(n * s.n_head * s.d));
    let mut q_out = Dual::<f32>::poisoned(target, n * s.n_head * s.d);
    let mut k = Dual::new(target, random.normals(n * width));
    let mut v = Dual::new(target, random.normals(n * width));
    let (mut q_norm, mut k_norm) =
        (Dual::new(target, random.normals(s.d)), Dual::new(target, random.normals(s.d)));
    let angles: Vec<f32> = (0..n * (s.n_rot / 2).max(1)).map(|_| random.normal()).collect();
    let mut cos = Dual::new(target, angles.iter().map(|a| a.cos()).collect());
    let mut sin = Dual::new(target, angles.iter().map(|a| a.sin()).collect());
    let shape = clsa_rope_append {
        n_head: s.n_head as i32,
        n_kv: s.n_kv as i32,
        d: s.d as i32,
        n_rot: s.n_rot as i32,
        interleaved: s.interleaved.into(),
        eps: 1e-5,
        ..Default::default()
    };
    let mut host = clsa_rope_append {
        batch: seq.host(),
        q: q.h(),
        q_out: q_out.h(),
        k: k.h(),
        v: v.h(),
        k_cache: k_pool.host(),
        v_cache: v_pool.host(),
        ..shape
    };
    let mut device = clsa_rope_append {
        batch: seq.device(),
        q: q.d(),
        q_out: q_out.d(),
        k: k.d(),
        v: v.d(),
        k_cache: k_pool.device(),
        v_cache: v_pool.device(),
        ..shape
    };
    if s.norm {
        (host.q_norm, host.k_norm) = (q_norm.h(), k_norm.h());
        (device.q_norm, device.k_norm) = (q_norm.d(), k_norm.d());
    }
    if s.n_rot > 0 {
        (host.cos, host.sin) = (cos.h(), sin.h());
        (device.cos, device.sin) = (cos.d(), sin.d());
    }
    if !s.q {
        for p in [&mut host, &mut device] {
            p.q = std::ptr::null();
            p.q_out = std::ptr::null_mut();
            p.v_cache.base = std::ptr::null_mut();
        }
    }
    reference(&host);
    // SAFETY: buffers of these shapes live until the wait.
    unsafe { rope_append(target, &device).expect("rope_append") };
    target.wait();
    if s.q {
        assert!(relative_error(&q_out.fetch(), &q_out.host, s.d) < 2e-6);
    }
    for (kind, pool) in [(s.k, &k_pool), (s.v, &v_pool)] {
        let (want, got) = pool.both();
        same_rows(kind, want, &got);
    }
}

/// Equal, but for values next to a rounding boundary; untouched bytes stay as they were.
pub fn same_rows(kind: u32, want: &[u64], got: &[u64]) {
    let bytes = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let (want, got) = (bytes(want), bytes(got));
    let mut off = 0;
    match kind {
        CLSA_F32 => {
            for (w, g) in want.as_chunks::<4>().0.iter().zip(got.as_chunks::<4>().0) {
                let (w, g) = (f32::from_le_bytes(*w), f32::from_le_bytes(*g));
                assert!(w.to_bits() == g.to_bits() || (w - g).abs() <= 3e-6 * w.abs().max(0.3), "{w} {g}");
            }
        }
        CLSA_F16 => {
            for (w, g) in want.as_chunks::<2>().0.iter().zip(got.as_chunks::<2>().0) {
                let (w, g) = (u16::from_le_bytes(*w), u16::from_le_bytes(*g));
                assert!(w.abs_diff(g) <= 1, "{w:04x} {g:04x}");
                off += usize::from(w != g);
            }
        }
        _ => {
            for (w, g) in want.chunks_exact(34).zip(got.chunks_exact(34)) {
                let scale = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
                assert!(scale(w).abs_diff(scale(g)) <= 1);
                for (w, g) in w[2..].iter().zip(&g[2..]) {
                    assert!((*w as i8).abs_diff(*g as i8) <= 1);
                    off += usize::from(w != g);
                }
            }
        }
    }
    assert!(off * 100 <= want.len(), "{off} values rounded otherwise");
}

#[test]
fn every_type_norm_and_rotation() {
    let base = Shape {
        k: CLSA_F16,
        v: CLSA_F16,
        n_head: 5,
        n_kv: 1,
        d: 64,
        n_rot: 64,
        interleaved: false,
        norm: true,
        ring: 0,
        q: true,
    };
    on_each_target(|target| {
        check(target, &base);
        check(target, &Shape { n_head: 20, n_kv: 4, d: 128, n_rot: 128, ..base });
        check(target, &Shape { interleaved: true, norm: false, n_rot: 32, ..base });
        check(target, &Shape { k: CLSA_Q8_0, v: CLSA_F32, n_head: 6, n_kv: 3, d: 96, n_rot: 64, ..base });
        check(target, &Shape { k: CLSA_F32, v: CLSA_Q8_0, d: 256, n_rot: 256, ..base });
        check(target, &Shape { n_head: 8, n_kv: 2, d: 48, n_rot: 16, ring: 320, ..base });
        check(target, &Shape { n_rot: 0, norm: false, q: false, n_head: 1, d: 128, ..base });
    });
}

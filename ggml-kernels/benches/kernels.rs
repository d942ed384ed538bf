//! Times the CPU kernels beside the machine's limits, at the shapes of the 4B preset. Results are checked first.
//!
//!     cargo bench -p ggml-kernels --bench kernels [-- FILTER] [-t THREADS]
//!
//! Bandwidth is measured the way it is used: reads of memory that no cache holds. Times are medians.
#[path = "../tests/ops/fixture.rs"]
#[allow(dead_code)]
mod fixture;
use fixture::{Batch, Pool, Rng, encode, relative_error};
use ggml_kernels::contracts::*;
use ggml_kernels::limits::{self, Limits};
use ggml_kernels::ops::{Op, Ops, Scratch};
use ggml_kernels::simd::Level;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Threads meet here, spinning.
struct Gate(AtomicUsize, usize);

impl Gate {
    fn pass(&self) {
        let ticket = self.0.fetch_add(1, Ordering::AcqRel);
        let open = (ticket / self.1 + 1) * self.1;
        while self.0.load(Ordering::Acquire) < open {
            std::hint::spin_loop();
        }
    }
}

/// Binds this thread to a core: two spinning threads on one core would wait for each other.
fn bind(ith: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: plain calls on a local set of this thread's own.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(ith, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = ith;
}

/// Seconds of each `work(rep, ith)` run by a standing team.
fn time_team(nth: usize, reps: usize, work: impl Fn(usize, usize) + Sync) -> Vec<f64> {
    let gate = Gate(AtomicUsize::new(0), nth);
    bind(0);
    std::thread::scope(|scope| {
        for ith in 1..nth {
            let (gate, work) = (&gate, &work);
            scope.spawn(move || {
                bind(ith);
                for rep in 0..reps {
                    gate.pass();
                    work(rep, ith);
                    gate.pass();
                }
            });
        }
        (0..reps)
            .map(|rep| {
                let start = Instant::now(); // the others wait at the gate already
                gate.pass();
                work(rep, 0);
                gate.pass();
                start.elapsed().as_secs_f64()
            })
            .collect()
    })
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

struct Shared<'a, P>(&'a [P]);
// SAFETY: the kernels share the structs by the rules of include/clsa.h.
unsafe impl<P> Sync for Shared<'_, P> {}

/// Median seconds of an op, and of plain reads of `memory` taken in turns with it; repetition i takes `p[i % p.len()]` and the
/// memory half the list away, which no cache holds any more.
fn time<P: Op>(ops: &Ops, p: &[P], memory: &[&[u8]], nth: usize, reps: usize) -> (f64, f64) {
    p.iter().for_each(|p| p.check().unwrap());
    let scratch = Scratch::new(p.iter().map(|p| p.scratch_bytes(nth)).max().unwrap());
    let shared = Shared(p);
    let turns = if memory.is_empty() { 1 } else { 2 };
    let times = time_team(nth, reps * turns, |turn, ith| {
        let (rep, shared) = (turn / turns, &shared);
        if turn % turns == 1 {
            let all = memory[(rep + memory.len() / 2) % memory.len()];
            limits::read(ops.level, &all[all.len() / nth * ith..all.len() / nth * (ith + 1)]);
        } else {
            // SAFETY: the pointers of the structs outlive this call, with the stated shapes.
            unsafe { ops.run(&shared.0[rep % shared.0.len()], ith, nth, &scratch) };
        }
    });
    let every = |first: usize| median(times.iter().copied().skip(first).step_by(turns).collect());
    (every(0), every(turns - 1))
}

/// What a kernel is held against.
enum Work {
    Bytes(f64),
    Flops(f64),
    Both(f64, f64),
    Items(f64),
}

struct Bench {
    filter: String,
    levels: Vec<&'static Ops>,
    teams: Vec<(usize, Limits)>,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }
    fn report<P: Op>(&self, name: &str, p: &[P], reps: usize, work: Work, check: impl Fn(&'static Ops)) {
        self.beside_reads(name, p, &[], reps, work, check);
    }
    /// The read bandwidth that bytes are held against is that of `memory` in the same moment, where there is some.
    fn beside_reads<P: Op>(
        &self,
        name: &str,
        p: &[P],
        memory: &[&[u8]],
        reps: usize,
        work: Work,
        check: impl Fn(&'static Ops),
    ) {
        for ops in &self.levels {
            check(ops);
            for (nth, limit) in &self.teams {
                let (seconds, reading) = time(ops, p, memory, *nth, reps);
                let read = memory.first().map_or(limit.read, |m| m.len() as f64 / reading);
                let share = |x: f64, limit: f64| {
                    format!("{:3.0} % of {:.1}", x / seconds / limit * 100.0, limit / 1e9)
                };
                let bytes = |b: f64| format!("{:7.2} GB/s ({})", b / seconds / 1e9, share(b, read));
                let flops = |f: f64| format!("{:7.1} GFLOP/s ({})", f / seconds / 1e9, share(f, limit.float));
                let rate = match work {
                    Work::Bytes(b) => bytes(b),
                    Work::Flops(f) => flops(f),
                    Work::Both(b, f) => format!("{}, {}", bytes(b), flops(f)),
                    Work::Items(n) => format!("{:7.2} ns each", seconds / n * 1e9),
                };
                println!("{name:44} {:6} {nth} thr {:10.1} us  {rate}", ops.level.to_string(), seconds * 1e6);
            }
        }
    }
}

/// Pages in the order in which a sequence fills a pool of its own.
fn in_order(rng: &mut Rng, sequences: &[(usize, usize)]) -> Batch {
    let mut batch = Batch::new(rng, sequences);
    batch.tables.sort_unstable();
    batch
}

const SCALAR: Level = Level::Ref;
const CONTEXT: usize = 131_072;

fn score(bench: &Bench, cache_type: u32, name: &str) {
    let d = 128;
    if !bench.wants(name) {
        return;
    }
    let rng = &mut Rng::new(1);
    let batch = in_order(rng, &[(CONTEXT - 1, 1)]);
    let mut pools: Vec<Pool> = (0..6).map(|_| Pool::tight(cache_type, d, 0, batch.n_pages())).collect();
    for pool in &mut pools {
        fill(rng, pool, &batch, CONTEXT);
    }
    let q = rng.normals(d);
    let mut out = vec![0.0; CONTEXT];
    let p: Vec<clsa_score> = pools
        .iter()
        .map(|pool| clsa_score {
            batch: batch.raw(),
            d: d as i32,
            slot: batch.slot[0],
            start: 0,
            n: CONTEXT as i32,
            q: q.as_ptr(),
            out: out.as_mut_ptr(),
            keys: pool.rows,
        })
        .collect();
    let bytes = (CONTEXT * row_bytes(cache_type, d)) as f64;
    let memory: Vec<&[u8]> = pools.iter().map(Pool::bytes).collect();
    bench.beside_reads(name, &p, &memory, 24, Work::Bytes(bytes), |ops| {
        let run = |ops: &Ops| {
            let mut out = vec![0.0; CONTEXT];
            fixture::run(ops, &clsa_score { out: out.as_mut_ptr(), ..p[0] }, 1);
            out
        };
        assert!(relative_error(&run(ops), &run(Ops::at(SCALAR).unwrap())) < 1e-5);
    });
}

fn row_bytes(cache_type: u32, width: usize) -> usize {
    match cache_type {
        CLSA_F32 => 4 * width,
        CLSA_F16 => 2 * width,
        _ => width / 32 * 34,
    }
}

/// Random rows, quickly: a few hundred, repeated.
fn fill(rng: &mut Rng, pool: &mut Pool, batch: &Batch, n: usize) {
    let row = |rng: &mut Rng| encode(&rng.normals(pool.rows.width as usize), pool.rows.type_ as u32).0;
    let some: Vec<Vec<u8>> = (0..251).map(|_| row(rng)).collect();
    for pos in 0..n {
        pool.put(batch, batch.slot[0] as usize, pos, &some[rng.below(251)]);
    }
}

fn topk(bench: &Bench) {
    for (n, k) in [(CONTEXT, 2048), (32_768, 2048), (CONTEXT, 512), (1 << 20, 2048)] {
        for rising in [false, true] {
            let name = format!("topk {k} of {n}{}", if rising { ", rising" } else { "" });
            if !bench.wants(&name) {
                continue;
            }
            let rng = &mut Rng::new(2);
            let scores: Vec<Vec<f32>> = (0..4)
                .map(|_| {
                    rng.normals(n)
                        .iter()
                        .enumerate()
                        .map(|(i, x)| if rising { i as f32 } else { x * 9.0 })
                        .collect()
                })
                .collect();
            let mut selected = vec![0; k];
            let p: Vec<clsa_topk> = scores
                .iter()
                .map(|s| clsa_topk {
                    scores: s.as_ptr(),
                    n: n as i32,
                    k: k as i32,
                    selected: selected.as_mut_ptr(),
                })
                .collect();
            bench.report(&name, &p, 48, Work::Items(n as f64), |ops| {
                let run = |ops: &Ops| {
                    let mut selected = vec![0; k];
                    fixture::run(ops, &clsa_topk { selected: selected.as_mut_ptr(), ..p[0] }, 1);
                    selected
                };
                assert_eq!(run(ops), run(Ops::at(SCALAR).unwrap()));
            });
        }
    }
}

fn route(bench: &Bench, n_rows: usize, k: usize, block: usize) {
    let (d, context) = (128, if n_rows > 1 { 32_768 } else { CONTEXT });
    let name = format!(
        "route {n_rows} x {k} of {context} f16{}",
        if block > 1 { format!(" block {block}") } else { String::new() }
    );
    if !bench.wants(&name) {
        return;
    }
    let rng = &mut Rng::new(3);
    let batch = in_order(rng, &[(context - n_rows, n_rows)]);
    let mut pools: Vec<Pool> = (0..6).map(|_| Pool::tight(CLSA_F16, d, 0, batch.n_pages())).collect();
    for pool in &mut pools {
        fill(rng, pool, &batch, context);
    }
    let q = rng.normals(n_rows * d);
    let (mut selected, mut count) = (vec![0u32; n_rows * k], vec![0; n_rows]);
    let p: Vec<clsa_route> = pools
        .iter()
        .map(|pool| clsa_route {
            batch: batch.raw(),
            d: d as i32,
            k: k as i32,
            block: block as i32,
            n_columns: k as i32,
            q: q.as_ptr(),
            keys: pool.rows,
            selected: selected.as_mut_ptr(),
            count: count.as_mut_ptr(),
        })
        .collect();
    let bytes = (context * d * 2) as f64;
    let flops = (n_rows * context * d * 2) as f64;
    let work = if n_rows > 1 { Work::Flops(flops) } else { Work::Bytes(bytes) };
    let memory: Vec<&[u8]> = if n_rows == 1 { pools.iter().map(Pool::bytes).collect() } else { vec![] };
    bench.beside_reads(&name, &p, &memory, 24, work, |ops| {
        // The scores are the level's own: its selection must be that of a full sort of them.
        let (mut selected, mut count) = (vec![0u32; n_rows * k], vec![0; n_rows]);
        fixture::run(
            ops,
            &clsa_route { selected: selected.as_mut_ptr(), count: count.as_mut_ptr(), ..p[0] },
            1,
        );
        let mut scores = vec![0.0; context];
        let score = clsa_score {
            batch: batch.raw(),
            d: d as i32,
            slot: batch.slot[0],
            start: 0,
            n: batch.pos[0] + 1,
            q: q.as_ptr(),
            out: scores.as_mut_ptr(),
            keys: p[0].keys,
        };
        fixture::run(ops, &score, 1);
        if block <= 1 {
            let mut order: Vec<u32> = (0..=batch.pos[0] as u32).collect();
            order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
            order.truncate(k);
            order.sort_unstable();
            assert_eq!(order, selected[..k]);
        }
    });
}

struct Heads(usize, usize, usize);
const BIG: Heads = Heads(20, 4, 128);
const SMALL: Heads = Heads(9, 3, 64);

fn attention(
    bench: &Bench,
    name: &str,
    heads: &Heads,
    cache_type: u32,
    window: usize,
    first: usize,
    n_rows: usize,
) {
    let &Heads(n_head, n_kv, d) = heads;
    if !bench.wants(name) {
        return;
    }
    let rng = &mut Rng::new(4);
    let batch = in_order(rng, &[(first, n_rows)]);
    let copies = if n_rows > 1 || first > 40_000 { 1 } else { 16 };
    let mut pools: Vec<Pool> =
        (0..2 * copies).map(|_| Pool::tight(cache_type, n_kv * d, 0, batch.n_pages())).collect();
    for pool in &mut pools {
        fill(rng, pool, &batch, first + n_rows);
    }
    let q = rng.normals(n_rows * n_head * d);
    let mut out = vec![0.0; q.len()];
    let p: Vec<clsa_attention> = pools
        .chunks(2)
        .map(|kv| clsa_attention {
            batch: batch.raw(),
            n_head: n_head as i32,
            n_kv: n_kv as i32,
            d: d as i32,
            window: window as i32,
            scale: 1.0 / (d as f32).sqrt(),
            q: q.as_ptr(),
            out: out.as_mut_ptr(),
            k: kv[0].rows,
            v: kv[1].rows,
        })
        .collect();
    let keys: usize =
        (first..first + n_rows).map(|t| if window > 0 { (t + 1).min(window) } else { t + 1 }).sum();
    let flops = (keys * n_head * d * 4) as f64;
    let bytes = (keys * 2 * row_bytes(cache_type, n_kv * d)) as f64;
    let work = if n_rows > 1 { Work::Flops(flops) } else { Work::Both(bytes, flops) };
    bench.report(name, &p, if n_rows > 1 { 7 } else { 32 }, work, |ops| {
        // The last row alone, against the scalar reference.
        let last = batch.part(n_rows - 1..n_rows);
        let width = n_head * d;
        let mut wanted = vec![0.0; width];
        let one = clsa_attention {
            batch: last.raw(),
            q: q[(n_rows - 1) * width..].as_ptr(),
            out: wanted.as_mut_ptr(),
            ..p[0]
        };
        fixture::run(Ops::at(SCALAR).unwrap(), &one, 2);
        let mut found = vec![0.0; q.len()];
        fixture::run(ops, &clsa_attention { out: found.as_mut_ptr(), ..p[0] }, 2);
        let error = relative_error(&found[(n_rows - 1) * width..], &wanted);
        let bf16 = ops.level == Level::Amx && n_rows >= CLSA_AMX_ROWS as usize;
        let most = if cache_type == CLSA_F32 {
            1e-5
        } else if bf16 {
            4e-2
        } else {
            2e-3
        };
        assert!(error < most, "relative error {error}");
    });
}

fn gather(bench: &Bench, name: &str, heads: &Heads, cache_type: u32, k: usize, warm: bool) {
    let &Heads(n_head, n_kv, d) = heads;
    if !bench.wants(name) {
        return;
    }
    let rng = &mut Rng::new(5);
    let context = 65_536;
    let batch = in_order(rng, &[(context - 1, 1)]);
    let mut pools: Vec<Pool> =
        (0..2).map(|_| Pool::tight(cache_type, n_kv * d, 0, batch.n_pages())).collect();
    for pool in &mut pools {
        fill(rng, pool, &batch, context);
    }
    let q = rng.normals(n_head * d);
    let mut out = vec![0.0; q.len()];
    let count = [k as i32];
    let selections: Vec<Vec<u32>> = (0..if warm { 1 } else { 24 })
        .map(|_| {
            let mut all: Vec<u32> = (0..context as u32).collect();
            fixture::shuffle(rng, &mut all);
            all.truncate(k);
            all.sort_unstable();
            all
        })
        .collect();
    let p: Vec<clsa_gather_attention> = selections
        .iter()
        .map(|s| clsa_gather_attention {
            batch: batch.raw(),
            n_head: n_head as i32,
            n_kv: n_kv as i32,
            d: d as i32,
            n_columns: k as i32,
            scale: 1.0 / (d as f32).sqrt(),
            q: q.as_ptr(),
            out: out.as_mut_ptr(),
            k: pools[0].rows,
            v: pools[1].rows,
            selected: s.as_ptr(),
            count: count.as_ptr(),
        })
        .collect();
    let bytes = (k * 2 * row_bytes(cache_type, n_kv * d)) as f64;
    bench.report(name, &p, 48, Work::Both(bytes, (k * n_head * d * 4) as f64), |ops| {
        let run = |ops: &Ops| {
            let mut out = vec![0.0; q.len()];
            fixture::run(ops, &clsa_gather_attention { out: out.as_mut_ptr(), ..p[0] }, 2);
            out
        };
        let error = relative_error(&run(ops), &run(Ops::at(SCALAR).unwrap()));
        assert!(error < if cache_type == CLSA_F32 { 1e-5 } else { 2e-3 }, "relative error {error}");
    });
}

fn rope_append(bench: &Bench, cache_type: u32, name: &str, n_rows: usize) {
    let Heads(n_head, n_kv, d) = BIG;
    if !bench.wants(name) {
        return;
    }
    let rng = &mut Rng::new(6);
    let batch = in_order(rng, &[(0, n_rows)]);
    let pools: Vec<Pool> = (0..2).map(|_| Pool::tight(cache_type, n_kv * d, 0, batch.n_pages())).collect();
    let (q, kv, norm) = (rng.normals(n_rows * n_head * d), rng.normals(n_rows * n_kv * d), rng.normals(d));
    let (sin, cos): (Vec<f32>, Vec<f32>) = rng.normals(n_rows * d / 2).iter().map(|x| x.sin_cos()).unzip();
    let mut out = vec![0.0; q.len()];
    let p = clsa_rope_append {
        batch: batch.raw(),
        n_head: n_head as i32,
        n_kv: n_kv as i32,
        d: d as i32,
        n_rot: d as i32,
        interleaved: 0,
        eps: 1e-5,
        q: q.as_ptr(),
        q_out: out.as_mut_ptr(),
        k: kv.as_ptr(),
        v: kv.as_ptr(),
        q_norm: norm.as_ptr(),
        k_norm: norm.as_ptr(),
        cos: cos.as_ptr(),
        sin: sin.as_ptr(),
        k_cache: pools[0].rows,
        v_cache: pools[1].rows,
    };
    let bytes = n_rows * (2 * 4 * n_head * d + 2 * 4 * n_kv * d + 2 * row_bytes(cache_type, n_kv * d));
    bench.report(name, &[p], 15, Work::Bytes(bytes as f64), |ops| {
        let run = |ops: &Ops| {
            let mut out = vec![0.0; q.len()];
            fixture::run(ops, &clsa_rope_append { q_out: out.as_mut_ptr(), ..p }, 1);
            out
        };
        assert!(relative_error(&run(ops), &run(Ops::at(SCALAR).unwrap())) < 1e-5);
    });
}

fn main() {
    let mut filter = String::new();
    let mut threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    while let Some(a) = arguments.next() {
        if a == "-t" {
            threads = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(threads);
        } else {
            filter = a;
        }
    }
    let level = Ops::best().unwrap().level;
    let mut teams = vec![(1, limits::measure(level, 1))];
    if threads > 1 {
        teams.push((threads, limits::measure(level, threads)));
    }
    for (nth, l) in &teams {
        println!(
            "{nth} thread(s): reads {:.1} GB/s, f32 multiply-adds {:.0} GFLOP/s",
            l.read / 1e9,
            l.float / 1e9
        );
    }
    let forced = std::env::var("CLSA_SIMD").is_ok();
    let levels =
        Ops::all().filter(|o| if forced { o.level == Ops::best().unwrap().level } else { o.level > SCALAR });
    let bench = Bench { filter, levels: levels.collect(), teams };
    for (t, name) in [(CLSA_F16, "f16"), (CLSA_Q8_0, "q8_0"), (CLSA_F32, "f32")] {
        score(&bench, t, &format!("score {CONTEXT} x 128 {name}"));
    }
    topk(&bench);
    route(&bench, 1, 2048, 0);
    route(&bench, 1, 2048, 64);
    route(&bench, 256, 2048, 0);
    for (t, name) in [(CLSA_F16, "f16"), (CLSA_Q8_0, "q8_0")] {
        gather(&bench, &format!("gather 4B 2048 {name} cold"), &BIG, t, 2048, false);
        gather(&bench, &format!("gather 4B 2048 {name} warm"), &BIG, t, 2048, true);
    }
    gather(&bench, "gather 135M 512 f16 warm", &SMALL, CLSA_F16, 512, true);
    for (t, name) in [(CLSA_F16, "f16"), (CLSA_Q8_0, "q8_0"), (CLSA_F32, "f32")] {
        attention(&bench, &format!("decode 4B window 512 {name}"), &BIG, t, 512, 5000, 1);
        attention(&bench, &format!("prefill 4B 2048 rows window 512 {name}"), &BIG, t, 512, 2000, 2048);
    }
    attention(&bench, "decode 4B dense 32768 f16", &BIG, CLSA_F16, 0, 32_767, 1);
    attention(&bench, "decode 135M window 512 f16", &SMALL, CLSA_F16, 512, 5000, 1);
    attention(&bench, "prefill 135M 512 rows window 512 f16", &SMALL, CLSA_F16, 512, 512, 512);
    attention(&bench, "prefill 4B 512 rows dense 2048 f16", &BIG, CLSA_F16, 0, 1536, 512);
    rope_append(&bench, CLSA_F16, "rope_append 4B 2048 rows f16", 2048);
    rope_append(&bench, CLSA_Q8_0, "rope_append 4B 2048 rows q8_0", 2048);
    rope_append(&bench, CLSA_F16, "rope_append 4B 1 row f16", 1);
}

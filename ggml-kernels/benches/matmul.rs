//! Times matmul beside ggml's mul_mat (with its CPU_REPACK copies where llama.cpp would make them) in one interleaved run:
//!
//!     cargo bench -p ggml-kernels --bench matmul -- [types=Q4_K,Q6_K] [shapes=4b|135m|512x2560,...] [rows=1,512] [threads=2] [runs=7]
//!
//! Both run as nodes of a ggml graph on the same thread pool. Weights are several copies of the matrix, so that decoding reads memory
//! and not the cache. Each result is checked against ggml's first. Columns: time of one product, weights read per second as a share of
//! the machine's measured read bandwidth, operations per second as a share of its int8 rate (AVX-512 VNNI) or f32 rate (FMA).
use ggml_kernels::{
    contracts::*,
    ggml::{self, *},
    limits, matmul,
    ops::{Op, Ops, Scratch},
    quant::{self, Type},
};
use std::ffi::{c_int, c_void};
use std::time::Instant;

const SHAPES_4B: &[(usize, usize)] =
    &[(2560, 2560), (512, 2560), (7680, 2560), (2560, 7680), (100_352, 2560)];
const SHAPES_135M: &[(usize, usize)] = &[(576, 576), (192, 576), (1536, 576), (576, 1536), (49_152, 576)];

struct Options {
    types: Vec<Type>,
    shapes: Vec<(usize, usize)>,
    rows: Vec<usize>,
    threads: usize,
    runs: usize,
}

fn options() -> Result<Options, String> {
    let mut o = Options {
        types: vec![Type::Q4_K, Type::Q6_K, Type::Q8_0, Type::Q4_0, Type::Q5_0, Type::F16],
        shapes: vec![(2560, 2560), (7680, 2560), (576, 1536)],
        rows: vec![1, 8, 512],
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        runs: 7,
    };
    for arg in std::env::args().skip(1).filter(|a| a != "--bench") {
        let (key, value) = arg.split_once('=').ok_or(format!("{arg}: key=value expected"))?;
        let number = |s: &str| s.parse::<usize>().map_err(|e| format!("{s}: {e}"));
        let list = value.split(',');
        match key {
            "types" if value == "all" => o.types = Type::ALL.to_vec(),
            "types" => {
                o.types = list.map(|t| t.parse().map_err(|e| format!("{e}"))).collect::<Result<_, _>>()?
            }
            "rows" => o.rows = list.map(number).collect::<Result<_, _>>()?,
            "threads" => o.threads = number(value)?,
            "runs" => o.runs = number(value)?,
            "shapes" => {
                o.shapes = Vec::new();
                for s in list {
                    match s {
                        "4b" => o.shapes.extend(SHAPES_4B),
                        "135m" => o.shapes.extend(SHAPES_135M),
                        _ => {
                            let (a, b) = s.split_once('x').ok_or(format!("{s}: OUTxIN expected"))?;
                            o.shapes.push((number(a)?, number(b)?));
                        }
                    }
                }
            }
            _ => return Err(format!("{key}: unknown")),
        }
    }
    Ok(o)
}

fn values(n: usize, mut state: u64) -> Vec<f32> {
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}

/// One of our products as two nodes (packing, product) or one.
struct Node {
    ops: &'static Ops,
    p: clsa_matmul,
    scratch: Scratch,
}

unsafe extern "C" fn pack_node(_: *mut ggml_tensor, ith: c_int, nth: c_int, data: *mut c_void) {
    // SAFETY: `data` is a Node that outlives the graph; checked when it was made.
    unsafe {
        let node = &*data.cast::<Node>();
        node.ops.run(&node.p.x, ith as usize, nth as usize, &node.scratch);
    }
}

unsafe extern "C" fn matmul_node(_: *mut ggml_tensor, ith: c_int, nth: c_int, data: *mut c_void) {
    // SAFETY: as for pack_node.
    unsafe {
        let node = &*data.cast::<Node>();
        node.ops.run(&node.p, ith as usize, nth as usize, &node.scratch);
    }
}

unsafe extern "C" fn quiet(_: ggml_log_level, _: *const std::ffi::c_char, _: *mut c_void) {}

struct Context(*mut ggml_context);
impl Context {
    fn new() -> Self {
        // SAFETY: ggml allocates.
        Self(unsafe {
            ggml_init(ggml_init_params {
                mem_size: 16 << 20,
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            })
        })
    }
}
impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by ggml_init.
        unsafe { ggml_free(self.0) }
    }
}

/// Allocates the context's tensors in ggml's repacking buffer type, or, where ggml has no repacked form of them, in its plain one.
/// Says whether they are repacked.
///
/// # Safety
/// `first` is a tensor of `ctx`, none of whose tensors has memory yet.
unsafe fn allocate_weights(
    backend: ggml_backend_t,
    ctx: *mut ggml_context,
    first: *mut ggml_tensor,
) -> (*mut ggml_backend_buffer, bool) {
    // SAFETY: ggml's interface as its headers describe; the caller's.
    unsafe {
        let device = ggml_backend_get_device(backend);
        let get = ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device),
            c"ggml_backend_dev_get_extra_bufts".as_ptr(),
        );
        let get: ggml_backend_dev_get_extra_bufts_t = std::mem::transmute(get);
        if let Some(get) = get {
            let mut at = get(device);
            while !at.is_null() && !(*at).is_null() {
                let buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, *at);
                if !(*first).extra.is_null() {
                    return (buffer, true);
                }
                ggml_backend_buffer_free(buffer);
                let mut t = ggml_get_first_tensor(ctx);
                while !t.is_null() {
                    ((*t).data, (*t).buffer) = (std::ptr::null_mut(), std::ptr::null_mut());
                    t = ggml_get_next_tensor(ctx, t);
                }
                at = at.add(1);
            }
        }
        (ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()), false)
    }
}

struct Timing {
    ours: f64,
    theirs: f64,
    error: f64,
    repacked: bool,
}

/// Median seconds of one product each, in alternating runs.
fn compare(
    backend: ggml_backend_t,
    ops: &'static Ops,
    o: &Options,
    ty: Type,
    (n_out, n_in): (usize, usize),
    rows: usize,
) -> Timing {
    let bytes = n_out * ty.row_bytes(n_in).expect("whole blocks");
    let copies = if rows <= 8 { (128usize << 20).div_ceil(bytes).clamp(1, 200) } else { 1 };
    let slab = n_out.min(64);
    let mut w = vec![0; slab * ty.row_bytes(n_in).expect("whole blocks")];
    quant::quantize(ty, &values(slab * n_in, 3), n_in, None, &mut w);
    let w = w.repeat(n_out.div_ceil(slab))[..bytes].to_vec();
    let ours: Vec<Vec<u8>> = (0..copies).map(|_| w.clone()).collect();
    let x = values(rows * n_in, 5);
    // SAFETY: ggml's interface as its headers describe; every buffer outlives the graphs.
    unsafe {
        let (weights, inputs, graphs) = (Context::new(), Context::new(), Context::new());
        let matrices: Vec<_> = (0..copies)
            .map(|_| ggml_new_tensor_2d(weights.0, ty.to_ggml(), n_in as i64, n_out as i64))
            .collect();
        let (weight_buffer, repacked) = allocate_weights(backend, weights.0, matrices[0]);
        for &m in &matrices {
            ggml_backend_tensor_set(m, w.as_ptr().cast(), 0, bytes);
        }
        let input = ggml_new_tensor_2d(inputs.0, GGML_TYPE_F32, n_in as i64, rows as i64);
        let input_buffer = ggml_backend_alloc_ctx_tensors_from_buft(inputs.0, ggml_backend_cpu_buffer_type());
        ggml_backend_tensor_set(input, x.as_ptr().cast(), 0, x.len() * 4);

        let theirs_graph = ggml_new_graph_custom(graphs.0, 1024, false);
        let results: Vec<_> = matrices.iter().map(|&m| ggml_mul_mat(graphs.0, m, input)).collect();
        for &r in &results {
            ggml_build_forward_expand(theirs_graph, r);
        }
        let ours_graph = ggml_new_graph_custom(graphs.0, 1024, false);
        let mut y = vec![0f32; rows * n_out];
        let forms = matmul::forms(ops.level, [ty]);
        let mut packed = vec![[0u64; 8]; matmul::packed_bytes(rows, n_in, forms).div_ceil(64) + 1];
        let packed = packed.as_mut_ptr().cast::<u8>();
        let packed = packed.add(packed.align_offset(64));
        let mut nodes: Vec<Box<Node>> = Vec::new();
        for w in &ours {
            let mut p = clsa_matmul { n_mat: 1, ..Default::default() };
            p.x = clsa_pack {
                n_rows: rows as i32,
                n_in: n_in as i32,
                forms,
                x: x.as_ptr(),
                x_stride: n_in,
                packed: if rows > matmul::PRIVATE_ROWS { packed } else { std::ptr::null_mut() },
                ..Default::default()
            };
            p.mat[0] = matmul::matrix(ty, w, n_out, n_in, y.as_mut_ptr(), n_out);
            p.check().expect("parameters");
            nodes.push(Box::new(Node { ops, scratch: Scratch::of(&p, o.threads), p }));
        }
        let mut last = input;
        for node in &mut nodes {
            let data: *mut c_void = (&raw mut **node).cast();
            let mut add = |f: unsafe extern "C" fn(*mut ggml_tensor, c_int, c_int, *mut c_void)| {
                last =
                    ggml_custom_4d(graphs.0, GGML_TYPE_F32, 1, 1, 1, 1, &raw mut last, 1, Some(f), -1, data);
                ggml_build_forward_expand(ours_graph, last);
            };
            if rows > matmul::PRIVATE_ROWS {
                add(pack_node);
            }
            add(matmul_node);
        }
        let graph_buffer = ggml_backend_alloc_ctx_tensors_from_buft(graphs.0, ggml_backend_cpu_buffer_type());

        let time = |graph| {
            let start = Instant::now();
            let status = ggml_backend_graph_compute(backend, graph);
            assert_eq!(status, GGML_STATUS_SUCCESS);
            start.elapsed().as_secs_f64() / copies as f64
        };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        time(ours_graph);
        time(theirs_graph);
        for _ in 0..o.runs {
            ours.push(time(ours_graph));
            theirs.push(time(theirs_graph));
        }
        let mut wanted = vec![0f32; rows * n_out];
        ggml_backend_tensor_get(results[0], wanted.as_mut_ptr().cast(), 0, wanted.len() * 4);
        let square = |i: &mut dyn Iterator<Item = f32>| i.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let error = (square(&mut y.iter().zip(&wanted).map(|(a, b)| a - b))
            / square(&mut wanted.iter().copied()))
        .sqrt();
        for buffer in [weight_buffer, input_buffer, graph_buffer] {
            ggml_backend_buffer_free(buffer);
        }
        let median = |v: &mut Vec<f64>| {
            v.sort_by(f64::total_cmp);
            v[v.len() / 2]
        };
        Timing { ours: median(&mut ours), theirs: median(&mut theirs), error, repacked }
    }
}

fn main() {
    let o = match options() {
        Ok(o) => o,
        Err(e) => {
            eprintln!("{e}");
            return;
        }
    };
    let ops = Ops::best().expect("CLSA_SIMD");
    let l = limits::measure(ops.level, o.threads);
    println!(
        "{} threads, level {}; limits: read {:.1} GB/s, int8 {:.0} GOP/s, f32 {:.0} GFLOP/s",
        o.threads,
        ops.level,
        l.read * 1e-9,
        l.int8 * 1e-9,
        l.float * 1e-9
    );
    println!(
        "type     outputs x inputs  rows |    ours us   GB/s  share   GOP/s  share |    ggml us repack | ratio  difference"
    );
    // SAFETY: made once, freed at the end.
    unsafe {
        ggml_log_set(Some(quiet), std::ptr::null_mut());
        ggml::ggml_cpu_init();
        let backend = ggml_backend_cpu_init();
        let mut params = ggml_threadpool_params_default(o.threads as c_int);
        let pool = ggml_threadpool_new(&raw mut params);
        ggml_backend_cpu_set_n_threads(backend, o.threads as c_int);
        ggml_backend_cpu_set_threadpool(backend, pool);
        for &ty in &o.types {
            for &(n_out, n_in) in o.shapes.iter().filter(|s| ty.row_bytes(s.1).is_some()) {
                for &rows in &o.rows {
                    let t = compare(backend, ops, &o, ty, (n_out, n_in), rows);
                    let read = (n_out * ty.row_bytes(n_in).unwrap_or(0)) as f64 / t.ours;
                    let rate = 2.0 * (n_out * n_in * rows) as f64 / t.ours;
                    let limit = if ty.is_quantized() { l.int8 } else { l.float };
                    println!(
                        "{ty:7} {n_out:7} x {n_in:6} {rows:5} | {:10.1} {:6.1} {:5.1}% {:7.0} {:5.1}% | {:10.1} {:>6} | {:5.2}  {:.1e}",
                        t.ours * 1e6,
                        read * 1e-9,
                        100.0 * read / l.read,
                        rate * 1e-9,
                        100.0 * rate / limit,
                        t.theirs * 1e6,
                        if t.repacked { "yes" } else { "no" },
                        t.theirs / t.ours,
                        t.error
                    );
                    assert!(
                        t.error < 0.04,
                        "{ty} {n_out} x {n_in}, {rows} rows: differs from ggml's product"
                    );
                }
            }
        }
        ggml_backend_free(backend);
        ggml_threadpool_free(pool);
    }
}

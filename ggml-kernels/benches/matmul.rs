//! Times matmul beside ggml's mul_mat (with its CPU_REPACK copies where llama.cpp would make them) in one interleaved run:
//!
//!     cargo bench -p ggml-kernels --bench matmul -- [types=Q4_K,Q6_K] [shapes=4b|135m|512x2560,...] [rows=1,512] [threads=2] [runs=7]
//!
//! All run as nodes of a ggml graph on the same thread pool, with several copies of the matrix, so that decoding reads memory and not
//! the cache. Ours reads the weights of a mapped file, and a repacked copy; ggml has a mapped file too, or its repacked copy (`r`). The
//! result is checked against ggml's. `of limit`: the time that it takes to only read the same weights in the same run, as a share of
//! ours; `of peak`: operations per second as a share of the measured int8 rate (f32 rate for float weights). Ratios are ggml's time, and
//! our time from the file, over ours.
use ggml_kernels::{
    contracts::*,
    ggml::{self, *},
    limits,
    mapping::Mapping,
    matmul,
    ops::{Op, Ops, Scratch},
    quant::{self, Type},
};
use std::ffi::{c_int, c_void};
use std::{io, time::Instant};

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

/// One of our products as two nodes (packing, product) or one; or the reading of its weights alone.
struct Node {
    ops: &'static Ops,
    p: clsa_matmul,
    bytes: usize,
    scratch: Scratch,
}

type NodeFn = unsafe extern "C" fn(*mut ggml_tensor, c_int, c_int, *mut c_void);

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

unsafe extern "C" fn read_node(_: *mut ggml_tensor, ith: c_int, nth: c_int, data: *mut c_void) {
    // SAFETY: as for pack_node; the weights are `bytes` long.
    unsafe {
        let node = &*data.cast::<Node>();
        let memory = std::slice::from_raw_parts(node.p.mat[0].w, node.bytes);
        let (ith, nth) = (ith as usize, nth as usize);
        limits::read(node.ops.level, &memory[memory.len() * ith / nth..memory.len() * (ith + 1) / nth]);
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

/// Allocates the context's tensors in ggml's repacking buffer type; `None`, and no memory, where ggml has no repacked form of them.
///
/// # Safety
/// `first` is a tensor of `ctx`, none of whose tensors has memory yet.
unsafe fn allocate_weights(
    backend: ggml_backend_t,
    ctx: *mut ggml_context,
    first: *mut ggml_tensor,
) -> Option<*mut ggml_backend_buffer> {
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
                    return Some(buffer);
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
        None
    }
}

/// Median seconds of one product each, in alternating runs.
struct Timing {
    /// Reading the file's weights, reading the repacked ones; nothing else.
    read: [f64; 2],
    /// Ours from the file's weights, and from repacked ones.
    ours: [f64; 2],
    theirs: f64,
    theirs_repacked: bool,
    /// Relative RMS difference between ours and theirs.
    error: f64,
}

fn compare(
    backend: ggml_backend_t,
    ops: &'static Ops,
    o: &Options,
    ty: Type,
    (n_out, n_in): (usize, usize),
    rows: usize,
) -> io::Result<Timing> {
    let bytes = n_out * ty.row_bytes(n_in).unwrap_or(0);
    let copies = if rows <= 8 { (128usize << 20).div_ceil(bytes).clamp(1, 200) } else { 1 };
    let slab = n_out.min(64);
    let mut w = vec![0; slab * bytes / n_out];
    quant::quantize(ty, &values(slab * n_in, 3), n_in, None, &mut w);
    let w = w.repeat(n_out.div_ceil(slab))[..bytes].to_vec();
    // As the product has them: the file's weights mapped, a repacked copy in huge pages.
    let mut file = tempfile::NamedTempFile::new()?;
    let step = bytes.next_multiple_of(4096);
    for _ in 0..copies {
        io::Write::write_all(&mut file, &w)?;
        io::Write::write_all(&mut file, &vec![0; step - bytes])?;
    }
    let mapping = Mapping::open(file.path())?;
    let repacked_bytes = matmul::repacked_bytes(ty, n_out, n_in);
    let mut repacked = matmul::HugePages::new(repacked_bytes.unwrap_or(0) * copies)?;
    if let Some(size) = repacked_bytes {
        for out in repacked.chunks_exact_mut(size) {
            matmul::repack(ty, &w, n_out, n_in, 0..n_out.div_ceil(16), out);
        }
    }
    let x = values(rows * n_in, 5);
    let mut y = vec![0f32; rows * n_out];
    let forms = matmul::forms(ops.level, rows, [ty]);
    let mut packed = matmul::HugePages::new(matmul::packed_bytes(rows, n_in, forms))?;
    let nodes = |groups: bool, y: *mut f32, packed: *mut u8| -> Vec<Box<Node>> {
        let node = |i: usize| {
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
            p.mat[0] = match repacked_bytes {
                Some(size) if groups => {
                    matmul::repacked_matrix(ty, &repacked[i * size..][..size], n_out, n_in, y, n_out)
                }
                _ => matmul::matrix(ty, &mapping[i * step..][..bytes], n_out, n_in, y, n_out),
            };
            p.check().expect("parameters");
            Box::new(Node { ops, scratch: Scratch::of(&p, o.threads), p, bytes })
        };
        (0..copies).map(node).collect()
    };
    let all = [false, true].map(|groups| nodes(groups, y.as_mut_ptr(), packed.as_mut_ptr()));
    // SAFETY: ggml's interface as its headers describe; every buffer outlives the graphs.
    unsafe {
        let (weights, inputs, graphs) = (Context::new(), Context::new(), Context::new());
        let matrices: Vec<_> = (0..copies)
            .map(|_| ggml_new_tensor_2d(weights.0, ty.to_ggml(), n_in as i64, n_out as i64))
            .collect();
        let own_buffer = allocate_weights(backend, weights.0, matrices[0]);
        let base = mapping.as_ptr().cast_mut();
        let weight_buffer =
            own_buffer.unwrap_or_else(|| ggml_backend_cpu_buffer_from_ptr(base.cast(), step * copies));
        for (i, &m) in matrices.iter().enumerate() {
            if own_buffer.is_some() {
                ggml_backend_tensor_set(m, w.as_ptr().cast(), 0, bytes);
            } else {
                ggml_backend_tensor_alloc(weight_buffer, m, base.add(i * step).cast());
            }
        }
        let input = ggml_new_tensor_2d(inputs.0, GGML_TYPE_F32, n_in as i64, rows as i64);
        let input_buffer = ggml_backend_alloc_ctx_tensors_from_buft(inputs.0, ggml_backend_cpu_buffer_type());
        ggml_backend_tensor_set(input, x.as_ptr().cast(), 0, x.len() * 4);

        let theirs = ggml_new_graph_custom(graphs.0, 1024, false);
        let results: Vec<_> = matrices.iter().map(|&m| ggml_mul_mat(graphs.0, m, input)).collect();
        for &r in &results {
            ggml_build_forward_expand(theirs, r);
        }
        let graph = |nodes: &[Box<Node>], functions: &[NodeFn]| {
            let graph = ggml_new_graph_custom(graphs.0, 1024, false);
            let mut last = input;
            for node in nodes {
                for &f in functions {
                    let data: *mut c_void = (&raw const **node).cast_mut().cast();
                    last = ggml_custom_4d(
                        graphs.0,
                        GGML_TYPE_F32,
                        1,
                        1,
                        1,
                        1,
                        &raw mut last,
                        1,
                        Some(f),
                        -1,
                        data,
                    );
                    ggml_build_forward_expand(graph, last);
                }
            }
            graph
        };
        let both: &[NodeFn] =
            if rows > matmul::PRIVATE_ROWS { &[pack_node, matmul_node] } else { &[matmul_node] };
        let timed = [
            theirs,
            graph(&all[0], &[read_node]),
            graph(&all[1], &[read_node]),
            graph(&all[1], both),
            graph(&all[0], both),
        ];
        let graph_buffer = ggml_backend_alloc_ctx_tensors_from_buft(graphs.0, ggml_backend_cpu_buffer_type());
        let mut seconds = [const { Vec::new() }; 5];
        for round in 0..=o.runs {
            for (graph, seconds) in timed.iter().zip(&mut seconds) {
                let start = Instant::now();
                assert_eq!(ggml_backend_graph_compute(backend, *graph), GGML_STATUS_SUCCESS);
                if round > 0 {
                    seconds.push(start.elapsed().as_secs_f64() / copies as f64);
                }
            }
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
        let [theirs, file, memory, groups, rows] = seconds.map(|mut v| {
            v.sort_by(f64::total_cmp);
            v[v.len() / 2]
        });
        Ok(Timing {
            read: [file, memory],
            ours: [rows, groups],
            theirs,
            theirs_repacked: own_buffer.is_some(),
            error,
        })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let o = options()?;
    let ops = Ops::best()?;
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
        "                           |           ours, from the file           |       ours, repacked        |      ggml\n\
         type    outputs x inputs rows |       us   GB/s of limit  GOP/s of peak |       us   GB/s of limit  ratio |       us  ratio  difference"
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
                    let t = compare(backend, ops, &o, ty, (n_out, n_in), rows)?;
                    let bytes = (n_out * ty.row_bytes(n_in).unwrap_or(0)) as f64;
                    let rate = 2.0 * (n_out * n_in * rows) as f64 / t.ours[0];
                    let limit = if ty.is_quantized() { l.int8 } else { l.float };
                    println!(
                        "{ty:7} {n_out:6} x {n_in:5} {rows:5} | {:8.1} {:6.1} {:7.0}% {:6.0} {:6.0}% | {:8.1} {:6.1} {:7.0}%  {:5.2} | {:8.1}{} {:5.2}  {:.1e}",
                        t.ours[0] * 1e6,
                        bytes / t.ours[0] * 1e-9,
                        100.0 * t.read[0] / t.ours[0],
                        rate * 1e-9,
                        100.0 * rate / limit,
                        t.ours[1] * 1e6,
                        bytes / t.ours[1] * 1e-9,
                        100.0 * t.read[1] / t.ours[1],
                        t.ours[0] / t.ours[1],
                        t.theirs * 1e6,
                        if t.theirs_repacked { "r" } else { " " },
                        t.theirs / t.ours[0],
                        t.error
                    );
                    if t.error.is_nan() || t.error > 0.04 {
                        return Err(format!(
                            "{ty} {n_out} x {n_in}, {rows} rows: differs from ggml's product"
                        )
                        .into());
                    }
                }
            }
        }
        ggml_backend_free(backend);
        ggml_threadpool_free(pool);
    }
    Ok(())
}

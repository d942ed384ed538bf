//! ggml's contexts and graphs as owned Rust values, and the few node kinds that the model's verbs emit.
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ggml_kernels::ggml as g;
use ggml_kernels::mapping::advise_huge_pages;

use super::clock::{Clock, Label};
use super::team::Team;
use crate::backend::Stage;
use crate::error::{Error, Result};

/// A node of a graph. Valid as long as the graph or context that made it.
#[derive(Clone, Copy, Debug)]
pub struct Node(pub *mut g::ggml_tensor);

// SAFETY: a Node is an address; what it points to belongs to the backend that is moved as a whole.
unsafe impl Send for Node {}
// SAFETY: as above; shared Nodes only read the tensor's header, which does not change while a graph runs.
unsafe impl Sync for Node {}

impl Node {
    /// Values of a row, ne[0].
    pub fn width(self) -> usize {
        // SAFETY: a Node points to a tensor of a live context.
        unsafe { (*self.0).ne[0] as usize }
    }

    /// Rows, ne[1].
    pub fn rows(self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.0).ne[1] as usize }
    }

    /// Where the node's values lie, once its graph is allocated.
    pub fn data<T>(self) -> *mut T {
        // SAFETY: as above.
        unsafe { (*self.0).data.cast() }
    }
}

/// What a custom node runs: destination, its sources, which piece, and of how many.
type Op = Box<dyn Fn(Node, &[Node], usize, usize) + Send + Sync>;

/// A custom node's op, and who runs it.
struct Custom {
    op: Op,
    pieces: usize,
    team: Arc<Mutex<Team>>,
    clock: Arc<Clock>,
    label: Label,
    /// A part of the op by itself, which is timed apart.
    alone: Option<(Stage, Op)>,
}

/// A ggml context whose tensors own no data.
pub struct Context(*mut g::ggml_context);

impl Context {
    /// Room for `n` tensors and one graph of as many nodes.
    pub fn new(n: usize) -> Result<Self> {
        // SAFETY: plain constructors; a null result is checked.
        let ctx = unsafe {
            let mem_size = n * g::ggml_tensor_overhead() + g::ggml_graph_overhead_custom(n, false);
            g::ggml_init(g::ggml_init_params { mem_size, mem_buffer: ptr::null_mut(), no_alloc: true })
        };
        if ctx.is_null() {
            return Err(Error::Runtime(format!("ggml could not make a context for {n} tensors")));
        }
        Ok(Self(ctx))
    }

    /// A tensor over memory that outlives the context.
    ///
    /// # Safety
    /// `data` holds `rows` rows of `width` values of `ty`, and lives as long as any graph that uses the node.
    pub unsafe fn tensor(&self, ty: g::ggml_type, width: usize, rows: usize, data: *mut c_void) -> Node {
        // SAFETY: the context is live; the caller vouches for `data`.
        unsafe {
            let t = g::ggml_new_tensor_2d(self.0, ty, width as i64, rows as i64);
            (*t).data = data;
            Node(t)
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by ggml_init, freed once.
        unsafe { g::ggml_free(self.0) }
    }
}

// SAFETY: a context is only touched through &mut of its owner, or read.
unsafe impl Send for Context {}

/// A graph under construction, or ready to run.
pub struct Graph {
    ctx: Context,
    graph: *mut g::ggml_cgraph,
    #[expect(clippy::vec_box, reason = "ggml keeps the address of each")]
    customs: Vec<Box<Custom>>,
    team: Arc<Mutex<Team>>,
    pieces: usize,
    clock: Arc<Clock>,
    label: Label,
}

// SAFETY: as for Context; the closures are Send and Sync.
unsafe impl Send for Graph {}

unsafe extern "C" fn run_custom(dst: *mut g::ggml_tensor, _: c_int, _: c_int, userdata: *mut c_void) {
    // SAFETY: userdata is the Custom that `Graph::custom` stored; it lives as long as the graph, and so do the nodes.
    let (custom, all) = unsafe { (&*userdata.cast::<Custom>(), &(*dst).src) };
    let n = all.iter().position(|s| s.is_null()).unwrap_or(all.len());
    let mut sources = [Node(ptr::null_mut()); 10];
    for (to, from) in sources.iter_mut().zip(&all[..n]) {
        *to = Node(*from);
    }
    let (dst, sources) = (Node(dst), &sources[..n]);
    let run = |op: &Op| {
        let mut team = custom.team.lock().unwrap_or_else(PoisonError::into_inner);
        team.run(custom.pieces, &|i| op(dst, sources, i, custom.pieces));
    };
    let alone = custom.alone.as_ref().map(|(stage, op)| (*stage, || run(op)));
    custom.clock.time(custom.label, || run(&custom.op), alone);
}

impl Graph {
    /// An empty graph for at most `n` nodes, whose ops `team` runs in `pieces` pieces each, under `clock`.
    pub fn new(n: usize, team: Arc<Mutex<Team>>, pieces: usize, clock: Arc<Clock>) -> Result<Self> {
        let ctx = Context::new(2 * n)?;
        // SAFETY: the context has room for a graph of n nodes (Context::new counts 2n).
        let graph = unsafe { g::ggml_new_graph_custom(ctx.0, n, false) };
        if graph.is_null() {
            return Err(Error::Runtime(format!("ggml could not make a graph of {n} nodes")));
        }
        let label = Label { stage: Stage::Other, layer: None };
        Ok(Self { ctx, graph, customs: vec![], team, pieces, clock, label })
    }

    /// Says what the nodes from here on belong to.
    pub fn label(&mut self, stage: Stage, layer: Option<usize>) {
        self.label = Label { stage, layer };
    }

    /// Whether nodes are timed.
    pub fn is_timed(&self) -> bool {
        self.clock.is_on()
    }

    /// Times `f`, a part of what the last custom node does, apart from the rest of it.
    pub fn time_alone(
        &mut self,
        stage: Stage,
        f: impl Fn(Node, &[Node], usize, usize) + Send + Sync + 'static,
    ) {
        if let Some(last) = self.customs.last_mut() {
            last.alone = Some((stage, Box::new(f)));
        }
    }

    /// An input over memory that outlives the graph; see [`Context::tensor`].
    ///
    /// # Safety
    /// As [`Context::tensor`].
    pub unsafe fn input(&self, ty: g::ggml_type, width: usize, rows: usize, data: *mut c_void) -> Node {
        // SAFETY: passed on to the caller.
        unsafe { self.ctx.tensor(ty, width, rows, data) }
    }

    /// `x * s`
    pub fn scale(&self, x: Node, s: f32) -> Node {
        // SAFETY: as above.
        Node(unsafe { g::ggml_scale(self.ctx.0, x.0, s) })
    }

    /// Rows of `x` by index, in f32.
    pub fn rows(&self, x: Node, indices: Node) -> Node {
        // SAFETY: as above.
        Node(unsafe { g::ggml_get_rows(self.ctx.0, x.0, indices.0) })
    }

    /// A node `[rows][width]` of f32 or i32 that `f` computes from `sources`, piece by piece.
    pub fn custom(
        &mut self,
        ty: g::ggml_type,
        width: usize,
        rows: usize,
        sources: &[Node],
        f: impl Fn(Node, &[Node], usize, usize) + Send + Sync + 'static,
    ) -> Node {
        let mut sources: Vec<_> = sources.iter().map(|n| n.0).collect();
        let custom = Custom {
            op: Box::new(f),
            pieces: self.pieces,
            team: Arc::clone(&self.team),
            clock: Arc::clone(&self.clock),
            label: self.label,
            alone: None,
        };
        self.customs.push(Box::new(custom));
        let custom: *const Custom = &**self.customs.last().expect("just pushed");
        // SAFETY: sources are live nodes; the box stays where it is until the graph is dropped.
        Node(unsafe {
            g::ggml_custom_4d(
                self.ctx.0,
                ty,
                width as i64,
                rows as i64,
                1,
                1,
                sources.as_mut_ptr(),
                sources.len() as c_int,
                Some(run_custom),
                1,
                custom.cast_mut().cast(),
            )
        })
    }

    /// Asks for huge pages for the buffer in which the placed nodes lie.
    fn advise_huge_pages(&self) {
        // SAFETY: the graph is live and placed; the buffer is the arena's, and advice changes nothing in it.
        unsafe {
            let n = g::ggml_graph_n_nodes(self.graph);
            let buffers = (0..n).map(|i| (*g::ggml_graph_node(self.graph, i)).buffer);
            if let Some(buffer) = buffers.into_iter().find(|b| !b.is_null()) {
                let (base, bytes) =
                    (g::ggml_backend_buffer_get_base(buffer), g::ggml_backend_buffer_get_size(buffer));
                advise_huge_pages(base.cast_const().cast(), bytes);
            }
        }
    }

    /// Puts a node, and all it needs, at the end of what is run.
    pub fn expand(&mut self, node: Node) {
        // SAFETY: the graph and the node are live.
        unsafe { g::ggml_build_forward_expand(self.graph, node.0) }
    }

    /// Keeps a node's values after the run.
    pub fn keep(&mut self, node: Node) {
        // SAFETY: as above.
        unsafe { g::ggml_set_output(node.0) }
        self.expand(node);
    }
}

/// Memory for intermediate values, shared by all graphs of a backend: only one runs at a time.
pub struct Arena(g::ggml_gallocr_t);

// SAFETY: only touched through &mut.
unsafe impl Send for Arena {}

impl Arena {
    pub fn new() -> Self {
        // SAFETY: plain constructors.
        Self(unsafe { g::ggml_gallocr_new(g::ggml_backend_cpu_buffer_type()) })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        // SAFETY: the allocator is live and has one buffer.
        unsafe { g::ggml_gallocr_get_buffer_size(self.0, 0) }
    }

    /// Gives every node of the graph its place. Returns whether the arena had to move, which invalidates all other graphs.
    pub fn place(&mut self, graph: &mut Graph) -> Result<bool> {
        let before = self.bytes();
        // Planned anew each time: ggml would take the last plan for any graph with as many nodes, though others of them are kept.
        // SAFETY: both are live.
        let placed = unsafe {
            g::ggml_gallocr_reserve(self.0, graph.graph) && g::ggml_gallocr_alloc_graph(self.0, graph.graph)
        };
        if !placed {
            return Err(Error::Runtime("ggml could not place a graph in scratch memory: lower -ub".into()));
        }
        let moved = self.bytes() != before;
        if moved {
            graph.advise_huge_pages();
        }
        Ok(moved)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: made by ggml_gallocr_new, freed once.
        unsafe { g::ggml_gallocr_free(self.0) }
    }
}

/// Runs graphs node by node on the calling thread; custom nodes call their team in.
pub struct Runner {
    pool: *mut g::ggml_threadpool,
    work: Vec<u8>,
}

// SAFETY: only touched through &mut.
unsafe impl Send for Runner {}

impl Runner {
    pub fn new() -> Result<Self> {
        // SAFETY: plain constructors; a null result is checked.
        let pool = unsafe {
            let mut params = g::ggml_threadpool_params_default(1);
            g::ggml_threadpool_new(&raw mut params)
        };
        if pool.is_null() {
            return Err(Error::Runtime("ggml could not make a thread pool".into()));
        }
        Ok(Self { pool, work: vec![] })
    }

    /// Runs a placed graph; `interrupt` breaks it off between two nodes.
    pub fn run(&mut self, graph: &mut Graph, interrupt: &Arc<AtomicBool>) -> Result<()> {
        unsafe extern "C" fn stop(flag: *mut c_void) -> bool {
            // SAFETY: `flag` is the AtomicBool below, borrowed for the run.
            unsafe { (*flag.cast::<AtomicBool>()).load(Ordering::Relaxed) }
        }
        graph.clock.begin();
        // SAFETY: graph and pool are live; the work buffer is as large as the plan asks.
        let status = unsafe {
            let mut plan = g::ggml_graph_plan(graph.graph, 1, self.pool);
            if self.work.len() < plan.work_size {
                self.work.resize(plan.work_size, 0);
            }
            plan.work_data = self.work.as_mut_ptr();
            plan.abort_callback = Some(stop);
            plan.abort_callback_data = Arc::as_ptr(interrupt).cast_mut().cast();
            g::ggml_graph_compute(graph.graph, &raw mut plan)
        };
        graph.clock.end();
        match status {
            g::GGML_STATUS_SUCCESS => Ok(()),
            g::GGML_STATUS_ABORTED => Err(Error::Interrupted),
            other => Err(Error::Runtime(format!("ggml could not run a graph: status {other}"))),
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // SAFETY: made by ggml_threadpool_new, freed once.
        unsafe { g::ggml_threadpool_free(self.pool) }
    }
}

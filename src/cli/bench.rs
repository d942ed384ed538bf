//! `clsa bench`: tokens per second of prompt processing and generation.
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use indicatif::ProgressBar;

use super::model::{CacheTypeArg, Device, GpuArgs, GpuMemoryArgs, ModelArgs};
use super::{stdout_error, token_bar};
use crate::backend::{Routing, ggml::Repack};
use crate::bench::contest::{Contest, Plan, Samples, Way};
use crate::bench::limits::{self, Machine, Reads};
use crate::bench::peer::Peer;
use crate::bench::report::{self, Columns, Format, Report, Row};
use crate::bench::{Bench, Fill, Test, chart, check, list, mean_and_deviation, median, plot};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Model;
use crate::placement::GpuLayers;

/// Numbers, a list or a range.
#[derive(Clone, Debug)]
pub struct Numbers(Vec<usize>);

impl std::str::FromStr for Numbers {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        list::numbers(s).map(Self)
    }
}

/// Counts of layers on GPUs: `auto`, `all`, numbers and ranges.
#[derive(Clone, Debug)]
pub struct LayerCounts(Vec<GpuLayers>);

impl std::str::FromStr for LayerCounts {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let mut counts = vec![];
        for part in s.split(',') {
            match part.parse() {
                Ok(count) => counts.push(count),
                Err(_) => counts.extend(list::numbers(part)?.into_iter().map(GpuLayers::First)),
            }
        }
        Ok(Self(counts))
    }
}

/// Stands for the Transformer's own file in `--with-llama-cpp`.
const SAME_FILE: &str = "-";

/// Arguments of `clsa bench`. Lists and ranges give the cross product.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A GGUF file (repeatable); the bundled model without it
    #[arg(short, long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// Prompt lengths to process
    #[arg(short = 'p', long, value_name = "LIST", default_value = "512")]
    n_prompt: Numbers,
    /// Numbers of tokens to generate
    #[arg(short = 'n', long, value_name = "LIST", default_value = "128")]
    n_gen: Numbers,
    /// Depths: positions in the cache before the test
    #[arg(short = 'd', long, value_name = "LIST", default_value = "0")]
    n_depth: Numbers,
    /// A prompt and an answer in one test: P,N (-pg; repeatable)
    #[arg(long, value_name = "P,N")]
    prompt_gen: Vec<String>,
    /// Prompt tokens handed over at a time, each time with the logits of the last one; 0: the whole prompt
    #[arg(short = 'b', long, value_name = "LIST", default_value = "0")]
    batch_size: Numbers,
    /// Rows of a micro-batch (-ub); 0: 512, with AMX 2048, on a GPU 4096
    #[arg(long, value_name = "LIST", default_value = "0")]
    ubatch_size: Numbers,
    /// Threads; 0: one for each core
    #[arg(short, long, value_name = "LIST", default_value = "0")]
    threads: Numbers,
    /// Sequences at a time (-np)
    #[arg(long, value_name = "LIST", default_value = "1")]
    parallel: Numbers,
    /// Types of cached keys (-ctk)
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "f16")]
    cache_type_k: Vec<CacheTypeArg>,
    /// Types of cached values (-ctv)
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "f16")]
    cache_type_v: Vec<CacheTypeArg>,
    /// Routing modes: clsa, dense, per-layer, every-N, block-B; the model's own without it
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    routing: Vec<Routing>,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Output format
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Format,
    /// Where to run: auto, cpu, cuda (all GPUs), cuda:N, cuda:N,cuda:M, reference (the slow oracle, f32 caches only)
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Device,
    /// Layers on GPUs, from the first on (-ngl): auto (all, or as many as fit), all, numbers
    #[arg(long, env = "CLSA_GPU_LAYERS", value_name = "LIST", default_value = "auto")]
    gpu_layers: LayerCounts,
    #[command(flatten)]
    gpu_memory: GpuMemoryArgs,
    /// How the caches come to hold the depth
    #[arg(long, value_name = "HOW", default_value = "prefill")]
    fill: Fill,
    /// Compare architectures of one shape: give a Transformer, a YOCO and a CLSA file (-m, each optional); the CLSA file also runs with
    /// routing per-layer, every-4 and block-64 (--routing chooses others). All take turns, repetition by repetition; ratios are medians
    /// of pairs, over the Transformer or else the first
    #[arg(long)]
    compare: bool,
    /// Let the tests take turns as well, repetition by repetition: one at another depth is then brought there each time
    #[arg(long)]
    interleave: bool,
    /// Time llama.cpp on this Transformer file in turn with ours (CPU, same threads); with --compare on the Transformer's file
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = SAME_FILE)]
    with_llama_cpp: Option<PathBuf>,
    /// A repacked copy of the weights: auto, on, off
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    repack: Repack,
    /// Draw tokens per second over depth as an SVG file, and bars on standard error
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Measure nothing: take the rows of earlier runs (-o json or jsonl; repeatable)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "compare", "with_llama_cpp"])]
    read: Vec<PathBuf>,
    /// Measure the machine first (bandwidth of reading and copying, rate of products; on a CPU its reads again after each repetition)
    /// and add a column: the least time that the bytes and operations of a test allow, as a share of the time it took
    #[arg(long)]
    limits: bool,
    /// Time each part of a step (or of a prompt) in runs of their own: embedding, projections, attention, feed-forward, scoring, top-k,
    /// logits, sampling; layer by layer in json
    #[arg(long)]
    breakdown: bool,
    /// First compare the logits of a short prompt with the f32 reference (slow on large models), and fail where they differ
    #[arg(long)]
    check: bool,
    /// Leave out the warm-up run
    #[arg(long)]
    no_warmup: bool,
}

/// Runs `clsa bench`.
///
/// # Errors
/// Those of models and engines; [`Error::Interrupted`].
pub fn run(args: &BenchArgs) -> Result<()> {
    let stop = interrupt::requested()?;
    let earlier = args.read.iter().map(|path| report::read(path)).collect::<Result<Vec<_>>>()?.concat();
    let columns = Columns {
        gpu_layers: args.gpu_layers.0.len() > 1
            || earlier.windows(2).any(|r| r[0].n_gpu_layers != r[1].n_gpu_layers),
        limits: args.limits || earlier.iter().any(|r| r.share_of_limit.is_some()),
        compare: args.compare || earlier.iter().any(|r| r.speedup.is_some()),
        llama_cpp: args.with_llama_cpp.is_some() || earlier.iter().any(|r| r.ratio_to_llama_cpp.is_some()),
    };
    let tests = args.tests()?;
    let mut report = Report::new(io::stdout().lock(), args.output, columns);
    let mut rows = vec![];
    let mut emit = |row: Row| {
        report.row(&row).map_err(stdout_error)?;
        rows.push(row);
        Ok(())
    };
    if args.read.is_empty() {
        for group in args.groups()? {
            for setting in args.settings() {
                Session::open(args, &setting, &group, &tests, &stop)?.run(args, &tests, &mut emit)?;
            }
        }
    } else {
        earlier.into_iter().try_for_each(&mut emit)?;
    }
    report.finish().map_err(stdout_error)?;
    if let Some(path) = &args.plot {
        let svg = plot::svg(&rows)?;
        std::fs::write(path, svg).map_err(|source| Error::Io { path: path.clone(), source })?;
    }
    if args.plot.is_some() || args.compare {
        eprint!("\n{}", chart::chart(&rows));
    }
    Ok(())
}

/// A file that takes part.
struct Entrant {
    model: Model,
    path: PathBuf,
    /// Modes it runs in.
    routing: Vec<Routing>,
}

impl Entrant {
    fn open(path: PathBuf, modes: &[Routing]) -> Result<Self> {
        let model = Model::open(&path)?;
        let own = if model.config.indexer.is_some() { Routing::Clsa } else { Routing::Dense };
        let routing = if modes.is_empty() { vec![own] } else { modes.to_vec() };
        Ok(Self { model, path, routing })
    }

    /// Its name in a comparison.
    fn name(&self, routing: Routing) -> String {
        match (self.model.config.is_yoco(), self.model.config.indexer.is_some(), routing) {
            (false, ..) => "Transformer".into(),
            (true, false, _) => "YOCO (dense)".into(),
            (true, true, Routing::Clsa) => "CLSA".into(),
            (true, true, mode) => mode.to_string(),
        }
    }
}

/// One combination of settings.
struct Setting {
    batch: usize,
    ubatch: usize,
    threads: usize,
    gpu_layers: GpuLayers,
    k: CacheTypeArg,
    v: CacheTypeArg,
    /// What is said of it where several are compared.
    label: String,
}

impl BenchArgs {
    fn tests(&self) -> Result<Vec<Test>> {
        let mut shapes = vec![];
        shapes.extend(self.n_prompt.0.iter().filter(|p| **p > 0).map(|&p| (p, 0)));
        shapes.extend(self.n_gen.0.iter().filter(|n| **n > 0).map(|&n| (0, n)));
        for pair in &self.prompt_gen {
            match list::numbers(pair).as_deref() {
                Ok([p, n]) if *p > 0 && *n > 0 => shapes.push((*p, *n)),
                _ => return Err(Error::Input(format!("-pg {pair}: expected two numbers like 512,128"))),
            }
        }
        let mut tests = vec![];
        for &depth in &self.n_depth.0 {
            for &sequences in &self.parallel.0 {
                let sequences = sequences.max(1);
                tests.extend(shapes.iter().map(|&(prompt, generate)| Test {
                    prompt,
                    generate,
                    depth,
                    sequences,
                }));
            }
        }
        Ok(tests)
    }

    /// Files that are alive together: all of a comparison, or one at a time.
    fn groups(&self) -> Result<Vec<Vec<Entrant>>> {
        let models = match self.model.as_slice() {
            [] => vec![self.model_args(None, &self.settings()[0]).path()?],
            models => models.to_vec(),
        };
        if !self.compare {
            return models.into_iter().map(|path| Ok(vec![Entrant::open(path, &self.routing)?])).collect();
        }
        let mut entrants: Vec<Entrant> =
            models.into_iter().map(|path| Entrant::open(path, &[])).collect::<Result<_>>()?;
        check_one_shape(&entrants)?;
        let has_dense = entrants.iter().any(|e| e.model.config.is_yoco() && e.model.config.indexer.is_none());
        for entrant in entrants.iter_mut().filter(|e| e.model.config.indexer.is_some()) {
            entrant.routing = match self.routing.as_slice() {
                [] => {
                    let dense = (!has_dense).then_some(Routing::Dense);
                    let modes = [Routing::Clsa, Routing::Every(1), Routing::Every(4), Routing::Block(64)];
                    dense.into_iter().chain(modes).collect()
                }
                modes => modes.to_vec(),
            };
        }
        // The Transformer first: it is what the others are compared with.
        entrants.sort_by_key(|e| e.model.config.is_yoco());
        Ok(vec![entrants])
    }

    fn settings(&self) -> Vec<Setting> {
        let mut settings = vec![];
        for &batch in &self.batch_size.0 {
            for &ubatch in &self.ubatch_size.0 {
                for &threads in &self.threads.0 {
                    for &gpu_layers in &self.gpu_layers.0 {
                        for &k in &self.cache_type_k {
                            for &v in &self.cache_type_v {
                                let label = String::new();
                                let setting = Setting { batch, ubatch, threads, gpu_layers, k, v, label };
                                settings.push(Setting { label: self.label(&setting), ..setting });
                            }
                        }
                    }
                }
            }
        }
        settings
    }

    /// What tells a setting from the others.
    fn label(&self, setting: &Setting) -> String {
        let Setting { batch, ubatch, threads, gpu_layers, k, v, .. } = setting;
        let parts = [
            (self.batch_size.0.len(), format!(" b{batch}")),
            (self.ubatch_size.0.len(), format!(" ub{ubatch}")),
            (self.threads.0.len(), format!(" t{threads}")),
            (self.gpu_layers.0.len(), format!(" ngl {gpu_layers}")),
            (self.cache_type_k.len(), format!(" K {k:?}").to_lowercase()),
            (self.cache_type_v.len(), format!(" V {v:?}").to_lowercase()),
        ];
        parts.into_iter().filter(|(n, _)| *n > 1).map(|(_, part)| part).collect()
    }

    fn model_args(&self, model: Option<PathBuf>, setting: &Setting) -> ModelArgs {
        ModelArgs {
            model,
            ctx_size: 0,
            ubatch_size: setting.ubatch,
            threads: setting.threads,
            cache_type_k: setting.k,
            cache_type_v: setting.v,
            routing: vec![],
            top_k_tokens: None,
            device: self.device.clone(),
            gpu: GpuArgs { gpu_layers: setting.gpu_layers, memory: self.gpu_memory.clone() },
            repack: self.repack,
            verbose: false,
        }
    }
}

/// Whether files can be compared: the same widths, heads and layers.
fn check_one_shape(entrants: &[Entrant]) -> Result<()> {
    let shape = |c: &Config| {
        [
            ("layers", c.n_layer),
            ("hidden values", c.hidden),
            ("feed-forward values", c.ffn),
            ("tokens in the vocabulary", c.vocab),
            ("query heads", c.self_heads.n_head),
            ("KV heads", c.self_heads.n_kv),
            ("values per head", c.self_heads.head_dim),
        ]
    };
    let Some((first, others)) = entrants.split_first() else { return Ok(()) };
    for other in others {
        for ((what, a), (_, b)) in shape(&first.model.config).into_iter().zip(shape(&other.model.config)) {
            if a != b {
                return Err(Error::Input(format!(
                    "--compare wants models of one shape: {} has {a} {what}, {} has {b}",
                    first.path.display(),
                    other.path.display()
                )));
            }
        }
    }
    Ok(())
}

/// Engines for a group of files in one setting.
struct Session<'a> {
    contest: Contest,
    setting: &'a Setting,
    threads: usize,
    /// What runs, with the file it runs on and its name; llama.cpp last.
    ways: Vec<(Way, &'a Model, String)>,
    peer_model: Option<Model>,
    /// Of each engine's device, where they were asked for.
    limits: Vec<Machine>,
    /// On a CPU, what measures its reads again, and what it measured between the repetitions of the tests in hand.
    reads: Option<Reads>,
    read_rates: Vec<f64>,
}

impl<'a> Session<'a> {
    fn open(
        args: &BenchArgs,
        setting: &'a Setting,
        entrants: &'a [Entrant],
        tests: &[Test],
        stop: &Arc<AtomicBool>,
    ) -> Result<Self> {
        let sequences = tests.iter().map(|t| t.sequences).max().unwrap_or(1);
        let mut context = tests.iter().map(Test::context).max().unwrap_or(1);
        if args.check {
            let top_k = entrants.iter().filter_map(|e| e.model.config.indexer).map(|ix| ix.top_k).max();
            context = context.max(check::positions(top_k.unwrap_or(0)));
        }
        let (mut benches, mut ways, mut threads, mut max_rows) = (vec![], vec![], 1, 1);
        for (bench, entrant) in entrants.iter().enumerate() {
            let model_args = args.model_args(Some(entrant.path.clone()), setting);
            let mut options = model_args.options(&entrant.model, sequences);
            options.context = context;
            (threads, max_rows) = (model_args.threads(), options.max_rows);
            let engine = model_args.engine(&entrant.model, &options, Arc::clone(stop))?;
            benches.push(Bench::new(engine, setting.batch));
            for &routing in &entrant.routing {
                let name = if args.compare { entrant.name(routing) } else { entrant.file_name(routing) };
                ways.push((Way::Ours { bench, routing }, &entrant.model, name + &setting.label));
            }
        }
        let peer_path = match args.with_llama_cpp.as_deref() {
            Some(path) if path.as_os_str() == SAME_FILE => {
                let transformer = entrants.iter().find(|e| !e.model.config.is_yoco());
                Some(transformer.map(|e| e.path.as_path()).ok_or_else(|| {
                    Error::Input(
                        "--with-llama-cpp needs a Transformer file: name one after it, or with -m".into(),
                    )
                })?)
            }
            path => path,
        };
        let peer = peer_path.map(|path| Peer::open(path, context, max_rows, threads)).transpose()?;
        let peer_model = peer_path.map(Model::open).transpose()?;
        let mut session = Self {
            contest: Contest { benches, peer },
            setting,
            threads,
            ways,
            peer_model,
            limits: vec![],
            reads: None,
            read_rates: vec![],
        };
        session.check(args)?;
        if args.limits {
            session.measure_limits()?;
        }
        Ok(session)
    }

    /// Compares every way with the reference.
    fn check(&mut self, args: &BenchArgs) -> Result<()> {
        for (way, _, name) in self.ways.iter().filter(|_| args.check) {
            if let Way::Ours { bench, routing } = *way {
                let bench = &mut self.contest.benches[bench];
                bench.set_routing(routing)?;
                let difference = bench.check()?;
                eprintln!("{name}: logits differ from the reference's by {difference:.1e} of their size");
            }
        }
        Ok(())
    }

    fn measure_limits(&mut self) -> Result<()> {
        for bench in &self.contest.benches {
            // All engines of a run are on the same device.
            let machine = match self.limits.first() {
                Some(machine) => *machine,
                None if bench.engine().backend().describe().starts_with("CUDA") => Machine::of_gpu(0)?,
                None => {
                    let machine = Machine::of_cpu(self.threads)?;
                    self.reads = Some(Machine::reads(self.threads)?);
                    machine
                }
            };
            if self.limits.is_empty() {
                eprintln!("{machine}");
            }
            self.limits.push(machine);
        }
        Ok(())
    }

    /// Bytes per second that could be read between the repetitions, where that was measured.
    fn read_bandwidth(&self) -> Option<f64> {
        (!self.read_rates.is_empty()).then(|| median(&self.read_rates))
    }

    /// The least time that the machine's limits allow, over the median time it took.
    fn share_of_limit(&self, way: Way, model: &Model, test: &Test, samples: &Samples) -> Option<f64> {
        let Way::Ours { bench, routing } = way else { return None };
        let machine = *self.limits.get(bench)?;
        let machine = Machine { read: self.read_bandwidth().unwrap_or(machine.read), ..machine };
        let bench = &self.contest.benches[bench];
        let (spec, (_, top_k)) = (bench.engine().spec(), bench.engine().routing());
        let setting = limits::Setting { model, spec, routing, top_k, batch: bench.batch() };
        Some(machine.seconds(&setting.work(test)) / median(&samples.seconds()))
    }

    fn run(
        &mut self,
        args: &BenchArgs,
        tests: &[Test],
        emit: &mut dyn FnMut(Row) -> Result<()>,
    ) -> Result<()> {
        let plan = Plan { fill: args.fill, repetitions: args.repetitions.max(1), warm_up: !args.no_warmup };
        let all = std::mem::take(&mut self.ways);
        // Ways of a comparison take turns; otherwise one follows the other, each in turn with llama.cpp.
        let rounds: Vec<&[(Way, &Model, String)]> =
            if args.compare { vec![&all] } else { all.chunks(1).collect() };
        let bar = token_bar("bench");
        let peers = usize::from(self.contest.peer.is_some());
        let runs = rounds.iter().map(|r| r.len() + peers).sum::<usize>() * tests.len();
        bar.set_length((runs * (plan.repetitions + usize::from(plan.warm_up))) as u64);
        let together = if args.interleave { tests.len() } else { 1 };
        for round in rounds {
            for tests in tests.chunks(together.max(1)) {
                self.measure(args, plan, round, tests, &bar, emit)?;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Measures the tests in turns, and hands out their rows.
    fn measure(
        &mut self,
        args: &BenchArgs,
        plan: Plan,
        round: &[(Way, &Model, String)],
        tests: &[Test],
        bar: &ProgressBar,
        emit: &mut dyn FnMut(Row) -> Result<()>,
    ) -> Result<()> {
        let mut ways: Vec<Way> = round.iter().map(|(way, ..)| *way).collect();
        ways.extend(self.contest.peer.is_some().then_some(Way::LlamaCpp));
        self.read_rates.clear();
        let all = self.contest.measure(&ways, tests, plan, || {
            bar.inc(1);
            self.read_rates.extend(self.reads.as_ref().map(Reads::rate));
        })?;
        for (test, samples) in tests.iter().zip(&all) {
            self.rows(args, plan, round, test, samples, emit)?;
        }
        Ok(())
    }

    /// The rows of one test.
    fn rows(
        &mut self,
        args: &BenchArgs,
        plan: Plan,
        round: &[(Way, &Model, String)],
        test: &Test,
        samples: &[Samples],
        emit: &mut dyn FnMut(Row) -> Result<()>,
    ) -> Result<()> {
        let theirs = self.contest.peer.is_some().then(|| samples.last()).flatten();
        let base = args.compare.then(|| samples.first()).flatten();
        for ((way, model, name), samples) in round.iter().zip(samples) {
            let row = self.row(*way, model, name, test, plan.fill, samples);
            let parts = if args.breakdown { self.contest.breakdown(*way, test, plan)? } else { None };
            emit(Row {
                breakdown: parts.unwrap_or_default(),
                share_of_limit: self.share_of_limit(*way, model, test, samples),
                read_bandwidth: self.read_bandwidth(),
                speedup: base.and_then(|base| samples.speedup_over(base)),
                ratio_to_llama_cpp: theirs.and_then(|theirs| samples.speedup_over(theirs)),
                ..row
            })?;
        }
        if let (Some(model), Some(samples)) = (&self.peer_model, theirs.filter(|t| !t.prompt.is_empty())) {
            let name = format!("llama.cpp{}", self.setting.label);
            let row = self.row(Way::LlamaCpp, model, &name, test, plan.fill, samples);
            emit(Row { speedup: base.and_then(|base| samples.speedup_over(base)), ..row })?;
        }
        Ok(())
    }

    fn row(&self, way: Way, model: &Model, name: &str, test: &Test, fill: Fill, samples: &Samples) -> Row {
        let seconds = samples.seconds();
        let rates: Vec<f64> = seconds.iter().map(|s| test.tokens() as f64 / s).collect();
        let (avg_ts, stddev_ts) = mean_and_deviation(&rates);
        let (backend, routing, bench) = match way {
            Way::Ours { bench, routing } => {
                let engine = self.contest.benches[bench].engine();
                (engine.backend().describe(), routing, bench)
            }
            Way::LlamaCpp => ("llama.cpp, CPU".into(), Routing::Dense, 0),
        };
        let spec = self.contest.benches[bench].engine().spec();
        Row {
            series: name.to_owned(),
            build: concat!(env!("CARGO_PKG_VERSION"), " (", env!("CLSA_COMMIT"), ")").into(),
            backend,
            model: file_name(model.file.path()),
            model_size: model.weights.all().map(|w| w.bytes as u64).sum(),
            model_n_params: model.weights.all().map(|w| (w.n_in * w.n_out) as u64).sum(),
            n_threads: self.threads,
            n_gpu_layers: self.setting.gpu_layers.to_string(),
            n_batch: self.setting.batch,
            n_ubatch: spec.max_rows,
            type_k: format!("{:?}", spec.k).to_lowercase(),
            type_v: format!("{:?}", spec.v).to_lowercase(),
            routing: routing.to_string(),
            test: *test,
            fill,
            samples_s: seconds,
            samples_prompt_s: samples.prompt.clone(),
            avg_ts,
            stddev_ts,
            share_of_limit: None,
            read_bandwidth: None,
            speedup: None,
            ratio_to_llama_cpp: None,
            breakdown: vec![],
        }
    }
}

impl Entrant {
    /// Its name where files are not compared by architecture.
    fn file_name(&self, routing: Routing) -> String {
        let stem = self.path.file_stem().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        if self.routing.len() > 1 { format!("{stem} {routing}") } else { stem }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

//! `clsa bench`: tokens per second of prompt processing and generation.
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::model::{CacheTypeArg, Device, ModelArgs};
use super::stdout_error;
use crate::backend::Routing;
use crate::bench::peer::Peer;
use crate::bench::report::{Columns, Format, Report, Row};
use crate::bench::{Bench, Fill, Test, list, mean_and_deviation, median};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Model;

/// Numbers, a list or a range.
#[derive(Clone, Debug)]
pub struct Numbers(Vec<usize>);

impl std::str::FromStr for Numbers {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        list::numbers(s).map(Self)
    }
}

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
    /// Rows of a micro-batch (-ub)
    #[arg(long, value_name = "LIST", default_value = "512")]
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
    /// Where to run
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Device,
    /// How the caches come to hold the depth: by prefill, or by random rows
    #[arg(long, value_name = "HOW", default_value = "prefill")]
    fill: FillArg,
    /// Time llama.cpp on this Transformer file in the same run, repetition by repetition in turn (CPU, same threads)
    #[arg(long, value_name = "FILE")]
    with_llama_cpp: Option<PathBuf>,
    /// Leave out the warm-up run
    #[arg(long)]
    no_warmup: bool,
}

/// How the depth is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum FillArg {
    /// Process a prompt of that length
    Prefill,
    /// Random rows (marked in the output)
    Random,
}

/// Runs `clsa bench`.
///
/// # Errors
/// Those of models and engines; [`Error::Interrupted`].
pub fn run(args: &BenchArgs) -> Result<()> {
    let stop = interrupt::requested()?;
    let tests = args.tests()?;
    let columns = Columns { llama_cpp: args.with_llama_cpp.is_some(), ..Columns::default() };
    let mut report = Report::new(io::stdout().lock(), args.output, columns);
    let bundled =
        ModelArgs { model: None, ..args.model_args(None, 0, 0, CacheTypeArg::F16, CacheTypeArg::F16, None) };
    let models = if args.model.is_empty() { vec![bundled.path()?] } else { args.model.clone() };
    for path in models {
        let model = Model::open(&path)?;
        for setting in args.settings(&path) {
            setting.run(args, &model, &tests, &stop, &mut |row| report.row(row).map_err(stdout_error))?;
        }
    }
    report.finish().map_err(stdout_error)
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

    fn settings(&self, path: &std::path::Path) -> Vec<Setting> {
        let routing: Vec<_> = match self.routing.as_slice() {
            [] => vec![None],
            modes => modes.iter().copied().map(Some).collect(),
        };
        let mut settings = vec![];
        for &ub in &self.ubatch_size.0 {
            for &threads in &self.threads.0 {
                for &k in &self.cache_type_k {
                    for &v in &self.cache_type_v {
                        for &mode in &routing {
                            settings.push(Setting(self.model_args(
                                Some(path.to_owned()),
                                ub,
                                threads,
                                k,
                                v,
                                mode,
                            )));
                        }
                    }
                }
            }
        }
        settings
    }

    fn model_args(
        &self,
        model: Option<PathBuf>,
        ubatch_size: usize,
        threads: usize,
        cache_type_k: CacheTypeArg,
        cache_type_v: CacheTypeArg,
        routing: Option<Routing>,
    ) -> ModelArgs {
        ModelArgs {
            model,
            ctx_size: 0,
            ubatch_size,
            threads,
            cache_type_k,
            cache_type_v,
            routing: routing.into_iter().collect(),
            top_k_tokens: None,
            device: self.device,
            verbose: false,
        }
    }
}

/// One combination of settings.
struct Setting(ModelArgs);

impl Setting {
    fn run(
        &self,
        args: &BenchArgs,
        model: &Model,
        tests: &[Test],
        stop: &Arc<AtomicBool>,
        row: &mut dyn FnMut(&Row) -> Result<()>,
    ) -> Result<()> {
        let sequences = tests.iter().map(|t| t.sequences).max().unwrap_or(1);
        let mut options = self.0.options(model, sequences);
        options.context = tests.iter().map(Test::context).max().unwrap_or(1);
        let mut bench = Bench::new(self.0.engine(model, &options, Arc::clone(stop))?);
        let fill = match args.fill {
            FillArg::Prefill => Fill::Prefill,
            FillArg::Random => Fill::Random,
        };
        let context = options.context;
        let mut peer = (args.with_llama_cpp.as_deref())
            .map(|path| {
                Ok::<_, Error>((path, Peer::open(path, context, options.max_rows, self.0.threads())?))
            })
            .transpose()?;
        for test in tests {
            let mut peer = peer.as_mut().filter(|_| test.sequences == 1);
            if !args.no_warmup {
                let (prompt, generate) = (test.prompt.min(options.max_rows), test.generate.min(2));
                let warm_up = Test { prompt, generate, ..*test };
                bench.prepare(test, fill)?;
                bench.run(&warm_up)?;
                if let Some((_, peer)) = &mut peer {
                    peer.prepare(test.depth)?;
                    peer.run(&warm_up)?;
                }
            }
            let (mut samples_s, mut samples_prompt_s, mut peer_s) = (vec![], vec![], vec![]);
            for _ in 0..args.repetitions.max(1) {
                bench.prepare(test, fill)?;
                let (prompt, generate) = bench.run(test)?;
                samples_s.push(prompt + generate);
                samples_prompt_s.push(prompt);
                if let Some((_, peer)) = &mut peer {
                    peer.prepare(test.depth)?;
                    peer_s.push(peer.run(test)?);
                }
            }
            let ratios: Vec<f64> =
                samples_s.iter().zip(&peer_s).map(|(ours, theirs)| theirs / ours).collect();
            let rates = |samples: &[f64]| {
                let rates: Vec<f64> = samples.iter().map(|s| test.tokens() as f64 / s).collect();
                mean_and_deviation(&rates)
            };
            let (avg_ts, stddev_ts) = rates(&samples_s);
            let ours = Row {
                build: concat!(env!("CARGO_PKG_VERSION"), " (", env!("CLSA_COMMIT"), ")").into(),
                backend: bench.engine().backend().describe(),
                model: model
                    .file
                    .path()
                    .file_name()
                    .map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
                model_size: model.weights.all().map(|w| w.bytes as u64).sum(),
                model_n_params: model.weights.all().map(|w| (w.n_in * w.n_out) as u64).sum(),
                n_threads: self.0.threads(),
                n_ubatch: options.max_rows,
                type_k: format!("{:?}", options.k).to_lowercase(),
                type_v: format!("{:?}", options.v).to_lowercase(),
                routing: bench.engine().routing().0.to_string(),
                test: *test,
                fill,
                samples_s,
                samples_prompt_s,
                avg_ts,
                stddev_ts,
                share_of_limit: None,
                ratio_to_llama_cpp: peer.is_some().then(|| median(&ratios)),
            };
            let ours = describe(ours, model);
            row(&ours)?;
            if let Some((path, _)) = peer {
                let (avg_ts, stddev_ts) = rates(&peer_s);
                let file = Model::open(path)?;
                row(&Row {
                    backend: "llama.cpp, CPU".into(),
                    routing: "dense".into(),
                    fill: Fill::Prefill,
                    samples_s: peer_s,
                    samples_prompt_s: vec![],
                    avg_ts,
                    stddev_ts,
                    ratio_to_llama_cpp: None,
                    ..describe(ours, &file)
                })?;
            }
        }
        Ok(())
    }
}

/// The row with the model's name and sizes.
fn describe(row: Row, model: &Model) -> Row {
    Row {
        model: model.file.path().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
        model_size: model.weights.all().map(|w| w.bytes as u64).sum(),
        model_n_params: model.weights.all().map(|w| (w.n_in * w.n_out) as u64).sum(),
        ..row
    }
}

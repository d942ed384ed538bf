//! Arguments that choose a model, a device and the caches; shared by every command that runs a model.
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use ggml_kernels::simd::Level;

use super::{human_bytes, threads_from};
use crate::backend::cuda::KvDevice;
pub use crate::backend::open::Device;
use crate::backend::open::{Wanted, open};
use crate::backend::{
    Backend, Routing,
    ggml::{Ggml, Repack},
    probe::Probe,
    reference::Reference,
};
use crate::cache::CacheType;
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::placement::{self, GpuLayers, Needs};

/// Which model, on which device, with which caches.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// The GGUF file; the bundled model without it
    #[arg(short, long, env = "CLSA_MODEL", value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Positions of the context (-c); 0: the model's own, or what fits
    #[arg(short = 'c', long, env = "CLSA_CTX_SIZE", value_name = "N", default_value_t = 0)]
    pub ctx_size: usize,
    /// Rows of a micro-batch in prompt processing (-ub); 0: 512, with AMX 2048, on a GPU 4096
    #[arg(long, env = "CLSA_UBATCH_SIZE", value_name = "N", default_value_t = 0)]
    pub ubatch_size: usize,
    /// Threads (-t); 0: one for each core
    #[arg(short, long, env = "CLSA_THREADS", value_name = "N", default_value_t = 0, value_parser = threads_from(0))]
    pub threads: usize,
    /// Type of cached keys (-ctk)
    #[arg(long, env = "CLSA_CACHE_TYPE_K", value_name = "TYPE", default_value = "f16")]
    pub cache_type_k: CacheTypeArg,
    /// Type of cached values (-ctv)
    #[arg(long, env = "CLSA_CACHE_TYPE_V", value_name = "TYPE", default_value = "f16")]
    pub cache_type_v: CacheTypeArg,
    /// How cross layers choose positions: clsa, dense, per-layer, every-N, block-B; the model's own without it. Evaluations compare
    /// the modes of a list
    #[arg(long, env = "CLSA_ROUTING", value_name = "MODE", value_delimiter = ',')]
    pub routing: Vec<Routing>,
    /// Positions that routing selects instead of the model's own k
    #[arg(long, value_name = "K")]
    pub top_k_tokens: Option<usize>,
    /// Where to run: auto, cpu, cuda (all GPUs), cuda:N, cuda:N,cuda:M, reference (the slow oracle, f32 caches only)
    #[arg(long, env = "CLSA_DEVICE", value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// What goes on GPUs
    #[command(flatten)]
    pub gpu: GpuArgs,
    /// Keep a copy of the weights in the order the CPU kernels read best: on, off, or where it fits and soon pays
    #[arg(long, env = "CLSA_REPACK", value_name = "WHEN", default_value = "auto")]
    pub repack: Repack,
    /// Print the resolved settings and the memory table to standard error (-v)
    #[arg(short, long)]
    pub verbose: bool,
}

/// Names of cache types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheTypeArg {
    /// 32-bit floats
    F32,
    /// Half floats
    F16,
    /// 8-bit blocks
    #[value(name = "q8_0")]
    Q8_0,
}

impl From<CacheTypeArg> for CacheType {
    fn from(t: CacheTypeArg) -> Self {
        match t {
            CacheTypeArg::F32 => Self::F32,
            CacheTypeArg::F16 => Self::F16,
            CacheTypeArg::Q8_0 => Self::Q8_0,
        }
    }
}

/// What goes on GPUs.
#[derive(Clone, Debug, Default, Args)]
pub struct GpuArgs {
    /// Layers on GPUs, from the first on (-ngl): auto (all, or as many as fit), all, or a number; the CPU runs the others
    #[arg(long, env = "CLSA_GPU_LAYERS", value_name = "N", default_value = "auto")]
    pub gpu_layers: GpuLayers,
    /// Of those layers' memory
    #[command(flatten)]
    pub memory: GpuMemoryArgs,
}

/// Memory of layers on GPUs.
#[derive(Clone, Debug, Default, Args)]
pub struct GpuMemoryArgs {
    /// Where K and V of GPU layers lie: gpu, or cpu (page-locked memory: a token reads only the selected rows across the bus)
    #[arg(long, env = "CLSA_KV_DEVICE", value_name = "DEVICE", default_value = "gpu")]
    pub kv_device: KvDevice,
    /// MiB of each GPU's memory to use at most; all that is free without it
    #[arg(long, env = "CLSA_GPU_MEMORY", value_name = "MIB")]
    pub gpu_memory: Option<u64>,
}

impl ModelArgs {
    /// The model file: -m, or the bundled one.
    ///
    /// # Errors
    /// [`Error::Input`] when there is none.
    pub fn path(&self) -> Result<PathBuf> {
        if let Some(path) = &self.model {
            return Ok(path.clone());
        }
        const BUNDLED: &str = "models/smol-clsa-135m.gguf";
        let beside =
            std::env::current_exe().ok().and_then(|p| Some(p.parent()?.join("../share/clsa").join(BUNDLED)));
        let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(BUNDLED);
        let places = [Some(PathBuf::from(BUNDLED)), beside, Some(source)];
        places.into_iter().flatten().find(|p| p.is_file()).ok_or_else(|| {
            Error::Input("no model: name one with -m FILE (clsa convert makes one from a checkpoint)".into())
        })
    }

    /// Threads to use.
    #[must_use]
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }

    /// The model given to the engine by other means, on the CPU, with a context of `context`.
    #[must_use]
    pub(super) fn on_cpu_with(threads: usize, context: usize) -> Self {
        Self {
            model: None,
            ctx_size: context,
            ubatch_size: 0,
            threads,
            cache_type_k: CacheTypeArg::F16,
            cache_type_v: CacheTypeArg::F16,
            routing: vec![],
            top_k_tokens: None,
            device: Device::Cpu,
            gpu: GpuArgs::default(),
            repack: Repack::Off,
            verbose: false,
        }
    }

    /// The modes of `--routing`; without it the model's own, which is `None`.
    #[must_use]
    pub fn routings(&self) -> Vec<Option<Routing>> {
        match self.routing.as_slice() {
            [] => vec![None],
            modes => modes.iter().copied().map(Some).collect(),
        }
    }

    /// The same arguments with this one routing mode.
    #[must_use]
    pub fn with_routing(&self, routing: Option<Routing>) -> Self {
        Self { routing: routing.into_iter().collect(), ..self.clone() }
    }

    /// Rows of a micro-batch.
    fn micro_batch(&self) -> usize {
        let gpu = || crate::backend::cuda::availability().is_ok();
        match (self.ubatch_size, &self.device) {
            (0, Device::Cuda(_)) => 4096,
            (0, Device::Auto) if gpu() => 4096,
            // Weights are unpacked once for each micro-batch: the faster the products, the more rows it wants.
            (0, _) if Level::chosen() == Ok(Level::Amx) => 2048,
            (0, _) => 512,
            (n, _) => n.clamp(1, 8192),
        }
    }

    /// Bytes that caches may come from: a GPU's when the model fits there, this machine's otherwise.
    fn room(&self, model: &Model) -> u64 {
        let host = placement::free_memory();
        let on_gpu = matches!(self.device, Device::Auto | Device::Cuda(_))
            && self.gpu.memory.kv_device == KvDevice::Gpu;
        if !on_gpu || self.gpu.gpu_layers == GpuLayers::First(0) {
            return host;
        }
        let weights: u64 = model.weights.all().map(|w| w.bytes as u64).sum();
        let limit = self.gpu.memory.gpu_memory.map_or(u64::MAX, |mib| mib.saturating_mul(1 << 20));
        let free = crate::backend::cuda::free_memory().map(|free| free.min(limit).saturating_sub(weights));
        free.filter(|f| *f > 0).map_or(host, |free| free.min(host))
    }

    /// What to size an engine for; `n_seq` sequences.
    #[must_use]
    pub fn options(&self, model: &Model, n_seq: usize) -> Options {
        let index = if self.cache_type_k == CacheTypeArg::F32 { CacheType::F32 } else { CacheType::F16 };
        let mut options = Options {
            context: self.ctx_size,
            n_seq,
            max_rows: self.micro_batch(),
            k: self.cache_type_k.into(),
            v: self.cache_type_v.into(),
            index,
            routing: self.routing.first().copied(),
            top_k: self.top_k_tokens,
            ..Options::default()
        };
        if self.ctx_size == 0 {
            options.context = placement::auto_context(&model.config, &options, self.room(model));
        }
        options
    }

    /// Maps the model.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open(&self) -> Result<Model> {
        Model::open(&self.path()?)
    }

    /// A backend and an engine for `options`; setting `interrupt` stops what runs at the next node.
    ///
    /// # Errors
    /// What the backend reports; [`Error::Memory`] before anything is allocated when the caches do not fit; [`Error::Input`] for a
    /// list of routing modes, of which an engine has one (see [`Self::with_routing`]).
    pub fn engine(&self, model: &Model, options: &Options, interrupt: Arc<AtomicBool>) -> Result<Engine> {
        if self.routing.len() > 1 {
            return Err(Error::Input(format!(
                "--routing: found {} modes, expected one here: only evaluations compare several",
                self.routing.len()
            )));
        }
        let wanted = Wanted {
            device: self.device.clone(),
            gpu_layers: self.gpu.gpu_layers,
            kv: self.gpu.memory.kv_device,
            gpu_memory: self.gpu.memory.gpu_memory.map(|mib| mib.saturating_mul(1 << 20)),
            threads: self.threads(),
            repack: self.repack,
        };
        let opened = open(model, options.cache_spec(), &wanted, &interrupt)?;
        let gpu = self.verbose || crate::backend::cuda::availability().is_ok();
        if let Some(note) = opened.note.filter(|_| gpu) {
            eprintln!("{}", note.trim_end());
        }
        let mut engine = Engine::new(model.clone(), opened.backend, options)?;
        engine.set_interrupt(interrupt);
        if self.verbose {
            report(&engine, &opened.needs);
        }
        Ok(engine)
    }

    /// As [`Self::engine`], with a probe that sees what enters each product; on the CPU (or the reference) only.
    ///
    /// # Errors
    /// As [`Self::engine`]; [`Error::Input`] with `--device cuda`.
    pub fn probed_engine(
        &self,
        model: &Model,
        options: &Options,
        interrupt: Arc<AtomicBool>,
        probe: &Arc<Probe>,
    ) -> Result<Engine> {
        let spec = options.cache_spec();
        let backend: Box<dyn Backend> = match &self.device {
            Device::Cuda(_) => {
                return Err(Error::Input(
                    "activations are collected on the CPU only: use --device cpu".into(),
                ));
            }
            Device::Auto | Device::Cpu => {
                let mut cpu = Ggml::new(model.clone(), spec, self.threads(), Arc::clone(&interrupt))?;
                cpu.set_probe(Arc::clone(probe));
                Box::new(cpu)
            }
            Device::Reference => {
                let mut reference = Reference::new(model.clone(), spec)?;
                reference.set_probe(Arc::clone(probe));
                Box::new(reference)
            }
        };
        let mut engine = Engine::new(model.clone(), backend, options)?;
        engine.set_interrupt(interrupt);
        Ok(engine)
    }
}

/// The resolved settings and the memory table, on standard error.
fn report(engine: &Engine, needs: &[Needs]) {
    let (memory, spec, (routing, top_k)) = (engine.backend().memory(), engine.spec(), engine.routing());
    eprintln!("model    {}", engine.model().file.path().display());
    eprintln!("backend  {}", engine.backend().describe());
    eprintln!(
        "context  {} positions x {} sequences, micro-batch {}",
        engine.context(),
        spec.n_slots,
        spec.max_rows
    );
    eprintln!("caches   K {:?}, V {:?}, index keys {:?}", spec.k, spec.v, spec.index);
    eprintln!("routing  {routing}, top-k {top_k}");
    eprintln!("memory   weights  {:>12}", human_bytes(memory.weights));
    if memory.repacked > 0 {
        eprintln!("         repacked {:>12}  (in {:.1?})", human_bytes(memory.repacked), memory.repack_time);
    }
    eprintln!("         cache    {:>12}", human_bytes(memory.cache));
    eprintln!("         scratch  {:>12}", human_bytes(memory.scratch));
    if !needs.is_empty() {
        eprint!("{}", placement::table(needs));
    }
}

//! From what the user wants to backends: which layers go on which devices, planned before anything is allocated.
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use ggml_kernels::cuda;

use super::cuda::{Cuda, KvDevice, Share};
use super::ggml::{Ggml, Repack};
use super::reference::Reference;
use super::split::Split;
use super::{Backend, Memory, Part};
use crate::cache::CacheSpec;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::placement::{self, GpuLayers, Needs, device_cache_bytes, place, table};

/// Where to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// GPUs where there are any, and the CPU for what does not fit on them.
    #[default]
    Auto,
    /// This machine's cores.
    Cpu,
    /// NVIDIA GPUs by number, in this order; all of them when empty. One may be named twice: it then holds two parts.
    Cuda(Vec<usize>),
    /// The slow, plain f32 oracle (f32 caches only).
    Reference,
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(vec![])),
            "reference" => Ok(Self::Reference),
            _ => (s.split(','))
                .map(|one| one.strip_prefix("cuda:")?.parse().ok())
                .collect::<Option<Vec<usize>>>()
                .map(Self::Cuda)
                .ok_or_else(|| {
                    format!("found '{s}', expected auto, cpu, cuda, cuda:N, cuda:N,cuda:M or reference")
                }),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(list) if list.is_empty() => f.write_str("cuda"),
            Self::Cuda(list) => {
                let names: Vec<String> = list.iter().map(|n| format!("cuda:{n}")).collect();
                f.write_str(&names.join(","))
            }
            Self::Reference => f.write_str("reference"),
        }
    }
}

impl std::str::FromStr for KvDevice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "gpu" => Ok(Self::Gpu),
            "cpu" => Ok(Self::Cpu),
            _ => Err(format!("found '{s}', expected gpu or cpu")),
        }
    }
}

/// What the user wants.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Where to run.
    pub device: Device,
    /// Layers on GPUs.
    pub gpu_layers: GpuLayers,
    /// Where K and V of GPU layers lie.
    pub kv: KvDevice,
    /// Bytes of each GPU's memory to use at most.
    pub gpu_memory: Option<u64>,
    /// Threads of the CPU's part.
    pub threads: usize,
    /// Whether the CPU's part keeps a repacked copy of its weights.
    pub repack: Repack,
}

/// A backend, and how it came about.
pub struct Opened {
    /// Runs the model.
    pub backend: Box<dyn Backend>,
    /// What each device holds.
    pub needs: Vec<Needs>,
    /// What the user may not expect: that no GPU is used, or that the CPU does a part.
    pub note: Option<String>,
}

/// A GPU in the plan.
struct Gpu {
    device: cuda::Device,
    free: u64,
}

/// Plans, then makes the backend.
///
/// # Errors
/// [`Error::Input`] for a GPU that is not there, [`Error::Placement`] with the table of what is needed and free when it does not fit, and
/// what the backends report.
pub fn open(model: &Model, spec: CacheSpec, wanted: &Wanted, interrupt: &Arc<AtomicBool>) -> Result<Opened> {
    spec.check(&model.config)?;
    let gpus = match &wanted.device {
        Device::Reference => {
            let backend = Box::new(Reference::new(model.clone(), spec)?);
            return Ok(Opened { backend, needs: vec![], note: None });
        }
        Device::Cpu => vec![],
        Device::Cuda(list) => gpus(list, wanted)?,
        Device::Auto => match gpus(&[], wanted) {
            Ok(gpus) => gpus,
            Err(e) => {
                let mut opened = on_parts(model, spec, wanted, interrupt, &[], vec![])?;
                opened.note = Some(format!("running on the CPU: {e}"));
                return Ok(opened);
            }
        },
    };
    let free: Vec<u64> = gpus.iter().map(|g| g.free).collect();
    let (n_layer, n_self) = (model.config.n_layer, model.config.n_self);
    let first = |layers: &Range<usize>| Share { ordinal: 0, layers: layers.clone(), kv: wanted.kv };
    let needed = |layers: &Range<usize>| {
        // All GPUs are taken to be of one kind; each part checks again for its own.
        let device = gpus.first().map(|g| &g.device);
        device.map_or(0, |d| Cuda::needs(model, &spec, &first(layers), d).map_or(u64::MAX, |m| m.total()))
    };
    if gpus.is_empty() {
        return on_parts(model, spec, wanted, interrupt, &gpus, vec![]);
    }
    // What the kernels cannot take at all is an error of its own.
    Cuda::needs(model, &spec, &first(&(0..n_layer)), &gpus[0].device)?;
    let ranges = place(n_layer, n_self, &free, wanted.gpu_layers, needed);
    let all = ranges.as_ref().is_some_and(|r| r.iter().map(Range::len).sum::<usize>() == n_layer);
    let Some(ranges) = ranges else {
        let end = if let GpuLayers::First(n) = wanted.gpu_layers { n.min(n_layer) } else { n_layer };
        let layers = 0..end;
        let needs = gpus
            .iter()
            .map(|gpu| gpu_needs(model, &spec, wanted, gpu, &layers))
            .collect::<Result<Vec<_>>>()?;
        return Err(Error::Placement {
            table: table(&needs),
            remedy: "use -ngl auto, lower -c, -np or -ub, or use -ctk q8_0 -ctv q8_0 or --kv-device cpu"
                .into(),
        });
    };
    let none = ranges.iter().all(Range::is_empty);
    let mut opened = on_parts(model, spec, wanted, interrupt, &gpus, ranges)?;
    if none && wanted.gpu_layers != GpuLayers::First(0) {
        opened.note = Some("running on the CPU: no GPU has room for even one layer".into());
    } else if !all && wanted.gpu_layers == GpuLayers::Auto {
        opened.note = Some(format!(
            "the model does not fit the GPU memory; a part runs on the CPU:\n{}",
            table(&opened.needs)
        ));
    }
    Ok(opened)
}

/// The GPUs to use, with the memory that this process may take on each.
fn gpus(list: &[usize], wanted: &Wanted) -> Result<Vec<Gpu>> {
    let n = cuda::availability()?;
    let list: Vec<usize> = if list.is_empty() { (0..n).collect() } else { list.to_vec() };
    list.iter()
        .map(|&ordinal| {
            let device = cuda::Device::open(ordinal)?;
            let times = list.iter().filter(|&&o| o == ordinal).count() as u64;
            let free = (device.memory()?.0 as u64).saturating_sub(RESERVE);
            let free = free.min(wanted.gpu_memory.unwrap_or(u64::MAX)) / times;
            Ok(Gpu { device, free })
        })
        .collect()
}

/// Left to the driver: recorded graphs, kernels' local memory.
const RESERVE: u64 = 64 << 20;

fn gpu_needs(
    model: &Model,
    spec: &CacheSpec,
    wanted: &Wanted,
    gpu: &Gpu,
    layers: &Range<usize>,
) -> Result<Needs> {
    let share = Share { ordinal: gpu.device.ordinal(), layers: layers.clone(), kv: wanted.kv };
    let memory = Cuda::needs(model, spec, &share, &gpu.device)?;
    Ok(Needs { device: format!("cuda:{}", share.ordinal), layers: layers.clone(), memory, free: gpu.free })
}

/// Makes the parts: `ranges` on `gpus`, what comes after them on the CPU.
fn on_parts(
    model: &Model,
    spec: CacheSpec,
    wanted: &Wanted,
    interrupt: &Arc<AtomicBool>,
    gpus: &[Gpu],
    ranges: Vec<Range<usize>>,
) -> Result<Opened> {
    let c = &model.config;
    let placed: Vec<_> = gpus.iter().zip(ranges).filter(|(_, r)| !r.is_empty()).collect();
    let rest = placed.last().map_or(0, |(_, r)| r.end)..c.n_layer;
    let mut needs =
        placed.iter().map(|(gpu, r)| gpu_needs(model, &spec, wanted, gpu, r)).collect::<Result<Vec<_>>>()?;
    let on_host: u64 = (placed.iter())
        .map(|(_, r)| {
            device_cache_bytes(c, &spec, r, KvDevice::Gpu) - device_cache_bytes(c, &spec, r, wanted.kv)
        })
        .sum();
    if !rest.is_empty() || on_host > 0 {
        let own = if rest.is_empty() { 0 } else { device_cache_bytes(c, &spec, &rest, KvDevice::Gpu) };
        // Weights stay in the memory map, from which the system drops pages when it must.
        let memory = Memory { cache: own + on_host, ..Memory::default() };
        let layers = if rest.is_empty() { 0..c.n_layer } else { rest.clone() };
        needs.push(Needs { device: "cpu".into(), layers, memory, free: placement::free_memory() });
    }
    if needs.iter().any(|n| n.memory.total() > n.free) {
        let remedy = "lower -c, -np or -ub, or use -ctk q8_0 -ctv q8_0".into();
        return Err(Error::Placement { table: table(&needs), remedy });
    }
    let mut parts: Vec<Box<dyn Part>> = vec![];
    for (gpu, layers) in placed {
        let share = Share { ordinal: gpu.device.ordinal(), layers, kv: wanted.kv };
        parts.push(Box::new(Cuda::part(model.clone(), spec, &share)?));
    }
    if !rest.is_empty() {
        let (threads, interrupt) = (wanted.threads, Arc::clone(interrupt));
        parts.push(Box::new(Ggml::part(model.clone(), spec, threads, interrupt, rest, wanted.repack)?));
    }
    let backend: Box<dyn Backend> = match parts.len() {
        1 => parts.remove(0),
        _ => Box::new(Split::new(parts, c, &spec)?),
    };
    Ok(Opened { backend, needs, note: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_they_are_listed() {
        for (name, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(vec![])),
            ("cuda:1", Device::Cuda(vec![1])),
            ("cuda:0,cuda:0", Device::Cuda(vec![0, 0])),
            ("reference", Device::Reference),
        ] {
            assert_eq!(device.to_string(), name);
            assert_eq!(name.parse(), Ok(device), "{name}");
        }
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda:0,cpu", "cuda:0,"] {
            assert!(bad.parse::<Device>().is_err(), "{bad}");
        }
        assert_eq!(("gpu".parse(), "cpu".parse()), (Ok(KvDevice::Gpu), Ok(KvDevice::Cpu)));
        assert!("GPU".parse::<KvDevice>().is_err());
    }
}

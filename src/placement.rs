//! How much memory a model and its caches need, and what fits: pure functions of sizes and free memory.
use std::fmt::Write as _;
use std::ops::Range;

use crate::backend::Memory;
use crate::backend::cuda::KvDevice;
use crate::cache::{CacheSpec, PAGE, PoolKind, pools_of, ring_len};
use crate::config::Config;
use crate::engine::Options;

/// Bytes of all caches for these options.
#[must_use]
pub fn cache_bytes(c: &Config, spec: &CacheSpec) -> u64 {
    device_cache_bytes(c, spec, &(0..c.n_layer), KvDevice::Gpu)
}

/// Bytes of the caches of `layers` on their device; with [`KvDevice::Cpu`] without K and V, which then lie on the host.
#[must_use]
pub fn device_cache_bytes(c: &Config, spec: &CacheSpec, layers: &Range<usize>, kv: KvDevice) -> u64 {
    let here = |kind: PoolKind| kv == KvDevice::Gpu || kind == PoolKind::Index;
    let pools = pools_of(c, spec, layers).into_iter().filter(|p| here(p.kind));
    let page: usize = pools.map(|p| PAGE * p.cache_type.row_bytes(p.width)).sum();
    let window = c.window.map_or(0, |w| {
        let width = c.self_heads.kv_width();
        let row = spec.k.row_bytes(width) + spec.v.row_bytes(width);
        layers.end.min(c.n_self).saturating_sub(layers.start) * ring_len(w, spec.max_rows) * row
    });
    spec.n_pages as u64 * page as u64 + spec.n_slots as u64 * window as u64
}

/// The context to use when none was asked for: the model's own, or what fits into half of the free memory.
#[must_use]
pub fn auto_context(c: &Config, options: &Options, free: u64) -> usize {
    let fits = |context: usize| {
        let options = Options { context, total_positions: None, ..options.clone() };
        cache_bytes(c, &options.cache_spec()) <= free / 2
    };
    let mut context = c.context_length;
    while context > PAGE && !fits(context) {
        context = (context / 2).next_multiple_of(PAGE);
    }
    context
}

/// How many layers are wanted on GPUs, the first ones of the model: a prompt runs those only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuLayers {
    /// All, or as many as fit.
    #[default]
    Auto,
    /// All.
    All,
    /// So many.
    First(usize),
}

impl std::str::FromStr for GpuLayers {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "all" => Ok(Self::All),
            _ => {
                s.parse().map(Self::First).map_err(|_| format!("found '{s}', expected auto, all or a number"))
            }
        }
    }
}

impl std::fmt::Display for GpuLayers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::All => f.write_str("all"),
            Self::First(n) => write!(f, "{n}"),
        }
    }
}

/// The layers that each GPU takes, one range after the other from layer 0; the CPU takes those after them. `None` when what is wanted
/// does not fit.
///
/// `gpus` is the free memory of each, `needed` what a range of layers takes on one of them. One GPU takes all it can alone: parts work one
/// after the other, so that more of them are not faster. Several are filled to the same share of their free memory. A cut near the end
/// of the self-decoder moves there: elsewhere within the cross-decoder the shared memory would lie on both sides of it.
#[must_use]
pub fn place(
    n_layer: usize,
    n_self: usize,
    gpus: &[u64],
    wanted: GpuLayers,
    needed: impl Fn(&Range<usize>) -> u64,
) -> Option<Vec<Range<usize>>> {
    let fits = |range: &Range<usize>, gpu: usize| range.is_empty() || needed(range) <= gpus[gpu];
    // GPUs are filled in turn, each to at most `part` of its free memory.
    let filled = |layers: usize, part: f64| -> Option<Vec<Range<usize>>> {
        let mut ranges = vec![];
        let mut start = 0;
        for &free in gpus {
            let mut end = start;
            while end < layers && needed(&(start..end + 1)) as f64 <= part * free as f64 {
                end += 1;
            }
            ranges.push(start..end);
            start = end;
        }
        (start == layers).then_some(ranges)
    };
    let on_gpus = |layers: usize| -> Option<Vec<Range<usize>>> {
        let whole = 0..layers;
        let roomiest = (0..gpus.len()).max_by_key(|&i| (gpus[i], std::cmp::Reverse(i)))?;
        if fits(&whole, roomiest) {
            return Some((0..gpus.len()).map(|i| if i == roomiest { whole.clone() } else { 0..0 }).collect());
        }
        // The smallest share of each GPU's memory that suffices.
        let mut best = filled(layers, 1.0)?;
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..20 {
            let middle = f64::midpoint(low, high);
            match filled(layers, middle) {
                Some(ranges) => (best, high) = (ranges, middle),
                None => low = middle,
            }
        }
        for i in 1..best.len() {
            let (left, right) = (best[i - 1].start..n_self, n_self..best[i].end);
            let near = best[i].start.abs_diff(n_self) <= n_layer / NEAR;
            if near && left.start < n_self && n_self < right.end && fits(&left, i - 1) && fits(&right, i) {
                (best[i - 1], best[i]) = (left, right);
            }
        }
        Some(best)
    };
    match wanted {
        GpuLayers::All => on_gpus(n_layer),
        GpuLayers::First(n) => on_gpus(n.min(n_layer)),
        GpuLayers::Auto => {
            let most = (0..=n_layer).rev().find(|&n| on_gpus(n).is_some())?;
            let cut = if most < n_layer && most > n_self && most - n_self <= n_layer / NEAR {
                n_self
            } else {
                most
            };
            on_gpus(cut)
        }
    }
}

/// A cut moves to the end of the self-decoder from at most one in so many of all layers away.
const NEAR: usize = 8;

/// What one device is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Its name.
    pub device: String,
    /// The layers.
    pub layers: Range<usize>,
    /// Bytes it takes.
    pub memory: Memory,
    /// Bytes it has free.
    pub free: u64,
}

/// The table of what is needed and free, a line for each device.
#[must_use]
pub fn table(needs: &[Needs]) -> String {
    let mut out = format!(
        "{:<10} {:>8} {:>11} {:>11} {:>11} {:>11} {:>11}\n",
        "device", "layers", "weights", "cache", "scratch", "needed", "free"
    );
    for n in needs {
        let (m, bytes) = (&n.memory, |b: u64| format!("{:.1} MiB", b as f64 / f64::from(1 << 20)));
        let layers = format!("{}-{}", n.layers.start, n.layers.end.saturating_sub(1));
        let _ = writeln!(
            out,
            "{:<10} {layers:>8} {:>11} {:>11} {:>11} {:>11} {:>11}{}",
            n.device,
            bytes(m.weights),
            bytes(m.cache),
            bytes(m.scratch),
            bytes(m.total()),
            bytes(n.free),
            if m.total() > n.free { "  too little" } else { "" }
        );
    }
    out
}

/// Bytes of memory that new allocations can have: what the system calls available, or less where a control group limits it.
#[must_use]
pub fn free_memory() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib * 1024);
    let group = |name: &str| {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok()
    };
    let limit = group("memory.max")
        .zip(group("memory.current"))
        .map_or(u64::MAX, |(max, used)| max.saturating_sub(used));
    available.min(limit)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of the ranges of GPUs, of which there is one")]
mod tests {
    use super::*;
    use crate::config::{Architecture, Heads, Indexer, Rope};

    /// The 4B shape of model.md section 3.
    fn clsa_4b() -> Config {
        let heads = Heads { n_head: 20, n_kv: 4, head_dim: 128 };
        Config {
            architecture: Architecture::YocoClsa,
            vocab: 100_352,
            hidden: 2560,
            ffn: 7680,
            n_layer: 32,
            n_self: 16,
            self_heads: heads,
            cross_heads: heads,
            window: Some(512),
            rope: Rope { base: 1e4, n_rot: 128, interleaved: false, linear_scale: 1.0 },
            cross_rope: None,
            rms_eps: 1e-5,
            qk_norm: true,
            indexer: Some(Indexer { head_dim: 128, top_k: 2048 }),
            context_length: 131_072,
            embed_scale: 1.0,
        }
    }

    #[test]
    fn the_4b_shape_at_128k_needs_what_the_paper_says() {
        let c = clsa_4b();
        let options = Options { context: 131_072, max_rows: 512, ..Options::default() };
        // 268 MB of K/V and 34 MB of index keys; windows of 512 + 512 positions.
        let shared = 131_072 * (2 * 512 * 2 + 128 * 2);
        let windows = 16 * 1024 * 2 * 512 * 2;
        assert_eq!(cache_bytes(&c, &options.cache_spec()), shared + windows);
    }

    #[test]
    fn the_automatic_context_is_the_models_own_or_what_fits() {
        let c = clsa_4b();
        let options = Options::default();
        assert_eq!(auto_context(&c, &options, 64 << 30), 131_072);
        let small = auto_context(&c, &options, 256 << 20);
        assert!(small < 131_072 && small.is_multiple_of(PAGE), "{small}");
        assert!(cache_bytes(&c, &Options { context: small, ..options }.cache_spec()) <= 128 << 20);
    }

    /// 16 self and 16 cross layers of 10, an embedding and an output of 5, a shared memory of 30 wherever there are cross layers, 7 of
    /// scratch.
    fn needed(layers: &Range<usize>) -> u64 {
        let ends = [layers.start == 0, layers.end == 32].into_iter().filter(|b| *b).count() as u64;
        layers.len() as u64 * 10 + ends * 5 + if layers.end > 16 { 30 } else { 0 } + 7
    }

    fn placed(gpus: &[u64], wanted: GpuLayers) -> Option<Vec<Range<usize>>> {
        place(32, 16, gpus, wanted, needed)
    }

    #[test]
    fn one_gpu_takes_what_it_can() {
        let all = needed(&(0..32));
        assert_eq!(placed(&[all], GpuLayers::Auto), Some(vec![0..32]));
        assert_eq!(placed(&[all - 1], GpuLayers::Auto), Some(vec![0..31]));
        assert_eq!(placed(&[all - 1], GpuLayers::All), None);
        assert_eq!(placed(&[all], GpuLayers::All), Some(vec![0..32]));
        assert_eq!(placed(&[all], GpuLayers::First(99)), Some(vec![0..32]));
        assert_eq!(placed(&[all], GpuLayers::First(5)), Some(vec![0..5]));
        assert_eq!(placed(&[57], GpuLayers::First(5)), None);
        assert_eq!(placed(&[62], GpuLayers::First(5)), Some(vec![0..5]));
        assert_eq!(placed(&[10], GpuLayers::Auto), Some(vec![0..0]));
        assert_eq!(placed(&[], GpuLayers::Auto), None);
    }

    #[test]
    fn a_cut_near_the_end_of_the_self_decoder_moves_there() {
        for more in 1..=4 {
            assert_eq!(placed(&[needed(&(0..16 + more))], GpuLayers::Auto), Some(vec![0..16]), "{more}");
        }
        assert_eq!(placed(&[needed(&(0..21))], GpuLayers::Auto), Some(vec![0..21]));
        // What is asked for by number stays.
        assert_eq!(placed(&[needed(&(0..18))], GpuLayers::First(18)), Some(vec![0..18]));
        assert_eq!(placed(&[needed(&(0..15))], GpuLayers::Auto), Some(vec![0..15]));
    }

    #[test]
    fn several_gpus_share_by_free_memory() {
        let half = needed(&(0..16)).max(needed(&(16..32)));
        assert_eq!(placed(&[half, half], GpuLayers::Auto), Some(vec![0..16, 16..32]));
        // The second one alone is enough.
        assert_eq!(placed(&[half, 1000], GpuLayers::All), Some(vec![0..0, 0..32]));
        let ranges = placed(&[320, 150], GpuLayers::All).expect("room for all");
        assert_eq!((ranges[0].start, ranges[0].end, ranges[1].end), (0, ranges[1].start, 32));
        assert!(ranges[0].len() > 2 * ranges[1].len(), "{ranges:?}");
        // Too little for all: the rest is the CPU's.
        let ranges = placed(&[100, 60], GpuLayers::Auto).expect("room for some");
        assert_eq!(ranges, vec![0..8, 8..13]);
    }

    proptest::proptest! {
        #[test]
        fn ranges_follow_each_other_and_fit(
            gpus in proptest::collection::vec(0u64..500, 1..4), n in 0usize..40, auto in proptest::bool::ANY,
        ) {
            let wanted = if auto { GpuLayers::Auto } else { GpuLayers::First(n) };
            let Some(ranges) = placed(&gpus, wanted) else {
                proptest::prop_assert!(!auto);
                return Ok(());
            };
            let mut next = 0;
            for (range, &free) in ranges.iter().zip(&gpus).filter(|(r, _)| !r.is_empty()) {
                proptest::prop_assert_eq!(range.start, next);
                proptest::prop_assert!(needed(range) <= free);
                next = range.end;
            }
            if !auto {
                proptest::prop_assert_eq!(next, n.min(32));
            }
        }
    }

    #[test]
    fn names_of_placements_are_read() {
        assert_eq!("auto".parse(), Ok(GpuLayers::Auto));
        assert_eq!("all".parse(), Ok(GpuLayers::All));
        assert_eq!("17".parse(), Ok(GpuLayers::First(17)));
        for bad in ["", "-1", "some", "1.5"] {
            assert!(bad.parse::<GpuLayers>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_table_says_what_is_too_little() {
        let needs = |free| Needs {
            device: "cuda:0".into(),
            layers: 0..32,
            memory: Memory { weights: 3 << 20, cache: 1 << 20, ..Memory::default() },
            free,
        };
        let text = table(&[needs(5 << 20), needs(2 << 20)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].contains("4.0 MiB") && !lines[1].contains("too little"), "{text}");
        assert!(lines[2].contains("0-31") && lines[2].ends_with("too little"), "{text}");
    }
}

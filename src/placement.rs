//! How much memory a model and its caches need, and what fits: pure functions of sizes and free memory.
use crate::cache::{CacheSpec, PAGE, pools, ring_len};
use crate::config::Config;
use crate::engine::Options;

/// Bytes of all caches for these options.
#[must_use]
pub fn cache_bytes(c: &Config, spec: &CacheSpec) -> u64 {
    let page: usize = pools(c, spec).iter().map(|p| PAGE * p.cache_type.row_bytes(p.width)).sum();
    let window = c.window.map_or(0, |w| {
        let width = c.self_heads.kv_width();
        let row = spec.k.row_bytes(width) + spec.v.row_bytes(width);
        c.n_self * ring_len(w, spec.max_rows) * row
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
}

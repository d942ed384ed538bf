//! What a machine allows at most, and what a test must at least move and compute: together, the least time it can take.
pub use ggml_kernels::limits::Reads;
use ggml_kernels::simd::Level;
use ggml_kernels::{cuda, limits};

use super::Test;
use crate::backend::Routing;
use crate::cache::CacheSpec;
use crate::error::{Error, Result};
use crate::model::{Model, Weight};

/// Measured rates of one machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    /// Bytes per second that can be read from memory; on a GPU those of a copy.
    pub read: f64,
    /// Bytes per second of a copy in memory, read and written together.
    pub copy: f64,
    /// Operations per second of products with quantized weights: int8 on a CPU, f16 on a GPU. A multiply-add is two.
    pub quantized: f64,
    /// Operations per second of products with float weights: f32 on a CPU, f16 on a GPU.
    pub float: f64,
}

impl Machine {
    /// Measures this machine's cores, in about two seconds and with 512 MiB.
    ///
    /// # Errors
    /// [`Error::Input`] when `CLSA_SIMD` cannot be honoured.
    pub fn of_cpu(threads: usize) -> Result<Self> {
        let level = Level::chosen().map_err(|e| Error::Input(e.to_string()))?;
        let copy = copy_rate(threads.max(1));
        let l = limits::measure(level, threads);
        Ok(Self { read: l.read, copy, quantized: l.int8, float: l.float })
    }

    /// What measures the read bandwidth between repetitions.
    ///
    /// # Errors
    /// As [`Self::of_cpu`].
    pub fn reads(threads: usize) -> Result<Reads> {
        Ok(Reads::new(Level::chosen().map_err(|e| Error::Input(e.to_string()))?, threads))
    }

    /// Measures GPU `ordinal`: a copy of 1 GiB, and a product of f16 matrices by cuBLASLt.
    ///
    /// # Errors
    /// [`Error::Input`] without a GPU or cuBLASLt; what the driver reports.
    pub fn of_gpu(ordinal: usize) -> Result<Self> {
        let l = cuda::limits::measure(ordinal)?;
        Ok(Self { read: l.copy, copy: l.copy, quantized: l.f16, float: l.f16 })
    }

    /// Seconds that `work` takes at least.
    #[must_use]
    pub fn seconds(&self, work: &Work) -> f64 {
        (work.bytes / self.read).max(work.quantized_ops / self.quantized + work.float_ops / self.float)
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "limits: read {:.1} GB/s, copy {:.1} GB/s (read and written), products {:.2} Tops/s with quantized weights, {:.2} Tops/s \
             with float weights",
            self.read * 1e-9,
            self.copy * 1e-9,
            self.quantized * 1e-12,
            self.float * 1e-12
        )
    }
}

/// The best of five copies of 128 MiB, shared by `threads` threads.
fn copy_rate(threads: usize) -> f64 {
    const BYTES: usize = 128 << 20;
    let from: Vec<u8> = (0..BYTES).map(|i| (i ^ i >> 8) as u8).collect();
    let mut to = vec![1u8; BYTES];
    let part = BYTES.div_ceil(threads);
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let started = std::time::Instant::now();
        std::thread::scope(|s| {
            for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
                s.spawn(|| to.copy_from_slice(from));
            }
        });
        best = best.min(started.elapsed().as_secs_f64());
        std::hint::black_box(&mut to);
    }
    2.0 * BYTES as f64 / best
}

/// What must be moved from memory and computed, at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes: each weight once per micro-batch or step, each cached row once for every layer that reads it; rows that routing
    /// selects once per selection, since later layers find them in a cache.
    pub bytes: f64,
    /// Operations with quantized weights, and those of attention and scoring, for which there is no slower bound.
    pub quantized_ops: f64,
    /// Operations with float weights.
    pub float_ops: f64,
}

impl Work {
    fn weight(&mut self, w: &Weight, rows: f64) {
        self.bytes += w.bytes as f64;
        let ops = 2.0 * rows * (w.n_in * w.n_out) as f64;
        if w.ty.is_quantized() { self.quantized_ops += ops } else { self.float_ops += ops }
    }

    fn add(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.quantized_ops += other.quantized_ops;
        self.float_ops += other.float_ops;
    }
}

/// What decides the work besides the test.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    /// The file.
    pub model: &'a Model,
    /// Types of the caches, and rows of a micro-batch.
    pub spec: &'a CacheSpec,
    /// How cross layers choose positions.
    pub routing: Routing,
    /// Positions that they choose.
    pub top_k: usize,
    /// Prompt tokens handed over at a time; 0: all at once.
    pub batch: usize,
}

impl Setting<'_> {
    /// The work of one repetition: the prompt's micro-batches and the steps, of every sequence.
    #[must_use]
    pub fn work(&self, test: &Test) -> Work {
        let mut work = Work::default();
        let sequences = test.sequences as f64;
        let hand = if self.batch == 0 { usize::MAX } else { self.batch };
        let mut done = 0;
        while done < test.prompt {
            let given = (test.prompt - done).min(hand);
            let mut taken = 0;
            while taken < given {
                let rows = (given - taken).min(self.spec.max_rows);
                taken += rows;
                let outputs = usize::from(taken == given);
                let mut one = self.micro_batch(test.depth + done + taken - rows, rows, outputs);
                one = Work {
                    bytes: one.bytes * sequences,
                    quantized_ops: one.quantized_ops * sequences,
                    float_ops: one.float_ops * sequences,
                };
                work.add(&one);
            }
            done += given;
        }
        for step in 0..test.generate {
            let at = test.depth + test.prompt + step;
            let own = self.caches(at, 1, 1);
            let mut all = self.weights(sequences, sequences);
            all.bytes += own.bytes * sequences;
            all.quantized_ops += own.quantized_ops * sequences;
            work.add(&all);
        }
        work
    }

    fn micro_batch(&self, start: usize, rows: usize, outputs: usize) -> Work {
        let mut work = self.weights(rows as f64, outputs as f64);
        work.add(&self.caches(start, rows, outputs));
        work
    }

    /// Products of `rows` rows, of which `outputs` go on behind the shared memory.
    fn weights(&self, rows: f64, outputs: f64) -> Work {
        let (weights, c) = (&self.model.weights, &self.model.config);
        let mut work = Work::default();
        for (i, layer) in weights.layers.iter().enumerate() {
            let own = if i < c.n_self { rows } else { outputs };
            if own == 0.0 {
                continue;
            }
            let kv = layer.kv.iter().flat_map(|(k, v)| [k, v]);
            [&layer.q].into_iter().chain(kv).chain([&layer.o]).for_each(|w| work.weight(w, own));
            // A Transformer's last feed-forward, too, runs for the outputs only.
            let own = if i + 1 == c.n_layer { outputs } else { own };
            if own > 0.0 {
                [&layer.ffn.gate, &layer.ffn.up, &layer.ffn.down]
                    .into_iter()
                    .for_each(|w| work.weight(w, own));
            }
        }
        if let Some(shared) = &weights.shared {
            [&shared.k, &shared.v].into_iter().for_each(|w| work.weight(w, rows));
            if let Some((query, key)) = &shared.indexer {
                work.weight(key, rows);
                if outputs > 0.0 && self.routing != Routing::Dense {
                    work.weight(query, outputs);
                }
            }
        }
        if outputs > 0.0 {
            work.weight(&weights.output, outputs);
        }
        work
    }

    /// Attention and routing of `rows` rows of one sequence from position `start` on; the last `outputs` of them go on.
    fn caches(&self, start: usize, rows: usize, outputs: usize) -> Work {
        let c = &self.model.config;
        let kv = |width: usize| (self.spec.k.row_bytes(width) + self.spec.v.row_bytes(width)) as f64;
        let mut work = Work::default();
        let end = start + rows;
        // The self-decoder: each row sees its window; the micro-batch reads the union of them.
        let window = c.window.unwrap_or(usize::MAX);
        let seen: f64 = (start..end).map(|t| (t + 1).min(window) as f64).sum();
        let read = end - (start + 1).saturating_sub(window);
        work.bytes += c.n_self as f64 * read as f64 * kv(c.self_heads.kv_width());
        work.quantized_ops += c.n_self as f64 * 4.0 * c.self_heads.q_width() as f64 * seen;
        if !c.is_yoco() || outputs == 0 {
            return work;
        }
        let (cross, row, ops) = (
            (c.n_layer - c.n_self) as f64,
            kv(c.cross_heads.kv_width()),
            4.0 * c.cross_heads.q_width() as f64,
        );
        if self.routing == Routing::Dense || end <= self.top_k {
            work.bytes += cross * end as f64 * row;
            work.quantized_ops += cross * outputs as f64 * end as f64 * ops;
            return work;
        }
        let selections = (0..c.n_layer - c.n_self).filter(|j| self.routing.routes_at(*j)).count() as f64;
        let d = c.indexer.map_or(0, |ix| ix.head_dim);
        work.bytes += selections * end as f64 * self.spec.index.row_bytes(d) as f64;
        work.quantized_ops += selections * outputs as f64 * end as f64 * 2.0 * d as f64;
        work.bytes += selections * outputs as f64 * self.top_k as f64 * row;
        work.quantized_ops += cross * outputs as f64 * self.top_k as f64 * ops;
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::CacheType;
    use crate::engine::Options;

    fn model(preset: &str) -> (tempfile::TempDir, Model) {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("model.gguf");
        let mix = "Q8_0".parse().expect("a mix");
        let model = clsa_convert::synth::model(preset, 1).expect("a preset");
        let plan = clsa_convert::Plan::new(model, &clsa_convert::Recipe::new(mix), None).expect("a plan");
        let options = clsa_convert::Options { threads: 1, abort: None, progress: &|_| {} };
        plan.write(&path, &options).expect("a model file");
        let model = Model::open(&path).expect("a model");
        (dir, model)
    }

    fn work(model: &Model, routing: Routing, prompt: usize, generate: usize, depth: usize) -> Work {
        let spec = Options { k: CacheType::F16, max_rows: 32, ..Options::default() }.cache_spec();
        let setting = Setting { model, spec: &spec, routing, top_k: 64, batch: 0 };
        setting.work(&Test { prompt, generate, depth, sequences: 1 })
    }

    #[test]
    fn a_transformers_step_reads_its_weights_and_its_whole_cache() {
        let (_dir, model) = model("transformer-tiny");
        let matrices = model.weights.all().filter(|w| w.n_out > 1 && w.name != "token_embd.weight");
        let weights: usize = matrices.map(|w| w.bytes).sum();
        // 6 layers of 2 KV heads of 64 values, K and V, in f16.
        let cache = 6 * 101 * 2 * 128 * 2;
        assert_eq!(work(&model, Routing::Dense, 0, 1, 100).bytes, (weights + cache) as f64);
    }

    #[test]
    fn a_deep_step_costs_clsa_less_than_the_other_modes() {
        let (_dir, model) = model("clsa-tiny");
        let bytes = |routing| work(&model, routing, 0, 1, 100_000).bytes;
        assert!(bytes(Routing::Clsa) < bytes(Routing::Every(2)));
        assert!(bytes(Routing::Every(2)) < bytes(Routing::Every(1)));
        assert!(bytes(Routing::Every(1)) < bytes(Routing::Dense));
        // One row more: one index key of 64 values more, in f16.
        let more = work(&model, Routing::Clsa, 0, 1, 100_001).bytes - bytes(Routing::Clsa);
        assert_eq!(more, 128.0);
    }

    #[test]
    fn a_prompt_stops_at_the_shared_memory() {
        let (_dir, model) = model("clsa-tiny");
        let ops = |prompt| work(&model, Routing::Clsa, prompt, 0, 0).quantized_ops;
        let per_token = (ops(2048) - ops(1024)) / 1024.0;
        let c = &model.config;
        let own: usize = model.weights.layers[..c.n_self]
            .iter()
            .flat_map(|l| {
                let (k, v) = l.kv.as_ref().expect("k and v");
                [&l.q, k, v, &l.o, &l.ffn.gate, &l.ffn.up, &l.ffn.down]
            })
            .map(|w| 2 * w.n_in * w.n_out)
            .sum();
        let window = c.n_self * 4 * c.self_heads.q_width() * 32;
        let shared = 2 * c.hidden * (2 * c.cross_heads.kv_width() + 64);
        // The last token's scores over the longer prompt are what is left.
        let routing = 2.0 * 64.0;
        assert_eq!(per_token, (own + window + shared) as f64 + routing);
    }

    #[test]
    fn the_slower_of_moving_and_computing_decides() {
        let machine = Machine { read: 10.0, copy: 10.0, quantized: 100.0, float: 50.0 };
        assert_eq!(machine.seconds(&Work { bytes: 20.0, quantized_ops: 100.0, float_ops: 0.0 }), 2.0);
        assert_eq!(machine.seconds(&Work { bytes: 20.0, quantized_ops: 200.0, float_ops: 50.0 }), 3.0);
    }
}

//! Tensor names and shapes -> typed weights. A tensor that is missing, misshapen or not known is an error that names it.
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::{FeedForward, Layer, Model, SharedMemory, Weight, Weights, metadata};
use crate::config::{Config, Heads};
use crate::error::{Error, Result};
use crate::gguf::File;

impl Model {
    /// Maps and checks a model file.
    ///
    /// # Errors
    /// [`Error::Gguf`] for a damaged container, [`Error::Input`] for a model whose metadata or tensors do not fit together.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let config = metadata::config(&file)?;
        let weights = Loader { file: &file, c: &config, taken: HashSet::new() }.weights()?;
        Ok(Self { config: Arc::new(config), weights: Arc::new(weights), file: Arc::new(file) })
    }
}

struct Loader<'a> {
    file: &'a File,
    c: &'a Config,
    taken: HashSet<String>,
}

impl Loader<'_> {
    fn weights(mut self) -> Result<Weights> {
        let c = self.c;
        let token_embd = self.matrix("token_embd.weight", c.vocab, c.hidden)?;
        let layers = (0..c.n_layer).map(|i| self.layer(i)).collect::<Result<_>>()?;
        let shared = c.is_yoco().then(|| self.shared()).transpose()?;
        let output_norm = self.vector("output_norm.weight", c.hidden)?;
        let output = self.optional("output.weight", c.vocab, c.hidden)?.unwrap_or_else(|| token_embd.clone());
        let rope_freqs = self.optional("rope_freqs.weight", 1, c.rope.n_rot / 2)?;
        self.nothing_left()?;
        Ok(Weights { token_embd, layers, shared, output_norm, output, rope_freqs })
    }

    fn layer(&mut self, i: usize) -> Result<Layer> {
        let c = self.c;
        let of = |name: &str| format!("blk.{i}.{name}.weight");
        let own_kv = i < c.n_self;
        let heads = if own_kv { c.self_heads } else { c.cross_heads };
        let Heads { head_dim, .. } = heads;
        Ok(Layer {
            attn_norm: self.vector(&of("attn_norm"), c.hidden)?,
            q: self.matrix(&of("attn_q"), heads.q_width(), c.hidden)?,
            kv: own_kv
                .then(|| {
                    let k = self.matrix(&of("attn_k"), heads.kv_width(), c.hidden)?;
                    Ok::<_, Error>((k, self.matrix(&of("attn_v"), heads.kv_width(), c.hidden)?))
                })
                .transpose()?,
            qk_norm: (own_kv && c.qk_norm)
                .then(|| {
                    let q = self.vector(&of("attn_q_norm"), head_dim)?;
                    Ok::<_, Error>((q, self.vector(&of("attn_k_norm"), head_dim)?))
                })
                .transpose()?,
            o: self.matrix(&of("attn_output"), c.hidden, heads.q_width())?,
            ffn: FeedForward {
                norm: self.vector(&of("ffn_norm"), c.hidden)?,
                gate: self.matrix(&of("ffn_gate"), c.ffn, c.hidden)?,
                up: self.matrix(&of("ffn_up"), c.ffn, c.hidden)?,
                down: self.matrix(&of("ffn_down"), c.hidden, c.ffn)?,
            },
        })
    }

    fn shared(&mut self) -> Result<SharedMemory> {
        let c = self.c;
        let kv = c.cross_heads.kv_width();
        Ok(SharedMemory {
            norm: self.vector("shared_kv.norm.weight", c.hidden)?,
            k: self.matrix("shared_kv.attn_k.weight", kv, c.hidden)?,
            v: self.matrix("shared_kv.attn_v.weight", kv, c.hidden)?,
            indexer: c
                .indexer
                .map(|ix| {
                    let q = self.matrix("indexer.attn_q.weight", ix.head_dim, c.hidden)?;
                    Ok::<_, Error>((q, self.matrix("indexer.attn_k.weight", ix.head_dim, c.hidden)?))
                })
                .transpose()?,
            rope_freqs: match c.cross_rope {
                Some(rope) => self.optional("shared_kv.rope_freqs.weight", 1, rope.n_rot / 2)?,
                None => None,
            },
        })
    }

    fn vector(&mut self, name: &str, n: usize) -> Result<Weight> {
        self.matrix(name, 1, n)
    }

    fn matrix(&mut self, name: &str, n_out: usize, n_in: usize) -> Result<Weight> {
        self.optional(name, n_out, n_in)?
            .ok_or_else(|| self.file.tensor_error(name, format!("[{n_in}, {n_out}]"), "nothing").into())
    }

    fn optional(&mut self, name: &str, n_out: usize, n_in: usize) -> Result<Option<Weight>> {
        let Some(t) = self.file.tensor(name) else { return Ok(None) };
        if (t.row_len(), t.n_rows()) != (n_in, n_out) {
            let expected = format!("[{n_in}, {n_out}] from the metadata");
            return Err(self.file.tensor_error(name, expected, format!("{:?}", t.shape)).into());
        }
        self.taken.insert(name.to_owned());
        Ok(Some(Weight { name: name.to_owned(), ty: t.ty, n_in, n_out, offset: t.offset, bytes: t.bytes }))
    }

    /// A tensor that no equation uses means that the file is not what its metadata says.
    fn nothing_left(&self) -> Result<()> {
        let tensors = self.file.tensors().iter().map(|t| t.name.as_str());
        let unknown: Vec<_> = tensors.filter(|n| !self.taken.contains(*n)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(Error::Input(format!(
            "{}: {} tensors are not part of this architecture, among them {}",
            self.file.path().display(),
            unknown.len(),
            unknown[..unknown.len().min(5)].join(", ")
        )))
    }
}

//! A model on its way into a file: metadata, and tensors that know where their values come from.
use std::collections::BTreeSet;

use ggml_kernels::{mapping::Mapping, quant::Type};

use crate::{
    Error, Result,
    checkpoint::Checkpoint,
    family::{Layout, Origin, RowOrder},
    gguf::{self, Metadata},
    tokenizer,
};

/// A tensor of the file to be written.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// Values per dimension, row length first.
    pub shape: Vec<u64>,
    /// Where its values come from.
    pub source: Source<'a>,
}

/// Where values come from.
#[derive(Clone, Debug)]
pub enum Source<'a> {
    /// Rows that lie in a mapped file.
    Mapped {
        /// The file.
        mapping: &'a Mapping,
        /// Offset of the first row.
        at: usize,
        /// How they are stored there.
        ty: Type,
        /// How rows move.
        order: RowOrder,
        /// What the source calls the tensor.
        name: String,
    },
    /// Values at hand.
    Values(Vec<f32>),
    /// Random values of this deviation (see [`crate::synth`]).
    Random {
        /// Standard deviation.
        deviation: f32,
        /// What the stream of random numbers begins with; another for each tensor.
        seed: u64,
    },
}

impl Source<'_> {
    /// The type of the values before conversion.
    #[must_use]
    pub fn ty(&self) -> Type {
        match self {
            Self::Mapped { ty, .. } => *ty,
            Self::Values(_) | Self::Random { .. } => Type::F32,
        }
    }
}

impl Tensor<'_> {
    /// Values in a row.
    #[must_use]
    pub fn row_len(&self) -> usize {
        self.shape.first().map_or(0, |&n| n as usize)
    }
    /// Number of rows.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.shape.iter().skip(1).map(|&n| n as usize).product()
    }
}

/// A model on its way into a file.
#[derive(Clone, Debug)]
pub struct Model<'a> {
    /// Every key but those about the file itself.
    pub metadata: Metadata,
    /// The tensors in the order of the file.
    pub tensors: Vec<Tensor<'a>>,
    /// Query heads per KV head in the self-decoder; mixes give V more bits where it is 4 or more.
    pub n_gqa: usize,
    /// What the user should know about the source.
    pub notes: Vec<String>,
}

impl<'a> Model<'a> {
    /// A model from a checkpoint folder. Tensors are checked by name, shape and type; their values when they are read.
    ///
    /// # Errors
    /// When the configuration is not supported, or a tensor is unknown, missing or misshapen.
    pub fn from_checkpoint(checkpoint: &'a Checkpoint) -> Result<Self> {
        let layout = Layout::read(checkpoint.dir())?;
        let tensors = assemble(&layout, checkpoint)?;
        let Layout { mut metadata, n_gqa, mut notes, vocab, .. } = layout;
        notes.extend(tokenizer::add(checkpoint.dir(), vocab, &mut metadata)?);
        if !metadata.contains("general.name")
            && let Some(name) =
                checkpoint.dir().canonicalize().ok().as_deref().and_then(|p| p.file_name()?.to_str())
        {
            metadata.string("general.name", name);
        }
        Ok(Self { metadata, tensors, n_gqa, notes })
    }

    /// A model from a GGUF file of any architecture: the same metadata, names and shapes.
    ///
    /// # Errors
    /// When a key that is needed has an unexpected type.
    pub fn from_gguf(file: &'a gguf::File) -> Result<Self> {
        let mut metadata = Metadata::default();
        file.metadata().for_each(|(key, value)| metadata.value(key, value));
        let tensors = file
            .tensors()
            .iter()
            .map(|t| Tensor {
                name: t.name.clone(),
                shape: t.shape.clone(),
                source: Source::Mapped {
                    mapping: file.mapping(),
                    at: t.offset,
                    ty: t.ty,
                    order: RowOrder::AsIs,
                    name: t.name.clone(),
                },
            })
            .collect();
        let architecture: &str = file.optional("general.architecture")?.unwrap_or_default();
        // Some architectures have a list of head counts, one per layer: no mix of ours is about those.
        let heads = |key: &str| {
            let own = file.get(&format!("{architecture}.self_decoder.attention.{key}"));
            own.or_else(|| file.get(&format!("{architecture}.attention.{key}")))
                .and_then(gguf::FromValue::from_value)
        };
        let n_gqa = match (heads("head_count"), heads("head_count_kv")) {
            (Some(n_head), Some(n_kv)) => usize::checked_div(n_head, n_kv).unwrap_or(1),
            _ => 1,
        };
        Ok(Self { metadata, tensors, n_gqa, notes: Vec::new() })
    }
}

/// Finds every wanted tensor in the checkpoint, and nothing besides.
fn assemble<'a>(layout: &Layout, checkpoint: &'a Checkpoint) -> Result<Vec<Tensor<'a>>> {
    let mut unused: BTreeSet<&str> = checkpoint.tensors().keys().map(String::as_str).collect();
    let mut tensors = Vec::new();
    let mut missing = Vec::new();
    for wanted in &layout.tensors {
        let source = match &wanted.origin {
            Origin::Computed(values) => Source::Values(values.clone()),
            Origin::Stored { name, order } => {
                let Some(stored) = checkpoint.tensors().get(name) else {
                    missing.push(format!("{name} {:?}", reversed(&wanted.shape)));
                    continue;
                };
                unused.remove(name.as_str());
                let shard = checkpoint.shard(stored);
                let found: Vec<u64> = stored.shape.iter().rev().map(|&n| n as u64).collect();
                if found != wanted.shape {
                    return Err(Error::Input(format!(
                        "{}: tensor {name}: expected shape {:?}, found {:?}",
                        shard.path.display(),
                        reversed(&wanted.shape),
                        stored.shape
                    )));
                }
                let (name, order) = (name.clone(), *order);
                Source::Mapped { mapping: &shard.mapping, at: stored.at, ty: stored.ty, order, name }
            }
        };
        tensors.push(Tensor { name: wanted.name.clone(), shape: wanted.shape.clone(), source });
    }
    let dir = checkpoint.dir().display();
    if !missing.is_empty() {
        let what = format!("{} of {} tensors are missing", missing.len(), layout.tensors.len());
        return Err(Error::Input(format!("{dir}: {what}: expected {}", few(&missing))));
    }
    let mut unused: Vec<&str> = unused.into_iter().filter(|name| !layout.ignores(name)).collect();
    if let Some(&copy) = unused.iter().find(|name| layout.tied_output == Some(**name)) {
        check_tied(layout, checkpoint, copy)?;
        unused.retain(|name| *name != copy);
    }
    if !unused.is_empty() {
        let what = format!("{} tensors that {} does not have", unused.len(), layout.family);
        return Err(Error::Input(format!("{dir}: {what}: found {}{}", few(&unused), layout.hint(&unused))));
    }
    Ok(tensors)
}

/// Some checkpoints hold a tied output twice: it must be the same values.
fn check_tied(layout: &Layout, checkpoint: &Checkpoint, copy: &str) -> Result<()> {
    let data = |name: &str| checkpoint.tensors().get(name).map(|t| (t, checkpoint.data(t)));
    let (Some((a, a_data)), Some((b, b_data))) = (data(copy), data(layout.embedding)) else { return Ok(()) };
    const CHUNK: usize = 8 << 20;
    let mut at = 0;
    let same = a.ty == b.ty
        && a_data.len() == b_data.len()
        && a_data.chunks(CHUNK).zip(b_data.chunks(CHUNK)).all(|(x, y)| {
            let same = x == y;
            checkpoint.shard(a).mapping.release(a.at + at..a.at + at + x.len());
            checkpoint.shard(b).mapping.release(b.at + at..b.at + at + x.len());
            at += x.len();
            same
        });
    if same {
        return Ok(());
    }
    let what = format!(
        "embeddings are tied, but {copy} differs from {}: set tie_word_embeddings to false",
        layout.embedding
    );
    Err(Error::Input(format!("{}: {what}", checkpoint.dir().display())))
}

/// The first few of a list, and how many more there are.
fn few<S: AsRef<str>>(list: &[S]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<&str> = list.iter().take(SHOWN).map(AsRef::as_ref).collect();
    match list.len().checked_sub(SHOWN) {
        Some(more @ 1..) => format!("{} and {more} more", shown.join(", ")),
        _ => shown.join(", "),
    }
}

fn reversed(shape: &[u64]) -> Vec<u64> {
    shape.iter().rev().copied().collect()
}

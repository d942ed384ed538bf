//! `clsa imatrix`: an importance matrix from a text.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use clsa_convert::imatrix::Sums;
use xxhash_rust::xxh3::Xxh3;

use super::eval::perplexity::read_tokens;
use super::model::ModelArgs;
use super::token_bar;
use crate::backend::probe::Probe;
use crate::error::{Error, Result};
use crate::eval::perplexity::{CrossEntropy, Windows};
use crate::imatrix::{Settings, collect};
use crate::interrupt;
use crate::model::Model;
use crate::session::model_hash;

/// Arguments of `clsa imatrix`.
#[derive(Debug, Args)]
pub struct ImatrixArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to measure on: tens of kilobytes of what the model will be used for
    #[arg(short, long, value_name = "FILE", required_unless_present = "in_file")]
    file: Option<PathBuf>,
    /// The importance matrix to write (GGUF, as llama-imatrix writes it). A run that was cut off goes on where it was saved
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// An earlier importance matrix of the same model to add to (repeatable); without -f only these are merged
    #[arg(long, value_name = "FILE")]
    in_file: Vec<PathBuf>,
    /// Chunks of text at most (of -c tokens each, 512 without it)
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Save after every so many chunks
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    save_every: u64,
    /// Also of the output matrix (and so of tied embeddings)
    #[arg(long)]
    process_output: bool,
}

/// Tokens of a chunk without -c.
const CHUNK: usize = 512;

/// Runs `clsa imatrix`.
///
/// # Errors
/// Those of the model, the engine and the files; [`Error::Interrupted`], after what is done has been saved.
pub fn run(args: &ImatrixArgs) -> Result<()> {
    let mut earlier = Sums::default();
    for path in &args.in_file {
        earlier.merge(&Sums::open(path)?)?;
    }
    let Some(text) = &args.file else {
        earlier.write(&args.output)?;
        return tell(&args.output, &earlier);
    };
    let model = args.model.open()?;
    let len = if args.model.ctx_size == 0 { CHUNK } else { args.model.ctx_size };
    let tokens = read_tokens(&model, text)?;
    let chunks = Windows { len, limit: args.chunks, last: None }.cut(&tokens)?;
    let fingerprint = args.fingerprint(&model, &tokens)?;
    let (mut sums, done) = match resumable(&args.output, &fingerprint) {
        Some((sums, done)) if done <= chunks.len() => {
            eprintln!("going on with {}: {done} of {} chunks are there", args.output.display(), chunks.len());
            (sums, done)
        }
        _ => (earlier, 0),
    };
    if sums.chunk_size == 0 {
        sums.chunk_size = len as u32;
    }
    let dataset = text.display().to_string();
    if !sums.datasets.contains(&dataset) {
        sums.datasets.push(dataset);
    }
    sums.run = Some((fingerprint, done as u32));
    let loss = args.collect(&model, &chunks[done..], &mut sums)?;
    tell(&args.output, &sums)?;
    if loss.all.count() > 0 {
        let s = loss.summary();
        eprintln!(
            "perplexity of the second halves of the chunks: {:.4} ± {:.4}",
            s.perplexity, s.perplexity_error
        );
    }
    Ok(())
}

fn tell(path: &Path, sums: &Sums) -> Result<()> {
    let (n, chunks, size) = (sums.entries.len(), sums.chunks, sums.chunk_size);
    eprintln!("wrote {}: {n} matrices, {chunks} chunks of {size} tokens", path.display());
    Ok(())
}

/// What an interrupted run with the same fingerprint has saved at `path`, and how many of its chunks are done.
fn resumable(path: &Path, fingerprint: &str) -> Option<(Sums, usize)> {
    let sums = path.is_file().then(|| Sums::open(path).ok()).flatten()?;
    let (found, done) = sums.run.clone()?;
    (found == fingerprint).then_some((sums, done as usize))
}

impl ImatrixArgs {
    /// Tells runs apart: the model, the tokens, and all that changes what is seen of them.
    fn fingerprint(&self, model: &Model, tokens: &[u32]) -> Result<String> {
        let mut hasher = Xxh3::new();
        hasher.update(model_hash(&model.file).as_bytes());
        tokens.iter().for_each(|t| hasher.update(&t.to_le_bytes()));
        let of_model = (&self.model.routing, self.model.top_k_tokens, self.model.ctx_size);
        hasher.update(format!("{of_model:?} {}", self.process_output).as_bytes());
        for path in &self.in_file {
            let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.clone(), source })?;
            hasher.update(&bytes);
        }
        Ok(format!("{:032x}", hasher.digest128()))
    }

    fn collect(&self, model: &Model, chunks: &[&[u32]], sums: &mut Sums) -> Result<CrossEntropy> {
        if chunks.is_empty() {
            return Ok(CrossEntropy::default());
        }
        let len = chunks[0].len();
        let mut options = self.model.options(model, 1);
        options.context = len;
        options.max_rows = options.max_rows.min(len);
        options.max_outputs = Some(options.max_rows);
        let probe = Arc::new(Probe::default());
        let mut engine =
            self.model.probed_engine(model, &options, Arc::clone(&interrupt::requested()?), &probe)?;
        let bar = token_bar("imatrix");
        bar.set_length((chunks.len() * len) as u64);
        let settings = Settings { process_output: self.process_output, save_every: self.save_every as usize };
        let save = |sums: &Sums| sums.write(&self.output).map_err(Error::from);
        let loss = collect(&mut engine, &probe, chunks, settings, sums, save, |n| bar.inc(n as u64));
        bar.finish_and_clear();
        loss
    }
}

//! What `convert`, `quantize` and `synth` share: the options that choose types, and the run of a plan.
use std::{
    io::{self, Write},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Args;
use clsa_convert::{Mix, Model, Options, Override, Plan, Recipe, imatrix::Imatrix};
use ggml_kernels::quant::Type;

use super::{byte_bar, human_bytes, stdout_error, threads_from};
use crate::{error::Result, interrupt};

/// Options that choose tensor types and how the work is run.
#[derive(Debug, Args)]
pub struct RecipeArgs {
    /// Type of the tensors whose names REGEX finds; the first that fits decides (repeatable)
    #[arg(long, value_name = "REGEX=TYPE")]
    tensor_type: Vec<Override>,
    /// Type of the output matrix
    #[arg(long, value_name = "TYPE")]
    output_tensor_type: Option<Type>,
    /// Type of the token embeddings
    #[arg(long, value_name = "TYPE")]
    token_embedding_type: Option<Type>,
    /// Give every matrix the same type instead of a mix
    #[arg(long)]
    pure: bool,
    /// Importance matrix (GGUF, as llama-imatrix writes it): columns that matter more are kept more exactly
    #[arg(long, value_name = "FILE")]
    pub(super) imatrix: Option<PathBuf>,
    /// Print the table of tensors with their types and the final size; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Worker threads [default: all cores]
    #[arg(short, long, value_parser = threads_from(1))]
    threads: Option<usize>,
}

impl RecipeArgs {
    /// Plans `model` with the mix `mix`, then writes it to `out` or, on a dry run, prints the plan.
    ///
    /// # Errors
    /// Whatever planning or writing fails with.
    pub fn run(&self, model: Model<'_>, mix: Mix, out: Option<&Path>) -> Result<()> {
        let recipe = Recipe {
            mix,
            overrides: self.tensor_type.clone(),
            output: self.output_tensor_type,
            token_embedding: self.token_embedding_type,
            pure: self.pure,
            imatrix: false,
        };
        let imatrix = self.imatrix.as_deref().map(Imatrix::open).transpose()?;
        let plan = Plan::new(model, &recipe, imatrix.as_ref())?;
        tell(&plan);
        match out {
            Some(out) if !self.dry_run => self.write(&plan, out),
            _ => print_plan(&plan).map_err(stdout_error)?.map_err(Into::into),
        }
    }

    /// Worker threads.
    pub(super) fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZeroUsize::get))
    }

    fn write(&self, plan: &Plan<'_>, out: &Path) -> Result<()> {
        let start = Instant::now();
        let bar = byte_bar(plan.work()).with_message("converting");
        let abort = interrupt::requested()?;
        let threads = self.threads();
        let progress = |n| bar.inc(n);
        let written = plan.write(out, &Options { threads, abort: Some(&abort), progress: &progress });
        bar.finish_and_clear();
        written?;
        let (size, seconds) = (human_bytes(plan.file_size()?), start.elapsed().as_secs_f64());
        eprintln!("wrote {}: {size}, {} tensors, {seconds:.1} s", out.display(), plan.lines().count());
        Ok(())
    }
}

/// Says on standard error what the user did not ask for but should know.
fn tell(plan: &Plan<'_>) {
    for note in plan.notes() {
        eprintln!("note: {note}");
    }
    for ((wanted, actual), count) in plan.fallbacks() {
        let block = wanted.block_len();
        let plural = if count == 1 { "tensor" } else { "tensors" };
        eprintln!(
            "note: {count} {plural} of type {actual} instead of {wanted}: rows are not divisible by {block}"
        );
    }
    match plan.without_importance() {
        0 => {}
        n => eprintln!("note: {n} matrices are not in the importance matrix"),
    }
}

/// The table of a dry run. The outer error is that of writing it, the inner one that of the plan.
fn print_plan(plan: &Plan<'_>) -> io::Result<clsa_convert::Result<()>> {
    let size = match plan.file_size() {
        Ok(size) => size,
        Err(e) => return Ok(Err(e)),
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let width = plan.lines().map(|l| l.name.len()).max().unwrap_or(0);
    let (mut values, mut bytes) = (0, 0);
    for line in plan.lines() {
        let shape = line.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        let wanted = line.choice.instead_of.map(|w| format!("  (instead of {w})")).unwrap_or_default();
        let (from, to) = (line.from, line.choice.ty);
        writeln!(
            out,
            "{:width$}  {shape:<20} {from:<6} -> {to:<6} {:>12} bytes{wanted}",
            line.name, line.bytes
        )?;
        values += line.shape.iter().product::<u64>();
        bytes += line.bytes as u64;
    }
    let bits = bytes as f64 * 8.0 / values.max(1) as f64;
    writeln!(out, "{values} parameters, {bits:.2} bits each")?;
    writeln!(out, "final size: {size} bytes ({})", human_bytes(size))?;
    out.flush().map(Ok)
}

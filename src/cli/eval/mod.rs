//! `clsa eval`: what quantization, sparsity and length cost.
mod perplexity;

use clap::{Args, Subcommand};

use crate::error::Result;

/// Arguments of `clsa eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: EvalCommand,
}

/// The evaluations.
#[derive(Debug, Subcommand)]
enum EvalCommand {
    /// Cross-entropy and perplexity of a text, and divergence from reference logits
    Perplexity(Box<perplexity::PerplexityArgs>),
}

/// Runs `clsa eval`.
///
/// # Errors
/// Those of the model and the engine; [`crate::error::Error::Interrupted`].
pub fn run(args: &EvalArgs) -> Result<()> {
    match &args.command {
        EvalCommand::Perplexity(args) => perplexity::run(args),
    }
}

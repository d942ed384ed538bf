//! `clsa eval`: what quantization, sparsity and length cost.
mod consistency;
mod coverage;
pub(crate) mod perplexity;
mod results;
mod ruler;

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
    /// How much of the dense attention the selected positions hold
    Coverage(Box<coverage::CoverageArgs>),
    /// A fact hidden in a long text, by length and depth
    Needle(Box<ruler::NeedleArgs>),
    /// RULER's thirteen tasks over long texts, by length
    Ruler(Box<ruler::RulerArgs>),
    /// Whether logits stay the same alone, batched, in other chunks, with other threads, from saved sessions
    BatchConsistency(Box<consistency::ConsistencyArgs>),
}

/// Runs `clsa eval`.
///
/// # Errors
/// Those of the model and the engine; [`crate::error::Error::Interrupted`].
pub fn run(args: &EvalArgs) -> Result<()> {
    match &args.command {
        EvalCommand::Perplexity(args) => perplexity::run(args),
        EvalCommand::Coverage(args) => coverage::run(args),
        EvalCommand::Needle(args) => ruler::needle(args),
        EvalCommand::Ruler(args) => ruler::ruler(args),
        EvalCommand::BatchConsistency(args) => consistency::run(args),
    }
}

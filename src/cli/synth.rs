//! `clsa synth`: a model of random weights.
use std::path::PathBuf;

use clap::Args;
use clsa_convert::{Mix, synth};

use super::recipe::RecipeArgs;
use crate::error::Result;

/// Arguments of `clsa synth`.
#[derive(Debug, Args)]
pub struct SynthArgs {
    /// Shape: clsa-4b, yoco-4b, transformer-4b, clsa-tiny, yoco-tiny or transformer-tiny
    preset: String,
    /// The GGUF file to write
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Tensor type or mix: F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_{S,M,L} Q4_K_{S,M} Q5_K_{S,M} Q6_K IQ4_NL IQ4_XS
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_K_M")]
    mix: Mix,
    /// Seed of the random weights: the same seed, the same file
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// Runs `clsa synth`.
///
/// # Errors
/// When there is no such preset or the file cannot be written.
pub fn run(args: &SynthArgs) -> Result<()> {
    let model = synth::model(&args.preset, args.seed)?;
    args.recipe.run(model, args.mix, args.output.as_deref())
}

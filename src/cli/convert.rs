//! `clsa convert`: a checkpoint folder to a GGUF file.
use std::path::PathBuf;

use clap::Args;
use clsa_convert::{Mix, Model, checkpoint::Checkpoint};

use super::recipe::RecipeArgs;
use crate::error::Result;

/// Arguments of `clsa convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Folder with config.json (yoco_clsa, llama, qwen3) or params.json (microsoft/unilm YOCO), *.safetensors and tokenizer files
    dir: PathBuf,
    /// The GGUF file to write
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Tensor type or mix: F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_{S,M,L} Q4_K_{S,M} Q5_K_{S,M} Q6_K IQ4_NL IQ4_XS
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_K_M")]
    mix: Mix,
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// Runs `clsa convert`.
///
/// # Errors
/// When the checkpoint is not usable or the file cannot be written.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let model = Model::from_checkpoint(&checkpoint)?;
    args.recipe.run(model, args.mix, args.output.as_deref())
}

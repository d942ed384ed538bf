//! `clsa quantize`: a GGUF file to one of other tensor types.
use std::path::PathBuf;

use clap::Args;
use clsa_convert::{Mix, Model, gguf::File};

use super::recipe::RecipeArgs;
use crate::error::{Error, Result};

/// Arguments of `clsa quantize`.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// The GGUF file to read; best one of F32, F16 or BF16
    input: PathBuf,
    /// The GGUF file to write
    output: PathBuf,
    /// Tensor type or mix: F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_{S,M,L} Q4_K_{S,M} Q5_K_{S,M} Q6_K IQ4_NL IQ4_XS
    #[arg(value_name = "TYPE", required_unless_present = "tune")]
    mix: Option<Mix>,
    #[command(flatten)]
    tune: super::tune::TuneArgs,
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// Runs `clsa quantize`.
///
/// # Errors
/// When the input is not usable or the output cannot be written.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    if let Some(size) = args.tune.tune {
        let (imatrix, threads) = (args.recipe.imatrix.as_deref(), args.recipe.threads());
        return super::tune::run(&args.tune, size, &args.input, &args.output, imatrix, threads);
    }
    let mix = args.mix.ok_or_else(|| Error::Input("a type or --tune is needed".into()))?;
    let file = File::open(&args.input)?;
    let model = Model::from_gguf(&file)?;
    args.recipe.run(model, mix, Some(&args.output))
}

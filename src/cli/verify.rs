//! `clsa verify`: prove that a GGUF file is whole.
use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::Args;
use clsa_convert::gguf::File;

use super::{byte_bar, stdout_error};
use crate::error::Result;

/// Arguments of `clsa verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The GGUF file, one that clsa has written
    file: PathBuf,
}

/// Runs `clsa verify`.
///
/// # Errors
/// When the file is damaged or carries no checksums.
pub fn run(args: &VerifyArgs) -> Result<()> {
    let file = File::open(&args.file)?;
    let bar = byte_bar(file.len() as u64).with_message("checking");
    let result = file.verify(|n| bar.inc(n as u64));
    bar.finish_and_clear();
    result?;
    writeln!(io::stdout(), "{}: whole, {} tensors", args.file.display(), file.tensors().len())
        .map_err(stdout_error)
}

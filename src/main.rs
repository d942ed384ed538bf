//! The `clsa` command: parse, run, print an error once, choose the exit code.
use std::{
    io::{ErrorKind, Write},
    process::ExitCode,
};

use clap::Parser;
use clsa::{
    cli::{Cli, expand_short_flags},
    error::Error,
};

fn main() -> ExitCode {
    match Cli::parse_from(expand_short_flags(std::env::args_os())).run() {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough (`clsa inspect FILE | head`) is no failure.
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be gone, as after a hang-up.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

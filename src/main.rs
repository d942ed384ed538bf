//! The `clsa` command: parse, run, print an error once, choose the exit code.
use std::{io::ErrorKind, process::ExitCode};

use clap::Parser;
use clsa::{
    cli::{Cli, expand_short_flags},
    error::Error,
};

fn main() -> ExitCode {
    match Cli::parse_from(expand_short_flags(std::env::args_os())).command.run() {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough (`clsa inspect FILE | head`) is no failure.
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

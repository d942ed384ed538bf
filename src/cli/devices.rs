//! `--list-devices` and `--version`.
use std::fmt::Write as _;
use std::io::{self, Write};

use ggml_kernels::cuda;
use ggml_kernels::simd::Level;

use super::{human_bytes, stdout_error};
use crate::error::Result;
use crate::placement::free_memory;

/// Version, commit, instruction set and built-in backends.
#[must_use]
pub fn long_version() -> String {
    let simd = Level::chosen().map_or_else(|e| e.to_string(), |level| level.to_string());
    let cuda = if cuda::FATBINS.is_empty() { "not built in" } else { "built in" };
    format!(
        "{} ({})\nSIMD      {simd}\nbackends  cpu: ggml graphs with our kernels; cuda: {cuda}; reference: scalar f32",
        env!("CARGO_PKG_VERSION"),
        env!("CLSA_COMMIT"),
    )
}

/// Prints the devices.
///
/// # Errors
/// When standard output cannot be written.
pub fn list() -> Result<()> {
    let mut out = String::new();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let simd = Level::chosen().map_or_else(|e| e.to_string(), |level| level.to_string());
    let _ = writeln!(out, "cpu        {simd}, {threads} threads, {} free", human_bytes(free_memory()));
    match cuda::availability() {
        Ok(n) => {
            for i in 0..n {
                let device = cuda::Device::open(i).and_then(|d| Ok((d.memory()?, d)));
                let _ = match device {
                    Ok(((free, total), d)) => {
                        let (free, total) = (human_bytes(free as u64), human_bytes(total as u64));
                        writeln!(out, "cuda:{i}     {}, {free} of {total} free", d.name())
                    }
                    Err(e) => writeln!(out, "cuda:{i}     cannot be used: {e}"),
                };
            }
        }
        Err(e) => {
            let _ = writeln!(out, "cuda       none: {e}");
        }
    }
    let _ = writeln!(out, "reference  scalar f32, slow: to compare with");
    io::stdout().write_all(out.as_bytes()).map_err(stdout_error)
}

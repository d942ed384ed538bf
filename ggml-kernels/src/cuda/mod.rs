//! The CUDA driver, opened at run time: one binary runs with or without a GPU, a driver and a toolkit.
//!
//! The kernels of `cuda/*.cu` are embedded as fat binaries ([`FATBINS`]); a [`Device`] loads them on first use. Every foreign
//! handle is a newtype that frees it on drop.
pub mod blas;
mod buffer;
mod device;
mod gate;
pub mod limits;
pub mod matmul;
mod matrix;
pub mod ops;
mod stream;

pub use buffer::{Buffer, Pinned, Pod};
pub use device::{Device, Function, availability};
pub use matrix::{Matrix, Uploader, matrix_bytes, weight_scale};
pub use stream::{Arguments, Event, Graph, Launch, Stream};

use cudarc::driver::sys as cu;

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// What went wrong with a GPU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No GPU can be used at all: no kernels in this build, no driver, or no device.
    #[error("CUDA cannot be used: {0}")]
    Unavailable(String),
    /// Device memory ran out.
    #[error("GPU {device} has not {needed} bytes of memory free ({free} of {total} bytes are)")]
    OutOfMemory {
        /// Ordinal of the device.
        device: usize,
        /// Bytes asked for.
        needed: usize,
        /// Bytes free.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// A driver call failed.
    #[error("{call} failed: {message}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's own words.
        message: String,
    },
    /// A kernel that this build does not hold.
    #[error("no kernel named {0} is built in")]
    NoKernel(String),
    /// A size or range that a caller got wrong.
    #[error("{0}")]
    Range(String),
}

/// Result with a CUDA [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Turns a driver status into an error that names the call.
fn check(call: &'static str, status: cu::CUresult) -> Result<()> {
    if status == cu::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: cuGetErrorString writes a pointer to a static, NUL-terminated string, or null for an unknown status.
    let known =
        unsafe { cu::cuGetErrorString(status, &mut text) } == cu::CUresult::CUDA_SUCCESS && !text.is_null();
    let message = if known {
        // SAFETY: checked above; the string lives as long as the driver.
        unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        format!("{status:?}")
    };
    Err(Error::Driver { call, message })
}

/// Calls a driver function and checks its status.
macro_rules! driver {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::cuda::check(stringify!($name), cudarc::driver::sys::$name($($argument),*))
    };
}
use driver;

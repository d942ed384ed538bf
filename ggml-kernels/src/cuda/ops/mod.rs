//! The ops of `include/*.h` on a GPU: for each op its scratch, and the launches that its shape asks for.
//!
//! What is launched depends on shapes only, never on positions, lengths or page tables, which the kernels read from device memory:
//! a recorded graph serves every later token of the same shape.
mod attention;
mod prefill;
mod rope_append;
mod route;
mod sample;

pub use attention::{DecodeScratch, Gathered};
pub use prefill::{append_attention_prefill, attention_prefill};
pub use rope_append::rope_append;
pub use route::RouteScratch;
pub use sample::{philox_uniform, sample, sample_state_bytes};

use super::{Error, Launch, Result, Stream};

/// What runs kernels: a [`Stream`], or, in tests, an emulator.
pub trait Executor {
    /// Multiprocessors, by which grids are sized.
    fn multiprocessors(&self) -> usize;
    /// Whether there is a kernel `name`: some are built for one architecture only.
    fn has(&self, name: &str) -> bool;
    /// Queues kernel `name`, whose only parameter is `P` by value.
    ///
    /// # Errors
    /// There is no such kernel, or the driver refuses the launch.
    ///
    /// # Safety
    /// `P` is the kernel's own parameter struct, and every address in it points to device memory that is large enough and alive until
    /// the work is done.
    unsafe fn run<P: Copy>(&self, name: &str, launch: Launch, params: &P) -> Result<()>;
}

impl Executor for Stream {
    fn multiprocessors(&self) -> usize {
        self.device().multiprocessors()
    }
    fn has(&self, name: &str) -> bool {
        self.device().function(name).is_ok()
    }
    unsafe fn run<P: Copy>(&self, name: &str, launch: Launch, params: &P) -> Result<()> {
        let function = self.device().function(name)?;
        // SAFETY: the caller's.
        unsafe { launch.overlap().run(self, &function, &(*params,)) }
    }
}

/// The name by which kernels know a cache type.
fn type_name(kind: i32) -> Result<&'static str> {
    use crate::contracts::{CLSA_F16, CLSA_F32, CLSA_Q8_0};
    match kind as u32 {
        CLSA_F32 => Ok("f32"),
        CLSA_F16 => Ok("f16"),
        CLSA_Q8_0 => Ok("q8_0"),
        other => Err(Error::Range(format!("cache type {other}: F32, F16 or Q8_0 wanted"))),
    }
}

/// Cuts one allocation into parts, each aligned to 256 bytes. With a null base it only counts.
struct Carver {
    base: *mut u8,
    used: usize,
}

impl Carver {
    fn new(base: *mut u8) -> Self {
        Self { base, used: 0 }
    }
    fn take<T>(&mut self, len: usize) -> *mut T {
        let at = self.used;
        self.used += (len * size_of::<T>()).next_multiple_of(256);
        self.base.wrapping_add(at).cast()
    }
}

/// `Ok` when `ok`, else a [`Error::Range`] with the text.
fn ensure(ok: bool, what: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Range(what())) }
}

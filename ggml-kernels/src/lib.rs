//! ggml (built and bound by `llama-cpp-sys-2`) and the C SIMD and CUDA kernels of clsa.
//!
//! Each op is one contract header in `include/`, one scalar reference and SIMD variants in `cpu/`, one CUDA file in `cuda/`.

pub mod budget;
pub mod limits;
pub mod llama;
pub mod mapping;
pub mod matmul;
pub mod quant;

/// ggml's and llama.cpp's C interface.
pub use llama_cpp_sys_2 as ggml;

/// The parameter structs of `include/*.h`, as bindgen reads them.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub mod contracts {
    include!(concat!(env!("OUT_DIR"), "/contracts.rs"));
}

/// The CUDA driver and our kernels, opened at run time.
pub mod cuda;

mod check;
pub mod ops;
pub mod sigbus;
pub mod simd;

//! Quantized local inference for YOCO language models with Cross-Layer Sparse Attention (arXiv 2606.06467, 2405.05254).
//!
//! The way of a token:
//!
//! ```text
//! terminal or file -> tokenizer -> session -> engine -> [ self-decoder -> shared memory + routing -> cross-decoder -> logits ]
//!                                                    -> sampler -> terminal
//! ```
pub mod backend;
pub mod batch;
pub mod bench;
pub mod cache;
pub mod chat;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod eval;
pub mod generate;
pub mod imatrix;
pub mod interrupt;
pub mod model;
pub mod placement;
pub mod sampler;
pub mod session;
pub mod template;
pub mod tokenizer;
pub mod tune;

pub use clsa_convert::gguf;
pub use error::{Error, Result};

/// Bounds the memory of chat templates ([`template`]).
#[global_allocator]
static ALLOCATOR: ggml_kernels::budget::Counted = ggml_kernels::budget::Counted;

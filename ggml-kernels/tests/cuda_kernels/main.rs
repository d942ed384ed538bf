//! The CUDA attention, routing and sampling kernels against the scalar references, on a GPU where there is one, and on the emulator of
//! tests/emulator with `--features cuda-emulator`.
mod attention;
mod harness;
mod rope_append;
mod route;
mod sample;

//! The CUDA backend: kernels/ on a GPU, or on the CPU as device `simt`.

mod driver;

pub use driver::*;

//! The CUDA backend: kernels/ on a GPU, or on the CPU as device `simt`.

mod driver;
pub mod gemm;
pub mod norm;

pub use driver::*;

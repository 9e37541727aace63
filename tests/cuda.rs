//! Tests of src/cuda: the machines, and the kernels on them.

mod driver;
mod library;

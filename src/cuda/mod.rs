//! The kernels of kernels/ on a GPU or on the CPU machine.

pub mod binaries;

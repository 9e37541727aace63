//! kernels/ on every machine there is: the CPU machine under several schedules and with its race
//! detector, and a GPU where one is; and the driver below them.

mod adamw;
mod attention;
mod commands;
mod conformance;
pub mod counting;
mod driver;
mod embedding;
mod faults;
mod gemm;
mod gemm_tuned;
mod library;
mod loss;
mod machines;
mod memory;
mod model;
mod mutants;
mod norm;
mod nvml;
mod nvtx;
mod offload;
mod order;
mod overlap;
mod plain;
mod pointwise;
mod ptx;
mod replay;
mod residual;
mod state;
mod transfers;

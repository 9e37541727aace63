//! isobath pretrains LLaMA-architecture models with hand-written kernels.

pub mod backend;
pub mod checkpoint;
pub mod config;
pub mod cpu;
pub mod data;
pub mod device;
pub mod durable;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod generate;
pub mod hf;
pub mod metrics;
pub mod model;
pub mod optim;
pub mod plan;
pub mod random;
pub mod rundir;
pub mod tape;
pub mod tensor;
pub mod tensor_file;
pub mod train;

pub use error::{Error, Result};

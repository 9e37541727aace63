//! isobath pretrains LLaMA-architecture models with hand-written kernels.

pub mod backend;
pub mod config;
pub mod cpu;
pub mod engine;
pub mod error;
pub mod generate;
pub mod model;
pub mod optim;
pub mod random;
pub mod tape;
pub mod tensor;

pub use error::{Error, Result};

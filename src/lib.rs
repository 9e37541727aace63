//! isobath pretrains LLaMA-architecture models with hand-written kernels.

pub mod config;
pub mod error;
pub mod model;
pub mod plan;
pub mod tensor;

pub use error::{Error, Result};

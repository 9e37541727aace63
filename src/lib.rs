//! isobath pretrains LLaMA-architecture models with hand-written kernels.

pub mod config;
pub mod data;
pub mod error;
pub mod model;
pub mod random;
pub mod tensor;

pub use error::{Error, Result};

//! isobath pretrains LLaMA-architecture models with hand-written kernels.
//!
//! A batch's way: [`data`] -> [`tape`] -> [`cpu`] (every op behind [`backend::Backend`]) ->
//! [`engine`] -> [`train`] -> [`checkpoint`]. [`model`] records the LLaMA on the tape.

// Shapes are written [T,C] in the docs; rustdoc takes them for links.
#![allow(rustdoc::broken_intra_doc_links)]

pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod compare;
pub mod config;
pub mod cpu;
pub mod cuda;
pub mod data;
pub mod depth;
pub mod device;
pub mod durable;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod figure;
pub mod flat;
pub mod generate;
pub mod hf;
pub mod host_memory;
pub mod loaded;
pub mod metrics;
pub mod model;
pub mod optim;
pub mod plan;
pub mod predict;
pub mod random;
pub mod report;
pub mod rundir;
pub mod sensors;
pub mod statistics;
pub mod stock;
pub mod tape;
pub mod tasks;
pub mod tensor;
pub mod tensor_file;
pub mod throughput;
pub mod train;
pub mod version;

pub use error::{Error, Result};

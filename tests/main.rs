//! The one integration test binary; its modules mirror src/.

mod checkpoint;
mod cli;
mod config;
mod cpu;
mod data;
mod hf;
mod random;
mod support;
mod tape;

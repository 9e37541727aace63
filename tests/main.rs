//! The one integration test binary; its modules mirror src/.

mod bench;
mod build;
mod bundle;
mod checkpoint;
mod cli;
mod commands;
mod config;
mod cpu;
mod cuda;
mod data;
mod depth;
mod evaluate;
mod figure;
mod generate;
mod hf;
mod model;
mod optim;
mod peers;
mod plan;
mod random;
mod report;
mod support;
mod tape;
mod tasks;
mod train;

//! From text to batches: text -> tokens -> shards -> rows -> batches.
//!
//! `text` reads documents from files (`zstandard` from compressed ones), `tokenizer` turns them
//! into ids, `prepare` writes ids into `shard` files, `source` presents shards (or memory) as one
//! stream, `loader` and `windows` cut that stream into rows, `batch` by `batch`, for training and
//! for evaluation. `corpus` resolves a configuration into all of it. Prompts and answers take
//! another way to the loader: `supervised` reads them, `packing` says which share a row, `examples`
//! makes the rows; `dataset` is whichever of both a run reads.
//! Nothing here knows the model or a device.

pub mod batch;
pub mod corpus;
pub mod dataset;
pub mod examples;
pub mod loader;
pub mod packing;
pub mod prepare;
mod pretokens;
mod progress;
pub mod shard;
pub mod shuffle;
pub mod source;
pub mod supervised;
pub mod text;
pub mod tokenizer;
pub mod windows;
mod zstandard;

pub use batch::Batch;
pub use corpus::Corpus;
pub use dataset::Dataset;
pub use examples::{Example, ExampleRows, Examples};
pub use loader::{Loader, LoaderOptions, LoaderState, Prefetch, RowSource};
pub use shard::{Shard, ShardWriter};
pub use source::TokenSource;
pub use tokenizer::Tokenizer;
pub use windows::Windows;

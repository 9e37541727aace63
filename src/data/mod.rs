//! From text to batches: text -> tokens -> shards -> rows -> batches.
//!
//! `text` reads documents from files, `tokenizer` turns them into ids, `prepare` writes ids into
//! `shard` files, `source` presents shards (or memory) as one stream, `loader` and `windows` cut
//! that stream into rows for training and for evaluation. `corpus` resolves a configuration into
//! all of it. Nothing here knows the model or a device.

mod pretokens;
pub mod tokenizer;

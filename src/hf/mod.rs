//! Hugging Face folders: what `transformers` loads as a stock `LlamaForCausalLM`, in and out.
//!
//! Out: [`Export::write`] makes config.json, model.safetensors and the tokenizer's files of a flat
//! parameter buffer. LayerNorm Scaling leaves no trace in the architecture: the gains are written
//! as the trained network applies them, `w / sqrt(l)`, and scales of a branch go into the
//! projection out of it. What does not fold (norms elsewhere) is written under another name, which
//! transformers refuses. In: [`load`] reads and checks a folder, [`fill`] puts its tensors into a
//! flat buffer. Which tensor lies where is told by the parameter table alone. No trainer state
//! here; see [`crate::checkpoint`].

mod export;
mod folder_config;
mod import;
mod tokenizer;

pub use export::Export;
pub use folder_config::{model_config, not_stock, trained_placement};
pub use import::{HfModel, fill, fill_each, load, load_for_inference};
pub use tokenizer::TokenizerFiles;

pub const CONFIG: &str = "config.json";
pub const MODEL: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const TOKENIZER: &str = "tokenizer.json";
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub const GENERATION_CONFIG: &str = "generation_config.json";

//! A model read from disk with its tokenizer: what evaluation and generation start from.

use std::path::{Path, PathBuf};

use crate::checkpoint::model_folder;
use crate::config::ModelConfig;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::hf;
use crate::model::parameters::ParameterTable;

/// A model read from disk, with its tokenizer.
pub struct LoadedModel {
    pub folder: PathBuf,
    pub config: ModelConfig,
    pub table: ParameterTable,
    /// The table's stored elements.
    pub parameters: Vec<f32>,
    pub tokenizer: Tokenizer,
}

impl LoadedModel {
    /// From a run, a checkpoint, or any Hugging Face LLaMA folder.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = model_folder(path)?;
        let (config, table, parameters) = hf::load_for_inference(&folder)?;
        let tokenizer = Tokenizer::open(&folder.join(hf::TOKENIZER).to_string_lossy())?;
        Ok(LoadedModel { folder, config, table, parameters, tokenizer })
    }
}

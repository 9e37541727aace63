//! What a configuration leaves open is decided here, once the model's folder, the tokenizer and the
//! rows are known.

use super::Console;
use crate::checkpoint::model_folder;
use crate::config::Config;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::hf;

/// With `train.init_from`, the folder decides the model and, if it has one, the tokenizer.
///
/// Errors: the folder is missing or no model; nothing names a tokenizer.
pub fn adopt_initial_model(config: &mut Config) -> Result<()> {
    let Some(path) = &config.train.init_from else { return Ok(()) };
    let folder = model_folder(path)?;
    config.model = hf::model_config(&folder)?;
    let tokenizer = folder.join(hf::TOKENIZER);
    if tokenizer.exists() {
        config.data.tokenizer = tokenizer.to_string_lossy().into_owned();
    } else if config.data.tokenizer.starts_with("train:") {
        return Err(Error::Config {
            what: format!("{} has no {}", folder.display(), hf::TOKENIZER),
            remedy: "set data.tokenizer to the tokenizer.json of that model".to_string(),
        });
    }
    config.train.init_from = Some(folder);
    Ok(())
}

/// `model.vocab = 0` becomes the tokenizer's size. A larger tokenizer is fine as long as the text
/// has none of the tokens beyond: t5-base has 100 that never occur.
pub(super) fn resolve_vocabulary(config: &mut Config, tokenizer: &Tokenizer) {
    if config.model.vocab == 0 {
        config.model.vocab = tokenizer.vocab();
    }
}

/// With `train.epochs`, the number of rows decides `train.steps`: as many steps as read all rows so
/// many times, the last one full.
pub(super) fn resolve_epochs(config: &mut Config, rows: u64, console: &Console) -> Result<()> {
    let train = &mut config.train;
    if train.epochs == 0.0 {
        return Ok(());
    }
    let rows_per_step = (train.micro_batch * train.grad_accumulation) as u64;
    let steps = (train.epochs * rows as f64 / rows_per_step as f64).ceil().max(1.0) as u64;
    console.say(format!(
        "train.epochs = {}: {steps} steps of {rows_per_step} rows, {rows} rows in an epoch \
         (train.steps is not read)",
        train.epochs
    ));
    train.steps = steps;
    config.validate_shape()?;
    config.validate_warmup()
}

//! What a configuration leaves open is decided here, once the model's folder, the tokenizer and the
//! rows are known; and whether a checkpoint is one of the same run.

use super::Console;
use crate::checkpoint::{Verified, model_folder};
use crate::config::{Config, DEFAULT_PRESET};
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

/// Refuses to continue with another model, with rows formed in another way, or with other layers at
/// rest.
pub(super) fn check_same_model(verified: &Verified, config: &Config) -> Result<()> {
    let (saved, now) = (verified.config()?, as_json(config)?);
    let default = as_json(&Config::preset(DEFAULT_PRESET)?)?;
    let keys = [
        ("model", None),
        ("data", Some("format")),
        ("data", Some("rows")),
        ("data", Some("attention")),
        ("optimizer", Some("sampled_layers")),
        ("optimizer", Some("sample_interval")),
    ];
    for (table, only) in keys {
        let Some(values) = now[table].as_object() else { continue };
        for (key, value) in values.iter().filter(|(key, _)| only.is_none_or(|only| only == *key)) {
            // A version without this key knew no other value than its default.
            let before = saved[table].get(key).unwrap_or(&default[table][key]);
            if before != value {
                return Err(Error::Config {
                    what: format!("{table}.{key} is {value}, the checkpoint has {before}"),
                    remedy: format!("leave {table}.{key} out, or start another run with --init"),
                });
            }
        }
    }
    Ok(())
}

fn as_json(config: &Config) -> Result<serde_json::Value> {
    serde_json::to_value(config).map_err(|error| Error::Config {
        what: format!("it cannot be compared with that of the checkpoint: {error}"),
        remedy: "check it for paths that are not UTF-8".to_string(),
    })
}

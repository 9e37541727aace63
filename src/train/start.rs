//! Where a session begins: at step 0, or at the newest checkpoint that holds.

use std::path::PathBuf;

use super::Console;
use crate::backend::Backend;
use crate::checkpoint::{self, TrainerState, Verified};
use crate::config::{Config, DEFAULT_PRESET};
use crate::data::dataset::Dataset;
use crate::data::loader::{Loader, LoaderOptions};
use crate::engine::Trainer;
use crate::error::{Error, Result};
use crate::flat::FlatBuffer;
use crate::hf;
use crate::model::init;
use crate::model::parameters::Parameter;
use crate::rundir::RunDir;

/// Where a process takes the run up.
pub(super) struct Start {
    pub state: TrainerState,
    pub loader: Loader,
    /// The checkpoint that holds this state already.
    pub saved: Option<(u64, PathBuf)>,
}

/// Step 0: drawn parameters, or those of a Hugging Face folder.
pub(super) fn begin<B: Backend>(
    trainer: &mut Trainer<B>,
    config: &Config,
    loader: Loader,
) -> Result<Start> {
    let table = trainer.table().clone();
    // Buffers begin as zeros, which what lies between parameters stays.
    let mut write = |parameter: &Parameter, values: &[f32]| {
        trainer.write_flat(FlatBuffer::Parameters, parameter.offset, values)
    };
    match &config.train.init_from {
        Some(folder) => hf::fill_each(&hf::load(folder)?, &table, write)?,
        None => {
            let mut values = Vec::new();
            for parameter in table.entries() {
                values.resize(parameter.stored.elements(), 0.0);
                init::draw(parameter, config.seed, &mut values);
                write(parameter, &values)?;
            }
        }
    }
    let state = TrainerState {
        step: 0,
        tokens: 0,
        loader: loader.state(),
        elapsed_seconds: 0.0,
        pending: None,
    };
    Ok(Start { state, loader, saved: None })
}

/// The newest checkpoint that holds; metrics after it are cut off.
pub(super) fn restore<B: Backend>(
    trainer: &mut Trainer<B>,
    directory: &RunDir,
    config: &Config,
    dataset: &Dataset,
    from_start: Loader,
    console: &Console,
) -> Result<Start> {
    let latest = checkpoint::latest(directory)?;
    for damaged in &latest.damaged {
        console.say(format!("warning: passing over step {}: {}", damaged.step, damaged.reason));
    }
    let Some(verified) = latest.verified else {
        if let Some(newest) = latest.damaged.into_iter().next() {
            return Err(newest.reason);
        }
        console.say("no checkpoint to resume from: starting at step 0");
        directory.cut_metrics(0)?;
        return begin(trainer, config, from_start);
    };
    check_same_model(&verified, config)?;
    let table = trainer.table().clone();
    let state = verified
        .load_each(&table, |buffer, first, values| trainer.write_flat(buffer, first, values))?;
    let loader = dataset.loader(loader_options(config), Some(&state.loader))?;
    directory.cut_metrics(state.step)?;
    console.say(format!("resuming after step {}", state.step));
    let saved = state.pending.is_none().then(|| (state.step, verified.folder().to_path_buf()));
    Ok(Start { state, loader, saved })
}

pub(super) fn loader_options(config: &Config) -> LoaderOptions {
    LoaderOptions {
        rows: config.data.rows,
        documents: config.data.packs_documents(),
        sequence: config.data.sequence,
        micro_batch: config.train.micro_batch,
        seed: config.seed,
    }
}

/// Refuses to continue with another model, with rows formed in another way, or with other frozen
/// layers.
fn check_same_model(verified: &Verified, config: &Config) -> Result<()> {
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

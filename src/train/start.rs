//! Where a session begins: at step 0, or at the newest checkpoint that holds.

use std::path::PathBuf;

use super::Console;
use super::resolve::check_same_model;
use crate::backend::Backend;
use crate::checkpoint::{self, TrainerState};
use crate::config::Config;
use crate::data::loader::{Loader, LoaderOptions};
use crate::data::material::Material;
use crate::engine::Trainer;
use crate::error::Result;
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
        owed: None,
    };
    Ok(Start { state, loader, saved: None })
}

/// The newest checkpoint that holds; metrics after it are cut off.
pub(super) fn restore<B: Backend>(
    trainer: &mut Trainer<B>,
    directory: &RunDir,
    config: &Config,
    material: &Material,
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
    let loader = material.loader(loader_options(config), Some(&state.loader))?;
    directory.cut_metrics(state.step)?;
    console.say(format!("resuming after step {}", state.step));
    let saved = state.owed.is_none().then(|| (state.step, verified.folder().to_path_buf()));
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

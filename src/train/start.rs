//! Where a session begins: at step 0, or at the newest checkpoint that holds.

use std::path::PathBuf;

use super::Console;
use super::resolve::check_same_model;
use crate::backend::Backend;
use crate::checkpoint::{self, TrainerState};
use crate::config::Config;
use crate::data::loader::{Loader, LoaderOptions, LoaderState};
use crate::data::material::Material;
use crate::engine::Trainer;
use crate::error::{Error, Result};
use crate::hf;
use crate::metrics::StepRecord;
use crate::model::init::initial_parameters;
use crate::rundir::RunDir;

/// Where a process takes the run up.
pub(super) struct Start {
    pub state: TrainerState,
    pub loader: Loader,
    /// See [`super::Session::owed`].
    pub owed: Option<StepRecord>,
    /// The checkpoint that holds this state already.
    pub saved: Option<(u64, PathBuf)>,
}

/// Step 0: drawn parameters, or those of a Hugging Face folder.
pub(super) fn begin<B: Backend>(
    trainer: &mut Trainer<B>,
    config: &Config,
    loader: Loader,
) -> Result<Start> {
    let parameters = match &config.train.init_from {
        None => initial_parameters(trainer.table(), config.seed),
        Some(folder) => {
            let mut parameters = vec![0.0; trainer.table().stored_elements()];
            hf::fill(&hf::load(folder)?, trainer.table(), &mut parameters)?;
            parameters
        }
    };
    trainer.set_parameters(&parameters)?;
    let state = TrainerState {
        step: 0,
        updates: 0,
        tokens: 0,
        seed: config.seed,
        loader: serde_json::Value::Null,
        elapsed_seconds: 0.0,
        best_valid_loss: None,
        extra: serde_json::Value::Null,
    };
    Ok(Start { state, loader, owed: None, saved: None })
}

/// The newest checkpoint that holds; metrics behind it are cut off.
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
    let mut buffers = trainer.state_buffers().into_iter();
    let state = verified.load_each(&table, |values| match buffers.next() {
        Some(buffer) => trainer.set_buffer(buffer, values),
        None => Ok(()),
    })?;
    let position: LoaderState =
        serde_json::from_value(state.loader.clone()).map_err(|error| Error::Checkpoint {
            path: verified.folder().to_path_buf(),
            what: format!("the loader's position cannot be read: {error}"),
            remedy: "resume with the version of isobath that wrote it".to_string(),
        })?;
    let loader = material.loader(loader_options(config), Some(&position))?;
    directory.cut_metrics(state.step)?;
    console.say(format!("resuming behind step {}", state.step));
    let owed: Option<StepRecord> = serde_json::from_value(state.extra.clone()).unwrap_or(None);
    let saved = owed.is_none().then(|| (state.step, verified.folder().to_path_buf()));
    Ok(Start { state, loader, owed, saved })
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

//! Finding, verifying and loading checkpoints.
//!
//! A [`Verified`] exists only if every file of a folder has the size and the sha256 that the
//! manifest tells. A damaged folder is reported as data, never deleted and never loaded. Whoever
//! wants the model alone gets its folder from [`model_folder`], without the three times as large
//! state of the optimizer having been read.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;

use super::layout;
use super::manifest::Manifest;
use super::{MANIFEST, TRAINER, TRAINER_FORMATS, TRAINER_TENSORS, TrainerFile, TrainerState};
use crate::durable::Fingerprint;
use crate::error::{Error, Result};
use crate::flat::{FlatBuffer, chunks};
use crate::hf;
use crate::model::parameters::ParameterTable;
use crate::rundir::{CHECKPOINTS, checkpoint_folder, checkpoint_steps};
use crate::tensor_file::{Dtype, TensorReader};

/// The files that a model is read from; no state of the trainer.
const OF_MODEL: [&str; 3] = [hf::CONFIG, hf::MODEL, hf::TOKENIZER];

/// A checkpoint whose every byte is what was written.
#[derive(Debug)]
pub struct Verified {
    folder: PathBuf,
    step: u64,
}

/// A folder that has a checkpoint's name and is none.
#[derive(Debug)]
pub struct Damaged {
    pub step: u64,
    /// An [`Error::Checkpoint`]: what is wrong with which file.
    pub reason: Error,
}

/// What a run has to continue from.
#[derive(Debug)]
pub struct Latest {
    /// The newest checkpoint that holds; none if there is none.
    pub verified: Option<Verified>,
    /// Newer folders that were passed over, newest first: to be told to the user.
    pub damaged: Vec<Damaged>,
}

/// The newest checkpoint of a run that can be trusted. Every file of it is read.
pub fn latest(run: impl AsRef<Path>) -> Result<Latest> {
    let (verified, damaged) = newest(run.as_ref(), verify)?;
    Ok(Latest { verified, damaged })
}

/// What `check` makes of the newest checkpoint that it accepts, and the newer ones, newest first.
fn newest<T>(run: &Path, check: impl Fn(&Path) -> Result<T>) -> Result<(Option<T>, Vec<Damaged>)> {
    let mut damaged = Vec::new();
    for step in checkpoint_steps(run)?.into_iter().rev() {
        match check(&checkpoint_folder(run, step)) {
            Ok(accepted) => return Ok((Some(accepted), damaged)),
            Err(reason) => damaged.push(Damaged { step, reason }),
        }
    }
    Ok((None, damaged))
}

/// Reads every file of a checkpoint folder and compares it with the manifest.
pub fn verify(folder: &Path) -> Result<Verified> {
    let manifest = complete(folder)?;
    compare_hashes(folder, &manifest, |_| true)?;
    Ok(Verified { folder: folder.to_path_buf(), step: manifest.step })
}

/// As [`verify`], but reads only what the model is made of.
fn verify_model(folder: &Path) -> Result<PathBuf> {
    compare_hashes(folder, &complete(folder)?, |name| OF_MODEL.contains(&name))?;
    Ok(folder.to_path_buf())
}

/// Reads the files that are `asked` for.
fn compare_hashes(
    folder: &Path,
    manifest: &Manifest,
    asked: impl Fn(&str) -> bool + Sync,
) -> Result<()> {
    manifest.files.par_iter().filter(|(name, _)| asked(name)).try_for_each(|(name, expected)| {
        let found = Fingerprint::of_file(&folder.join(name))?;
        if found == *expected {
            return Ok(());
        }
        let what = format!(
            "{name} is damaged: its sha256 is {}, {MANIFEST} has {}",
            found.sha256, expected.sha256
        );
        Err(unusable(folder, what))
    })
}

/// The manifest of a folder whose files are there and have the right sizes; nothing is hashed.
pub(super) fn complete(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    if !path.exists() {
        return Err(unusable(folder, format!("has no {MANIFEST}: it was not finished")));
    }
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let manifest =
        Manifest::parse(&bytes).map_err(|what| unusable(folder, format!("{MANIFEST} {what}")))?;
    let named = folder.file_name().unwrap_or_default().to_string_lossy();
    let step = named.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok());
    if step.is_some_and(|step| step != manifest.step) {
        let what = format!("is of step {}: the folder was renamed", manifest.step);
        return Err(unusable(folder, what));
    }
    for (name, expected) in &manifest.files {
        let path = folder.join(name);
        if !path.exists() {
            return Err(unusable(folder, format!("{name} is missing")));
        }
        let bytes = fs::metadata(&path).map_err(Error::io("read", &path))?.len();
        if bytes != expected.bytes {
            let expected = expected.bytes;
            let what =
                format!("{name} is damaged: it has {bytes} bytes, {MANIFEST} has {expected}");
            return Err(unusable(folder, what));
        }
    }
    Ok(manifest)
}

impl Verified {
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn step(&self) -> u64 {
        self.step
    }

    /// The resolved configuration that the checkpoint was trained with.
    pub fn config(&self) -> Result<Value> {
        Ok(self.trainer_file()?.config)
    }

    /// Gives every element of the state that was saved to `take`, a chunk after the other, with the
    /// place of its first one: only a chunk is in memory at a time. The table must be laid out as
    /// when the state was saved.
    pub fn load_each(
        &self,
        table: &ParameterTable,
        mut take: impl FnMut(FlatBuffer, usize, &[f32]) -> Result<()>,
    ) -> Result<TrainerState> {
        let trainer = self.trainer_file()?;
        let file = TensorReader::open(&self.folder.join(TRAINER_TENSORS))?;
        let elements = table.stored_elements();
        let fits = FlatBuffer::ALL.iter().all(|buffer| {
            let info = file.info(buffer.name());
            info.is_some_and(|info| info.dtype == Dtype::F32 && info.shape == [elements])
        });
        if trainer.layout != layout(table) || !fits {
            return Err(Error::Checkpoint {
                path: self.folder.clone(),
                what: "was saved with other model settings".to_string(),
                remedy: "resume with the run's own run.toml (model.* must stay), or start a new \
                         run from it with --init"
                    .to_string(),
            });
        }
        let mut values = Vec::new();
        for buffer in FlatBuffer::ALL {
            for chunk in chunks(elements) {
                values.resize(chunk.len(), 0.0);
                file.read(buffer.name(), chunk.start, &mut values)?;
                take(buffer, chunk.start, &values)?;
            }
        }
        Ok(trainer.state)
    }

    fn trainer_file(&self) -> Result<TrainerFile> {
        let path = self.folder.join(TRAINER);
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let unreadable = |e: serde_json::Error| unusable(&path, format!("cannot be read: {e}"));
        let json: Value = serde_json::from_slice(&bytes).map_err(unreadable)?;
        if !TRAINER_FORMATS.iter().any(|&known| json["format"] == known) {
            let known = TRAINER_FORMATS.map(|it| it.to_string()).join(" and ");
            let what = format!("has format {}, this build knows {known}", json["format"]);
            return Err(unusable(&path, what));
        }
        serde_json::from_value(json).map_err(unreadable)
    }
}

/// The folder that a MODEL argument means: a Hugging Face folder, or the newest checkpoint of a
/// run whose model can be trusted; the state of its trainer is not read.
pub fn model_folder(path: &Path) -> Result<PathBuf> {
    if path.join(hf::CONFIG).exists() {
        // One of our checkpoints must hold; other people's folders have no manifest.
        if path.join(MANIFEST).exists() || path.join(TRAINER).exists() {
            verify_model(path)?;
        }
        return Ok(path.to_path_buf());
    }
    let refused = |what: String, remedy: &str| Error::Checkpoint {
        path: path.to_path_buf(),
        what,
        remedy: remedy.to_string(),
    };
    if !path.join(CHECKPOINTS).is_dir() {
        let what = format!("has neither {} nor {CHECKPOINTS}/", hf::CONFIG);
        return Err(refused(what, "name a run, one of its checkpoints, or a Hugging Face folder"));
    }
    let (folder, damaged) = newest(path, verify_model)?;
    match (folder, damaged.into_iter().next()) {
        (Some(folder), _) => Ok(folder),
        (None, Some(newest)) => Err(newest.reason),
        (None, None) => {
            Err(refused("has no checkpoint yet".into(), "wait for the first one, or train on"))
        }
    }
}

fn unusable(path: &Path, what: String) -> Error {
    let remedy = "use another checkpoint of the run; --resume takes the newest one that holds";
    Error::Checkpoint { path: path.to_path_buf(), what, remedy: remedy.to_string() }
}

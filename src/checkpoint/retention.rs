//! Which checkpoints stay: the newest few, every n-th for ever, and always one that can be loaded.
//!
//! Folders that are damaged are neither counted nor deleted: what to do with them is for a person
//! to decide.

use std::collections::BTreeSet;

use super::Saved;
use super::verified::{complete, verify};
use crate::config::CheckpointConfig;
use crate::error::Result;
use crate::rundir::{RunDir, checkpoint_folder, checkpoint_steps};

/// Deletes the checkpoints that `config` does not keep and returns their steps. The newest one
/// that verifies is never deleted; it is read only if there is something to delete, and not if it
/// is the one that was `just_saved`.
pub fn retain(
    run: &RunDir,
    config: &CheckpointConfig,
    just_saved: Option<&Saved>,
) -> Result<Vec<u64>> {
    let mut steps = checkpoint_steps(run.path())?;
    steps.retain(|step| complete(&checkpoint_folder(run.path(), *step)).is_ok());
    let mut delete = superfluous(&steps, config.keep_last, config.keep_every);
    if config.initial {
        delete.remove(&0);
    }
    if delete.is_empty() {
        return Ok(Vec::new());
    }
    let verifies = |step: &&u64| {
        let folder = checkpoint_folder(run.path(), **step);
        just_saved.is_some_and(|saved| saved.folder() == folder) || verify(&folder).is_ok()
    };
    match steps.iter().rev().find(verifies) {
        Some(newest) => delete.remove(newest),
        None => return Ok(Vec::new()),
    };
    for step in &delete {
        run.delete_checkpoint(*step)?;
    }
    Ok(delete.into_iter().collect())
}

/// `keep_last` 0 keeps all; `keep_every` 0 keeps none for ever. `steps` is in order.
fn superfluous(steps: &[u64], keep_last: usize, keep_every: u64) -> BTreeSet<u64> {
    if keep_last == 0 {
        return BTreeSet::new();
    }
    let old = &steps[..steps.len().saturating_sub(keep_last)];
    let stays = |step: u64| keep_every != 0 && step.is_multiple_of(keep_every);
    old.iter().copied().filter(|step| !stays(*step)).collect()
}

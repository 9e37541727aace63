//! The change of a task's accuracy without each layer.

use std::path::PathBuf;

use super::report::TaskReport;
use crate::backend::Backend;
use crate::engine::{Backward, Layerwise};
use crate::error::Result;
use crate::loaded::LoadedModel;
use crate::tasks::{Prompts, Score, Task, score};
use crate::tensor::IGNORE_INDEX;

/// What to ask the model without each layer.
#[derive(Clone, Debug)]
pub struct TaskRequest {
    /// A .jsonl or .csv file, or a folder of them.
    pub path: PathBuf,
    /// Examples before each question.
    pub shots: usize,
}

impl TaskRequest {
    /// In the model's tokens; the model reads up to its longest sequence.
    pub fn prompts(&self, model: &LoadedModel) -> Result<Prompts> {
        let task = Task::open(&self.path)?;
        Prompts::new(&task, &model.tokenizer, None, self.shots, model.config.max_sequence)
    }
}

/// Scores the whole model, and the model without each layer, in `batch` rows at one time;
/// `progress` sees (rows done, of).
pub fn change_of_accuracy<B: Backend>(
    model: &LoadedModel,
    prompts: &Prompts,
    batch: usize,
    backend: B,
    progress: impl FnMut(u64, u64),
) -> Result<TaskReport> {
    let LoadedModel { config, table, parameters, .. } = model;
    let size = [batch, prompts.sequence()];
    let mut layerwise =
        Layerwise::new(config, table, parameters, size, Backward::default(), backend)?;
    // The model runs once over every batch; of the changed models the losses of the scored tokens
    // are kept: [L] of [batches].
    let mut without: Vec<Vec<Vec<f32>>> = vec![Vec::new(); config.layers];
    let whole = score(
        prompts,
        batch,
        &mut |rows| {
            let losses = layerwise.forward(rows)?.to_vec();
            for (layer, kept) in (1..).zip(&mut without) {
                let losses = layerwise.losses_without(layer)?.iter().zip(rows.targets);
                let scored = losses.filter(|(_, target)| **target != IGNORE_INDEX);
                kept.push(scored.map(|(loss, _)| *loss).collect());
            }
            Ok(losses)
        },
        progress,
    )?;
    let changed = |kept: Vec<Vec<f32>>| -> Result<f64> {
        let mut batches = kept.into_iter();
        let replayed = score(
            prompts,
            batch,
            &mut |rows| {
                let mut scored = batches.next().unwrap_or_default().into_iter();
                let loss = |&target: &i32| match target {
                    IGNORE_INDEX => 0.0,
                    _ => scored.next().unwrap_or(f32::NAN),
                };
                Ok(rows.targets.iter().map(loss).collect())
            },
            |_, _| {},
        )?;
        Ok(100.0 * (accuracy(&replayed) - accuracy(&whole)))
    };
    Ok(TaskReport {
        task: prompts.path.clone(),
        shots: prompts.shots,
        questions: whole.questions,
        accuracy: accuracy(&whole),
        standard_error: whole.acc_norm.standard_error,
        change: without.into_iter().map(changed).collect::<Result<_>>()?,
    })
}

fn accuracy(score: &Score) -> f64 {
    score.acc_norm.mean
}

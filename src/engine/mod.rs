//! A model on a device: its buffers and its programs.
//!
//! [`Plan`] says what a training run will need; [`Trainer`], [`Evaluator`], [`Layerwise`] and
//! [`Decoder`] allocate once and then only run. None knows where batches come from or where
//! checkpoints go.

mod batches;
mod decoder;
mod evaluator;
mod layerwise;
mod loss;
mod parameters;
mod plan;
mod trainer;

pub use decoder::{Decoder, DecoderPlan};
pub use evaluator::Evaluator;
pub use layerwise::{Backward, Layerwise};
pub use parameters::Parameters;
pub use plan::{MemoryTable, Plan};
pub use trainer::{StepOutcome, Trainer};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::{BufferId, IGNORE_INDEX, Kind, Shape, View};

/// Tokens and what they are to predict: [B,S] each, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub tokens: &'a [i32],
    pub targets: &'a [i32],
}

impl Rows<'_> {
    /// Number of targets that are tokens.
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE_INDEX).count()
    }
}

impl Rows<'_> {
    /// Refuses ids that a model of `vocab` tokens does not have.
    fn check(&self, vocab: usize) -> Result<()> {
        let known = |&&id: &&i32| (0..vocab as i64).contains(&(id as i64));
        let predicted = self.targets.iter().filter(|&&id| id != IGNORE_INDEX);
        match self.tokens.iter().chain(predicted).find(|id| !known(id)) {
            None => Ok(()),
            Some(id) => Err(Error::Usage {
                what: format!("the text has token {id}, the model has {vocab} tokens"),
                remedy: format!("set model.vocab above {id}, or use the model's own tokenizer"),
            }),
        }
    }
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&loss| loss as f64).sum()
}

fn flat_view(buffer: BufferId, elements: usize) -> View {
    View { buffer, offset: 0, kind: Kind::Statistic, shape: Shape::new(&[elements]) }
}

/// Refuses what does not fit on the device; `parts` are names and bytes.
fn check_available(parts: &[(&str, usize)], remedy: &str, backend: &impl Backend) -> Result<()> {
    let needed = parts.iter().map(|(_, bytes)| *bytes as u64).sum();
    let available = backend.available_bytes()?;
    if needed <= available {
        return Ok(());
    }
    let lines = parts.iter().map(|(name, bytes)| format!("  {name}: {} MiB", bytes >> 20));
    Err(Error::Memory {
        device: backend.name().to_string(),
        needed,
        available,
        table: lines.collect::<Vec<_>>().join("\n"),
        remedy: remedy.to_string(),
    })
}

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
mod replay;
mod trainer;

pub use decoder::{Decoder, DecoderPlan};
pub use evaluator::Evaluator;
pub use layerwise::{Backward, Layerwise};
pub use parameters::Parameters;
pub use plan::{MemoryTable, Plan};
pub use trainer::{StepOutcome, StepUnderWay, Trainer};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::{BufferId, IGNORE_INDEX, Kind, Shape, View};

/// Tokens and what they are to predict: [B,S] each, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub tokens: &'a [i32],
    pub targets: &'a [i32],
    /// Where the document of each token begins in its row, for programs whose tokens attend to
    /// their own document alone; `None`: every row is one document.
    pub document_starts: Option<&'a [i32]>,
}

impl<'a> Rows<'a> {
    /// Rows of one document each.
    pub fn new(tokens: &'a [i32], targets: &'a [i32]) -> Self {
        Rows { tokens, targets, document_starts: None }
    }

    /// Number of targets that are tokens.
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE_INDEX).count()
    }
}

impl Rows<'_> {
    /// Refuses documents that are none in rows of `sequence` tokens.
    fn check_documents(&self, sequence: usize) -> Result<()> {
        if let Some(starts) = self.document_starts.filter(|it| it.len() != self.tokens.len()) {
            return Err(Error::Usage {
                what: format!("{} document starts for {} tokens", starts.len(), self.tokens.len()),
                remedy: "give one for each token".to_string(),
            });
        }
        for (row, starts) in self.document_starts.unwrap_or(&[]).chunks(sequence).enumerate() {
            let follows =
                |at: usize| (starts[at.saturating_sub(1)]..=at as i32).contains(&starts[at]);
            if let Some(at) = (0..starts.len()).find(|&at| starts[at] < 0 || !follows(at)) {
                return Err(Error::Usage {
                    what: format!(
                        "row {row}: the document of token {at} is said to begin at {}",
                        starts[at]
                    ),
                    remedy: "give starts that do not descend along a row and lie at or before \
                             their token"
                        .to_string(),
                });
            }
        }
        Ok(())
    }

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

//! The micro-batches of a step on the device: tokens, targets and documents in, losses out.
//!
//! A step writes all of its micro-batches before it runs the first one and reads all losses behind
//! the last one, so that the device is waited for once a step.

use super::Rows;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::{Kind, Shape, View};

/// What one micro-batch is given and gives; [T] each.
#[derive(Clone, Copy, Debug)]
pub(super) struct MicroBatch {
    pub tokens: View,
    pub targets: View,
    /// Only where tokens attend to their own document alone.
    pub document_starts: Option<View>,
    pub losses: View,
}

pub(super) struct Batches {
    /// For every micro-batch of a step.
    all: MicroBatch,
    count: usize,
    /// T, tokens of a micro-batch.
    tokens: usize,
    staged_tokens: Vec<i32>,
    staged_targets: Vec<i32>,
    staged_starts: Vec<i32>,
    losses: Vec<f32>,
}

impl Batches {
    pub fn bytes(
        count: usize,
        tokens: usize,
        documents: bool,
        element_bytes: impl Fn(Kind) -> usize,
    ) -> usize {
        let indices = 2 + usize::from(documents);
        count * tokens * (indices * element_bytes(Kind::Index) + element_bytes(Kind::Statistic))
    }

    /// For up to `count` micro-batches of `tokens` tokens; with `documents`, of several in a row.
    pub fn allocate(
        count: usize,
        tokens: usize,
        documents: bool,
        backend: &mut impl Backend,
    ) -> Result<Self> {
        let shape = Shape::new(&[count * tokens]);
        let mut store = |label, kind| -> Result<View> {
            let bytes = shape.elements() * backend.element_bytes(kind);
            Ok(View { buffer: backend.allocate(label, bytes)?, offset: 0, kind, shape })
        };
        let all = MicroBatch {
            tokens: store("tokens of a step", Kind::Index)?,
            targets: store("targets of a step", Kind::Index)?,
            document_starts: match documents {
                true => Some(store("document starts of a step", Kind::Index)?),
                false => None,
            },
            losses: store("losses of a step", Kind::Statistic)?,
        };
        Ok(Batches {
            all,
            count,
            tokens,
            staged_tokens: Vec::with_capacity(count * tokens),
            staged_targets: Vec::with_capacity(count * tokens),
            staged_starts: Vec::with_capacity(if documents { count * tokens } else { 0 }),
            losses: vec![0.0; count * tokens],
        })
    }

    /// Writes the micro-batches of a step and returns where each lies. Errors: too many of them or
    /// none, rows of another size, documents where rows are attended to as one.
    pub fn write<'a>(
        &mut self,
        micro_batches: impl Iterator<Item = Rows<'a>>,
        backend: &mut impl Backend,
    ) -> Result<Vec<MicroBatch>> {
        self.staged_tokens.clear();
        self.staged_targets.clear();
        self.staged_starts.clear();
        for rows in micro_batches {
            let sizes = [rows.tokens.len(), rows.targets.len()];
            if sizes != [self.tokens; 2] || self.staged_tokens.len() == self.count * self.tokens {
                return Err(Error::Usage {
                    what: format!(
                        "a micro-batch of {} tokens and {} targets behind {} others; a step has up \
                         to {} of {}",
                        sizes[0],
                        sizes[1],
                        self.staged_tokens.len() / self.tokens,
                        self.count,
                        self.tokens
                    ),
                    remedy: "set train.micro_batch, data.sequence and train.grad_accumulation to \
                             what a step is given"
                        .to_string(),
                });
            }
            self.staged_tokens.extend_from_slice(rows.tokens);
            self.staged_targets.extend_from_slice(rows.targets);
            if self.all.document_starts.is_some() {
                stage_starts(&rows, &mut self.staged_starts);
            } else {
                check_no_documents(&rows)?;
            }
        }
        let used = self.staged_tokens.len() / self.tokens;
        if used == 0 {
            return Err(Error::Usage {
                what: "a step without micro-batches".to_string(),
                remedy: "give at least one; its targets may all be left out".to_string(),
            });
        }
        backend.write_index(self.part(self.all.tokens, 0, used, backend), &self.staged_tokens)?;
        backend.write_index(self.part(self.all.targets, 0, used, backend), &self.staged_targets)?;
        if let Some(starts) = self.all.document_starts {
            backend.write_index(self.part(starts, 0, used, backend), &self.staged_starts)?;
        }
        let one = |view, i, backend: &_| self.part(view, i, 1, backend);
        let micro_batch = |i| MicroBatch {
            tokens: one(self.all.tokens, i, backend),
            targets: one(self.all.targets, i, backend),
            document_starts: self.all.document_starts.map(|starts| one(starts, i, backend)),
            losses: one(self.all.losses, i, backend),
        };
        Ok((0..used).map(micro_batch).collect())
    }

    /// The sum of all losses of the last step.
    pub fn total_loss(&mut self, backend: &mut impl Backend) -> Result<f64> {
        let used = self.staged_tokens.len() / self.tokens;
        let view = self.part(self.all.losses, 0, used, backend);
        let losses = &mut self.losses[..used * self.tokens];
        backend.read(view, losses)?;
        Ok(super::sum(losses))
    }

    /// `count` micro-batches from the `first` one on.
    fn part(&self, view: View, first: usize, count: usize, backend: &impl Backend) -> View {
        let bytes = backend.element_bytes(view.kind);
        let offset = view.offset + first * self.tokens * bytes;
        View { offset, shape: Shape::new(&[count * self.tokens]), ..view }
    }
}

/// Appends the rows' document starts: 0 for rows of one document.
pub(super) fn stage_starts(rows: &Rows, staged: &mut Vec<i32>) {
    match rows.document_starts {
        Some(starts) => staged.extend_from_slice(starts),
        None => staged.resize(staged.len() + rows.tokens.len(), 0),
    }
}

/// A program that attends to whole rows would silently attend across their documents.
pub(super) fn check_no_documents(rows: &Rows) -> Result<()> {
    match rows.document_starts {
        None => Ok(()),
        Some(_) => Err(Error::Usage {
            what: "rows of several documents for a model that attends to whole rows".to_string(),
            remedy: "set data.attention to \"document\", or give rows without document starts"
                .to_string(),
        }),
    }
}

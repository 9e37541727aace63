//! The micro-batches of a step on the device: tokens, targets and documents in, losses out.
//!
//! A step writes all of its micro-batches before it runs the first one and begins to read all
//! losses after the last one. Both go in the order of the device's work, so that nobody waits for
//! it until the losses are asked for, which may be when the next step is enqueued already.

use super::Rows;
use crate::backend::{Backend, Reading};
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
    /// Losses of a step, and the norm of its gradient.
    read: Vec<f32>,
}

/// Losses and a norm on their way from the device.
#[derive(Debug)]
pub(super) struct BatchesRead {
    reading: Reading,
    /// How many.
    losses: usize,
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

    /// Bytes of the largest write and of the reading of a step of `tokens` tokens in all.
    pub fn transfers(tokens: usize) -> [usize; 2] {
        [tokens * size_of::<i32>(), (tokens + 1) * size_of::<f32>()]
    }

    /// For up to `count` micro-batches of `tokens` tokens; with `documents`, of several in a row.
    pub fn allocate(
        count: usize,
        tokens: usize,
        documents: bool,
        backend: &mut impl Backend,
    ) -> Result<Self> {
        let [sent, read] = Self::transfers(count * tokens);
        backend.prepare_transfers(sent, read)?;
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
            read: vec![0.0; count * tokens + 1],
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
                        "a micro-batch of {} tokens and {} targets after {} others; a step has up \
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

    /// Begins to read the losses of the step that was written last, and after them the norm of its
    /// gradient, [1].
    pub fn begin_read(&self, grad_norm: View, backend: &mut impl Backend) -> Result<BatchesRead> {
        let count = self.staged_tokens.len();
        let losses = self.part(self.all.losses, 0, count / self.tokens, backend);
        let reading = backend.begin_read(&[losses, grad_norm])?;
        Ok(BatchesRead { reading, losses: count })
    }

    /// The sum of all losses, and the norm.
    pub fn finish_read(
        &mut self,
        read: BatchesRead,
        backend: &mut impl Backend,
    ) -> Result<(f64, f64)> {
        let values = &mut self.read[..read.losses + 1];
        backend.finish_read(read.reading, values)?;
        let (losses, grad_norm) = values.split_at(read.losses);
        Ok((super::sum(losses), grad_norm[0] as f64))
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

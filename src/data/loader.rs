//! Rows and batches for training: which tokens a step sees.
//!
//! A row is a function of its index, and the order of rows is a function of (seed, epoch), so the
//! loader's whole state is how many rows it has handed out. Nothing is held in memory but the
//! batch being made. Batches go on across the end of an epoch.

use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

use crate::config::Rows;
use crate::data::batch::Batch;
use crate::data::examples::ExampleRows;
use crate::data::shuffle::Permutation;
use crate::data::source::TokenSource;
use crate::{Error, Result};

/// What rows are made of.
#[derive(Clone)]
pub enum RowSource {
    Tokens(TokenSource),
    Examples(ExampleRows),
}

impl From<&TokenSource> for RowSource {
    fn from(source: &TokenSource) -> Self {
        RowSource::Tokens(source.clone())
    }
}

impl RowSource {
    /// How many there are.
    fn rows(&self, options: &LoaderOptions) -> u64 {
        match (self, options.rows) {
            (RowSource::Tokens(source), Rows::Packed) => {
                source.tokens().saturating_sub(1) / options.sequence as u64
            }
            (RowSource::Tokens(source), Rows::Document) => source.documents(),
            (RowSource::Examples(rows), _) => rows.rows(),
        }
    }

    fn identity(&self) -> u64 {
        match self {
            RowSource::Tokens(source) => source.identity(),
            RowSource::Examples(rows) => rows.identity(),
        }
    }

    fn origin(&self) -> &Path {
        match self {
            RowSource::Tokens(source) => source.origin(),
            RowSource::Examples(rows) => rows.origin(),
        }
    }

    /// What rows are filled up with.
    fn pad(&self) -> i32 {
        match self {
            RowSource::Tokens(source) => source.end_of_text().unwrap_or(0) as i32,
            RowSource::Examples(rows) => rows.pad(),
        }
    }
}

/// How rows are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoaderOptions {
    /// Examples have been put into rows before.
    pub rows: Rows,
    /// Whether batches say where documents begin in their rows.
    pub documents: bool,
    /// S: tokens in a row.
    pub sequence: usize,
    /// B: rows in a batch.
    pub micro_batch: usize,
    /// Decides the order of rows.
    pub seed: u64,
}

/// All that a loader remembers. Only `row` changes; the rest refuses a state of other data.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LoaderState {
    /// Rows handed out since the beginning, over all epochs.
    pub row: u64,
    pub rows_per_epoch: u64,
    pub seed: u64,
    pub sequence: u64,
    /// [`TokenSource::identity`], or the examples'.
    pub source: u64,
}

/// Hands out batches for ever.
pub struct Loader {
    source: RowSource,
    options: LoaderOptions,
    state: LoaderState,
    /// Order of the current epoch.
    order: Permutation,
    epoch: u64,
    stream: Vec<u32>,
    starts: Vec<i32>,
}

impl Loader {
    /// Errors: a sequence or micro-batch of 0; in packed rows, fewer tokens than one row needs.
    pub fn new(source: impl Into<RowSource>, options: LoaderOptions) -> Result<Self> {
        let source = source.into();
        if options.sequence == 0 || options.micro_batch == 0 {
            return Err(Error::Config {
                what: "data.sequence and train.micro_batch must be at least 1".into(),
                remedy: "set both".into(),
            });
        }
        let rows_per_epoch = source.rows(&options);
        if rows_per_epoch == 0 {
            return Err(too_short(&source, options.sequence));
        }
        let state = LoaderState {
            row: 0,
            rows_per_epoch,
            sequence: options.sequence as u64,
            seed: options.seed,
            source: source.identity(),
        };
        Ok(Loader {
            source,
            options,
            state,
            order: Permutation::new(rows_per_epoch, options.seed, 0),
            epoch: 0,
            stream: vec![],
            starts: vec![],
        })
    }

    /// A loader that goes on where the one that gave `state` stood. Another `micro_batch` is fine.
    ///
    /// Errors: as [`Self::new`]; a state of other tokens, rows, sequence or seed.
    pub fn restore(
        source: impl Into<RowSource>,
        options: LoaderOptions,
        state: &LoaderState,
    ) -> Result<Self> {
        let mut loader = Self::new(source, options)?;
        let differs = [
            ("tokens", state.source != loader.state.source),
            ("sequence", state.sequence != loader.state.sequence),
            ("seed", state.seed != loader.state.seed),
            ("rows", state.rows_per_epoch != loader.state.rows_per_epoch),
        ];
        if let Some((name, _)) = differs.iter().find(|(_, differs)| *differs) {
            return Err(Error::Data {
                path: loader.source.origin().to_path_buf(),
                what: format!(
                    "the saved position belongs to other data: its {name} differ (saved {state:?}, \
                     here {:?})",
                    loader.state
                ),
                remedy: "resume with the data and settings of the run, or start a new run".into(),
            });
        }
        loader.state.row = state.row;
        Ok(loader)
    }

    /// The next B rows; never ends.
    ///
    /// Errors: a damaged shard. The state is then as it was before the call.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let LoaderOptions { sequence, micro_batch, documents, .. } = self.options;
        let size = [micro_batch, sequence];
        let mut batch = Batch::padding(size, documents, self.source.pad(), self.state.row);
        for row in 0..micro_batch {
            let index = self.row_at(self.state.row + row as u64);
            let source = match &self.source {
                RowSource::Tokens(source) => source,
                RowSource::Examples(rows) => {
                    rows.fill(&mut batch, row, index);
                    continue;
                }
            };
            let range = match self.options.rows {
                Rows::Packed => {
                    let start = index * sequence as u64;
                    start..start + sequence as u64 + 1
                }
                Rows::Document => {
                    let document = source.document(index)?;
                    document.start..document.end.min(document.start + sequence as u64 + 1)
                }
            };
            self.stream.clear();
            source.read(range.clone(), &mut self.stream)?;
            batch.fill(row, sequence, &self.stream);
            if documents {
                self.starts.clear();
                let read = range.start..range.end.min(range.start + sequence as u64);
                source.document_starts(read, &mut self.starts)?;
                batch.fill_starts(row, sequence, &self.starts);
            }
        }
        self.state.row += micro_batch as u64;
        Ok(batch)
    }

    /// Where the loader stands; [`Self::restore`] takes it.
    pub fn state(&self) -> LoaderState {
        self.state
    }

    /// Rows in an epoch.
    pub fn rows_per_epoch(&self) -> u64 {
        self.state.rows_per_epoch
    }

    fn row_at(&mut self, row: u64) -> u64 {
        let epoch = row / self.state.rows_per_epoch;
        if epoch != self.epoch {
            self.epoch = epoch;
            self.order = Permutation::new(self.state.rows_per_epoch, self.options.seed, epoch);
        }
        self.order.at(row % self.state.rows_per_epoch)
    }
}

fn too_short(source: &RowSource, sequence: usize) -> Error {
    let tokens = match source {
        RowSource::Tokens(source) => source.tokens(),
        RowSource::Examples(rows) => rows.tokens(),
    };
    Error::Data {
        path: source.origin().to_path_buf(),
        what: format!(
            "{tokens} tokens do not make one row of {sequence} (which needs {} with the last \
             target)",
            sequence + 1
        ),
        remedy: "give more text, or a smaller data.sequence".into(),
    }
}

/// A loader on a background thread, some batches ahead.
pub struct Prefetch {
    batches: Option<Receiver<Result<(Batch, LoaderState)>>>,
    thread: Option<JoinHandle<()>>,
    state: LoaderState,
}

impl Prefetch {
    /// `ahead`: batches prepared before they are asked for, at least 1.
    ///
    /// Errors: the system gives no thread.
    pub fn new(mut loader: Loader, ahead: usize) -> Result<Self> {
        let state = loader.state();
        let (sender, batches) = sync_channel(ahead.max(1));
        let thread = std::thread::Builder::new()
            .name("batches".into())
            .spawn(move || {
                loop {
                    let batch = loader.next_batch().map(|batch| (batch, loader.state()));
                    let failed = batch.is_err();
                    // An error here is the receiver's end: nobody wants batches any more.
                    if sender.send(batch).is_err() || failed {
                        return;
                    }
                }
            })
            .map_err(Error::io("start a thread for", "batches"))?;
        Ok(Prefetch { batches: Some(batches), thread: Some(thread), state })
    }

    /// The next batch, as [`Loader::next_batch`] gives it; waits if it is not ready.
    ///
    /// Errors: those of the loader; after one, there are no more batches.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let received = self.batches.as_ref().and_then(|batches| batches.recv().ok());
        let Some(result) = received else {
            if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
                std::panic::resume_unwind(panic);
            }
            return Err(Error::Internal {
                what: "a batch was asked for after the loader's error".into(),
                remedy: "see the error before this one, and report this one: it is a defect".into(),
            });
        };
        let (batch, state) = result?;
        self.state = state;
        Ok(batch)
    }

    /// State after the batches handed out, whatever was prepared beyond them.
    pub fn state(&self) -> LoaderState {
        self.state
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.batches = None; // the thread's next send fails, and it ends
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

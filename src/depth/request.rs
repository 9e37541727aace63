//! What is to be measured, on what, and how much work that is: sizes are checked before anything is
//! read.

use std::path::PathBuf;

use super::jacobian;
use super::task::TaskRequest;
use crate::config::choice::choice;
use crate::config::{DeviceKind, Dtype};
use crate::data::source::TokenSource;
use crate::data::windows::Windows;
use crate::error::{Error, Result};
use crate::evaluate::window_tokens;
use crate::loaded::LoadedModel;

choice! {
    /// A measurement of [`DepthReport`].
    pub enum Measure {
        Variance = "variance",
        Angular = "angular",
        Skipped = "skipped",
        Gradient = "gradient",
        Jacobian = "jacobian",
        Linear = "linear",
    }
}

/// What to measure, on what.
#[derive(Clone, Debug)]
pub struct Request {
    /// A run, a checkpoint, or any Hugging Face LLaMA folder.
    pub model: PathBuf,
    /// Text, shards, or `bundled:austen`; read one after the other.
    pub data: Vec<String>,
    /// The JSON field of .jsonl files that holds the text.
    pub field: String,
    /// Tokens to predict at most, from the beginning; 0: all.
    pub tokens: u64,
    /// Tokens in a window; the model's longest sequence by default, at most 2048.
    pub sequence: Option<usize>,
    /// Windows at one time, at most.
    pub batch: usize,
    pub measures: Vec<Measure>,
    /// Tokens whose Jacobians are taken.
    pub jacobian_tokens: usize,
    /// They stand among the first so many of their windows.
    pub jacobian_context: usize,
    pub task: Option<TaskRequest>,
    pub device: DeviceKind,
    /// f32 on the CPU and bf16 elsewhere by default.
    pub dtype: Option<Dtype>,
}

/// Sizes, all checked.
pub(super) struct Setup {
    pub layers: usize,
    pub hidden: usize,
    pub sequence: usize,
    /// Windows at one time.
    pub batch: usize,
    pub batches: u64,
    /// Tokens in all windows.
    pub predicted: u64,
    pub variance: bool,
    pub angular: bool,
    pub skipped: bool,
    pub gradient: bool,
    pub linear: bool,
    /// None: 0.
    pub jacobian_tokens: usize,
    pub jacobian_context: usize,
    pub jacobian_rows: usize,
}

impl Setup {
    pub fn new(request: &Request, model: &LoadedModel, text: &TokenSource) -> Result<Self> {
        let asked = |measure| request.measures.contains(&measure);
        let sequence = window_tokens(request.sequence, request.batch, &model.config)?;
        let windows = Windows::new(text, sequence, request.batch, request.tokens)?;
        let predicted = windows.predicted_tokens();
        let windows = predicted.div_ceil(sequence as u64);
        let linear = asked(Measure::Linear);
        // The affine maps are fitted on every other batch, so there are at least two.
        let largest = if linear { windows.div_ceil(2) } else { windows };
        let batch = (request.batch as u64).min(largest) as usize;
        let (layers, hidden) = (model.config.layers, model.config.hidden);
        let jacobian_context = request.jacobian_context.clamp(1, sequence);
        let setup = Setup {
            layers,
            hidden,
            sequence,
            batch,
            batches: windows.div_ceil(batch as u64),
            predicted,
            variance: asked(Measure::Variance),
            angular: asked(Measure::Angular),
            skipped: asked(Measure::Skipped),
            gradient: asked(Measure::Gradient),
            linear,
            jacobian_tokens: if asked(Measure::Jacobian) { request.jacobian_tokens } else { 0 },
            jacobian_context,
            jacobian_rows: jacobian::rows_at_once(hidden, batch * sequence, jacobian_context),
        };
        setup.check_linear()?;
        Ok(setup)
    }

    /// Whether the affine maps are fitted on a batch; the others judge them.
    pub fn fits(batch: u64) -> bool {
        batch.is_multiple_of(2)
    }

    /// An affine map has (C + 1) C numbers; twice as many are to decide them.
    fn check_linear(&self) -> Result<()> {
        let in_batch = (self.batch * self.sequence) as u64;
        let starts = (0..self.batches).filter(|&batch| Setup::fits(batch)).map(|i| i * in_batch);
        let fitted: u64 = starts.map(|start| in_batch.min(self.predicted - start)).sum();
        let needed = 2 * (self.hidden as u64 + 1);
        if !self.linear || (self.batches > 1 && fitted >= needed) {
            return Ok(());
        }
        Err(Error::Usage {
            what: format!(
                "affine maps of {} features would be fitted on {fitted} of {} tokens in {} \
                 windows; they need {needed}, and another window",
                self.hidden,
                self.predicted,
                self.predicted.div_ceil(self.sequence as u64)
            ),
            remedy:
                "give more --data or --tokens, or a smaller --sequence, or leave linear out of \
                     --measure"
                    .to_string(),
        })
    }

    /// Work in passes of one block over a batch, for [`Progress`].
    pub fn work(&self) -> u64 {
        let l = self.layers as u64;
        let changed = l * (l - 1) / 2;
        let first = l + self.skipped_work() + self.gradient_work();
        let second = if self.linear { self.batches / 2 * (l + changed) + l } else { 0 };
        self.batches * first + self.jacobian_tokens as u64 * l * self.jacobian_work() + second
    }

    pub fn skipped_work(&self) -> u64 {
        let l = self.layers as u64;
        if self.skipped { l * (l - 1) / 2 } else { 0 }
    }

    /// Forward again, and backward.
    pub fn gradient_work(&self) -> u64 {
        if self.gradient { 3 * self.layers as u64 } else { 0 }
    }

    /// Of one Jacobian.
    pub fn jacobian_work(&self) -> u64 {
        let rounds = self.hidden.div_ceil(self.jacobian_rows);
        let tokens = rounds * self.jacobian_rows * self.jacobian_context;
        (3 * tokens).div_ceil(self.batch * self.sequence) as u64
    }
}

/// How far the work is.
pub(super) struct Progress<F> {
    pub done: u64,
    pub of: u64,
    pub report: F,
}

impl<F: FnMut(u64, u64)> Progress<F> {
    pub fn advance(&mut self, work: u64) {
        self.done += work;
        (self.report)(self.done.min(self.of), self.of);
    }
}

//! `isobath eval`: the arguments of an evaluation.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use isobath::config::DeviceKind;

use super::model::ModelArgs;

#[derive(Args, Debug)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text or shards to predict: a file, a folder of shards, or bundled:austen; may be repeated
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// Tokens in a window [default: as in training, or else the model's longest]
    #[arg(long, value_name = "TOKENS")]
    sequence: Option<NonZeroUsize>,
    /// Windows at once
    #[arg(long, value_name = "ROWS", default_value = "8")]
    batch: NonZeroUsize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `eval` was asked for. That `sequence` fits the model is known when the model is open.
#[derive(Clone, PartialEq, Debug)]
pub struct EvalRequest {
    pub model: PathBuf,
    pub device: DeviceKind,
    pub data: Vec<String>,
    pub sequence: Option<usize>,
    pub batch: usize,
    pub json: bool,
}

impl EvalArgs {
    /// Cannot fail: clap's types have refused what is wrong.
    pub fn validate(self) -> EvalRequest {
        EvalRequest {
            model: self.model.model,
            device: self.model.device,
            data: self.data,
            sequence: self.sequence.map(usize::from),
            batch: self.batch.into(),
            json: self.json,
        }
    }
}

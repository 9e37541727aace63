//! `isobath eval`: the arguments of an evaluation.

use std::num::NonZeroUsize;

use clap::Args;
use isobath::evaluate::Request;

use super::model::ModelArgs;

#[derive(Args, Debug)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text or shards to predict: a file, a folder of shards, or bundled:austen
    #[arg(long, value_name = "FILE")]
    data: String,
    /// JSON field of .jsonl files that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Tokens in a window [default: the model's longest sequence, at most 2048]
    #[arg(long, value_name = "TOKENS")]
    sequence: Option<NonZeroUsize>,
    /// Windows at once
    #[arg(long, value_name = "ROWS", default_value = "8")]
    batch: NonZeroUsize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl EvalArgs {
    /// What to evaluate. That `sequence` fits the model is known when the model is open.
    pub fn request(&self) -> Request {
        Request {
            model: self.model.model.clone(),
            data: self.data.clone(),
            field: self.field.clone(),
            sequence: self.sequence.map(usize::from),
            batch: self.batch.into(),
            device: self.model.device,
        }
    }
}

//! `isobath eval`: the loss of a model on a text.

use std::num::NonZeroUsize;

use clap::Args;
use indicatif::ProgressBar;
use isobath::evaluate::{Request, evaluate};

use super::model::ModelArgs;
use super::output;

#[derive(Args, Debug)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text or shards to predict: a file, a folder of shards, or bundled:austen; may be repeated
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// JSON field of .jsonl files that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Tokens in a window [default: the model's longest, at most 2048]
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
    /// Cannot fail: clap's types have refused what is wrong.
    fn request(self) -> Request {
        Request {
            model: self.model.model,
            data: self.data,
            field: self.field,
            sequence: self.sequence.map(usize::from),
            batch: self.batch.into(),
            device: self.model.device,
            dtype: self.model.dtype,
        }
    }
}

pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    let json = args.json;
    let bar = ProgressBar::new(0); // hidden where stderr is no terminal
    let report = evaluate(&args.request(), |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    if json {
        return output::print_json(&report);
    }
    output::print(&format!(
        "loss           {:.6}\nperplexity     {:.4}\nbits per byte  {:.4}\n\
         tokens         {} predicted, {} bytes of text, windows of {}\n",
        report.loss,
        report.perplexity,
        report.bits_per_byte,
        report.tokens,
        report.text_bytes,
        report.sequence
    ))
}

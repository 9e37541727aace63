//! The loss of a model on a text: exact mean over every token but the first, each predicted once.
//!
//! The text is read in consecutive, non-overlapping windows of `sequence` input tokens without a
//! start token; the last, shorter one is included. A document ends with the end-of-text token, if
//! the tokenizer has one, and that is predicted, too.

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use tempfile::TempDir;

use crate::config::{
    Attention, DataConfig, DeviceKind, Dtype, Format, ModelConfig, Rows as RowKind,
};
use crate::data::corpus::Corpus;
use crate::data::source::TokenSource;
use crate::data::windows::Windows;
use crate::device::{Device, on_device};
use crate::engine::{Evaluator, Rows};
use crate::error::{Error, Result};
use crate::hf;
use crate::loaded::LoadedModel;
use crate::metrics::Evaluation;

/// Longest window by default.
const LONGEST_WINDOW: usize = 2048;

/// Tokens at one time; positions are counted in i32.
const MOST_TOKENS: usize = i32::MAX as usize;

/// What to evaluate, on what.
#[derive(Clone, Debug)]
pub struct Request {
    /// A run, a checkpoint, or any Hugging Face LLaMA folder.
    pub model: PathBuf,
    /// Text, shards, or `bundled:austen`; read one after the other.
    pub data: Vec<String>,
    /// The JSON field of .jsonl files that holds the text.
    pub field: String,
    /// Tokens in a window; the model's longest sequence by default, at most 2048.
    pub sequence: Option<usize>,
    /// Windows at one time.
    pub batch: usize,
    pub device: DeviceKind,
    /// f32 on the CPU and bf16 elsewhere by default.
    pub dtype: Option<Dtype>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Report {
    /// The folder that was read.
    pub model: PathBuf,
    pub data: Vec<String>,
    pub loss: f64,
    pub perplexity: f64,
    pub bits_per_byte: f64,
    /// Predicted tokens.
    pub tokens: u64,
    pub text_bytes: u64,
    pub sequence: usize,
    pub tokens_per_second: f64,
}

/// Reads the model and the text, and computes the loss; `progress` sees (batches done, of).
pub fn evaluate(request: &Request, progress: impl FnMut(u64, u64)) -> Result<Report> {
    let model = LoadedModel::open(&request.model)?;
    let text = Text::open(&model, &request.data, &request.field)?;
    let device = Device::choose(request.device)?;
    let dtype = device.computes_in(request.dtype)?;
    let tokens = &text.tokens;
    on_device!(device, dtype, |backend| evaluate_on(backend, request, &model, tokens, progress))
}

/// A text in a model's own tokens.
pub(crate) struct Text {
    pub tokens: TokenSource,
    /// Shards of a text too large for memory, gone with it.
    _cache: TempDir,
}

impl Text {
    /// `data`, `field`: as in [`Request`].
    pub fn open(model: &LoadedModel, data: &[String], field: &str) -> Result<Self> {
        let data = DataConfig {
            train: data.to_vec(),
            valid: Vec::new(),
            held_out: 0.0,
            tokenizer: model.folder.join(hf::TOKENIZER).to_string_lossy().into_owned(),
            format: Format::Text,
            field: field.to_string(),
            rows: RowKind::Packed,
            attention: Attention::Row,
            sequence: 1,
        };
        let cache = tempfile::tempdir().map_err(Error::io("create", std::env::temp_dir()))?;
        let corpus = Corpus::open(&data, cache.path(), true)?;
        Ok(Text { tokens: corpus.train, _cache: cache })
    }
}

/// Tokens in a window, for `batch` windows at one time. Errors: more than the model reads, or than
/// a device counts.
pub(crate) fn window_tokens(
    asked: Option<usize>,
    batch: usize,
    config: &ModelConfig,
) -> Result<usize> {
    let sequence = asked.unwrap_or(config.max_sequence.min(LONGEST_WINDOW));
    if sequence > config.max_sequence {
        return Err(Error::Usage {
            what: format!(
                "windows of {sequence} tokens; the model reads at most {}",
                config.max_sequence
            ),
            remedy: "give a smaller --sequence".to_string(),
        });
    }
    if batch.checked_mul(sequence).is_none_or(|tokens| tokens > MOST_TOKENS) {
        return Err(Error::Usage {
            what: format!("{batch} windows of {sequence} tokens at once"),
            remedy: format!("give a smaller --batch: at most {MOST_TOKENS} tokens together"),
        });
    }
    Ok(sequence)
}

fn evaluate_on<B: crate::backend::Backend>(
    backend: B,
    request: &Request,
    model: &LoadedModel,
    text: &TokenSource,
    mut progress: impl FnMut(u64, u64),
) -> Result<Report> {
    let sequence = window_tokens(request.sequence, request.batch, &model.config)?;
    let windows = Windows::new(text, sequence, request.batch, 0)?;
    let LoadedModel { config, table, parameters, .. } = model;
    let size = [request.batch, sequence];
    let mut evaluator = Evaluator::new(config, table, parameters, size, backend)?;
    let (started, batches) = (Instant::now(), windows.batches());
    let (mut sum, mut tokens) = (0.0, 0);
    for (done, batch) in windows.enumerate() {
        let batch = batch?;
        let rows = Rows::new(&batch.tokens, &batch.targets);
        let (losses, predicted) = evaluator.evaluate(rows)?;
        sum += losses;
        tokens += predicted;
        progress(done as u64 + 1, batches);
    }
    let Evaluation { val_loss, val_perplexity, val_bits_per_byte, .. } =
        Evaluation::new(sum, tokens, text.text_bytes());
    Ok(Report {
        model: model.folder.clone(),
        data: request.data.clone(),
        loss: val_loss,
        perplexity: val_perplexity,
        bits_per_byte: val_bits_per_byte,
        tokens,
        text_bytes: text.text_bytes(),
        sequence,
        tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
    })
}

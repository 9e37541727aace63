//! The lines of metrics.jsonl, the one record of a run that everything else derives from, and of
//! its two companions; how they are read back, and what more than one place derives from them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::version::Program;

/// One optimizer step.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct StepRecord {
    /// From 1.
    pub step: u64,
    /// Positions trained on so far, padding included.
    pub tokens: u64,
    /// Mean over the predicted tokens of the step, in nats.
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    /// Of this step, data loading and update included.
    pub tokens_per_second: f64,
    /// Share of the device's dense peak; `null` where the peak is not known.
    pub mfu: Option<f64>,
    /// Only on the steps that were followed by an evaluation.
    #[serde(flatten)]
    pub evaluation: Option<Evaluation>,
}

/// The loss on held-out text.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Evaluation {
    /// Exact mean over all predicted tokens, in nats.
    pub val_loss: f64,
    pub val_perplexity: f64,
    /// Sum of the losses in bits over the bytes of the text.
    pub val_bits_per_byte: f64,
    pub val_tokens: u64,
}

impl Evaluation {
    /// `loss_sum` in nats over `tokens` predictions of `text_bytes` bytes.
    pub fn new(loss_sum: f64, tokens: u64, text_bytes: u64) -> Self {
        let val_loss = loss_sum / tokens as f64;
        Evaluation {
            val_loss,
            val_perplexity: val_loss.exp(),
            val_bits_per_byte: loss_sum / std::f64::consts::LN_2 / text_bytes as f64,
            val_tokens: tokens,
        }
    }
}

/// One sample, a line of samples.jsonl.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SampleRecord {
    pub step: u64,
    pub prompt: String,
    pub text: String,
}

/// One process that trained the run, a line of sessions.jsonl: a run that was resumed has several.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SessionRecord {
    /// Steps done when it began.
    pub step: u64,
    /// UTC, RFC 3339, such as "2026-11-28T22:14:03Z".
    pub started: String,
    /// Where it computed: "cpu", "NVIDIA H200", "simt (CPU)".
    pub machine: String,
    #[serde(flatten)]
    pub program: Program,
}

impl SessionRecord {
    /// Of this process, now.
    pub fn new(step: u64, machine: String) -> Self {
        let now = Timestamp::now();
        SessionRecord {
            step,
            started: Timestamp::from_second(now.as_second()).unwrap_or(now).to_string(),
            machine,
            program: Program::this(),
        }
    }
}

/// The training loss that a run is said to have ended at: the mean over the last 2% of its steps,
/// of which there is at least one.
pub fn final_loss(steps: &[StepRecord]) -> f64 {
    let last = &steps[steps.len() - steps.len().div_ceil(50)..];
    last.iter().map(|step| step.loss).sum::<f64>() / last.len() as f64
}

/// Seconds of training up to the end of each step, evaluations left out: the sum of tokens over
/// tokens per second.
pub fn training_seconds(steps: &[StepRecord]) -> Vec<f64> {
    let mut sum = 0.0;
    let mut tokens = 0;
    let mut up_to = |step: &StepRecord| {
        let these = step.tokens.saturating_sub(tokens) as f64;
        tokens = step.tokens;
        if step.tokens_per_second > 0.0 {
            sum += these / step.tokens_per_second;
        }
        sum
    };
    steps.iter().map(&mut up_to).collect()
}

/// A file of records, one per line.
pub struct Lines<T> {
    pub records: Vec<T>,
    /// Whether the last line was not written to its end.
    pub torn: bool,
}

/// Reads a file of records. A last line without its end is no error, and left out.
///
/// Errors: a line that is no record, by its number.
pub fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Lines<T>> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io("open", path))?);
    let (mut records, mut line, mut number) = (Vec::new(), Vec::new(), 0);
    loop {
        line.clear();
        number += 1;
        if file.read_until(b'\n', &mut line).map_err(Error::io("read", path))? == 0 {
            return Ok(Lines { records, torn: false });
        }
        let whole = line.ends_with(b"\n");
        match serde_json::from_slice(&line) {
            Ok(record) => records.push(record),
            Err(_) if !whole => return Ok(Lines { records, torn: true }),
            Err(_) if line.trim_ascii().is_empty() => {}
            Err(error) => {
                return Err(Error::Data {
                    path: path.to_path_buf(),
                    what: format!("line {number} is no record of this program: {error}"),
                    remedy: "correct or remove the line".into(),
                });
            }
        }
    }
}

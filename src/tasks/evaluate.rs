//! Scores a model on disk on a task on disk.

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;

use super::HARNESS;
use super::file::Task;
use super::prompt::Prompts;
use super::question::Style;
use super::score::{Score, score};
use crate::backend::Backend;
use crate::config::{DeviceKind, Dtype};
use crate::device::{Device, on_device};
use crate::engine::Evaluator;
use crate::error::{Error, Result};
use crate::loaded::LoadedModel;

/// What to ask whom.
#[derive(Clone, Debug)]
pub struct Request {
    /// A run, a checkpoint, or any Hugging Face LLaMA folder.
    pub model: PathBuf,
    /// A .jsonl or .csv file, or a folder of them.
    pub task: PathBuf,
    /// The task's own by default.
    pub style: Option<Style>,
    /// Examples before each question.
    pub shots: usize,
    /// Where the examples come from; beside the task, or its own first questions by default.
    pub shots_from: Option<PathBuf>,
    /// Tokens that the model reads at most; its longest sequence by default.
    pub window: Option<usize>,
    /// Rows at one time; at least one.
    pub batch: usize,
    pub device: DeviceKind,
    /// f32 on the CPU and bf16 elsewhere by default.
    pub dtype: Option<Dtype>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Report {
    /// The folder that was read.
    pub model: PathBuf,
    pub task: PathBuf,
    pub style: Style,
    pub shots: usize,
    /// The version of lm-evaluation-harness whose definitions these are.
    pub harness: &'static str,
    #[serde(flatten)]
    pub score: Score,
    /// Tokens that the model read at most.
    pub window: usize,
    /// Questions that lost tokens on their left because they were longer.
    pub truncated: usize,
    /// Tokens that the model read, without padding.
    pub tokens: u64,
    pub tokens_per_second: f64,
}

/// Reads the task and the model, and scores it; `progress` sees (rows done, of).
pub fn evaluate(request: &Request, progress: impl FnMut(u64, u64)) -> Result<Report> {
    let mut task = Task::open(&request.task)?;
    if let Some(examples) = &request.shots_from {
        task = task.with_examples_from(examples)?;
    }
    let model = LoadedModel::open(&request.model)?;
    let longest = model.config.max_sequence;
    let window = request.window.unwrap_or(longest);
    if window > longest {
        return Err(Error::Usage {
            what: format!("windows of {window} tokens; the model reads at most {longest}"),
            remedy: "give a smaller --sequence".to_string(),
        });
    }
    let Request { style, shots, .. } = *request;
    let prompts = Prompts::new(&task, &model.tokenizer, style, shots, window)?;
    let device = Device::choose(request.device)?;
    let dtype = device.computes_in(request.dtype)?;
    let started = Instant::now();
    let batch = request.batch;
    let score =
        on_device!(device, dtype, |backend| score_on(backend, &model, &prompts, batch, progress))?;
    let tokens = prompts.candidates().map(|candidate| candidate.tokens.len() as u64 - 1).sum();
    Ok(Report {
        model: model.folder,
        task: prompts.path,
        style: prompts.style,
        shots,
        harness: HARNESS,
        score,
        window,
        truncated: prompts.truncated,
        tokens,
        tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
    })
}

fn score_on<B: Backend>(
    backend: B,
    model: &LoadedModel,
    prompts: &Prompts,
    batch: usize,
    progress: impl FnMut(u64, u64),
) -> Result<Score> {
    let LoadedModel { config, table, parameters, .. } = model;
    let size = [batch, prompts.sequence()];
    let mut evaluator = Evaluator::new(config, table, parameters, size, backend)?;
    score(prompts, batch, &mut |rows| evaluator.losses(rows).map(<[f32]>::to_vec), progress)
}

//! What a comparison found: final losses with their spread over seeds, and differences by seed.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Variant;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::metrics::{StepRecord, final_loss, training_seconds};
use crate::rundir::METRICS;

/// One trained run.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct RunResult {
    pub folder: PathBuf,
    pub seed: u64,
    /// Steps done; fewer than asked where it diverged.
    pub step: u64,
    /// Whether the loss or the gradient stopped being finite, or the evaluation is not.
    pub diverged: bool,
    pub tokens: u64,
    /// See [`final_loss`]; `None` where the first step diverged.
    pub train_loss: Option<f64>,
    /// Of the last step; `None` where it was not reached.
    pub val_loss: Option<f64>,
    pub val_perplexity: Option<f64>,
    pub val_bits_per_byte: Option<f64>,
    /// All steps' seconds, evaluations left out.
    pub seconds: f64,
}

impl RunResult {
    /// Errors: a run without metrics.
    pub(super) fn new(
        config: &Config,
        folder: &Path,
        steps: &[StepRecord],
        diverged: bool,
    ) -> Result<Self> {
        let last = steps.last();
        if last.is_none() && !diverged {
            return Err(Error::Data {
                path: folder.join(METRICS),
                what: "has no step".to_string(),
                remedy: "remove the run and compare again".to_string(),
            });
        }
        let step = last.map_or(0, |last| last.step);
        let holds_out = config.data.held_out > 0.0 || !config.data.valid.is_empty();
        let evaluation = last.and_then(|last| last.evaluation);
        let lacks_evaluation = step == config.train.steps && evaluation.is_none();
        let diverged = diverged || holds_out && lacks_evaluation;
        let evaluation = evaluation.filter(|_| !diverged);
        Ok(RunResult {
            folder: folder.to_path_buf(),
            seed: config.seed,
            step,
            diverged,
            tokens: last.map_or(0, |last| last.tokens),
            train_loss: last.map(|_| final_loss(steps)),
            val_loss: evaluation.map(|it| it.val_loss),
            val_perplexity: evaluation.map(|it| it.val_perplexity),
            val_bits_per_byte: evaluation.map(|it| it.val_bits_per_byte),
            seconds: training_seconds(steps).last().copied().unwrap_or(0.0),
        })
    }
}

/// Over seeds.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Spread {
    pub mean: f64,
    /// Sample standard deviation, n - 1 in the denominator; `None` with one run.
    pub std: Option<f64>,
}

impl Spread {
    /// `None` without values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let std = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
        Some(Spread { mean, std })
    }
}

/// Shown with four digits.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.std {
            None => format!("{:.4}", self.mean),
            Some(std) => format!("{:.4} ± {std:.4}", self.mean),
        };
        f.pad(&text)
    }
}

/// One variant, over its seeds; spreads are over the runs that did not diverge.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct VariantResult {
    pub name: String,
    pub sets: Vec<String>,
    pub diverged: usize,
    pub train_loss: Option<Spread>,
    pub val_loss: Option<Spread>,
    /// exp of each run's loss, averaged.
    pub val_perplexity: Option<Spread>,
    pub val_bits_per_byte: Option<Spread>,
    /// Of `val_loss`, against the first variant's run of the same seed.
    pub against_first: Option<Spread>,
    pub runs: Vec<RunResult>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Comparison {
    pub variants: Vec<VariantResult>,
}

impl Comparison {
    /// `results`: index of the variant, and the run.
    pub(super) fn new(variants: &[Variant], results: Vec<(usize, RunResult)>) -> Self {
        let runs_of = |at: usize| -> Vec<RunResult> {
            results.iter().filter(|result| result.0 == at).map(|result| result.1.clone()).collect()
        };
        let first = runs_of(0);
        let variants = variants.iter().enumerate().map(|(at, variant)| {
            let runs = runs_of(at);
            let spread = |of: fn(&RunResult) -> Option<f64>| {
                Spread::of(&runs.iter().filter_map(of).collect::<Vec<_>>())
            };
            let differences: Vec<f64> = runs
                .iter()
                .filter_map(|run| {
                    let other = first.iter().find(|first| first.seed == run.seed)?;
                    Some(run.val_loss? - other.val_loss?)
                })
                .collect();
            VariantResult {
                name: variant.name.clone(),
                sets: variant.sets.clone(),
                diverged: runs.iter().filter(|run| run.diverged).count(),
                train_loss: spread(|run| run.train_loss.filter(|_| !run.diverged)),
                val_loss: spread(|run| run.val_loss),
                val_perplexity: spread(|run| run.val_perplexity),
                val_bits_per_byte: spread(|run| run.val_bits_per_byte),
                against_first: if at == 0 { None } else { Spread::of(&differences) },
                runs,
            }
        });
        Comparison { variants: variants.collect() }
    }
}

/// The table that people read.
impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.variants.iter().map(|it| it.name.len()).max().unwrap_or(0).max(7);
        writeln!(
            f,
            "{:<name$} {:>5} {:>18} {:>18} {:>20} {:>18} {:>18}",
            "variant", "runs", "train loss", "val loss", "perplexity", "bits per byte", "vs first"
        )?;
        for variant in &self.variants {
            let shown = |spread: Option<Spread>| {
                spread.map_or_else(|| "-".to_string(), |spread| spread.to_string())
            };
            write!(
                f,
                "{:<name$} {:>5} {:>18} {:>18} {:>20} {:>18} {:>18}",
                variant.name,
                variant.runs.len(),
                shown(variant.train_loss),
                shown(variant.val_loss),
                shown(variant.val_perplexity),
                shown(variant.val_bits_per_byte),
                shown(variant.against_first),
            )?;
            match variant.diverged {
                0 => writeln!(f)?,
                diverged => writeln!(f, "  {diverged} diverged")?,
            }
        }
        writeln!(
            f,
            "means over seeds ± sample standard deviation; vs first: of the val loss, seed by seed"
        )
    }
}

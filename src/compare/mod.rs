//! Several variants of one configuration, trained on the same data in the same order from the same
//! seeds, and what came of each.
//!
//! ```text
//! base config + variant + seed -> OUT/VARIANT-seedS, a run like any other -> table, compare.json
//! ```
//!
//! Every run is resumable: what is complete is only read, what was interrupted goes on. A run whose
//! loss stops being finite is a result, not an error: it is recorded with its step.

mod table;
mod variant;

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

pub use table::{Comparison, RunResult, Spread, VariantResult};
pub use variant::Variant;

use crate::config::Config;
use crate::durable::replace;
use crate::error::{Error, Result};
use crate::metrics::{Lines, StepRecord, read_lines};
use crate::rundir::{CONFIG, METRICS, checkpoint_steps};
use crate::train::{Console, Interrupt, Run, train};

/// In the folder of a comparison.
pub const COMPARISON: &str = "compare.json";
/// In the folder of a run that ended with a loss or gradient that was not finite.
const DIVERGED: &str = "diverged.json";
const MOST_SEEDS: u64 = 1000;

/// What to compare.
#[derive(Clone, Debug)]
pub struct Request {
    /// What all variants have in common.
    pub base: Config,
    /// The first is what the others are compared with.
    pub variants: Vec<Variant>,
    /// Runs of each variant; seeds count up from the base's.
    pub seeds: u64,
    /// One folder for all runs.
    pub folder: PathBuf,
}

/// A run of a comparison before it is trained.
#[derive(Clone, Debug)]
struct Planned {
    variant: usize,
    config: Config,
    folder: PathBuf,
}

/// Trains what is not trained yet, variant by variant within a seed, so that an interrupted
/// comparison has whole seeds; `None` if `interrupt` asked to stop.
///
/// Errors: those of training; a folder that holds a run of another configuration.
pub fn compare(
    request: &Request,
    interrupt: Interrupt,
    console: &mut Console,
) -> Result<Option<Comparison>> {
    let planned = plan(request)?;
    let mut results = Vec::new();
    for (at, run) in planned.iter().enumerate() {
        let name = &run.config.name;
        console.say(format!("run {} of {}: {name}", at + 1, planned.len()));
        match outcome(run, interrupt, console)? {
            Some(result) => results.push((run.variant, result)),
            None => return Ok(None),
        }
    }
    let comparison = Comparison::new(&request.variants, results);
    let text = serde_json::to_vec_pretty(&comparison).map_err(|error| Error::Internal {
        what: format!("the comparison cannot be written as JSON: {error}"),
        remedy: "report this: it is a defect".to_string(),
    })?;
    replace(&request.folder.join(COMPARISON), &text)?;
    Ok(Some(comparison))
}

/// Every run, checked before the first one is trained.
fn plan(request: &Request) -> Result<Vec<Planned>> {
    let Request { base, variants, seeds, folder } = request;
    if *seeds == 0 {
        let what = "0 seeds: nothing to train".to_string();
        return Err(Error::Usage { what, remedy: "give --seeds 1 or more".to_string() });
    }
    variant::check_names(variants)?;
    if base.train.init_from.is_some() {
        return Err(Error::Usage {
            what:
                "train.init_from: a folder to start from decides placement and first values, which \
                   is what variants differ in"
                    .to_string(),
            remedy: "leave it out, or start single runs with `isobath train --init`".to_string(),
        });
    }
    let end = base.seed.checked_add(*seeds).filter(|_| *seeds <= MOST_SEEDS);
    let Some(end) = end else {
        return Err(Error::Usage {
            what: format!("{seeds} seeds from {} on", base.seed),
            remedy: format!("give --seeds {MOST_SEEDS} or fewer, and a smaller seed"),
        });
    };
    let mut planned = Vec::new();
    for seed in base.seed..end {
        for (at, variant) in variants.iter().enumerate() {
            let mut config = variant.apply(base)?;
            config.seed = seed;
            config.name = format!("{}-seed{seed}", variant.name);
            config.validate()?;
            let folder = folder.join(&config.name);
            planned.push(Planned { variant: at, config, folder });
        }
    }
    planned.iter().try_for_each(check_folder)?;
    Ok(planned)
}

/// Refuses a folder that holds a run of another configuration.
fn check_folder(run: &Planned) -> Result<()> {
    let path = run.folder.join(CONFIG);
    if !path.exists() {
        return Ok(());
    }
    let mut saved = Config::resolve(None, Some(&path), &[])?;
    // What training resolves from its input, and what does not change the result.
    if run.config.model.vocab == 0 {
        saved.model.vocab = 0;
    }
    if run.config.train.epochs > 0.0 {
        saved.train.steps = run.config.train.steps;
    }
    saved.device = run.config.device;
    if saved == run.config {
        return Ok(());
    }
    let differs = first_difference(&saved, &run.config);
    Err(Error::Usage {
        what: format!("{} holds a run of another configuration: {differs}", run.folder.display()),
        remedy: "choose another folder with --out, or remove that run".to_string(),
    })
}

/// "optimizer.lr is 0.004 there and 0.008 now"
fn first_difference(saved: &Config, now: &Config) -> String {
    let table = |config: &Config| serde_json::to_value(config).unwrap_or_default();
    let (saved, now) = (table(saved), table(now));
    let told = |key: String, before: &Value, value: &Value| {
        (before != value).then(|| format!("{key} is {before} there and {value} now"))
    };
    let of_key = |(key, value): (&String, &Value)| match value.as_object() {
        None => told(key.clone(), &saved[key], value),
        Some(inner) => inner
            .iter()
            .find_map(|(name, value)| told(format!("{key}.{name}"), &saved[key][name], value)),
    };
    let first = now.as_object().into_iter().flatten().find_map(of_key);
    first.unwrap_or_else(|| "it has other keys".to_string())
}

/// Trains a run to its end, unless it is there already; `None` if it was interrupted.
fn outcome(
    run: &Planned,
    interrupt: Interrupt,
    console: &mut Console,
) -> Result<Option<RunResult>> {
    let Planned { config, folder, .. } = run;
    let diverged = folder.join(DIVERGED);
    let began = folder.join(CONFIG).exists();
    let steps = resolved(run)?.train.steps;
    let done = diverged.exists() || began && is_complete(folder, steps)?;
    if !done {
        let run = Run { config: config.clone(), folder: folder.clone(), resume: began };
        match train(run, interrupt, console) {
            Ok(outcome) if outcome.interrupted => return Ok(None),
            Ok(_) => {}
            Err(Error::NonFinite { what, step, .. }) => {
                console.say(format!("{}: {what} stopped being finite at step {step}", config.name));
                let text = serde_json::to_vec(&Diverged { what, step }).unwrap_or_default();
                replace(&diverged, &text)?;
            }
            Err(other) => return Err(other),
        }
    }
    let steps = read_lines(&folder.join(METRICS))?.records;
    RunResult::new(&resolved(run)?, folder, &steps, diverged.exists()).map(Some)
}

/// The configuration with the steps that training counted where `train.epochs` decides them.
fn resolved(run: &Planned) -> Result<Config> {
    let mut config = run.config.clone();
    let saved = run.folder.join(CONFIG);
    if config.train.epochs > 0.0 && saved.exists() {
        config.train.steps = Config::resolve(None, Some(&saved), &[])?.train.steps;
    }
    Ok(config)
}

#[derive(Serialize)]
struct Diverged {
    what: &'static str,
    step: u64,
}

/// Whether the last step is in a checkpoint and in the metrics, whose last line a crash may have
/// torn: then training goes on, which repairs them.
fn is_complete(folder: &Path, steps: u64) -> Result<bool> {
    let metrics = folder.join(METRICS);
    if checkpoint_steps(folder)?.last() != Some(&steps) || !metrics.exists() {
        return Ok(false);
    }
    let Lines { records, torn } = read_lines::<StepRecord>(&metrics)?;
    Ok(!torn && records.last().is_some_and(|record| record.step == steps))
}

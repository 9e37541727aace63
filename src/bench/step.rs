//! A whole training step, as `isobath train` runs it: micro-batches forward and backward, gradient
//! norm, update. Random tokens; the time between two updates' ends, with all that the host does.

use super::cost::Cost;
use super::report::Row;
use super::sizes::Sizes;
use super::timing::{Timing, between, integers_below, samples};
use crate::config::{Config, Dtype};
use crate::cuda::{self, Cuda, Driver, StreamId};
use crate::engine::{Plan, Rows, Trainer};
use crate::error::{Error, Result};
use crate::model::init::initial_parameters;
use crate::optim;
use crate::plan::{FLOPS_FORMULA, PlanReport};

/// Which training step; `isobath train` takes the same settings.
#[derive(Clone, Default, Debug)]
pub struct StepRequest {
    pub preset: Option<String>,
    /// key=value
    pub sets: Vec<String>,
}

/// Of the machine that a preset is chosen for when nobody names one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Machine {
    Gpu,
    Cpu,
}

/// About 1B parameters with grouped heads, as in the other benchmarks; 16384 tokens.
const ON_GPU: (&str, &[&str]) = (
    "1b",
    &[
        "name=1b-gqa",
        "model.ffn=5632",
        "model.kv_heads=8",
        "model.max_sequence=2048",
        "data.sequence=2048",
        "train.micro_batch=8",
        "train.grad_accumulation=1",
    ],
);
const ON_CPU: (&str, &[&str]) = (
    "9m",
    &[
        "name=tiny",
        "model.hidden=64",
        "model.ffn=176",
        "model.layers=2",
        "model.heads=2",
        "model.kv_heads=1",
        "model.vocab=512",
        "data.sequence=64",
        "train.micro_batch=2",
        "train.grad_accumulation=1",
    ],
);

impl StepRequest {
    /// The configuration, with a vocabulary. `dtype`: stronger than the preset's.
    ///
    /// Errors: an unknown preset or key, a broken rule.
    pub fn resolve(&self, machine: Machine, dtype: Option<Dtype>) -> Result<Config> {
        let (preset, defaults) = match (&self.preset, machine) {
            (Some(preset), _) => (preset.as_str(), &[][..]),
            (None, Machine::Gpu) => ON_GPU,
            (None, Machine::Cpu) => ON_CPU,
        };
        let mut sets: Vec<String> = defaults.iter().map(ToString::to_string).collect();
        sets.extend(dtype.map(|dtype| format!("dtype={dtype}")));
        sets.extend(self.sets.iter().cloned());
        Config::resolve(Some(preset), None, &sets)?.with_vocab()
    }
}

/// Steps before the first that counts: kernels are loaded, buffers touched.
const WARM_UP: u64 = 2;

pub(super) fn row(driver: Box<dyn Driver>, config: &Config, asked: Option<usize>) -> Result<Row> {
    let samples = samples(&*driver, asked) as u64;
    let graphs = cuda::graphs_from_env()?;
    let backend = Cuda::new(driver, config.dtype, None)?.with_graphs(graphs);
    let mut trainer = Trainer::new(Plan::new(config, &backend)?, config, backend)?;
    let parameters = initial_parameters(trainer.table(), config.seed);
    trainer.set_parameters(&parameters)?;
    drop(parameters);

    let (batch, sequence) = (config.train.micro_batch, config.data.sequence);
    let count = config.train.grad_accumulation;
    let tokens = batch * sequence;
    let ids = integers_below(1, config.model.vocab, count * tokens + 1);
    let micro_batches = (0..count).map(|i| {
        let at = i * tokens;
        Rows::new(&ids[at..at + tokens], &ids[at + 1..at + 1 + tokens])
    });
    let mut events = vec![];
    for step in 1..=WARM_UP + samples {
        let outcome = trainer.accumulate(micro_batches.clone())?;
        if !outcome.loss.is_finite() {
            return Err(Error::NonFinite {
                what: "the loss",
                value: outcome.loss,
                step,
                first_row: 0,
                end_row: (count * batch) as u64,
                remedy: "choose a smaller optimizer.lr or model.init_std".to_string(),
            });
        }
        let lr = optim::learning_rate(&config.optimizer, step, config.train.steps.max(step + 1));
        trainer.update(&config.optimizer, step, lr)?;
        if step >= WARM_UP {
            let driver = trainer.device().0.driver();
            let event = driver.new_event()?;
            driver.record(event, StreamId::MAIN)?;
            events.push(event);
        }
    }
    let driver = trainer.device().0.driver();
    let timing = Timing::new(between(driver, &events)?, 1);
    driver.synchronize()?;

    let tokens = config.tokens_per_step();
    let cost = Cost {
        op: "step",
        what: format!("step, {}", config.dtype),
        dtype: config.dtype,
        sizes: Sizes::Step {
            preset: config.name.clone(),
            b: batch,
            s: sequence,
            grad_accumulation: count,
            model: Box::new(config.model.clone()),
            optimizer: Box::new(config.optimizer.clone()),
        },
        bytes: 0,
        bytes_formula: "",
        flops: PlanReport::new(config)?.flops_per_token * tokens,
        flops_formula: FLOPS_FORMULA,
    };
    let tokens_per_second = Some(tokens as f64 / timing.median() * 1e6);
    Ok(Row { tokens_per_second, ..Row::new(cost, &timing) })
}

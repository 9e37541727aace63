//! Which training step is timed or predicted: a preset with settings, or what suits the machine.

use crate::config::{Config, Dtype};
use crate::error::Result;

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

//! A plan for a machine that need not be here: the memory table, the least time of a training step
//! by kernel family, and what each level of recomputation costs and makes room for. All of it is
//! predicted: memory by planning, time as in predict.rs.

use std::fmt;

use serde::Serialize;

use super::predict::Prediction;
use crate::config::{Config, Recompute};
use crate::cuda::peaks::Peaks;
use crate::error::Result;
use crate::plan::{PlanReport, plan_of_gpu};

/// For the driver's context and the kernels' code, which lie in device memory, too. Assumed, not
/// measured.
const RESERVED_BYTES: u64 = 1 << 30;
const RESERVED_SOURCE: &str = "1 GiB for the driver's context and kernels: assumed, not measured";

#[derive(Serialize, Clone, Debug)]
pub struct MachinePlan {
    #[serde(flatten)]
    pub plan: PlanReport,
    /// What a plan may take of the machine's memory.
    pub usable_bytes: u64,
    pub memory_source: &'static str,
    pub reserved_bytes: u64,
    pub reserved_source: &'static str,
    /// Predicted, not measured.
    pub predicted: Prediction,
    /// The one that recomputes least first.
    pub levels: Vec<Level>,
}

/// The same configuration with another `train.recompute`.
#[derive(Serialize, Clone, Debug)]
pub struct Level {
    pub recompute: Recompute,
    /// With the configuration's micro-batch.
    pub activation_bytes: u64,
    pub total_bytes: u64,
    /// Of a training step, under each roof.
    pub milliseconds: Vec<f64>,
    /// Rows of the largest micro-batch that fits; 0: none does.
    pub largest_micro_batch: usize,
}

impl MachinePlan {
    /// Errors: those of [`PlanReport::new`] and of [`Prediction::on`].
    pub fn new(config: &Config, machine: &Peaks) -> Result<Self> {
        let config = &config.with_vocab()?;
        let usable_bytes = machine.memory_bytes - RESERVED_BYTES;
        let levels = Recompute::NAMES.iter().map(|name| {
            let mut config = config.clone();
            config.train.recompute = name.parse()?;
            Level::new(&config, machine, usable_bytes)
        });
        Ok(MachinePlan {
            plan: PlanReport::new(config)?,
            usable_bytes,
            memory_source: machine.memory_source,
            reserved_bytes: RESERVED_BYTES,
            reserved_source: RESERVED_SOURCE,
            predicted: Prediction::on(config, machine)?,
            levels: levels.collect::<Result<_>>()?,
        })
    }
}

impl Level {
    fn new(config: &Config, machine: &Peaks, usable_bytes: u64) -> Result<Self> {
        let memory = plan_of_gpu(config, machine.multiprocessors)?.memory();
        let prediction = Prediction::on(config, machine)?;
        Ok(Level {
            recompute: config.train.recompute,
            activation_bytes: memory.activations,
            total_bytes: memory.total,
            milliseconds: prediction.roofs.iter().map(|roof| roof.milliseconds).collect(),
            largest_micro_batch: largest_micro_batch(config, machine, usable_bytes)?,
        })
    }
}

/// By planning with one micro-batch after the other, and always as many of them in a step.
fn largest_micro_batch(config: &Config, machine: &Peaks, usable_bytes: u64) -> Result<usize> {
    let fits = |micro_batch: usize| -> Result<bool> {
        let mut config = config.clone();
        config.train.micro_batch = micro_batch;
        Ok(plan_of_gpu(&config, machine.multiprocessors)?.memory().total <= usable_bytes)
    };
    let (mut largest, mut too_large) = (0, 1);
    while fits(too_large)? {
        (largest, too_large) = (too_large, 2 * too_large);
    }
    while too_large - largest > 1 {
        let middle = largest.midpoint(too_large);
        if fits(middle)? {
            largest = middle;
        } else {
            too_large = middle;
        }
    }
    Ok(largest)
}

/// The tables that people read.
impl fmt::Display for MachinePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Prediction { machine, micro_batch, sequence, grad_accumulation, roofs, .. } =
            &self.predicted;
        writeln!(f, "{}", self.plan)?;
        writeln!(
            f,
            "the least that a training step of {grad_accumulation} x {micro_batch} x {sequence} \
             tokens takes on one {machine}; predicted, not measured\n"
        )?;
        self.predicted.write_families(f)?;
        writeln!(f)?;
        self.predicted.write_roofs(f)?;
        write!(f, "\n{:<15} {:>15} {:>13}", "train.recompute", "activations MiB", "together MiB")?;
        for roof in roofs {
            write!(f, " {:>13}", format!("ms, {}", roof.name))?;
        }
        writeln!(f, "  largest micro-batch")?;
        let mib = |bytes: u64| bytes as f64 / (1u64 << 20) as f64;
        for level in &self.levels {
            let (activations, total) = (mib(level.activation_bytes), mib(level.total_bytes));
            write!(f, "{:<15} {activations:>15.1} {total:>13.1}", level.recompute)?;
            for milliseconds in &level.milliseconds {
                write!(f, " {milliseconds:>13.2}")?;
            }
            match level.largest_micro_batch {
                0 => writeln!(f, "  not one row fits")?,
                rows => writeln!(f, "  {rows} x {sequence} tokens")?,
            }
        }
        writeln!(
            f,
            "largest micro-batch: in {:.1} MiB of memory ({}; without {})",
            mib(self.usable_bytes),
            self.memory_source,
            self.reserved_source
        )
    }
}

//! A plan for a machine that need not be here: the memory table, the least and the expected time of
//! a training step by kernel family, and what each level of recomputation, and each way to store
//! optimizer state, costs and makes room for. All of it is predicted: memory by planning, time as
//! in mod.rs.

use std::fmt;

use serde::Serialize;

use super::{Estimates, Prediction};
use crate::config::{Config, Dtype, Master, Recompute};
use crate::cuda::Fusions;
use crate::cuda::peaks::Peaks;
use crate::error::Result;
use crate::plan::{PlanReport, plan_of_gpu};

/// For the driver's context, which is there before a run looks at what is free. What the driver
/// takes after that is a row of the plan. Assumed, not measured.
const RESERVED_BYTES: u64 = 512 << 20;
const RESERVED_SOURCE: &str = "512 MiB for the driver's context: assumed, not measured";

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
    /// The widest first; none where activations are f32 and state cannot be in halves.
    pub formats: Vec<StateFormat>,
}

/// The same configuration with another `train.recompute`.
#[derive(Serialize, Clone, Debug)]
pub struct Level {
    pub recompute: Recompute,
    /// With the configuration's micro-batch.
    pub activation_bytes: u64,
    #[serde(flatten)]
    pub fit: Fit,
}

/// The same configuration with another `optimizer.master`, `optimizer.moments` and
/// `optimizer.offload`.
#[derive(Serialize, Clone, Debug)]
pub struct StateFormat {
    pub master: Master,
    pub moments: Dtype,
    pub offload: bool,
    /// Of parameters, their working copy, gradients and moments, on the device.
    pub state_bytes: u64,
    /// In host memory.
    pub host_bytes: u64,
    #[serde(flatten)]
    pub fit: Fit,
}

/// What a configuration takes of a machine.
#[derive(Serialize, Clone, Debug)]
pub struct Fit {
    /// With the configuration's micro-batch.
    pub total_bytes: u64,
    /// Of a training step.
    pub milliseconds: Estimates<f64>,
    /// Rows of the largest micro-batch that fits; 0: none does.
    pub largest_micro_batch: usize,
    /// With that one.
    pub most_tokens_per_second: Option<Estimates<f64>>,
}

impl MachinePlan {
    /// Errors: those of [`PlanReport::new`] and of [`Prediction::on`].
    pub fn new(config: &Config, machine: &Peaks) -> Result<Self> {
        let config = &config.with_vocab()?;
        let usable_bytes = machine.memory_bytes - RESERVED_BYTES;
        let levels = Recompute::ALL.iter().map(|&level| {
            let mut config = config.clone();
            config.train.recompute = level;
            Level::new(&config, machine, usable_bytes)
        });
        let masters = [Master::F32, Master::Split];
        let of_masters = masters.into_iter().flat_map(|it| [(it, Dtype::F32), (it, Dtype::Bf16)]);
        let all = [false, true].map(|offload| of_masters.clone().map(move |it| (offload, it)));
        let all = all.into_iter().flatten().filter(|_| config.dtype == Dtype::Bf16);
        let formats = all.map(|(offload, (master, moments))| {
            let mut config = config.clone();
            let optimizer = &mut config.optimizer;
            (optimizer.offload, optimizer.master, optimizer.moments) = (offload, master, moments);
            StateFormat::new(&config, machine, usable_bytes)
        });
        Ok(MachinePlan {
            plan: PlanReport::new(config)?,
            usable_bytes,
            memory_source: machine.memory_source,
            reserved_bytes: RESERVED_BYTES,
            reserved_source: RESERVED_SOURCE,
            predicted: Prediction::on(config, machine)?,
            levels: levels.collect::<Result<_>>()?,
            formats: formats.collect::<Result<_>>()?,
        })
    }
}

impl Level {
    fn new(config: &Config, machine: &Peaks, usable_bytes: u64) -> Result<Self> {
        Ok(Level {
            recompute: config.train.recompute,
            activation_bytes: plan_of_gpu(config, machine.multiprocessors)?.memory().activations,
            fit: Fit::new(config, machine, usable_bytes)?,
        })
    }
}

impl StateFormat {
    fn new(config: &Config, machine: &Peaks, usable_bytes: u64) -> Result<Self> {
        let memory = plan_of_gpu(config, machine.multiprocessors)?.memory();
        let parameters = memory.parameters + memory.working_copy;
        Ok(StateFormat {
            master: config.optimizer.master,
            moments: config.optimizer.moments,
            offload: config.optimizer.offload,
            state_bytes: parameters + memory.gradients + memory.moments,
            host_bytes: memory.host_moments,
            fit: Fit::new(config, machine, usable_bytes)?,
        })
    }
}

impl Fit {
    fn new(config: &Config, machine: &Peaks, usable_bytes: u64) -> Result<Self> {
        let all = Fusions::default();
        let prediction = Prediction::with(config, machine, &all)?;
        let largest_micro_batch = largest_micro_batch(config, machine, usable_bytes)?;
        let mut most_tokens_per_second = None;
        if largest_micro_batch > 0 {
            let mut config = config.clone();
            config.train.micro_batch = largest_micro_batch;
            let estimates = Prediction::with(&config, machine, &all)?.estimates;
            most_tokens_per_second = Some(estimates.map(|it| it.tokens_per_second));
        }
        Ok(Fit {
            total_bytes: plan_of_gpu(config, machine.multiprocessors)?.memory().total,
            milliseconds: prediction.estimates.map(|it| it.milliseconds),
            largest_micro_batch,
            most_tokens_per_second,
        })
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, sequence: usize) -> fmt::Result {
        write!(f, " {:>13.1}", mib(self.total_bytes))?;
        for (_, milliseconds) in self.milliseconds.iter() {
            write!(f, " {milliseconds:>13.2}")?;
        }
        let Some(most_tokens_per_second) = &self.most_tokens_per_second else {
            return writeln!(f, "  not one row fits");
        };
        write!(f, "  {:<19}", format!("{} x {sequence} tokens", self.largest_micro_batch))?;
        for (_, most) in most_tokens_per_second.iter() {
            write!(f, " {most:>19.0}")?;
        }
        writeln!(f)
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 20) as f64
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
        let Prediction { machine, micro_batch, sequence, grad_accumulation, estimates, .. } =
            &self.predicted;
        writeln!(f, "{}", self.plan)?;
        writeln!(
            f,
            "the least that a training step of {grad_accumulation} x {micro_batch} x {sequence} \
             tokens takes on one {machine}, and what is \
             expected; predicted, not measured\n"
        )?;
        self.predicted.write_families(f)?;
        writeln!(f)?;
        self.predicted.write_estimates(f)?;
        let names = || estimates.iter().map(|(name, _)| name);
        let columns: String =
            names().map(|name| format!(" {:>13}", format!("ms, {name}"))).collect();
        let most: String =
            names().map(|name| format!(" {:>19}", format!("tokens/s, {name}"))).collect();
        let most = format!("{:<19}{most}", "largest micro-batch");
        writeln!(
            f,
            "\n{:<15} {:>15} {:>13}{columns}  {most}",
            "train.recompute", "activations MiB", "together MiB"
        )?;
        for level in &self.levels {
            write!(f, "{:<15} {:>15.1}", level.recompute, mib(level.activation_bytes))?;
            level.fit.write(f, *sequence)?;
        }
        if !self.formats.is_empty() {
            writeln!(
                f,
                "\n{:<17}{:<8}{:<8}{:>17}{:>14}{columns}  {most}",
                "optimizer.master", "moments", "offload", "bytes a parameter", "together MiB"
            )?;
        }
        for format in &self.formats {
            let each = format.state_bytes as f64 / self.plan.stored_elements as f64;
            let [master, moments] = [format.master.name(), format.moments.name()];
            let offload = format.offload;
            write!(f, "{master:<17}{moments:<8}{offload:<8}{each:>17.2}")?;
            format.fit.write(f, *sequence)?;
        }
        writeln!(
            f,
            "largest micro-batch: in {:.1} MiB of memory ({}; without {}); tokens/s: with that one, \
             upper bounds but for what is expected",
            mib(self.usable_bytes),
            self.memory_source,
            self.reserved_source
        )
    }
}

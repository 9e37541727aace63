//! The training loop: the one place where data, model, optimizer, checkpoints and the person in
//! front of the screen meet.
//!
//! ```text
//! config -> corpus -> plan -> buffers -> [ batch -> step -> update -> check ]* -> checkpoint
//! ```
//!
//! A gradient that is not finite updates nothing; it, or such a loss, ends the run with checkpoints
//! as they were. A device that runs asynchronously is given a step while the one before is under
//! way. Equal configurations give equal bits, whether trained in one go or resumed, unless
//! train.deterministic says otherwise.

mod console;
mod interrupt;
mod pace;
mod resolve;
mod session;
mod start;

use std::path::{Path, PathBuf};

pub use console::Console;
pub use interrupt::Interrupt;
pub use resolve::adopt_initial_model;
use session::train_on;

use crate::config::Config;
use crate::cpu::Cpu;
use crate::device::{Device, open_kernels};
use crate::error::Result;
use crate::metrics::{Evaluation, SampleRecord};
use crate::throughput::Throughput;

/// What to train and where.
#[derive(Clone, Debug)]
pub struct Run {
    pub config: Config,
    /// runs/NAME
    pub folder: PathBuf,
    /// Continue the run in `folder`.
    pub resume: bool,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub folder: PathBuf,
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// Steps done.
    pub step: u64,
    pub steps: u64,
    /// Whether a signal ended it before the last step.
    pub interrupted: bool,
    /// Of the last step, if it was reached.
    pub evaluation: Option<Evaluation>,
    /// Of the last step, if it was reached.
    pub sample: Option<SampleRecord>,
    /// Wall time of training, over all processes of this run.
    pub seconds: f64,
    /// Of this process, if it trained more steps than its warm-up.
    pub throughput: Option<Throughput>,
    /// Whether it learnt answers, so that it can be asked.
    pub answers: bool,
}

/// Trains to the last step, or until `interrupt` asks to stop.
///
/// Errors: those of [`Config::validate`]; what the run reads is missing or wrong; a folder that
/// cannot be written; a loss or gradient that is not finite.
pub fn train(mut run: Run, interrupt: Interrupt, console: &mut Console) -> Result<Outcome> {
    if !run.resume {
        adopt_initial_model(&mut run.config)?;
    }
    run.config.validate()?;
    let device = Device::choose(run.config.device)?;
    run.config.validate_on(device.kind())?;
    match device {
        Device::Cpu => train_on(Cpu::<f32>::new(), run, interrupt, console),
        Device::Cuda | Device::Simt => {
            let backend = open_kernels(device.kind(), run.config.dtype)?;
            let backend = backend.with_deterministic(run.config.train.deterministic);
            train_on(backend, run, interrupt, console)
        }
    }
}

/// Where a run goes by default: runs/NAME.
pub fn default_folder(name: &str) -> PathBuf {
    Path::new("runs").join(name)
}

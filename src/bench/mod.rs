//! Times kernels and training steps on a machine, and predicts what they can be at best.
//!
//! Medians between events, cold L2, random normals (timing.rs). What one launch reads and writes,
//! or multiplies, stands beside each figure as a formula (cost.rs), and so does the ceiling: bytes
//! are compared with a copy that was timed in the same run, FLOPs with the machine's dense peak
//! where that is known. On the CPU machine the figures say how fast that is, not how fast a GPU
//! would be.

mod adamw;
mod attention;
mod copy;
pub mod cost;
mod endings;
mod gemm;
mod launched;
mod layers;
mod loss;
mod norm;
mod prediction;
mod product;
mod products;
mod report;
mod sizes;
mod step;
mod step_request;
mod timing;

pub use cost::KernelFamily;
pub use launched::FamilyShare;
pub use prediction::machine_plan::{Fit, Level, MachinePlan, StateFormat};
pub use prediction::shapes::{GemmPrediction, GemmRow};
pub use prediction::{FamilyTime, FusionTime, Kernel, Prediction, Roof};
pub use product::StepProduct;
pub use products::table::{Mean, Speed, TableReport, TableRow, answer, table};
pub use products::tune::{Candidate, TuneReport, TunedProduct, tune};
pub use products::{ProductsRequest, Wanted};
pub use report::{OverPlain, Report, Row, Unit, Work};
pub use sizes::Sizes;
pub use step_request::{Machine, StepRequest};

use crate::config::choice::choice;
use crate::config::{Dtype, NormKind};
use crate::cuda::gemm::Layout;
use crate::cuda::peaks::MatmulPeaks;
use crate::cuda::{Driver, Family, Fusion};
use crate::error::Result;
use crate::version::Program;
use report::TimedRows;

choice! {
    /// What can be timed.
    pub enum Benchmark {
        All = "all",
        Gemm = "gemm",
        Attention = "attention",
        Norm = "norm",
        Loss = "loss",
        Adamw = "adamw",
        Step = "step",
    }
}

/// What to time. `None`: what suits the machine.
#[derive(Clone, Debug)]
pub struct Request {
    pub benchmark: Benchmark,
    /// `None`: bf16; of a step, what its configuration says.
    pub dtype: Option<Dtype>,
    pub samples: Option<usize>,
    pub norm: NormKind,
    /// T of a norm and of a loss.
    pub rows: Option<usize>,
    /// C of a norm.
    pub columns: Option<usize>,
    /// V of a loss.
    pub vocab: Option<usize>,
    /// M, N, K
    pub product: Option<[usize; 3]>,
    /// `None`: every layout that the family has.
    pub layout: Option<Layout>,
    pub family: Option<Family>,
    /// B, S, H, K, D
    pub attention: Option<[usize; 5]>,
    /// N of an update.
    pub elements: Option<usize>,
    pub step: StepRequest,
    /// The step is timed once more without each of these sets of fusions.
    pub without: Vec<Vec<Fusion>>,
}

impl Request {
    /// With everything as it suits the machine.
    pub fn new(benchmark: Benchmark) -> Self {
        Request {
            benchmark,
            dtype: None,
            samples: None,
            norm: NormKind::Rms,
            rows: None,
            columns: None,
            vocab: None,
            product: None,
            layout: None,
            family: None,
            attention: None,
            elements: None,
            step: StepRequest::default(),
            without: vec![],
        }
    }

    fn kernel_dtype(&self) -> Dtype {
        self.dtype.unwrap_or(Dtype::Bf16)
    }

    fn includes(&self, benchmark: Benchmark) -> bool {
        self.benchmark == benchmark || self.benchmark == Benchmark::All
    }
}

/// Runs a benchmark; `open` opens the machine, once more for a training step, which owns its own.
/// `told` gets each row when it has been timed; of a training step first without its kernels.
///
/// Errors: those of the machine and of the launches; sizes that a kernel does not take; settings
/// of a step that are wrong.
pub fn run(
    mut open: impl FnMut() -> Result<Box<dyn Driver>>,
    request: &Request,
    mut told: impl FnMut(&Row),
) -> Result<Report> {
    let mut machine = open()?;
    let driver = &mut *machine;
    let step = if request.includes(Benchmark::Step) {
        let machine = if timing::on_cpu(driver) { Machine::Cpu } else { Machine::Gpu };
        Some(request.step.resolve(machine, request.dtype)?)
    } else {
        None
    };
    let mut table = TimedRows { rows: vec![], told: &mut told };
    type Time = fn(&mut dyn Driver, &Request, &mut TimedRows) -> Result<()>;
    let kernels: [(Benchmark, Time); 5] = [
        (Benchmark::Gemm, gemm::rows),
        (Benchmark::Attention, attention::rows),
        (Benchmark::Norm, norm::rows),
        (Benchmark::Loss, loss::rows),
        (Benchmark::Adamw, adamw::rows),
    ];
    for (benchmark, time) in kernels {
        if request.includes(benchmark) {
            time(driver, request, &mut table)?;
        }
    }
    let counts_bytes = table.rows.iter().any(|row| row.work.unit == Unit::Bytes);
    let copy = if counts_bytes { Some(copy::row(driver, request.samples)?) } else { None };
    if let Some(config) = step {
        step::rows(&mut open, &config, &request.without, request.samples, &mut table)?;
    }
    let mut rows = table.rows;
    let properties = driver.properties().clone();
    let peaks = MatmulPeaks::of(&properties.name);
    rows.iter_mut().for_each(|row| row.compare(copy.as_ref(), peaks));
    let counts_flops = rows.iter().any(|row| row.work.unit == Unit::Flops);
    Ok(Report {
        benchmark: request.benchmark.name(),
        program: Program::this(),
        device: driver.device(),
        machine: properties,
        copy,
        peak_source: peaks.filter(|_| counts_flops).map(|peaks| peaks.source),
        rows,
    })
}

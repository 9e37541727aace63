//! Times kernels and training steps on a machine.
//!
//! Medians between events, cold L2, random normals (timing.rs). What one launch reads and writes,
//! or multiplies, stands beside each figure as a formula (src/predict/cost.rs), and so does the
//! ceiling: bytes are compared with a copy that was timed in the same run, FLOPs with the machine's
//! dense peak where that is known. On the CPU machine the figures say how fast that is, not how
//! fast a GPU would be.

mod adamw;
mod attention;
mod copy;
mod epilogues;
mod gemm;
mod launched;
mod layers;
mod loss;
mod norm;
mod operands;
mod products;
mod report;
mod sizes;
mod step;
mod step_request;
mod timing;

pub use adamw::AdamwRequest;
pub use attention::AttentionRequest;
pub use gemm::GemmRequest;
pub use launched::FamilyShare;
pub use loss::LossRequest;
pub use norm::NormRequest;
pub use products::table::{Mean, Speed, TableReport, TableRow, answer, table};
pub use products::tune::{Candidate, TuneReport, TunedProduct, tune};
pub use products::{ProductsRequest, Wanted};
pub use report::{OverPlain, Report, Row, Unit, Work};
pub use step::TimedStepRequest;
pub use step_request::{Machine, StepRequest};

use crate::config::Dtype;
use crate::cuda::Driver;
use crate::cuda::peaks::MatmulPeaks;
use crate::error::Result;
use crate::version::Program;
use report::TimedRows;

/// One of the things that can be timed, and at which sizes.
#[derive(Clone, Debug)]
pub enum Benchmark {
    Gemm(GemmRequest),
    Attention(AttentionRequest),
    Norm(NormRequest),
    Loss(LossRequest),
    Adamw(AdamwRequest),
    Step(TimedStepRequest),
}

impl Benchmark {
    /// All of them, at the sizes that suit the machine.
    pub fn all(step: StepRequest) -> Vec<Benchmark> {
        vec![
            Benchmark::Gemm(GemmRequest::default()),
            Benchmark::Attention(AttentionRequest::default()),
            Benchmark::Norm(NormRequest::default()),
            Benchmark::Loss(LossRequest::default()),
            Benchmark::Adamw(AdamwRequest::default()),
            Benchmark::Step(TimedStepRequest { step, without: vec![] }),
        ]
    }

    /// As on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Benchmark::Gemm(_) => "gemm",
            Benchmark::Attention(_) => "attention",
            Benchmark::Norm(_) => "norm",
            Benchmark::Loss(_) => "loss",
            Benchmark::Adamw(_) => "adamw",
            Benchmark::Step(_) => "step",
        }
    }
}

/// What to time, one after the other, and how.
#[derive(Clone, Debug)]
pub struct Request {
    pub benchmarks: Vec<Benchmark>,
    pub options: Options,
}

/// `None`: what suits the machine.
#[derive(Clone, Copy, Default, Debug)]
pub struct Options {
    /// `None`: bf16; of a step, what its configuration says.
    pub dtype: Option<Dtype>,
    pub samples: Option<usize>,
}

impl Options {
    fn kernel_dtype(self) -> Dtype {
        self.dtype.unwrap_or(Dtype::Bf16)
    }
}

/// Runs benchmarks; `open` opens the machine, once more for a training step, which owns its own.
/// `told` gets each row when it has been timed; of a training step first without its kernels.
///
/// Errors: those of the machine and of the launches; sizes that a kernel does not take; settings
/// of a step that are wrong, before anything is timed.
pub fn run(
    mut open: impl FnMut() -> Result<Box<dyn Driver>>,
    request: &Request,
    mut told: impl FnMut(&Row),
) -> Result<Report> {
    let Request { benchmarks, options } = request;
    let mut machine = open()?;
    let driver = &mut *machine;
    let kind = if timing::on_cpu(driver) { Machine::Cpu } else { Machine::Gpu };
    let mut steps = vec![];
    for benchmark in benchmarks {
        if let Benchmark::Step(TimedStepRequest { step, without }) = benchmark {
            steps.push((step.resolve(kind, options.dtype)?, without));
        }
    }
    let mut table = TimedRows { rows: vec![], told: &mut told };
    for benchmark in benchmarks {
        match benchmark {
            Benchmark::Gemm(request) => gemm::rows(driver, request, *options, &mut table)?,
            Benchmark::Attention(request) => {
                attention::rows(driver, request, *options, &mut table)?;
            }
            Benchmark::Norm(request) => norm::rows(driver, request, *options, &mut table)?,
            Benchmark::Loss(request) => loss::rows(driver, request, *options, &mut table)?,
            Benchmark::Adamw(request) => adamw::rows(driver, request, *options, &mut table)?,
            // Steps come last: they open the machine anew.
            Benchmark::Step(_) => {}
        }
    }
    let counts_bytes = table.rows.iter().any(|row| row.work.unit == Unit::Bytes);
    let copy = if counts_bytes { Some(copy::row(driver, options.samples)?) } else { None };
    for (config, without) in steps {
        step::rows(&mut open, &config, without, options.samples, &mut table)?;
    }
    let mut rows = table.rows;
    let properties = driver.properties().clone();
    let peaks = MatmulPeaks::of(&properties.name);
    rows.iter_mut().for_each(|row| row.compare(copy.as_ref(), peaks));
    let counts_flops = rows.iter().any(|row| row.work.unit == Unit::Flops);
    Ok(Report {
        benchmark: match benchmarks.as_slice() {
            [one] => one.name(),
            _ => "all",
        },
        program: Program::this(),
        device: driver.device(),
        machine: properties,
        copy,
        peak_source: peaks.filter(|_| counts_flops).map(|peaks| peaks.source),
        rows,
    })
}

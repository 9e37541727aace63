//! `isobath bench`: times kernels, on a GPU or on the CPU machine; there also to debug them.

mod gemm;

use std::fmt::Display;
use std::num::NonZeroUsize;

use clap::{Args, Subcommand};
use isobath::bench::{
    self, AdamwRequest, AttentionRequest, Benchmark, LossRequest, Machine, NormRequest, Options,
    Request, StepRequest, TimedStepRequest,
};
use isobath::config::{DeviceKind, Dtype, NormKind};
use isobath::cuda::host::{self, Asynchronous, Order};
use isobath::cuda::{self, Driver, Family, Fusion};
use isobath::predict::Prediction;
use isobath::{Error, Result};
use serde::Serialize;

use super::output;

/// Without a benchmark: all of them, a training step last.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    benchmark: Option<BenchCommand>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand, Debug)]
enum BenchCommand {
    /// Products in every layout, or every product of the paper's models; their tuner
    Gemm(gemm::GemmArgs),
    /// Causal attention, forward, backward in every way, and both
    Attention(AttentionArgs),
    /// RMSNorm or LayerNorm, forward and backward
    Norm(NormArgs),
    /// Cross-entropy, forward and backward
    Loss(LossArgs),
    /// The gradient norm, and AdamW with its state stored in each way
    Adamw(AdamwArgs),
    /// A whole training step, and the share of each family of kernels
    Step(StepArgs),
}

#[derive(Args, Debug)]
struct AttentionArgs {
    /// Batch, sequence, heads, KV heads, head dim [default: head dims 128 and 64 at 256 to 8192
    /// tokens a row, and two models'; on simt 1,128,4,2,64]
    #[arg(long = "attention", value_name = "B,S,H,K,D", value_parser = sizes::<5>)]
    shape: Option<[usize; 5]>,
    /// Which kernels: sm80, sm90 or f32 [default: the best of this machine]
    #[arg(long)]
    family: Option<Family>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct NormArgs {
    /// rms or layer [default: rms]
    #[arg(long = "norm", value_name = "NORM")]
    kind: Option<NormKind>,
    /// Rows T [default: 16384; on simt 256]
    #[arg(long)]
    rows: Option<NonZeroUsize>,
    /// Columns C [default: 2048; on simt 1024]
    #[arg(long)]
    columns: Option<NonZeroUsize>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct LossArgs {
    /// Rows T [default: 4096; on simt 64]
    #[arg(long)]
    rows: Option<NonZeroUsize>,
    /// Vocabulary V [default: 32000; on simt 2048]
    #[arg(long, value_name = "V")]
    vocab: Option<NonZeroUsize>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct AdamwArgs {
    /// Elements N [default: 2^28; on simt 2^18]
    #[arg(long)]
    elements: Option<NonZeroUsize>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct StepArgs {
    /// Time it once more without these fusions (residual, rotary, swiglu, swiglu-backward,
    /// rotary-backward, joined by commas, or all); may be repeated
    #[arg(long, value_name = "FUSIONS", value_parser = fusions, conflicts_with = "predict")]
    without: Vec<Fusions>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    common: Common,
}

/// Of which model a training step is.
#[derive(Args, Debug)]
struct ModelArgs {
    /// Measure nothing: the least and the expected time of each kernel of a training step on an
    /// H200, and what each fusion saves
    #[arg(long, conflicts_with_all = MEASURING)]
    predict: bool,
    /// Step: model and batch (see `isobath info`) [default: a 1B model with grouped heads, 8 x 2048
    /// tokens; on simt a tiny one]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Step: a value that overrides the preset's, for instance train.micro_batch=4; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

impl ModelArgs {
    fn request(&self) -> StepRequest {
        StepRequest { preset: self.preset.clone(), sets: self.sets.clone() }
    }
}

/// The arguments of `Common` that a prediction has no use for.
const MEASURING: [&str; 7] =
    ["device", "samples", "race", "order", "asynchronous", "seed", "workers"];

/// What every benchmark takes.
#[derive(Args, Debug)]
struct Common {
    /// auto (a GPU if there is one, else simt), cuda or simt
    #[arg(long, default_value = "auto")]
    device: DeviceKind,
    /// bf16 or f32 [default: bf16; of a step, what its configuration says]
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Measurements; the median is reported [default: 30; on simt 3]
    #[arg(long)]
    samples: Option<NonZeroUsize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    simt: SimtArgs,
}

/// How simt runs kernels. What is not given comes from SIMT_RACE, SIMT_ORDER, SIMT_ASYNC,
/// SIMT_SEED and SIMT_WORKERS.
#[derive(Args, Debug)]
#[command(next_help_heading = "Device simt")]
struct SimtArgs {
    /// Check every access for races, bounds and uninitialised shared memory
    #[arg(long)]
    race: bool,
    /// Which thread runs next: fifo, lifo or random
    #[arg(long)]
    order: Option<Order>,
    /// When asynchronous copies happen: late, early or anytime
    #[arg(long = "async", value_name = "WHEN")]
    asynchronous: Option<Asynchronous>,
    /// Of the random schedules
    #[arg(long)]
    seed: Option<u64>,
    /// Threads of the operating system [default: one for each core]
    #[arg(long)]
    workers: Option<u32>,
}

impl SimtArgs {
    fn options(&self) -> Result<host::Options> {
        let variables = host::Options::from_env()?;
        Ok(host::Options {
            race: self.race || variables.race,
            order: self.order.unwrap_or(variables.order),
            asynchronous: self.asynchronous.unwrap_or(variables.asynchronous),
            seed: self.seed.unwrap_or(variables.seed),
            workers: self.workers.unwrap_or(variables.workers),
            ..variables
        })
    }

    fn is_given(&self) -> bool {
        let SimtArgs { race, order, asynchronous, seed, workers } = self;
        let numbers = seed.is_some() || workers.is_some();
        *race || order.is_some() || asynchronous.is_some() || numbers
    }
}

impl Common {
    fn open(&self) -> Result<Box<dyn Driver>> {
        let driver = cuda::open(self.device, self.simt.options()?)?;
        if driver.device() != "simt" && self.simt.is_given() {
            return Err(Error::Usage {
                what: "--race, --order, --async, --seed and --workers are of the device simt"
                    .to_string(),
                remedy: "add --device simt".to_string(),
            });
        }
        Ok(driver)
    }

    fn print(&self, report: &(impl Serialize + Display)) -> anyhow::Result<()> {
        if self.json { output::print_json(report) } else { output::print(&report.to_string()) }
    }

    fn time(&self, benchmarks: Vec<Benchmark>) -> anyhow::Result<()> {
        let options = Options { dtype: self.dtype, samples: self.samples.map(usize::from) };
        let request = Request { benchmarks, options };
        self.print(&bench::run(|| self.open(), &request, |row| eprintln!("{row}"))?)
    }
}

fn sizes<const N: usize>(text: &str) -> Result<[usize; N], String> {
    let sizes: Option<Vec<usize>> = text.split(',').map(|size| size.trim().parse().ok()).collect();
    let sizes = sizes.and_then(|sizes| sizes.try_into().ok());
    let example = ["4096"; N].join(",");
    sizes.ok_or_else(|| format!("give {N} sizes such as {example}"))
}

/// One set of `--without`: clap takes a Vec in a Vec's place for several values.
type Fusions = Vec<Fusion>;

fn fusions(text: &str) -> Result<Fusions, String> {
    if text == "all" {
        return Ok(Fusion::ALL.to_vec());
    }
    text.split(',')
        .map(|name| name.trim().parse().map_err(|error: Error| error.to_string()))
        .collect()
}

pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    let size = |given: Option<NonZeroUsize>| given.map(usize::from);
    let BenchArgs { benchmark, model, common } = args;
    let (common, benchmark) = match benchmark {
        None if model.predict => return predict(&model, &common),
        None => return common.time(Benchmark::all(model.request())),
        Some(BenchCommand::Gemm(args)) => return gemm::run(&args),
        Some(BenchCommand::Step(StepArgs { model, common, .. })) if model.predict => {
            return predict(&model, &common);
        }
        Some(BenchCommand::Step(StepArgs { without, model, common })) => {
            (common, Benchmark::Step(TimedStepRequest { step: model.request(), without }))
        }
        Some(BenchCommand::Attention(AttentionArgs { shape, family, common })) => {
            (common, Benchmark::Attention(AttentionRequest { shape, family }))
        }
        Some(BenchCommand::Norm(NormArgs { kind, rows, columns, common })) => {
            let [rows, columns] = [rows, columns].map(size);
            (common, Benchmark::Norm(NormRequest { kind, rows, columns }))
        }
        Some(BenchCommand::Loss(LossArgs { rows, vocab, common })) => {
            let [rows, vocab] = [rows, vocab].map(size);
            (common, Benchmark::Loss(LossRequest { rows, vocab }))
        }
        Some(BenchCommand::Adamw(AdamwArgs { elements, common })) => {
            (common, Benchmark::Adamw(AdamwRequest { elements: size(elements) }))
        }
    };
    common.time(vec![benchmark])
}

fn predict(model: &ModelArgs, common: &Common) -> anyhow::Result<()> {
    common.print(&Prediction::new(&model.request().resolve(Machine::Gpu, common.dtype)?)?)
}

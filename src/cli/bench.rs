//! `isobath bench`: times kernels, on a GPU or on the CPU machine; there also to debug them.

use std::num::NonZeroUsize;

use clap::Args;
use isobath::bench::{self, Benchmark, GemmPrediction, Machine, Prediction, Request, StepRequest};
use isobath::config::{DeviceKind, Dtype, NormKind};
use isobath::cuda::gemm::{Family, Layout};
use isobath::cuda::host::{Asynchronous, Options, Order};
use isobath::{Error, Result, cuda};

use super::output;

#[derive(Args, Debug)]
pub struct BenchArgs {
    /// What to time: gemm, attention, norm, loss, adamw, step (a whole training step), or all
    #[arg(default_value = "all")]
    benchmark: Benchmark,
    /// Measure nothing: the least that each kernel of a training step can take on an H200; of gemm,
    /// what is reckoned for every product of the paper's models
    #[arg(long)]
    predict: bool,
    /// auto (a GPU if there is one, else simt), cuda or simt
    #[arg(long, default_value = "auto")]
    device: DeviceKind,
    /// bf16 or f32 [default: bf16; step, --predict: what their configuration says]
    #[arg(long)]
    dtype: Option<Dtype>,
    /// norm: rms or layer [default: rms]
    #[arg(long)]
    norm: Option<NormKind>,
    /// norm, loss: rows T [default: 16384 and 4096; on simt 256 and 64]
    #[arg(long)]
    rows: Option<NonZeroUsize>,
    /// norm: columns C [default: 2048; on simt 1024]
    #[arg(long)]
    columns: Option<NonZeroUsize>,
    /// loss: vocabulary V [default: 32000; on simt 2048]
    #[arg(long)]
    vocab: Option<NonZeroUsize>,
    /// gemm: M,N,K [default: the layers of a 1B model, 4096 and 8192 cubed; on simt 256 cubed]
    #[arg(long, value_name = "M,N,K", value_parser = sizes::<3>)]
    product: Option<[usize; 3]>,
    /// gemm: nt (a layer forward), nn (gradient of its input) or tn (of its weight) [default: all]
    #[arg(long)]
    layout: Option<Layout>,
    /// gemm, attention: which kernels: sm80, sm90 or f32 [default: the best of this machine]
    #[arg(long)]
    family: Option<Family>,
    /// attention: batch, sequence, heads, KV heads, head dim [default: three of 1B models; on simt
    /// 1,128,4,2,64]
    #[arg(long, value_name = "B,S,H,K,D", value_parser = sizes::<5>)]
    attention: Option<[usize; 5]>,
    /// adamw: elements N [default: 2^28; on simt 2^18]
    #[arg(long)]
    elements: Option<NonZeroUsize>,
    /// step, --predict: model and batch (see `isobath info`) [default: a 1B model with grouped
    /// heads, 8 x 2048 tokens; step on simt: a tiny one]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// step, --predict: a value above those of the preset, for instance train.micro_batch=4; may be
    /// repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Measurements, of which the median counts [default: 30; on simt 3]
    #[arg(long)]
    samples: Option<NonZeroUsize>,
    #[command(flatten)]
    simt: SimtArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl BenchArgs {
    /// Refuses what the chosen benchmark would not look at.
    fn check_flags(&self) -> Result<()> {
        use Benchmark::{Adamw, Attention, Gemm, Loss, Norm, Step};
        let flags: [(&str, bool, &[Benchmark]); 11] = [
            ("--norm", self.norm.is_some(), &[Norm]),
            ("--rows", self.rows.is_some(), &[Norm, Loss]),
            ("--columns", self.columns.is_some(), &[Norm]),
            ("--vocab", self.vocab.is_some(), &[Loss]),
            ("--product", self.product.is_some(), &[Gemm]),
            ("--layout", self.layout.is_some(), &[Gemm]),
            ("--family", self.family.is_some(), &[Gemm, Attention]),
            ("--attention", self.attention.is_some(), &[Attention]),
            ("--elements", self.elements.is_some(), &[Adamw]),
            ("--preset", self.preset.is_some(), &[Step]),
            ("--set", !self.sets.is_empty(), &[Step]),
        ];
        let predictable = [Benchmark::All, Benchmark::Gemm].contains(&self.benchmark);
        let measured = !predictable
            || self.device != DeviceKind::Auto
            || self.samples.is_some()
            || self.simt.is_given();
        if self.predict && measured {
            return Err(Error::Usage {
                what: "--predict measures nothing and asks no device".to_string(),
                remedy:
                    "leave out --device, --samples, what is simt's and any benchmark but gemm; \
                         or --predict"
                        .to_string(),
            });
        }
        let looked_at = |of: &[Benchmark]| match (self.predict, self.benchmark) {
            (true, _) => of == [Step],
            (false, Benchmark::All) => true,
            (false, chosen) => of.contains(&chosen),
        };
        match flags.iter().find(|(_, given, of)| *given && !looked_at(of)) {
            None => Ok(()),
            Some((flag, _, of)) => {
                let names: Vec<&str> = of.iter().map(|benchmark| benchmark.name()).collect();
                Err(Error::Usage {
                    what: format!("{flag} is of {}", names.join(" and ")),
                    remedy: format!("leave it out, or run `isobath bench {}`", names[0]),
                })
            }
        }
    }
}

/// How simt runs kernels. What is not given comes from SIMT_RACE, SIMT_ORDER, SIMT_ASYNC,
/// SIMT_SEED and SIMT_WORKERS.
#[derive(Args, Debug)]
struct SimtArgs {
    /// simt: check every access for races, bounds and uninitialised shared memory
    #[arg(long)]
    race: bool,
    /// simt: which thread runs next: fifo, lifo or random
    #[arg(long)]
    order: Option<Order>,
    /// simt: when asynchronous copies happen: late, early or anytime
    #[arg(long = "async", value_name = "WHEN")]
    asynchronous: Option<Asynchronous>,
    /// simt: of the random schedules
    #[arg(long)]
    seed: Option<u64>,
    /// simt: threads of the operating system [default: one for each core]
    #[arg(long)]
    workers: Option<u32>,
}

impl SimtArgs {
    fn options(&self) -> Result<Options> {
        let variables = Options::from_env()?;
        Ok(Options {
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

fn sizes<const N: usize>(text: &str) -> Result<[usize; N], String> {
    let sizes: Option<Vec<usize>> = text.split(',').map(|size| size.trim().parse().ok()).collect();
    let sizes = sizes.and_then(|sizes| sizes.try_into().ok());
    let example = ["4096"; N].join(",");
    sizes.ok_or_else(|| format!("give {N} sizes such as {example}"))
}

pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    args.check_flags()?;
    if args.predict && args.benchmark == Benchmark::Gemm {
        let prediction = GemmPrediction::new(args.preset.as_deref(), &args.sets)?;
        return match args.json {
            true => output::print_json(&prediction),
            false => output::print(&prediction.to_string()),
        };
    }
    let step = StepRequest { preset: args.preset, sets: args.sets };
    if args.predict {
        let prediction = Prediction::new(&step.resolve(Machine::Gpu, args.dtype)?)?;
        return match args.json {
            true => output::print_json(&prediction),
            false => output::print(&prediction.to_string()),
        };
    }
    let simt = args.simt.options()?;
    let open = || {
        let driver = cuda::open(args.device, simt)?;
        if driver.device() != "simt" && args.simt.is_given() {
            return Err(Error::Usage {
                what: "--race, --order, --async, --seed and --workers are of the device simt"
                    .to_string(),
                remedy: "add --device simt".to_string(),
            });
        }
        Ok(driver)
    };
    let request = Request {
        benchmark: args.benchmark,
        dtype: args.dtype,
        samples: args.samples.map(usize::from),
        norm: args.norm.unwrap_or(NormKind::Rms),
        rows: args.rows.map(usize::from),
        columns: args.columns.map(usize::from),
        vocab: args.vocab.map(usize::from),
        product: args.product,
        layout: args.layout,
        family: args.family,
        attention: args.attention,
        elements: args.elements.map(usize::from),
        step,
    };
    let report = bench::run(open, &request)?;
    if args.json { output::print_json(&report) } else { output::print(&report.to_string()) }
}

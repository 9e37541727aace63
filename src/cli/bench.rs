//! `isobath bench`: times kernels, on a GPU or on the CPU machine; there also to debug them.

use std::fmt::Display;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use isobath::bench::{
    self, Benchmark, GemmPrediction, Machine, Prediction, ProductsRequest, Request, Row,
    StepRequest,
};
use isobath::config::{DeviceKind, Dtype, NormKind};
use isobath::cuda::gemm::Layout;
use isobath::cuda::gemm::tuned::Table;
use isobath::cuda::host::{Asynchronous, Options, Order};
use isobath::cuda::{self, Driver, Family, Fusion};
use isobath::{Error, Result, durable};
use serde::Serialize;

use super::output;

#[derive(Args, Debug)]
pub struct BenchArgs {
    /// What to time: gemm, attention, norm, loss, adamw, step (a whole training step), or all
    #[arg(default_value = "all")]
    benchmark: Benchmark,
    /// Measure nothing: the least and the expected time of each kernel of a training step on an
    /// H200, and what each fusion saves; gemm: the estimate for every product of the paper's models
    #[arg(long)]
    predict: bool,
    /// gemm: every product of the paper's models with the kernel chosen for it, in a burst and
    /// sustained
    #[arg(long)]
    table: bool,
    /// gemm: every kernel and number of splits for each of these products, most expensive first;
    /// what was fastest becomes src/cuda/gemm/tuned.toml
    #[arg(long)]
    tune: bool,
    /// gemm: the products that lines on stdin name (nt 4096,2048,1024, or with `sustained` after
    /// it), one JSON row a line, for a program that times something else in between
    #[arg(long)]
    stdin: bool,
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
    /// loss: vocabulary V [default: 32000; on simt 2048]. gemm with --predict, --table or --tune:
    /// that of the models; of the head alone for each one after the first [default: the presets']
    #[arg(long = "vocab", value_name = "V")]
    vocabs: Vec<NonZeroUsize>,
    /// gemm: M,N,K [default: the layers of a 1B model, 4096 and 8192 cubed; on simt 256 cubed]
    #[arg(long, value_name = "M,N,K", value_parser = sizes::<3>)]
    product: Option<[usize; 3]>,
    /// gemm: nt (a layer forward), nn (gradient of its input) or tn (of its weight) [default: all]
    #[arg(long)]
    layout: Option<Layout>,
    /// gemm, attention: which kernels: sm80, sm90 or f32 [default: the best of this machine]
    #[arg(long)]
    family: Option<Family>,
    /// attention: batch, sequence, heads, KV heads, head dim [default: head dims 128 and 64 at 256
    /// to 8192 tokens a row, and two models'; on simt 1,128,4,2,64]
    #[arg(long, value_name = "B,S,H,K,D", value_parser = sizes::<5>)]
    attention: Option<[usize; 5]>,
    /// adamw: elements N [default: 2^28; on simt 2^18]
    #[arg(long)]
    elements: Option<NonZeroUsize>,
    /// step, --predict, --table, --tune: model and batch (see `isobath info`); for products may
    /// be repeated [default: a 1B model with grouped heads, 8 x 2048 tokens; products: the paper's
    /// models; on simt a tiny one]
    #[arg(long = "preset", value_name = "NAME")]
    presets: Vec<String>,
    /// step, --predict, --table, --tune: a value that overrides the preset's, for instance
    /// train.micro_batch=4; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// step: time it once more without these fusions (residual, rotary, swiglu, swiglu-backward,
    /// rotary-backward, joined by commas, or all); may be repeated
    #[arg(long, value_name = "FUSIONS", value_parser = fusions)]
    without: Vec<Fusions>,
    /// Measurements; the median is reported [default: 30; for --table what 50 ms hold, for --tune
    /// 20; on simt 3, or 1]
    #[arg(long)]
    samples: Option<NonZeroUsize>,
    /// --table, --tune: for how long [default: 90 and 180; on simt until all is done once]
    #[arg(long, value_name = "S", value_parser = positive)]
    seconds: Option<f64>,
    /// --tune: where to write what was fastest
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// --table, --stdin: choose kernels by this file from --tune instead of the built-in one
    #[arg(long, value_name = "FILE")]
    choices: Option<PathBuf>,
    #[command(flatten)]
    simt: SimtArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What becomes of the kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Time,
    Predict,
    Table,
    Tune,
    Stdin,
}

impl BenchArgs {
    /// Errors: two of them at once; one that the benchmark does not have.
    fn mode(&self) -> Result<Mode> {
        let modes = [
            ("--predict", self.predict, Mode::Predict),
            ("--table", self.table, Mode::Table),
            ("--tune", self.tune, Mode::Tune),
            ("--stdin", self.stdin, Mode::Stdin),
        ];
        let mut given = modes.into_iter().filter(|(_, given, _)| *given);
        let (Some((flag, _, mode)), other) = (given.next(), given.next()) else {
            return Ok(Mode::Time);
        };
        if let Some((other, ..)) = other {
            return Err(Error::Usage {
                what: format!("{flag} and {other} exclude each other"),
                remedy: "leave one of them out".to_string(),
            });
        }
        if mode != Mode::Predict && self.benchmark != Benchmark::Gemm {
            return Err(Error::Usage {
                what: format!("{flag} applies only to gemm"),
                remedy: format!("run `isobath bench gemm {flag}`"),
            });
        }
        Ok(mode)
    }

    /// Refuses what the chosen benchmark would not look at.
    fn check_flags(&self, mode: Mode) -> Result<()> {
        use Benchmark::{Adamw, Attention, Gemm, Loss, Norm, Step};
        let of_models = ![Mode::Time, Mode::Stdin].contains(&mode) && self.benchmark == Gemm;
        let flags: [(&str, bool, &[Benchmark]); 12] = [
            ("--norm", self.norm.is_some(), &[Norm]),
            ("--rows", self.rows.is_some(), &[Norm, Loss]),
            ("--columns", self.columns.is_some(), &[Norm]),
            ("--vocab", !self.vocabs.is_empty(), if of_models { &[Step] } else { &[Loss] }),
            ("--product", self.product.is_some(), &[Gemm]),
            ("--layout", self.layout.is_some(), &[Gemm]),
            ("--family", self.family.is_some(), &[Gemm, Attention]),
            ("--attention", self.attention.is_some(), &[Attention]),
            ("--elements", self.elements.is_some(), &[Adamw]),
            ("--preset", !self.presets.is_empty(), &[Step]),
            ("--set", !self.sets.is_empty(), &[Step]),
            ("--without", !self.without.is_empty(), &[Step]),
        ];
        let predictable = [Benchmark::All, Benchmark::Gemm].contains(&self.benchmark);
        let measured = !predictable
            || self.device != DeviceKind::Auto
            || self.samples.is_some()
            || self.simt.is_given();
        if mode == Mode::Predict && measured {
            return Err(Error::Usage {
                what: "--predict measures nothing and uses no device".to_string(),
                remedy:
                    "leave out --device, --samples, what is simt's and any benchmark but gemm; \
                         or --predict"
                        .to_string(),
            });
        }
        let looked_at = |of: &[Benchmark]| match (mode, self.benchmark) {
            (Mode::Predict, _) => of == [Step],
            (Mode::Table | Mode::Tune, _) => of == [Step] || of == [Gemm],
            (Mode::Stdin | Mode::Time, Benchmark::All) => true,
            (Mode::Stdin | Mode::Time, chosen) => of.contains(&chosen),
        };
        if let Some((flag, _, of)) = flags.iter().find(|(_, given, of)| *given && !looked_at(of)) {
            let names: Vec<&str> = of.iter().map(|benchmark| benchmark.name()).collect();
            return Err(Error::Usage {
                what: format!("{flag} applies only to {}", names.join(" and ")),
                remedy: format!("leave it out, or run `isobath bench {}`", names[0]),
            });
        }
        let of_modes: [(&str, bool, &[Mode], &str); 3] = [
            ("--seconds", self.seconds.is_some(), &[Mode::Table, Mode::Tune], "--table and --tune"),
            ("--out", self.out.is_some(), &[Mode::Tune], "--tune"),
            (
                "--choices",
                self.choices.is_some(),
                &[Mode::Table, Mode::Stdin],
                "--table and --stdin",
            ),
        ];
        if let Some((flag, .., names)) =
            of_modes.iter().find(|(_, given, of, _)| *given && !of.contains(&mode))
        {
            return Err(Error::Usage {
                what: format!("{flag} applies only to {names}"),
                remedy: format!("leave it out, or run `isobath bench gemm` with {names}"),
            });
        }
        let several = self.presets.len() > 1;
        if several && (self.benchmark != Benchmark::Gemm || mode == Mode::Time) {
            return Err(Error::Usage {
                what: "a training step takes one preset".to_string(),
                remedy: "give --preset once".to_string(),
            });
        }
        if self.vocabs.len() > 1 && !of_models {
            return Err(Error::Usage {
                what: "a loss is of one vocabulary".to_string(),
                remedy: "give --vocab once".to_string(),
            });
        }
        if !self.without.is_empty() && mode != Mode::Time {
            return Err(Error::Usage {
                what: "--without times a step, and --predict says of every fusion what it is worth"
                    .to_string(),
                remedy: "leave it out, or run `isobath bench step --without ...`".to_string(),
            });
        }
        let sized = self.product.is_some();
        let named = [&self.presets, &self.sets].iter().any(|it| !it.is_empty());
        if sized && (mode == Mode::Stdin || named || of_models && !self.vocabs.is_empty()) {
            return Err(Error::Usage {
                what:
                    "--product says which product, and so do --stdin, --preset, --set and --vocab"
                        .to_string(),
                remedy: "leave one of them out".to_string(),
            });
        }
        Ok(())
    }
}

impl BenchArgs {
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

    fn step(&self) -> StepRequest {
        StepRequest { preset: self.presets.first().cloned(), sets: self.sets.clone() }
    }

    fn vocabs(&self) -> Vec<usize> {
        self.vocabs.iter().copied().map(usize::from).collect()
    }

    /// Errors: a file of choices that is none.
    fn products(&self) -> Result<ProductsRequest> {
        Ok(ProductsRequest {
            presets: self.presets.clone(),
            sets: self.sets.clone(),
            vocabs: self.vocabs(),
            product: self.product,
            layout: self.layout,
            family: self.family,
            dtype: self.dtype,
            samples: self.samples.map(usize::from),
            seconds: self.seconds,
            choices: self.choices.as_deref().map(Table::read).transpose()?,
        })
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

/// Seconds.
fn positive(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|it: &f64| *it > 0.0);
    seconds.ok_or_else(|| "give a number of seconds above 0".to_string())
}

pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    let mode = args.mode()?;
    args.check_flags(mode)?;
    match mode {
        Mode::Time => time(args),
        Mode::Predict => predict(&args),
        Mode::Table => table(&args),
        Mode::Tune => tune(&args),
        Mode::Stdin => answer(&args),
    }
}

fn print(args: &BenchArgs, report: &(impl Serialize + Display)) -> anyhow::Result<()> {
    if args.json { output::print_json(report) } else { output::print(&report.to_string()) }
}

fn predict(args: &BenchArgs) -> anyhow::Result<()> {
    if args.benchmark == Benchmark::Gemm {
        return print(args, &GemmPrediction::new(&args.presets, &args.sets, &args.vocabs())?);
    }
    print(args, &Prediction::new(&args.step().resolve(Machine::Gpu, args.dtype)?)?)
}

fn time(args: BenchArgs) -> anyhow::Result<()> {
    let request = Request {
        benchmark: args.benchmark,
        dtype: args.dtype,
        samples: args.samples.map(usize::from),
        norm: args.norm.unwrap_or(NormKind::Rms),
        rows: args.rows.map(usize::from),
        columns: args.columns.map(usize::from),
        vocab: args.vocabs().first().copied(),
        product: args.product,
        layout: args.layout,
        family: args.family,
        attention: args.attention,
        elements: args.elements.map(usize::from),
        step: args.step(),
        without: args.without.clone(),
    };
    print(&args, &bench::run(|| args.open(), &request, |row| eprintln!("{row}"))?)
}

fn table(args: &BenchArgs) -> anyhow::Result<()> {
    let request = args.products()?;
    let report = bench::table(&mut *args.open()?, &request, |line| eprintln!("{line}"))?;
    print(args, &report)
}

fn tune(args: &BenchArgs) -> anyhow::Result<()> {
    let request = args.products()?;
    let report = bench::tune(&mut *args.open()?, &request, |report| {
        eprintln!("{}", report.progress());
        let Some(out) = &args.out else { return Ok(()) };
        // Each time, so that who is stopped has what was timed before.
        durable::replace(out, report.table().to_string().as_bytes())
    })?;
    print(args, &report)
}

fn answer(args: &BenchArgs) -> anyhow::Result<()> {
    let request = args.products()?;
    let print = |row: &Row| {
        let row = serde_json::to_string(row).map_err(io::Error::from);
        let printed = row.and_then(|row| {
            let mut out = io::stdout().lock();
            writeln!(out, "{row}").and_then(|()| out.flush())
        });
        printed.map_err(Error::io("write", "stdout"))
    };
    Ok(bench::answer(&mut *args.open()?, &request, io::stdin().lock(), print)?)
}

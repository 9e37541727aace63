//! `isobath bench gemm`: a few products, or every product of the paper's models.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use isobath::bench::{self, Benchmark, GemmRequest, ProductsRequest, Row};
use isobath::cuda::gemm::Layout;
use isobath::cuda::gemm::tuned::Table;
use isobath::cuda::{Driver, Family};
use isobath::predict::GemmPrediction;
use isobath::{Error, Result};

use super::{Common, MEASURING, output, sizes};

#[derive(Args, Debug)]
pub struct GemmArgs {
    /// Measure nothing: the estimate for every product of the paper's models on an H200
    #[arg(long, groups = ["mode", "models"], conflicts_with_all = MEASURING)]
    #[arg(conflicts_with = "dtype")]
    predict: bool,
    /// Every product of the paper's models with the kernel chosen for it, in a burst and sustained
    /// [samples: what 50 ms hold; on simt 1]
    #[arg(long, groups = ["mode", "models", "timed", "chosen"])]
    table: bool,
    /// Every kernel and number of splits for each of these products, most expensive first; what was
    /// fastest becomes src/cuda/gemm/tuned.toml [samples: 20; on simt 1]
    #[arg(long, groups = ["mode", "models", "timed", "tuned"])]
    tune: bool,
    /// The products that lines on stdin name (nt 4096,2048,1024, or with `sustained` after it), one
    /// JSON row a line, for a program that times something else in between
    #[arg(long, groups = ["mode", "chosen"], hide = true)]
    stdin: bool,
    /// Time this product alone [default: the layers of a 1B model, 4096 and 8192 cubed; on simt 256
    /// cubed]
    #[arg(long, value_name = "M,N,K", value_parser = sizes::<3>)]
    #[arg(conflicts_with_all = ["predict", "stdin", "presets", "sets", "vocabs"])]
    product: Option<[usize; 3]>,
    /// nt (a layer forward), nn (gradient of its input) or tn (of its weight) [default: all]
    #[arg(long, conflicts_with_all = ["predict", "stdin"])]
    layout: Option<Layout>,
    /// Which kernels: sm80, sm90 or f32 [default: the best of this machine]
    #[arg(long, conflicts_with = "predict")]
    family: Option<Family>,
    /// --predict, --table, --tune: products of this model and batch (see `isobath info`); may be
    /// repeated [default: the paper's models; on simt a tiny one]
    #[arg(long = "preset", value_name = "NAME", requires = "models")]
    presets: Vec<String>,
    /// --predict, --table, --tune: a value that overrides the preset's, for instance
    /// train.micro_batch=4; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "models")]
    sets: Vec<String>,
    /// --predict, --table, --tune: this vocabulary for the models; of the head alone for each one
    /// after the first [default: the presets']
    #[arg(long = "vocab", value_name = "V", requires = "models")]
    vocabs: Vec<NonZeroUsize>,
    /// --table, --tune: for how long [default: 90 and 180; on simt until all is done once]
    #[arg(long, value_name = "S", value_parser = positive, requires = "timed")]
    seconds: Option<f64>,
    /// --tune: where to write what was fastest
    #[arg(long, value_name = "FILE", requires = "tuned")]
    out: Option<PathBuf>,
    /// --table: choose kernels by this file from --tune instead of the built-in one
    #[arg(long, value_name = "FILE", requires = "chosen")]
    choices: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl GemmArgs {
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
            dtype: self.common.dtype,
            samples: self.common.samples.map(usize::from),
            seconds: self.seconds,
            choices: self.choices.as_deref().map(Table::read).transpose()?,
        })
    }
}

pub fn run(args: &GemmArgs) -> anyhow::Result<()> {
    let common = &args.common;
    if args.predict {
        let prediction = GemmPrediction::new(&args.presets, &args.sets, &args.vocabs())?;
        return common.print(&prediction);
    }
    let request = args.products()?;
    if args.table {
        let mut driver = common.open()?;
        common.print(&bench::table(&mut *driver, &request, |line| eprintln!("{line}"))?)
    } else if args.tune {
        tune(args, &request)
    } else if args.stdin {
        Ok(answer(&mut *common.open()?, &request)?)
    } else {
        let GemmArgs { product, layout, family, .. } = *args;
        common.time(vec![Benchmark::Gemm(GemmRequest { product, layout, family })])
    }
}

fn tune(args: &GemmArgs, request: &ProductsRequest) -> anyhow::Result<()> {
    let report = bench::tune(&mut *args.common.open()?, request, |report| {
        eprintln!("{}", report.progress());
        let Some(out) = &args.out else { return Ok(()) };
        // Each time, so that who is stopped has what was timed before.
        output::save(out, report.table().to_string().as_bytes())
    })?;
    args.common.print(&report)
}

fn answer(driver: &mut dyn Driver, request: &ProductsRequest) -> Result<()> {
    let print = |row: &Row| {
        let row = serde_json::to_string(row).map_err(io::Error::from);
        let printed = row.and_then(|row| {
            let mut out = io::stdout().lock();
            writeln!(out, "{row}").and_then(|()| out.flush())
        });
        printed.map_err(Error::io("write", "stdout"))
    };
    bench::answer(driver, request, io::stdin().lock(), print)
}

/// Seconds.
fn positive(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|it: &f64| *it > 0.0);
    seconds.ok_or_else(|| "give a number of seconds above 0".to_string())
}

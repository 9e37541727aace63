//! `isobath bench`: times kernels, on a GPU or on the CPU machine; there also to debug them.

use std::num::NonZeroUsize;

use clap::Args;
use isobath::bench::{self, Benchmark, Request};
use isobath::config::{DeviceKind, Dtype, NormKind};
use isobath::cuda::gemm::{Family, Layout};
use isobath::cuda::host::{Asynchronous, Options, Order};
use isobath::{Error, Result, cuda};

use super::output;

#[derive(Args, Debug)]
pub struct BenchArgs {
    /// What to time: norm or gemm
    benchmark: Benchmark,
    /// auto (a GPU if there is one, else simt), cuda or simt
    #[arg(long, default_value = "auto")]
    device: DeviceKind,
    /// norm: rms or layer
    #[arg(long, default_value = "rms")]
    norm: NormKind,
    /// bf16 or f32
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    /// norm: rows T [default: 8192; on simt 256]
    #[arg(long)]
    rows: Option<NonZeroUsize>,
    /// norm: columns C [default: 4096; on simt 1024]
    #[arg(long)]
    columns: Option<NonZeroUsize>,
    /// gemm: M,N,K [default: 2048 to 8192 each; on simt 512]
    #[arg(long, value_name = "M,N,K", value_parser = product)]
    product: Option<[usize; 3]>,
    /// gemm: nt (a layer forward), nn (gradient of its input) or tn (of its weight) [default: all]
    #[arg(long)]
    layout: Option<Layout>,
    /// gemm: which kernels: sm80, sm90 or f32 [default: the best of this machine]
    #[arg(long)]
    family: Option<Family>,
    /// Measurements, of which the median counts [default: 30; on simt 3]
    #[arg(long)]
    samples: Option<NonZeroUsize>,
    #[command(flatten)]
    simt: SimtArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
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

fn product(text: &str) -> Result<[usize; 3], String> {
    let sizes: Option<Vec<usize>> = text.split(',').map(|size| size.trim().parse().ok()).collect();
    let sizes = sizes.and_then(|sizes| sizes.try_into().ok());
    sizes.ok_or_else(|| "give three sizes such as 4096,4096,1024".to_string())
}

pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    let mut driver = cuda::open(args.device, args.simt.options()?)?;
    if driver.device() != "simt" && args.simt.is_given() {
        return Err(Error::Usage {
            what: "--race, --order, --async, --seed and --workers are of the device simt"
                .to_string(),
            remedy: "add --device simt".to_string(),
        }
        .into());
    }
    let report = bench::run(
        &mut *driver,
        &Request {
            benchmark: args.benchmark,
            norm: args.norm,
            dtype: args.dtype,
            rows: args.rows.map(usize::from),
            columns: args.columns.map(usize::from),
            product: args.product,
            layout: args.layout,
            family: args.family,
            samples: args.samples.map(usize::from),
        },
    )?;
    if args.json { output::print_json(&report) } else { output::print(&report.to_string()) }
}

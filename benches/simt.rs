//! The CPU machine for kernels: how fast `simt` runs them, plain and in race mode, on one worker
//! and on two, and what a launch and a switch between threads cost.
//!
//! `cargo bench --bench simt -- NAME` runs those whose name contains NAME. elem/s are FLOP/s for
//! products, elements of a row for norms, switches for the barrier loop. These figures say how long
//! tests take; they say nothing about a GPU.

use std::path::{Path, PathBuf};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use half::bf16;
use isobath::Result;
use isobath::backend::{NormSpec, Sink};
use isobath::config::{Dtype, NormKind};
use isobath::cuda::gemm::{Gemm, Layout, Output, Product};
use isobath::cuda::host::{Host, Options, present};
use isobath::cuda::norm::{Norm, NormBackward, NormForward};
use isobath::cuda::{Allocation, Arguments, Driver, Family, Launch, StreamId};
use isobath::random::Philox;

#[path = "../tests/cuda/library.rs"]
mod library;

/// Rows and columns of the norms, sides of the products: those of the machine's first prototype.
const ROWS: usize = 2048;
const COLUMNS: usize = 4096;
const SIDE: usize = 1024;
const SMALL_SIDE: usize = 512;
const BARRIERS: i32 = 2000;

/// Nothing but barriers: each thread waits `count` times.
const BARRIER_KERNEL: &str = "#include \"isobath.cuh\"\n\
    KERNEL(barriers, 256)(int count) {\n\
      for (int i = 0; i < count; ++i) __syncthreads();\n\
    }\n\
    EXPORT_KERNEL(barriers)\n";

fn main() {
    if let Err(error) = present() {
        return println!("skipped: {error}");
    }
    if library::is_missing() {
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let library = benched_kernels(folder.path());
    for race in [false, true] {
        for workers in [1, 2] {
            let mode = if race { "race mode" } else { "plain" };
            let mut group = criterion.benchmark_group(format!("simt, {mode}, {workers} worker(s)"));
            group.sample_size(10);
            let options = Options { race, workers, ..Options::default() };
            let bench = Bench { options, library: &library };
            bench.run(&mut group).expect("kernels without faults");
            group.finish();
        }
    }
    criterion.final_summary();
}

/// The kernels that the program itself does not have: tests/kernels/gemm_mma.cu (cp.async, ldmatrix
/// and mma.sync) and the barriers.
fn benched_kernels(folder: &Path) -> PathBuf {
    let gemm_mma = include_str!("../tests/kernels/gemm_mma.cu");
    library::compile(folder, "benched", &[("gemm_mma", gemm_mma), ("barriers", BARRIER_KERNEL)])
}

struct Bench<'a> {
    options: Options,
    library: &'a Path,
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// A buffer of normal random numbers.
fn normals(driver: &mut dyn Driver, seed: u64, count: usize) -> Result<Allocation> {
    let mut values = vec![0.0f32; count];
    Philox::new(seed, 0).fill_normal(0, &mut values);
    let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
    driver.upload("normals", &values)
}

impl Bench<'_> {
    fn run(&self, group: &mut Group) -> Result<()> {
        self.launch_overhead(group)?;
        self.gemm(group)?;
        self.norm(group)?;
        self.mma(group)?;
        self.switches(group)
    }

    /// The smallest norm: one block of 256 threads with one row of eight columns.
    fn launch_overhead(&self, group: &mut Group) -> Result<()> {
        let mut host = Host::new(self.options)?;
        let kernels = Kernels::norm(&mut host, 1, 8)?;
        group.throughput(Throughput::Elements(1));
        group.bench_function("a launch of one block", |bencher| {
            bencher.iter(|| kernels.forward(&mut host).expect("no fault"));
        });
        Ok(())
    }

    fn gemm(&self, group: &mut Group) -> Result<()> {
        let mut host = Host::new(self.options)?;
        let driver: &mut dyn Driver = &mut host;
        let gemm = Gemm::new(driver, Dtype::Bf16, Some(Family::Sm90))?;
        let [a, b] = [normals(driver, 1, SIDE * SIDE)?, normals(driver, 2, SIDE * SIDE)?];
        let out = driver.allocate("out", (2 * SIDE * SIDE) as u64)?;
        let product = Product {
            layout: Layout::Nt,
            m: SIDE,
            n: SIDE,
            k: SIDE,
            a: a.address,
            b: b.address,
            out: out.address,
            output: Output::Store { addend: None },
        };
        let plan = gemm.plan(driver, &product)?;
        group.throughput(Throughput::Elements(2 * (SIDE * SIDE * SIDE) as u64));
        group.bench_function(format!("gemm_sm90 {SIDE}^3"), |bencher| {
            bencher.iter(|| plan.launch(&mut host, StreamId::MAIN).expect("no fault"));
        });
        Ok(())
    }

    fn norm(&self, group: &mut Group) -> Result<()> {
        let mut host = Host::new(self.options)?;
        let kernels = Kernels::norm(&mut host, ROWS, COLUMNS)?;
        group.throughput(Throughput::Elements((ROWS * COLUMNS) as u64));
        group.bench_function(format!("norm forward {ROWS}x{COLUMNS}"), |bencher| {
            bencher.iter(|| kernels.forward(&mut host).expect("no fault"));
        });
        group.bench_function(format!("norm backward {ROWS}x{COLUMNS}"), |bencher| {
            bencher.iter(|| kernels.backward(&mut host).expect("no fault"));
        });
        Ok(())
    }

    fn mma(&self, group: &mut Group) -> Result<()> {
        let mut host = Host::load(self.library, self.options)?;
        let driver: &mut dyn Driver = &mut host;
        let count = SMALL_SIDE * SMALL_SIDE;
        let [a, b] = [normals(driver, 1, count)?, normals(driver, 2, count)?];
        let out = driver.allocate("out", (4 * count) as u64)?;
        let arguments = Arguments::new()
            .with(a)
            .with(b)
            .with(out)
            .with(SMALL_SIDE as i32)
            .with(SMALL_SIDE as i32);
        let blocks = (SMALL_SIDE / 64) as u32;
        let launch = Launch::new(driver.kernel("gemm_mma")?, [blocks, blocks, 1], [128, 1, 1])
            .shared_bytes(16384);
        group.throughput(Throughput::Elements(2 * (SMALL_SIDE * count) as u64));
        group.bench_function(format!("gemm_mma {SMALL_SIDE}^3"), |bencher| {
            bencher.iter(|| host.launch(&launch, &arguments).expect("no fault"));
        });
        Ok(())
    }

    fn switches(&self, group: &mut Group) -> Result<()> {
        let mut host = Host::load(self.library, self.options)?;
        let launch = Launch::new(host.kernel("barriers")?, [1, 1, 1], [256, 1, 1]);
        let arguments = Arguments::new().with(BARRIERS);
        let before = host.switches();
        host.launch(&launch, &arguments)?;
        group.throughput(Throughput::Elements(host.switches() - before));
        group.bench_function("barriers of 256 threads", |bencher| {
            bencher.iter(|| host.launch(&launch, &arguments).expect("no fault"));
        });
        Ok(())
    }
}

/// The norm of `rows` rows and everything that it reads and writes.
struct Kernels {
    norm: Norm,
    rows: usize,
    forward: NormForward,
    backward: NormBackward,
}

impl Kernels {
    fn norm(host: &mut Host, rows: usize, columns: usize) -> Result<Self> {
        let driver: &mut dyn Driver = host;
        let norm = Norm::new(driver, Dtype::Bf16, columns)?;
        let inp = normals(driver, 1, rows * columns)?.address;
        let d_out = normals(driver, 2, rows * columns)?.address;
        let gain = driver.upload("gain", &vec![1.0f32; columns])?.address;
        let d_gain = driver.upload("d_gain", &vec![0.0f32; columns])?.address;
        let bytes = (2 * rows * columns) as u64;
        let out = driver.allocate("out", bytes)?.address;
        let d_inp = driver.allocate("d_inp", bytes)?.address;
        let rstd = driver.upload("rstd", &vec![1.0f32; rows])?.address;
        let partials = (4 * norm.partials(rows) * columns) as u64;
        let partial = driver.allocate("partial", partials)?.address;
        let spec = NormSpec { kind: NormKind::Rms, eps: 1e-6, depth: 2 };
        let forward = NormForward { spec, inp, gain, out, mean: None, rstd };
        let d_inp = Sink { to: d_inp, accumulate: false };
        let backward =
            NormBackward { spec, inp, gain, mean: None, rstd, d_out, partial, d_inp, d_gain };
        Ok(Kernels { norm, rows, forward, backward })
    }

    fn forward(&self, driver: &mut dyn Driver) -> Result<()> {
        self.norm.forward(driver, StreamId::MAIN, self.rows, &self.forward)
    }

    fn backward(&self, driver: &mut dyn Driver) -> Result<()> {
        self.norm.backward(driver, StreamId::MAIN, self.rows, &self.backward)
    }
}

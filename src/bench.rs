//! Times kernels on a machine: medians between two events, cold L2, random normals.
//!
//! Every sample launches a kernel once on each of several copies of its buffers, enough of them
//! that no copy is still in L2 when its turn comes again, and takes the mean. What one launch reads
//! and writes, or multiplies, stands beside each figure as a formula. On the CPU machine the
//! figures say how fast that is, not how fast a GPU would be.

use std::fmt;

use half::bf16;
use serde::Serialize;

use crate::backend::NormSpec;
use crate::config::choice::choice;
use crate::config::{Dtype, NormKind};
use crate::cuda::gemm::{Family, Gemm, Layout, Output, Product};
use crate::cuda::norm::{Norm, NormBackward, NormForward};
use crate::cuda::{Allocation, DevicePointer, Driver, Properties, StreamId};
use crate::error::{Error, Result};
use crate::random::Philox;

choice! {
    /// What can be timed.
    pub enum Benchmark {
        Norm = "norm",
        Gemm = "gemm",
    }
}

/// What to time. `None`: what suits the machine.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub benchmark: Benchmark,
    pub norm: NormKind,
    pub dtype: Dtype,
    pub rows: Option<usize>,
    pub columns: Option<usize>,
    /// M, N, K
    pub product: Option<[usize; 3]>,
    /// `None`: every layout that the family has.
    pub layout: Option<Layout>,
    pub family: Option<Family>,
    pub samples: Option<usize>,
}

#[derive(Serialize, Debug)]
pub struct Report {
    pub benchmark: &'static str,
    pub device: &'static str,
    pub machine: Properties,
    pub rows: Vec<Row>,
}

#[derive(Serialize, Debug)]
pub struct Row {
    /// "norm_forward, rms, bf16, with residual"
    pub what: String,
    /// "T=8192 C=4096"
    pub shape: String,
    /// How many samples, and launches in each.
    pub samples: usize,
    pub launches_per_sample: usize,
    pub median_microseconds: f64,
    pub fastest_microseconds: f64,
    pub work: Work,
    /// Of the median: bytes or floating-point operations in a second.
    pub per_second: f64,
}

/// What one launch does.
#[derive(Serialize, Clone, PartialEq, Debug)]
pub struct Work {
    /// "bytes" or "flops"
    pub unit: &'static str,
    pub amount: u64,
    /// How the amount comes about.
    pub formula: &'static str,
}

/// Runs a benchmark. Errors: those of the launches; sizes that a kernel does not take.
pub fn run(driver: &mut dyn Driver, request: &Request) -> Result<Report> {
    let rows = match request.benchmark {
        Benchmark::Norm => norm(driver, request)?,
        Benchmark::Gemm => gemm(driver, request)?,
    };
    Ok(Report {
        benchmark: request.benchmark.name(),
        device: driver.device(),
        machine: driver.properties().clone(),
        rows,
    })
}

// ------------------------------------------------------------------ timing

/// Buffers of one launch that a benchmark works on, and as many copies as L2 needs to be cold.
struct Copies<T> {
    copies: Vec<T>,
}

/// A GPU's L2 has forgotten a buffer after so many times its own size.
const L2_SIZES: u64 = 4;
const MOST_COPIES: u64 = 64;

fn on_cpu(driver: &dyn Driver) -> bool {
    driver.properties().l2_bytes == 0
}

impl<T> Copies<T> {
    /// `bytes`: of one copy.
    fn new(
        driver: &mut dyn Driver,
        bytes: u64,
        mut make: impl FnMut(&mut dyn Driver) -> Result<T>,
    ) -> Result<Self> {
        let l2_bytes = driver.properties().l2_bytes;
        let count = (L2_SIZES * l2_bytes).div_ceil(bytes).clamp(1, MOST_COPIES);
        let copies: Result<Vec<T>> = (0..count).map(|_| make(driver)).collect();
        Ok(Copies { copies: copies? })
    }

    /// Times `launch`, once on each copy in a sample; one sample before the first does not count.
    fn time(
        &self,
        driver: &mut dyn Driver,
        request: &Request,
        mut launch: impl FnMut(&mut dyn Driver, &T) -> Result<()>,
    ) -> Result<Timing> {
        let samples = request.samples.unwrap_or(if on_cpu(driver) { 3 } else { 30 });
        let (start, end) = (driver.new_event()?, driver.new_event()?);
        let mut microseconds = Vec::with_capacity(samples);
        for sample in 0..=samples {
            driver.record(start, StreamId::MAIN)?;
            for copy in &self.copies {
                launch(driver, copy)?;
            }
            driver.record(end, StreamId::MAIN)?;
            let elapsed = driver.elapsed_ms(start, end)? * 1e3 / self.copies.len() as f64;
            if sample > 0 {
                microseconds.push(elapsed);
            }
        }
        driver.synchronize()?;
        microseconds.sort_by(f64::total_cmp);
        Ok(Timing { microseconds, launches_per_sample: self.copies.len() })
    }
}

/// Sorted; never empty.
struct Timing {
    microseconds: Vec<f64>,
    launches_per_sample: usize,
}

impl Timing {
    fn row(self, what: String, shape: String, work: Work) -> Row {
        let median = median(&self.microseconds);
        Row {
            what,
            shape,
            samples: self.microseconds.len(),
            launches_per_sample: self.launches_per_sample,
            median_microseconds: median,
            fastest_microseconds: self.microseconds[0],
            per_second: work.amount as f64 / median * 1e6,
            work,
        }
    }
}

/// Of sorted values.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

// ------------------------------------------------------------------ buffers

/// Independent draws from N(0, 1) in this type, the same for every run.
fn normals(driver: &mut dyn Driver, label: &str, dtype: Dtype, count: usize) -> Result<Allocation> {
    // Drawing is slow: a larger buffer repeats the first million.
    const DRAWN: usize = 1 << 20;
    let mut values = vec![0f32; count.min(DRAWN)];
    let stream = label.bytes().fold(0, |hash: u64, byte| hash * 31 + u64::from(byte));
    Philox::new(0, stream).fill_normal(0, &mut values);
    let element = element_bytes(dtype);
    let buffer = driver.allocate(label, count as u64 * element)?;
    let narrow: Vec<bf16>;
    let bytes: &[u8] = match dtype {
        Dtype::F32 => bytemuck::cast_slice(&values),
        Dtype::Bf16 => {
            narrow = values.iter().map(|&value| bf16::from_f32(value)).collect();
            bytemuck::cast_slice(&narrow)
        }
    };
    let mut at = 0;
    while at < buffer.bytes {
        let length = (buffer.bytes - at).min(bytes.len() as u64);
        driver.to_device(StreamId::MAIN, &bytes[..length as usize], buffer.address.offset(at))?;
        at += length;
    }
    Ok(buffer)
}

fn element_bytes(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 => 2,
    }
}

// ------------------------------------------------------------------ norm

const DEPTH: usize = 3;
const EPS: f64 = 1e-6;

struct NormBuffers {
    inp: DevicePointer,
    residual: DevicePointer,
    sum: DevicePointer,
    gain: DevicePointer,
    out: DevicePointer,
    mean: Option<DevicePointer>,
    rstd: DevicePointer,
    partial: DevicePointer,
    d_gain: DevicePointer,
}

fn norm(driver: &mut dyn Driver, request: &Request) -> Result<Vec<Row>> {
    let (default_rows, default_columns) = if on_cpu(driver) { (256, 1024) } else { (8192, 4096) };
    let rows = request.rows.unwrap_or(default_rows);
    let columns = request.columns.unwrap_or(default_columns);
    if rows == 0 || i32::try_from(rows).is_err() {
        return Err(impossible(format!("{rows} rows")));
    }
    let Request { norm: kind, dtype, .. } = *request;
    let spec = NormSpec { kind, eps: EPS, depth: DEPTH };
    let kernels = Norm::new(driver, dtype, columns)?;
    let partials = kernels.partials(rows);

    let activations = rows as u64 * columns as u64 * element_bytes(dtype);
    let statistics = 4 * rows as u64 * if kind == NormKind::Layer { 2 } else { 1 };
    let gains = 4 * columns as u64;
    let buffers = Copies::new(driver, 2 * activations, |driver| {
        let mut allocate = |label: &str, bytes: u64| -> Result<DevicePointer> {
            Ok(driver.allocate(label, bytes)?.address)
        };
        Ok(NormBuffers {
            sum: allocate("sum", activations)?,
            out: allocate("out", activations)?,
            mean: match kind {
                NormKind::Layer => Some(allocate("mean", 4 * rows as u64)?),
                NormKind::Rms => None,
            },
            rstd: allocate("rstd", 4 * rows as u64)?,
            partial: allocate("partial", partials as u64 * gains)?,
            inp: normals(driver, "inp", dtype, rows * columns)?.address,
            residual: normals(driver, "residual", dtype, rows * columns)?.address,
            gain: normals(driver, "gain", Dtype::F32, columns)?.address,
            d_gain: normals(driver, "d_gain", Dtype::F32, columns)?.address,
        })
    })?;

    let shape = format!("T={rows} C={columns}");
    let bytes = |amount, formula| Work { unit: "bytes", amount, formula };
    let mut table = vec![];
    for with_residual in [false, true] {
        let timing = buffers.time(driver, request, |driver, it| {
            let residual = with_residual.then_some((it.residual, it.sum));
            let NormBuffers { inp, gain, out, mean, rstd, .. } = *it;
            let args = NormForward { inp, residual, gain, out, mean, rstd };
            kernels.forward(driver, StreamId::MAIN, spec, rows, &args)
        })?;
        let (amount, formula) = match with_residual {
            false => (2 * activations, "inp and out [T,C]; gain [C]; statistics [T]"),
            true => (4 * activations, "inp, residual, sum and out [T,C]; gain [C]; statistics [T]"),
        };
        let residual = if with_residual { ", residual" } else { "" };
        let what = format!("norm_forward, {kind}, {dtype}{residual}");
        table.push(timing.row(what, shape.clone(), bytes(amount + gains + statistics, formula)));
    }
    let timing = buffers.time(driver, request, |driver, it| {
        let NormBuffers { inp, gain, mean, rstd, partial, d_gain, .. } = *it;
        let (d_out, d_inp, accumulate) = (it.residual, it.out, false);
        let args =
            NormBackward { inp, gain, mean, rstd, d_out, partial, d_inp, accumulate, d_gain };
        kernels.backward(driver, StreamId::MAIN, spec, rows, &args)
    })?;
    let amount = 3 * activations + (2 * partials as u64 + 3) * gains + statistics;
    let formula = "inp, d_out and d_inp [T,C]; partial sums [P,C] written and read; gain, d_gain \
                   twice [C]; statistics [T]";
    table.push(timing.row(
        format!("norm_backward, {kind}, {dtype}"),
        shape,
        bytes(amount, formula),
    ));
    Ok(table)
}

// ------------------------------------------------------------------ gemm

fn gemm(driver: &mut dyn Driver, request: &Request) -> Result<Vec<Row>> {
    let shapes = match request.product {
        Some(product) => vec![product],
        None if on_cpu(driver) => vec![[512; 3]],
        None => vec![[2048; 3], [4096; 3], [8192; 3]],
    };
    let kernels = Gemm::new(driver, request.dtype, request.family)?;
    let layouts = match request.layout {
        Some(layout) => vec![layout],
        None => {
            let all = [Layout::Nt, Layout::Nn, Layout::Tn].into_iter();
            all.filter(|&layout| kernels.variants(layout).next().is_some()).collect()
        }
    };
    let mut table = vec![];
    for (layout, sizes) in layouts.iter().flat_map(|&it| shapes.iter().map(move |&s| (it, s))) {
        table.push(product(driver, request, &kernels, layout, sizes)?);
    }
    Ok(table)
}

fn product(
    driver: &mut dyn Driver,
    request: &Request,
    kernels: &Gemm,
    layout: Layout,
    [m, n, k]: [usize; 3],
) -> Result<Row> {
    let dtype = request.dtype;
    let sizes = [m, n, k].map(|size| size as u64);
    let operations = sizes.iter().try_fold(2u64, |product, &size| product.checked_mul(size));
    let Some(amount) = operations.filter(|&operations| operations > 0) else {
        return Err(impossible(format!("a product of {m} x {n} x {k}")));
    };
    let (output, element_out) = match layout {
        Layout::Nt | Layout::Nn => (Output::Store { addend: None }, element_bytes(dtype)),
        Layout::Tn => (Output::Accumulate, element_bytes(Dtype::F32)),
    };
    let out_bytes = (m * n) as u64 * element_out;
    let bytes = (m * k + n * k) as u64 * element_bytes(dtype) + out_bytes;
    let mut allocations = vec![];
    let plans = Copies::new(driver, bytes, |driver| {
        let a = normals(driver, "A", dtype, m * k)?;
        let b = normals(driver, "B", dtype, n * k)?;
        let out = driver.allocate("out", out_bytes)?;
        driver.fill(StreamId::MAIN, out.address, out_bytes, 0)?;
        allocations.extend([a, b, out]);
        let (a, b, out) = (a.address, b.address, out.address);
        kernels.plan(driver, &Product { layout, m, n, k, a, b, out, output })
    })?;
    let timing = plans.time(driver, request, |driver, plan| plan.launch(driver, StreamId::MAIN))?;
    for allocation in allocations {
        driver.release(allocation)?;
    }
    let work = Work { unit: "flops", amount, formula: "2 M N K" };
    let what = format!("{}, {dtype}", plans.copies[0].variant.kernel);
    Ok(timing.row(what, format!("M={m} N={n} K={k}"), work))
}

fn impossible(what: String) -> Error {
    Error::Usage {
        what: format!("{what} cannot be timed"),
        remedy: "give sizes from 1 to what fits the device's memory".to_string(),
    }
}

// ------------------------------------------------------------------ the lines that people read

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.rows {
            let (scaled, unit) = scaled(row.per_second, row.work.unit);
            writeln!(
                f,
                "{:<36} {:<22} {:>10.1} us  {scaled:>8.2} {unit}",
                row.what, row.shape, row.median_microseconds
            )?;
        }
        let Properties { name, multiprocessors, .. } = &self.machine;
        let (samples, launches) = match self.rows.first() {
            Some(row) => (row.samples, row.launches_per_sample),
            None => (0, 0),
        };
        writeln!(
            f,
            "on {name}, {multiprocessors} multiprocessors; medians of {samples} samples of \
             {launches} launches"
        )
    }
}

/// "3.35 TB/s", "612.00 TFLOP/s", "31.00 GFLOP/s"
fn scaled(per_second: f64, unit: &str) -> (f64, &'static str) {
    match (unit, per_second >= 1e12) {
        ("bytes", true) => (per_second / 1e12, "TB/s"),
        ("bytes", false) => (per_second / 1e9, "GB/s"),
        (_, true) => (per_second / 1e12, "TFLOP/s"),
        (_, false) => (per_second / 1e9, "GFLOP/s"),
    }
}

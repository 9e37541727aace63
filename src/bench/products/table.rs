//! The products of the paper's models, each with the kernel that is chosen for it: how fast they
//! are in a burst, and how fast when one follows the other without an end.
//!
//! A burst is a few tens of milliseconds of one product after a rest. A GPU that multiplies on
//! lowers its clock until it draws no more than it may, so the sustained times come from passes
//! over all products with no pause, 20 ms of each in turn, after one pass that does not count.

use std::fmt;
use std::io::BufRead;
use std::time::Instant;

use serde::Serialize;

use super::{
    Arena, ProductsRequest, SLOT_MICROSECONDS, Stopwatch, Wanted, check_sizes, write_not_reached,
};
use crate::bench::report::Row;
use crate::bench::timing::{Timing, on_cpu};
use crate::config::Dtype;
use crate::cuda::gemm::{Choice, GemmPlan, Layout};
use crate::cuda::peaks::MatmulPeaks;
use crate::cuda::{Driver, Properties};
use crate::error::{Error, Result};
use crate::predict::StepProduct;

/// Of a GPU, unless told otherwise.
const SECONDS: f64 = 90.0;
/// Of all seconds, those after which no further product gets its burst.
const BURST_SHARE: f64 = 0.6;

#[derive(Serialize, Clone, Debug)]
pub struct TableReport {
    pub device: &'static str,
    pub machine: Properties,
    pub dtype: Dtype,
    /// Of the datasheet, dense, if the machine is known.
    pub flops_per_second: Option<f64>,
    pub peak_source: Option<&'static str>,
    pub rows: Vec<TableRow>,
    /// For which no time was left.
    pub not_reached: Vec<Wanted>,
    /// All passes that count, without a pause.
    pub sustained_seconds: f64,
    /// Of each layout, then of all.
    pub means: Vec<Mean>,
}

#[derive(Serialize, Clone, Debug)]
pub struct TableRow {
    #[serde(flatten)]
    pub wanted: Wanted,
    pub kernel: &'static str,
    pub splits: usize,
    pub cluster: usize,
    /// Whether the choice was timed for this product and its epilogue.
    pub tuned: bool,
    pub flops: u64,
    pub burst: Speed,
    pub sustained: Speed,
}

#[derive(Serialize, Clone, Copy, Debug)]
pub struct Speed {
    /// Median.
    pub microseconds: f64,
    pub samples: usize,
    pub teraflops_per_second: f64,
    /// Of a machine whose dense peak is known.
    pub percent_of_peak: Option<f64>,
}

/// Geometric means.
#[derive(Serialize, Clone, Copy, Debug)]
pub struct Mean {
    /// `None`: all.
    pub layout: Option<Layout>,
    pub products: usize,
    pub burst_teraflops_per_second: f64,
    pub sustained_teraflops_per_second: f64,
    pub burst_percent_of_peak: Option<f64>,
    pub sustained_percent_of_peak: Option<f64>,
}

impl Speed {
    fn new(times: Vec<f64>, flops: u64, peak: Option<f64>) -> Self {
        let timing = Timing::new(times, 1);
        let per_second = flops as f64 / timing.median() * 1e6;
        Speed {
            microseconds: timing.median(),
            samples: timing.samples(),
            teraflops_per_second: per_second / 1e12,
            percent_of_peak: peak.map(|peak| 100.0 * per_second / peak),
        }
    }
}

impl Mean {
    fn new(layout: Option<Layout>, rows: &[TableRow], peak: Option<f64>) -> Option<Self> {
        let rows: Vec<&TableRow> = rows
            .iter()
            .filter(|row| layout.is_none_or(|it| it == row.wanted.product.layout))
            .collect();
        let mean = |of: fn(&TableRow) -> &Speed| {
            let logarithm = |row: &&TableRow| of(row).teraflops_per_second.ln();
            (rows.iter().map(logarithm).sum::<f64>() / rows.len() as f64).exp()
        };
        let percent = |teraflops: f64| peak.map(|peak| 100.0 * teraflops * 1e12 / peak);
        let (burst, sustained) = (mean(|row| &row.burst), mean(|row| &row.sustained));
        (!rows.is_empty()).then_some(Mean {
            layout,
            products: rows.len(),
            burst_teraflops_per_second: burst,
            sustained_teraflops_per_second: sustained,
            burst_percent_of_peak: percent(burst),
            sustained_percent_of_peak: percent(sustained),
        })
    }
}

/// A product with its choice, ready to be launched, and the samples of its burst.
struct Timed {
    wanted: Wanted,
    choice: Choice,
    tuned: bool,
    plans: Vec<GemmPlan>,
    burst: Vec<f64>,
}

/// `progress`: told of each burst.
///
/// Errors: those of the machine and of the launches; sizes that cannot be timed; an unknown preset.
pub fn table(
    driver: &mut dyn Driver,
    request: &ProductsRequest,
    mut progress: impl FnMut(&str),
) -> Result<TableReport> {
    let started = Instant::now();
    let dtype = request.dtype();
    let kernels = request.kernels(driver)?;
    let mut not_reached = request.wanted(driver, &kernels)?;
    let count = not_reached.len();
    let arena = Arena::new(driver, dtype, not_reached.iter().map(|it| &it.product))?;
    let limit = request.seconds.unwrap_or(if on_cpu(driver) { 0.0 } else { SECONDS });
    let late = |share: f64| limit > 0.0 && started.elapsed().as_secs_f64() > share * limit;
    let peaks = MatmulPeaks::of(&driver.properties().name);
    let peak = peaks.map(|it| it.flops_per_second(dtype));
    let mut stopwatch = Stopwatch::default();
    let mut timed: Vec<Timed> = vec![];
    while !not_reached.is_empty() && (timed.is_empty() || !late(BURST_SHARE)) {
        let wanted = not_reached.remove(0);
        let product = &wanted.product;
        let StepProduct { layout, epilogue, m, n, k, .. } = *product;
        let choice = kernels.choose(layout, product.output(), product.tiled())?;
        let plans = arena.plans(driver, &kernels, choice, product)?;
        let burst = stopwatch.burst(driver, &plans, request.samples)?;
        let tuned = kernels.is_tuned(layout, product.output(), product.tiled());
        let speed = Speed::new(burst.clone(), product.cost(&choice, dtype).flops, peak);
        let reached = timed.len() + 1;
        progress(&format!(
            "{reached:>3}/{count} {layout} {epilogue:<6} {m:>6} {n:>6} {k:>6} {choice} {speed}"
        ));
        timed.push(Timed { wanted, choice, tuned, plans, burst });
    }

    let slot = |it: &Timed| {
        let microseconds = if on_cpu(driver) { 0.0 } else { SLOT_MICROSECONDS };
        ((microseconds / Timing::new(it.burst.clone(), 1).median()) as usize).max(it.plans.len())
    };
    let pass: Vec<(&[GemmPlan], usize)> =
        timed.iter().map(|it| (it.plans.as_slice(), slot(it))).collect();
    let mut sustained: Vec<Vec<f64>> = vec![vec![]; timed.len()];
    if !on_cpu(driver) {
        stopwatch.time(driver, &pass)?;
    }
    let unpaused = Instant::now();
    while sustained.first().is_some_and(Vec::is_empty) || (limit > 0.0 && !late(1.0)) {
        let times = stopwatch.time(driver, &pass)?;
        sustained.iter_mut().zip(times).for_each(|(all, time)| all.push(time));
    }
    let sustained_seconds = unpaused.elapsed().as_secs_f64();
    driver.synchronize()?;
    drop(pass);

    let rows: Vec<TableRow> = timed
        .into_iter()
        .zip(sustained)
        .map(|(it, sustained)| {
            let flops = it.wanted.product.cost(&it.choice, dtype).flops;
            TableRow {
                wanted: it.wanted,
                kernel: it.choice.variant.kernel,
                splits: it.choice.splits,
                cluster: it.choice.cluster,
                tuned: it.tuned,
                flops,
                burst: Speed::new(it.burst, flops, peak),
                sustained: Speed::new(sustained, flops, peak),
            }
        })
        .collect();
    arena.release(driver)?;
    kernels.release(driver)?;
    let layouts = [Some(Layout::Nt), Some(Layout::Nn), Some(Layout::Tn), None];
    Ok(TableReport {
        device: driver.device(),
        machine: driver.properties().clone(),
        dtype,
        flops_per_second: peak,
        peak_source: peaks.map(|it| it.source),
        means: layouts.into_iter().filter_map(|it| Mean::new(it, &rows, peak)).collect(),
        rows,
        not_reached,
        sustained_seconds,
    })
}

/// Answers each line of `asked`, "nt 4096,2048,1024", with the row of that product's burst; with
/// "sustained" after it, of launches without an end. For a program that times something else in
/// between.
///
/// Errors: a line that is no product; those of the machine and of the launches.
pub fn answer(
    driver: &mut dyn Driver,
    request: &ProductsRequest,
    asked: impl BufRead,
    mut answered: impl FnMut(&Row) -> Result<()>,
) -> Result<()> {
    let dtype = request.dtype();
    let kernels = request.kernels(driver)?;
    let peaks = MatmulPeaks::of(&driver.properties().name);
    let mut stopwatch = Stopwatch::default();
    let mut arena: Option<Arena> = None;
    for line in asked.lines() {
        let line = line.map_err(Error::io("read", "stdin"))?;
        let Line { layout, sizes, sustained } = parse(&line)?;
        check_sizes(sizes)?;
        let product = StepProduct::plain(layout, sizes);
        let found = match arena.take() {
            Some(found) if found.holds(driver, &product) => found,
            small => {
                small.map_or(Ok(()), |small| small.release(driver))?;
                Arena::new(driver, dtype, [&product].into_iter())?
            }
        };
        let choice = kernels.choose(layout, product.output(), sizes)?;
        let plans = found.plans(driver, &kernels, choice, &product)?;
        let time = if sustained { Stopwatch::sustained } else { Stopwatch::burst };
        let times = time(&mut stopwatch, driver, &plans, request.samples)?;
        let mut row = Row::new(product.cost(&choice, dtype), &Timing::new(times, plans.len()));
        row.compare(None, peaks);
        answered(&row)?;
        arena = Some(found);
    }
    driver.synchronize()?;
    arena.map_or(Ok(()), |arena| arena.release(driver))?;
    kernels.release(driver)
}

/// What a line asks for.
struct Line {
    layout: Layout,
    sizes: [usize; 3],
    sustained: bool,
}

fn parse(line: &str) -> Result<Line> {
    let parsed = || {
        let mut words = line.split_whitespace();
        let (layout, sizes) = (words.next()?.parse().ok()?, words.next()?);
        let sizes: Option<Vec<usize>> = sizes.split(',').map(|it| it.parse().ok()).collect();
        let sustained = match [words.next(), words.next()] {
            [None, None] => false,
            [Some("sustained"), None] => true,
            _ => return None,
        };
        Some(Line { layout, sizes: sizes?.try_into().ok()?, sustained })
    };
    parsed().ok_or_else(|| Error::Usage {
        what: format!("the line `{}` names no product", line.trim()),
        remedy: "write a layout and M, N and K, and after them at most `sustained`: \
                 nt 4096,2048,1024"
            .to_string(),
    })
}

// ------------------------------------------------------------------ the lines that people read

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = self.percent_of_peak.map(|it| format!("{it:.1} %")).unwrap_or_default();
        write!(f, "{:>9.1} {:>8.3} {percent:>7}", self.microseconds, self.teraflops_per_second)
    }
}

impl fmt::Display for TableReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<2} {:<6} {:>6} {:>6} {:>6} {:>7}  {:<29} {:>2} {:>5} {:<6} {:>9} {:>8} {:>7} {:>9} \
             {:>8} {:>7}",
            "",
            "with",
            "M",
            "N",
            "K",
            "step",
            "kernel",
            "by",
            "in",
            "",
            "burst us",
            "TFLOP/s",
            "peak",
            "sust. us",
            "TFLOP/s",
            "peak"
        )?;
        for row in &self.rows {
            let StepProduct { layout, epilogue, m, n, k, .. } = row.wanted.product;
            writeln!(
                f,
                "{layout} {epilogue:<6} {m:>6} {n:>6} {k:>6} {:>5.1} %  {:<29} {:>2} {:>5} {:<6} {} {}",
                100.0 * row.wanted.step_share,
                row.kernel,
                row.cluster,
                row.splits,
                if row.tuned { "tuned" } else { "" },
                row.burst,
                row.sustained
            )?;
        }
        writeln!(f)?;
        for mean in &self.means {
            let percent = |it: Option<f64>| it.map(|it| format!(", {it:.1} %")).unwrap_or_default();
            writeln!(
                f,
                "geometric mean of {} {}: burst {:.3} TFLOP/s{}; sustained {:.3} TFLOP/s{}",
                mean.products,
                mean.layout.map_or("products", Layout::name),
                mean.burst_teraflops_per_second,
                percent(mean.burst_percent_of_peak),
                mean.sustained_teraflops_per_second,
                percent(mean.sustained_percent_of_peak)
            )?;
        }
        writeln!(
            f,
            "on {}, {} multiprocessors, {}; medians{}; sustained: {:.1} s without a pause",
            self.machine.name,
            self.machine.multiprocessors,
            self.dtype,
            if self.machine.l2_bytes > 0 { ", L2 cold" } else { "" },
            self.sustained_seconds
        )?;
        if let Some(source) = self.peak_source {
            writeln!(f, "peak: {source}")?;
        }
        write_not_reached(f, &self.not_reached)
    }
}

//! The tuner: every kernel, cluster and number of splits that could make a product, timed in turn
//! with what the training step has after the product, and beside it what the model chose. Its table
//! becomes src/cuda/gemm/tuned.toml.
//!
//! The products come in the order of what they are worth, so that a run which has to stop early has
//! timed the dearest. Candidates far behind after two rounds are left there.

use std::fmt;
use std::time::Instant;

use serde::Serialize;

use super::{Arena, ProductsRequest, Stopwatch, Wanted, write_not_reached};
use crate::bench::timing::{Timing, on_cpu};
use crate::config::Dtype;
use crate::cuda::gemm::tuned::{self, Launched, Table, Timed};
use crate::cuda::gemm::{Choice, Gemm, GemmPlan};
use crate::cuda::peaks::Peaks;
use crate::cuda::{Driver, Properties};
use crate::error::Result;
use crate::predict::{StepProduct, rates};
use crate::version::Program;

/// Of a GPU, unless told otherwise.
const SECONDS: f64 = 180.0;
const ROUNDS: usize = 20;
/// For all rounds of one product after the second, on a GPU.
const PRODUCT_MICROSECONDS: f64 = 500_000.0;
/// Rounds that every candidate is timed in.
const ROUNDS_OF_ALL: usize = 2;
/// How much slower than the best of these rounds a candidate may be to stay in.
const STAYS: f64 = 1.2;
/// The model's choice counts as right up to this loss.
pub const RIGHT_PERCENT: f64 = 1.0;

#[derive(Serialize, Clone, Debug)]
pub struct TuneReport {
    pub device: &'static str,
    pub machine: Properties,
    pub dtype: Dtype,
    pub products: Vec<TunedProduct>,
    /// For which no time was left.
    pub not_reached: Vec<Wanted>,
    pub seconds: f64,
    /// Whose fastest candidate is the model's choice.
    pub same: usize,
    /// Whose fastest candidate is at most 1 % faster than the model's choice.
    pub right: usize,
    /// Geometric mean, and the largest.
    pub mean_loss_percent: f64,
    pub largest_loss_percent: f64,
}

#[derive(Serialize, Clone, Debug)]
pub struct TunedProduct {
    #[serde(flatten)]
    pub wanted: Wanted,
    /// The fastest first; what was left behind after two rounds last.
    pub candidates: Vec<Candidate>,
    /// Where the model's choice is among them.
    pub model: usize,
    /// Of the model's choice: its time over the fastest's, less one.
    pub loss_percent: f64,
}

#[derive(Serialize, Clone, Debug)]
pub struct Candidate {
    #[serde(skip)]
    choice: Choice,
    pub kernel: &'static str,
    pub splits: usize,
    pub cluster: usize,
    /// Median, L2 cold.
    pub microseconds: f64,
    pub samples: usize,
    /// By the model; of machines whose peak is known.
    pub predicted_microseconds: Option<f64>,
}

/// `progress`: told after each product, with all that is known by then; what it returns ends the
/// run.
///
/// Errors: those of the machine and of the launches; sizes that cannot be timed; an unknown preset.
pub fn tune(
    driver: &mut dyn Driver,
    request: &ProductsRequest,
    mut progress: impl FnMut(&TuneReport) -> Result<()>,
) -> Result<TuneReport> {
    let started = Instant::now();
    let dtype = request.dtype();
    let kernels = request.kernels(driver)?;
    let wanted = request.wanted(driver, &kernels)?;
    let arena = Arena::new(driver, dtype, wanted.iter().map(|it| &it.product))?;
    let limit = request.seconds.unwrap_or(if on_cpu(driver) { f64::INFINITY } else { SECONDS });
    let mut stopwatch = Stopwatch::default();
    let mut report = TuneReport {
        device: driver.device(),
        machine: driver.properties().clone(),
        dtype,
        products: vec![],
        not_reached: wanted,
        seconds: 0.0,
        same: 0,
        right: 0,
        mean_loss_percent: 0.0,
        largest_loss_percent: 0.0,
    };
    while !report.not_reached.is_empty() && started.elapsed().as_secs_f64() < limit {
        let wanted = report.not_reached.remove(0);
        let tuned = product_of(driver, request, &kernels, &arena, &mut stopwatch, wanted)?;
        report.products.push(tuned);
        report.seconds = started.elapsed().as_secs_f64();
        report.count();
        progress(&report)?;
    }
    driver.synchronize()?;
    arena.release(driver)?;
    kernels.release(driver)?;
    Ok(report)
}

/// Numbers of splits to try, of `most`: all small ones, and steps of a third above.
fn split_counts(most: usize) -> Vec<usize> {
    let thirds = |power: u32| [2usize << power, 3usize << power];
    let mut all: Vec<usize> = [1].into_iter().chain((0..16).flat_map(thirds)).collect();
    all.retain(|&splits| splits < most);
    all.push(most);
    all
}

/// All candidates for a product, the model's choice among them.
fn candidates(kernels: &Gemm, driver: &dyn Driver, product: &StepProduct) -> Result<Vec<Choice>> {
    let (layout, output, sizes) = (product.layout, product.output(), product.tiled());
    let multiprocessors = driver.properties().multiprocessors as usize;
    let mut all = vec![kernels.by_cost_model(layout, output, sizes)?];
    for variant in kernels.variants_for(layout, output) {
        for &cluster in variant.clusters() {
            // A cluster without a second row of tiles would do the work twice.
            if cluster > multiprocessors || cluster > 1 && sizes[0] <= variant.rows {
                continue;
            }
            let most = variant.most_splits(sizes, cluster, multiprocessors);
            let choices =
                split_counts(most).into_iter().map(|splits| Choice { variant, splits, cluster });
            all.extend(choices.filter(|it| *it != all[0]).collect::<Vec<_>>());
        }
    }
    Ok(all)
}

fn product_of(
    driver: &mut dyn Driver,
    request: &ProductsRequest,
    kernels: &Gemm,
    arena: &Arena,
    stopwatch: &mut Stopwatch,
    wanted: Wanted,
) -> Result<TunedProduct> {
    let product = &wanted.product;
    let choices = candidates(kernels, driver, product)?;
    let plans = choices.iter().map(|&choice| arena.plans(driver, kernels, choice, product));
    let plans: Vec<Vec<GemmPlan>> = plans.collect::<Result<_>>()?;
    let mut times: Vec<Vec<f64>> = vec![vec![]; choices.len()];

    let all: Vec<usize> = (0..choices.len()).collect();
    let asked = request.samples.unwrap_or(if on_cpu(driver) { 1 } else { ROUNDS });
    let first = asked.min(ROUNDS_OF_ALL);
    rounds(driver, stopwatch, &plans, &all, first, &mut times)?;

    let fastest = |times: &[f64]| times.iter().copied().fold(f64::INFINITY, f64::min);
    let best = times.iter().map(|it| fastest(it)).fold(f64::INFINITY, f64::min);
    // The model's choice, which is the first, stays: its loss is asked for.
    let near = |&i: &usize| i == 0 || fastest(&times[i]) <= STAYS * best;
    let near: Vec<usize> = all.into_iter().filter(near).collect();
    let round: f64 = near.iter().map(|&i| fastest(&times[i]) * plans[i].len() as f64).sum();
    let more = match request.samples {
        Some(_) => asked - first,
        None => (asked - first).min((PRODUCT_MICROSECONDS / round) as usize),
    };
    rounds(driver, stopwatch, &plans, &near, more, &mut times)?;

    let dtype = request.dtype();
    let peaks = Peaks::of(&driver.properties().name);
    let multiprocessors = driver.properties().multiprocessors as usize;
    let candidate = |(choice, times): (Choice, Vec<f64>)| {
        let bytes = product.cost(&choice, dtype).bytes;
        let predicted = |peaks: &Peaks| {
            let rates = rates(peaks, dtype);
            1e6 * choice.seconds(product.tiled(), bytes, multiprocessors, rates)
        };
        let timing = Timing::new(times, 1);
        Candidate {
            choice,
            kernel: choice.variant.kernel,
            splits: choice.splits,
            cluster: choice.cluster,
            microseconds: timing.median(),
            samples: timing.samples(),
            predicted_microseconds: peaks.map(predicted),
        }
    };
    let model = choices[0];
    let mut candidates: Vec<Candidate> = choices.into_iter().zip(times).map(candidate).collect();
    // What was left behind, with fewer samples, comes last.
    candidates
        .sort_by(|a, b| b.samples.cmp(&a.samples).then(a.microseconds.total_cmp(&b.microseconds)));
    let model = candidates.iter().position(|it| it.choice == model).unwrap_or(0);
    let loss = candidates[model].microseconds / candidates[0].microseconds - 1.0;
    Ok(TunedProduct { wanted, candidates, model, loss_percent: 100.0 * loss })
}

/// So many rounds, each of which times each of the candidates `of` once; every other one from the
/// last to the first.
fn rounds(
    driver: &mut dyn Driver,
    stopwatch: &mut Stopwatch,
    plans: &[Vec<GemmPlan>],
    of: &[usize],
    count: usize,
    times: &mut [Vec<f64>],
) -> Result<()> {
    let mut order: Vec<usize> = vec![];
    for round in 0..count {
        match round % 2 {
            0 => order.extend(of),
            _ => order.extend(of.iter().rev()),
        }
    }
    let sequences: Vec<(&[GemmPlan], usize)> =
        order.iter().map(|&i| (plans[i].as_slice(), plans[i].len())).collect();
    let found = stopwatch.time(driver, &sequences)?;
    order.iter().zip(found).for_each(|(&i, time)| times[i].push(time));
    Ok(())
}

// ------------------------------------------------------------------ what comes of it

impl TunedProduct {
    fn timed(&self) -> Timed {
        let launched = |it: &Candidate| Launched {
            kernel: it.kernel.to_string(),
            splits: it.splits,
            cluster: it.cluster,
            microseconds: it.microseconds,
        };
        let best = &self.candidates[0];
        let StepProduct { layout, epilogue, m, n, k, .. } = self.wanted.product;
        Timed {
            family: best.choice.variant.family,
            layout,
            epilogue,
            m,
            n,
            k,
            best: launched(best),
            model: launched(&self.candidates[self.model]),
        }
    }
}

impl TuneReport {
    fn count(&mut self) {
        let all = &self.products;
        self.same = all.iter().filter(|it| it.model == 0).count();
        self.right = all.iter().filter(|it| it.loss_percent <= RIGHT_PERCENT).count();
        let logarithms = all.iter().map(|it| (it.loss_percent / 100.0).ln_1p()).sum::<f64>();
        self.mean_loss_percent = 100.0 * (logarithms / all.len().max(1) as f64).exp_m1();
        self.largest_loss_percent = all.iter().map(|it| it.loss_percent).fold(0.0, f64::max);
    }

    /// What tuned.toml takes.
    pub fn table(&self) -> Table {
        let machine = tuned::Machine {
            name: self.machine.name.clone(),
            multiprocessors: self.machine.multiprocessors as usize,
            driver: self.machine.driver_version.clone(),
            commit: Program::this().commit_words().unwrap_or_default(),
            products: self.products.iter().map(TunedProduct::timed).collect(),
        };
        Table { machines: vec![machine] }
    }

    /// Of the product that came last.
    pub fn progress(&self) -> String {
        let reached = self.products.len();
        let all = reached + self.not_reached.len();
        let product = self.products.last().map(ToString::to_string).unwrap_or_default();
        format!("{reached:>3}/{all} {:>4.0} s  {product}", self.seconds)
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Candidate { kernel, splits, cluster, microseconds, .. } = self;
        write!(f, "{kernel:<29} by {cluster} in {splits:>2} {microseconds:>9.1} us")
    }
}

impl fmt::Display for TunedProduct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StepProduct { layout, epilogue, m, n, k, .. } = self.wanted.product;
        write!(
            f,
            "{layout} {epilogue:<6} {m:>6} {n:>6} {k:>6} {:>5.1} %  model {}  best of {:>2} {}  \
             loss {:>5.1} %",
            100.0 * self.wanted.step_share,
            self.candidates[self.model],
            self.candidates.len(),
            self.candidates[0],
            self.loss_percent
        )
    }
}

impl fmt::Display for TuneReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TuneReport { products, not_reached, same, right, .. } = self;
        products.iter().try_for_each(|product| writeln!(f, "{product}"))?;
        let cold = if self.machine.l2_bytes > 0 { ", L2 cold" } else { "" };
        writeln!(
            f,
            "{} products in {:.0} s on {}, {} multiprocessors; medians{cold}",
            products.len(),
            self.seconds,
            self.machine.name,
            self.machine.multiprocessors
        )?;
        writeln!(
            f,
            "the model's choice was the fastest of {same}, and within {RIGHT_PERCENT} % of the \
             fastest for {right}; it loses {:.2} % in the geometric mean, {:.1} % at most",
            self.mean_loss_percent, self.largest_loss_percent
        )?;
        write_not_reached(f, not_reached)
    }
}

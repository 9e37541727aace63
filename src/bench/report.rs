//! What a benchmark found: the JSON that other programs join, and the lines that people read.

use std::fmt;

use serde::Serialize;

use super::launched::FamilyShare;
use super::timing::Timing;
use crate::config::Dtype;
use crate::cuda::peaks::MatmulPeaks;
use crate::cuda::{Fusion, Properties};
use crate::predict::Sizes;
use crate::predict::cost::Cost;
use crate::sensors::Conditions;
use crate::throughput::MemoryUse;
use crate::version::Program;

#[derive(Serialize, Debug)]
pub struct Report {
    pub benchmark: &'static str,
    pub program: Program,
    pub device: &'static str,
    pub machine: Properties,
    /// The ceiling of bytes: a copy of a large buffer on the device, timed in this run. `None`: no
    /// row counts bytes.
    pub copy: Option<Row>,
    /// Where the ceilings of FLOPs come from, if the machine is known.
    pub peak_source: Option<&'static str>,
    pub rows: Vec<Row>,
}

#[derive(Serialize, Clone, Debug)]
pub struct Row {
    /// "norm_forward"
    pub op: &'static str,
    pub dtype: Dtype,
    pub sizes: Sizes,
    /// "norm_backward, bf16, rms, residual"; of a product, its kernel and type.
    pub what: String,
    /// The sizes in words: "T=8192 C=4096"
    pub shape: String,
    /// How many samples, and launches in each.
    pub samples: usize,
    pub launches_per_sample: usize,
    pub median_microseconds: f64,
    pub fastest_microseconds: f64,
    pub work: Work,
    /// Of the median: bytes or floating-point operations in a second.
    pub per_second: f64,
    /// `per_second` as a share of the copy's; of rows that count bytes.
    pub percent_of_copy: Option<f64>,
    /// `per_second` as a share of the machine's dense peak, if that is known; of rows that count
    /// FLOPs. Of a training step this is MFU.
    pub percent_of_peak: Option<f64>,
    /// Of attention with a backward pass: how that goes over the scores.
    pub variant: Option<&'static str>,
    /// Of a product with an epilogue.
    pub over_plain: Option<OverPlain>,
    #[serde(flatten)]
    pub step: Option<StepDetails>,
}

/// An epilogue costs so much: the two were timed in turn, on the same factors.
#[derive(Serialize, Clone, PartialEq, Debug)]
pub struct OverPlain {
    /// The kernel that only stores, of the same tile.
    pub kernel: &'static str,
    pub median_microseconds: f64,
    /// Of its time, what the product takes longer.
    pub percent: f64,
}

impl OverPlain {
    pub(super) fn new(kernel: &'static str, with: &Timing, without: &Timing) -> Self {
        let plain = without.median();
        let percent = 100.0 * (with.median() / plain - 1.0);
        OverPlain { kernel, median_microseconds: plain, percent }
    }
}

/// What only a training step has.
#[derive(Serialize, Clone, Debug)]
pub struct StepDetails {
    pub tokens_per_second: f64,
    /// The fusions that were left out.
    pub without: Vec<Fusion>,
    /// Of the time of steps with all of them, before and after, what this one takes longer; of the
    /// one after, what it takes longer than the one before.
    pub percent_over_fused: Option<f64>,
    /// Of steps that were launched kernel by kernel, with events in between; together more than the
    /// median. Of steps with all fusions.
    pub families: Vec<FamilyShare>,
    pub memory: MemoryUse,
    /// While the steps were timed, if the device tells.
    pub conditions: Option<Conditions>,
}

/// What one launch does.
#[derive(Serialize, Clone, PartialEq, Debug)]
pub struct Work {
    pub unit: Unit,
    pub amount: u64,
    /// How the amount comes about.
    pub formula: &'static str,
}

#[derive(Serialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    Bytes,
    Flops,
}

/// What has been timed so far, and who is told of each row when it is: a run that is ended early
/// has shown what it measured.
pub(super) struct TimedRows<'a> {
    pub rows: Vec<Row>,
    pub told: &'a mut dyn FnMut(&Row),
}

impl TimedRows<'_> {
    pub fn push(&mut self, row: Row) {
        (self.told)(&row);
        self.rows.push(row);
    }
}

impl Row {
    /// Counts what its cost has: FLOPs if there are any, else bytes.
    pub(super) fn new(cost: Cost, timing: &Timing) -> Self {
        let work = match cost.flops {
            0 => Work { unit: Unit::Bytes, amount: cost.bytes, formula: cost.bytes_formula },
            flops => Work { unit: Unit::Flops, amount: flops, formula: cost.flops_formula },
        };
        Row {
            op: cost.op,
            dtype: cost.dtype,
            shape: cost.sizes.to_string(),
            sizes: cost.sizes,
            what: cost.what,
            samples: timing.samples(),
            launches_per_sample: timing.launches_per_sample,
            median_microseconds: timing.median(),
            fastest_microseconds: timing.fastest(),
            per_second: work.amount as f64 / timing.median() * 1e6,
            work,
            percent_of_copy: None,
            percent_of_peak: None,
            variant: None,
            over_plain: None,
            step: None,
        }
    }

    /// Compares with the ceiling of its unit, as far as there is one.
    pub fn compare(&mut self, copy: Option<&Row>, peaks: Option<&MatmulPeaks>) {
        let percent = |ceiling: f64| 100.0 * self.per_second / ceiling;
        match self.work.unit {
            Unit::Bytes => self.percent_of_copy = copy.map(|copy| percent(copy.per_second)),
            Unit::Flops => {
                self.percent_of_peak = peaks.map(|it| percent(it.flops_per_second(self.dtype)));
            }
        }
    }

    /// `what`, `shape`: the widths of these columns.
    fn write(&self, f: &mut fmt::Formatter<'_>, what: usize, shape: usize) -> fmt::Result {
        let (scaled, unit) = scaled(self.per_second, self.work.unit);
        let microseconds = self.median_microseconds;
        write!(f, "{:<what$}  {:<shape$} {microseconds:>12.1} us", self.what, self.shape)?;
        write!(f, " {scaled:>8.2} {unit:<7}")?;
        self.variant.map_or(Ok(()), |variant| write!(f, " {variant}"))
    }
}

/// Without what other rows say of it.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, 0, 0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = || self.copy.iter().chain(&self.rows);
        let width = |text: fn(&Row) -> &str| rows().map(|row| text(row).len()).max().unwrap_or(0);
        let (what, shape) = (width(|row| &row.what), width(|row| &row.shape));
        for row in rows() {
            row.write(f, what, shape)?;
            let of_peak = if row.op == "step" { "% MFU" } else { "% of peak" };
            match (row.percent_of_copy, row.percent_of_peak) {
                (Some(percent), _) => write!(f, " {percent:>5.1} % of copy")?,
                (None, Some(percent)) => write!(f, " {percent:>5.1} {of_peak}")?,
                (None, None) => {}
            }
            if let Some(over) = &row.over_plain {
                write!(f, "  {:+.1} % over {}", over.percent, over.kernel)?;
            }
            if let Some(step) = &row.step {
                write!(f, "  {:.0} tokens/s", step.tokens_per_second)?;
                if let Some(percent) = step.percent_over_fused {
                    write!(f, "  {percent:+.1} % over all fusions")?;
                }
            }
            writeln!(f)?;
        }
        for row in &self.rows {
            row.step.iter().try_for_each(|step| write_step(f, row, step))?;
        }
        let Properties { name, multiprocessors, .. } = &self.machine;
        let samples = self.rows.first().map_or(0, |row| row.samples);
        let cold = if self.machine.l2_bytes > 0 { ", L2 cold" } else { "" };
        writeln!(
            f,
            "on {name}, {multiprocessors} multiprocessors; medians of {samples} samples{cold}"
        )?;
        if let Some(step) = self.rows.iter().find(|row| row.step.is_some()) {
            writeln!(f, "FLOPs of a step = tokens * ({})", step.work.formula)?;
            if step.percent_of_peak.is_some() {
                writeln!(f, "MFU = FLOPs / time / peak")?;
            }
        }
        match self.peak_source {
            Some(source) => writeln!(f, "peak: {source}"),
            None => Ok(()),
        }
    }
}

/// What takes how long, beside the whole; memory beside its plan; the device's own words.
fn write_step(f: &mut fmt::Formatter<'_>, row: &Row, step: &StepDetails) -> fmt::Result {
    if step.families.is_empty() {
        return Ok(());
    }
    let sum: f64 = step.families.iter().map(|it| it.microseconds).sum();
    writeln!(f, "\n{:<24} {:>8} {:>12} {:>8}", "kernels of a step", "launches", "us", "of sum")?;
    for FamilyShare { family, launches, microseconds } in &step.families {
        let share = 100.0 * microseconds / sum;
        writeln!(f, "{family:<24} {launches:>8} {microseconds:>12.1} {share:>6.1} %")?;
    }
    let launches: usize = step.families.iter().map(|it| it.launches).sum();
    writeln!(f, "{:<24} {launches:>8} {sum:>12.1}", "together, one by one")?;
    writeln!(f, "{:<24} {:>8} {:>12.1}", "a whole step", "", row.median_microseconds)?;
    writeln!(f, "{}", step.memory)?;
    step.conditions.iter().try_for_each(|conditions| writeln!(f, "{conditions}"))
}

/// "3.35 TB/s", "612.00 TFLOP/s", "31.00 GFLOP/s"
fn scaled(per_second: f64, unit: Unit) -> (f64, &'static str) {
    match (unit, per_second >= 1e12) {
        (Unit::Bytes, true) => (per_second / 1e12, "TB/s"),
        (Unit::Bytes, false) => (per_second / 1e9, "GB/s"),
        (Unit::Flops, true) => (per_second / 1e12, "TFLOP/s"),
        (Unit::Flops, false) => (per_second / 1e9, "GFLOP/s"),
    }
}

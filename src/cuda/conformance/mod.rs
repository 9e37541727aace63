//! What each wrapper of kernels/ does: tiny kernels, known inputs, and the outputs they must give.
//!
//! A [`Case`] is one launch of one kernel of kernels/conformance.cu or conformance_sm80.cu.
//! `Case::expected` comes from whole-array formulas in plain Rust, written after the PTX ISA and
//! not after the CPU machine. The [`Goldens`], committed and compiled in, are what every machine
//! must give; each says whether a GPU recorded it or the formula wrote it.
//!
//! [`replay`] runs cases on a machine and compares; [`record`] makes a GPU's goldens. A kernel that
//! faults takes a GPU's context with it: both then stop, and the report has the rest.

mod copies;
mod goldens;
mod matrices;
mod tensors;
mod warp;
mod watch;

pub use goldens::{Golden, Goldens};
pub use watch::Watch;

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::{
    Allocation, Arguments, Driver, Fill, L2Promotion, Launch, Properties, StreamId, Swizzle,
    TensorMapSpec, TensorType,
};
use crate::error::{Error, Result};
use crate::random::Philox;

/// What the kernels fill shared memory with before a copy.
const UNTOUCHED: u32 = 0xa5a5_a5a5;
/// Words after each tile that a copy must leave alone.
const MARGIN: usize = 4;

/// One launch: `kernel(out, inp)`, or `kernel(out, inp, map)`.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub kernel: String,
    pub needs: Needs,
    pub blocks: u32,
    pub threads: u32,
    /// Blocks of a cluster.
    pub cluster: u32,
    pub dynamic_shared_bytes: u32,
    pub cooperative: bool,
    pub inp: Vec<u32>,
    /// `out` before the launch.
    pub initial: Vec<u32>,
    pub map: Option<Map>,
    /// `out` after it, by the formula.
    pub expected: Vec<u32>,
    pub tolerance: Tolerance,
}

/// The GPU that has the instructions of a case, and the file of its kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Needs {
    /// conformance_sm80.cu
    Sm80,
    /// conformance.cu, which is for compute capability 9.0 only.
    Sm90a,
}

/// A tensor in `inp` or `out`, its rows padded, and the box of its map.
#[derive(Clone, Debug)]
pub struct Map {
    pub in_out: bool,
    pub offset_bytes: u64,
    pub data_type: TensorType,
    pub dimensions: Vec<u64>,
    pub stride_bytes: Vec<u64>,
    pub box_dimensions: Vec<u32>,
    pub swizzle: Swizzle,
}

/// How far two machines may differ in one word of `out`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Tolerance {
    /// The same bits.
    Exact,
    /// f32: |difference| <= absolute + relative |expected|; what is not finite has the same bits.
    Float { relative: f64, absolute: f64 },
}

/// All cases, in the order of the kernel files.
pub fn cases() -> Vec<Case> {
    [warp::cases(), matrices::cases(), copies::cases(), tensors::cases()].concat()
}

/// Those of these names, or all; of them, that one and what stands after it. Errors: no such case.
pub fn chosen(names: &[String], from: Option<&str>) -> Result<Vec<Case>> {
    let mut all = cases();
    for name in names.iter().map(String::as_str).chain(from) {
        if !all.iter().any(|case| case.name == name) {
            return Err(Error::Usage {
                what: format!("there is no case {name}"),
                remedy: "`isobath conformance` names each case before it runs".to_string(),
            });
        }
    }
    let first = all.iter().position(|case| from == Some(case.name.as_str())).unwrap_or(0);
    all.drain(..first);
    all.retain(|case| names.is_empty() || names.contains(&case.name));
    Ok(all)
}

// ------------------------------------------------------------------ running

impl Case {
    /// The kernel is conform_`name`; one block, nothing special.
    fn new(name: &str, needs: Needs, threads: u32, inp: Vec<u32>, expected: Vec<u32>) -> Self {
        Case {
            name: name.to_string(),
            kernel: format!("conform_{name}"),
            needs,
            blocks: 1,
            threads,
            cluster: 1,
            dynamic_shared_bytes: 0,
            cooperative: false,
            inp,
            initial: vec![UNTOUCHED; expected.len()],
            map: None,
            expected,
            tolerance: Tolerance::Exact,
        }
    }

    /// Whether a machine of this compute capability has the kernel.
    pub fn runs_on(&self, (major, minor): (u32, u32)) -> bool {
        match self.needs {
            Needs::Sm80 => major >= 8,
            Needs::Sm90a => (major, minor) == (9, 0),
        }
    }

    /// `out` after a launch on this machine. Errors: those of the driver.
    pub fn run(&self, driver: &mut dyn Driver) -> Result<Vec<u32>> {
        let out = driver.upload("out", &self.initial)?;
        let inp = match driver.upload("inp", &self.inp) {
            Ok(inp) => inp,
            Err(error) => {
                driver.release(out)?;
                return Err(error);
            }
        };
        let result = self.launch(driver, out, inp);
        // A failed launch is the news, not what it does to the clean-up.
        let released = driver.release(inp).and(driver.release(out));
        result.and_then(|words| released.map(|()| words))
    }

    fn launch(
        &self,
        driver: &mut dyn Driver,
        out: Allocation,
        inp: Allocation,
    ) -> Result<Vec<u32>> {
        let kernel = driver.kernel(&self.kernel)?;
        let mut arguments = Arguments::new().with(out).with(inp);
        if let Some(map) = &self.map {
            let buffer = if map.in_out { out } else { inp };
            arguments = arguments.with(driver.tensor_map(&map.spec(buffer))?);
        }
        let launch = Launch {
            cluster: [self.cluster, 1, 1],
            dynamic_shared_bytes: self.dynamic_shared_bytes,
            cooperative: self.cooperative,
            ..Launch::new(kernel, [self.blocks, 1, 1], [self.threads, 1, 1])
        };
        driver.launch(&launch, &arguments)?;
        driver.synchronize()?;
        let mut words = vec![0u32; self.initial.len()];
        driver.to_host(StreamId::MAIN, out.address, bytemuck::cast_slice_mut(&mut words))?;
        Ok(words)
    }

    /// Errors: the word that is furthest off.
    pub fn compare(&self, expected: &[u32], found: &[u32]) -> std::result::Result<(), Mismatch> {
        if expected.len() != found.len() {
            return Err(Mismatch::Length { expected: expected.len(), found: found.len() });
        }
        let used: Vec<f64> = expected
            .iter()
            .zip(found)
            .map(|(&want, &have)| self.tolerance.used(want, have))
            .collect();
        let wrong = used.iter().filter(|&&used| used > 1.0).count();
        if wrong == 0 {
            return Ok(());
        }
        // The first of the worst.
        let worst = (0..used.len()).rev().max_by(|&a, &b| used[a].total_cmp(&used[b]));
        let word = worst.unwrap_or_default();
        Err(Mismatch::Word {
            word,
            expected: expected[word],
            found: found[word],
            used_tolerance: used[word],
            wrong,
            words: used.len(),
        })
    }
}

impl Map {
    fn spec(&self, buffer: Allocation) -> TensorMapSpec<'_> {
        TensorMapSpec {
            data_type: self.data_type,
            address: buffer.address.offset(self.offset_bytes),
            dimensions: &self.dimensions,
            stride_bytes: &self.stride_bytes,
            box_dimensions: &self.box_dimensions,
            swizzle: self.swizzle,
            l2_promotion: L2Promotion::None,
            fill: Fill::Zeros,
        }
    }
}

impl Tolerance {
    /// The fraction of the tolerance that `found` uses; above 1 it is wrong.
    pub fn used(self, expected: u32, found: u32) -> f64 {
        if expected == found {
            return 0.0;
        }
        let (want, have) = (f32::from_bits(expected), f32::from_bits(found));
        match self {
            Tolerance::Float { relative, absolute } if want.is_finite() && have.is_finite() => {
                let (want, have) = (f64::from(want), f64::from(have));
                (want - have).abs() / (absolute + relative * want.abs())
            }
            Tolerance::Float { .. } | Tolerance::Exact => f64::INFINITY,
        }
    }
}

/// Why an output is not the expected one.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(untagged)]
pub enum Mismatch {
    Length {
        expected: usize,
        found: usize,
    },
    Word {
        word: usize,
        expected: u32,
        found: u32,
        /// Infinite (in JSON: null) where the bits had to agree.
        used_tolerance: f64,
        wrong: usize,
        words: usize,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Mismatch::Length { expected, found } => {
                write!(f, "{found} words, expected {expected}")
            }
            Mismatch::Word { word, expected, found, used_tolerance, wrong, words } => {
                write!(
                    f,
                    "{wrong} of {words} words differ; word {word} is {found:#010x} ({:e}), \
                     expected {expected:#010x} ({:e})",
                    f32::from_bits(found),
                    f32::from_bits(expected),
                )?;
                if used_tolerance.is_finite() {
                    write!(f, ", {used_tolerance:.2} times the tolerance")?;
                }
                Ok(())
            }
        }
    }
}

// ------------------------------------------------------------------ replaying and recording

/// What a machine did with the cases.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// "cuda" or "simt"
    pub device: String,
    /// "NVIDIA H200"
    pub name: String,
    pub passed: usize,
    pub failed: Vec<Failure>,
    /// Cases whose instructions this machine lacks.
    pub skipped: Vec<String>,
    /// Cases after one that took the machine with it: the rest, for another process.
    pub not_reached: Vec<String>,
    /// Goldens that a GPU recorded, and that a formula wrote, of the cases that ran.
    pub against_recorded: usize,
    pub against_formula: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    pub case: String,
    /// In words.
    pub why: String,
    /// `None`: it did not run to its end.
    pub mismatch: Option<Mismatch>,
    /// Whose output it was compared with.
    pub golden: String,
}

/// The case that is about to run, the golden that it is compared with, all goldens as they are
/// then, and what all cases before it did.
pub type Progress<'a> = &'a mut dyn FnMut(&Case, &Golden, &Goldens, &Report);

/// Runs those of the cases that this machine can run and compares each with its golden.
///
/// A case that fails does not end the replay, unless the machine fails with it. Errors: a case
/// without a golden.
pub fn replay(
    driver: &mut dyn Driver,
    cases: Vec<Case>,
    goldens: &Goldens,
    progress: Progress,
) -> Result<Report> {
    let mut report = Report::of(driver, &cases);
    for case in cases {
        let golden = goldens.of(&case.name)?;
        if !report.begins(driver, &case) {
            continue;
        }
        if golden.is_recorded() {
            report.against_recorded += 1;
        } else {
            report.against_formula += 1;
        }
        progress(&case, golden, goldens, &report);
        let found = case.run(driver).map_err(|error| error.to_string());
        report.compare(&case, golden, &found);
        if found.is_err() && driver.synchronize().is_err() {
            break;
        }
    }
    Ok(report)
}

/// Runs the cases on a GPU and keeps what came out as the golden, marked with the GPU, its driver
/// and `date`. What it cannot run, what fails and what gives two results in two runs keeps the
/// golden of `before`.
///
/// The report compares with the formulas: a case in `failed` that ran is recorded too, and one of
/// formula, kernel and device/ is wrong. Errors: not a GPU.
pub fn record(
    driver: &mut dyn Driver,
    cases: Vec<Case>,
    before: &Goldens,
    date: &str,
    progress: Progress,
) -> Result<(Goldens, Report)> {
    if driver.device() != "cuda" {
        return Err(Error::Usage {
            what: format!("goldens are recorded on a GPU, not on {}", driver.device()),
            remedy: "use --device cuda, or --formulas to write those of the formulas".to_string(),
        });
    }
    let mut report = Report::of(driver, &cases);
    let Properties { name, driver_version, .. } = driver.properties();
    let source = format!("{name}, CUDA driver {driver_version}, {date}");
    let mut goldens = before.clone();
    for case in cases {
        if !report.begins(driver, &case) {
            continue;
        }
        report.against_formula += 1;
        let formula = Golden { source: Golden::FORMULA.to_string(), out: case.expected.clone() };
        progress(&case, &formula, &goldens, &report);
        let found = case.run_twice(driver);
        report.compare(&case, &formula, &found);
        match found {
            Ok(out) => goldens.insert(&case.name, Golden { source: source.clone(), out }),
            Err(_) if driver.synchronize().is_err() => break,
            Err(_) => {}
        }
    }
    Ok((goldens, report))
}

impl Case {
    /// Errors, in words: those of the driver; a golden cannot depend on luck.
    fn run_twice(&self, driver: &mut dyn Driver) -> std::result::Result<Vec<u32>, String> {
        let mut run = || self.run(driver).map_err(|error| error.to_string());
        let (out, again) = (run()?, run()?);
        match self.compare(&out, &again) {
            _ if out == again => Ok(out),
            Err(mismatch) => Err(format!("two results in two runs: {mismatch}")),
            Ok(()) => Err("two results in two runs, both within the tolerance".to_string()),
        }
    }
}

impl Report {
    /// Nothing has run.
    fn of(driver: &dyn Driver, cases: &[Case]) -> Self {
        Report {
            device: driver.device().to_string(),
            name: driver.properties().name.clone(),
            passed: 0,
            failed: vec![],
            skipped: vec![],
            not_reached: cases.iter().map(|case| case.name.clone()).collect(),
            against_recorded: 0,
            against_formula: 0,
        }
    }

    /// The next case; whether this machine has it.
    fn begins(&mut self, driver: &dyn Driver, case: &Case) -> bool {
        self.not_reached.retain(|name| *name != case.name);
        let runs = case.runs_on(driver.properties().compute_capability);
        if !runs {
            self.skipped.push(case.name.clone());
        }
        runs
    }

    fn compare(
        &mut self,
        case: &Case,
        golden: &Golden,
        found: &std::result::Result<Vec<u32>, String>,
    ) {
        match found.as_ref().map(|found| case.compare(&golden.out, found)) {
            Ok(Ok(())) => self.passed += 1,
            Ok(Err(mismatch)) => {
                self.fails(case, mismatch.to_string(), Some(mismatch), &golden.source);
            }
            Err(why) => self.fails(case, why.clone(), None, &golden.source),
        }
    }

    /// What it was asked for has no end: nothing else can be asked of this machine.
    fn hangs(&mut self, case: &Case, limit: Duration, golden: &str) {
        let why = format!("did not end within {} s", limit.as_secs_f64());
        self.fails(case, why, None, golden);
    }

    fn fails(&mut self, case: &Case, why: String, mismatch: Option<Mismatch>, golden: &str) {
        let (case, golden) = (case.name.clone(), golden.to_string());
        self.failed.push(Failure { case, why, mismatch, golden });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Failure { case, why, golden, .. } in &self.failed {
            writeln!(f, "{case}: {why} (golden: {golden})")?;
        }
        let Report { name, passed, failed, skipped, against_recorded, against_formula, .. } = self;
        write!(
            f,
            "{name}: {passed} cases passed, {} failed, {} skipped; {against_recorded} against \
             recorded goldens, {against_formula} against formulas",
            failed.len(),
            skipped.len(),
        )?;
        let Some(next) = self.not_reached.first() else { return Ok(()) };
        write!(f, "; {} not reached: go on with --from \"{next}\"", self.not_reached.len())
    }
}

// ------------------------------------------------------------------ inputs

/// The numbers of one case, always the same.
struct Inputs(Philox);

impl Inputs {
    /// Of the stream that this name stands for (FNV-1a, 64 bits).
    fn of(name: &str) -> Self {
        let stream = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Inputs(Philox::new(0x150_ba74, stream))
    }

    fn words(&self, count: usize) -> Vec<u32> {
        (0..count.div_ceil(4) as u64).flat_map(|block| self.0.at(block)).take(count).collect()
    }

    fn below(&self, count: usize, end: u32) -> Vec<u32> {
        self.words(count).into_iter().map(|word| word % end).collect()
    }

    /// From -most to most.
    fn integers(&self, count: usize, most: i32) -> Vec<i32> {
        let values = 2 * most as u32 + 1;
        self.below(count, values).into_iter().map(|word| word as i32 - most).collect()
    }

    fn normals(&self, count: usize) -> Vec<f32> {
        let mut values = vec![0f32; count];
        self.0.fill_normal(0, &mut values);
        values
    }

    fn uniform(&self, count: usize, from: f64, to: f64) -> Vec<f32> {
        (0..count as u64).map(|i| (from + (to - from) * self.0.uniform_f64(i)) as f32).collect()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Two bf16 in one word, the first in the lower half.
fn pair(low: half::bf16, high: half::bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

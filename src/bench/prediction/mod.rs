//! How fast a training step can be at best: its kernels, their bytes and FLOPs, and the least time
//! that a machine needs for them; and how fast it is expected to be (expected.rs). No device is
//! asked.
//!
//! The kernels are those that launches.rs lists. A kernel takes at least as long as its bytes take
//! through memory, its products on the tensor cores, its exponentials on the special function units,
//! and what it has in host memory over the link; kernels run one after another, without gaps.

use std::fmt;

use serde::Serialize;

pub mod machine_plan;
pub mod shapes;

mod expected;
mod launches;

use expected::Expected;
use launches::launches_of_a_step;

use super::cost::{Cost, KernelFamily};
use super::sizes::Sizes;
use crate::config::{Config, Dtype};
use crate::cuda::gemm::{Ending, Layout, Rates};
use crate::cuda::peaks::{H200, Peaks};
use crate::cuda::{Fusion, Fusions, attention};
use crate::error::{Error, Result};
use crate::plan::{FLOPS_FORMULA, PlanReport};

/// What a copy and a product of 8192 cubed reached on this machine.
const H200_MEASURED_BYTES_PER_SECOND: f64 = 4.3e12;
const H200_MEASURED_BF16_FLOPS_PER_SECOND: f64 = 788e12;
const H200_MEASURED_SOURCE: &str = "measured on an NVIDIA H200 with PyTorch 2.11, 2026-10-28: \
                                    copy on the device 4.3 TB/s, read and written; product of \
                                    8192 cubed in bf16, random normals, 788 TFLOP/s";

/// Share of the datasheet's FLOPs that a machine full of the fastest tiles is taken to do: what the
/// best product measured anywhere does (794.5 of 989.5 TFLOP/s on an H100 and an H200).
const FASTEST: f64 = 0.8;

/// The rates that the cost model of products works with.
pub(super) fn rates(machine: &Peaks, dtype: Dtype) -> Rates {
    let flops_per_second = FASTEST * machine.flops_per_second(dtype);
    Rates { flops_per_second, bytes_per_second: memory(machine).0 }
}

/// Bytes a second of device memory, measured where somebody has; and where that comes from.
fn memory(machine: &Peaks) -> (f64, &'static str) {
    match *machine == H200 {
        true => (H200_MEASURED_BYTES_PER_SECOND, H200_MEASURED_SOURCE),
        false => (machine.bytes_per_second, machine.source),
    }
}

#[derive(Serialize, Clone, Debug)]
pub struct Prediction {
    pub name: String,
    pub machine: &'static str,
    pub dtype: Dtype,
    pub vocab: usize,
    pub micro_batch: usize,
    pub sequence: usize,
    pub grad_accumulation: usize,
    pub tokens_per_step: u64,
    pub flops_per_token: u64,
    pub flops_formula: &'static str,
    /// Of one training step.
    pub bytes: u64,
    pub flops: u64,
    /// The datasheet's; what was measured, where that is known; in bf16 what is expected.
    pub roofs: Vec<Roof>,
    pub families: Vec<FamilyTime>,
    pub kernels: Vec<Kernel>,
    /// What ops that share a kernel would cost on their own; `bench step --without` measures it.
    pub fusions: Vec<FusionTime>,
}

/// A training step without one of its fusions.
#[derive(Serialize, Clone, Debug)]
pub struct FusionTime {
    pub fusion: Fusion,
    pub more_launches: u64,
    pub more_bytes: u64,
    /// So many more, under each roof.
    pub more_milliseconds: Vec<f64>,
}

/// All kernels of one family, in a training step.
#[derive(Serialize, Clone, Debug)]
pub struct FamilyTime {
    pub family: KernelFamily,
    pub launches: u64,
    pub bytes: u64,
    pub flops: u64,
    /// Under each roof.
    pub milliseconds: Vec<f64>,
}

/// Equal launches of a training step.
#[derive(Serialize, Clone, Debug)]
pub struct Kernel {
    pub op: &'static str,
    pub what: String,
    pub dtype: Dtype,
    pub sizes: Sizes,
    pub shape: String,
    /// In a training step.
    pub launches: u64,
    /// Of one launch.
    pub bytes: u64,
    pub bytes_formula: &'static str,
    pub flops: u64,
    pub flops_formula: &'static str,
    pub exponentials: u64,
    /// How many kernels each of these launches is, but for attention.
    pub kernels: u64,
    /// Of a matrix product: how its operands lie, and what stands after it.
    pub product: Option<(Layout, Ending)>,
    /// Over the link to the host's memory, in each direction.
    pub link_bytes: u64,
    /// Microseconds of one launch, under each roof.
    pub microseconds: Vec<f64>,
    /// What takes longest under the first roof: "memory", "products", "exponentials" or "host link".
    pub bound: &'static str,
}

/// What a machine is taken to do, at most or by the models of what is expected, and the training
/// step on it.
#[derive(Serialize, Clone, Debug)]
pub struct Roof {
    pub name: &'static str,
    pub bytes_per_second: f64,
    pub flops_per_second: f64,
    pub source: &'static str,
    pub milliseconds: f64,
    pub tokens_per_second: f64,
    /// FLOPs of the formula per second, as a share of the datasheet's peak.
    pub mfu: f64,
}

impl Prediction {
    /// Of the training step of `config` on an H200. Errors: as [`Prediction::on`].
    pub fn new(config: &Config) -> Result<Self> {
        Prediction::on(config, &H200)
    }

    /// Of the training step of `config` on this machine.
    ///
    /// Errors: a broken shape rule; an unknown vocabulary; sizes without a kernel.
    pub fn on(config: &Config, machine: &Peaks) -> Result<Self> {
        let whole = Prediction::with(config, machine, &Fusions::default())?;
        let fusions = Fusion::ALL.iter().map(|&fusion| {
            let without = Prediction::with(config, machine, &Fusions::without(&[fusion]))?;
            Ok(whole.lacking(fusion, &without))
        });
        Ok(Prediction { fusions: fusions.collect::<Result<_>>()?, ..whole })
    }

    /// Of a step with these fusions; it says nothing of single ones.
    fn with(config: &Config, machine: &Peaks, fusions: &Fusions) -> Result<Self> {
        let config = &config.with_vocab()?;
        let head_dim = config.model.head_dim();
        let head_dims = attention::head_dims();
        if !head_dims.contains(&head_dim) {
            let dims = head_dims.map(|it| it.to_string()).join(", ");
            return Err(Error::Config {
                what: format!("no kernel for a head dim of {head_dim}; there are {dims}"),
                remedy: "choose model.hidden and model.heads so that model.hidden / model.heads \
                         is one of these"
                    .to_string(),
            });
        }
        let mut kernels: Vec<Kernel> = vec![];
        for (launches, cost) in launches_of_a_step(config, machine, fusions)? {
            match kernels.iter_mut().find(|kernel| kernel.is(&cost)) {
                Some(kernel) => kernel.launches += launches,
                None => kernels.push(Kernel::new(launches, cost)),
            }
        }
        let report = PlanReport::new(config)?;
        let optimizer = &config.optimizer;
        for kernel in kernels.iter_mut().filter(|it| optimizer.offload && it.op == "adamw") {
            kernel.link_bytes =
                Cost::link_bytes(optimizer.moments, report.stored_elements as usize);
        }
        let mut prediction = Prediction {
            name: config.name.clone(),
            machine: machine.name,
            dtype: config.dtype,
            vocab: config.model.vocab,
            micro_batch: config.train.micro_batch,
            sequence: config.data.sequence,
            grad_accumulation: config.train.grad_accumulation,
            tokens_per_step: report.tokens_per_step,
            flops_per_token: report.flops_per_token,
            flops_formula: FLOPS_FORMULA,
            bytes: kernels.iter().map(|kernel| kernel.launches * kernel.bytes).sum(),
            flops: kernels.iter().map(|kernel| kernel.launches * kernel.flops).sum(),
            roofs: vec![],
            families: vec![],
            kernels,
            fusions: vec![],
        };
        let least = |rates: [f64; 2]| move |kernel: &Kernel| kernel.least(machine, rates);
        let datasheet = [machine.bytes_per_second, machine.flops_per_second(config.dtype)];
        prediction.kernels.iter_mut().for_each(|it| it.bound = it.bound_by(machine, datasheet));
        prediction.raise("datasheet", datasheet, machine.source, least(datasheet));
        if *machine == H200 && config.dtype == Dtype::Bf16 {
            let measured = [H200_MEASURED_BYTES_PER_SECOND, H200_MEASURED_BF16_FLOPS_PER_SECOND];
            prediction.raise("measured", measured, H200_MEASURED_SOURCE, least(measured));
        }
        if config.dtype == Dtype::Bf16 {
            let expected = Expected::new(config, machine);
            let rates = [expected.bytes_per_second(), expected.flops_per_second()];
            let microseconds = |kernel: &Kernel| expected.microseconds(kernel);
            prediction.raise("expected", rates, expected::SOURCE, microseconds);
        }
        let families = KernelFamily::ALL.iter();
        prediction.families = families.map(|&it| prediction.family(it)).collect();
        Ok(prediction)
    }

    fn launches(&self) -> u64 {
        self.kernels.iter().map(|kernel| kernel.launches).sum()
    }

    /// What `without` takes more.
    fn lacking(&self, fusion: Fusion, without: &Prediction) -> FusionTime {
        let roofs = self.roofs.iter().zip(&without.roofs);
        FusionTime {
            fusion,
            more_launches: without.launches() - self.launches(),
            more_bytes: without.bytes - self.bytes,
            more_milliseconds: roofs.map(|(a, b)| b.milliseconds - a.milliseconds).collect(),
        }
    }

    fn family(&self, family: KernelFamily) -> FamilyTime {
        let kernels = || self.kernels.iter().filter(|it| KernelFamily::of(it.op) == family);
        let sum = |of: fn(&Kernel) -> u64| kernels().map(|it| it.launches * of(it)).sum();
        let under = |roof: usize| -> f64 {
            kernels().map(|it| it.launches as f64 * it.microseconds[roof] / 1e3).sum()
        };
        FamilyTime {
            family,
            launches: sum(|_| 1),
            bytes: sum(|it| it.bytes),
            flops: sum(|it| it.flops),
            milliseconds: (0..self.roofs.len()).map(under).collect(),
        }
    }

    /// A roof, from the microseconds of a launch under it.
    fn raise(
        &mut self,
        name: &'static str,
        [bytes_per_second, flops_per_second]: [f64; 2],
        source: &'static str,
        microseconds: impl Fn(&Kernel) -> f64,
    ) {
        let mut total = 0.0;
        for kernel in &mut self.kernels {
            let each = microseconds(kernel);
            kernel.microseconds.push(each);
            total += kernel.launches as f64 * each;
        }
        let tokens_per_second = self.tokens_per_step as f64 / total * 1e6;
        let peak = self.roofs.first().map_or(flops_per_second, |roof| roof.flops_per_second);
        self.roofs.push(Roof {
            name,
            bytes_per_second,
            flops_per_second,
            source,
            milliseconds: total / 1e3,
            tokens_per_second,
            mfu: self.flops_per_token as f64 * tokens_per_second / peak,
        });
    }
}

impl Kernel {
    fn new(launches: u64, cost: Cost) -> Self {
        let Cost { op, what, dtype, sizes, bytes, bytes_formula, .. } = cost;
        let Cost { flops, flops_formula, exponentials, kernels, product, .. } = cost;
        Kernel {
            op,
            what,
            dtype,
            shape: sizes.to_string(),
            sizes,
            launches,
            bytes,
            bytes_formula,
            flops,
            flops_formula,
            exponentials,
            kernels,
            product,
            link_bytes: 0,
            microseconds: vec![],
            bound: "",
        }
    }

    /// Microseconds through memory, on the tensor cores, on the special function units, and over the
    /// link to the host; `rates`: bytes and FLOPs in a second.
    fn times(&self, machine: &Peaks, rates: [f64; 2]) -> [f64; 4] {
        let amounts = [self.bytes, self.flops, self.exponentials, self.link_bytes];
        let [bytes, flops] = rates;
        let per_second =
            [bytes, flops, machine.exponentials_per_second(), machine.link_bytes_per_second];
        [0, 1, 2, 3].map(|at| amounts[at] as f64 / per_second[at] * 1e6)
    }

    /// Microseconds that it takes at least.
    fn least(&self, machine: &Peaks, rates: [f64; 2]) -> f64 {
        self.times(machine, rates).into_iter().fold(0.0, f64::max)
    }

    fn bound_by(&self, machine: &Peaks, rates: [f64; 2]) -> &'static str {
        let [moving, multiplying, _, fetching] = self.times(machine, rates);
        match self.least(machine, rates) {
            least if fetching == least && fetching > 0.0 => "host link",
            least if multiplying == least => "products",
            least if moving == least => "memory",
            _ => "exponentials",
        }
    }

    fn is(&self, cost: &Cost) -> bool {
        self.what == cost.what && self.sizes == cost.sizes && self.bytes == cost.bytes
    }
}

// ------------------------------------------------------------------ the lines that people read

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Prediction { name, machine, dtype, micro_batch, sequence, .. } = self;
        writeln!(
            f,
            "{name} in {dtype}: the least that a training step of {} x {micro_batch} x {sequence} \
             tokens takes on one {machine}, and what is \
             expected; predicted, not measured\n",
            self.grad_accumulation
        )?;
        let width = |text: fn(&Kernel) -> &str| {
            self.kernels.iter().map(|kernel| text(kernel).len()).max().unwrap_or(0)
        };
        let (what, shape) = (width(|it| &it.what), width(|it| &it.shape));
        write!(
            f,
            "{:<what$}  {:<shape$} {:>8} {:>9} {:>9}",
            "kernel", "shape", "launches", "MB", "GFLOP"
        )?;
        for roof in &self.roofs {
            write!(f, " {:>12}", format!("us, {}", roof.name))?;
        }
        writeln!(f, " {:>7}  bound by", "share")?;
        for kernel in &self.kernels {
            write!(
                f,
                "{:<what$}  {:<shape$} {:>8} {:>9.2} {:>9.2}",
                kernel.what,
                kernel.shape,
                kernel.launches,
                kernel.bytes as f64 / 1e6,
                kernel.flops as f64 / 1e9
            )?;
            for microseconds in &kernel.microseconds {
                write!(f, " {microseconds:>12.2}")?;
            }
            let all = kernel.launches as f64 * kernel.microseconds[0] / 1e3;
            let share = 100.0 * all / self.roofs[0].milliseconds;
            writeln!(f, " {share:>5.1} %  {}", kernel.bound)?;
        }
        writeln!(
            f,
            "\nMB, GFLOP and us of one launch; a step moves {:.2} GB and multiplies for {:.2} \
             TFLOP",
            self.bytes as f64 / 1e9,
            self.flops as f64 / 1e12
        )?;
        writeln!(f)?;
        self.write_roofs(f)?;
        writeln!(f)?;
        self.write_fusions(f)
    }
}

impl Prediction {
    fn write_fusions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24} {:>8} {:>9}", "a step without", "launches", "GB")?;
        for roof in &self.roofs {
            write!(f, " {:>13}", format!("ms, {}", roof.name))?;
        }
        let last = self.roofs.len() - 1;
        writeln!(
            f,
            "  of {} ms, {}",
            self.roofs[last].milliseconds.round(),
            self.roofs[last].name
        )?;
        for FusionTime { fusion, more_launches, more_bytes, more_milliseconds } in &self.fusions {
            let more = format!("+{:.2}", *more_bytes as f64 / 1e9);
            write!(f, "{fusion:<24} {:>8} {more:>9}", format!("+{more_launches}"))?;
            for milliseconds in more_milliseconds {
                write!(f, " {:>13}", format!("+{milliseconds:.3}"))?;
            }
            let share = 100.0 * more_milliseconds[last] / self.roofs[last].milliseconds;
            writeln!(f, " {:>7} %", format!("+{share:.1}"))?;
        }
        Ok(())
    }

    /// What takes how long, in a table without the single kernels.
    pub(super) fn write_families(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} {:>8} {:>9} {:>9}", "kernels", "launches", "GB", "TFLOP")?;
        for roof in &self.roofs {
            write!(f, " {:>13}", format!("ms, {}", roof.name))?;
        }
        writeln!(f, " {:>7}", "share")?;
        for it in &self.families {
            write!(
                f,
                "{:<10} {:>8} {:>9.2} {:>9.2}",
                it.family,
                it.launches,
                it.bytes as f64 / 1e9,
                it.flops as f64 / 1e12
            )?;
            for milliseconds in &it.milliseconds {
                write!(f, " {milliseconds:>13.2}")?;
            }
            let share = 100.0 * it.milliseconds[0] / self.roofs[0].milliseconds;
            writeln!(f, " {share:>5.1} %")?;
        }
        Ok(())
    }

    /// A step's time under each roof, what follows from it, and where the roofs come from.
    pub(super) fn write_roofs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<10} {:>10} {:>14} {:>8}", "roof", "ms a step", "tokens/s", "MFU")?;
        for roof in &self.roofs {
            writeln!(
                f,
                "{:<10} {:>10.2} {:>14.0} {:>6.1} %",
                roof.name,
                roof.milliseconds,
                roof.tokens_per_second,
                100.0 * roof.mfu
            )?;
        }
        writeln!(
            f,
            "MFU = ({}) * tokens/s / {:.1}e12",
            self.flops_formula,
            self.roofs[0].flops_per_second / 1e12
        )?;
        self.roofs.iter().try_for_each(|roof| writeln!(f, "{}: {}", roof.name, roof.source))
    }
}

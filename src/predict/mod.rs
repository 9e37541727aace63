//! How fast a training step can be at best: its kernels, their bytes and FLOPs, and the least time
//! that a machine needs for them; and how fast it is expected to be (expected.rs). No device is
//! asked.
//!
//! The kernels are those that launches.rs lists. A kernel takes at least as long as its bytes take
//! through memory, its products on the tensor cores, its exponentials on the special function
//! units, and what it has in host memory over the link; kernels run one after another, without
//! gaps.

use serde::Serialize;

mod bounds;
pub mod cost;
mod estimates;
mod expected;
mod launches;
mod machine_plan;
pub(crate) mod product;
pub(crate) mod products;
mod sizes;
mod tables;

use cost::Cost;
pub use cost::KernelFamily;
pub use estimates::{Estimate, Estimates};
use expected::Expected;
use launches::launches_of_a_step;
pub use machine_plan::{Fit, Level, MachinePlan, StateFormat};
pub use product::StepProduct;
pub use products::{GemmPrediction, GemmRow};
pub use sizes::Sizes;

use crate::config::{Config, Dtype};
use crate::cuda::gemm::Rates;
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
pub(crate) fn rates(machine: &Peaks, dtype: Dtype) -> Rates {
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
    pub estimates: Estimates<Estimate>,
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
    pub more_milliseconds: Estimates<f64>,
}

/// All kernels of one family, in a training step.
#[derive(Serialize, Clone, Debug)]
pub struct FamilyTime {
    pub family: KernelFamily,
    pub launches: u64,
    pub bytes: u64,
    pub flops: u64,
    pub milliseconds: Estimates<f64>,
}

/// Equal launches of a training step.
#[derive(Serialize, Clone, Debug)]
pub struct Kernel {
    /// Of one launch.
    #[serde(flatten)]
    pub cost: Cost,
    /// The sizes in words.
    pub shape: String,
    /// In a training step.
    pub launches: u64,
    /// Of one launch.
    pub microseconds: Estimates<f64>,
    /// What takes longest at the datasheet's rates: "memory", "products", "exponentials" or "host
    /// link".
    pub bound: &'static str,
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
        let mut costs: Vec<(u64, Cost)> = vec![];
        for (launches, cost) in launches_of_a_step(config, machine, fusions)? {
            match costs.iter_mut().find(|(_, other)| other.is(&cost)) {
                Some((all, _)) => *all += launches,
                None => costs.push((launches, cost)),
            }
        }
        let report = PlanReport::new(config)?;
        let ways = Ways::new(config, machine);
        let kernel = |(launches, cost): (u64, Cost)| Kernel {
            shape: cost.sizes.to_string(),
            launches,
            microseconds: ways.microseconds(&cost),
            bound: cost.bound_by(machine, ways.rates.datasheet),
            cost,
        };
        let kernels: Vec<Kernel> = costs.into_iter().map(kernel).collect();
        let families = KernelFamily::ALL.iter().map(|&it| FamilyTime::new(it, &kernels, &ways));
        let each = kernels.iter().map(Kernel::milliseconds);
        Ok(Prediction {
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
            bytes: kernels.iter().map(|kernel| kernel.launches * kernel.cost.bytes).sum(),
            flops: kernels.iter().map(|kernel| kernel.launches * kernel.cost.flops).sum(),
            estimates: ways.step(ways.sum(each), report.tokens_per_step, report.flops_per_token),
            families: families.collect(),
            kernels,
            fusions: vec![],
        })
    }

    fn launches(&self) -> u64 {
        self.kernels.iter().map(|kernel| kernel.launches).sum()
    }

    /// What `without` takes more.
    fn lacking(&self, fusion: Fusion, without: &Prediction) -> FusionTime {
        let milliseconds =
            |it: &Prediction| it.estimates.as_ref().map(|estimate| estimate.milliseconds);
        let both = milliseconds(without).zip(milliseconds(self));
        FusionTime {
            fusion,
            more_launches: without.launches() - self.launches(),
            more_bytes: without.bytes - self.bytes,
            more_milliseconds: both.map(|(without, with)| without - with),
        }
    }
}

/// The ways to estimate a step's time on one machine.
struct Ways<'a> {
    machine: &'a Peaks,
    /// Bytes and FLOPs in a second.
    rates: Estimates<[f64; 2]>,
    sources: Estimates<&'static str>,
    expected: Option<Expected<'a>>,
}

impl<'a> Ways<'a> {
    fn new(config: &Config, machine: &'a Peaks) -> Self {
        let is_bf16 = config.dtype == Dtype::Bf16;
        let is_measured = *machine == H200 && is_bf16;
        let expected = is_bf16.then(|| Expected::new(config, machine));
        Ways {
            machine,
            rates: Estimates {
                datasheet: [machine.bytes_per_second, machine.flops_per_second(config.dtype)],
                measured: is_measured.then_some([
                    H200_MEASURED_BYTES_PER_SECOND,
                    H200_MEASURED_BF16_FLOPS_PER_SECOND,
                ]),
                expected: expected
                    .as_ref()
                    .map(|it| [it.bytes_per_second(), it.flops_per_second()]),
            },
            sources: Estimates {
                datasheet: machine.source,
                measured: is_measured.then_some(H200_MEASURED_SOURCE),
                expected: is_bf16.then_some(expected::SOURCE),
            },
            expected,
        }
    }

    /// Of one launch.
    fn microseconds(&self, cost: &Cost) -> Estimates<f64> {
        let Ways { machine, rates, expected, .. } = self;
        Estimates {
            expected: expected.as_ref().map(|expected| expected.microseconds(cost)),
            ..rates.map(|rates| cost.least(machine, rates))
        }
    }

    fn sum(&self, figures: impl Iterator<Item = Estimates<f64>>) -> Estimates<f64> {
        let none = self.rates.map(|_| 0.0);
        figures.fold(none, |sum, figure| sum.zip(figure).map(|(sum, figure)| sum + figure))
    }

    fn step(
        &self,
        milliseconds: Estimates<f64>,
        tokens_per_step: u64,
        flops_per_token: u64,
    ) -> Estimates<Estimate> {
        let [_, peak] = self.rates.datasheet;
        let ways = self.rates.zip(self.sources);
        ways.zip(milliseconds).map(
            |(([bytes_per_second, flops_per_second], source), milliseconds)| {
                let tokens_per_second = tokens_per_step as f64 / milliseconds * 1e3;
                Estimate {
                    bytes_per_second,
                    flops_per_second,
                    source,
                    milliseconds,
                    tokens_per_second,
                    mfu: flops_per_token as f64 * tokens_per_second / peak,
                }
            },
        )
    }
}

impl FamilyTime {
    fn new(family: KernelFamily, kernels: &[Kernel], ways: &Ways) -> Self {
        let kernels = || kernels.iter().filter(|it| KernelFamily::of(it.cost.op) == family);
        let sum = |of: fn(&Kernel) -> u64| kernels().map(|it| it.launches * of(it)).sum();
        FamilyTime {
            family,
            launches: sum(|_| 1),
            bytes: sum(|it| it.cost.bytes),
            flops: sum(|it| it.cost.flops),
            milliseconds: ways.sum(kernels().map(Kernel::milliseconds)),
        }
    }
}

impl Kernel {
    /// Of all its launches in a step.
    fn milliseconds(&self) -> Estimates<f64> {
        self.microseconds.map(|microseconds| self.launches as f64 * microseconds / 1e3)
    }
}

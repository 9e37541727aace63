//! How fast a training step can be at best: its kernels, their bytes and FLOPs, and the least time
//! that a machine needs for them. No device is asked.
//!
//! The kernels are those of the steps of the very program that training runs (`launches`, one
//! exhaustive match over them), and of what the trainer does around it. A kernel takes at least as
//! long as its bytes take through memory, and as its products take on the tensor cores; kernels run
//! one behind the other, without gaps.

use std::fmt;

use serde::Serialize;

use super::cost::Cost;
use super::sizes::Sizes;
use crate::backend::{LossSpec, Sink};
use crate::config::{Config, Dtype};
use crate::cuda::DevicePointer;
use crate::cuda::attention;
use crate::cuda::gemm::{Layout, Output};
use crate::cuda::norm::Norm;
use crate::cuda::peaks::{H200, Peaks};
use crate::engine::Plan;
use crate::error::{Error, Result};
use crate::plan::{FLOPS_FORMULA, PlanReport};
use crate::tape::{Gradient, Op, Program, Step, ValueId};
use crate::tensor::Kind;

/// What a copy and a product of 8192 cubed reached on this machine.
const H200_MEASURED_BYTES_PER_SECOND: f64 = 4.3e12;
const H200_MEASURED_BF16_FLOPS_PER_SECOND: f64 = 788e12;
const H200_MEASURED_SOURCE: &str = "measured on an NVIDIA H200 with PyTorch 2.11, 2026-10-28: \
                                    copy on the device 4.3 TB/s, read and written; product of \
                                    8192 cubed in bf16, random normals, 788 TFLOP/s";

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
    /// The datasheet's, then what was measured, where that is known.
    pub roofs: Vec<Roof>,
    pub kernels: Vec<Kernel>,
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
    /// Least microseconds of one launch, under each roof.
    pub microseconds: Vec<f64>,
    /// What takes longer under the first roof: "memory" or "products".
    pub bound: &'static str,
}

/// What a machine is taken to do at most, and the training step under it.
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
    /// Of the training step of `config` on an H200.
    ///
    /// Errors: a broken shape rule; an unknown vocabulary; sizes without a kernel.
    pub fn new(config: &Config) -> Result<Self> {
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
        for (launches, cost) in costs(config, &H200)? {
            match kernels.iter_mut().find(|kernel| kernel.is(&cost)) {
                Some(kernel) => kernel.launches += launches,
                None => kernels.push(Kernel::new(launches, cost)),
            }
        }
        let report = PlanReport::new(config)?;
        let mut prediction = Prediction {
            name: config.name.clone(),
            machine: H200.name,
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
            kernels,
        };
        let peak = H200.flops_per_second(config.dtype);
        prediction.raise("datasheet", H200.bytes_per_second, peak, H200.source);
        if config.dtype == Dtype::Bf16 {
            prediction.raise(
                "measured",
                H200_MEASURED_BYTES_PER_SECOND,
                H200_MEASURED_BF16_FLOPS_PER_SECOND,
                H200_MEASURED_SOURCE,
            );
        }
        Ok(prediction)
    }

    /// Adds a roof, and every kernel's time under it.
    fn raise(
        &mut self,
        name: &'static str,
        bytes_per_second: f64,
        flops_per_second: f64,
        source: &'static str,
    ) {
        let mut total = 0.0;
        for kernel in &mut self.kernels {
            let moving = kernel.bytes as f64 / bytes_per_second * 1e6;
            let multiplying = kernel.flops as f64 / flops_per_second * 1e6;
            if kernel.microseconds.is_empty() {
                kernel.bound = if moving > multiplying { "memory" } else { "products" };
            }
            kernel.microseconds.push(moving.max(multiplying));
            total += kernel.launches as f64 * moving.max(multiplying);
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
        let Cost { op, what, dtype, sizes, bytes, bytes_formula, flops, flops_formula } = cost;
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
            microseconds: vec![],
            bound: "",
        }
    }

    fn is(&self, cost: &Cost) -> bool {
        self.what == cost.what && self.sizes == cost.sizes && self.bytes == cost.bytes
    }
}

// ------------------------------------------------------------------ what is launched

/// Everything that one training step launches on the device, with how often.
fn costs(config: &Config, machine: &Peaks) -> Result<Vec<(u64, Cost)>> {
    let plan = Plan::without_device(config)?;
    let program = plan.training_program();
    let micro_batches = config.train.grad_accumulation as u64;
    let tokens = config.train.micro_batch * config.data.sequence;
    let stored = plan.table.stored_elements();

    // Trainer::accumulate
    let mut costs = vec![(1, Cost::zero(stored))];
    // Tokens and targets in.
    costs.push((2 * micro_batches, Cost::copy(4, tokens)));
    for step in program.steps() {
        for cost in launches(step, program, config.dtype, machine) {
            costs.push((micro_batches, cost));
        }
    }
    // Losses out.
    costs.push((micro_batches, Cost::copy(4, tokens)));
    costs.push((1, Cost::gradient_norm(stored)));
    // Trainer::update
    costs.push((1, Cost::adamw(config.dtype, stored)));
    Ok(costs)
}

/// The kernels that the backend launches for a step, in order.
fn launches(step: &Step<ValueId>, program: &Program, dtype: Dtype, machine: &Peaks) -> Vec<Cost> {
    let shape = |id: ValueId| program.value(id).shape;
    let rows = |id: ValueId| shape(id).rows();
    let columns = |id: ValueId| shape(id).columns();
    let matrix = |id: ValueId| [rows(id), columns(id)];
    let store = |addend: bool| Output::Store { addend: addend.then_some(DevicePointer::NULL) };
    let product = |layout, sizes, output| Cost::product(layout, dtype, sizes, output);
    match *step {
        Step::Forward(op) => match op {
            Op::Embedding { table, out, .. } => {
                vec![Cost::embedding_forward(dtype, [rows(out), rows(table), columns(out)])]
            }
            Op::Norm { spec, inp, residual, .. } => {
                vec![Cost::norm_forward(spec.kind, dtype, matrix(inp), residual.is_some())]
            }
            Op::ScaledResidual { gain, out, .. } => {
                vec![Cost::scaled_residual_forward(dtype, matrix(out), gain.is_some())]
            }
            Op::Linear { inp, residual, out, .. } => {
                let sizes = [rows(inp), columns(out), columns(inp)];
                vec![product(Layout::Nt, sizes, store(residual.is_some()))]
            }
            Op::Rotary { heads, table, qkv, .. } => {
                vec![Cost::rotary("rotary_forward", heads, dtype, rows(qkv), rows(table))]
            }
            Op::Attention { spec, .. } => vec![Cost::attention_forward(spec, dtype)],
            Op::CachedAttention { heads, qkv, keys, .. } => {
                vec![Cost::attention_decode(heads, dtype, rows(qkv), rows(keys))]
            }
            Op::SwiGlu { out, .. } => vec![Cost::swiglu_forward(dtype, rows(out), columns(out))],
            Op::CrossEntropy { spec, inp, weight, .. } => chunks(spec, rows(inp), |t| {
                let [v, c] = matrix(weight);
                vec![
                    product(Layout::Nt, [t, v, c], store(false)),
                    Cost::loss_forward(dtype, [t, v]),
                ]
            }),
        },
        Step::Backward(gradient) => match gradient {
            Gradient::Embedding { d_out, d_table, .. } => {
                let sizes = [rows(d_out), rows(d_table), columns(d_table)];
                vec![Cost::embedding_backward(dtype, sizes)]
            }
            Gradient::Norm { spec, inp, partial, d_inp: Sink { accumulate, .. }, .. } => {
                let [t, c] = matrix(inp);
                let on_machine = Norm::partials_on(machine.multiprocessors, dtype, c, t);
                let partials = on_machine.unwrap_or(rows(partial));
                vec![Cost::norm_backward(spec.kind, dtype, [t, c], partials, accumulate)]
            }
            Gradient::ScaledResidual { spec, d_out, gain, .. } => {
                let gain = gain.map(|it| rows(it.partial));
                let in_place = spec.stream_scale != 1.0;
                vec![Cost::scaled_residual_backward(dtype, matrix(d_out), gain, in_place)]
            }
            Gradient::Linear { inp, d_out, d_inp: Sink { accumulate, .. }, .. } => {
                let [t, inputs] = matrix(inp);
                let outputs = columns(d_out);
                vec![
                    product(Layout::Nn, [t, inputs, outputs], store(accumulate)),
                    product(Layout::Tn, [outputs, inputs, t], Output::Accumulate),
                ]
            }
            Gradient::Rotary { heads, table, d_qkv, .. } => {
                vec![Cost::rotary("rotary_backward", heads, dtype, rows(d_qkv), rows(table))]
            }
            Gradient::Attention { spec, .. } => vec![Cost::attention_backward(spec, dtype)],
            Gradient::SwiGlu { d_out, .. } => {
                vec![Cost::swiglu_backward(dtype, rows(d_out), columns(d_out))]
            }
            Gradient::CrossEntropy { spec, inp, weight, .. } => chunks(spec, rows(inp), |t| {
                let [v, c] = matrix(weight);
                vec![
                    product(Layout::Nt, [t, v, c], store(false)),
                    Cost::loss_backward(dtype, [t, v]),
                    product(Layout::Nn, [t, c, v], store(false)),
                    product(Layout::Tn, [v, c, t], Output::Accumulate),
                ]
            }),
        },
        Step::Copy { from, .. } => {
            let element_bytes = match (program.value(from).kind, dtype) {
                (Kind::Activation, Dtype::Bf16) => 2,
                (Kind::Activation, Dtype::F32) | (Kind::Statistic | Kind::Index, _) => 4,
            };
            vec![Cost::copy(element_bytes, shape(from).elements())]
        }
        Step::Add { from, .. } => {
            let dtype = match program.value(from).kind {
                Kind::Activation => dtype,
                Kind::Statistic | Kind::Index => Dtype::F32,
            };
            vec![Cost::add(dtype, shape(from).elements())]
        }
    }
}

/// What `of` launches for each chunk of a loss over `tokens` tokens.
fn chunks(spec: LossSpec, tokens: usize, of: impl Fn(usize) -> Vec<Cost>) -> Vec<Cost> {
    let starts = (0..tokens).step_by(spec.chunk);
    starts.flat_map(|first| of(spec.chunk.min(tokens - first))).collect()
}

// ------------------------------------------------------------------ the lines that people read

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Prediction { name, machine, dtype, micro_batch, sequence, .. } = self;
        writeln!(
            f,
            "{name} in {dtype}: the least that a training step of {} x {micro_batch} x {sequence} \
             tokens takes on one {machine}; predicted, not measured\n",
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
        writeln!(f, "\n{:<10} {:>10} {:>14} {:>8}", "roof", "ms a step", "tokens/s", "MFU")?;
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

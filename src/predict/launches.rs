//! What a training step launches, each with its cost: the kernels of the steps of the very program
//! that training runs (`launches`, one exhaustive match over them), and of what the trainer does
//! around it.

use super::cost::{Cost, element_bytes};
use crate::backend::{
    CachedAttention, EmbeddingBackward, EmbeddingForward, LinearBackward, LinearForward, LossSpec,
    NormBackward, Rotary, ScaledResidualBackward, ScaledResidualForward,
};
use crate::config::{Config, Dtype};
use crate::cuda::adamw::Scalars;
use crate::cuda::gemm::{Layout, Output, Rotation};
use crate::cuda::loss::Shape;
use crate::cuda::norm::Norm;
use crate::cuda::peaks::Peaks;
use crate::cuda::{AbsentGpu, DevicePointer, Family, Fusion, Fusions};
use crate::engine::Plan;
use crate::error::Result;
use crate::tape::{Fused, Gradient, Op, Program, Step, ValueId};
use crate::tensor::Kind;

/// Everything that one training step launches on the device, with how often.
pub(super) fn launches_of_a_step(
    config: &Config,
    machine: &Peaks,
    fusions: &Fusions,
) -> Result<Vec<(u64, Cost)>> {
    let multiprocessors = machine.multiprocessors;
    let plan = Plan::new(config, &AbsentGpu { dtype: config.dtype, multiprocessors })?;
    let program = plan.training_program();
    let micro_batches = config.train.grad_accumulation as u64;
    let tokens = config.train.micro_batch * config.data.sequence;
    let stored = plan.table.stored_elements();

    // Trainer::enqueue
    let step_tokens = config.train.grad_accumulation * tokens;
    let mut costs = vec![(1, Cost::zero(stored))];
    // From the program: tokens, targets, documents and the scale of the gradient; each micro-batch
    // into place.
    let arrays = 2 + u64::from(config.data.packs_documents());
    costs.push((arrays, Cost::copy(4, step_tokens)));
    costs.push((1, Cost::copy(4, 1)));
    costs.push((arrays * micro_batches, Cost::copy(4, tokens)));
    for step in program.steps() {
        for cost in launches(step, program, config.dtype, machine, fusions) {
            costs.push((micro_batches, cost));
        }
    }
    // Losses out of place; to the program, with the gradient's norm.
    costs.push((micro_batches, Cost::copy(4, tokens)));
    costs.push((1, Cost::gradient_norm(stored)));
    costs.push((1, Cost::copy(4, step_tokens)));
    costs.push((1, Cost::copy(4, 1)));
    // Trainer::update
    costs.push((1, Cost::copy(4, size_of::<Scalars>() / 4)));
    let optimizer = &config.optimizer;
    let adamw = if optimizer.offload { Cost::adamw_offloaded } else { Cost::adamw };
    costs.push((1, adamw(config.dtype, optimizer.master, optimizer.moments, stored)));
    Ok(costs)
}

/// The kernels that the backend launches for a step, in order.
fn launches(
    step: &Step<ValueId>,
    program: &Program,
    dtype: Dtype,
    machine: &Peaks,
    fusions: &Fusions,
) -> Vec<Cost> {
    let shape = |id: ValueId| program.value(id).shape;
    let rows = |id: ValueId| shape(id).rows();
    let columns = |id: ValueId| shape(id).columns();
    let matrix = |id: ValueId| [rows(id), columns(id)];
    let store = |addend: bool| Output::Store { addend: addend.then_some(DevicePointer::NULL) };
    let product = |layout, sizes, output| Cost::product(layout, dtype, sizes, output);
    match *step {
        Step::Fused(fused) => together(&fused, program, dtype, fusions).unwrap_or_else(|| {
            let parts = fused.parts();
            let launches = |step| launches(step, program, dtype, machine, fusions);
            parts.iter().flat_map(launches).collect()
        }),
        Step::Forward(op) => match op {
            Op::Embedding(EmbeddingForward { table, out, .. }) => {
                vec![Cost::embedding_forward(dtype, [rows(out), rows(table), columns(out)])]
            }
            Op::Norm(op) => vec![Cost::norm_forward(op.spec.kind, dtype, matrix(op.inp))],
            Op::ScaledResidual(ScaledResidualForward { gain, out, .. }) => {
                vec![Cost::scaled_residual_forward(dtype, matrix(out), gain.is_some())]
            }
            Op::Linear(LinearForward { inp, residual, out, .. }) => {
                let sizes = [rows(inp), columns(out), columns(inp)];
                match residual.is_some() && !fusions.has(Fusion::Residual) {
                    false => vec![product(Layout::Nt, sizes, store(residual.is_some()))],
                    true => vec![
                        product(Layout::Nt, sizes, store(false)),
                        Cost::add(dtype, shape(out).elements()),
                    ],
                }
            }
            Op::Rotary(Rotary { heads, table, qkv, .. }) => {
                vec![Cost::rotary("rotary_forward", heads, dtype, rows(qkv), rows(table))]
            }
            Op::Attention(op) => vec![Cost::attention_forward(op.spec, dtype)],
            Op::CachedAttention(CachedAttention { heads, qkv, keys, .. }) => {
                vec![Cost::attention_decode(heads, dtype, rows(qkv), rows(keys))]
            }
            Op::SwiGlu(op) => {
                vec![Cost::swiglu_forward(dtype, rows(op.out), columns(op.out))]
            }
            Op::CrossEntropy(op, _) => chunks(op.spec, rows(op.inp), |t| {
                let [v, c] = matrix(op.weight);
                vec![
                    product(Layout::Nt, [t, v, c], store(false)),
                    Cost::loss_forward(dtype, [t, v]),
                ]
            }),
        },
        Step::Backward(gradient) => match gradient {
            Gradient::Embedding(EmbeddingBackward { d_out, d_table, .. }) => {
                let sizes = [rows(d_out), rows(d_table), columns(d_table)];
                vec![Cost::embedding_backward(dtype, sizes)]
            }
            Gradient::Norm(NormBackward { spec, inp, partial, d_inp, .. }) => {
                let [t, c] = matrix(inp);
                let on_machine = Norm::partials_on(machine.multiprocessors, dtype, c, t);
                let partials = on_machine.unwrap_or(rows(partial));
                vec![Cost::norm_backward(spec.kind, dtype, [t, c], partials, d_inp.accumulate)]
            }
            Gradient::ScaledResidual(ScaledResidualBackward { spec, d_out, gain, .. }) => {
                let gain = gain.map(|it| rows(it.partial));
                let in_place = spec.stream_scale != 1.0;
                vec![Cost::scaled_residual_backward(dtype, matrix(d_out), gain, in_place)]
            }
            Gradient::Linear(LinearBackward { inp, d_out, d_inp, .. }) => {
                let [t, inputs] = matrix(inp);
                let outputs = columns(d_out);
                vec![
                    product(Layout::Nn, [t, inputs, outputs], store(d_inp.accumulate)),
                    product(Layout::Tn, [outputs, inputs, t], Output::Accumulate),
                ]
            }
            Gradient::Rotary(Rotary { heads, table, qkv, .. }) => {
                vec![Cost::rotary("rotary_backward", heads, dtype, rows(qkv), rows(table))]
            }
            Gradient::Attention(op) => vec![Cost::attention_backward(op.spec, dtype)],
            Gradient::SwiGlu(op) => {
                vec![Cost::swiglu_backward(dtype, rows(op.d_out), columns(op.d_out))]
            }
            Gradient::CrossEntropy(op) => chunks(op.forward.spec, rows(op.forward.inp), |t| {
                let [v, c] = matrix(op.forward.weight);
                vec![
                    product(Layout::Nt, [t, v, c], store(false)),
                    Cost::loss_backward(dtype, [t, v], loss_shape(dtype, v)),
                    product(Layout::Nn, [t, c, v], store(false)),
                    product(Layout::Tn, [v, c, t], Output::Accumulate),
                ]
            }),
        },
        Step::Add { from, .. } => {
            let dtype = match program.value(from).kind {
                Kind::Activation => dtype,
                Kind::Bf16 | Kind::LowerHalf => Dtype::Bf16,
                Kind::Statistic | Kind::Index => Dtype::F32,
            };
            vec![Cost::add(dtype, shape(from).elements())]
        }
    }
}

/// The kernels of a fused step; `None`: its two parts have kernels of their own.
fn together(
    fused: &Fused<ValueId>,
    program: &Program,
    dtype: Dtype,
    fusions: &Fusions,
) -> Option<Vec<Cost>> {
    let shape = |id: ValueId| program.value(id).shape;
    let rows = |id: ValueId| shape(id).rows();
    let columns = |id: ValueId| shape(id).columns();
    let null = DevicePointer::NULL;
    match *fused {
        Fused::LinearRotary(LinearForward { inp, out, .. }, Rotary { heads, table, .. }) => {
            let output = Output::Rotate(Rotation {
                table: null,
                positions: null,
                columns: heads.rotated_columns(),
                head_dim: heads.head_dim,
            });
            let sizes = [rows(inp), columns(out), columns(inp)];
            (fusions.has(Fusion::Rotary) && fuses(dtype, Layout::Nt, output))
                .then(|| vec![Cost::product_rotary(heads, dtype, sizes, rows(table))])
        }
        Fused::LinearSwiGlu(LinearForward { inp, out, .. }, _) => {
            let sizes = [rows(inp), columns(out), columns(inp)];
            let output = Output::SwiGlu { product: null };
            (fusions.has(Fusion::SwiGlu) && fuses(dtype, Layout::Nt, output))
                .then(|| vec![Cost::product_swiglu(dtype, sizes)])
        }
        Fused::LinearSwiGluBackward(LinearBackward { inp, d_out, .. }, _) => {
            let [t, inputs, outputs] = [rows(inp), columns(inp), columns(d_out)];
            let output = Output::SwiGluGradient { gate_up: null };
            (fusions.has(Fusion::SwiGluBackward) && fuses(dtype, Layout::Nn, output)).then(|| {
                let d_weight = [outputs, inputs, t];
                vec![
                    Cost::product_swiglu_gradient(dtype, [t, inputs, outputs]),
                    Cost::product(Layout::Tn, dtype, d_weight, Output::Accumulate),
                ]
            })
        }
        // Of Hopper's kernels, as the products are.
        Fused::AttentionRotaryBackward(attention, rotary) => {
            (fusions.has(Fusion::RotaryBackward) && dtype == Dtype::Bf16).then(|| {
                vec![Cost::attention_rotary_backward(attention.spec, dtype, rows(rotary.table))]
            })
        }
    }
}

/// Whether the machine's products in this type end with this.
fn fuses(dtype: Dtype, layout: Layout, output: Output) -> bool {
    let family = match dtype {
        Dtype::Bf16 => Family::Sm90,
        Dtype::F32 => Family::F32,
    };
    family.fuses(layout, output)
}

/// How the machine's loss holds a row; as in [`fuses`], all of them have what a Hopper has.
fn loss_shape(dtype: Dtype, columns: usize) -> Shape {
    Shape::of(columns * element_bytes(dtype) as usize, true)
}

/// What `of` launches for each chunk of a loss over `tokens` tokens.
fn chunks(spec: LossSpec, tokens: usize, of: impl Fn(usize) -> Vec<Cost>) -> Vec<Cost> {
    let starts = (0..tokens).step_by(spec.chunk);
    starts.flat_map(|first| of(spec.chunk.min(tokens - first))).collect()
}

//! What a program consists of: ops, their gradients and sums, and two of them that run as one.

use super::op::{Access, Gradient, Op};
use crate::backend::{Backend, Sink};
use crate::error::{Error, Result};
use crate::tensor::View;

/// One step of a program.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Step<H> {
    Forward(Op<H>),
    Backward(Gradient<H>),
    Fused(Fused<H>),
    /// to += from, gradients.
    Add {
        from: H,
        to: H,
    },
}

/// Two steps, one directly after the other. Where a backend has no kernel that does both, they run one
/// after the other.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fused<H> {
    Forward([Op<H>; 2]),
    Backward([Gradient<H>; 2]),
}

impl<H: Copy> Fused<H> {
    /// The same over other handles; `f` sees the operands of the first, then those of the second.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Fused<K> {
        match self {
            Fused::Forward(ops) => Fused::Forward(ops.map(|op| op.map(f))),
            Fused::Backward(gradients) => Fused::Backward(gradients.map(|it| it.map(f))),
        }
    }

    /// One by one.
    pub fn parts(self) -> [Step<H>; 2] {
        match self {
            Fused::Forward(ops) => ops.map(Step::Forward),
            Fused::Backward(gradients) => gradients.map(Step::Backward),
        }
    }
}

impl Fused<View> {
    pub(super) fn run(&self, backend: &mut impl Backend) -> Result<()> {
        if self.run_as_one(backend)? {
            return Ok(());
        }
        match self.needs_one_kernel() {
            false => self.parts().iter().try_for_each(|part| part.run(backend)),
            true => Err(Error::Device {
                device: backend.name().to_string(),
                what: "it was planned to compute SwiGLU's gradient with the product before it, \
                       and cannot"
                    .to_string(),
                remedy: "plan for the device that trains".to_string(),
            }),
        }
    }

    /// Whether what the first leaves to the second has no memory.
    fn needs_one_kernel(&self) -> bool {
        match self {
            Fused::Backward([Gradient::Linear { d_inp, .. }, Gradient::SwiGlu { .. }]) => {
                d_inp.to.shape.elements() == 0
            }
            _ => false,
        }
    }

    /// Whether the backend did both.
    fn run_as_one(&self, backend: &mut impl Backend) -> Result<bool> {
        match *self {
            Fused::Forward(
                [
                    Op::Linear { inp, weight, residual: None, .. },
                    Op::Rotary { heads, table, positions, qkv },
                ],
            ) => backend.linear_rotary_forward(heads, inp, weight, table, positions, qkv),
            Fused::Forward(
                [Op::Linear { inp, weight, residual: None, .. }, Op::SwiGlu { inp: gate_up, out }],
            ) => backend.linear_swiglu_forward(inp, weight, gate_up, out),
            Fused::Backward(
                [
                    Gradient::Linear {
                        inp,
                        weight,
                        d_out,
                        d_weight,
                        d_inp: Sink { accumulate: false, .. },
                    },
                    Gradient::SwiGlu { inp: gate_up, d_out: d_inp, d_inp: d_gate_up },
                ],
            ) => backend
                .linear_swiglu_backward(inp, weight, d_out, d_weight, gate_up, d_inp, d_gate_up),
            Fused::Backward(
                [
                    Gradient::Attention {
                        spec,
                        qkv,
                        document_starts,
                        out,
                        log_sum_exp,
                        d_out,
                        delta,
                        d_qkv,
                    },
                    Gradient::Rotary { table, positions, .. },
                ],
            ) => backend.attention_rotary_backward(
                spec,
                qkv,
                document_starts,
                out,
                log_sum_exp,
                d_out,
                delta,
                table,
                positions,
                d_qkv,
            ),
            _ => unreachable!("nothing joins {self:?}"),
        }
    }
}

impl<H: Copy> Step<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Step<K> {
        match self {
            Step::Forward(op) => Step::Forward(op.map(f)),
            Step::Backward(gradient) => Step::Backward(gradient.map(f)),
            Step::Fused(fused) => Step::Fused(fused.map(f)),
            Step::Add { from, to } => {
                Step::Add { from: f(from, Access::Read), to: f(to, Access::Update) }
            }
        }
    }

    /// Whether it belongs to the backward pass wherever it stands. Ops run in either pass: again in the
    /// backward pass, where their results were not kept.
    pub fn is_backward(&self) -> bool {
        match self {
            Step::Forward(_) | Step::Fused(Fused::Forward(_)) => false,
            Step::Backward(_) | Step::Fused(Fused::Backward(_)) | Step::Add { .. } => true,
        }
    }

    /// Every operand with its access.
    pub fn operands(self) -> Vec<(H, Access)> {
        let mut operands = Vec::new();
        self.map(&mut |handle, access| operands.push((handle, access)));
        operands
    }
}

impl Step<View> {
    pub fn run(&self, backend: &mut impl Backend) -> Result<()> {
        match *self {
            Step::Forward(op) => op.run(backend),
            Step::Backward(gradient) => gradient.run(backend),
            Step::Fused(fused) => fused.run(backend),
            Step::Add { from, to } => backend.add(from, to),
        }
    }
}

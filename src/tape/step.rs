//! What a program consists of: ops, their gradients and sums, and two of them that run as one.

use super::fused::Fused;
use super::op::{Gradient, Op};
use crate::backend::{Access, Backend};
use crate::error::Result;
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

    /// Whether it belongs to the backward pass wherever it stands. Ops run in either pass: again in
    /// the backward pass, where their results were not kept.
    pub fn is_backward(&self) -> bool {
        match self {
            Step::Forward(_) => false,
            Step::Fused(fused) => fused.is_backward(),
            Step::Backward(_) | Step::Add { .. } => true,
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
            Step::Fused(fused) => {
                if fused.run_as_one(backend)? {
                    return Ok(());
                }
                fused.check_that_parts_can_run(backend.name())?;
                fused.parts().iter().try_for_each(|part| part.run(backend))
            }
            Step::Add { from, to } => backend.add(from, to),
        }
    }
}

impl<H: Copy> Fused<H> {
    /// The two that it does, one by one.
    pub fn parts(self) -> [Step<H>; 2] {
        match self {
            Fused::LinearRotary(linear, rotary) => {
                [Step::Forward(Op::Linear(linear)), Step::Forward(Op::Rotary(rotary))]
            }
            Fused::LinearSwiGlu(linear, swiglu) => {
                [Step::Forward(Op::Linear(linear)), Step::Forward(Op::SwiGlu(swiglu))]
            }
            Fused::LinearSwiGluBackward(linear, swiglu) => {
                [Step::Backward(Gradient::Linear(linear)), Step::Backward(Gradient::SwiGlu(swiglu))]
            }
            Fused::AttentionRotaryBackward(attention, rotary) => [
                Step::Backward(Gradient::Attention(attention)),
                Step::Backward(Gradient::Rotary(rotary)),
            ],
        }
    }
}

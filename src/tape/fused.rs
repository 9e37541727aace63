//! Steps that run as one: what makes a tensor, and what would read all of it once more.
//!
//! [`fuse`] finds them in a finished list of steps, so neither recording nor the backward rules know
//! of them. Which there are is said once, by [`Fused`]; what runs them and what estimates their time
//! are matches over it.

use std::collections::HashSet;

use super::ValueId;
use super::op::{Gradient, Op};
use super::step::Step;
use crate::backend::{
    Access, AttentionBackward, Backend, LinearBackward, LinearForward, Rotary, Sink,
    SwiGluBackward, SwiGluForward,
};
use crate::error::{Error, Result};
use crate::tensor::View;

/// Two steps, one directly after the other. Where a backend has no kernel that does both, they run one
/// after the other.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fused<H> {
    /// A product, and the rotation of what it gives.
    LinearRotary(LinearForward<H>, Rotary<H>),
    /// A product, and SwiGLU of what it gives.
    LinearSwiGlu(LinearForward<H>, SwiGluForward<H>),
    /// Gradients of a product, and of SwiGLU from the d_inp of the first, which nobody else reads.
    LinearSwiGluBackward(LinearBackward<H>, SwiGluBackward<H>),
    /// The gradient of attention, and the rotation back of its d_qkv.
    AttentionRotaryBackward(AttentionBackward<H>, Rotary<H>),
}

impl<H: Copy> Fused<H> {
    pub fn name(&self) -> &'static str {
        match self {
            Fused::LinearRotary(..) => "linear, rotary",
            Fused::LinearSwiGlu(..) => "linear, swiglu",
            Fused::LinearSwiGluBackward(..) => "gradients of linear, swiglu",
            Fused::AttentionRotaryBackward(..) => "gradients of attention, rotary",
        }
    }

    /// Whether it consists of gradients.
    pub fn is_backward(&self) -> bool {
        match self {
            Fused::LinearRotary(..) | Fused::LinearSwiGlu(..) => false,
            Fused::LinearSwiGluBackward(..) | Fused::AttentionRotaryBackward(..) => true,
        }
    }

    /// One by one.
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

    /// The same over other handles; `f` sees the operands of the first, then those of the second.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Fused<K> {
        match self {
            Fused::LinearRotary(linear, rotary) => {
                Fused::LinearRotary(linear.map(f), rotary.map(f))
            }
            Fused::LinearSwiGlu(linear, swiglu) => {
                Fused::LinearSwiGlu(linear.map(f), swiglu.map(f))
            }
            Fused::LinearSwiGluBackward(linear, swiglu) => {
                Fused::LinearSwiGluBackward(linear.map(f), swiglu.map(f))
            }
            Fused::AttentionRotaryBackward(attention, rotary) => {
                Fused::AttentionRotaryBackward(attention.map(f), rotary.map(f))
            }
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
                what:
                    "it was planned to compute SwiGLU's gradient with the product before it, and \
                       cannot"
                        .to_string(),
                remedy: "plan for the device that trains".to_string(),
            }),
        }
    }

    /// Whether what the first leaves to the second has no memory.
    fn needs_one_kernel(&self) -> bool {
        match self {
            Fused::LinearSwiGluBackward(linear, _) => linear.d_inp.to.shape.elements() == 0,
            _ => false,
        }
    }

    /// Whether the backend did both.
    fn run_as_one(&self, backend: &mut impl Backend) -> Result<bool> {
        match *self {
            Fused::LinearRotary(linear, rotary) => backend.linear_rotary_forward(linear, rotary),
            Fused::LinearSwiGlu(linear, swiglu) => backend.linear_swiglu_forward(linear, swiglu),
            Fused::LinearSwiGluBackward(linear, swiglu) => {
                backend.linear_swiglu_backward(linear, swiglu)
            }
            Fused::AttentionRotaryBackward(attention, rotary) => {
                backend.attention_rotary_backward(attention, rotary)
            }
        }
    }
}

// ------------------------------------------------------------------ what is joined

/// Joins neighbours; what is `kept`, or read by any other step, stays a result of its own.
pub(super) fn fuse(steps: Vec<Step<ValueId>>, kept: &[ValueId]) -> Vec<Step<ValueId>> {
    let mut all: Vec<Step<ValueId>> = Vec::with_capacity(steps.len());
    for (index, &step) in steps.iter().enumerate() {
        let read_once = |id: ValueId| {
            let later = steps[index + 1..].iter().flat_map(|step| step.operands());
            !kept.contains(&id) && !later.into_iter().any(|(other, _)| other == id)
        };
        match all.last().and_then(|&before| joined(before, step, read_once)) {
            Some(fused) => *all.last_mut().expect("it has a last one") = Step::Fused(fused),
            None => all.push(step),
        }
    }
    all
}

/// Gradients between SwiGLU's and that of the linear layer after it: no other step knows of them, and
/// a device that computes both at once does not, either.
pub(super) fn scratch_of_pairs(steps: &[Step<ValueId>]) -> HashSet<ValueId> {
    let between = |step: &Step<ValueId>| match step {
        Step::Fused(Fused::LinearSwiGluBackward(linear, _)) => Some(linear.d_inp.to),
        _ => None,
    };
    steps.iter().filter_map(between).collect()
}

/// The two as one; `read_once`: by no step after them.
fn joined(
    before: Step<ValueId>,
    step: Step<ValueId>,
    read_once: impl Fn(ValueId) -> bool,
) -> Option<Fused<ValueId>> {
    match (before, step) {
        (Step::Forward(Op::Linear(linear)), Step::Forward(next)) if linear.residual.is_none() => {
            match next {
                Op::Rotary(rotary) if rotary.qkv == linear.out => {
                    Some(Fused::LinearRotary(linear, rotary))
                }
                Op::SwiGlu(swiglu) if swiglu.inp == linear.out => {
                    Some(Fused::LinearSwiGlu(linear, swiglu))
                }
                _ => None,
            }
        }
        (Step::Backward(Gradient::Linear(linear)), Step::Backward(Gradient::SwiGlu(swiglu))) => {
            let between = Sink { to: swiglu.d_out, accumulate: false };
            (linear.d_inp == between && read_once(swiglu.d_out))
                .then_some(Fused::LinearSwiGluBackward(linear, swiglu))
        }
        (
            Step::Backward(Gradient::Attention(attention)),
            Step::Backward(Gradient::Rotary(rotary)),
        ) if rotary.qkv == attention.d_qkv && rotary.heads == attention.spec.heads => {
            Some(Fused::AttentionRotaryBackward(attention, rotary))
        }
        _ => None,
    }
}

//! Which steps run as one: found in a finished list of steps, so that neither recording nor the
//! backward rules know of them.

use std::collections::HashSet;

use super::fused::Fused;
use super::op::{Gradient, Op};
use super::{Step, ValueId};
use crate::backend::Sink;

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

/// Gradients between a linear layer and the SwiGLU before it, in steps that are both: no other step
/// reads them, and a device that computes both at once does not store them.
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

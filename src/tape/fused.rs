//! Steps that run as one: what makes a tensor, and what would read all of it once more.
//!
//! [`fuse`] finds them in a finished list of steps, so neither recording nor the backward rules know
//! of them.

use std::collections::HashSet;

use super::ValueId;
use super::op::{Gradient, Op};
use super::step::{Fused, Step};
use crate::backend::Sink;

/// Joins neighbours; what is `kept`, or read by any other step, stays a result of its own.
pub(super) fn fuse(steps: Vec<Step<ValueId>>, kept: &[ValueId]) -> Vec<Step<ValueId>> {
    let mut all: Vec<Step<ValueId>> = Vec::with_capacity(steps.len());
    for (index, &step) in steps.iter().enumerate() {
        let read_once = |id: ValueId| {
            let behind = steps[index + 1..].iter().flat_map(|step| step.operands());
            !kept.contains(&id) && !behind.into_iter().any(|(other, _)| other == id)
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
    let between = |step: &Step<ValueId>| match *step {
        Step::Fused(Fused::Backward([Gradient::Linear { d_inp, .. }, Gradient::SwiGlu { .. }])) => {
            Some(d_inp.to)
        }
        _ => None,
    };
    steps.iter().filter_map(between).collect()
}

/// The two as one, of those that [`Backend`](crate::backend::Backend) has a method for; `read_once`: by no
/// step after them. What is joined here and not known to [`Fused`]'s `run` panics there.
fn joined(
    before: Step<ValueId>,
    step: Step<ValueId>,
    read_once: impl Fn(ValueId) -> bool,
) -> Option<Fused<ValueId>> {
    let (fused, joins) = match (before, step) {
        (Step::Forward(first), Step::Forward(second)) => {
            let joins = match (first, second) {
                (Op::Linear { residual: None, out, .. }, Op::Rotary { qkv, .. }) => out == qkv,
                (Op::Linear { residual: None, out, .. }, Op::SwiGlu { inp, .. }) => out == inp,
                _ => false,
            };
            (Fused::Forward([first, second]), joins)
        }
        (Step::Backward(first), Step::Backward(second)) => {
            let joins = match (first, second) {
                // The gradient between the two is scratch then.
                (Gradient::Linear { d_inp, .. }, Gradient::SwiGlu { d_out, .. }) => {
                    d_inp == (Sink { to: d_out, accumulate: false }) && read_once(d_out)
                }
                (
                    Gradient::Attention { spec, d_qkv, .. },
                    Gradient::Rotary { heads, d_qkv: rotated, .. },
                ) => d_qkv == rotated && spec.heads == heads,
                _ => false,
            };
            (Fused::Backward([first, second]), joins)
        }
        _ => return None,
    };
    joins.then_some(fused)
}

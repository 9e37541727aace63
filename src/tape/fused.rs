//! Steps that run as one: what makes a tensor, and what would read all of it once more.
//!
//! [`fuse`] finds them in a finished list of steps, so neither recording nor the backward rules know
//! of them. Where a backend has no kernel that does both, they run one after the other.

use super::ValueId;
use super::op::{Access, Gradient, Op, Step};
use crate::backend::{Backend, Sink};
use crate::error::Result;
use crate::tensor::View;

/// Two steps, one directly behind the other.
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
        match self.run_as_one(backend)? {
            true => Ok(()),
            false => self.parts().iter().try_for_each(|part| part.run(backend)),
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
            _ => Ok(false),
        }
    }
}

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

/// The two as one, of those that [`Backend`] has a method for; `read_once`: by no step behind them.
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

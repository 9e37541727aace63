//! Steps that run as one: what makes a tensor, and what would read all of it once more.
//!
//! [`fuse`] finds them in a finished list of steps, so neither recording nor the backward rules know
//! of them. Which there are is said once, by [`Fused`]; what runs them and what estimates their time
//! are matches over it.

use std::collections::HashSet;

use super::ValueId;
use super::op::{Access, Gradient, Op};
use super::step::Step;
use crate::backend::{AttentionSpec, Backend, HeadSpec, Sink};
use crate::error::{Error, Result};
use crate::tensor::View;

use Access::{Read, Update, Write};

/// Two steps, one directly after the other. Where a backend has no kernel that does both, they run one
/// after the other.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fused<H> {
    /// [`Op::Linear`], and [`Op::Rotary`] of what it gives.
    LinearRotary { inp: H, weight: H, heads: HeadSpec, table: H, positions: H, qkv: H },
    /// [`Op::Linear`], and [`Op::SwiGlu`] of what it gives.
    LinearSwiGlu { inp: H, weight: H, gate_up: H, out: H },
    /// [`Gradient::Linear`], and [`Gradient::SwiGlu`] of its `d_inp`, which nobody else reads.
    LinearSwiGluBackward {
        inp: H,
        weight: H,
        d_out: H,
        d_weight: H,
        gate_up: H,
        d_inp: H,
        d_gate_up: H,
    },
    /// [`Gradient::Attention`], and [`Gradient::Rotary`] of its `d_qkv`.
    AttentionRotaryBackward {
        spec: AttentionSpec,
        qkv: H,
        document_starts: Option<H>,
        out: H,
        log_sum_exp: H,
        d_out: H,
        delta: H,
        table: H,
        positions: H,
        d_qkv: H,
    },
}

impl<H: Copy> Fused<H> {
    pub fn name(&self) -> &'static str {
        match self {
            Fused::LinearRotary { .. } => "linear, rotary",
            Fused::LinearSwiGlu { .. } => "linear, swiglu",
            Fused::LinearSwiGluBackward { .. } => "gradients of linear, swiglu",
            Fused::AttentionRotaryBackward { .. } => "gradients of attention, rotary",
        }
    }

    /// Whether it consists of gradients.
    pub fn is_backward(&self) -> bool {
        match self {
            Fused::LinearRotary { .. } | Fused::LinearSwiGlu { .. } => false,
            Fused::LinearSwiGluBackward { .. } | Fused::AttentionRotaryBackward { .. } => true,
        }
    }

    /// One by one.
    pub fn parts(self) -> [Step<H>; 2] {
        match self {
            Fused::LinearRotary { inp, weight, heads, table, positions, qkv } => [
                Step::Forward(Op::Linear { inp, weight, residual: None, out: qkv }),
                Step::Forward(Op::Rotary { heads, table, positions, qkv }),
            ],
            Fused::LinearSwiGlu { inp, weight, gate_up, out } => [
                Step::Forward(Op::Linear { inp, weight, residual: None, out: gate_up }),
                Step::Forward(Op::SwiGlu { inp: gate_up, out }),
            ],
            Fused::LinearSwiGluBackward {
                inp,
                weight,
                d_out,
                d_weight,
                gate_up,
                d_inp,
                d_gate_up,
            } => {
                let scratch = Sink { to: d_inp, accumulate: false };
                [
                    Step::Backward(Gradient::Linear {
                        inp,
                        weight,
                        d_out,
                        d_inp: scratch,
                        d_weight,
                    }),
                    Step::Backward(Gradient::SwiGlu {
                        inp: gate_up,
                        d_out: d_inp,
                        d_inp: d_gate_up,
                    }),
                ]
            }
            Fused::AttentionRotaryBackward {
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
            } => [
                Step::Backward(Gradient::Attention {
                    spec,
                    qkv,
                    document_starts,
                    out,
                    log_sum_exp,
                    d_out,
                    delta,
                    d_qkv,
                }),
                Step::Backward(Gradient::Rotary { heads: spec.heads, table, positions, d_qkv }),
            ],
        }
    }

    /// The same over other handles; `f` sees each operand once, with its access.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Fused<K> {
        match self {
            Fused::LinearRotary { inp, weight, heads, table, positions, qkv } => {
                Fused::LinearRotary {
                    inp: f(inp, Read),
                    weight: f(weight, Read),
                    heads,
                    table: f(table, Read),
                    positions: f(positions, Read),
                    qkv: f(qkv, Write),
                }
            }
            Fused::LinearSwiGlu { inp, weight, gate_up, out } => Fused::LinearSwiGlu {
                inp: f(inp, Read),
                weight: f(weight, Read),
                gate_up: f(gate_up, Write),
                out: f(out, Write),
            },
            Fused::LinearSwiGluBackward {
                inp,
                weight,
                d_out,
                d_weight,
                gate_up,
                d_inp,
                d_gate_up,
            } => Fused::LinearSwiGluBackward {
                inp: f(inp, Read),
                weight: f(weight, Read),
                d_out: f(d_out, Read),
                d_weight: f(d_weight, Update),
                gate_up: f(gate_up, Read),
                d_inp: f(d_inp, Write),
                d_gate_up: f(d_gate_up, Write),
            },
            Fused::AttentionRotaryBackward {
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
            } => Fused::AttentionRotaryBackward {
                spec,
                qkv: f(qkv, Read),
                document_starts: document_starts.map(|starts| f(starts, Read)),
                out: f(out, Read),
                log_sum_exp: f(log_sum_exp, Read),
                d_out: f(d_out, Read),
                delta: f(delta, Write),
                table: f(table, Read),
                positions: f(positions, Read),
                d_qkv: f(d_qkv, Write),
            },
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
            Fused::LinearSwiGluBackward { d_inp, .. } => d_inp.shape.elements() == 0,
            _ => false,
        }
    }

    /// Whether the backend did both.
    fn run_as_one(&self, backend: &mut impl Backend) -> Result<bool> {
        match *self {
            Fused::LinearRotary { inp, weight, heads, table, positions, qkv } => {
                backend.linear_rotary_forward(heads, inp, weight, table, positions, qkv)
            }
            Fused::LinearSwiGlu { inp, weight, gate_up, out } => {
                backend.linear_swiglu_forward(inp, weight, gate_up, out)
            }
            Fused::LinearSwiGluBackward {
                inp,
                weight,
                d_out,
                d_weight,
                gate_up,
                d_inp,
                d_gate_up,
            } => backend
                .linear_swiglu_backward(inp, weight, d_out, d_weight, gate_up, d_inp, d_gate_up),
            Fused::AttentionRotaryBackward {
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
            } => backend.attention_rotary_backward(
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
    let between = |step: &Step<ValueId>| match *step {
        Step::Fused(Fused::LinearSwiGluBackward { d_inp, .. }) => Some(d_inp),
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
        (Step::Forward(Op::Linear { inp, weight, residual: None, out }), Step::Forward(next)) => {
            match next {
                Op::Rotary { heads, table, positions, qkv } if qkv == out => {
                    Some(Fused::LinearRotary { inp, weight, heads, table, positions, qkv })
                }
                Op::SwiGlu { inp: gate_up, out: product } if gate_up == out => {
                    Some(Fused::LinearSwiGlu { inp, weight, gate_up, out: product })
                }
                _ => None,
            }
        }
        (
            Step::Backward(Gradient::Linear { inp, weight, d_out, d_inp, d_weight }),
            Step::Backward(Gradient::SwiGlu { inp: gate_up, d_out: d_product, d_inp: d_gate_up }),
        ) => {
            let between = Sink { to: d_product, accumulate: false };
            (d_inp == between && read_once(d_product)).then_some(Fused::LinearSwiGluBackward {
                inp,
                weight,
                d_out,
                d_weight,
                gate_up,
                d_inp: d_product,
                d_gate_up,
            })
        }
        (
            Step::Backward(Gradient::Attention {
                spec,
                qkv,
                document_starts,
                out,
                log_sum_exp,
                d_out,
                delta,
                d_qkv,
            }),
            Step::Backward(Gradient::Rotary { heads, table, positions, d_qkv: rotated }),
        ) if rotated == d_qkv && heads == spec.heads => Some(Fused::AttentionRotaryBackward {
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
        }),
        _ => None,
    }
}

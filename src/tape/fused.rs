//! Steps that run as one: what makes a tensor, and what would read all of it once more.
//!
//! [`fuse`] finds them in a finished list of steps, so neither recording nor the backward rules know
//! of them. The operands are those of both; where a backend has no kernel that does both, its two
//! [`parts`](Fused::parts) run one after the other.

use super::ValueId;
use super::op::{Access, Gradient, Op, Step};
use crate::backend::{AttentionSpec, Backend, HeadSpec, Sink};
use crate::error::Result;
use crate::tensor::View;

/// Two steps; shapes and formulas stand at the methods of [`Backend`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fused<H> {
    LinearRotary {
        heads: HeadSpec,
        inp: H,
        weight: H,
        table: H,
        positions: H,
        qkv: H,
    },
    LinearSwiGlu {
        inp: H,
        weight: H,
        gate_up: H,
        out: H,
    },
    LinearSwiGluGradient {
        inp: H,
        weight: H,
        d_out: H,
        d_weight: H,
        gate_up: H,
        /// The gradient of `inp`, which nobody else reads: scratch.
        d_inp: H,
        d_gate_up: H,
    },
    AttentionRotaryGradient {
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

use Access::{Read, Update, Write};

impl<H: Copy> Fused<H> {
    /// The same over other handles; `f` sees each operand once, with its access.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Fused<K> {
        match self {
            Fused::LinearRotary { heads, inp, weight, table, positions, qkv } => {
                Fused::LinearRotary {
                    heads,
                    inp: f(inp, Read),
                    weight: f(weight, Read),
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
            Fused::LinearSwiGluGradient {
                inp,
                weight,
                d_out,
                d_weight,
                gate_up,
                d_inp,
                d_gate_up,
            } => Fused::LinearSwiGluGradient {
                inp: f(inp, Read),
                weight: f(weight, Read),
                d_out: f(d_out, Read),
                d_weight: f(d_weight, Update),
                gate_up: f(gate_up, Read),
                d_inp: f(d_inp, Write),
                d_gate_up: f(d_gate_up, Write),
            },
            Fused::AttentionRotaryGradient {
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
            } => Fused::AttentionRotaryGradient {
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

impl<H: Copy> Fused<H> {
    /// The steps that it was joined from.
    pub fn parts(self) -> [Step<H>; 2] {
        match self {
            Fused::LinearRotary { heads, inp, weight, table, positions, qkv } => [
                Step::Forward(Op::Linear { inp, weight, residual: None, out: qkv }),
                Step::Forward(Op::Rotary { heads, table, positions, qkv }),
            ],
            Fused::LinearSwiGlu { inp, weight, gate_up, out } => [
                Step::Forward(Op::Linear { inp, weight, residual: None, out: gate_up }),
                Step::Forward(Op::SwiGlu { inp: gate_up, out }),
            ],
            Fused::LinearSwiGluGradient {
                inp,
                weight,
                d_out,
                d_weight,
                gate_up,
                d_inp,
                d_gate_up,
            } => {
                let sink = Sink { to: d_inp, accumulate: false };
                [
                    Step::Backward(Gradient::Linear { inp, weight, d_out, d_inp: sink, d_weight }),
                    Step::Backward(Gradient::SwiGlu {
                        inp: gate_up,
                        d_out: d_inp,
                        d_inp: d_gate_up,
                    }),
                ]
            }
            Fused::AttentionRotaryGradient {
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
}

impl Fused<View> {
    pub(super) fn run(&self, backend: &mut impl Backend) -> Result<()> {
        let together = match *self {
            Fused::LinearRotary { heads, inp, weight, table, positions, qkv } => {
                backend.linear_rotary_forward(heads, inp, weight, table, positions, qkv)
            }
            Fused::LinearSwiGlu { inp, weight, gate_up, out } => {
                backend.linear_swiglu_forward(inp, weight, gate_up, out)
            }
            Fused::LinearSwiGluGradient {
                inp,
                weight,
                d_out,
                d_weight,
                gate_up,
                d_inp,
                d_gate_up,
            } => backend
                .linear_swiglu_backward(inp, weight, d_out, d_weight, gate_up, d_inp, d_gate_up),
            Fused::AttentionRotaryGradient {
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
        };
        match together? {
            true => Ok(()),
            false => self.parts().iter().try_for_each(|part| part.run(backend)),
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

/// The two as one; `read_once`: by no step behind them.
fn joined(
    before: Step<ValueId>,
    step: Step<ValueId>,
    read_once: impl Fn(ValueId) -> bool,
) -> Option<Fused<ValueId>> {
    match (before, step) {
        (
            Step::Forward(Op::Linear { inp, weight, residual: None, out }),
            Step::Forward(Op::Rotary { heads, table, positions, qkv }),
        ) if out == qkv => Some(Fused::LinearRotary { heads, inp, weight, table, positions, qkv }),
        (
            Step::Forward(Op::Linear { inp, weight, residual: None, out: gate_up }),
            Step::Forward(Op::SwiGlu { inp: read, out }),
        ) if gate_up == read => Some(Fused::LinearSwiGlu { inp, weight, gate_up, out }),
        (
            Step::Backward(Gradient::Linear { inp, weight, d_out, d_inp, d_weight }),
            Step::Backward(Gradient::SwiGlu { inp: gate_up, d_out: read, d_inp: d_gate_up }),
        ) if d_inp == (Sink { to: read, accumulate: false }) && read_once(read) => {
            let d_inp = read;
            Some(Fused::LinearSwiGluGradient {
                inp,
                weight,
                d_out,
                d_weight,
                gate_up,
                d_inp,
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
        ) if d_qkv == rotated && spec.heads == heads => Some(Fused::AttentionRotaryGradient {
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

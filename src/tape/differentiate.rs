//! From recorded ops to the steps of a training pass, or of a vector-Jacobian product: the backward
//! rule of each op.
//!
//! Ops are visited in reverse. The first contribution to an activation's gradient is written, the
//! rest are added; a residual passes its gradient on without a copy, so the gradient of the
//! residual stream is one tensor through the whole model. What recomputation does not keep
//! (recompute.rs) is computed again before the first backward step that reads it, under a new
//! name, and with it whatever else that needs. Steps whose results nobody reads are then dropped.

use std::collections::{HashMap, HashSet};

use super::recompute::not_kept;
use super::{Access, External, Gradient, Op, Role, Step, Tape, Value, ValueId};
use crate::backend::{
    AttentionBackward, AttentionForward, CrossEntropyBackward, CrossEntropyForward,
    EmbeddingBackward, EmbeddingForward, GainGradient, LinearBackward, LinearForward,
    NORM_PARTIAL_ROWS, NormBackward, NormForward, Rotary, ScaledResidualBackward,
    ScaledResidualForward, Sink, SwiGluBackward, SwiGluForward,
};
use crate::config::Recompute;
use crate::error::{Error, Result};
use crate::tensor::{Kind, Shape};

/// Values, and the gradient of each.
pub(super) type Gradients = Vec<(ValueId, ValueId)>;

/// Forward and backward steps, over `tape.values` grown by gradients, scratch and recomputed
/// activations.
pub(super) fn training_steps(
    tape: &mut Tape,
    recompute: Recompute,
    kept: &[ValueId],
) -> Result<Vec<Step<ValueId>>> {
    let pass = Pass::over(tape, recompute, None)?;
    Ok(drop_unread(pass.steps, pass.values, kept))
}

/// Forward and backward steps from the gradient of `out`, an input of the program, or from the
/// tape's own loss, to that of `inp`; and the gradient of each of the two. Errors: `inp` does not
/// lead there.
pub(super) fn vector_jacobian_steps(
    tape: &mut Tape,
    out: Option<ValueId>,
    inp: ValueId,
    kept: &[ValueId],
) -> Result<(Vec<Step<ValueId>>, Gradients)> {
    let seed = out.map(|out| {
        let Value { shape, kind, .. } = tape.values[out.0];
        let d_out = tape.push("output gradient", shape.sizes(), kind, Role::Input);
        (out, d_out)
    });
    let pass = Pass::over(tape, Recompute::None, seed)?;
    let Some(&d_inp) = pass.gradients.get(&inp) else {
        return Err(Error::NoGradient { op: "an input that the output does not depend on" });
    };
    let kept: Vec<ValueId> = kept.iter().copied().chain([d_inp]).collect();
    let steps = drop_unread(pass.steps, pass.values, &kept);
    Ok((steps, seed.into_iter().chain([(inp, d_inp)]).collect()))
}

/// Forward steps only.
pub(super) fn inference_steps(tape: &Tape) -> Vec<Step<ValueId>> {
    tape.ops.iter().map(|recorded| Step::Forward(recorded.op)).collect()
}

/// Removes steps that write nothing that is read later, kept, or lives outside the arena.
fn drop_unread(
    steps: Vec<Step<ValueId>>,
    values: &[Value],
    kept: &[ValueId],
) -> Vec<Step<ValueId>> {
    let mut read: HashSet<ValueId> = kept.iter().copied().collect();
    let mut needed = Vec::with_capacity(steps.len());
    for step in steps.into_iter().rev() {
        let operands = step.operands();
        let wanted = operands.iter().any(|(id, access)| {
            let outside = matches!(values[id.0].role, Role::External(_));
            *access != Access::Read && (outside || read.contains(id))
        });
        if wanted {
            read.extend(
                operands.iter().filter(|(_, access)| *access != Access::Write).map(|o| o.0),
            );
            needed.push(step);
        }
    }
    needed.reverse();
    needed
}

struct Pass<'a> {
    values: &'a mut Vec<Value>,
    /// value -> its gradient, complete once all its readers have been visited
    gradients: HashMap<ValueId, ValueId>,
    /// value that is not kept -> the ops that write it, in order
    writers: HashMap<ValueId, Vec<Op<ValueId>>>,
    /// value -> the same computed again
    again: HashMap<ValueId, ValueId>,
    steps: Vec<Step<ValueId>>,
}

impl<'a> Pass<'a> {
    /// Every op forward, then backward; `seed`: a value and its gradient to begin with.
    fn over(
        tape: &'a mut Tape,
        recompute: Recompute,
        seed: Option<(ValueId, ValueId)>,
    ) -> Result<Self> {
        let ops = tape.ops.clone();
        let writers = not_kept(&ops, recompute);
        let mut pass = Pass {
            values: &mut tape.values,
            gradients: seed.into_iter().collect(),
            writers,
            again: HashMap::new(),
            steps: Vec::new(),
        };
        for recorded in &ops {
            // The loss is computed with its gradient, from one computation of the logits.
            if !matches!(recorded.op, Op::CrossEntropy(..)) {
                pass.steps.push(Step::Forward(recorded.op));
            }
        }
        for recorded in ops.iter().rev() {
            pass.backward(recorded.op)?;
        }
        Ok(pass)
    }

    /// The name under which the backward pass finds an activation: its own if it was kept, else
    /// that of its second computation, which is recorded here when it is first asked for.
    fn activation(&mut self, id: ValueId) -> ValueId {
        if let Some(&again) = self.again.get(&id) {
            return again;
        }
        let Some(writers) = self.writers.remove(&id) else { return id };
        for op in writers {
            for (operand, access) in Step::Forward(op).operands() {
                if access == Access::Read {
                    self.activation(operand);
                }
            }
            let op = op.map(&mut |operand, access| {
                if access == Access::Write {
                    let Value { name, shape, kind, .. } = self.values[operand.0];
                    let again = self.push(name, shape, kind);
                    self.again.insert(operand, again);
                }
                self.again.get(&operand).copied().unwrap_or(operand)
            });
            self.steps.push(Step::Forward(op));
        }
        self.again[&id]
    }

    fn push(&mut self, name: &'static str, shape: Shape, kind: Kind) -> ValueId {
        self.values.push(Value { name, shape, kind, role: Role::Activation });
        ValueId(self.values.len() - 1)
    }

    fn new_gradient(&mut self, of: ValueId) -> ValueId {
        let Value { shape, kind, .. } = self.values[of.0];
        self.push("activation gradient", shape, kind)
    }

    /// For ops that can write or add.
    fn sink(&mut self, of: ValueId) -> Sink<ValueId> {
        if let Some(&to) = self.gradients.get(&of) {
            return Sink { to, accumulate: true };
        }
        let to = self.new_gradient(of);
        self.gradients.insert(of, to);
        Sink { to, accumulate: false }
    }

    /// For ops that can only write: records the step that `make` builds, and an add after it
    /// where a gradient was there already.
    fn written(&mut self, of: ValueId, make: impl FnOnce(ValueId) -> Gradient<ValueId>) {
        let from = self.new_gradient(of);
        self.steps.push(Step::Backward(make(from)));
        match self.gradients.get(&of) {
            Some(&to) => self.steps.push(Step::Add { from, to }),
            None => {
                self.gradients.insert(of, from);
            }
        }
    }

    /// The gradient of an operand that was added unchanged; `d_out` has no reader left.
    fn pass_on(&mut self, d_out: ValueId, of: ValueId) {
        match self.gradients.get(&of) {
            Some(&to) => self.steps.push(Step::Add { from: d_out, to }),
            None => {
                self.gradients.insert(of, d_out);
            }
        }
    }

    /// Scratch for the sums that make the gradient of a gain; `out` [T,C].
    fn gain_partial(&mut self, out: ValueId) -> ValueId {
        let [t, c] = [0, 1].map(|i| self.values[out.0].shape.sizes()[i]);
        let shape = Shape::new(&[t.div_ceil(NORM_PARTIAL_ROWS), c]);
        self.push("gain partial sums", shape, Kind::Statistic)
    }

    fn parameter_gradient(&mut self, of: ValueId) -> Result<ValueId> {
        if let Some(&gradient) = self.gradients.get(&of) {
            return Ok(gradient);
        }
        let Value { shape, role, .. } = self.values[of.0];
        let Role::External(External::Parameter(index)) = role else {
            return Err(Error::NoGradient { op: "a weight that is not a parameter" });
        };
        self.values.push(Value {
            name: "parameter gradient",
            shape,
            kind: Kind::Statistic,
            role: Role::External(External::ParameterGradient(index)),
        });
        let gradient = ValueId(self.values.len() - 1);
        self.gradients.insert(of, gradient);
        Ok(gradient)
    }

    /// The backward rules, one arm an op. Gradients are known by the names of the forward pass.
    fn backward(&mut self, op: Op<ValueId>) -> Result<()> {
        match op {
            Op::Embedding(EmbeddingForward { tokens, table, out }) => {
                let Some(&d_out) = self.gradients.get(&out) else { return Ok(()) };
                let d_table = self.parameter_gradient(table)?;
                let gradient = EmbeddingBackward { tokens, d_out, d_table };
                self.steps.push(Step::Backward(Gradient::Embedding(gradient)));
            }
            Op::Norm(NormForward { spec, inp, gain, out, mean, rstd }) => {
                let Some(&d_out) = self.gradients.get(&out) else { return Ok(()) };
                let gradient = NormBackward {
                    spec,
                    inp: self.activation(inp),
                    gain,
                    mean: mean.map(|it| self.activation(it)),
                    rstd: self.activation(rstd),
                    d_out,
                    partial: self.gain_partial(out),
                    d_inp: self.sink(inp),
                    d_gain: self.parameter_gradient(gain)?,
                };
                self.steps.push(Step::Backward(Gradient::Norm(gradient)));
            }
            Op::ScaledResidual(ScaledResidualForward { spec, inp, residual, gain, out }) => {
                let Some(&d_out) = self.gradients.get(&out) else { return Ok(()) };
                let gain = match gain {
                    None => None,
                    Some(gain) => Some(GainGradient {
                        inp: self.activation(inp),
                        gain,
                        partial: self.gain_partial(out),
                        d_gain: self.parameter_gradient(gain)?,
                    }),
                };
                self.written(inp, |d_inp| {
                    Gradient::ScaledResidual(ScaledResidualBackward { spec, d_out, d_inp, gain })
                });
                self.pass_on(d_out, residual);
            }
            Op::Linear(LinearForward { inp, weight, residual, out }) => {
                let Some(&d_out) = self.gradients.get(&out) else { return Ok(()) };
                let gradient = LinearBackward {
                    inp: self.activation(inp),
                    weight,
                    d_out,
                    d_inp: self.sink(inp),
                    d_weight: self.parameter_gradient(weight)?,
                };
                self.steps.push(Step::Backward(Gradient::Linear(gradient)));
                if let Some(residual) = residual {
                    self.pass_on(d_out, residual);
                }
            }
            Op::Rotary(rotary) => {
                let Some(&d_qkv) = self.gradients.get(&rotary.qkv) else { return Ok(()) };
                let gradient = Rotary { qkv: d_qkv, ..rotary };
                self.steps.push(Step::Backward(Gradient::Rotary(gradient)));
            }
            Op::Attention(AttentionForward { spec, qkv, document_starts, out, log_sum_exp }) => {
                let Some(&d_out) = self.gradients.get(&out) else { return Ok(()) };
                let shape = self.values[log_sum_exp.0].shape;
                let delta = self.push("attention delta", shape, Kind::Statistic);
                let [kept, out, log_sum_exp] =
                    [qkv, out, log_sum_exp].map(|it| self.activation(it));
                self.written(qkv, |d_qkv| {
                    Gradient::Attention(AttentionBackward {
                        spec,
                        qkv: kept,
                        document_starts,
                        out,
                        log_sum_exp,
                        d_out,
                        delta,
                        d_qkv,
                    })
                });
            }
            Op::CachedAttention(_) => return Err(Error::NoGradient { op: op.name() }),
            Op::SwiGlu(SwiGluForward { inp, out }) => {
                let Some(&d_out) = self.gradients.get(&out) else { return Ok(()) };
                let kept = self.activation(inp);
                self.written(inp, |d_inp| {
                    Gradient::SwiGlu(SwiGluBackward { inp: kept, d_out, d_inp })
                });
            }
            Op::CrossEntropy(forward, scale) => {
                let CrossEntropyForward { inp, weight, .. } = forward;
                let d_weight = self.parameter_gradient(weight)?;
                let forward = CrossEntropyForward { inp: self.activation(inp), ..forward };
                self.written(inp, |d_inp| {
                    Gradient::CrossEntropy(CrossEntropyBackward { forward, scale, d_inp, d_weight })
                });
            }
        }
        Ok(())
    }
}

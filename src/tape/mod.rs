//! The tape: a model's forward pass, recorded once for a shape and then plain data.
//!
//! ```text
//! Tape (ops over values) -> differentiate -> steps -> fuse -> memory plan -> Program (steps over
//! views)
//! ```
//!
//! Recording checks every shape. Values have one writer; `rotary` alone works in place. A tape
//! knows neither a device nor a model.

mod differentiate;
mod fuse;
mod fused;
mod memory;
mod op;
mod program;
mod recompute;
mod step;

pub use fused::Fused;
pub use memory::{MemoryLine, MemoryPlan};
pub use op::{Gradient, Op};
pub use program::{BoundProgram, Program, Purpose};
pub use step::Step;

pub use crate::backend::Access;
use crate::backend::{
    AttentionForward, AttentionSpec, CachedAttention, CrossEntropyForward, EmbeddingForward,
    HeadSpec, LinearForward, LossSpec, NormForward, NormSpec, ResidualSpec, Rotary,
    ScaledResidualForward, SwiGluForward,
};
use crate::config::NormKind;
use crate::error::{Error, Result};
use crate::tensor::{Kind, Shape};

/// Most elements of logits that exist at one time, if that is at least [`LOGITS_TOKENS`]' worth;
/// see [`Tape::hold_logits`].
const LOGITS_ELEMENTS: usize = 16 << 20;
/// A chunk is a multiple of this: no tile of a matmul is cut.
const LOGITS_TOKENS: usize = 128;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ValueId(usize);

#[derive(Clone, Debug)]
pub struct Value {
    pub name: &'static str,
    pub shape: Shape,
    pub kind: Kind,
    pub role: Role,
}

/// Who owns a value's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Written by the caller before a run; in the arena for the whole program.
    Input,
    /// Written and read by ops; in the arena while it is needed.
    Activation,
    /// Somewhere else; the caller says where when the program is bound.
    External(External),
}

/// Memory that outlives a program; the numbers are the caller's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum External {
    Parameter(usize),
    ParameterGradient(usize),
    Cache(usize),
}

#[derive(Clone, Debug)]
struct Recorded {
    op: Op<ValueId>,
    /// The block whose input is kept, however much of it is computed again.
    block: Option<usize>,
}

#[derive(Clone, Debug)]
pub struct Tape {
    values: Vec<Value>,
    ops: Vec<Recorded>,
    block: Option<usize>,
    logits_elements: usize,
}

impl Default for Tape {
    fn default() -> Self {
        Tape { values: vec![], ops: vec![], block: None, logits_elements: LOGITS_ELEMENTS }
    }
}

impl Tape {
    pub fn new() -> Self {
        Tape::default()
    }

    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0]
    }

    /// Losses that are recorded from here on hold up to so many elements of logits at one time:
    /// more of them fill a larger machine, and read the head and its gradient less often.
    pub fn hold_logits(&mut self, elements: usize) {
        self.logits_elements = elements;
    }

    fn push(&mut self, name: &'static str, sizes: &[usize], kind: Kind, role: Role) -> ValueId {
        self.values.push(Value { name, shape: Shape::new(sizes), kind, role });
        ValueId(self.values.len() - 1)
    }

    fn activation(&mut self, name: &'static str, sizes: &[usize]) -> ValueId {
        self.push(name, sizes, Kind::Activation, Role::Activation)
    }

    fn statistic(&mut self, name: &'static str, sizes: &[usize]) -> ValueId {
        self.push(name, sizes, Kind::Statistic, Role::Activation)
    }

    fn record(&mut self, op: Op<ValueId>) {
        self.ops.push(Recorded { op, block: self.block });
    }

    fn check(
        &self,
        op: &'static str,
        what: &'static str,
        id: ValueId,
        expected: &[usize],
    ) -> Result<()> {
        let (found, expected) = (self.values[id.0].shape, Shape::new(expected));
        if found == expected { Ok(()) } else { Err(Error::Shape { op, what, found, expected }) }
    }

    fn sizes<const N: usize>(&self, op: &'static str, id: ValueId) -> Result<[usize; N]> {
        let value = &self.values[id.0];
        value.shape.sizes().try_into().map_err(|_| Error::Shape {
            op,
            what: value.name,
            found: value.shape,
            expected: Shape::new(&[0; 4][..N]),
        })
    }

    /// Ops recorded until [`Tape::end_block`] may be computed again in the backward pass; what
    /// other ops read of them is always kept.
    pub fn begin_block(&mut self, block: usize) {
        self.block = Some(block);
    }

    pub fn end_block(&mut self) {
        self.block = None;
    }

    /// Token ids, targets or positions that the caller writes before a run.
    pub fn index_input(&mut self, name: &'static str, sizes: &[usize]) -> ValueId {
        self.push(name, sizes, Kind::Index, Role::Input)
    }

    /// Numbers that the caller writes before a run.
    pub fn input(&mut self, name: &'static str, sizes: &[usize]) -> ValueId {
        self.push(name, sizes, Kind::Statistic, Role::Input)
    }

    /// Activations that the caller writes before a run.
    pub fn activation_input(&mut self, name: &'static str, sizes: &[usize]) -> ValueId {
        self.push(name, sizes, Kind::Activation, Role::Input)
    }

    /// Memory that lives elsewhere: a parameter, or a cache.
    pub fn external(
        &mut self,
        name: &'static str,
        sizes: &[usize],
        kind: Kind,
        external: External,
    ) -> ValueId {
        self.push(name, sizes, kind, Role::External(external))
    }

    /// tokens [T], table [V,C] -> [T,C]
    pub fn embedding(&mut self, tokens: ValueId, table: ValueId) -> Result<ValueId> {
        let [t] = self.sizes("embedding", tokens)?;
        let [_, c] = self.sizes("embedding", table)?;
        let out = self.activation("embedding", &[t, c]);
        self.record(Op::Embedding(EmbeddingForward { tokens, table, out }));
        Ok(out)
    }

    /// inp [T,C], gain [C] -> [T,C]
    pub fn norm(&mut self, spec: NormSpec, inp: ValueId, gain: ValueId) -> Result<ValueId> {
        let [t, c] = self.sizes("norm", inp)?;
        self.check("norm", "gain", gain, &[c])?;
        let out = self.activation("norm", &[t, c]);
        let mean = match spec.kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(self.statistic("norm mean", &[t])),
        };
        let rstd = self.statistic("norm rstd", &[t]);
        self.record(Op::Norm(NormForward { spec, inp, gain, out, mean, rstd }));
        Ok(out)
    }

    /// inp, residual [T,C], gain [C] or [1] -> stream_scale residual + branch_scale gain inp [T,C]
    pub fn scaled_residual(
        &mut self,
        spec: ResidualSpec,
        inp: ValueId,
        residual: ValueId,
        gain: Option<ValueId>,
    ) -> Result<ValueId> {
        let [t, c] = self.sizes("scaled residual", inp)?;
        self.check("scaled residual", "residual", residual, &[t, c])?;
        if let Some(gain) = gain {
            let [columns] = self.sizes("scaled residual", gain)?;
            let expected = if columns == 1 { 1 } else { c };
            self.check("scaled residual", "gain", gain, &[expected])?;
        }
        let out = self.activation("residual stream", &[t, c]);
        self.record(Op::ScaledResidual(ScaledResidualForward { spec, inp, residual, gain, out }));
        Ok(out)
    }

    /// inp [T,I], weight [O,I], residual [T,O] -> [T,O]
    pub fn linear(
        &mut self,
        name: &'static str,
        inp: ValueId,
        weight: ValueId,
        residual: Option<ValueId>,
    ) -> Result<ValueId> {
        let [t, i] = self.sizes("linear", inp)?;
        let [o, _] = self.sizes("linear", weight)?;
        self.check("linear", "weight", weight, &[o, i])?;
        if let Some(residual) = residual {
            self.check("linear", "residual", residual, &[t, o])?;
        }
        let out = self.activation(name, &[t, o]);
        self.record(Op::Linear(LinearForward { inp, weight, residual, out }));
        Ok(out)
    }

    /// Rotates q and k of qkv [T,(H+2K)D] in place; table [P,D], positions [T].
    pub fn rotary(
        &mut self,
        heads: HeadSpec,
        table: ValueId,
        positions: ValueId,
        qkv: ValueId,
    ) -> Result<()> {
        let [t] = self.sizes("rotary", positions)?;
        let [p, _] = self.sizes("rotary", table)?;
        self.check("rotary", "table", table, &[p, heads.head_dim])?;
        self.check("rotary", "qkv", qkv, &[t, heads.qkv_columns()])?;
        self.record(Op::Rotary(Rotary { heads, table, positions, qkv }));
        Ok(())
    }

    /// qkv [T,(H+2K)D], document_starts [T] where rows hold several documents -> [T,HD]
    pub fn attention(
        &mut self,
        spec: AttentionSpec,
        qkv: ValueId,
        document_starts: Option<ValueId>,
    ) -> Result<ValueId> {
        let (b, s, heads) = (spec.batch, spec.sequence, spec.heads);
        self.check("attention", "qkv", qkv, &[b * s, heads.qkv_columns()])?;
        if let Some(starts) = document_starts {
            self.check("attention", "document starts", starts, &[b * s])?;
        }
        let out = self.activation("attention", &[b * s, heads.heads * heads.head_dim]);
        let log_sum_exp = self.statistic("log-sum-exp", &[b, heads.heads, s]);
        self.record(Op::Attention(AttentionForward {
            spec,
            qkv,
            document_starts,
            out,
            log_sum_exp,
        }));
        Ok(out)
    }

    /// qkv [T,(H+2K)D] of one sequence, keys and values [P,KD], positions [T] -> [T,HD]
    pub fn cached_attention(
        &mut self,
        heads: HeadSpec,
        qkv: ValueId,
        keys: ValueId,
        values: ValueId,
        positions: ValueId,
    ) -> Result<ValueId> {
        let [t] = self.sizes("cached attention", positions)?;
        let [p, _] = self.sizes("cached attention", keys)?;
        let columns = heads.kv_heads * heads.head_dim;
        self.check("cached attention", "qkv", qkv, &[t, heads.qkv_columns()])?;
        self.check("cached attention", "keys", keys, &[p, columns])?;
        self.check("cached attention", "values", values, &[p, columns])?;
        let out = self.activation("attention", &[t, heads.heads * heads.head_dim]);
        self.record(Op::CachedAttention(CachedAttention {
            heads,
            qkv,
            keys,
            values,
            positions,
            out,
        }));
        Ok(out)
    }

    /// inp [T,2F] (gate, then up) -> [T,F]
    pub fn swiglu(&mut self, inp: ValueId) -> Result<ValueId> {
        let [t, two_f] = self.sizes("swiglu", inp)?;
        let out = self.activation("swiglu", &[t, two_f / 2]);
        self.check("swiglu", "inp", inp, &[t, two_f / 2 * 2])?;
        self.record(Op::SwiGlu(SwiGluForward { inp, out }));
        Ok(out)
    }

    /// inp [T,C], weight [V,C], targets [T], scale [1] -> losses [T]; in training the gradients
    /// are those of scale[0] * sum(losses). `classes`: rows of weight that are real tokens.
    pub fn cross_entropy(
        &mut self,
        inp: ValueId,
        weight: ValueId,
        targets: ValueId,
        scale: ValueId,
        classes: usize,
        z_loss: f64,
    ) -> Result<ValueId> {
        let [t, c] = self.sizes("cross-entropy", inp)?;
        let [v, _] = self.sizes("cross-entropy", weight)?;
        self.check("cross-entropy", "weight", weight, &[v.max(classes), c])?;
        self.check("cross-entropy", "targets", targets, &[t])?;
        self.check("cross-entropy", "scale", scale, &[1])?;
        let tokens = self.logits_elements / v / LOGITS_TOKENS * LOGITS_TOKENS;
        let chunk = tokens.max(LOGITS_TOKENS).min(t);
        let spec = LossSpec { classes, chunk, z_loss };
        let logits = self.activation("logits", &[chunk, v]);
        let losses = self.statistic("losses", &[t]);
        let op = CrossEntropyForward { spec, inp, weight, targets, logits, losses };
        self.record(Op::CrossEntropy(op, scale));
        Ok(losses)
    }
}

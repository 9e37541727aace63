//! The ops: what can be recorded, and the gradient of each.
//!
//! Both enums are generic over the handle `H`: a [`ValueId`](super::ValueId) while a program is
//! made, a [`View`] when it runs. Formulas, shapes and accesses stand at the operands of each
//! (`backend`); [`Op`] has one more exhaustive match in `differentiate.rs`, so that an op without a
//! backward pass does not compile.

use crate::backend::{
    Access, AttentionBackward, AttentionForward, Backend, CachedAttention, CrossEntropyBackward,
    CrossEntropyForward, EmbeddingBackward, EmbeddingForward, LinearBackward, LinearForward,
    NormBackward, NormForward, Rotary, ScaledResidualBackward, ScaledResidualForward,
    SwiGluBackward, SwiGluForward,
};
use crate::error::Result;
use crate::tensor::View;

/// A recorded op.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Op<H> {
    Embedding(EmbeddingForward<H>),
    Norm(NormForward<H>),
    ScaledResidual(ScaledResidualForward<H>),
    Linear(LinearForward<H>),
    Rotary(Rotary<H>),
    Attention(AttentionForward<H>),
    CachedAttention(CachedAttention<H>),
    SwiGlu(SwiGluForward<H>),
    /// With the scale [1] that its gradient is multiplied by.
    CrossEntropy(CrossEntropyForward<H>, H),
}

/// The backward pass of an op.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Gradient<H> {
    Embedding(EmbeddingBackward<H>),
    Norm(NormBackward<H>),
    ScaledResidual(ScaledResidualBackward<H>),
    Linear(LinearBackward<H>),
    Rotary(Rotary<H>),
    Attention(AttentionBackward<H>),
    SwiGlu(SwiGluBackward<H>),
    CrossEntropy(CrossEntropyBackward<H>),
}

impl<H: Copy> Op<H> {
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embedding(_) => "embedding",
            Op::Norm(_) => "norm",
            Op::ScaledResidual(_) => "scaled residual",
            Op::Linear(_) => "linear",
            Op::Rotary(_) => "rotary",
            Op::Attention(_) => "attention",
            Op::CachedAttention(_) => "cached attention",
            Op::SwiGlu(_) => "swiglu",
            Op::CrossEntropy(..) => "cross-entropy",
        }
    }

    /// The same op over other handles; `f` sees each operand once, with its access.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Op<K> {
        match self {
            Op::Embedding(op) => Op::Embedding(op.map(f)),
            Op::Norm(op) => Op::Norm(op.map(f)),
            Op::ScaledResidual(op) => Op::ScaledResidual(op.map(f)),
            Op::Linear(op) => Op::Linear(op.map(f)),
            Op::Rotary(op) => Op::Rotary(op.map(f)),
            Op::Attention(op) => Op::Attention(op.map(f)),
            Op::CachedAttention(op) => Op::CachedAttention(op.map(f)),
            Op::SwiGlu(op) => Op::SwiGlu(op.map(f)),
            Op::CrossEntropy(op, scale) => Op::CrossEntropy(op.map(f), f(scale, Access::Read)),
        }
    }
}

impl Op<View> {
    pub(super) fn run(&self, backend: &mut impl Backend) -> Result<()> {
        match *self {
            Op::Embedding(op) => backend.embedding_forward(op),
            Op::Norm(op) => backend.norm_forward(op),
            Op::ScaledResidual(op) => backend.scaled_residual_forward(op),
            Op::Linear(op) => backend.linear_forward(op),
            Op::Rotary(op) => backend.rotary_forward(op),
            Op::Attention(op) => backend.attention_forward(op),
            Op::CachedAttention(op) => backend.cached_attention_forward(op),
            Op::SwiGlu(op) => backend.swiglu_forward(op),
            Op::CrossEntropy(op, _) => backend.cross_entropy_forward(op),
        }
    }
}

impl<H: Copy> Gradient<H> {
    /// The same gradient over other handles; `f` sees each operand once, with its access.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Gradient<K> {
        match self {
            Gradient::Embedding(op) => Gradient::Embedding(op.map(f)),
            Gradient::Norm(op) => Gradient::Norm(op.map(f)),
            Gradient::ScaledResidual(op) => Gradient::ScaledResidual(op.map(f)),
            Gradient::Linear(op) => Gradient::Linear(op.map(f)),
            Gradient::Rotary(op) => Gradient::Rotary(op.map(f)),
            Gradient::Attention(op) => Gradient::Attention(op.map(f)),
            Gradient::SwiGlu(op) => Gradient::SwiGlu(op.map(f)),
            Gradient::CrossEntropy(op) => Gradient::CrossEntropy(op.map(f)),
        }
    }
}

impl Gradient<View> {
    pub(super) fn run(&self, backend: &mut impl Backend) -> Result<()> {
        match *self {
            Gradient::Embedding(op) => backend.embedding_backward(op),
            Gradient::Norm(op) => backend.norm_backward(op),
            Gradient::ScaledResidual(op) => backend.scaled_residual_backward(op),
            Gradient::Linear(op) => backend.linear_backward(op),
            Gradient::Rotary(op) => backend.rotary_backward(op),
            Gradient::Attention(op) => backend.attention_backward(op),
            Gradient::SwiGlu(op) => backend.swiglu_backward(op),
            Gradient::CrossEntropy(op) => backend.cross_entropy_backward(op),
        }
    }
}

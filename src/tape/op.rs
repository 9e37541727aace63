//! The ops: what can be recorded, and the gradient of each.
//!
//! Both enums are generic over the handle `H`: a [`ValueId`](super::ValueId) while a program is
//! made, a [`View`] when it runs. Each has one exhaustive match that names every operand with its
//! access (`map`), one that runs it (`run`), and [`Op`] has one more in `differentiate.rs`; an op
//! without a backward pass does not compile.

use crate::backend::{
    AttentionSpec, Backend, GainGradient, HeadSpec, LossSpec, NormSpec, ResidualSpec, Sink,
};
use crate::error::Result;
use crate::tensor::View;

/// What a step does to an operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Read,
    /// The operand's previous content does not matter.
    Write,
    /// Read and written.
    Update,
}

/// A recorded op; shapes and formulas stand at the methods of [`Backend`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Op<H> {
    Embedding { tokens: H, table: H, out: H },
    Norm { spec: NormSpec, inp: H, gain: H, out: H, mean: Option<H>, rstd: H },
    ScaledResidual { spec: ResidualSpec, inp: H, residual: H, gain: Option<H>, out: H },
    Linear { inp: H, weight: H, residual: Option<H>, out: H },
    Rotary { heads: HeadSpec, table: H, positions: H, qkv: H },
    Attention { spec: AttentionSpec, qkv: H, document_starts: Option<H>, out: H, log_sum_exp: H },
    CachedAttention { heads: HeadSpec, qkv: H, keys: H, values: H, positions: H, out: H },
    SwiGlu { inp: H, out: H },
    CrossEntropy { spec: LossSpec, inp: H, weight: H, targets: H, scale: H, logits: H, losses: H },
}

/// The backward pass of an op.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Gradient<H> {
    Embedding {
        tokens: H,
        d_out: H,
        d_table: H,
    },
    Norm {
        spec: NormSpec,
        inp: H,
        gain: H,
        mean: Option<H>,
        rstd: H,
        d_out: H,
        partial: H,
        d_inp: Sink<H>,
        d_gain: H,
    },
    ScaledResidual {
        spec: ResidualSpec,
        d_out: H,
        d_inp: H,
        gain: Option<GainGradient<H>>,
    },
    Linear {
        inp: H,
        weight: H,
        d_out: H,
        d_inp: Sink<H>,
        d_weight: H,
    },
    Rotary {
        heads: HeadSpec,
        table: H,
        positions: H,
        d_qkv: H,
    },
    Attention {
        spec: AttentionSpec,
        qkv: H,
        document_starts: Option<H>,
        out: H,
        log_sum_exp: H,
        d_out: H,
        delta: H,
        d_qkv: H,
    },
    SwiGlu {
        inp: H,
        d_out: H,
        d_inp: H,
    },
    CrossEntropy {
        spec: LossSpec,
        inp: H,
        weight: H,
        targets: H,
        scale: H,
        logits: H,
        losses: H,
        d_inp: H,
        d_weight: H,
    },
}

use Access::{Read, Update, Write};

impl<H: Copy> Sink<H> {
    fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Sink<K> {
        let access = if self.accumulate { Update } else { Write };
        Sink { to: f(self.to, access), accumulate: self.accumulate }
    }
}

impl<H: Copy> Op<H> {
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embedding { .. } => "embedding",
            Op::Norm { .. } => "norm",
            Op::ScaledResidual { .. } => "scaled residual",
            Op::Linear { .. } => "linear",
            Op::Rotary { .. } => "rotary",
            Op::Attention { .. } => "attention",
            Op::CachedAttention { .. } => "cached attention",
            Op::SwiGlu { .. } => "swiglu",
            Op::CrossEntropy { .. } => "cross-entropy",
        }
    }

    /// The same op over other handles; `f` sees each operand once, with its access.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Op<K> {
        match self {
            Op::Embedding { tokens, table, out } => {
                Op::Embedding { tokens: f(tokens, Read), table: f(table, Read), out: f(out, Write) }
            }
            Op::Norm { spec, inp, gain, out, mean, rstd } => Op::Norm {
                spec,
                inp: f(inp, Read),
                gain: f(gain, Read),
                out: f(out, Write),
                mean: mean.map(|mean| f(mean, Write)),
                rstd: f(rstd, Write),
            },
            Op::ScaledResidual { spec, inp, residual, gain, out } => Op::ScaledResidual {
                spec,
                inp: f(inp, Read),
                residual: f(residual, Read),
                gain: gain.map(|gain| f(gain, Read)),
                out: f(out, Write),
            },
            Op::Linear { inp, weight, residual, out } => Op::Linear {
                inp: f(inp, Read),
                weight: f(weight, Read),
                residual: residual.map(|residual| f(residual, Read)),
                out: f(out, Write),
            },
            Op::Rotary { heads, table, positions, qkv } => Op::Rotary {
                heads,
                table: f(table, Read),
                positions: f(positions, Read),
                qkv: f(qkv, Update),
            },
            Op::Attention { spec, qkv, document_starts, out, log_sum_exp } => Op::Attention {
                spec,
                qkv: f(qkv, Read),
                document_starts: document_starts.map(|starts| f(starts, Read)),
                out: f(out, Write),
                log_sum_exp: f(log_sum_exp, Write),
            },
            Op::CachedAttention { heads, qkv, keys, values, positions, out } => {
                Op::CachedAttention {
                    heads,
                    qkv: f(qkv, Read),
                    keys: f(keys, Update),
                    values: f(values, Update),
                    positions: f(positions, Read),
                    out: f(out, Write),
                }
            }
            Op::SwiGlu { inp, out } => Op::SwiGlu { inp: f(inp, Read), out: f(out, Write) },
            Op::CrossEntropy { spec, inp, weight, targets, scale, logits, losses } => {
                Op::CrossEntropy {
                    spec,
                    inp: f(inp, Read),
                    weight: f(weight, Read),
                    targets: f(targets, Read),
                    scale: f(scale, Read),
                    logits: f(logits, Write),
                    losses: f(losses, Write),
                }
            }
        }
    }
}

impl Op<View> {
    pub(super) fn run(&self, backend: &mut impl Backend) -> Result<()> {
        match *self {
            Op::Embedding { tokens, table, out } => backend.embedding_forward(tokens, table, out),
            Op::Norm { spec, inp, gain, out, mean, rstd } => {
                backend.norm_forward(spec, inp, gain, out, mean, rstd)
            }
            Op::ScaledResidual { spec, inp, residual, gain, out } => {
                backend.scaled_residual_forward(spec, inp, residual, gain, out)
            }
            Op::Linear { inp, weight, residual, out } => {
                backend.linear_forward(inp, weight, residual, out)
            }
            Op::Rotary { heads, table, positions, qkv } => {
                backend.rotary_forward(heads, table, positions, qkv)
            }
            Op::Attention { spec, qkv, document_starts, out, log_sum_exp } => {
                backend.attention_forward(spec, qkv, document_starts, out, log_sum_exp)
            }
            Op::CachedAttention { heads, qkv, keys, values, positions, out } => {
                backend.cached_attention_forward(heads, qkv, keys, values, positions, out)
            }
            Op::SwiGlu { inp, out } => backend.swiglu_forward(inp, out),
            Op::CrossEntropy { spec, inp, weight, targets, scale: _, logits, losses } => {
                backend.cross_entropy_forward(spec, inp, weight, targets, logits, losses)
            }
        }
    }
}

impl<H: Copy> Gradient<H> {
    /// The same gradient over other handles; `f` sees each operand once, with its access.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Gradient<K> {
        match self {
            Gradient::Embedding { tokens, d_out, d_table } => Gradient::Embedding {
                tokens: f(tokens, Read),
                d_out: f(d_out, Read),
                d_table: f(d_table, Update),
            },
            Gradient::Norm { spec, inp, gain, mean, rstd, d_out, partial, d_inp, d_gain } => {
                Gradient::Norm {
                    spec,
                    inp: f(inp, Read),
                    gain: f(gain, Read),
                    mean: mean.map(|mean| f(mean, Read)),
                    rstd: f(rstd, Read),
                    d_out: f(d_out, Read),
                    partial: f(partial, Write),
                    d_inp: d_inp.map(f),
                    d_gain: f(d_gain, Update),
                }
            }
            Gradient::ScaledResidual { spec, d_out, d_inp, gain } => Gradient::ScaledResidual {
                spec,
                d_out: f(d_out, if spec.stream_scale == 1.0 { Read } else { Update }),
                d_inp: f(d_inp, Write),
                gain: gain.map(|g| GainGradient {
                    inp: f(g.inp, Read),
                    gain: f(g.gain, Read),
                    partial: f(g.partial, Write),
                    d_gain: f(g.d_gain, Update),
                }),
            },
            Gradient::Linear { inp, weight, d_out, d_inp, d_weight } => Gradient::Linear {
                inp: f(inp, Read),
                weight: f(weight, Read),
                d_out: f(d_out, Read),
                d_inp: d_inp.map(f),
                d_weight: f(d_weight, Update),
            },
            Gradient::Rotary { heads, table, positions, d_qkv } => Gradient::Rotary {
                heads,
                table: f(table, Read),
                positions: f(positions, Read),
                d_qkv: f(d_qkv, Update),
            },
            Gradient::Attention {
                spec,
                qkv,
                document_starts,
                out,
                log_sum_exp,
                d_out,
                delta,
                d_qkv,
            } => Gradient::Attention {
                spec,
                qkv: f(qkv, Read),
                document_starts: document_starts.map(|starts| f(starts, Read)),
                out: f(out, Read),
                log_sum_exp: f(log_sum_exp, Read),
                d_out: f(d_out, Read),
                delta: f(delta, Write),
                d_qkv: f(d_qkv, Write),
            },
            Gradient::SwiGlu { inp, d_out, d_inp } => Gradient::SwiGlu {
                inp: f(inp, Read),
                d_out: f(d_out, Read),
                d_inp: f(d_inp, Write),
            },
            Gradient::CrossEntropy {
                spec,
                inp,
                weight,
                targets,
                scale,
                logits,
                losses,
                d_inp,
                d_weight,
            } => Gradient::CrossEntropy {
                spec,
                inp: f(inp, Read),
                weight: f(weight, Read),
                targets: f(targets, Read),
                scale: f(scale, Read),
                logits: f(logits, Write),
                losses: f(losses, Write),
                d_inp: f(d_inp, Write),
                d_weight: f(d_weight, Update),
            },
        }
    }
}

impl Gradient<View> {
    pub(super) fn run(&self, backend: &mut impl Backend) -> Result<()> {
        match *self {
            Gradient::Embedding { tokens, d_out, d_table } => {
                backend.embedding_backward(tokens, d_out, d_table)
            }
            Gradient::Norm { spec, inp, gain, mean, rstd, d_out, partial, d_inp, d_gain } => {
                backend.norm_backward(spec, inp, gain, mean, rstd, d_out, partial, d_inp, d_gain)
            }
            Gradient::ScaledResidual { spec, d_out, d_inp, gain } => {
                backend.scaled_residual_backward(spec, d_out, d_inp, gain)
            }
            Gradient::Linear { inp, weight, d_out, d_inp, d_weight } => {
                backend.linear_backward(inp, weight, d_out, d_inp, d_weight)
            }
            Gradient::Rotary { heads, table, positions, d_qkv } => {
                backend.rotary_backward(heads, table, positions, d_qkv)
            }
            Gradient::Attention {
                spec,
                qkv,
                document_starts,
                out,
                log_sum_exp,
                d_out,
                delta,
                d_qkv,
            } => backend.attention_backward(
                spec,
                qkv,
                document_starts,
                out,
                log_sum_exp,
                d_out,
                delta,
                d_qkv,
            ),
            Gradient::SwiGlu { inp, d_out, d_inp } => backend.swiglu_backward(inp, d_out, d_inp),
            Gradient::CrossEntropy {
                spec,
                inp,
                weight,
                targets,
                scale,
                logits,
                losses,
                d_inp,
                d_weight,
            } => backend.cross_entropy_backward(
                spec, inp, weight, targets, scale, logits, losses, d_inp, d_weight,
            ),
        }
    }
}

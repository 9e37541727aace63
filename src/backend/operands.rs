//! What each op and its gradient read and write, over any handle: a value of the tape, a view of a
//! buffer, an address. Every struct has one `map`, which names each operand with its access.
//!
//! Shapes: T tokens, C hidden, F ffn, H heads, K kv heads, D head dim, V vocabulary, B rows of S
//! tokens. Activations are of the device's type; gains, statistics, losses and the gradients of
//! parameters are f32 (f64 in tests).

use super::{AttentionSpec, HeadSpec, LossSpec, NormSpec, ResidualSpec};
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

use Access::{Read, Update, Write};

/// Where an activation gradient goes, and whether something is there already.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sink<H = View> {
    pub to: H,
    /// `+=` instead of `=`.
    pub accumulate: bool,
}

impl<H> Sink<H> {
    fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Sink<K> {
        let access = if self.accumulate { Update } else { Write };
        Sink { to: f(self.to, access), accumulate: self.accumulate }
    }
}

// ------------------------------------------------------------------ embedding

/// out[t] = table[tokens[t]]
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct EmbeddingForward<H = View> {
    /// [T], i32
    pub tokens: H,
    /// [V,C]
    pub table: H,
    /// [T,C]
    pub out: H,
}

impl<H> EmbeddingForward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> EmbeddingForward<K> {
        EmbeddingForward {
            tokens: f(self.tokens, Read),
            table: f(self.table, Read),
            out: f(self.out, Write),
        }
    }
}

/// d_table[tokens[t]] += d_out[t]
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct EmbeddingBackward<H = View> {
    /// [T], i32
    pub tokens: H,
    /// [T,C]
    pub d_out: H,
    /// [V,C], f32
    pub d_table: H,
}

impl<H> EmbeddingBackward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> EmbeddingBackward<K> {
        EmbeddingBackward {
            tokens: f(self.tokens, Read),
            d_out: f(self.d_out, Read),
            d_table: f(self.d_table, Update),
        }
    }
}

// ------------------------------------------------------------------ norm

/// out = normalise(inp) * (gain / sqrt(depth)); mean and rstd are kept for backward.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormForward<H = View> {
    pub spec: NormSpec,
    /// [T,C]
    pub inp: H,
    /// [C]
    pub gain: H,
    /// [T,C]
    pub out: H,
    /// [T], of a LayerNorm only.
    pub mean: Option<H>,
    /// [T]
    pub rstd: H,
}

impl<H> NormForward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> NormForward<K> {
        NormForward {
            spec: self.spec,
            inp: f(self.inp, Read),
            gain: f(self.gain, Read),
            out: f(self.out, Write),
            mean: self.mean.map(|mean| f(mean, Write)),
            rstd: f(self.rstd, Write),
        }
    }
}

/// d_inp, and d_gain += the sum over tokens of d_out normalise(inp), over sqrt(depth).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormBackward<H = View> {
    pub spec: NormSpec,
    /// [T,C]
    pub inp: H,
    /// [C]
    pub gain: H,
    /// [T], of a LayerNorm only.
    pub mean: Option<H>,
    /// [T]
    pub rstd: H,
    /// [T,C]
    pub d_out: H,
    /// [ceil(T/NORM_PARTIAL_ROWS),C], scratch
    pub partial: H,
    /// [T,C]
    pub d_inp: Sink<H>,
    /// [C]
    pub d_gain: H,
}

impl<H> NormBackward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> NormBackward<K> {
        NormBackward {
            spec: self.spec,
            inp: f(self.inp, Read),
            gain: f(self.gain, Read),
            mean: self.mean.map(|mean| f(mean, Read)),
            rstd: f(self.rstd, Read),
            d_out: f(self.d_out, Read),
            partial: f(self.partial, Write),
            d_inp: self.d_inp.map(f),
            d_gain: f(self.d_gain, Update),
        }
    }
}

// ------------------------------------------------------------------ a scaled residual

/// out = stream_scale residual + branch_scale gain inp
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ScaledResidualForward<H = View> {
    pub spec: ResidualSpec,
    /// [T,C]
    pub inp: H,
    /// [T,C]
    pub residual: H,
    /// [C], or [1] for all columns; without one it is 1.
    pub gain: Option<H>,
    /// [T,C]
    pub out: H,
}

impl<H> ScaledResidualForward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> ScaledResidualForward<K> {
        ScaledResidualForward {
            spec: self.spec,
            inp: f(self.inp, Read),
            residual: f(self.residual, Read),
            gain: self.gain.map(|gain| f(gain, Read)),
            out: f(self.out, Write),
        }
    }
}

/// d_inp = branch_scale gain d_out; then d_out *= stream_scale, which makes it the gradient of the
/// residual.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ScaledResidualBackward<H = View> {
    pub spec: ResidualSpec,
    /// [T,C]
    pub d_out: H,
    /// [T,C]
    pub d_inp: H,
    pub gain: Option<GainGradient<H>>,
}

impl<H> ScaledResidualBackward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> ScaledResidualBackward<K> {
        ScaledResidualBackward {
            spec: self.spec,
            d_out: f(self.d_out, if self.spec.stream_scale == 1.0 { Read } else { Update }),
            d_inp: f(self.d_inp, Write),
            gain: self.gain.map(|gain| gain.map(f)),
        }
    }
}

/// d_gain += branch_scale times the sum over tokens of d_out inp, over columns, too, for a gain
/// of [1].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GainGradient<H = View> {
    /// [T,C], what was multiplied by the gain.
    pub inp: H,
    /// [C] or [1]
    pub gain: H,
    /// [ceil(T/NORM_PARTIAL_ROWS),C], scratch
    pub partial: H,
    /// As gain.
    pub d_gain: H,
}

impl<H> GainGradient<H> {
    fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> GainGradient<K> {
        GainGradient {
            inp: f(self.inp, Read),
            gain: f(self.gain, Read),
            partial: f(self.partial, Write),
            d_gain: f(self.d_gain, Update),
        }
    }
}

// ------------------------------------------------------------------ linear

/// out = inp weight^T (+ residual)
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LinearForward<H = View> {
    /// [T,I]
    pub inp: H,
    /// [O,I]
    pub weight: H,
    /// [T,O]
    pub residual: Option<H>,
    /// [T,O]
    pub out: H,
}

impl<H> LinearForward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> LinearForward<K> {
        LinearForward {
            inp: f(self.inp, Read),
            weight: f(self.weight, Read),
            residual: self.residual.map(|residual| f(residual, Read)),
            out: f(self.out, Write),
        }
    }
}

/// d_inp = d_out weight; d_weight += d_out^T inp, where a GPU may take subnormal numbers (below
/// 2^-126) for zeros.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LinearBackward<H = View> {
    /// [T,I]
    pub inp: H,
    /// [O,I]
    pub weight: H,
    /// [T,O]
    pub d_out: H,
    /// [T,I]
    pub d_inp: Sink<H>,
    /// [O,I]
    pub d_weight: H,
}

impl<H> LinearBackward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> LinearBackward<K> {
        LinearBackward {
            inp: f(self.inp, Read),
            weight: f(self.weight, Read),
            d_out: f(self.d_out, Read),
            d_inp: self.d_inp.map(f),
            d_weight: f(self.d_weight, Update),
        }
    }
}

// ------------------------------------------------------------------ rotary embedding

/// Rotates q and k of qkv in place (rotate-half), or back; v stays. A gradient is rotated back.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rotary<H = View> {
    pub heads: HeadSpec,
    /// [P,D]: cosines of the D/2 angles of each position, then their sines.
    pub table: H,
    /// [T], i32, each below P
    pub positions: H,
    /// [T,(H+2K)D]
    pub qkv: H,
}

impl<H> Rotary<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Rotary<K> {
        Rotary {
            heads: self.heads,
            table: f(self.table, Read),
            positions: f(self.positions, Read),
            qkv: f(self.qkv, Update),
        }
    }
}

// ------------------------------------------------------------------ attention

/// Causal softmax(q k^T / sqrt(D)) v with K kv heads, read from qkv where they lie. Query i of a
/// row sees keys document_starts[i] to i of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttentionForward<H = View> {
    pub spec: AttentionSpec,
    /// [T,(H+2K)D]
    pub qkv: H,
    /// [T], i32: an index within the row each, at most i, not descending along the row. `None`:
    /// every row is one document.
    pub document_starts: Option<H>,
    /// [T,HD]
    pub out: H,
    /// [B,H,S], natural
    pub log_sum_exp: H,
}

impl<H> AttentionForward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> AttentionForward<K> {
        AttentionForward {
            spec: self.spec,
            qkv: f(self.qkv, Read),
            document_starts: self.document_starts.map(|starts| f(starts, Read)),
            out: f(self.out, Write),
            log_sum_exp: f(self.log_sum_exp, Write),
        }
    }
}

/// d_qkv of what [`AttentionForward`] read and wrote.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AttentionBackward<H = View> {
    pub spec: AttentionSpec,
    /// [T,(H+2K)D]
    pub qkv: H,
    pub document_starts: Option<H>,
    /// [T,HD]
    pub out: H,
    /// [B,H,S]
    pub log_sum_exp: H,
    /// [T,HD]
    pub d_out: H,
    /// [B,H,S], scratch for the row sums of out d_out
    pub delta: H,
    /// [T,(H+2K)D]
    pub d_qkv: H,
}

impl<H> AttentionBackward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> AttentionBackward<K> {
        AttentionBackward {
            spec: self.spec,
            qkv: f(self.qkv, Read),
            document_starts: self.document_starts.map(|starts| f(starts, Read)),
            out: f(self.out, Read),
            log_sum_exp: f(self.log_sum_exp, Read),
            d_out: f(self.d_out, Read),
            delta: f(self.delta, Write),
            d_qkv: f(self.d_qkv, Write),
        }
    }
}

/// Writes the new k and v to rows `positions` of the cache, then attends to every row up to its
/// own.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CachedAttention<H = View> {
    pub heads: HeadSpec,
    /// [T,(H+2K)D], of one sequence
    pub qkv: H,
    /// [P,KD]
    pub keys: H,
    /// [P,KD]
    pub values: H,
    /// [T], i32, ascending by 1
    pub positions: H,
    /// [T,HD]
    pub out: H,
}

impl<H> CachedAttention<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> CachedAttention<K> {
        CachedAttention {
            heads: self.heads,
            qkv: f(self.qkv, Read),
            keys: f(self.keys, Update),
            values: f(self.values, Update),
            positions: f(self.positions, Read),
            out: f(self.out, Write),
        }
    }
}

// ------------------------------------------------------------------ SwiGLU

/// out = silu(gate) * up
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SwiGluForward<H = View> {
    /// [T,2F]: gate, then up.
    pub inp: H,
    /// [T,F]
    pub out: H,
}

impl<H> SwiGluForward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> SwiGluForward<K> {
        SwiGluForward { inp: f(self.inp, Read), out: f(self.out, Write) }
    }
}

/// The gradients of gate and up.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SwiGluBackward<H = View> {
    /// [T,2F]: gate, then up.
    pub inp: H,
    /// [T,F]
    pub d_out: H,
    /// [T,2F]
    pub d_inp: H,
}

impl<H> SwiGluBackward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> SwiGluBackward<K> {
        SwiGluBackward {
            inp: f(self.inp, Read),
            d_out: f(self.d_out, Read),
            d_inp: f(self.d_inp, Write),
        }
    }
}

// ------------------------------------------------------------------ cross-entropy

/// losses[t] = cross-entropy of softmax(inp[t] weight^T) against targets[t], plus z_loss log^2(Z);
/// 0 where the target is IGNORE_INDEX.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CrossEntropyForward<H = View> {
    pub spec: LossSpec,
    /// [T,C]
    pub inp: H,
    /// [V,C]
    pub weight: H,
    /// [T], i32
    pub targets: H,
    /// [chunk,V], scratch
    pub logits: H,
    /// [T]
    pub losses: H,
}

impl<H> CrossEntropyForward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> CrossEntropyForward<K> {
        CrossEntropyForward {
            spec: self.spec,
            inp: f(self.inp, Read),
            weight: f(self.weight, Read),
            targets: f(self.targets, Read),
            logits: f(self.logits, Write),
            losses: f(self.losses, Write),
        }
    }
}

/// Losses as in the forward pass, and the gradients of scale[0] * sum(losses), from one computation
/// of the logits: in training this replaces the forward pass.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CrossEntropyBackward<H = View> {
    pub forward: CrossEntropyForward<H>,
    /// [1]
    pub scale: H,
    /// [T,C]
    pub d_inp: H,
    /// [V,C], added to
    pub d_weight: H,
}

impl<H> CrossEntropyBackward<H> {
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> CrossEntropyBackward<K> {
        CrossEntropyBackward {
            forward: self.forward.map(f),
            scale: f(self.scale, Read),
            d_inp: f(self.d_inp, Write),
            d_weight: f(self.d_weight, Update),
        }
    }
}

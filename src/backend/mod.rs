//! What a device must be able to do: own memory, run each op forward and backward, and update.
//!
//! Contract: the caller (the tape's program) owns the layout; a backend allocates whole buffers
//! and is then told by [`View`]s where everything lies. No device memory is allocated by an op.
//! Parameter gradients are added to (`+=`); an activation gradient is written (`=`) or added to as
//! its [`Sink`] says. An op may use small host scratch of its own. Every reduction has a fixed
//! order, so equal inputs give equal bits, unless a backend was told that they need not.
//!
//! Shapes: T tokens, C hidden, F ffn, H heads, K kv heads, D head dim, V vocabulary.

mod footprint;
mod operands;

use std::ffi::CStr;
use std::ops::Range;

use crate::config::NormKind;
use crate::error::Result;
use crate::sensors::Sensors;
use crate::tensor::{BufferId, Kind, View};

pub use footprint::{Footprint, OFFLOAD_CHUNK, offload_bytes};
pub use operands::{
    Access, AttentionBackward, AttentionForward, CachedAttention, CrossEntropyBackward,
    CrossEntropyForward, EmbeddingBackward, EmbeddingForward, GainGradient, LinearBackward,
    LinearForward, NormBackward, NormForward, Rotary, ScaledResidualBackward,
    ScaledResidualForward, Sink, SwiGluBackward, SwiGluForward,
};

/// Rows of a partial sum of a gain's gradient, see [`NormBackward`].
pub const NORM_PARTIAL_ROWS: usize = 64;

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormSpec {
    pub kind: NormKind,
    pub eps: f64,
    /// The gain is divided by sqrt(depth) before it is applied; 1: not scaled.
    pub depth: usize,
}

/// a x + b g f: how a branch f is added to the stream x, with a learnt factor g or without.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ResidualSpec {
    /// a
    pub stream_scale: f64,
    /// b
    pub branch_scale: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HeadSpec {
    /// H
    pub heads: usize,
    /// K
    pub kv_heads: usize,
    /// D
    pub head_dim: usize,
}

impl HeadSpec {
    /// Columns of q and k in it, which are rotated: (H + K) D.
    pub fn rotated_columns(&self) -> usize {
        (self.heads + self.kv_heads) * self.head_dim
    }

    /// Columns of the fused projection: (H + 2K) D, q first, then k, then v.
    pub fn qkv_columns(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttentionSpec {
    pub heads: HeadSpec,
    pub batch: usize,
    pub sequence: usize,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LossSpec {
    /// Rows of the head's weight that are real tokens.
    pub classes: usize,
    /// Tokens whose logits exist at one time.
    pub chunk: usize,
    /// Weight of log^2(Z), with Z the softmax's denominator; 0: off.
    pub z_loss: f64,
}

/// What one optimizer step walks, f32 (f64 in tests): four flat buffers, all equally long, and the
/// global gradient norm, which stays on the device so that a step needs no answer from it. Where
/// activations are narrower than f32, a fifth holds the parameters rounded to their type. On
/// devices that can, both moments may be [`Kind::Bf16`], rounded stochastically, and the parameters
/// [`Kind::LowerHalf`] of what the rounded ones are the upper half of.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FlatBuffers {
    pub parameters: View,
    /// Activations; written by the update.
    pub working: Option<View>,
    /// f32 copies of all vectors, if parameters are halves; written by the update.
    pub vectors: Option<View>,
    pub gradients: View,
    pub moment1: View,
    pub moment2: View,
    /// [1]
    pub grad_norm: View,
    /// Elements of the whole flat buffers before these.
    pub first: usize,
}

impl FlatBuffers {
    /// A range of elements of every buffer; the norm and the copies of vectors stay those of the
    /// whole.
    pub fn part(&self, range: &Range<usize>, element_bytes: impl Fn(Kind) -> usize) -> Self {
        let part = |view: View| view.part(range, element_bytes(view.kind));
        FlatBuffers {
            parameters: part(self.parameters),
            working: self.working.map(part),
            vectors: self.vectors,
            gradients: part(self.gradients),
            moment1: part(self.moment1),
            moment2: part(self.moment2),
            grad_norm: self.grad_norm,
            first: self.first + range.start,
        }
    }
}

/// A vector among the parameters, and where its f32 copy begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VectorCopy {
    /// Elements of the flat buffers.
    pub from: Range<usize>,
    /// Element of [`FlatBuffers::vectors`].
    pub to: usize,
}

/// AdamW, Loshchilov & Hutter 2019, algorithm 2; with `decoupled` false, Adam with L2 decay.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep<'a> {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub decoupled: bool,
    /// 1 - beta^t
    pub correction1: f64,
    pub correction2: f64,
    /// Largest global gradient norm; a longer gradient is scaled down to it. 0: off.
    pub clip: f64,
    /// Ranges of the flat buffer that decay, ascending; the rest does not.
    pub decay: &'a [Range<usize>],
    /// Of the run, and which of its updates this is: with an element's index in the whole flat
    /// buffer they decide how its moments are rounded, where these are stored in bf16.
    pub seed: u64,
    pub update: u64,
}

impl AdamWStep<'_> {
    /// What to multiply a gradient of this norm by, so that its norm is at most `clip`.
    pub fn gradient_scale(&self, norm: f64) -> f64 {
        if self.clip > 0.0 && norm > self.clip { self.clip / norm } else { 1.0 }
    }
}

/// Readings that may be under way at one time, see [`Backend::begin_read`].
pub const READINGS: usize = 2;

/// Values on their way from the device, see [`Backend::begin_read`].
#[must_use]
#[derive(Debug)]
pub enum Reading {
    /// They are here.
    Done(Vec<f32>),
    /// Where they will be.
    Place(usize),
}

/// What a backend recorded, see [`Backend::record`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recording(pub u32);

pub trait Backend: Footprint {
    /// "cpu", "cuda", "simt".
    fn name(&self) -> &'static str;

    /// What computes, for the record of a run: "NVIDIA H200"; the name where no more is known.
    fn machine(&self) -> String {
        self.name().to_string()
    }

    /// Floating-point operations in a second that the machine's matmul units do at most, dense, in
    /// the type of activations; `None` where that is not known.
    fn peak_flops_per_second(&self) -> Option<f64> {
        None
    }

    /// Bytes that can still be allocated.
    fn available_bytes(&self) -> Result<u64>;

    /// Bytes of the buffers that were allocated so far; `None` where they are not counted.
    fn allocated_bytes(&self) -> Option<u64> {
        None
    }

    /// The most bytes that this process had at one time, with whatever is no buffer; `None` where
    /// the device does not tell.
    fn peak_bytes(&self) -> Option<u64> {
        None
    }

    /// Bytes of a memory of the device's own that nobody has taken now; `None` where it has none.
    fn own_free_bytes(&self) -> Option<u64> {
        None
    }

    /// `None` where the device has none that can be read.
    fn sensors(&self) -> Option<Sensors> {
        None
    }

    /// From here to [`Backend::end_preparation`] ops are checked and what they need is made
    /// (kernels looked up, tensor maps), but nothing is computed. False: there is nothing to
    /// prepare, and ops must not be called for it.
    fn begin_preparation(&mut self) -> bool {
        false
    }
    fn end_preparation(&mut self) {}

    /// Keeps what `work` enqueues instead of running it, for [`Backend::replay`]. `work` was
    /// prepared and neither reads nor writes from the host. `None`, and nothing happened: this
    /// backend has nothing to gain from it, `work` is to be called whenever it is to run.
    fn record(&mut self, _work: impl FnOnce(&mut Self) -> Result<()>) -> Result<Option<Recording>>
    where
        Self: Sized,
    {
        Ok(None)
    }
    /// Runs everything that was recorded, in order, on what now lies in the same places.
    fn replay(&mut self, _recording: Recording) -> Result<()> {
        unreachable!("{} records nothing", self.name())
    }

    /// Runs `work` on a thread on which its ops begin soonest: a backend whose ops are loops over a
    /// pool of threads takes one of these, else each op waits until one of them has woken up.
    fn on_worker<T: Send>(&mut self, work: impl FnOnce(&mut Self) -> T + Send) -> T
    where
        Self: Sized,
    {
        work(self)
    }

    /// What profilers show: everything until [`Backend::end_range`], inside what was begun before.
    /// Of work that is replayed, what lies around the replay; what lies inside is seen once, when
    /// it is recorded.
    fn begin_range(&mut self, _name: &'static CStr) {}
    fn end_range(&mut self) {}
    /// `work` in a range of this name.
    fn range<T>(
        &mut self,
        name: &'static CStr,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T>
    where
        Self: Sized,
    {
        self.begin_range(name);
        let done = work(self);
        self.end_range();
        done
    }

    /// Allocates what [`Backend::gradient_norm`] and [`Backend::adamw`] need besides the buffers;
    /// once, before either is called with these buffers. `decay` as in [`AdamWStep`]; `vectors`
    /// ascend, and are read where the parameters are halves.
    ///
    /// Errors: state of a kind that this device does not update.
    fn prepare_optimizer(
        &mut self,
        _buffers: &FlatBuffers,
        _decay: &[Range<usize>],
        _vectors: &[VectorCopy],
    ) -> Result<()> {
        Ok(())
    }

    /// A buffer of zeros.
    fn allocate(&mut self, label: &'static str, bytes: usize) -> Result<BufferId>;
    /// A buffer of zeros in the host's memory, for moments.
    fn allocate_host(&mut self, label: &'static str, bytes: usize) -> Result<BufferId> {
        self.allocate(label, bytes)
    }

    /// Whether ops are enqueued and run later, so that a step is better enqueued before the
    /// previous one is waited for.
    fn steps_ahead(&self) -> bool {
        false
    }
    /// From here on, writes of up to `sent` bytes are not waited for, and readings of up to `read`
    /// bytes can begin. Once.
    fn prepare_transfers(&mut self, _sent: usize, _read: usize) -> Result<()> {
        Ok(())
    }

    /// Copies values in, in the order of the ops; `values` has exactly the view's number of
    /// elements.
    fn write(&mut self, view: View, values: &[f32]) -> Result<()>;
    fn write_index(&mut self, view: View, values: &[i32]) -> Result<()>;
    /// Copies values out, after everything before it has run.
    fn read(&mut self, view: View, values: &mut [f32]) -> Result<()>;
    /// Copies statistics out as they are after everything before it, one view after the other; ops
    /// that follow may change them. At most [`READINGS`] at one time.
    fn begin_read(&mut self, views: &[View]) -> Result<Reading> {
        let count = views.iter().map(|view| view.shape.elements()).sum();
        let mut values = vec![0.0; count];
        let mut rest = &mut values[..];
        for &view in views {
            let (values, behind) = rest.split_at_mut(view.shape.elements());
            self.read(view, values)?;
            rest = behind;
        }
        Ok(Reading::Done(values))
    }
    /// Waits for the values, of which there are exactly as many, and not for what was enqueued
    /// later.
    fn finish_read(&mut self, reading: Reading, values: &mut [f32]) -> Result<()> {
        match reading {
            Reading::Done(read) => values.copy_from_slice(&read),
            Reading::Place(_) => unreachable!("{} reads at once", self.name()),
        }
        Ok(())
    }
    /// Copies f32 in and out that lie as bf16, rounded as [`Backend::round`] does it, and as the
    /// lower halves of their bits.
    fn write_halves(&mut self, upper: View, _lower: View, _values: &[f32]) -> Result<()> {
        unreachable!("{} has no f32 in halves: {}", self.name(), upper.shape)
    }
    fn read_halves(&mut self, upper: View, _lower: View, _values: &mut [f32]) -> Result<()> {
        unreachable!("{} has no f32 in halves: {}", self.name(), upper.shape)
    }
    fn zero(&mut self, view: View) -> Result<()>;
    /// to = from
    fn copy(&mut self, from: View, to: View) -> Result<()>;
    /// to = from, Statistic, rounded to an Activation.
    fn round(&mut self, from: View, to: View) -> Result<()>;
    /// to += from
    fn add(&mut self, from: View, to: View) -> Result<()>;

    // Each op and its gradient; formulas and shapes stand at their operands.

    fn embedding_forward(&mut self, op: EmbeddingForward) -> Result<()>;
    fn embedding_backward(&mut self, op: EmbeddingBackward) -> Result<()>;
    fn norm_forward(&mut self, op: NormForward) -> Result<()>;
    fn norm_backward(&mut self, op: NormBackward) -> Result<()>;
    fn scaled_residual_forward(&mut self, op: ScaledResidualForward) -> Result<()>;
    fn scaled_residual_backward(&mut self, op: ScaledResidualBackward) -> Result<()>;
    fn linear_forward(&mut self, op: LinearForward) -> Result<()>;
    fn linear_backward(&mut self, op: LinearBackward) -> Result<()>;
    fn rotary_forward(&mut self, op: Rotary) -> Result<()>;
    /// The inverse rotation, of a gradient.
    fn rotary_backward(&mut self, op: Rotary) -> Result<()>;
    fn attention_forward(&mut self, op: AttentionForward) -> Result<()>;
    fn attention_backward(&mut self, op: AttentionBackward) -> Result<()>;
    fn cached_attention_forward(&mut self, op: CachedAttention) -> Result<()>;
    fn swiglu_forward(&mut self, op: SwiGluForward) -> Result<()>;
    fn swiglu_backward(&mut self, op: SwiGluBackward) -> Result<()>;
    fn cross_entropy_forward(&mut self, op: CrossEntropyForward) -> Result<()>;
    fn cross_entropy_backward(&mut self, op: CrossEntropyBackward) -> Result<()>;

    // Two ops in one kernel: the second reads, or changes in place, what the first gives. False:
    // there is none that does both, and nothing was done; what lies between the two may be rounded
    // there, or not.

    fn linear_rotary_forward(&mut self, _: LinearForward, _: Rotary) -> Result<bool> {
        Ok(false)
    }
    /// SwiGLU is that of the rounded product.
    fn linear_swiglu_forward(&mut self, _: LinearForward, _: SwiGluForward) -> Result<bool> {
        Ok(false)
    }
    /// The first one's d_inp is scratch.
    fn linear_swiglu_backward(&mut self, _: LinearBackward, _: SwiGluBackward) -> Result<bool> {
        Ok(false)
    }
    fn attention_rotary_backward(&mut self, _: AttentionBackward, _: Rotary) -> Result<bool> {
        Ok(false)
    }

    /// grad_norm[0] = Euclidean norm of the gradients, summed in f64 in a fixed order.
    fn gradient_norm(&mut self, buffers: &FlatBuffers) -> Result<()>;

    /// Clips by grad_norm[0] and updates, in one pass that reads each element once. If the norm is
    /// not finite, nothing changes.
    fn adamw(&mut self, buffers: &FlatBuffers, step: &AdamWStep) -> Result<()>;
}

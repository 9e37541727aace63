//! What kernels need of a device's memory, whether it is here or not.

use std::ops::Range;

use super::GPU_RESERVE_BYTES;
use super::adamw::AdamW;
use super::attention::backward_scratch_bytes;
use super::gemm::SEMAPHORE_BYTES;
use super::transfers::transfer_bytes;
use crate::backend::{AttentionSpec, Footprint, VectorCopy};
use crate::config::Dtype;
use crate::tensor::Kind;

/// Bytes of an element whose activations have this type.
pub fn element_bytes(kind: Kind, activation: Dtype) -> usize {
    match kind {
        Kind::Activation => activation.bytes(),
        Kind::Bf16 | Kind::LowerHalf => 2,
        Kind::Statistic | Kind::Index => 4,
    }
}

/// Elements of logits at one time in bf16: 256 MiB, for 32000 columns 4096 tokens. With 512, as the
/// CPU has them, the gradient of the head's input is 64 to 256 tiles of 64 x 64 for 132
/// multiprocessors (hidden 512 to 2048), and by its bytes the gradient of its weight, read and
/// written for every chunk, costs a quarter of the head's time. Computed for an H100, not measured.
const HELD_LOGITS: usize = 128 << 20;

/// In f32, the tape's own number.
pub(super) fn held_logits(activation: Dtype) -> Option<usize> {
    (activation == Dtype::Bf16).then_some(HELD_LOGITS)
}

/// A GPU of compute capability 9.0 that need not be here, with kernels for activations of this
/// type.
#[derive(Clone, Copy, Debug)]
pub struct AbsentGpu {
    pub dtype: Dtype,
    pub multiprocessors: usize,
}

impl AbsentGpu {
    /// Products and attention by the kernels for 9.0, which are for bf16.
    fn has_sm90(&self) -> bool {
        self.dtype == Dtype::Bf16
    }
}

impl Footprint for AbsentGpu {
    fn element_bytes(&self, kind: Kind) -> usize {
        element_bytes(kind, self.dtype)
    }

    /// A GPU's context and kernels are not in what a plan may take.
    fn process_bytes(&self, _: [usize; 2]) -> usize {
        0
    }

    fn reserve_bytes(&self) -> usize {
        GPU_RESERVE_BYTES as usize
    }

    fn scratch_bytes(&self) -> usize {
        if self.has_sm90() { SEMAPHORE_BYTES as usize } else { 0 }
    }

    fn attention_scratch_bytes(&self, spec: AttentionSpec, documents: bool) -> usize {
        match self.has_sm90() {
            true => backward_scratch_bytes(self.multiprocessors, spec, documents) as usize,
            false => 0,
        }
    }

    fn optimizer_bytes(&self, decay: &[Range<usize>], vectors: &[VectorCopy]) -> usize {
        AdamW::device_bytes(decay, vectors) as usize
    }

    fn transfer_bytes(&self, sent: usize, read: usize) -> usize {
        transfer_bytes(sent, read)
    }

    fn fuses_swiglu_backward(&self) -> bool {
        self.has_sm90()
    }

    fn held_logits(&self) -> Option<usize> {
        held_logits(self.dtype)
    }
}

//! What a plan has to know of a device: its sizes, and which results never exist on it.

use std::ops::Range;

use super::{AttentionSpec, VectorCopy};
use crate::tensor::Kind;

/// Elements of a chunk of moments in host memory, see [`Footprint::offload_chunk`]: 16 MiB of each
/// moment in f32, for which a host link of 64 GB/s takes 0.26 ms, far above the time to start a
/// copy.
pub const OFFLOAD_CHUNK: usize = 1 << 22;

/// Bytes of device memory that moments in host memory pass through: two chunks of both.
pub fn offload_bytes(chunk: usize, moment_element_bytes: usize) -> usize {
    2 * 2 * chunk * moment_element_bytes
}

/// The memory that a device takes for a model, known before any is allocated. A device has it, and
/// so has a description of one that is not here.
pub trait Footprint {
    /// Bytes of one element.
    fn element_bytes(&self, kind: Kind) -> usize;

    /// Bytes of the device's memory that a training process takes besides its plan, as measured;
    /// `largest`: rows and columns of the largest parameter.
    fn process_bytes(&self, largest: [usize; 2]) -> usize;

    /// Bytes that the device's driver will take besides buffers, estimated.
    fn reserve_bytes(&self) -> usize {
        0
    }

    /// Bytes of buffers that it allocates for itself when it is opened.
    fn scratch_bytes(&self) -> usize {
        0
    }

    /// Bytes that preparing a backward pass of attention allocates, once for all passes of this
    /// size; `documents`: within documents.
    fn attention_scratch_bytes(&self, _spec: AttentionSpec, _documents: bool) -> usize {
        0
    }

    /// Bytes that [`Backend::prepare_optimizer`](super::Backend::prepare_optimizer) allocates, but
    /// for chunks of moments.
    fn optimizer_bytes(&self, _decay: &[Range<usize>], _vectors: &[VectorCopy]) -> usize {
        0
    }

    /// Elements of a chunk in which moments that lie in host memory pass through the device.
    fn offload_chunk(&self) -> usize {
        OFFLOAD_CHUNK
    }

    /// Bytes of host memory that
    /// [`Backend::prepare_transfers`](super::Backend::prepare_transfers) allocates.
    fn transfer_bytes(&self, _sent: usize, _read: usize) -> usize {
        0
    }

    /// Whether
    /// [`Backend::linear_swiglu_backward`](super::Backend::linear_swiglu_backward) computes both at
    /// once, whatever the shapes: then its d_inp needs no memory.
    fn fuses_swiglu_backward(&self) -> bool {
        false
    }

    /// Elements of logits that exist at one time; `None`: the tape's own number.
    fn held_logits(&self) -> Option<usize> {
        None
    }
}

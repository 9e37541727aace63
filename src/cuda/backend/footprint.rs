//! What a plan has to know of a machine with kernels that is here.

use std::ops::Range;

use super::Cuda;
use crate::backend::{AttentionSpec, Footprint, VectorCopy};
use crate::cuda::adamw::AdamW;
use crate::cuda::attention::backward_scratch_bytes;
use crate::cuda::gemm::{Layout, Output};
use crate::cuda::transfers::transfer_bytes;
use crate::cuda::{DevicePointer, Family, Fusion, footprint};
use crate::tensor::Kind;

impl Footprint for Cuda {
    fn element_bytes(&self, kind: Kind) -> usize {
        footprint::element_bytes(kind, self.dtype)
    }

    /// A GPU's context and kernels are there by then, and not in what is available.
    fn process_bytes(&self, _: [usize; 2]) -> usize {
        self.driver.process_bytes() as usize
    }

    fn reserve_bytes(&self) -> usize {
        self.driver.reserve_bytes() as usize
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch_bytes as usize
    }

    fn attention_scratch_bytes(&self, spec: AttentionSpec, documents: bool) -> usize {
        match self.attention_family() {
            Some(Family::Sm90) => {
                let multiprocessors = self.driver.properties().multiprocessors as usize;
                backward_scratch_bytes(multiprocessors, spec, documents) as usize
            }
            _ => 0,
        }
    }

    fn fuses_swiglu_backward(&self) -> bool {
        let output = Output::SwiGluGradient { gate_up: DevicePointer::NULL };
        self.fuses(Fusion::SwiGluBackward, Layout::Nn, output)
    }

    fn offload_chunk(&self) -> usize {
        self.offload_chunk
    }

    fn optimizer_bytes(&self, decay: &[Range<usize>], vectors: &[VectorCopy]) -> usize {
        AdamW::device_bytes(decay, vectors) as usize
    }

    fn transfer_bytes(&self, sent: usize, read: usize) -> usize {
        transfer_bytes(sent, read)
    }

    fn held_logits(&self) -> Option<usize> {
        footprint::held_logits(self.dtype)
    }
}

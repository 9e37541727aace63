//! What a kernel is expected to take, where a roof says what it takes at least: products by the
//! cost model that chooses their kernels, attention by its busiest block, the rest by its bytes at
//! the speed that others' kernels reach; and for each launch what lies between two. No GPU has
//! confirmed any of it.

use super::{FASTEST, Kernel, rates};
use crate::backend::{AttentionSpec, HeadSpec};
use crate::bench::product::StepProduct;
use crate::bench::sizes::Sizes;
use crate::config::{Config, Dtype};
use crate::cuda::Family;
use crate::cuda::attention::estimate::Busiest;
use crate::cuda::gemm::tuned::{self, Table, Timed};
use crate::cuda::gemm::{Choice, Ending, Layout, choose};
use crate::cuda::peaks::Peaks;
use crate::model;

/// Of the datasheet's bytes a second: what norms reach on an H200 (3.7 to 3.8 of 4.8 TB/s).
const MEMORY: f64 = 0.78;
/// Between one kernel's last block and the next one's first at full speed.
const LAUNCH_MICROSECONDS: f64 = 2.0;

/// Exponentials that a score of a backward pass takes the time of: its own, dS, and what goes
/// through shared memory.
const BACKWARD_SPECIAL: f64 = 3.0;

pub(super) const SOURCE: &str = "estimated, confirmed by no GPU: products by the cost model that \
     chooses their kernels (the fastest tile at 80 % of the datasheet); attention by its busiest \
     block: products at 80 %, then 16 exponentials a clock, backward the time of three each \
     (within 12 % of FlashAttention-3's published causal forward passes of 16384 tokens, and of \
     cuDNN's backward ones of 8192); other kernels at 78 % of the datasheet's memory; 2 us for \
     each launch";

/// Kernels for bf16 on a Hopper.
pub(super) struct Expected<'a> {
    machine: &'a Peaks,
    heads: HeadSpec,
    /// Rows hold several.
    documents: bool,
}

impl<'a> Expected<'a> {
    pub fn new(config: &Config, machine: &'a Peaks) -> Self {
        let (heads, documents) = (model::heads(&config.model), config.data.packs_documents());
        Expected { machine, heads, documents }
    }

    pub fn bytes_per_second(&self) -> f64 {
        MEMORY * self.machine.bytes_per_second
    }

    pub fn flops_per_second(&self) -> f64 {
        FASTEST * self.machine.flops_per_second(Dtype::Bf16)
    }

    /// Of one launch.
    pub fn microseconds(&self, kernel: &Kernel) -> f64 {
        let computing = match kernel.sizes {
            Sizes::Product { .. } => self.product_seconds(kernel),
            Sizes::Attention { b, s, h, k, d } => {
                let heads = HeadSpec { heads: h, kv_heads: k, head_dim: d };
                let spec = AttentionSpec { heads, batch: b, sequence: s };
                self.attention_seconds(spec, kernel.op == "attention_backward")
            }
            _ => 0.0,
        };
        let moving = kernel.bytes as f64 / self.bytes_per_second();
        let fetching = kernel.link_bytes as f64 / self.machine.link_bytes_per_second;
        1e6 * computing.max(moving).max(fetching) + LAUNCH_MICROSECONDS
    }

    fn product_seconds(&self, kernel: &Kernel) -> f64 {
        let product = step_product(kernel, self.heads);
        let Some((choice, timed)) = chosen(self.machine, tuned::built_in(), &product) else {
            return kernel.flops as f64 / self.flops_per_second();
        };
        let rates = rates(self.machine, Dtype::Bf16);
        let multiprocessors = self.machine.multiprocessors;
        match timed {
            Some(timed) => timed.best.microseconds / 1e6,
            None => choice.seconds(product.tiled(), kernel.bytes, multiprocessors, rates),
        }
    }

    fn attention_seconds(&self, spec: AttentionSpec, backward: bool) -> f64 {
        let multiprocessors = self.machine.multiprocessors;
        let (busiest, special) = match backward {
            false => (Busiest::forward(multiprocessors, spec), 1.0),
            true => (Busiest::backward(multiprocessors, spec, self.documents), BACKWARD_SPECIAL),
        };
        let flops = 2.0 * spec.heads.head_dim as f64 * busiest.products;
        let exponentials = special * busiest.scores;
        multiprocessors as f64
            * (flops / self.flops_per_second()
                + exponentials / self.machine.exponentials_per_second())
    }
}

/// Of a kernel that has the sizes of one.
pub(super) fn step_product(kernel: &Kernel, heads: HeadSpec) -> StepProduct {
    let Sizes::Product { m, n, k } = kernel.sizes else {
        unreachable!("{} is no product", kernel.op)
    };
    let stored = if kernel.what.ends_with(", addend") { Ending::Addend } else { Ending::Plain };
    let (layout, ending) = match kernel.op {
        "gemm_nt" => (Layout::Nt, stored),
        "gemm_nn" => (Layout::Nn, stored),
        "gemm_tn" => (Layout::Tn, Ending::Plain),
        "gemm_nt_rotary" => (Layout::Nt, Ending::Rotary),
        "gemm_nt_swiglu" => (Layout::Nt, Ending::SwiGlu),
        "gemm_nn_swiglu" => (Layout::Nn, Ending::SwiGlu),
        op => unreachable!("{op} has the sizes of a product"),
    };
    StepProduct { layout, ending, m, n, k, heads }
}

/// The kernel of a product on this machine, and what it took if somebody has timed it. `None`: there
/// is none.
pub(super) fn chosen<'a>(
    machine: &Peaks,
    table: &'a Table,
    product: &StepProduct,
) -> Option<(Choice, Option<&'a Timed>)> {
    let StepProduct { layout, ending, .. } = *product;
    let key = (layout, ending, product.sizes());
    let timed = table.find(machine.name, machine.multiprocessors, Family::Sm90, key);
    let variants = Family::Sm90.variants_for(layout, product.output());
    let predicted = || choose(variants, product.tiled(), machine.multiprocessors);
    Some((timed.and_then(Timed::choice).or_else(predicted)?, timed))
}

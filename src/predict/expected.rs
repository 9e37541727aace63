//! What a kernel is expected to take, where bounds say what it takes at least: products by the
//! cost model that chooses their kernels, attention by its busiest block, the rest by its bytes at
//! the speed that others' kernels reach; and for each launch what lies between two. No GPU has
//! confirmed any of it.

use super::cost::Cost;
use super::{FASTEST, Sizes, StepProduct, rates};
use crate::backend::{AttentionSpec, HeadSpec};
use crate::config::{Config, Dtype};
use crate::cuda::Family;
use crate::cuda::attention::estimate::Busiest;
use crate::cuda::gemm::tuned::{self, Table};
use crate::cuda::gemm::{Choice, choose};
use crate::cuda::peaks::Peaks;
use crate::model;

/// Of the datasheet's bytes a second: what RMSNorms of others reach on an H200 (3.7 to 3.8 of 4.8
/// TB/s; QuACK's plots for an H100 have 77 % at rows of 1024).
const MEMORY: f64 = 0.78;
/// Between one kernel's last block and the next one's first at full speed.
const LAUNCH_MICROSECONDS: f64 = 2.0;
/// Exponentials that a score of a backward pass takes the time of: its own, dS, and what goes
/// through shared memory. Fitted to one time: cuDNN's 541 TFLOP/s on an H200 at a head dim of 128
/// and 8192 tokens.
const BACKWARD_SPECIAL: f64 = 3.0;

pub(super) const SOURCE: &str = "estimated, confirmed by no GPU: products by the cost model that \
     chooses their kernels (the fastest tile at 80 % of the datasheet); attention by its busiest \
     block, rows taken for one document each: products at 80 %, then 16 exponentials a clock \
     (within 12 % of FlashAttention-3's published causal forward passes), backward the time of \
     three each (fitted to one of cuDNN's, at a head dim of 128); other kernels at 78 % of the \
     datasheet's memory; 2 us for each kernel";

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
    pub fn microseconds(&self, cost: &Cost) -> f64 {
        let moving = cost.bytes as f64 / self.bytes_per_second();
        let over_link = cost.link_bytes as f64 / self.machine.link_bytes_per_second;
        let (seconds, kernels) = match (cost.sizes.clone(), cost.product) {
            (Sizes::Product { m, n, k }, Some((layout, epilogue))) => {
                let product = StepProduct { layout, epilogue, m, n, k, heads: self.heads };
                match self.product_seconds(cost, &product) {
                    Timed(seconds) => return 1e6 * seconds,
                    Estimated(seconds) => (seconds, cost.kernels),
                }
            }
            (Sizes::Attention { b, s, h, k, d }, _) => {
                let heads = HeadSpec { heads: h, kv_heads: k, head_dim: d };
                let spec = AttentionSpec { heads, batch: b, sequence: s };
                let backward = cost.op == "attention_backward";
                let (computing, kernels) = self.attention_seconds(spec, backward);
                (computing.max(moving), kernels)
            }
            _ => (moving.max(over_link), cost.kernels),
        };
        1e6 * seconds + kernels as f64 * LAUNCH_MICROSECONDS
    }

    /// With its bytes at the rate of the cost model. Sizes that no kernel takes: as the fastest
    /// tile would do them.
    fn product_seconds(&self, cost: &Cost, product: &StepProduct) -> ProductSeconds {
        let Some((choice, timed)) = chosen(self.machine, tuned::built_in(), product) else {
            return Estimated(cost.flops as f64 / self.flops_per_second());
        };
        if let Some(timed) = timed {
            return Timed(timed.best.microseconds / 1e6);
        }
        let rates = rates(self.machine, Dtype::Bf16);
        let multiprocessors = self.machine.multiprocessors;
        Estimated(choice.seconds(product.tiled(), cost.bytes, multiprocessors, rates))
    }

    /// And in how many kernels.
    fn attention_seconds(&self, spec: AttentionSpec, backward: bool) -> (f64, u64) {
        let multiprocessors = self.machine.multiprocessors;
        let (busiest, special) = match backward {
            false => (Busiest::forward(multiprocessors, spec), 1.0),
            true => (Busiest::backward(multiprocessors, spec, self.documents), BACKWARD_SPECIAL),
        };
        let flops = 2.0 * spec.heads.head_dim as f64 * busiest.products;
        let exponentials = special * busiest.scores;
        let of_a_block =
            flops / self.flops_per_second() + exponentials / self.machine.exponentials_per_second();
        (multiprocessors as f64 * of_a_block, busiest.kernels)
    }
}

/// As somebody timed it, with whatever lies between two launches; or by the cost model.
enum ProductSeconds {
    Timed(f64),
    Estimated(f64),
}
use ProductSeconds::{Estimated, Timed};

/// The kernel of a product on this machine, and what it took if somebody has timed it. `None`:
/// there is none.
pub(super) fn chosen<'a>(
    machine: &Peaks,
    table: &'a Table,
    product: &StepProduct,
) -> Option<(Choice, Option<&'a tuned::Timed>)> {
    let StepProduct { layout, epilogue, .. } = *product;
    let key = (layout, epilogue, product.sizes());
    let timed = table.find(machine.name, machine.multiprocessors, Family::Sm90, key);
    let variants = Family::Sm90.variants_for(layout, product.output());
    let predicted = || choose(variants, product.tiled(), machine.multiprocessors);
    Some((timed.and_then(tuned::Timed::choice).or_else(predicted)?, timed))
}

//! Which activations the backward pass keeps: the one place that knows what a level of
//! recomputation means. How the others come back is in differentiate.rs, and the same for all of
//! them.

use std::collections::HashMap;

use super::{Access, Op, Recorded, Step, ValueId};
use crate::backend::{AttentionForward, NormForward, SwiGluForward};
use crate::config::Recompute;

/// Every activation that is not kept at `level`, and the ops that write it, in order.
///
/// It is written in a block and read there alone: the residual stream between blocks is always
/// kept, and nothing is computed more than twice.
pub(super) fn not_kept(ops: &[Recorded], level: Recompute) -> HashMap<ValueId, Vec<Op<ValueId>>> {
    let weakest = weakest_levels(ops);
    let mut not_kept: HashMap<ValueId, Vec<Op<ValueId>>> = HashMap::new();
    let mut home: HashMap<ValueId, usize> = HashMap::new(); // value -> its block
    for Recorded { op, block } in ops {
        for (id, access) in Step::Forward(*op).operands() {
            if access == Access::Write
                && level.includes(weakest[&id])
                && let Some(block) = *block
            {
                home.insert(id, block);
                not_kept.insert(id, vec![]);
            }
            if home.get(&id) != block.as_ref() {
                not_kept.remove(&id);
            } else if access != Access::Read
                && let Some(writers) = not_kept.get_mut(&id)
            {
                writers.push(*op);
            }
        }
    }
    not_kept
}

/// The weakest level that does not keep an activation.
///
/// - `Norms`: what one pass over memory makes of the residual stream, or of gate and up, which are
///   kept anyway.
/// - `Attention`: queries, keys and values, by one product: 2 C FLOPs for an element of them. And
///   attention's results, by its forward pass: 2 S for an element, so cheaper up to S = C.
/// - `Block`: everything else; a row's statistics are small.
fn weakest_levels(ops: &[Recorded]) -> HashMap<ValueId, Recompute> {
    let mut levels = HashMap::new();
    for Recorded { op, .. } in ops {
        for (id, access) in Step::Forward(*op).operands() {
            if access == Access::Write {
                levels.insert(id, Recompute::Block);
            }
        }
        match *op {
            Op::Norm(NormForward { out, .. }) | Op::SwiGlu(SwiGluForward { out, .. }) => {
                levels.insert(out, Recompute::Norms);
            }
            Op::Attention(AttentionForward { qkv, out, log_sum_exp, .. }) => {
                levels.extend([qkv, out, log_sum_exp].map(|id| (id, Recompute::Attention)));
            }
            Op::Embedding(_)
            | Op::ScaledResidual(_)
            | Op::Linear(_)
            | Op::Rotary(_)
            | Op::CachedAttention(_)
            | Op::CrossEntropy(..) => {}
        }
    }
    levels
}

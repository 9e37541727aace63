//! Which activations the backward pass keeps: the one place that knows what a level of recomputation
//! means. How the others come back is in differentiate.rs, and the same for all of them.

use std::collections::HashMap;

use super::{Access, Op, Recorded, Step, ValueId};
use crate::config::Recompute;

/// Every activation that is not kept at `level`, and the ops that write it, in order.
///
/// It is written in a block and read there alone: the residual stream between blocks is always kept,
/// and nothing is computed again twice.
pub(super) fn not_kept(ops: &[Recorded], level: Recompute) -> HashMap<ValueId, Vec<Op<ValueId>>> {
    let weakest = weakest_levels(ops);
    let mut writers: HashMap<ValueId, Vec<Op<ValueId>>> = HashMap::new();
    let mut block_of: HashMap<ValueId, usize> = HashMap::new();
    for recorded in ops {
        for (id, access) in Step::Forward(recorded.op).operands() {
            if access == Access::Write
                && let Some(block) = recorded.block
                && level.includes(weakest[&id])
            {
                writers.insert(id, vec![]);
                block_of.insert(id, block);
            }
            if block_of.get(&id).copied() != recorded.block {
                writers.remove(&id);
            } else if access != Access::Read
                && let Some(writers) = writers.get_mut(&id)
            {
                writers.push(recorded.op);
            }
        }
    }
    writers
}

/// The weakest level that does not keep an activation.
///
/// - `Norms`: as large as what it is computed from, which is kept anyway, by one pass over memory.
/// - `Attention`: queries, keys and values, by one product: 2 C FLOPs for an element of them. And
///   attention's results, by its forward pass: 2 S for an element, so cheaper up to S = C.
/// - `Block`: everything else. Of a norm that adds, the addends would have to be kept in place of its
///   result; a row's statistics are small.
fn weakest_levels(ops: &[Recorded]) -> HashMap<ValueId, Recompute> {
    let mut levels = HashMap::new();
    for Recorded { op, .. } in ops {
        for (id, access) in Step::Forward(*op).operands() {
            if access == Access::Write {
                levels.insert(id, Recompute::Block);
            }
        }
        match *op {
            Op::Norm { residual: None, out, .. } | Op::SwiGlu { out, .. } => {
                levels.insert(out, Recompute::Norms);
            }
            Op::Attention { qkv, out, log_sum_exp, .. } => {
                levels.extend([qkv, out, log_sum_exp].map(|id| (id, Recompute::Attention)));
            }
            Op::Embedding { .. }
            | Op::Norm { residual: Some(_), .. }
            | Op::ScaledResidual { .. }
            | Op::Linear { .. }
            | Op::Rotary { .. }
            | Op::CachedAttention { .. }
            | Op::CrossEntropy { .. } => {}
        }
    }
    levels
}

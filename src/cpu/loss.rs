//! Output projection and cross-entropy in chunks of tokens: [T,V] logits never exist at once.
//!
//! loss[t] = log Z - logit[target] + z_loss (log Z)^2 with Z = sum exp(logit), over the first
//! `classes` columns; 0 where the target is IGNORE_INDEX. z-loss: PaLM, Chowdhery et al. 2022.

use rayon::prelude::*;

use super::float::Float;
use super::matmul::{Matrix, linear_d_weight, matmul};
use super::vectorise::vectorised;
use crate::backend::LossSpec;
use crate::tensor::IGNORE_INDEX;

pub(super) struct Inputs<'a, T> {
    pub inp: &'a [T],        // [T,C]
    pub weight: &'a [T],     // [V,C]
    pub targets: &'a [i32],  // [T]
    pub logits: &'a mut [T], // [chunk,V], scratch
    pub losses: &'a mut [T], // [T]
    pub c: usize,
    pub v: usize,
}

pub(super) struct Gradients<'a, T> {
    /// d loss / d losses[t], the same for every token
    pub scale: T,
    pub d_inp: &'a mut [T],    // [T,C], =
    pub d_weight: &'a mut [T], // [V,C], +=
}

/// Losses, and with `gradients` their gradients from the same logits.
pub(super) fn cross_entropy<T: Float>(
    spec: LossSpec,
    inputs: Inputs<T>,
    mut gradients: Option<Gradients<T>>,
) {
    let Inputs { inp, weight, targets, logits, losses, c, v } = inputs;
    for first in (0..targets.len()).step_by(spec.chunk) {
        let tokens = spec.chunk.min(targets.len() - first);
        let inp = &inp[first * c..][..tokens * c];
        let logits = &mut logits[..tokens * v];
        let weight_matrix = Matrix::rows(weight, c);
        matmul([tokens, v, c], Matrix::rows(inp, c), weight_matrix.transposed(), logits, false);
        let scale = gradients.as_ref().map(|g| g.scale);
        let rows = logits.par_chunks_mut(v).zip(&targets[first..][..tokens]);
        rows.zip(&mut losses[first..][..tokens]).for_each(|((logits, &target), loss)| {
            *loss = row(spec, logits, target, scale);
        });
        if let Some(Gradients { d_inp, d_weight, .. }) = &mut gradients {
            let d_logits = &*logits;
            let d_inp = &mut d_inp[first * c..][..tokens * c];
            matmul([tokens, c, v], Matrix::rows(d_logits, v), weight_matrix, d_inp, false);
            linear_d_weight(inp, d_logits, d_weight, [tokens, c, v]);
        }
    }
}

vectorised! {
    /// The loss of one token; with `scale`, its gradient replaces the logits.
    fn row<T: Float>(spec: LossSpec, logits: &mut [T], target: i32, scale: Option<T>) -> T {
        if target == IGNORE_INDEX {
            if scale.is_some() {
                logits.fill(T::ZERO);
            }
            return T::ZERO;
        }
        let target = target as usize;
        let (real, padding) = logits.split_at_mut(spec.classes);
        let max = super::norm::maximum(real);
        let target_logit = real[target];
        real.iter_mut().for_each(|logit| *logit = (*logit - max).exp());
        let z = super::norm::sum(real.len(), |i| real[i]);
        let log_z = z.ln() + max;
        let z_loss = T::of(spec.z_loss);
        if let Some(scale) = scale {
            // d log Z / d logit = p
            let of_p = scale * (T::ONE + T::of(2.0) * z_loss * log_z) / z;
            real.iter_mut().for_each(|p| *p *= of_p);
            real[target] = real[target] - scale;
            padding.fill(T::ZERO);
        }
        log_z - target_logit + z_loss * log_z * log_z
    }
}

//! AdamW over the flat buffers in one pass, and the global gradient norm.

use rayon::prelude::*;

use super::float::Float;
use super::vectorise::vectorised;
use crate::backend::AdamWStep;

/// Elements that one task works on, and that one partial sum of the norm covers.
const SPAN: usize = 1 << 14;

/// sqrt(sum of squares), in f64; partial sums of SPAN elements are added in order.
pub(super) fn norm<T: Float>(gradients: &[T]) -> f64 {
    let mut partial = vec![0.0; gradients.len().div_ceil(SPAN)];
    partial
        .par_iter_mut()
        .zip(gradients.par_chunks(SPAN))
        .for_each(|(partial, gradients)| *partial = sum_of_squares(gradients));
    partial.iter().sum::<f64>().sqrt()
}

pub(super) struct Buffers<'a, T> {
    pub parameters: &'a mut [T],
    pub gradients: &'a [T],
    pub moment1: &'a mut [T],
    pub moment2: &'a mut [T],
}

/// `norm`: the gradients' global norm.
pub(super) fn update<T: Float>(buffers: Buffers<T>, norm: f64, step: &AdamWStep) {
    if !norm.is_finite() {
        return;
    }
    let scale = T::of(step.gradient_scale(norm));
    let Buffers { parameters, gradients, moment1, moment2 } = buffers;
    let spans = parameters.par_chunks_mut(SPAN).zip(gradients.par_chunks(SPAN));
    let spans = spans.zip(moment1.par_chunks_mut(SPAN)).zip(moment2.par_chunks_mut(SPAN));
    spans.enumerate().for_each(|(span, (((parameters, gradients), moment1), moment2))| {
        let (start, len) = (span * SPAN, parameters.len());
        let mut at = 0;
        // Runs of elements that all decay, or all do not.
        while at < len {
            let next = step.decay.iter().find(|range| range.end > start + at);
            let (decays, until) = match next {
                Some(range) if range.start <= start + at => (true, range.end - start),
                Some(range) => (false, range.start - start),
                None => (false, len),
            };
            let run = at..until.min(len);
            let buffers = Buffers {
                parameters: &mut parameters[run.clone()],
                gradients: &gradients[run.clone()],
                moment1: &mut moment1[run.clone()],
                moment2: &mut moment2[run.clone()],
            };
            let weight_decay = if decays { step.weight_decay } else { 0.0 };
            update_run(buffers, scale, step, weight_decay);
            at = run.end;
        }
    });
}

vectorised! {
    fn sum_of_squares<T: Float>(values: &[T]) -> f64 {
        super::norm::sum(values.len(), |i| values[i].to_f64() * values[i].to_f64())
    }

    /// m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    /// w -= lr (m / c1 / (sqrt(v / c2) + eps) + decay w)
    fn update_run<T: Float>(buffers: Buffers<'_, T>, scale: T, step: &AdamWStep<'_>, weight_decay: f64) {
        let Buffers { parameters, gradients, moment1, moment2 } = buffers;
        let (beta1, beta2) = (T::of(step.beta1), T::of(step.beta2));
        let (rest1, rest2) = (T::of(1.0 - step.beta1), T::of(1.0 - step.beta2));
        let (inverse1, inverse2) = (T::of(1.0 / step.correction1), T::of(1.0 / step.correction2));
        let (lr, eps) = (T::of(step.lr), T::of(step.eps));
        let decoupled = T::of(if step.decoupled { weight_decay } else { 0.0 });
        let coupled = T::of(if step.decoupled { 0.0 } else { weight_decay });
        for i in 0..parameters.len() {
            let w = parameters[i];
            let g = gradients[i] * scale + coupled * w;
            let m = beta1 * moment1[i] + rest1 * g;
            let v = beta2 * moment2[i] + rest2 * g * g;
            moment1[i] = m;
            moment2[i] = v;
            let update = m * inverse1 / ((v * inverse2).sqrt() + eps) + decoupled * w;
            parameters[i] = w - lr * update;
        }
    }
}

//! RMSNorm and LayerNorm with a depth scale, forward and backward.
//!
//! gain_effective = w / sqrt(depth) is rounded once and multiplied by, so that a checkpoint with
//! this gain gives the same bits without any scale. RMSNorm: Zhang & Sennrich 2019, equation 4;
//! depth scale: "The Curse of Depth in Large Language Models", equation 12.

use rayon::prelude::*;

use super::float::Float;
use super::vectorise::vectorised;
use crate::backend::{NORM_PARTIAL_ROWS, NormSpec};
use crate::config::NormKind;

/// w / sqrt(depth), the gain that is applied and exported.
fn effective_gain<T: Float>(gain: &[T], depth: usize) -> Vec<T> {
    let divisor = T::of((depth as f64).sqrt());
    gain.iter().map(|&w| w / divisor).collect()
}

/// Combines halves until one value is left: short rows would spend most time adding one by one.
#[inline(always)]
fn fold<T: Float>(lanes: [T; 16], combine: impl Fn(T, T) -> T) -> T {
    let lanes: [T; 8] = std::array::from_fn(|i| combine(lanes[i], lanes[i + 8]));
    let lanes: [T; 4] = std::array::from_fn(|i| combine(lanes[i], lanes[i + 4]));
    combine(combine(lanes[0], lanes[2]), combine(lanes[1], lanes[3]))
}

/// Sum of `of(i)`, in 16 interleaved partial sums so that it vectorises in a fixed order.
#[inline(always)]
pub(super) fn sum<T: Float>(n: usize, of: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; 16];
    let whole = n / 16 * 16;
    let mut at = 0;
    while at < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += of(at + lane);
        }
        at += 16;
    }
    let mut total = fold(lanes, |a, b| a + b);
    for i in whole..n {
        total += of(i);
    }
    total
}

/// The largest value, in 16 interleaved maxima.
#[inline(always)]
pub(super) fn maximum<T: Float>(values: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; 16];
    let mut groups = values.chunks_exact(16);
    for group in &mut groups {
        for (max, &value) in lanes.iter_mut().zip(group) {
            *max = max.maximum(value);
        }
    }
    let max = fold(lanes, T::maximum);
    groups.remainder().iter().fold(max, |max, &value| max.maximum(value))
}

pub(super) struct Forward<'a, T> {
    pub inp: &'a [T],              // [T,C]
    pub gain: &'a [T],             // [C]
    pub out: &'a mut [T],          // [T,C]
    pub mean: Option<&'a mut [T]>, // [T]
    pub rstd: &'a mut [T],         // [T]
}

pub(super) fn forward<T: Float>(spec: NormSpec, args: Forward<T>) {
    let Forward { inp, gain, out, mean, rstd } = args;
    let c = gain.len();
    let gain = &effective_gain(gain, spec.depth);
    let block = NORM_PARTIAL_ROWS * c;
    let rows = out.par_chunks_mut(block).zip(inp.par_chunks(block));
    let rows = rows.zip(rstd.par_chunks_mut(NORM_PARTIAL_ROWS));
    match mean {
        Some(mean) => rows
            .zip(mean.par_chunks_mut(NORM_PARTIAL_ROWS))
            .for_each(|(((out, inp), rstd), mean)| layer_norm(spec, inp, gain, out, mean, rstd)),
        None => rows.for_each(|((out, inp), rstd)| rms_norm(spec, inp, gain, out, rstd)),
    }
}

/// One row: out = (inp - mean) rstd gain.
#[inline(always)]
fn normalise<T: Float>(eps: f64, inp: &[T], gain: &[T], mean: T, out: &mut [T], rstd: &mut T) {
    let c = gain.len();
    let (inp, out) = (&inp[..c], &mut out[..c]);
    let variance = sum(c, |i| (inp[i] - mean) * (inp[i] - mean)) / T::of(c as f64);
    *rstd = T::ONE / (variance + T::of(eps)).sqrt();
    for i in 0..c {
        out[i] = (inp[i] - mean) * *rstd * gain[i];
    }
}

vectorised! {
    /// inp, out [rows,C]; gain [C]; rstd [rows]
    fn rms_norm<T: Float>(
        spec: NormSpec,
        inp: &[T],
        gain: &[T],
        out: &mut [T],
        rstd: &mut [T],
    ) {
        let c = gain.len();
        for ((inp, out), rstd) in inp.chunks_exact(c).zip(out.chunks_exact_mut(c)).zip(rstd) {
            normalise(spec.eps, inp, gain, T::ZERO, out, rstd);
        }
    }

    /// As `rms_norm`, with mean [rows]
    fn layer_norm<T: Float>(
        spec: NormSpec,
        inp: &[T],
        gain: &[T],
        out: &mut [T],
        mean: &mut [T],
        rstd: &mut [T],
    ) {
        let c = gain.len();
        let rows = inp.chunks_exact(c).zip(out.chunks_exact_mut(c));
        for (((inp, out), mean), rstd) in rows.zip(mean).zip(rstd) {
            *mean = sum(c, |i| inp[i]) / T::of(c as f64);
            normalise(spec.eps, inp, gain, *mean, out, rstd);
        }
    }
}

pub(super) struct Backward<'a, T> {
    pub inp: &'a [T],          // [T,C], what was normalised
    pub gain: &'a [T],         // [C]
    pub mean: Option<&'a [T]>, // [T]
    pub rstd: &'a [T],         // [T]
    pub d_out: &'a [T],        // [T,C]
    pub partial: &'a mut [T],  // [ceil(T/NORM_PARTIAL_ROWS),C]
    pub d_inp: &'a mut [T],    // [T,C]
    pub accumulate: bool,      // d_inp += instead of =
    pub d_gain: &'a mut [T],   // [C], +=
}

/// With x = (inp - mean) rstd and g = d_out gain:
/// d_inp = rstd (g - mean(g) - x mean(g x)), without the mean(g) for RMSNorm;
/// d_w = sum over rows of d_out x / sqrt(depth).
pub(super) fn backward<T: Float>(spec: NormSpec, args: Backward<T>) {
    let Backward { inp, gain, mean, rstd, d_out, partial, d_inp, accumulate, d_gain } = args;
    let c = gain.len();
    let gain = effective_gain(gain, spec.depth);
    let block = NORM_PARTIAL_ROWS * c;
    let tasks = d_inp.par_chunks_mut(block).zip(partial.par_chunks_mut(c)).enumerate();
    tasks.for_each(|(chunk, (d_inp, partial))| {
        let first = chunk * NORM_PARTIAL_ROWS;
        let (inp, d_out, rstd) = (&inp[first * c..], &d_out[first * c..], &rstd[first..]);
        let mean = mean.map(|mean| &mean[first..]);
        backward_rows(spec, accumulate, inp, &gain, mean, rstd, d_out, partial, d_inp);
    });
    let divisor = T::of((spec.depth as f64).sqrt());
    for (i, d_gain) in d_gain.iter_mut().enumerate() {
        let total = partial.chunks_exact(c).fold(T::ZERO, |total, row| total + row[i]);
        *d_gain += total / divisor;
    }
}

vectorised! {
    /// d_inp [rows,C] decides how many rows; partial [C] is the sum of d_out x over them.
    fn backward_rows<T: Float>(
        spec: NormSpec,
        accumulate: bool,
        inp: &[T],
        gain: &[T],
        mean: Option<&[T]>,
        rstd: &[T],
        d_out: &[T],
        partial: &mut [T],
        d_inp: &mut [T],
    ) {
        let c = gain.len();
        let n = T::of(c as f64);
        let partial = &mut partial[..c];
        partial.fill(T::ZERO);
        for (t, d_inp) in d_inp.chunks_exact_mut(c).enumerate() {
            let (inp, d_out) = (&inp[t * c..][..c], &d_out[t * c..][..c]);
            let (mean, rstd) = (mean.map_or(T::ZERO, |mean| mean[t]), rstd[t]);
            let mean_gx = sum(c, |i| d_out[i] * gain[i] * (inp[i] - mean)) * rstd / n;
            let mean_g = match spec.kind {
                NormKind::Rms => T::ZERO,
                NormKind::Layer => sum(c, |i| d_out[i] * gain[i]) / n,
            };
            for i in 0..c {
                let x = (inp[i] - mean) * rstd;
                partial[i] += d_out[i] * x;
                let d = (d_out[i] * gain[i] - mean_g - x * mean_gx) * rstd;
                d_inp[i] = if accumulate { d_inp[i] + d } else { d };
            }
        }
    }
}

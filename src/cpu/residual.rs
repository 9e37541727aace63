//! A branch added to the stream with scales: a x + b g f, forward and backward.

use rayon::prelude::*;

use super::float::Float;
use super::vectorise::vectorised;
use crate::backend::{NORM_PARTIAL_ROWS, ResidualSpec};

/// b g as a row [C]; g [C], or [1] for all columns.
fn branch_row<T: Float>(spec: ResidualSpec, gain: Option<&[T]>, columns: usize) -> Vec<T> {
    let scale = T::of(spec.branch_scale);
    match gain {
        None => vec![scale; columns],
        Some([gain]) => vec![scale * *gain; columns],
        Some(gain) => gain.iter().map(|&gain| scale * gain).collect(),
    }
}

/// inp, residual, out [T,C]; gain [C] or [1]. C is 1 only where the gain is [1], too.
pub(super) fn forward<T: Float>(
    spec: ResidualSpec,
    columns: usize,
    inp: &[T],
    residual: &[T],
    gain: Option<&[T]>,
    out: &mut [T],
) {
    let row = &branch_row(spec, gain, columns);
    let stream_scale = T::of(spec.stream_scale);
    let block = NORM_PARTIAL_ROWS * columns;
    let tasks = out.par_chunks_mut(block).zip(inp.par_chunks(block));
    tasks.zip(residual.par_chunks(block)).for_each(|((out, inp), residual)| {
        forward_rows(stream_scale, row, inp, residual, out);
    });
}

pub(super) struct Gain<'a, T> {
    pub inp: &'a [T],         // [T,C]
    pub gain: &'a [T],        // [C] or [1]
    pub partial: &'a mut [T], // [ceil(T/NORM_PARTIAL_ROWS),C]
    pub d_gain: &'a mut [T],  // as gain, +=
}

/// d_out [T,C], multiplied by the stream's scale after its last use; d_inp [T,C].
pub(super) fn backward<T: Float>(
    spec: ResidualSpec,
    columns: usize,
    d_out: &mut [T],
    d_inp: &mut [T],
    gain: Option<Gain<T>>,
) {
    let block = NORM_PARTIAL_ROWS * columns;
    let row = &branch_row(spec, gain.as_ref().map(|gain| gain.gain), columns);
    if let Some(Gain { inp, partial, d_gain, .. }) = gain {
        let tasks = partial.par_chunks_mut(columns).zip(inp.par_chunks(block));
        tasks.zip(d_out.par_chunks(block)).for_each(|((partial, inp), d_out)| {
            partial.fill(T::ZERO);
            add_products(inp, d_out, partial);
        });
        let scale = T::of(spec.branch_scale);
        let column =
            |i: usize| partial.chunks_exact(columns).fold(T::ZERO, |total, row| total + row[i]);
        match d_gain {
            [d_gain] => {
                let total = (0..columns).fold(T::ZERO, |total, i| total + column(i));
                *d_gain += scale * total;
            }
            d_gain => {
                d_gain.iter_mut().enumerate().for_each(|(i, d_gain)| *d_gain += scale * column(i));
            }
        }
    }
    let stream_scale = T::of(spec.stream_scale);
    d_inp.par_chunks_mut(block).zip(d_out.par_chunks_mut(block)).for_each(|(d_inp, d_out)| {
        backward_rows(stream_scale, row, d_out, d_inp);
    });
}

vectorised! {
    /// row [C]; inp, residual, out [rows,C]
    fn forward_rows<T: Float>(
        stream_scale: T,
        row: &[T],
        inp: &[T],
        residual: &[T],
        out: &mut [T],
    ) {
        let c = row.len();
        let rows = out.chunks_exact_mut(c).zip(inp.chunks_exact(c)).zip(residual.chunks_exact(c));
        for ((out, inp), residual) in rows {
            for i in 0..c {
                out[i] = stream_scale * residual[i] + row[i] * inp[i];
            }
        }
    }

    /// partial [C] += sum over rows of d_out inp
    fn add_products<T: Float>(inp: &[T], d_out: &[T], partial: &mut [T]) {
        let c = partial.len();
        for (inp, d_out) in inp.chunks_exact(c).zip(d_out.chunks_exact(c)) {
            for i in 0..c {
                partial[i] += d_out[i] * inp[i];
            }
        }
    }

    /// row [C]; d_out, d_inp [rows,C]
    fn backward_rows<T: Float>(stream_scale: T, row: &[T], d_out: &mut [T], d_inp: &mut [T]) {
        let c = row.len();
        for (d_inp, d_out) in d_inp.chunks_exact_mut(c).zip(d_out.chunks_exact_mut(c)) {
            for i in 0..c {
                d_inp[i] = row[i] * d_out[i];
                d_out[i] *= stream_scale;
            }
        }
    }
}

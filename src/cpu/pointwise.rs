//! SwiGLU, rotary embedding, and embedding lookup, forward and backward.

use rayon::prelude::*;

use super::float::Float;
use super::memory::Columns;
use super::vectorise::vectorised;
use crate::backend::HeadSpec;

/// Rows that one task works on.
const ROWS: usize = 32;

/// out = silu(gate) up (Shazeer 2020, equation 5); inp [T,2F] is gate, then up; out [T,F].
pub(super) fn swiglu_forward<T: Float>(inp: &[T], out: &mut [T], f: usize) {
    let tasks = out.par_chunks_mut(ROWS * f).zip(inp.par_chunks(ROWS * 2 * f));
    tasks.for_each(|(out, inp)| swiglu_rows(inp, out, f));
}

pub(super) fn swiglu_backward<T: Float>(inp: &[T], d_out: &[T], d_inp: &mut [T], f: usize) {
    let tasks = d_inp.par_chunks_mut(ROWS * 2 * f).zip(inp.par_chunks(ROWS * 2 * f));
    let tasks = tasks.zip(d_out.par_chunks(ROWS * f));
    tasks.for_each(|((d_inp, inp), d_out)| swiglu_backward_rows(inp, d_out, d_inp, f));
}

/// Rotates pairs (i, i + D/2) of q and k by the table's angles, or back with `inverse`;
/// qkv [T,(H+2K)D], table [P,D]. Su et al. 2021, equation 34, in the rotate-half order.
pub(super) fn rotary<T: Float>(
    heads: HeadSpec,
    table: &[T],
    positions: &[i32],
    qkv: &mut [T],
    inverse: bool,
) {
    let tasks = qkv.par_chunks_mut(ROWS * heads.qkv_columns()).zip(positions.par_chunks(ROWS));
    tasks.for_each(|(qkv, positions)| rotary_rows(heads, table, positions, qkv, inverse));
}

/// Pairs that a rotation turns at once: heads are too narrow for loops of unknown length.
const GROUP: usize = 8;

/// The pair (x, y) turned by an angle.
#[inline(always)]
fn turn<T: Float>(x: T, y: T, cos: T, sin: T) -> (T, T) {
    (x * cos - y * sin, y * cos + x * sin)
}

vectorised! {
    /// inp [rows,2F], out [rows,F]
    fn swiglu_rows<T: Float>(inp: &[T], out: &mut [T], f: usize) {
        for (out, inp) in out.chunks_exact_mut(f).zip(inp.chunks_exact(2 * f)) {
            let (gate, up) = inp.split_at(f);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * gate.sigmoid() * up;
            }
        }
    }

    /// inp, d_inp [rows,2F], d_out [rows,F]
    fn swiglu_backward_rows<T: Float>(inp: &[T], d_out: &[T], d_inp: &mut [T], f: usize) {
        let rows = d_inp.chunks_exact_mut(2 * f).zip(inp.chunks_exact(2 * f));
        for ((d_inp, inp), d_out) in rows.zip(d_out.chunks_exact(f)) {
            let (gate, up) = inp.split_at(f);
            let (d_gate, d_up) = d_inp.split_at_mut(f);
            for i in 0..f {
                let sigmoid = gate[i].sigmoid();
                let silu = gate[i] * sigmoid;
                d_up[i] = d_out[i] * silu;
                d_gate[i] = d_out[i] * up[i] * (sigmoid + silu * (T::ONE - sigmoid));
            }
        }
    }

    fn rotary_rows<T: Float>(
        heads: HeadSpec,
        table: &[T],
        positions: &[i32],
        qkv: &mut [T],
        inverse: bool,
    ) {
        let (d, half) = (heads.head_dim, heads.head_dim / 2);
        let sign = if inverse { -T::ONE } else { T::ONE };
        for (qkv, &position) in qkv.chunks_exact_mut(heads.qkv_columns()).zip(positions) {
            let (cos, sin) = table[position as usize * d..][..d].split_at(half);
            let (cos, cos_rest) = cos.as_chunks::<GROUP>();
            let (sin, sin_rest) = sin.as_chunks::<GROUP>();
            let rotated = &mut qkv[..(heads.heads + heads.kv_heads) * d];
            for head in rotated.chunks_exact_mut(d) {
                let (low, high) = head.split_at_mut(half);
                let (low, low_rest) = low.as_chunks_mut::<GROUP>();
                let (high, high_rest) = high.as_chunks_mut::<GROUP>();
                for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    for i in 0..GROUP {
                        (low[i], high[i]) = turn(low[i], high[i], cos[i], sign * sin[i]);
                    }
                }
                for i in 0..low_rest.len() {
                    let (x, y) = (low_rest[i], high_rest[i]);
                    (low_rest[i], high_rest[i]) = turn(x, y, cos_rest[i], sign * sin_rest[i]);
                }
            }
        }
    }
}

/// out[t] = table[tokens[t]]
pub(super) fn embedding_forward<T: Float>(tokens: &[i32], table: &[T], out: &mut [T], c: usize) {
    out.par_chunks_mut(ROWS * c).zip(tokens.par_chunks(ROWS)).for_each(|(out, tokens)| {
        for (out, &token) in out.chunks_exact_mut(c).zip(tokens) {
            out.copy_from_slice(&table[token as usize * c..][..c]);
        }
    });
}

/// Columns of the table that one task adds to, so that no two add to one element.
const COLUMNS: usize = 32;

/// d_table[tokens[t]] += d_out[t], in the order of the tokens.
pub(super) fn embedding_backward<T: Float>(
    tokens: &[i32],
    d_out: &[T],
    d_table: &mut [T],
    c: usize,
) {
    let d_table = Columns::new(d_table, c);
    (0..c.div_ceil(COLUMNS)).into_par_iter().for_each(|task| {
        let column = task * COLUMNS;
        let width = COLUMNS.min(c - column);
        for (d_out, &token) in d_out.chunks_exact(c).zip(tokens) {
            // SAFETY: tasks have different columns, and one task holds one row at a time.
            let d_table = unsafe { d_table.row(token as usize, column, width) };
            for (d_table, &d_out) in d_table.iter_mut().zip(&d_out[column..]) {
                *d_table += d_out;
            }
        }
    });
}

//! Large matrix products, through the `gemm` crate.
//!
//! `gemm` splits its work over rows and columns only, never over the summed dimension, so the
//! number of threads does not change a bit of the result; tests/cpu.rs holds it to that.

use rayon::prelude::*;

use super::float::Float;

/// A matrix as a slice with strides: element (r, c) is `data[r * row_stride + c * column_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A row-major matrix of `columns` columns.
    pub fn rows(data: &'a [T], columns: usize) -> Self {
        Matrix { data, row_stride: columns, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Matrix { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        let last_row = (rows - 1).checked_mul(self.row_stride);
        let last_column = (columns - 1).checked_mul(self.column_stride);
        let last = last_row.zip(last_column).and_then(|(row, column)| row.checked_add(column));
        last.is_some_and(|last| last < self.data.len())
    }
}

/// out [m,n] = a [m,k] b [k,n], or += with `accumulate`; all threads.
pub(crate) fn matmul<T: Float>(
    [m, n, k]: [usize; 3],
    a: Matrix<T>,
    b: Matrix<T>,
    out: &mut [T],
    accumulate: bool,
) {
    if m == 0 || n == 0 || k == 0 {
        if !accumulate {
            out.fill(T::ZERO);
        }
        return;
    }
    let out_holds = m.checked_mul(n).is_some_and(|elements| elements <= out.len());
    assert!(a.holds(m, k) && b.holds(k, n) && out_holds, "matmul [{m},{n},{k}]: slices");
    // SAFETY: the three matrices lie inside their slices (asserted), and `out` is not shared.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// Depth of the panels that `gemm` packs, and the third-level cache that it packs into at most.
const PANEL_DEPTH: usize = 512;
const PANEL_BYTES: usize = 32 << 20;

/// Bytes that `gemm` takes, while it runs, to multiply by a matrix of this size: packed panels of
/// both operands.
pub(super) fn packing_bytes<T>(rows: usize, columns: usize) -> usize {
    2 * (rows * columns.min(PANEL_DEPTH) * size_of::<T>()).min(PANEL_BYTES)
}

/// out = inp weight^T (+ residual); inp [T,I], weight [O,I], out and residual [T,O].
pub(super) fn linear_forward<T: Float>(
    inp: &[T],
    weight: &[T],
    residual: Option<&[T]>,
    out: &mut [T],
    [t, i, o]: [usize; 3],
) {
    if let Some(residual) = residual {
        parallel_copy(residual, out);
    }
    let (inp, weight) = (Matrix::rows(inp, i), Matrix::rows(weight, i));
    matmul([t, o, i], inp, weight.transposed(), out, residual.is_some());
}

/// d_inp (+)= d_out weight; [T,I] = [T,O] [O,I].
pub(super) fn linear_d_inp<T: Float>(
    weight: &[T],
    d_out: &[T],
    d_inp: &mut [T],
    accumulate: bool,
    [t, i, o]: [usize; 3],
) {
    matmul([t, i, o], Matrix::rows(d_out, o), Matrix::rows(weight, i), d_inp, accumulate);
}

/// d_weight += d_out^T inp; [O,I] = [O,T] [T,I].
pub(super) fn linear_d_weight<T: Float>(
    inp: &[T],
    d_out: &[T],
    d_weight: &mut [T],
    [t, i, o]: [usize; 3],
) {
    matmul([o, i, t], Matrix::rows(d_out, o).transposed(), Matrix::rows(inp, i), d_weight, true);
}

/// Elements that one task copies or adds.
const SPAN: usize = 1 << 14;

pub(super) fn parallel_copy<T: Float>(from: &[T], to: &mut [T]) {
    to.par_chunks_mut(SPAN).zip(from.par_chunks(SPAN)).for_each(|(to, from)| {
        to.copy_from_slice(from);
    });
}

pub(super) fn parallel_add<T: Float>(from: &[T], to: &mut [T]) {
    to.par_chunks_mut(SPAN).zip(from.par_chunks(SPAN)).for_each(|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to += from);
    });
}

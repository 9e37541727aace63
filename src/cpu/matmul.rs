//! Matrix products: large ones through the `gemm` crate, small tiles (attention) here.
//!
//! `gemm` splits its work over rows and columns only, never over the summed dimension, so the
//! number of threads does not change a bit of the result; tests/cpu.rs holds it to that.

use rayon::prelude::*;

use super::float::Float;

/// A matrix as a slice with strides: element (r, c) is `data[r * row_stride + c * column_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
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
        (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// out [m,n] = a [m,k] b [k,n], or += with `accumulate`; all threads.
pub(super) fn matmul<T: Float>(
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
    assert!(a.holds(m, k) && b.holds(k, n) && out.len() >= m * n, "matmul [{m},{n},{k}]: slices");
    // The three matrices lie inside their slices (asserted), and `out` is not shared.
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

/// c [m,n] = a [m,k] b [k,n], or += with `accumulate`, on one thread and inlined into a
/// vectorised caller. a's element (r, p) is `a[r * a_row + p * a_column]`; rows of b and c are
/// `b_row` and `c_row` apart.
#[derive(Clone, Copy)]
pub(super) struct TileProduct {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a_row: usize,
    pub a_column: usize,
    pub b_row: usize,
    pub c_row: usize,
    pub accumulate: bool,
}

impl TileProduct {
    #[inline(always)]
    pub fn run<T: Float>(self, a: &[T], b: &[T], c: &mut [T]) {
        let mut column = 0;
        while self.n - column >= 32 {
            self.columns::<T, 32>(column, a, b, c);
            column += 32;
        }
        while self.n - column >= 16 {
            self.columns::<T, 16>(column, a, b, c);
            column += 16;
        }
        while column < self.n {
            self.columns::<T, 1>(column, a, b, c);
            column += 1;
        }
    }

    /// Columns `column..column + N`, four rows at a time: four rows of 32 f32 are eight
    /// accumulators of 512 bits, enough to hide the latency of a fused multiply-add.
    #[inline(always)]
    fn columns<T: Float, const N: usize>(self, column: usize, a: &[T], b: &[T], c: &mut [T]) {
        let mut row = 0;
        while self.m - row >= 4 {
            self.block::<T, 4, N>(row, column, a, b, c);
            row += 4;
        }
        while row < self.m {
            self.block::<T, 1, N>(row, column, a, b, c);
            row += 1;
        }
    }

    #[inline(always)]
    fn block<T: Float, const M: usize, const N: usize>(
        self,
        row: usize,
        column: usize,
        a: &[T],
        b: &[T],
        c: &mut [T],
    ) {
        let mut sums = [[T::ZERO; N]; M];
        for p in 0..self.k {
            let b: &[T; N] = b[p * self.b_row + column..][..N].try_into().expect("N elements");
            for r in 0..M {
                let a = a[(row + r) * self.a_row + p * self.a_column];
                for j in 0..N {
                    sums[r][j] = a.mul_add(b[j], sums[r][j]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let c = &mut c[(row + r) * self.c_row + column..][..N];
            for j in 0..N {
                c[j] = if self.accumulate { c[j] + sums[j] } else { sums[j] };
            }
        }
    }
}

//! Small matrix products on one thread: the tiles of attention.
//!
//! Six rows by two vectors of accumulators stay in 16 registers, eight in 32: enough to hide the
//! latency of a fused multiply-add. `a` may be transposed, `b` and `c` have contiguous rows.

/// c [m,n] = a [m,k] b [k,n], or += with `accumulate`. a's element (r, p) is
/// `a[r * a_row + p * a_column]`; rows of b and c are `b_row` and `c_row` apart.
#[derive(Clone, Copy, Debug)]
pub struct TileProduct {
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
    /// Panics unless the product stays inside slices of these lengths; false if it is empty.
    fn is_inside(self, a: usize, b: usize, c: usize) -> bool {
        assert!(self.k > 0, "a tile product sums over at least one element");
        if self.m == 0 || self.n == 0 {
            return false;
        }
        let end = |rows: usize, row: usize, columns: usize, column: usize| {
            let last =
                (rows - 1).checked_mul(row)?.checked_add((columns - 1).checked_mul(column)?)?;
            last.checked_add(1)
        };
        let is_inside = |end: Option<usize>, length: usize| end.is_some_and(|end| end <= length);
        assert!(is_inside(end(self.m, self.a_row, self.k, self.a_column), a), "a: {self:?} of {a}");
        assert!(is_inside(end(self.k, self.b_row, self.n, 1), b), "b: {self:?} of {b}");
        assert!(is_inside(end(self.m, self.c_row, self.n, 1), c), "c: {self:?} of {c}");
        true
    }
}

macro_rules! tile_product {
    ($function:ident, $float:ty, $lanes:ident, $splat:ident, $mul_add:ident,
     $add:ident, $load:ident, $store:ident, $vector:ident, $whole_mut:ident) => {
        /// One thread, the widest vectors that this machine has.
        pub(super) fn $function(tile: TileProduct, a: &[$float], b: &[$float], c: &mut [$float]) {
            struct Work<'a>(TileProduct, &'a [$float], &'a [$float], &'a mut [$float]);

            impl pulp::WithSimd for Work<'_> {
                type Output = ();

                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, simd: S) {
                    let Work(tile, a, b, c) = self;
                    let mut column = 0;
                    while column < tile.n {
                        let width = (tile.n - column).min(2 * S::$lanes);
                        let mut row = 0;
                        while S::REGISTER_COUNT >= 32 && tile.m - row >= 8 {
                            block::<S, 8>(simd, tile, row, column, width, a, b, c);
                            row += 8;
                        }
                        while tile.m - row >= 6 {
                            block::<S, 6>(simd, tile, row, column, width, a, b, c);
                            row += 6;
                        }
                        while tile.m - row >= 4 {
                            block::<S, 4>(simd, tile, row, column, width, a, b, c);
                            row += 4;
                        }
                        while row < tile.m {
                            block::<S, 1>(simd, tile, row, column, width, a, b, c);
                            row += 1;
                        }
                        column += width;
                    }
                }
            }

            /// M rows by `width` columns, at most two vectors.
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn block<S: pulp::Simd, const M: usize>(
                simd: S,
                tile: TileProduct,
                row: usize,
                column: usize,
                width: usize,
                a: &[$float],
                b: &[$float],
                c: &mut [$float],
            ) {
                let lanes = S::$lanes;
                let split = width.min(lanes);
                let mut sums = [[simd.$splat(0.0); 2]; M];
                if width == 2 * lanes {
                    // SAFETY: each of k times, row + r < m and column + width <= n, so that all
                    // that is read lies inside the slices (`is_inside`); vectors are read
                    // unaligned.
                    unsafe {
                        let mut a = a.as_ptr().add(row * tile.a_row);
                        let mut b = b.as_ptr().add(column);
                        for _ in 0..tile.k {
                            let vectors = b.cast::<[S::$vector; 2]>().read_unaligned();
                            for r in 0..M {
                                let a = simd.$splat(*a.add(r * tile.a_row));
                                sums[r][0] = simd.$mul_add(a, vectors[0], sums[r][0]);
                                sums[r][1] = simd.$mul_add(a, vectors[1], sums[r][1]);
                            }
                            a = a.wrapping_add(tile.a_column);
                            b = b.wrapping_add(tile.b_row);
                        }
                    }
                } else {
                    for p in 0..tile.k {
                        let b = &b[p * tile.b_row + column..][..width];
                        let b = [simd.$load(&b[..split]), simd.$load(&b[split..])];
                        for r in 0..M {
                            let a = a[(row + r) * tile.a_row + p * tile.a_column];
                            let a = simd.$splat(a);
                            sums[r][0] = simd.$mul_add(a, b[0], sums[r][0]);
                            sums[r][1] = simd.$mul_add(a, b[1], sums[r][1]);
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    let c = &mut c[(row + r) * tile.c_row + column..][..width];
                    if width == 2 * lanes {
                        for (c, &sum) in S::$whole_mut(c).0.iter_mut().zip(sums) {
                            *c = if tile.accumulate { simd.$add(*c, sum) } else { sum };
                        }
                        continue;
                    }
                    let (low, high) = c.split_at_mut(split);
                    for (c, &sum) in [low, high].into_iter().zip(sums) {
                        let sum = match tile.accumulate {
                            true => simd.$add(simd.$load(c), sum),
                            false => sum,
                        };
                        simd.$store(c, sum);
                    }
                }
            }

            if tile.is_inside(a.len(), b.len(), c.len()) {
                pulp::Arch::new().dispatch(Work(tile, a, b, c));
            }
        }
    };
}

tile_product!(
    tile_product_f32,
    f32,
    F32_LANES,
    splat_f32s,
    mul_add_f32s,
    add_f32s,
    partial_load_f32s,
    partial_store_f32s,
    f32s,
    as_mut_simd_f32s
);
tile_product!(
    tile_product_f64,
    f64,
    F64_LANES,
    splat_f64s,
    mul_add_f64s,
    add_f64s,
    partial_load_f64s,
    partial_store_f64s,
    f64s,
    as_mut_simd_f64s
);

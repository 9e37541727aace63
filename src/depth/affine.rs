//! The affine map that fits a block best: what is left of a block once it may only be linear.
//!
//! d(x) = block(x) - x is fitted by least squares over tokens, from sums in f64. Features of the
//! input are standardised first, and the fit is a ridge regression: directions of the standardised
//! input that hardly vary count for nothing, so features that depend on each other, or never
//! change, cannot make the map explode. Matrices are row-major slices; `nalgebra` solves.

use nalgebra::{Cholesky, DMatrix};

use crate::cpu::{Matrix, matmul};

/// Variance that the ridge adds to every direction of the standardised input. f32 rounds a feature
/// with (6e-8)^2 = 4e-15 of its variance, far below. The sums over tokens of features far from zero
/// may be rounded by more: those that depend on each other then take 100 times as much, or more.
const RIDGE: f64 = 1e-10;

/// Running sums over tokens of x, and of d = block(x) - x; [C] and [C,C].
pub struct Moments {
    tokens: u64,
    x: Vec<f64>,
    d: Vec<f64>,
    xx: Vec<f64>,
    xd: Vec<f64>,
}

/// d(x) = d_mean + (x - x_mean) weight
pub struct AffineMap {
    x_mean: Vec<f64>,
    d_mean: Vec<f64>,
    /// [C,C]
    weight: Vec<f64>,
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value as f64).collect()
}

fn difference(out: &[f32], inp: &[f32]) -> Vec<f64> {
    out.iter().zip(inp).map(|(&out, &inp)| out as f64 - inp as f64).collect()
}

fn add_rows(sums: &mut [f64], rows: &[f64]) {
    for row in rows.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
}

impl Moments {
    pub fn new(hidden: usize) -> Self {
        Moments {
            tokens: 0,
            x: vec![0.0; hidden],
            d: vec![0.0; hidden],
            xx: vec![0.0; hidden * hidden],
            xd: vec![0.0; hidden * hidden],
        }
    }

    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// inp, out [n,C]: the stream before the block and after it.
    pub fn add(&mut self, inp: &[f32], out: &[f32]) {
        let c = self.x.len();
        let n = inp.len() / c;
        let (x, d) = (wide(inp), difference(out, inp));
        add_rows(&mut self.x, &x);
        add_rows(&mut self.d, &d);
        let [x, d] = [&x, &d].map(|rows| Matrix::rows(rows, c));
        matmul([c, c, n], x.transposed(), x, &mut self.xx, true);
        matmul([c, c, n], x.transposed(), d, &mut self.xd, true);
        self.tokens += n as u64;
    }

    /// The best map, O(C^3) on one thread; `None` if the sums are not finite.
    pub fn solve(&self) -> Option<AffineMap> {
        let (c, n) = (self.x.len(), self.tokens as f64);
        let [x_mean, d_mean] =
            [&self.x, &self.d].map(|sum| sum.iter().map(|sum| sum / n).collect::<Vec<f64>>());
        let covariance = |sums: &[f64], means: &[f64], i: usize, j: usize| {
            sums[i * c + j] / n - x_mean[i] * means[j]
        };
        // 1 / standard deviation; a feature that never changes explains nothing. What is left of
        // its variance is the rounding of the sums.
        let inverse: Vec<f64> = (0..c)
            .map(|i| {
                let (square, variance) =
                    (self.xx[i * c + i] / n, covariance(&self.xx, &x_mean, i, i));
                if variance > square * 1e-14 { variance.sqrt().recip() } else { 0.0 }
            })
            .collect();
        let correlation = DMatrix::from_fn(c, c, |i, j| {
            covariance(&self.xx, &x_mean, i, j) * inverse[i] * inverse[j]
        });
        let target =
            DMatrix::from_fn(c, c, |i, j| covariance(&self.xd, &d_mean, i, j) * inverse[i]);
        // weight = D (D covariance(x, x) D + ridge)^-1 D covariance(x, d), with D = diag(inverse)
        let finite = |values: &DMatrix<f64>| values.iter().all(|value| value.is_finite());
        if !finite(&correlation) || !finite(&target) {
            return None;
        }
        let factored = |ridge: f64| {
            let mut ridged = correlation.clone();
            (0..c).for_each(|i| ridged[(i, i)] += ridge);
            Cholesky::new(ridged)
        };
        let solved = (0..5).find_map(|i| factored(RIDGE * 100f64.powi(i)))?.solve(&target);
        let mut weight = solved.transpose().as_slice().to_vec(); // row-major
        for (row, inverse) in weight.chunks_exact_mut(c).zip(&inverse) {
            row.iter_mut().for_each(|value| *value *= inverse);
        }
        let finite = weight.iter().all(|value| value.is_finite());
        finite.then_some(AffineMap { x_mean, d_mean, weight })
    }
}

impl AffineMap {
    /// inp [n,C] -> x + d(x) [n,C]
    pub fn apply(&self, inp: &[f32]) -> Vec<f32> {
        let c = self.x_mean.len();
        let n = inp.len() / c;
        let mut centred = wide(inp);
        for row in centred.chunks_exact_mut(c) {
            row.iter_mut().zip(&self.x_mean).for_each(|(value, mean)| *value -= mean);
        }
        let mut d = vec![0.0; n * c];
        let [x, weight] = [&centred, &self.weight].map(|rows| Matrix::rows(rows, c));
        matmul([n, c, c], x, weight, &mut d, false);
        let means = self.d_mean.iter().cycle();
        let values = inp.iter().zip(means).zip(&d);
        values.map(|((&x, mean), d)| (x as f64 + mean + d) as f32).collect()
    }
}

/// How much of a block's change a map explains, over tokens that it was not fitted on.
pub struct Explained {
    tokens: u64,
    /// [C]: sums of d, for its mean.
    d: Vec<f64>,
    squares: f64,
    left: f64,
}

impl Explained {
    pub fn new(hidden: usize) -> Self {
        Explained { tokens: 0, d: vec![0.0; hidden], squares: 0.0, left: 0.0 }
    }

    /// inp, out, mapped [n,C]: the stream before the block, after it, and after the map.
    pub fn add(&mut self, inp: &[f32], out: &[f32], mapped: &[f32]) {
        let d = difference(out, inp);
        add_rows(&mut self.d, &d);
        self.squares += d.iter().map(|d| d * d).sum::<f64>();
        self.left += difference(out, mapped).iter().map(|left| left * left).sum::<f64>();
        self.tokens += (d.len() / self.d.len()) as u64;
    }

    /// 1 - left / variance of d; 1 where d never changes.
    pub fn share(&self) -> f64 {
        let n = self.tokens as f64;
        let means: f64 = self.d.iter().map(|sum| (sum / n).powi(2)).sum();
        let variance = self.squares - n * means;
        if variance > 0.0 { 1.0 - self.left / variance } else { 1.0 }
    }
}

//! Variance and angular distance of the residual stream, as running sums over tokens.
//!
//! Everything is computed in f64 from the stream's f32 values. Tokens are added in pieces of a
//! fixed size and in order, so the number of threads changes no bit.

use std::f64::consts::PI;

use rayon::prelude::*;

use super::report::Angular;
use crate::statistics::{quantile, sorted};

/// Tokens whose sums are made by one task.
const TOKENS_PER_TASK: usize = 16;

/// arccos(cosine similarity) / pi, 0 to 1: "The Curse of Depth", equation 1. The cosine is clamped
/// to -1..1, which rounding may leave. A vector of zeros has no direction and counts as orthogonal
/// to all others: 0.5.
pub fn angular_distance(a: &[f32], b: &[f32]) -> f64 {
    distance(dot(a, b), dot(a, a), dot(b, b))
}

fn distance(product: f64, square_a: f64, square_b: f64) -> f64 {
    let lengths = (square_a * square_b).sqrt();
    let cosine = if lengths == 0.0 { 0.0 } else { product / lengths };
    cosine.clamp(-1.0, 1.0).acos() / PI
}

/// In eight interleaved sums, which the compiler makes vectors of.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0f64; LANES];
    let (whole_a, rest_a) = a.as_chunks::<LANES>();
    let (whole_b, rest_b) = b.as_chunks::<LANES>();
    for (a, b) in whole_a.iter().zip(whole_b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] as f64 * b[lane] as f64;
        }
    }
    let rest: f64 = rest_a.iter().zip(rest_b).map(|(&a, &b)| a as f64 * b as f64).sum();
    sums.iter().sum::<f64>() + rest
}

/// Variance over the features of one token, with Bessel's correction (C - 1), as torch's `var`.
fn variance(token: &[f32]) -> f64 {
    let count = token.len() as f64;
    let mean = token.iter().map(|&value| value as f64).sum::<f64>() / count;
    let squares: f64 = token.iter().map(|&value| (value as f64 - mean).powi(2)).sum();
    squares / (count - 1.0).max(1.0)
}

/// Sums over tokens, of the stream at L+1 depths.
pub struct StreamSums {
    depths: usize,
    hidden: usize,
    tokens: u64,
    /// [L+1]
    variance: Option<Vec<f64>>,
    /// [L+1,L+1]: entry (i, j), i < j.
    distance: Option<Vec<f64>>,
}

impl StreamSums {
    pub fn new(depths: usize, hidden: usize, variance: bool, angular: bool) -> Self {
        StreamSums {
            depths,
            hidden,
            tokens: 0,
            variance: variance.then(|| vec![0.0; depths]),
            distance: angular.then(|| vec![0.0; depths * depths]),
        }
    }

    /// Whether it wants to see tokens at all.
    pub fn wanted(&self) -> bool {
        self.variance.is_some() || self.distance.is_some()
    }

    /// `streams` [L+1] of [n,C].
    pub fn add(&mut self, streams: &[Vec<f32>]) {
        let (depths, c) = (self.depths, self.hidden);
        let tokens = streams[0].len() / c;
        let token = |depth: usize, t: usize| &streams[depth][t * c..(t + 1) * c];
        let tasks: Vec<usize> = (0..tokens).step_by(TOKENS_PER_TASK).collect();
        let of_task = |first: usize| first..tokens.min(first + TOKENS_PER_TASK);
        if let Some(sums) = &mut self.variance {
            let partial = tasks.par_iter().map(|&first| -> Vec<f64> {
                let of_depth = |d| of_task(first).map(|t| variance(token(d, t))).sum();
                (0..depths).map(of_depth).collect()
            });
            add_in_order(sums, partial.collect());
        }
        if let Some(sums) = &mut self.distance {
            let partial = tasks.par_iter().map(|&first| {
                let mut sums = vec![0.0; depths * depths];
                for t in of_task(first) {
                    let squares: Vec<f64> =
                        (0..depths).map(|d| dot(token(d, t), token(d, t))).collect();
                    for i in 0..depths {
                        for j in i + 1..depths {
                            let product = dot(token(i, t), token(j, t));
                            sums[i * depths + j] += distance(product, squares[i], squares[j]);
                        }
                    }
                }
                sums
            });
            add_in_order(sums, partial.collect());
        }
        self.tokens += tokens as u64;
    }

    /// [L+1]: means over the tokens.
    pub fn variance(&self) -> Option<Vec<f64>> {
        let sums = self.variance.as_ref()?;
        Some(sums.iter().map(|sum| sum / self.tokens as f64).collect())
    }

    pub fn angular(&self) -> Option<Angular> {
        let sums = self.distance.as_ref()?;
        let mean = |i: usize, j: usize| sums[i * self.depths + j] / self.tokens as f64;
        let row = |n: usize| (0..self.depths - n).map(|l| mean(l, l + n)).collect::<Vec<f64>>();
        let distance: Vec<Vec<f64>> = (1..self.depths).map(row).collect();
        let rescaled = distance.iter().map(|row| rescaled(row)).collect();
        Some(Angular { distance, rescaled })
    }
}

fn add_in_order(sums: &mut [f64], partial: Vec<Vec<f64>>) {
    for values in partial {
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
}

/// Clipped to the 1st and 99th percentile (numpy's linear ones) and scaled to 0..1; a row of equal
/// values becomes zeros.
pub fn rescaled(row: &[f64]) -> Vec<f64> {
    let sorted = sorted(row.to_vec());
    let (low, high) = (quantile(&sorted, 0.01), quantile(&sorted, 0.99));
    let span = if high > low { high - low } else { f64::INFINITY };
    row.iter().map(|value| (value.clamp(low, high) - low) / span).collect()
}

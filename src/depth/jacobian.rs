//! What is told of a block's Jacobian, and at which tokens it is taken.

use std::ops::Range;

use super::report::Jacobian;
use crate::random::Philox;

impl Jacobian {
    /// Of J [C,C], row-major.
    pub fn of(jacobian: &[f32], hidden: usize) -> Self {
        let (mut trace, mut off_diagonal, mut distance) = (0.0, 0.0, 0.0);
        for (i, row) in jacobian.chunks_exact(hidden).enumerate() {
            for (j, &value) in row.iter().enumerate() {
                let value = value as f64;
                if i == j {
                    trace += value;
                    distance += (value - 1.0).powi(2);
                } else {
                    off_diagonal += value * value;
                }
            }
        }
        let c = hidden as f64;
        Jacobian {
            diagonal_mean: trace / c,
            off_diagonal_norm: f64::sqrt(off_diagonal),
            relative_distance: ((distance + off_diagonal) / c).sqrt(),
        }
    }

    pub fn mean(all: &[Jacobian]) -> Self {
        let mean = |of: fn(&Jacobian) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
        Jacobian {
            diagonal_mean: mean(|j| j.diagonal_mean),
            off_diagonal_norm: mean(|j| j.off_diagonal_norm),
            relative_distance: mean(|j| j.relative_distance),
        }
    }
}

/// A token whose Jacobians are taken.
pub struct Sample {
    /// Of the text.
    pub window: u64,
    /// In the window: in the second half of its first tokens, so that it has a past.
    pub position: usize,
    /// [L] of [context, C]: the stream of the window's first tokens before each block.
    pub streams: Vec<Vec<f32>>,
}

/// Tokens to sample: windows at equal distances, a random position among the first `context` tokens
/// of each. `predicted`: tokens in all windows.
pub fn samples(count: usize, predicted: u64, sequence: usize, context: usize) -> Vec<Sample> {
    let windows = predicted.div_ceil(sequence as u64);
    let sample = |i: usize| {
        let window = (2 * i as u64 + 1) * windows / (2 * count as u64);
        let left = predicted - window * sequence as u64;
        let length = left.min(context as u64);
        let random = Philox::new(0, 0).at(i as u64)[0] as u64;
        let position = length / 2 + random % length.div_ceil(2);
        Sample { window, position: position as usize, streams: Vec::new() }
    };
    (0..count).map(sample).collect()
}

/// Rows in which the products of [`crate::engine::Layerwise::jacobian`] run at one time: about as
/// many tokens as a batch has, in rounds of equal size.
pub fn rows_at_once(hidden: usize, batch_tokens: usize, context: usize) -> usize {
    let rows = (batch_tokens / context).clamp(1, hidden);
    hidden.div_ceil(hidden.div_ceil(rows))
}

/// The samples of some windows, by their place among all samples.
pub fn of_windows(samples: &[Sample], windows: Range<u64>) -> Vec<usize> {
    (0..samples.len()).filter(|&i| windows.contains(&samples[i].window)).collect()
}

//! How much the busiest block of a pass on Hopper computes: what the pass is estimated to take by,
//! as long as no GPU has timed it.

use super::sm90::{self, Way};
use super::{Sizes, short};
use crate::backend::{AttentionSpec, HeadSpec};

/// Of the block that has the most to do, whole tiles counted, and each pass over them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Busiest {
    pub scores: f64,
    /// Each times the products over the head dim that it is part of: 2 forward; backward 5, or 7 in
    /// two passes.
    pub products: f64,
    /// Kernels of the pass.
    pub kernels: u64,
}

impl Busiest {
    pub fn forward(multiprocessors: usize, spec: AttentionSpec) -> Self {
        let AttentionSpec { heads, batch, sequence } = spec;
        let rows = sm90::rows_of_forward(heads.head_dim, sequence);
        let tile = |tile: usize| sm90::forward_item(sequence, rows, tile);
        let scores =
            busiest_of(multiprocessors, batch * heads.heads, sequence.div_ceil(rows), tile);
        Busiest { scores, products: 2.0 * scores, kernels: 1 }
    }

    /// `documents`: rows hold several; all of a row counts, as if it were one.
    pub fn backward(multiprocessors: usize, spec: AttentionSpec, documents: bool) -> Self {
        let AttentionSpec { heads, batch, sequence } = spec;
        let sizes = Sizes { batch, sequence };
        match Way::chosen(multiprocessors, heads, sizes, documents, None) {
            Way::Two => {
                let HeadSpec { heads, kv_heads, .. } = heads;
                let tiles = sequence.div_ceil(sm90::BACKWARD_ROWS);
                let tile_scores = (sm90::BACKWARD_ROWS * sm90::BACKWARD_ROWS) as f64;
                let of_queries = |tile: usize| (tile + 1) as f64 * tile_scores;
                let group = (heads / kv_heads) as f64;
                let of_keys = |tile: usize| group * (tiles - tile) as f64 * tile_scores;
                let queries = busiest_of(multiprocessors, batch * heads, tiles, of_queries);
                let keys = busiest_of(multiprocessors, batch * kv_heads, tiles, of_keys);
                let products = 3.0 * queries + 4.0 * keys;
                Busiest { scores: queries + keys, products, kernels: 2 }
            }
            // The first one makes delta.
            Way::One(teams) => Busiest::of_five(teams.scores(), 2),
            Way::Short => Busiest::of_five(short::scores(multiprocessors, heads, sizes), 1),
        }
    }

    fn of_five(scores: f64, kernels: u64) -> Self {
        Busiest { scores, products: 5.0 * scores, kernels }
    }
}

/// The largest sum of a block that takes one item after the other, every second round of blocks in
/// the opposite order; all heads' largest tiles first, as if all fitted in the L2 cache together.
fn busiest_of(
    multiprocessors: usize,
    heads: usize,
    tiles: usize,
    scores: impl Fn(usize) -> f64,
) -> f64 {
    let mut of_tiles: Vec<f64> = (0..tiles).map(scores).collect();
    of_tiles.sort_by(|a, b| b.total_cmp(a));
    let mut blocks = vec![0.0; multiprocessors];
    let items = of_tiles.iter().flat_map(|&scores| std::iter::repeat_n(scores, heads));
    for (index, scores) in items.enumerate() {
        let (round, turn) = (index / multiprocessors, index % multiprocessors);
        let block = if round % 2 == 1 { multiprocessors - 1 - turn } else { turn };
        blocks[block] += scores;
    }
    blocks.into_iter().fold(0.0, f64::max)
}

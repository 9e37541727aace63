//! Which kernel makes a product, in how many splits and clusters: a model of the time of each, whose
//! constants stand in the tables of the families.

use std::fmt;

use super::{Epilogue, Layout, Output};
use crate::cuda::Family;

/// One kernel, and the tile of the result that a block of it makes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Variant {
    pub family: Family,
    pub layout: Layout,
    pub epilogue: Epilogue,
    pub kernel: &'static str,
    /// Of the tile; columns of N, for each of which there may be two factors in B.
    pub rows: usize,
    pub columns: usize,
    pub(super) halves_of_b: usize,
    /// Values of k in a stage, and stages of the ring, as the kernel is compiled.
    pub depth: usize,
    pub stages: usize,
    pub(super) threads: u32,
    pub dynamic_shared_bytes: usize,
    pub(super) speed: Speed,
}

/// What the choice of a tile reckons with. Estimates, as long as no GPU has timed them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Speed {
    /// Of a machine full of these tiles, relative to the family's fastest.
    pub(super) relative: f64,
    /// Values of k that could be multiplied while a tile is written.
    pub(super) epilogue: f64,
    /// Whether the next tile is multiplied meanwhile.
    pub(super) overlapped: bool,
    /// Values of k that could be multiplied while one split of a tile waits for another; `None`: K
    /// is not split.
    pub(super) turn: Option<f64>,
}

impl Speed {
    pub(super) const fn plain(relative: f64) -> Self {
        Speed { relative, epilogue: 0.0, overlapped: false, turn: None }
    }
}

/// A kernel, and how it is launched.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice {
    pub variant: &'static Variant,
    /// Blocks that share the K of a tile; 1: none.
    pub splits: usize,
    /// Blocks that load B's tiles for each other; 1: none.
    pub cluster: usize,
}

impl Choice {
    pub fn whole(variant: &'static Variant) -> Self {
        Choice { variant, splits: 1, cluster: 1 }
    }

    /// Whether a product [M,N,K] can be launched so on so many multiprocessors. Errors: why not.
    pub fn check(&self, sizes: [usize; 3], multiprocessors: usize) -> Result<(), String> {
        let &Choice { variant, splits, cluster } = self;
        let kernel = variant.kernel;
        if !variant.clusters().contains(&cluster) || cluster > multiprocessors {
            return Err(format!("{kernel} in clusters of {cluster}"));
        }
        let most = variant.most_splits(sizes, cluster, multiprocessors);
        match (1..=most).contains(&splits) {
            true => Ok(()),
            false => Err(format!("{splits} splits of {kernel}, of {most} at most")),
        }
    }

    /// The time that the choice reckons with, where the machine's fastest tile does so many FLOPs in
    /// a second on all multiprocessors: an estimate as long as no GPU has timed what it is made of.
    pub fn seconds(&self, sizes: [usize; 3], multiprocessors: usize, flops_per_second: f64) -> f64 {
        let products = self.variant.time(sizes, self, multiprocessors);
        2.0 * products * multiprocessors as f64 / flops_per_second
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Choice { variant, splits, cluster } = self;
        f.write_str(variant.kernel)?;
        if *cluster > 1 {
            write!(f, " by {cluster}")?;
        }
        if *splits > 1 { write!(f, " in {splits}") } else { Ok(()) }
    }
}

impl Variant {
    /// Of a result [M,N].
    pub fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.rows) * n.div_ceil(self.columns)
    }

    /// The same where so many blocks, one below the other, are a cluster: those beside the result
    /// count.
    pub(super) fn tiles_of_clusters(&self, m: usize, n: usize, cluster: usize) -> usize {
        m.div_ceil(cluster * self.rows) * cluster * n.div_ceil(self.columns)
    }

    /// Sizes of a cluster.
    pub fn clusters(&self) -> &'static [usize] {
        match self.family {
            Family::Sm90 => &[1, 2],
            Family::Sm80 | Family::F32 => &[1],
        }
    }

    /// The most splits that a product [M,N,K] has on so many multiprocessors: one block for each,
    /// none of them without a step.
    pub fn most_splits(
        &self,
        [m, n, k]: [usize; 3],
        cluster: usize,
        multiprocessors: usize,
    ) -> usize {
        let tiles = self.tiles_of_clusters(m, n, cluster);
        match self.speed.turn {
            Some(_) => (multiprocessors / tiles).min(k.div_ceil(self.depth)).max(1),
            None => 1,
        }
    }

    /// The time of the multiprocessor with the most tiles, in products of the fastest tile.
    fn time(&self, [m, n, k]: [usize; 3], choice: &Choice, multiprocessors: usize) -> f64 {
        let Speed { relative, epilogue, overlapped, turn } = self.speed;
        let &Choice { splits, cluster, .. } = choice;
        let tiles = self.tiles_of_clusters(m, n, cluster);
        let items = (tiles * splits).div_ceil(multiprocessors) as f64;
        let steps = k.div_ceil(self.depth).div_ceil(splits);
        let written = if overlapped { 1.0 } else { items };
        let depth = items * (steps * self.depth) as f64
            + written * epilogue
            + (splits - 1) as f64 * turn.unwrap_or(0.0);
        depth * (self.rows * self.columns * self.halves_of_b) as f64 / relative
    }

    /// Rows of A and of B that are multiplied.
    pub(super) fn tile(&self) -> [usize; 2] {
        [self.rows, self.columns * self.halves_of_b]
    }

    /// Whether it makes this of a product.
    pub(super) fn makes(&self, output: &Output) -> bool {
        let whole_heads = |head_dim| {
            ROTATED_HEAD_DIMS.contains(&head_dim) && self.columns.is_multiple_of(head_dim)
        };
        self.epilogue == output.epilogue()
            && match output {
                Output::Store { .. } | Output::Accumulate => true,
                Output::Rotate(rotation) => whole_heads(rotation.head_dim),
                Output::SwiGlu { .. } => self.layout == Layout::Nt,
                Output::SwiGluGradient { .. } => self.layout == Layout::Nn,
            }
    }
}

/// What makes a product [M,N,K] in the least time of the multiprocessor with the most tiles; `None`
/// where there are no variants. The first one of equals. Clusters are left to who has timed them.
pub fn choose(
    variants: impl Iterator<Item = &'static Variant>,
    sizes: [usize; 3],
    multiprocessors: usize,
) -> Option<Choice> {
    let all = variants.flat_map(|variant| {
        (1..=variant.most_splits(sizes, 1, multiprocessors))
            .map(move |splits| Choice { splits, ..Choice::whole(variant) })
    });
    let time = |it: &Choice| it.variant.time(sizes, it, multiprocessors);
    all.min_by(|a, b| time(a).total_cmp(&time(b)))
}

/// Those that the epilogues with rotary embedding are compiled for.
const ROTATED_HEAD_DIMS: [usize; 5] = [32, 48, 64, 96, 128];

//! Which kernel makes a product, in how many splits and clusters: a model of the time of each,
//! whose constants stand in the tables of the families.

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
    /// Values of k in a stage, and stages of the ring, as the kernel is compiled.
    pub depth: usize,
    pub stages: usize,
    pub(super) threads: u32,
    pub dynamic_shared_bytes: usize,
    pub(super) speed: Speed,
}

/// What the cost model of tiles takes for granted. Estimates, as long as no GPU has timed them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Speed {
    /// Of a machine full of these tiles, relative to the family's fastest.
    pub(super) relative: f64,
    /// Multiply-adds of the fastest tile in the time that one value of A or B takes from the L2
    /// cache to its multiprocessor, while all multiprocessors load; 0: it is part of `relative`.
    pub(super) loaded: f64,
    /// The time in which a tile is written, in values of k that could be multiplied meanwhile.
    pub(super) epilogue: f64,
    /// Whether the next tile is multiplied meanwhile.
    pub(super) overlapped: bool,
    /// The time that one split of a tile waits for another, in the same unit; `None`: K is not
    /// split.
    pub(super) turn: Option<f64>,
}

impl Speed {
    pub(super) const fn plain(relative: f64) -> Self {
        Speed { relative, loaded: 0.0, epilogue: 0.0, overlapped: false, turn: None }
    }
}

/// A kernel, and how it is launched.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice {
    pub variant: &'static Variant,
    /// Blocks that share the K of each tile of the last wave, where the tiles do not fill it; 1:
    /// none.
    pub splits: usize,
    /// Blocks, one below the other, that load B's tiles for each other; 1: none.
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

    /// The time that the cost model expects, of a product that moves so many bytes: an estimate as
    /// long as no GPU has timed what it is made of. Never less than memory needs for the bytes;
    /// every choice moves the same ones, so they choose nothing.
    pub fn seconds(
        &self,
        sizes: [usize; 3],
        bytes: u64,
        multiprocessors: usize,
        rates: Rates,
    ) -> f64 {
        let products = self.variant.time(sizes, self, multiprocessors);
        let multiplying = 2.0 * products * multiprocessors as f64 / rates.flops_per_second;
        multiplying.max(bytes as f64 / rates.bytes_per_second)
    }
}

/// What a machine does in a second.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rates {
    /// Of the fastest tile, on all multiprocessors.
    pub flops_per_second: f64,
    /// Of device memory, read and written together.
    pub bytes_per_second: f64,
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

    /// The most splits that a product [M,N,K] has on so many multiprocessors: in the last wave one
    /// block for each, none of them without a step.
    pub fn most_splits(
        &self,
        [m, n, k]: [usize; 3],
        cluster: usize,
        multiprocessors: usize,
    ) -> usize {
        let clusters = multiprocessors / cluster;
        let rest = self.tiles_of_clusters(m, n, cluster) / cluster % clusters;
        match self.speed.turn {
            Some(_) if rest > 0 => (clusters / rest).min(k.div_ceil(self.depth)).max(1),
            _ => 1,
        }
    }

    /// All clusters and splits that a product [M,N,K] has on so many multiprocessors.
    pub fn choices(
        &'static self,
        sizes: [usize; 3],
        multiprocessors: usize,
    ) -> impl Iterator<Item = Choice> {
        let clusters = self.clusters().iter().filter(move |&&cluster| cluster <= multiprocessors);
        clusters.flat_map(move |&cluster| {
            let splits = 1..=self.most_splits(sizes, cluster, multiprocessors);
            splits.map(move |splits| Choice { variant: self, splits, cluster })
        })
    }

    /// Tiles of the multiprocessor with the most of them, and steps of K that it goes through.
    pub fn longest(
        &self,
        [m, n, k]: [usize; 3],
        choice: &Choice,
        multiprocessors: usize,
    ) -> [usize; 2] {
        let &Choice { splits, cluster, .. } = choice;
        let (tiles, clusters) =
            (self.tiles_of_clusters(m, n, cluster) / cluster, multiprocessors / cluster);
        let (whole, rest) = (tiles / clusters, usize::from(!tiles.is_multiple_of(clusters)));
        let steps = k.div_ceil(self.depth);
        [whole + rest, whole * steps + rest * steps.div_ceil(splits)]
    }

    /// The time of the multiprocessor with the most tiles, in products of the fastest tile.
    fn time(&self, sizes: [usize; 3], choice: &Choice, multiprocessors: usize) -> f64 {
        let Speed { relative, loaded, epilogue, overlapped, turn } = self.speed;
        let &Choice { splits, cluster, .. } = choice;
        let [rows, columns] = self.tile().map(|size| size as f64);
        // For each value of k: what is multiplied, or what comes from the L2 cache meanwhile.
        let loading = (rows + columns / cluster as f64) * loaded;
        let depth_one = (rows * columns / relative).max(loading);
        let [tiles, steps] = self.longest(sizes, choice, multiprocessors);
        let written = if overlapped { 1.0 } else { tiles as f64 };
        let behind = written * epilogue + (splits - 1) as f64 * turn.unwrap_or(0.0);
        (steps * self.depth) as f64 * depth_one + behind * rows * columns
    }

    /// Rows of A and of B that are multiplied.
    pub fn tile(&self) -> [usize; 2] {
        [self.rows, self.columns * self.epilogue.halves_of_b(self.layout)]
    }

    /// Whether it makes this of a product.
    pub(super) fn makes(&self, output: &Output) -> bool {
        let whole_heads = |head_dim| {
            ROTATED_HEAD_DIMS.contains(&head_dim) && self.columns.is_multiple_of(head_dim)
        };
        self.epilogue == output.epilogue().compiled()
            && match output {
                Output::Store { .. } | Output::Accumulate => true,
                Output::Rotate(rotation) => whole_heads(rotation.head_dim),
                Output::SwiGlu { .. } => self.layout == Layout::Nt,
                Output::SwiGluGradient { .. } => self.layout == Layout::Nn,
            }
    }
}

/// What makes a product [M,N,K] in the least time of the multiprocessor with the most tiles; `None`
/// where there are no variants. The first one of equals, and of a variant the smallest cluster.
pub fn choose(
    variants: impl Iterator<Item = &'static Variant>,
    sizes: [usize; 3],
    multiprocessors: usize,
) -> Option<Choice> {
    let all = variants.flat_map(|variant| variant.choices(sizes, multiprocessors));
    let time = |it: &Choice| it.variant.time(sizes, it, multiprocessors);
    all.min_by(|a, b| time(a).total_cmp(&time(b)))
}

/// Those that the epilogues with rotary embedding are compiled for.
const ROTATED_HEAD_DIMS: [usize; 5] = [32, 48, 64, 96, 128];

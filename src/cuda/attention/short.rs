//! The kernels of kernels/attention_backward_short_sm90.cu: the whole backward pass of rows that
//! are so short that a block has a head to itself.

use super::maps::{self, BF16_BYTES, LOADED_ROWS, STORED_ROWS};
use super::{AttentionBackward, Passes, Sizes, scale, scale_log2};
use crate::backend::HeadSpec;
use crate::cuda::{Arguments, DevicePointer, Driver, KernelId, Launch};
use crate::error::Result;

/// Head dims with a kernel: those of which two tiles of d_k and d_v fit in a consumer's registers.
const HEAD_DIMS: [usize; 3] = [32, 48, 64];

/// As the kernel is compiled: rows of a tile, tiles of a head, and stages of queries.
const ROWS: usize = 64;
const MOST_TILES: usize = 4;
const STAGES: usize = 4;
const THREADS: u32 = 384;

/// Whether there is a kernel for such matrices.
pub(super) fn applies(heads: HeadSpec, sizes: Sizes) -> bool {
    HEAD_DIMS.contains(&heads.head_dim) && sizes.sequence <= MOST_TILES * ROWS
}

/// Of passes over such matrices, where nobody asked for `passes`: as it pays.
pub(super) fn chosen(
    multiprocessors: usize,
    heads: HeadSpec,
    sizes: Sizes,
    passes: Option<Passes>,
) -> bool {
    match passes {
        _ if !applies(heads, sizes) => false,
        Some(passes) => passes == Passes::Short,
        None => pays(multiprocessors, heads, sizes),
    }
}

/// Estimated, as long as no GPU has timed it, by what is read and written, in matrices of a query
/// head: 8 against 12 in two passes, each of which has items of 128 rows to deal. So it is where a
/// group makes heads of k and v few that it does not pay.
fn pays(multiprocessors: usize, HeadSpec { heads, kv_heads, .. }: HeadSpec, sizes: Sizes) -> bool {
    let (group, units) = (heads / kv_heads, sizes.batch * kv_heads);
    let items = sizes.sequence.div_ceil(2 * ROWS);
    let short = 8 * items * group * units.div_ceil(multiprocessors);
    let of_queries = (units * group * items).div_ceil(multiprocessors);
    let of_keys = group * (units * items).div_ceil(multiprocessors);
    short <= 6 * (of_queries + of_keys)
}

/// Of the block that has the most heads.
pub(super) fn scores(multiprocessors: usize, heads: HeadSpec, sizes: Sizes) -> f64 {
    let (group, units) = (heads.heads / heads.kv_heads, sizes.batch * heads.kv_heads);
    let tiles = sizes.sequence.div_ceil(ROWS);
    let of_a_head = tiles * (tiles + 1) / 2 * ROWS * ROWS;
    (units.div_ceil(multiprocessors) * group * of_a_head) as f64
}

#[derive(Clone, Debug)]
pub(super) struct Kernels {
    heads: HeadSpec,
    backward: KernelId,
}

impl Kernels {
    /// `None`: no kernel for this head dim. Errors: a build without it.
    pub fn new(driver: &mut dyn Driver, heads: HeadSpec) -> Result<Option<Self>> {
        let head_dim = heads.head_dim;
        if !HEAD_DIMS.contains(&head_dim) {
            return Ok(None);
        }
        let rows = MOST_TILES * ROWS;
        let backward =
            driver.kernel(&format!("attention_backward_short_sm90_{rows}x{head_dim}"))?;
        Ok(Some(Kernels { heads, backward }))
    }

    /// Errors: matrices that leave their buffers.
    pub fn backward(
        &self,
        driver: &mut dyn Driver,
        sizes: Sizes,
        pass: &AttentionBackward,
    ) -> Result<(Launch, Arguments)> {
        let AttentionBackward { forward, d_out, delta, d_qkv, angles } = *pass;
        let HeadSpec { heads, kv_heads, head_dim } = self.heads;
        let null = DevicePointer::NULL;
        let [table, positions] = angles.map_or([null; 2], |it| [it.table, it.positions]);
        let mut map =
            |address, heads, rows| maps::map(driver, address, head_dim, heads, sizes, rows);
        let qkv_heads = heads + 2 * kv_heads;
        let units = sizes.batch * kv_heads;
        let arguments = Arguments::new()
            .with(map(forward.qkv, qkv_heads, LOADED_ROWS)?)
            .with(map(d_out, heads, LOADED_ROWS)?)
            .with(map(forward.out, heads, LOADED_ROWS)?)
            .with(map(d_qkv, qkv_heads, STORED_ROWS)?)
            .with(forward.document_starts.unwrap_or_default())
            .with(table)
            .with(positions)
            .with(forward.log_sum_exp)
            .with(delta)
            .with(sizes.sequence as i32)
            .with(heads as i32)
            .with(kv_heads as i32)
            .with((heads / kv_heads) as i32)
            .with(units as i32)
            .with(sizes.sequence.div_ceil(ROWS) as i32)
            .with(scale(self.heads) as f32)
            .with(scale_log2(self.heads) as f32);
        // Keys and values; stages of queries, d_out and out; dS of two steps.
        let tile_bytes = ROWS * head_dim * BF16_BYTES;
        let shared_bytes =
            (2 * MOST_TILES + 3 * STAGES) * tile_bytes + 2 * MOST_TILES * ROWS * ROWS * BF16_BYTES;
        let blocks = units.min(driver.properties().multiprocessors as usize);
        let launch = Launch::new(self.backward, [blocks as u32, 1, 1], [THREADS, 1, 1])
            .shared_bytes(shared_bytes as u32);
        Ok((launch, arguments))
    }
}

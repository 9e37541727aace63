//! The kernels of kernels/attention_sm90.cu: bf16 with wgmma and TMA on compute capability 9.0. As
//! many blocks as there are multiprocessors, each of which takes item after item: a tile of a head's
//! rows.

use super::{AttentionBackward, AttentionForward, Sizes, scale_log2, tiled};
use crate::backend::HeadSpec;
use crate::config::Dtype;
use crate::cuda::{
    Arguments, DevicePointer, Driver, Fill, KernelId, L2Promotion, Launch, Swizzle, TensorMap,
    TensorMapSpec, TensorType,
};
use crate::error::Result;

const THREADS: u32 = 384;
/// Of a result, in an item.
const ROWS: usize = 128;
/// Of a block of a tile, and of every box.
const COLUMNS: usize = 64;
const BF16_BYTES: usize = 2;
/// Of the boxes of TMA.
const LOADED_ROWS: u32 = 64;
const STORED_ROWS: u32 = 16;

const FORWARD_KEYS: usize = 128;

#[derive(Clone, Debug)]
pub(super) struct Kernels {
    heads: HeadSpec,
    forward: KernelId,
    backward: tiled::Kernels,
}

impl Kernels {
    /// Errors: a build without them.
    pub fn new(driver: &mut dyn Driver, heads: HeadSpec) -> Result<Self> {
        let mut kernel =
            |pass: &str| driver.kernel(&format!("attention_{pass}_sm90_{}", heads.head_dim));
        let forward = kernel("forward")?;
        Ok(Kernels { heads, forward, backward: tiled::Kernels::new(driver, Dtype::Bf16, heads)? })
    }

    /// Bytes of a tile: blocks of 64 columns, the last of them as wide as the others.
    fn tile_bytes(&self, rows: usize) -> usize {
        self.heads.head_dim.div_ceil(COLUMNS) * COLUMNS * rows * BF16_BYTES
    }

    /// Errors: matrices that leave their buffers.
    pub fn forward(
        &self,
        driver: &mut dyn Driver,
        sizes: Sizes,
        pass: &AttentionForward,
    ) -> Result<(Launch, Arguments)> {
        let HeadSpec { heads, kv_heads, head_dim } = self.heads;
        let stages = if head_dim <= 64 { 4 } else { 2 };
        let shared_bytes = 2 * self.tile_bytes(ROWS) + 2 * stages * self.tile_bytes(FORWARD_KEYS);
        let qkv = self.map(driver, pass.qkv, heads + 2 * kv_heads, sizes, LOADED_ROWS)?;
        let out = self.map(driver, pass.out, heads, sizes, STORED_ROWS)?;
        let maps = Arguments::new().with(qkv).with(out);
        let arguments = maps.with(pass.document_starts.unwrap_or_default()).with(pass.log_sum_exp);
        let section = self.section(driver, sizes, 1, heads / kv_heads, heads);
        let arguments = self.sized(arguments, sizes, section).with(scale_log2(self.heads) as f32);
        Ok((self.launch(driver, self.forward, heads, sizes, shared_bytes), arguments))
    }

    /// Errors: as [`Kernels::forward`].
    pub fn backward(
        &self,
        _: &mut dyn Driver,
        sizes: Sizes,
        pass: &AttentionBackward,
    ) -> Result<[(Launch, Arguments); 2]> {
        Ok(self.backward.backward(sizes, pass))
    }

    /// How many heads of the result are walked together: as many as read, from matrices of `reads`
    /// heads for each `sharing` of the result's, what half of the L2 cache holds; of a sequence's
    /// `heads`.
    fn section(
        &self,
        driver: &dyn Driver,
        Sizes { batch, sequence }: Sizes,
        reads: usize,
        sharing: usize,
        heads: usize,
    ) -> usize {
        let bytes = 2 * reads * sequence * self.heads.head_dim * BF16_BYTES;
        let groups = (driver.properties().l2_bytes as usize / 2 / bytes).max(1);
        (groups * sharing).min(batch * heads)
    }

    fn sized(
        &self,
        arguments: Arguments,
        Sizes { batch, sequence }: Sizes,
        section: usize,
    ) -> Arguments {
        arguments
            .with(batch as i32)
            .with(sequence as i32)
            .with(self.heads.heads as i32)
            .with(self.heads.kv_heads as i32)
            .with(section as i32)
    }

    fn launch(
        &self,
        driver: &dyn Driver,
        kernel: KernelId,
        heads: usize,
        Sizes { batch, sequence }: Sizes,
        shared_bytes: usize,
    ) -> Launch {
        let items = batch * heads * sequence.div_ceil(ROWS);
        let blocks = items.min(driver.properties().multiprocessors as usize);
        let grid = [blocks as u32, 1, 1];
        Launch::new(kernel, grid, [THREADS, 1, 1]).shared_bytes(shared_bytes as u32)
    }

    /// A matrix of tokens, each with so many heads. A box is rows of one head of one sequence.
    fn map(
        &self,
        driver: &mut dyn Driver,
        address: DevicePointer,
        heads: usize,
        Sizes { batch, sequence }: Sizes,
        box_rows: u32,
    ) -> Result<TensorMap> {
        let head_dim = self.heads.head_dim;
        let head_bytes = (head_dim * BF16_BYTES) as u64;
        let token_bytes = heads as u64 * head_bytes;
        driver.tensor_map(&TensorMapSpec {
            data_type: TensorType::Bf16,
            address,
            dimensions: &[head_dim, heads, sequence, batch].map(|it| it as u64),
            stride_bytes: &[head_bytes, token_bytes, sequence as u64 * token_bytes],
            box_dimensions: &[COLUMNS as u32, 1, box_rows, 1],
            swizzle: Swizzle::Bytes128,
            l2_promotion: L2Promotion::Bytes256,
            fill: Fill::Zeros,
        })
    }
}

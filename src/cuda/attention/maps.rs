//! How Hopper's kernels see matrices of tokens: tensor maps, and the boxes that they move.

use super::Sizes;
use crate::cuda::{
    DevicePointer, Driver, Fill, L2Promotion, Swizzle, TensorMap, TensorMapSpec, TensorType,
};
use crate::error::Result;

pub(super) const BF16_BYTES: usize = 2;
/// Of the boxes of TMA.
pub(super) const LOADED_ROWS: u32 = 64;
pub(super) const STORED_ROWS: u32 = 16;

/// A matrix of tokens, each with so many heads. A box is rows of one head of one sequence.
///
/// Errors: a matrix that leaves its buffer.
pub(super) fn map(
    driver: &mut dyn Driver,
    address: DevicePointer,
    head_dim: usize,
    heads: usize,
    Sizes { batch, sequence }: Sizes,
    box_rows: u32,
) -> Result<TensorMap> {
    let head_bytes = (head_dim * BF16_BYTES) as u64;
    let token_bytes = heads as u64 * head_bytes;
    // The widest span that divides a row.
    let spans = [Swizzle::Bytes128, Swizzle::Bytes64, Swizzle::Bytes32];
    let spans = spans.map(|swizzle| (swizzle, swizzle.span_bytes().unwrap_or(head_bytes)));
    let (swizzle, span) = spans
        .into_iter()
        .find(|(_, span)| head_bytes.is_multiple_of(*span))
        .expect("head dims are multiples of 16");
    driver.tensor_map(&TensorMapSpec {
        data_type: TensorType::Bf16,
        address,
        dimensions: &[head_dim, heads, sequence, batch].map(|it| it as u64),
        stride_bytes: &[head_bytes, token_bytes, sequence as u64 * token_bytes],
        box_dimensions: &[span as u32 / BF16_BYTES as u32, 1, box_rows, 1],
        swizzle,
        l2_promotion: L2Promotion::Bytes256,
        fill: Fill::Zeros,
    })
}

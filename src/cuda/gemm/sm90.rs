//! The kernels of kernels/gemm_sm90.cu: bf16 with wgmma and TMA on compute capability 9.0, for the
//! layout NT. As many blocks as there are multiprocessors, each of which takes tile after tile.

use super::{Family, Layout, Output, Product, Variant};
use crate::cuda::{
    Arguments, DevicePointer, Driver, Swizzle, TensorMap, TensorMapSpec, TensorType,
};
use crate::error::Result;

const ROWS: usize = 128;
/// Of the ring's stages, and of the boxes that are stored.
const DEPTH: usize = 64;
const STORE_BOX: [u32; 2] = [64, 64];
const STORE_TILES_BYTES: usize = 2 * 2 * 64 * 64 * BF16_BYTES;
const BF16_BYTES: usize = 2;

pub(super) const VARIANTS: [Variant; 2] = [
    variant("gemm_sm90_128x256", 256, 4, 1.0),
    // A stage of 128 columns brings 4/3 as many bytes for each product.
    variant("gemm_sm90_128x128", 128, 6, 0.75),
];

const fn variant(
    kernel: &'static str,
    columns: usize,
    stages: usize,
    relative_speed: f64,
) -> Variant {
    let stage_bytes = (ROWS + columns) * DEPTH * BF16_BYTES;
    Variant {
        family: Family::Sm90,
        layout: Layout::Nt,
        kernel,
        rows: ROWS,
        columns,
        depth: DEPTH,
        stages,
        threads: 384,
        dynamic_shared_bytes: stages * stage_bytes + STORE_TILES_BYTES,
        relative_speed,
    }
}

/// Of a product that was checked. Errors: matrices that leave their buffers.
pub(super) fn arguments(
    driver: &mut dyn Driver,
    variant: &Variant,
    product: &Product,
) -> Result<Arguments> {
    let &Product { m, n, k, a, b, out, output, .. } = product;
    let addend = match output {
        Output::Store { addend } => addend.unwrap_or_default(),
        Output::Accumulate => DevicePointer::NULL, // not an output of NT
    };
    let depth = DEPTH as u32;
    let map_a = matrix(driver, a, [k, m], [depth, ROWS as u32])?;
    let map_b = matrix(driver, b, [k, n], [depth, variant.columns as u32])?;
    let map_out = matrix(driver, out, [n, m], STORE_BOX)?;
    let maps = Arguments::new().with(map_a).with(map_b).with(map_out);
    Ok(maps.with(addend).with(m as i32).with(n as i32).with(k as i32))
}

/// A bf16 matrix [rows, columns] and its boxes; both innermost first, as TMA counts.
fn matrix(
    driver: &mut dyn Driver,
    address: DevicePointer,
    dimensions: [usize; 2],
    box_dimensions: [u32; 2],
) -> Result<TensorMap> {
    let row_bytes = [(dimensions[0] * BF16_BYTES) as u64];
    driver.tensor_map(&TensorMapSpec::matrix(
        TensorType::Bf16,
        address,
        &dimensions.map(|size| size as u64),
        &row_bytes,
        &box_dimensions,
        Swizzle::Bytes128,
    ))
}

//! The kernels of kernels/gemm_sm90.cu: bf16 with wgmma and TMA on compute capability 9.0. As many
//! blocks as there are multiprocessors, each of which takes tile after tile; or, where K is split,
//! one for each split of each tile.

use super::{Choice, Family, Layout, Output, Product, Speed, Variant};
use crate::cuda::{
    Arguments, DevicePointer, Driver, Swizzle, TensorMap, TensorMapSpec, TensorType,
};
use crate::error::Result;

const ROWS: usize = 128;
/// Of the ring's stages, and columns of every box.
const DEPTH: usize = 64;
const STORE_TILES_BYTES: usize = 2 * 2 * 64 * 64 * BF16_BYTES;
const BF16_BYTES: usize = 2;

/// Reckoned for an H200 whose multiprocessors each multiply 128 x 256 x 64 in 0.7 us (80% of the
/// peak) and move 42 bytes a nanosecond to and from the L2 cache, all at once, or 110 alone: 64 KiB
/// of bf16 are written in 1.6 us, 256 KiB of fp32 read and written in 6.2 us, or 2.4 us alone.
const STORE_EPILOGUE: f64 = 143.0;
const ADD_EPILOGUE: f64 = 570.0;
const ADD_TURN: f64 = 220.0;

pub(super) const VARIANTS: [Variant; 9] = [
    shared(Layout::Nt, "gemm_sm90_nt_128x256", 256, 4),
    shared(Layout::Nt, "gemm_sm90_nt_128x192", 192, 4),
    in_turn(Layout::Nt, "gemm_sm90_nt_128x128", 6),
    shared(Layout::Nn, "gemm_sm90_nn_128x256", 256, 4),
    shared(Layout::Nn, "gemm_sm90_nn_128x192", 192, 4),
    in_turn(Layout::Nn, "gemm_sm90_nn_128x128", 6),
    shared(Layout::Tn, "gemm_sm90_tn_128x256", 256, 4),
    shared(Layout::Tn, "gemm_sm90_tn_128x192", 192, 5),
    in_turn(Layout::Tn, "gemm_sm90_tn_128x128", 7),
];

/// Two consumers work on each tile.
const fn shared(layout: Layout, kernel: &'static str, columns: usize, stages: usize) -> Variant {
    // Fewer columns bring more bytes for each product.
    let relative = if columns == 256 { 1.0 } else { 0.95 };
    variant(layout, kernel, columns, stages, relative, false)
}

/// Two consumers take tiles in turn.
const fn in_turn(layout: Layout, kernel: &'static str, stages: usize) -> Variant {
    variant(layout, kernel, 128, stages, 0.75, true)
}

const fn variant(
    layout: Layout,
    kernel: &'static str,
    columns: usize,
    stages: usize,
    relative: f64,
    overlapped: bool,
) -> Variant {
    let stage_bytes = (ROWS + columns) * DEPTH * BF16_BYTES;
    let (store_tiles_bytes, epilogue, turn) = match layout {
        Layout::Nt | Layout::Nn => (STORE_TILES_BYTES, STORE_EPILOGUE, None),
        Layout::Tn => (0, ADD_EPILOGUE, Some(ADD_TURN)),
    };
    Variant {
        family: Family::Sm90,
        layout,
        kernel,
        rows: ROWS,
        columns,
        depth: DEPTH,
        stages,
        threads: 384,
        dynamic_shared_bytes: stages * stage_bytes + store_tiles_bytes,
        speed: Speed { relative, epilogue, overlapped, turn },
    }
}

/// Of a product that was checked. Errors: matrices that leave their buffers.
pub(super) fn arguments(
    driver: &mut dyn Driver,
    Choice { variant, splits }: Choice,
    product: &Product,
    turns: DevicePointer,
) -> Result<Arguments> {
    let &Product { layout, m, n, k, a, b, out, output } = product;
    let map_a = match layout {
        Layout::Nt | Layout::Nn => along_k(driver, a, [k, m], ROWS)?,
        Layout::Tn => across_k(driver, a, [m, k])?,
    };
    let map_b = match layout {
        Layout::Nt => along_k(driver, b, [k, n], variant.columns)?,
        Layout::Nn | Layout::Tn => across_k(driver, b, [n, k])?,
    };
    let maps = Arguments::new().with(map_a).with(map_b);
    let outputs = match output {
        Output::Store { addend } => {
            maps.with(across_k(driver, out, [n, m])?).with(addend.unwrap_or_default())
        }
        Output::Accumulate => maps.with(out).with(turns),
    };
    let sized = outputs.with(m as i32).with(n as i32).with(k as i32);
    Ok(match output {
        Output::Store { .. } => sized,
        Output::Accumulate => sized.with(splits as i32),
    })
}

/// A factor [rows, K], of whose rows a box holds as many as the tile has.
fn along_k(
    driver: &mut dyn Driver,
    address: DevicePointer,
    dimensions: [usize; 2],
    tile: usize,
) -> Result<TensorMap> {
    matrix(driver, address, dimensions, [DEPTH as u32, tile as u32])
}

/// A matrix in boxes of 64 x 64: a factor [K, columns], or the result.
fn across_k(
    driver: &mut dyn Driver,
    address: DevicePointer,
    dimensions: [usize; 2],
) -> Result<TensorMap> {
    matrix(driver, address, dimensions, [DEPTH as u32; 2])
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

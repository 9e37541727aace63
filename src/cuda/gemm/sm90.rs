//! The kernels of kernels/gemm_sm90.cu: bf16 with wgmma and TMA on compute capability 9.0. As many
//! blocks as there are multiprocessors, each of which takes tile after tile; where the last tiles
//! are fewer than the blocks, several may share the K of one.

use super::{Choice, Epilogue, Layout, Output, Product, Rotation, Speed, Variant};
use crate::cuda::{
    Arguments, DevicePointer, Driver, Family, Fill, L2Promotion, Swizzle, TensorMap, TensorMapSpec,
    TensorType,
};
use crate::error::Result;

const ROWS: usize = 128;
/// Of the ring's stages, and columns of every box that is loaded.
const DEPTH: usize = 64;
/// Two for each consumer, of 64 columns.
const STORE_TILES_BYTES: usize = 2 * 2 * 64 * 64 * BF16_BYTES;
const BF16_BYTES: usize = 2;

/// Estimated for an H200 whose multiprocessors each multiply 128 x 256 x 64 in 0.7 us (80% of the
/// peak), load 65 bytes a nanosecond from the L2 cache, all at once (9.8 TB/s are reported at a
/// clock of 1.98 GHz, here it is 1.755), and move 42 to and fro, or 110 alone: 64 KiB of bf16 are
/// written in 1.6 us; 128 KiB of fp32, which the cache reads and writes, are added to in 6.2 us, or
/// 2.4 us alone.
const LOADED: f64 = (128.0 * 256.0 * 64.0 / 700.0) / (65.0 / 2.0);
const STORE_EPILOGUE: f64 = 143.0;
const ADD_EPILOGUE: f64 = 570.0;
const ADD_TURN: f64 = 220.0;

pub(super) const VARIANTS: [Variant; 18] = [
    shared(Layout::Nt, PLAIN, "gemm_sm90_nt_128x256", 4),
    in_turn(Layout::Nt, PLAIN, "gemm_sm90_nt_128x192", 192, 4),
    in_turn(Layout::Nt, PLAIN, "gemm_sm90_nt_128x128", 128, 6),
    shared(Layout::Nn, PLAIN, "gemm_sm90_nn_128x256", 4),
    in_turn(Layout::Nn, PLAIN, "gemm_sm90_nn_128x192", 192, 4),
    in_turn(Layout::Nn, PLAIN, "gemm_sm90_nn_128x128", 128, 6),
    shared(Layout::Tn, PLAIN, "gemm_sm90_tn_128x256", 4),
    in_turn(Layout::Tn, PLAIN, "gemm_sm90_tn_128x192", 192, 5),
    in_turn(Layout::Tn, PLAIN, "gemm_sm90_tn_128x128", 128, 7),
    shared(Layout::Nt, Epilogue::Rotary, "gemm_sm90_nt_rotary_128x256", 4),
    in_turn(Layout::Nt, Epilogue::Rotary, "gemm_sm90_nt_rotary_128x192", 192, 4),
    in_turn(Layout::Nt, Epilogue::Rotary, "gemm_sm90_nt_rotary_128x128", 128, 6),
    shared(Layout::Nt, Epilogue::SwiGlu, "gemm_sm90_nt_swiglu_128x256", 4),
    in_turn(Layout::Nt, Epilogue::SwiGlu, "gemm_sm90_nt_swiglu_128x192", 192, 4),
    in_turn(Layout::Nt, Epilogue::SwiGlu, "gemm_sm90_nt_swiglu_128x128", 128, 6),
    shared(Layout::Nn, Epilogue::SwiGlu, "gemm_sm90_nn_swiglu_128x256", 3),
    in_turn(Layout::Nn, Epilogue::SwiGlu, "gemm_sm90_nn_swiglu_128x192", 192, 4),
    in_turn(Layout::Nn, Epilogue::SwiGlu, "gemm_sm90_nn_swiglu_128x128", 128, 5),
];
const PLAIN: Epilogue = Epilogue::Plain;

/// Two consumers work on each tile, of 256 rows of B.
const fn shared(
    layout: Layout,
    epilogue: Epilogue,
    kernel: &'static str,
    stages: usize,
) -> Variant {
    variant(layout, epilogue, kernel, 256, stages, 1.0, false)
}

/// Two consumers take tiles in turn, of `width` rows of B. The fewer, the more bytes of shared
/// memory a product reads: 138 and 160 a clock at full speed, of 128.
const fn in_turn(
    layout: Layout,
    epilogue: Epilogue,
    kernel: &'static str,
    width: usize,
    stages: usize,
) -> Variant {
    let relative = if width == 192 { 0.93 } else { 0.80 };
    variant(layout, epilogue, kernel, width, stages, relative, true)
}

/// `width`: rows of B's tile.
const fn variant(
    layout: Layout,
    epilogue: Epilogue,
    kernel: &'static str,
    width: usize,
    stages: usize,
    relative: f64,
    overlapped: bool,
) -> Variant {
    let stage_bytes = (ROWS + width) * DEPTH * BF16_BYTES;
    let (store_tiles_bytes, written, turn) = match (layout, epilogue) {
        // A buffer holds gate and up.
        (Layout::Nn, Epilogue::SwiGlu) => (2 * STORE_TILES_BYTES, STORE_EPILOGUE, None),
        // 32 columns of gate, of up and of the product are those of one and a half.
        (Layout::Nt, Epilogue::SwiGlu) if stored_columns(width / 2) == 32 => {
            (3 * STORE_TILES_BYTES / 2, STORE_EPILOGUE, None)
        }
        (Layout::Nt | Layout::Nn, _) => (STORE_TILES_BYTES, STORE_EPILOGUE, None),
        (Layout::Tn, _) => (0, ADD_EPILOGUE, Some(ADD_TURN)),
    };
    // Bytes that the epilogue moves, relative to a plain one: gate, up and product are 1.5; of the
    // gradient, two are written, and of the two that are read half are there before. Heads of 64
    // read half as many bytes of angles as a tile of 256 columns writes. An addend, of which half
    // is there before, would be 0.5 more; it is left out, so that it does not change which tile is
    // chosen.
    let bytes = match (epilogue, layout) {
        (Epilogue::SwiGlu, Layout::Nt) | (Epilogue::Rotary, _) => 1.5,
        (Epilogue::SwiGlu, _) => 3.0,
        (Epilogue::Plain | Epilogue::Addend, _) => 1.0,
    };
    Variant {
        family: Family::Sm90,
        layout,
        epilogue,
        kernel,
        rows: ROWS,
        columns: width / epilogue.halves_of_b(layout),
        depth: DEPTH,
        stages,
        threads: 384,
        dynamic_shared_bytes: stages * stage_bytes + store_tiles_bytes,
        speed: Speed { relative, loaded: LOADED, epilogue: written * bytes, overlapped, turn },
    }
}

/// Of a box in which a tile of so many columns is stored.
const fn stored_columns(columns: usize) -> usize {
    if columns.is_multiple_of(64) { 64 } else { 32 }
}

/// Of a product that was checked. Errors: matrices that leave their buffers.
pub(super) fn arguments(
    driver: &mut dyn Driver,
    Choice { variant, splits, cluster }: Choice,
    product: &Product,
    semaphores: DevicePointer,
) -> Result<Arguments> {
    let &Product { layout, m, n, k, a, b, out, output } = product;
    let map_a = match layout {
        Layout::Nt | Layout::Nn => along_k(driver, a, [k, m], ROWS)?,
        Layout::Tn => across_k(driver, a, [m, k])?,
    };
    let map_b = match (layout, output) {
        (Layout::Nt, Output::SwiGlu { .. }) => {
            let row_bytes = [k, n * k].map(|elements| (elements * BF16_BYTES) as u64);
            let boxes = [DEPTH as u32, variant.columns as u32, 1];
            halves(driver, b, [k, n, 2], row_bytes, boxes)?
        }
        // Each block of a cluster loads its part.
        (Layout::Nt, _) => along_k(driver, b, [k, n], variant.columns / cluster)?,
        (Layout::Nn | Layout::Tn, _) => across_k(driver, b, [n, k])?,
    };
    // Gate and up, side by side in each row.
    let side_by_side = |driver: &mut dyn Driver, address, columns: usize| {
        let row_bytes = [n, 2 * n].map(|elements| (elements * BF16_BYTES) as u64);
        halves(driver, address, [n, 2, m], row_bytes, [columns as u32, 1, 64])
    };
    let (m_n_k, arguments) =
        ([m, n, k].map(|size| size as i32), Arguments::new().with(map_a).with(map_b));
    let sized = |arguments: Arguments| m_n_k.into_iter().fold(arguments, Arguments::with);
    Ok(match output {
        Output::Store { addend } => {
            let map_out = across_k(driver, out, [n, m])?;
            let map_addend = across_k(driver, addend.unwrap_or(out), [n, m])?;
            sized(arguments.with(map_out).with(map_addend)).with(i32::from(addend.is_some()))
        }
        Output::Accumulate => sized(arguments.with(out).with(semaphores)).with(splits as i32),
        Output::Rotate(Rotation { table, positions, columns, head_dim }) => {
            let map_out = across_k(driver, out, [n, m])?;
            sized(arguments.with(map_out).with(table).with(positions))
                .with(columns as i32)
                .with(head_dim as i32)
        }
        Output::SwiGlu { product } => {
            let columns = stored_columns(variant.columns);
            let map_out = side_by_side(driver, out, columns)?;
            let map_product = matrix(driver, product, [n, m], [columns as u32, 64])?;
            sized(arguments.with(map_out).with(map_product))
        }
        Output::SwiGluGradient { gate_up } => {
            let map_out = side_by_side(driver, out, 64)?;
            let map_gates = side_by_side(driver, gate_up, 64)?;
            sized(arguments.with(map_out).with(map_gates))
        }
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
        swizzle(box_dimensions[0]),
    ))
}

/// Two bf16 matrices that interleave in memory, in boxes of one of them; as [`matrix`].
fn halves(
    driver: &mut dyn Driver,
    address: DevicePointer,
    dimensions: [usize; 3],
    stride_bytes: [u64; 2],
    box_dimensions: [u32; 3],
) -> Result<TensorMap> {
    driver.tensor_map(&TensorMapSpec {
        data_type: TensorType::Bf16,
        address,
        dimensions: &dimensions.map(|size| size as u64),
        stride_bytes: &stride_bytes,
        box_dimensions: &box_dimensions,
        swizzle: swizzle(box_dimensions[0]),
        l2_promotion: L2Promotion::Bytes256,
        fill: Fill::Zeros,
    })
}

/// As wide as a box's rows.
fn swizzle(columns: u32) -> Swizzle {
    if columns == 32 { Swizzle::Bytes64 } else { Swizzle::Bytes128 }
}

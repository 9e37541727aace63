//! The kernels of kernels/gemm_sm80.cu: bf16 with mma.sync, from compute capability 8.0 on. One
//! block for each tile.

use super::{Epilogue, Layout, Speed, Variant};
use crate::cuda::Family;

const DEPTH: usize = 32;
const STAGES: usize = 4;
const THREADS: u32 = 128;
const BF16_BYTES: usize = 2;

pub(super) const VARIANTS: [Variant; 6] = [
    large(Layout::Nt, "gemm_sm80_nt_128x128"),
    large(Layout::Nn, "gemm_sm80_nn_128x128"),
    large(Layout::Tn, "gemm_sm80_tn_128x128"),
    small(Layout::Nt, "gemm_sm80_nt_64x64"),
    small(Layout::Nn, "gemm_sm80_nn_64x64"),
    small(Layout::Tn, "gemm_sm80_tn_64x64"),
];

const fn large(layout: Layout, kernel: &'static str) -> Variant {
    variant(layout, kernel, 128, 1.0)
}

/// Brings twice as many bytes for each product.
const fn small(layout: Layout, kernel: &'static str) -> Variant {
    variant(layout, kernel, 64, 0.6)
}

const fn variant(
    layout: Layout,
    kernel: &'static str,
    side: usize,
    relative_speed: f64,
) -> Variant {
    Variant {
        family: Family::Sm80,
        layout,
        epilogue: Epilogue::Plain,
        kernel,
        rows: side,
        columns: side,
        depth: DEPTH,
        stages: STAGES,
        threads: THREADS,
        dynamic_shared_bytes: STAGES * 2 * side * DEPTH * BF16_BYTES,
        speed: Speed::plain(relative_speed),
    }
}

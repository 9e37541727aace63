//! The kernels of kernels/gemm_f32.cu: fp32 without tensor cores. One block for each tile.

use super::{Epilogue, Layout, Speed, Variant};
use crate::cuda::Family;

pub(super) const VARIANTS: [Variant; 3] = [
    variant(Layout::Nt, "gemm_f32_nt_64x64"),
    variant(Layout::Nn, "gemm_f32_nn_64x64"),
    variant(Layout::Tn, "gemm_f32_tn_64x64"),
];

const fn variant(layout: Layout, kernel: &'static str) -> Variant {
    Variant {
        family: Family::F32,
        layout,
        epilogue: Epilogue::Plain,
        kernel,
        rows: 64,
        columns: 64,
        depth: 32,
        stages: 2,
        threads: 64,
        dynamic_shared_bytes: 0,
        speed: Speed::plain(1.0),
    }
}

//! Operands of a product on a device.

use super::timing::Buffers;
use crate::config::Dtype;
use crate::cuda::gemm::Epilogue;
use crate::error::Result;
use crate::predict::cost::element_bytes;
use crate::predict::product::{Addresses, Operands, StepProduct};

impl StepProduct {
    /// Operands of its own, random normals where they are read.
    pub(super) fn allocate(&self, buffers: &mut Buffers, dtype: Dtype) -> Result<Addresses> {
        let Operands { a, b, read, out, product } = self.operands();
        let mut at = Addresses {
            a: buffers.normals("A", dtype, a)?,
            b: buffers.normals("B", dtype, b)?,
            out: buffers.zeros("out", out as u64 * self.out_element(dtype))?,
            ..Addresses::NOWHERE
        };
        if read > 0 {
            at.read = buffers.normals("read beside A and B", dtype, read)?;
        }
        if product > 0 {
            at.product = buffers.zeros("product", product as u64 * element_bytes(dtype))?;
        }
        if self.epilogue == Epilogue::Rotary {
            // Numbers that are no sines take as long.
            let angles = self.positions() * self.heads.head_dim;
            at.table = buffers.normals("table", Dtype::F32, angles)?;
            at.positions = buffers.counting("positions", self.positions(), self.m)?;
        }
        Ok(at)
    }
}

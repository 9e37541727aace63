//! The output projection and its loss, in chunks of rows: logits, and then their gradient in their
//! place.

use super::layers::LossSize;
use super::{Cuda, STREAM};
use crate::backend::CrossEntropyForward;
use crate::cuda::gemm::{Layout, Output, Product};
use crate::cuda::loss::{LossBackward, LossForward};
use crate::error::Result;
use crate::tensor::View;

impl Cuda {
    /// Logits [rows,V] of a chunk that begins at `first` of inp [T,C].
    fn logits(&mut self, first: usize, rows: usize, op: &CrossEntropyForward) -> Result<()> {
        let CrossEntropyForward { inp, weight, logits, .. } = *op;
        let [v, c] = [weight.shape.rows(), weight.shape.columns()];
        self.multiply(Product {
            layout: Layout::Nt,
            m: rows,
            n: v,
            k: c,
            a: self.row(inp, first),
            b: self.address(weight),
            out: self.address(logits),
            output: Output::Store { addend: None },
        })
    }

    /// Runs over all tokens in chunks; `gradients`: (scale, d_inp, d_weight).
    pub(super) fn cross_entropy(
        &mut self,
        op: CrossEntropyForward,
        gradients: Option<(View, View, View)>,
    ) -> Result<()> {
        let CrossEntropyForward { spec, inp, weight, targets, logits, losses } = op;
        let [t, v, c] = [inp.shape.rows(), weight.shape.rows(), weight.shape.columns()];
        let size = LossSize { classes: spec.classes, columns: v };
        let z_loss = spec.z_loss as f32;
        for first in (0..t).step_by(spec.chunk) {
            let rows = spec.chunk.min(t - first);
            self.logits(first, rows, &op)?;
            let (targets, losses) = (self.row(targets, first), self.row(losses, first));
            let logits = self.address(logits);
            let scale = gradients.map(|(scale, ..)| self.address(scale));
            if let Some((driver, loss)) = self.loss(size)? {
                match scale {
                    None => {
                        let args = LossForward { logits, targets, losses };
                        loss.forward(driver, STREAM, rows, z_loss, &args)?;
                    }
                    Some(scale) => {
                        let args = LossBackward { logits, targets, scale, losses };
                        loss.backward(driver, STREAM, rows, z_loss, &args)?;
                    }
                }
            }
            let Some((_, d_inp, d_weight)) = gradients else { continue };
            self.multiply(Product {
                layout: Layout::Nn,
                m: rows,
                n: c,
                k: v,
                a: logits,
                b: self.address(weight),
                out: self.row(d_inp, first),
                output: Output::Store { addend: None },
            })?;
            self.multiply(Product {
                layout: Layout::Tn,
                m: v,
                n: c,
                k: rows,
                a: logits,
                b: self.row(inp, first),
                out: self.address(d_weight),
                output: Output::Accumulate,
            })?;
        }
        Ok(())
    }
}

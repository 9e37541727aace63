//! Cross-entropy over rows of logits, and its gradient in their place.

use super::Options;
use super::report::{Row, TimedRows};
use super::sizes;
use super::timing::{Copies, on_cpu, samples};
use crate::cuda::loss::{Loss, LossBackward, LossForward};
use crate::cuda::{DevicePointer, Driver, StreamId};
use crate::error::Result;
use crate::predict::cost::{Cost, element_bytes};

/// `None`: what suits the machine.
#[derive(Clone, Default, Debug)]
pub struct LossRequest {
    /// T
    pub rows: Option<usize>,
    /// V
    pub vocab: Option<usize>,
}

struct Buffers {
    logits: DevicePointer,
    targets: DevicePointer,
    losses: DevicePointer,
    scale: DevicePointer,
}

pub(super) fn rows(
    driver: &mut dyn Driver,
    request: &LossRequest,
    options: Options,
    table: &mut TimedRows,
) -> Result<()> {
    let (default_rows, default_vocab) = if on_cpu(driver) { (64, 2048) } else { (4096, 32000) };
    let rows = request.rows.unwrap_or(default_rows);
    let vocab = request.vocab.unwrap_or(default_vocab);
    sizes::check("a loss", &[rows, vocab])?;
    let dtype = options.kernel_dtype();
    let kernels = Loss::new(driver, dtype, vocab, vocab)?;
    let logit_bytes = rows as u64 * vocab as u64 * element_bytes(dtype);
    let row_bytes = 4 * rows as u64;
    let copies = Copies::new(driver, logit_bytes, logit_bytes + 2 * row_bytes + 4, |buffers| {
        Ok(Buffers {
            logits: buffers.normals("logits", dtype, rows * vocab)?,
            targets: buffers.below("targets", vocab, rows)?,
            losses: buffers.zeros("losses", row_bytes)?,
            scale: buffers.normals("scale", crate::config::Dtype::F32, 1)?,
        })
    })?;
    let samples = samples(driver, options.samples);
    let forward = copies.time(driver, samples, |driver, it| {
        let Buffers { logits, targets, losses, .. } = *it;
        let args = LossForward { logits, targets, losses };
        kernels.forward(driver, StreamId::MAIN, rows, 0.0, &args)
    })?;
    table.push(Row::new(Cost::loss_forward(dtype, [rows, vocab]), &forward));
    // From the second launch on, the logits are gradients: other numbers, as many bytes.
    let backward = copies.time(driver, samples, |driver, it| {
        let Buffers { logits, targets, losses, scale } = *it;
        let args = LossBackward { logits, targets, scale, losses };
        kernels.backward(driver, StreamId::MAIN, rows, 0.0, &args)
    })?;
    table.push(Row::new(Cost::loss_backward(dtype, [rows, vocab], kernels.shape()), &backward));
    copies.release(driver)
}

//! RMSNorm and LayerNorm with a depth scale, forward and backward, without and with
//! the gradient of the residual stream to add to.

use super::Options;
use super::report::{Row, TimedRows};
use super::sizes;
use super::timing::{Copies, on_cpu, samples};
use crate::backend::{NormSpec, Sink};
use crate::config::{Dtype, NormKind};
use crate::cuda::norm::{Norm, NormBackward, NormForward};
use crate::cuda::{DevicePointer, Driver, StreamId};
use crate::error::Result;
use crate::predict::cost::{Cost, element_bytes};

const DEPTH: usize = 3;
const EPS: f64 = 1e-6;

/// `None`: what suits the machine.
#[derive(Clone, Default, Debug)]
pub struct NormRequest {
    /// `None`: RMSNorm.
    pub kind: Option<NormKind>,
    /// T
    pub rows: Option<usize>,
    /// C
    pub columns: Option<usize>,
}

struct Buffers {
    inp: DevicePointer,
    d_out: DevicePointer,
    gain: DevicePointer,
    out: DevicePointer,
    mean: Option<DevicePointer>,
    rstd: DevicePointer,
    partial: DevicePointer,
    d_gain: DevicePointer,
}

pub(super) fn rows(
    driver: &mut dyn Driver,
    request: &NormRequest,
    options: Options,
    table: &mut TimedRows,
) -> Result<()> {
    let (default_rows, default_columns) = if on_cpu(driver) { (256, 1024) } else { (16384, 2048) };
    let rows = request.rows.unwrap_or(default_rows);
    let columns = request.columns.unwrap_or(default_columns);
    sizes::check("a norm", &[rows, columns])?;
    if i32::try_from(rows).is_err() {
        return Err(sizes::impossible(format!("a norm of {rows} rows")));
    }
    let (dtype, norm) = (options.kernel_dtype(), request.kind.unwrap_or(NormKind::Rms));
    let spec = NormSpec { kind: norm, eps: EPS, depth: DEPTH };
    let kernels = Norm::new(driver, dtype, columns)?;
    let partials = kernels.partials(rows);
    let samples = samples(driver, options.samples);

    let activation = rows as u64 * columns as u64 * element_bytes(dtype);
    let (row_sums, gains) = (4 * rows as u64, 4 * columns as u64);
    let allocated = 3 * activation + 2 * row_sums + (partials as u64 + 2) * gains;
    let copies = Copies::new(driver, 2 * activation, allocated, |buffers| {
        Ok(Buffers {
            out: buffers.zeros("out", activation)?,
            mean: match norm {
                NormKind::Layer => Some(buffers.zeros("mean", row_sums)?),
                NormKind::Rms => None,
            },
            rstd: buffers.zeros("rstd", row_sums)?,
            partial: buffers.zeros("partial", partials as u64 * gains)?,
            inp: buffers.normals("inp", dtype, rows * columns)?,
            d_out: buffers.normals("d_out", dtype, rows * columns)?,
            gain: buffers.normals("gain", Dtype::F32, columns)?,
            d_gain: buffers.normals("d_gain", Dtype::F32, columns)?,
        })
    })?;

    let timing = copies.time(driver, samples, |driver, it| {
        let Buffers { inp, gain, out, mean, rstd, .. } = *it;
        let args = NormForward { spec, inp, gain, out, mean, rstd };
        kernels.forward(driver, StreamId::MAIN, rows, &args)
    })?;
    table.push(Row::new(Cost::norm_forward(norm, dtype, [rows, columns]), &timing));
    for accumulate in [false, true] {
        let timing = copies.time(driver, samples, |driver, it| {
            let Buffers { inp, gain, out, mean, rstd, d_out, partial, d_gain } = *it;
            let d_inp = Sink { to: out, accumulate };
            let args = NormBackward { spec, inp, gain, mean, rstd, d_out, partial, d_inp, d_gain };
            kernels.backward(driver, StreamId::MAIN, rows, &args)
        })?;
        let cost = Cost::norm_backward(norm, dtype, [rows, columns], partials, accumulate);
        table.push(Row::new(cost, &timing));
    }
    copies.release(driver)
}

//! Launches kernels/residual.cu: a branch added to the stream with scales, forward and backward.
//!
//! [`ScaledResidual`] knows the kernels for one type and width of rows. Nothing is allocated; the
//! backward pass of a gain needs the scratch that [`GainBackward`] names.

use super::rows::{Rows, THREADS, WARP};
use super::{Arguments, DevicePointer, Driver, KernelId, Launch, StreamId};
use crate::backend::{NORM_PARTIAL_ROWS, ResidualSpec};
use crate::config::Dtype;
use crate::error::Result;

/// Columns of a block of norm_backward_gain, which adds up partial sums of any gain.
const GAIN_COLUMNS: usize = 32;

/// The learnt factor of a branch.
#[derive(Clone, Copy, Debug)]
pub struct Gain {
    /// [1] or [C], f32
    pub gain: DevicePointer,
    /// 1 or C
    pub count: usize,
}

/// Addresses of [`ScaledResidual::forward`].
#[derive(Clone, Copy, Debug)]
pub struct ResidualForward {
    /// [T,C]
    pub inp: DevicePointer,
    /// [T,C]
    pub residual: DevicePointer,
    pub gain: Option<Gain>,
    /// [T,C], written.
    pub out: DevicePointer,
}

/// Addresses of [`ScaledResidual::backward`].
#[derive(Clone, Copy, Debug)]
pub struct ResidualBackward {
    /// [T,C], multiplied by the stream's scale in place.
    pub d_out: DevicePointer,
    /// [T,C], written.
    pub d_inp: DevicePointer,
    pub gain: Option<GainBackward>,
}

/// What the gradient of a gain needs.
#[derive(Clone, Copy, Debug)]
pub struct GainBackward {
    pub gain: Gain,
    /// [T,C], what the gain was multiplied with.
    pub inp: DevicePointer,
    /// [ceil(T/NORM_PARTIAL_ROWS),C], f32, scratch
    pub partial: DevicePointer,
    /// As the gain; added to.
    pub d_gain: DevicePointer,
}

/// The kernels for rows of one type and width on one machine.
#[derive(Clone, Debug)]
pub struct ScaledResidual {
    device: &'static str,
    columns: usize,
    /// Blocks side by side over a row.
    strips: usize,
    forward: KernelId,
    backward: KernelId,
    channel_gain: KernelId,
    scalar_gain: KernelId,
}

impl ScaledResidual {
    /// Errors: rows that are no multiple of 16 bytes; a build without kernels.
    pub fn new(driver: &mut dyn Driver, dtype: Dtype, columns: usize) -> Result<Self> {
        let op = Rows { op: "scaled_residual", device: driver.device() };
        let vectors = op.vectors(dtype, columns, "model.hidden")?;
        op.count("columns", columns, 0, "model.hidden")?;
        Ok(ScaledResidual {
            device: driver.device(),
            columns,
            strips: vectors.div_ceil(WARP),
            forward: driver.kernel(&format!("scaled_residual_forward_{dtype}"))?,
            backward: driver.kernel(&format!("scaled_residual_backward_{dtype}"))?,
            channel_gain: driver.kernel("norm_backward_gain")?,
            scalar_gain: driver.kernel("scaled_residual_backward_gain")?,
        })
    }

    /// Errors: an address that is none; more rows than the kernel counts; whatever the driver finds
    /// wrong.
    pub fn forward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        spec: ResidualSpec,
        rows: usize,
        args: &ResidualForward,
    ) -> Result<()> {
        let op = self.op("scaled_residual_forward");
        op.aligned(&[("inp", args.inp), ("residual", args.residual), ("out", args.out)])?;
        let Some((blocks, rows)) = self.blocks(op, rows)? else { return Ok(()) };
        let (gain, count) = address(args.gain);
        let arguments = Arguments::new()
            .with(args.inp)
            .with(args.residual)
            .with(gain)
            .with(args.out)
            .with(rows)
            .with(self.columns as i32)
            .with(count)
            .with(spec.stream_scale as f32)
            .with(spec.branch_scale as f32);
        driver.launch(&launch(self.forward, blocks, stream), &arguments)
    }

    /// Errors: as [`ScaledResidual::forward`].
    pub fn backward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        spec: ResidualSpec,
        rows: usize,
        args: &ResidualBackward,
    ) -> Result<()> {
        let op = self.op("scaled_residual_backward");
        op.aligned(&[("d_out", args.d_out), ("d_inp", args.d_inp)])?;
        if let Some(gain) = &args.gain {
            op.aligned(&[("inp", gain.inp), ("partial", gain.partial)])?;
        }
        let chunks = rows.div_ceil(NORM_PARTIAL_ROWS);
        let sums = chunks.saturating_mul(self.columns);
        let sums = op.count("partial sums", sums, THREADS, "train.micro_batch")?;
        let Some((blocks, rows)) = self.blocks(op, rows)? else { return Ok(()) };
        let null = DevicePointer::NULL;
        let (gain, count) = address(args.gain.map(|it| it.gain));
        let (inp, partial) = args.gain.map_or((null, null), |it| (it.inp, it.partial));
        let arguments = Arguments::new()
            .with(inp)
            .with(gain)
            .with(args.d_out)
            .with(args.d_inp)
            .with(partial)
            .with(rows)
            .with(self.columns as i32)
            .with(count)
            .with(spec.stream_scale as f32)
            .with(spec.branch_scale as f32);
        driver.launch(&launch(self.backward, blocks, stream), &arguments)?;

        let Some(GainBackward { gain, d_gain, .. }) = args.gain else { return Ok(()) };
        if gain.count == 1 {
            let arguments = Arguments::new().with(partial).with(d_gain).with(sums);
            return driver.launch(&launch(self.scalar_gain, 1, stream), &arguments);
        }
        let arguments = Arguments::new()
            .with(partial)
            .with(d_gain)
            .with(chunks as i32)
            .with(self.columns as i32)
            .with(1.0f32);
        let blocks = self.columns.div_ceil(GAIN_COLUMNS) as u32;
        driver.launch(&launch(self.channel_gain, blocks, stream), &arguments)
    }

    /// Blocks, and the number of rows as a kernel takes it; `None` where there is nothing to do.
    fn blocks(&self, op: Rows, rows: usize) -> Result<Option<(u32, i32)>> {
        let rows_counted = op.count("rows", rows, NORM_PARTIAL_ROWS, "train.micro_batch")?;
        let blocks = rows.div_ceil(NORM_PARTIAL_ROWS).saturating_mul(self.strips);
        let blocks = op.count("blocks", blocks, 0, "train.micro_batch")?;
        Ok((blocks > 0).then_some((blocks as u32, rows_counted)))
    }

    fn op(&self, op: &'static str) -> Rows {
        Rows { op, device: self.device }
    }
}

fn address(gain: Option<Gain>) -> (DevicePointer, i32) {
    gain.map_or((DevicePointer::NULL, 1), |it| (it.gain, it.count as i32))
}

fn launch(kernel: KernelId, blocks: u32, stream: StreamId) -> Launch {
    Launch::new(kernel, [blocks, 1, 1], [THREADS as u32, 1, 1]).on(stream)
}

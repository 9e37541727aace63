//! Launches kernels/norm.cu: RMSNorm and LayerNorm with a depth scale, forward and backward.
//!
//! [`Norm`] knows the kernels for one type and width of rows; it launches them for any number of
//! rows and any depth. It allocates nothing: [`Norm::partials`] says how much scratch the backward
//! pass needs. The formulas and what is written or added to stand at the head of kernels/norm.cu.

use super::rows::vector;
use super::{Arguments, DevicePointer, Driver, KernelId, Launch, StreamId};
use crate::backend::{self, NORM_PARTIAL_ROWS, NormSpec};
use crate::config::{Dtype, NormKind};
use crate::error::{Error, Result};

/// How a row is spread over threads, and how many blocks of these a multiprocessor is given: the
/// launch bounds of the kernels, which are what their registers allow.
struct Variant {
    threads_per_row: usize,
    vectors_per_thread: usize,
    forward_blocks: u32,
    backward_blocks: u32,
}

/// The narrowest first; the last one exists for f32 only.
const VARIANTS: [Variant; 7] = [
    variant(32, 1, 8, 4),
    variant(32, 2, 4, 3),
    variant(32, 4, 3, 2),
    variant(256, 1, 8, 4),
    variant(256, 2, 4, 3),
    variant(256, 4, 3, 2),
    variant(512, 4, 2, 1),
];

const fn variant(threads: usize, vectors: usize, forward: u32, backward: u32) -> Variant {
    Variant {
        threads_per_row: threads,
        vectors_per_thread: vectors,
        forward_blocks: forward,
        backward_blocks: backward,
    }
}

/// The widest row of either type.
pub const MAX_COLUMNS: usize = 8192;
const MIN_BLOCK_THREADS: usize = 256;
/// Columns of a block of norm_backward_gain, and its threads.
const GAIN_COLUMNS: usize = 32;
const GAIN_THREADS: u32 = 256;

/// Addresses of [`Norm::forward`]; rows of activations lie one after another without gaps.
pub type NormForward = backend::NormForward<DevicePointer>;
/// Addresses of [`Norm::backward`]; `partial` has at least [`Norm::partials`] rows.
pub type NormBackward = backend::NormBackward<DevicePointer>;

/// The kernels for rows of one type and width on one machine.
#[derive(Clone, Debug)]
pub struct Norm {
    device: &'static str,
    columns: usize,
    block_threads: u32,
    /// Rows that a block works on at once.
    block_rows: usize,
    /// The most blocks that are worth launching: as many as the machine holds.
    forward_blocks: usize,
    backward_blocks: usize,
    forward: KernelId,
    backward: KernelId,
    gain: KernelId,
}

/// The narrowest that holds a row.
fn variant_for(dtype: Dtype, columns: usize) -> Option<&'static Variant> {
    let holds = |it: &&Variant| {
        it.threads_per_row * it.vectors_per_thread * vector(dtype) >= columns
            && columns <= MAX_COLUMNS
    };
    VARIANTS.iter().find(holds)
}

impl Norm {
    /// Errors: rows that are no multiple of 16 bytes, or wider than [`MAX_COLUMNS`].
    pub fn new(driver: &mut dyn Driver, dtype: Dtype, columns: usize) -> Result<Self> {
        let device = driver.device();
        let vector = vector(dtype);
        if columns == 0 || !columns.is_multiple_of(vector) {
            return Err(Error::launch(
                "norm",
                device,
                format!("rows of {columns} {dtype} values; {vector} are loaded at once"),
                format!("choose model.hidden as a multiple of {vector}"),
            ));
        }
        let Some(variant) = variant_for(dtype, columns) else {
            return Err(Error::launch(
                "norm",
                device,
                format!("rows of {columns} values; the widest kernel holds {MAX_COLUMNS}"),
                format!("choose model.hidden up to {MAX_COLUMNS}"),
            ));
        };
        let suffix = format!("{dtype}_{}x{}", variant.threads_per_row, variant.vectors_per_thread);
        let block_threads = variant.threads_per_row.max(MIN_BLOCK_THREADS);
        let multiprocessors = driver.properties().multiprocessors as usize;
        Ok(Norm {
            device,
            columns,
            block_threads: block_threads as u32,
            block_rows: block_threads / variant.threads_per_row,
            forward_blocks: multiprocessors * variant.forward_blocks as usize,
            backward_blocks: multiprocessors * variant.backward_blocks as usize,
            forward: driver.kernel(&format!("norm_forward_{suffix}"))?,
            backward: driver.kernel(&format!("norm_backward_{suffix}"))?,
            gain: driver.kernel("norm_backward_gain")?,
        })
    }

    /// Rows of [`NormBackward::partial`] for this many rows: at most
    /// ceil(rows / [`NORM_PARTIAL_ROWS`]), so that scratch planned for the CPU is enough. One
    /// machine always uses the same number, so that its sums have one order.
    pub fn partials(&self, rows: usize) -> usize {
        rows.div_ceil(NORM_PARTIAL_ROWS).min(self.backward_blocks)
    }

    /// As [`Norm::partials`], on a machine that need not be here. `None`: no kernel is so wide.
    pub fn partials_on(
        multiprocessors: usize,
        dtype: Dtype,
        columns: usize,
        rows: usize,
    ) -> Option<usize> {
        let blocks = multiprocessors * variant_for(dtype, columns)?.backward_blocks as usize;
        Some(rows.div_ceil(NORM_PARTIAL_ROWS).min(blocks))
    }

    /// Errors: more rows than an i32 counts; a mean without a LayerNorm, or the reverse; whatever
    /// the driver finds wrong.
    pub fn forward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        rows: usize,
        args: &NormForward,
    ) -> Result<()> {
        let Some(counted_rows) = self.check(args.spec, rows, args.mean)? else { return Ok(()) };
        let arguments = Arguments::new()
            .with(args.inp)
            .with(args.gain)
            .with(args.out)
            .with(args.mean.unwrap_or_default())
            .with(args.rstd)
            .with(counted_rows)
            .with(self.columns as i32)
            .with(args.spec.eps as f32)
            .with(sqrt_depth(args.spec));
        let blocks = rows.div_ceil(self.block_rows).min(self.forward_blocks);
        driver.launch(&self.launch(self.forward, blocks, stream), &arguments)
    }

    /// Errors: as [`Norm::forward`].
    pub fn backward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        rows: usize,
        args: &NormBackward,
    ) -> Result<()> {
        let Some(counted_rows) = self.check(args.spec, rows, args.mean)? else { return Ok(()) };
        let partials = self.partials(rows);
        let arguments = Arguments::new()
            .with(args.inp)
            .with(args.gain)
            .with(args.mean.unwrap_or_default())
            .with(args.rstd)
            .with(args.d_out)
            .with(args.partial)
            .with(args.d_inp.to)
            .with(i32::from(args.d_inp.accumulate))
            .with(counted_rows)
            .with(self.columns as i32)
            .with(sqrt_depth(args.spec));
        driver.launch(&self.launch(self.backward, partials, stream), &arguments)?;

        let arguments = Arguments::new()
            .with(args.partial)
            .with(args.d_gain)
            .with(partials as i32)
            .with(self.columns as i32)
            .with(sqrt_depth(args.spec));
        let blocks = self.columns.div_ceil(GAIN_COLUMNS) as u32;
        let launch = Launch::new(self.gain, [blocks, 1, 1], [GAIN_THREADS, 1, 1]).on(stream);
        driver.launch(&launch, &arguments)
    }

    fn launch(&self, kernel: KernelId, blocks: usize, stream: StreamId) -> Launch {
        Launch::new(kernel, [blocks as u32, 1, 1], [self.block_threads, 1, 1]).on(stream)
    }

    /// The number of rows as the kernels take it; `None` where there is nothing to do.
    fn check(
        &self,
        spec: NormSpec,
        rows: usize,
        mean: Option<DevicePointer>,
    ) -> Result<Option<i32>> {
        let is_layer = spec.kind == NormKind::Layer;
        if mean.is_some() != is_layer {
            return Err(Error::launch(
                "norm",
                self.device,
                format!(
                    "a {} norm {} a mean",
                    spec.kind,
                    if is_layer { "without" } else { "with" }
                ),
                "give the means of a layer norm, and only of one",
            ));
        }
        // Rows are walked in steps of all blocks' rows; the last step must not overflow.
        let largest_step = self.block_rows * self.forward_blocks.max(self.backward_blocks);
        match i32::try_from(rows + largest_step) {
            Ok(_) => Ok((rows > 0).then_some(rows as i32)),
            Err(_) => Err(Error::launch(
                "norm",
                self.device,
                format!("{rows} rows; an i32 has to count them"),
                "choose a smaller train.micro_batch",
            )),
        }
    }
}

/// What the gain is divided by; rounded once, as the export does it.
fn sqrt_depth(spec: NormSpec) -> f32 {
    (spec.depth as f64).sqrt() as f32
}

//! Launches kernels/loss.cu: cross-entropy over rows of logits, with their gradient in place.
//!
//! [`Loss`] knows the kernels for one type and width of rows; it launches them for any number of
//! rows. It allocates nothing. The formulas, and what becomes of padding, ignored rows and targets
//! that are no class, stand at the head of kernels/loss.cu.

use super::{Arguments, DevicePointer, Driver, KernelId, Launch, StreamId};
use crate::config::Dtype;
use crate::error::{Error, Result};

/// Threads of a row and 16-byte vectors that each of them holds, as kernels/loss.cu has them, the
/// narrowest first. The last one takes every wider row, in several tiles.
const VARIANTS: [(usize, usize); 5] = [(128, 1), (128, 4), (256, 8), (512, 8), (1024, 8)];

/// The widest row: an i32 has to count its columns and those of a tile behind its end.
pub const MAX_COLUMNS: usize = 1 << 30;
const VECTOR_BYTES: usize = 16;

/// Addresses of [`Loss::forward`]; rows lie behind each other without gaps.
#[derive(Clone, Copy, Debug)]
pub struct LossForward {
    /// [T,V]
    pub logits: DevicePointer,
    /// [T], i32
    pub targets: DevicePointer,
    /// [T], f32, =
    pub losses: DevicePointer,
}

/// Addresses of [`Loss::backward`].
#[derive(Clone, Copy, Debug)]
pub struct LossBackward {
    /// [T,V], replaced by their gradient.
    pub logits: DevicePointer,
    /// [T], i32
    pub targets: DevicePointer,
    /// [1], f32: d loss / d losses[t], the same for every row.
    pub scale: DevicePointer,
    /// [T], f32, =, the same bits as from [`Loss::forward`].
    pub losses: DevicePointer,
}

/// The kernels for rows of one type and width on one machine.
#[derive(Clone, Debug)]
pub struct Loss {
    device: &'static str,
    classes: usize,
    columns: usize,
    threads: u32,
    forward: KernelId,
    backward: KernelId,
}

impl Loss {
    /// `columns`: the stored width of a row, of which the first `classes` are real.
    ///
    /// Errors: rows that are no multiple of 16 bytes, or wider than [`MAX_COLUMNS`]; no class, or
    /// more than there are columns.
    pub fn new(
        driver: &mut dyn Driver,
        dtype: Dtype,
        classes: usize,
        columns: usize,
    ) -> Result<Self> {
        let device = driver.device();
        let element_bytes = match dtype {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        };
        let vector = VECTOR_BYTES / element_bytes;
        if columns == 0 || !columns.is_multiple_of(vector) {
            return Err(refusal(
                device,
                format!("rows of {columns} {dtype} logits; {vector} are loaded at once"),
                format!("store the vocabulary rounded up to a multiple of {vector}"),
            ));
        }
        if columns > MAX_COLUMNS {
            return Err(refusal(
                device,
                format!("rows of {columns} logits; at most {MAX_COLUMNS} can be counted"),
                format!("choose model.vocab up to {MAX_COLUMNS}"),
            ));
        }
        if classes == 0 || classes > columns {
            return Err(refusal(
                device,
                format!("{classes} classes in rows of {columns} logits"),
                format!("choose 1 to {columns} classes; the columns behind them are padding"),
            ));
        }
        let holds = |&&(threads, vectors): &&(usize, usize)| threads * vectors * vector >= columns;
        let widest = VARIANTS.last().expect("there are variants");
        let &(threads, vectors) = VARIANTS.iter().find(holds).unwrap_or(widest);
        let suffix = format!("{dtype}_{threads}x{vectors}");
        Ok(Loss {
            device,
            classes,
            columns,
            threads: threads as u32,
            forward: driver.kernel(&format!("loss_forward_{suffix}"))?,
            backward: driver.kernel(&format!("loss_backward_{suffix}"))?,
        })
    }

    /// Errors: more rows than a grid has blocks; whatever the driver finds wrong.
    pub fn forward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        rows: usize,
        z_loss: f32,
        args: &LossForward,
    ) -> Result<()> {
        let arguments = Arguments::new().with(args.logits).with(args.targets).with(args.losses);
        self.launch(driver, stream, self.forward, rows, z_loss, arguments)
    }

    /// Losses, and in place of the logits the gradients of scale[0] * sum(losses).
    ///
    /// Errors: as [`Loss::forward`].
    pub fn backward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        rows: usize,
        z_loss: f32,
        args: &LossBackward,
    ) -> Result<()> {
        let arguments = Arguments::new()
            .with(args.logits)
            .with(args.targets)
            .with(args.scale)
            .with(args.losses);
        self.launch(driver, stream, self.backward, rows, z_loss, arguments)
    }

    fn launch(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        kernel: KernelId,
        rows: usize,
        z_loss: f32,
        arguments: Arguments,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        if i32::try_from(rows).is_err() {
            return Err(refusal(
                self.device,
                format!("{rows} rows; a grid has at most {} blocks", i32::MAX),
                "choose a smaller train.micro_batch, or smaller chunks of tokens".to_string(),
            ));
        }
        if !z_loss.is_finite() {
            return Err(refusal(
                self.device,
                format!("the weight of the z-loss is {z_loss}"),
                "choose a finite one; 0 turns it off".to_string(),
            ));
        }
        let arguments = arguments.with(self.classes as i32).with(self.columns as i32).with(z_loss);
        let launch = Launch::new(kernel, [rows as u32, 1, 1], [self.threads, 1, 1]).on(stream);
        driver.launch(&launch, &arguments)
    }
}

fn refusal(device: &str, what: String, remedy: String) -> Error {
    Error::Launch { kernel: "loss".to_string(), device: device.to_string(), what, remedy }
}

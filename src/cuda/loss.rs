//! Launches kernels/loss.cu and loss_sm90.cu: cross-entropy over rows of logits, with their
//! gradient in place.
//!
//! [`Loss`] knows the kernels for one type and width of rows; it launches them for any number of
//! rows. It allocates nothing. What becomes of ignored rows and of targets that are no class stands
//! at the head of kernels/loss.cu, the formula in cross_entropy.cuh.

use super::{Arguments, DevicePointer, Driver, KernelId, Launch, Properties, StreamId};
use crate::config::Dtype;
use crate::error::{Error, Result};

/// How many threads hold a row in their registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Blocks of a cluster.
    pub blocks: usize,
    /// Of a block.
    threads: usize,
    /// Of 16 bytes, of a thread.
    vectors: usize,
}

const fn shape(blocks: usize, threads: usize, vectors: usize) -> Shape {
    Shape { blocks, threads, vectors }
}

/// Those of kernels/loss.cu, the narrowest first. The last one takes every wider row, in several
/// tiles.
const ONE_BLOCK: [Shape; 5] =
    [shape(1, 128, 1), shape(1, 128, 4), shape(1, 256, 8), shape(1, 512, 8), shape(1, 1024, 8)];

/// Those of kernels/loss_sm90.cu, for rows that one block does not hold.
const CLUSTERS: [Shape; 4] =
    [shape(4, 256, 16), shape(8, 256, 10), shape(8, 256, 16), shape(8, 512, 16)];

impl Shape {
    /// For rows of so many bytes; `clusters`: whether the machine has them.
    pub fn of(row_bytes: usize, clusters: bool) -> Self {
        let mut shapes = ONE_BLOCK.iter().chain(CLUSTERS.iter().filter(|_| clusters));
        let holds = |it: &&Shape| it.bytes() >= row_bytes;
        *shapes.find(holds).unwrap_or(&ONE_BLOCK[ONE_BLOCK.len() - 1])
    }

    /// Bytes of a row that its gradient needs a second time: those of all tiles but the last.
    pub fn read_again(&self, row_bytes: usize) -> usize {
        row_bytes.saturating_sub(1) / self.bytes() * self.bytes()
    }

    /// That all threads hold together.
    fn bytes(&self) -> usize {
        self.blocks * self.threads * self.vectors * VECTOR_BYTES
    }

    /// Whether a machine runs loss_sm90.cu, which is compiled for this alone.
    fn has_clusters(machine: &Properties) -> bool {
        machine.compute_capability == (9, 0)
    }
}

/// The widest row: an i32 has to count its columns and those of a tile after its end.
pub const MAX_COLUMNS: usize = 1 << 30;
const VECTOR_BYTES: usize = 16;

/// Addresses of [`Loss::forward`]; rows lie one after another without gaps.
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
    shape: Shape,
    forward: KernelId,
    backward: KernelId,
}

impl Loss {
    /// `columns`: the stored width of a row, of which the first `classes` are real. Rows that one
    /// block does not hold are shared by a cluster, where this machine and this build have that.
    ///
    /// Errors: rows that are no multiple of 16 bytes, or wider than [`MAX_COLUMNS`]; no class, or
    /// more than there are columns.
    pub fn new(
        driver: &mut dyn Driver,
        dtype: Dtype,
        classes: usize,
        columns: usize,
    ) -> Result<Self> {
        let clusters = Shape::has_clusters(driver.properties());
        let shape = Shape::of(row_bytes(dtype, columns), clusters);
        let found = Loss::of_shape(driver, dtype, classes, columns, shape);
        // A build for fewer architectures lacks whole files: one block is as right.
        match found {
            Err(_) if shape.blocks > 1 => Loss::in_one_block(driver, dtype, classes, columns),
            found => found,
        }
    }

    /// The same without clusters, on any machine.
    pub fn in_one_block(
        driver: &mut dyn Driver,
        dtype: Dtype,
        classes: usize,
        columns: usize,
    ) -> Result<Self> {
        let shape = Shape::of(row_bytes(dtype, columns), false);
        Loss::of_shape(driver, dtype, classes, columns, shape)
    }

    fn of_shape(
        driver: &mut dyn Driver,
        dtype: Dtype,
        classes: usize,
        columns: usize,
        shape: Shape,
    ) -> Result<Self> {
        let device = driver.device();
        let vector = VECTOR_BYTES / dtype.bytes();
        if columns == 0 || !columns.is_multiple_of(vector) {
            return Err(Error::launch(
                "loss",
                device,
                format!("rows of {columns} {dtype} logits; {vector} are loaded at once"),
                format!("store the vocabulary rounded up to a multiple of {vector}"),
            ));
        }
        if columns > MAX_COLUMNS {
            return Err(Error::launch(
                "loss",
                device,
                format!("rows of {columns} logits; at most {MAX_COLUMNS} can be counted"),
                format!("choose model.vocab up to {MAX_COLUMNS}"),
            ));
        }
        if classes == 0 || classes > columns {
            return Err(Error::launch(
                "loss",
                device,
                format!("{classes} classes in rows of {columns} logits"),
                format!("choose 1 to {columns} classes; the columns after them are padding"),
            ));
        }
        let mut kernel = |pass: &str| {
            let family = if shape.blocks > 1 { "_sm90" } else { "" };
            let Shape { threads, vectors, .. } = shape;
            driver.kernel(&format!("loss_{pass}{family}_{dtype}_{threads}x{vectors}"))
        };
        let (forward, backward) = (kernel("forward")?, kernel("backward")?);
        Ok(Loss { device, classes, columns, shape, forward, backward })
    }

    /// How the rows are held.
    pub fn shape(&self) -> Shape {
        self.shape
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
        let Shape { blocks, threads, .. } = self.shape;
        if i32::try_from(rows.saturating_mul(blocks)).is_err() {
            return Err(Error::launch(
                "loss",
                self.device,
                format!("{rows} rows of {blocks} blocks; a grid has at most {}", i32::MAX),
                "choose a smaller train.micro_batch, or smaller chunks of tokens",
            ));
        }
        if !z_loss.is_finite() {
            return Err(Error::launch(
                "loss",
                self.device,
                format!("the weight of the z-loss is {z_loss}"),
                "choose a finite one; 0 turns it off",
            ));
        }
        let arguments = arguments.with(self.classes as i32).with(self.columns as i32).with(z_loss);
        let grid = [(rows * blocks) as u32, 1, 1];
        let launch = Launch::new(kernel, grid, [threads as u32, 1, 1])
            .cluster([blocks as u32, 1, 1])
            .on(stream);
        driver.launch(&launch, &arguments)
    }
}

fn row_bytes(dtype: Dtype, columns: usize) -> usize {
    columns.saturating_mul(dtype.bytes())
}

//! Launches kernels/pointwise.cu: rotary embedding, SwiGLU, addition and casts.
//!
//! [`Pointwise`] knows the kernels for one type of activations and launches them for any number of
//! rows or elements. Nothing is allocated. The formulas stand in kernels/pointwise.cu.

use super::rows::{Rows, THREADS, VECTOR_BYTES, WARP, Walk, vector};
use super::{Arguments, DevicePointer, Driver, KernelId, Launch, StreamId};
use crate::backend::{self, HeadSpec};
use crate::config::Dtype;
use crate::error::Result;

/// Vectors of a row that a warp takes at once, and the blocks of a multiprocessor: ITEMS and the
/// launch bounds of the kernels.
const TASK_VECTORS: usize = 2 * WARP;
const ROW_BLOCKS: usize = 4;
const FLAT_BLOCKS: usize = 8;

/// Addresses of [`Pointwise::rotary`].
#[derive(Clone, Copy, Debug)]
pub struct Rotary {
    /// [P,D], f32: D/2 cosines of a position, then D/2 sines.
    pub table: DevicePointer,
    /// [T], i32; each from 0 to P - 1.
    pub positions: DevicePointer,
    /// [T,(H+2K)D], in place; v stays.
    pub qkv: DevicePointer,
    /// Rotate back: the gradient of the rotation.
    pub inverse: bool,
}

/// Addresses of [`Pointwise::swiglu_forward`].
pub type SwiGluForward = backend::SwiGluForward<DevicePointer>;
/// Addresses of [`Pointwise::swiglu_backward`].
pub type SwiGluBackward = backend::SwiGluBackward<DevicePointer>;

/// The kernels for activations of one type on one machine.
#[derive(Clone, Debug)]
pub struct Pointwise {
    device: &'static str,
    dtype: Dtype,
    multiprocessors: usize,
    rotary: KernelId,
    swiglu_forward: KernelId,
    swiglu_backward: KernelId,
    add: KernelId,
    add_f32: KernelId,
    cast_to_bf16: KernelId,
}

impl Pointwise {
    /// Errors: this build has no kernels.
    pub fn new(driver: &mut dyn Driver, dtype: Dtype) -> Result<Self> {
        Ok(Pointwise {
            device: driver.device(),
            dtype,
            multiprocessors: driver.properties().multiprocessors as usize,
            rotary: driver.kernel(&format!("rotary_{dtype}"))?,
            swiglu_forward: driver.kernel(&format!("swiglu_forward_{dtype}"))?,
            swiglu_backward: driver.kernel(&format!("swiglu_backward_{dtype}"))?,
            add: driver.kernel(&format!("add_{dtype}"))?,
            add_f32: driver.kernel("add_f32")?,
            cast_to_bf16: driver.kernel("cast_to_bf16")?,
        })
    }

    /// Errors: half a head that is no multiple of 16 bytes; an address that is none; more rows than
    /// the kernel counts; whatever the driver finds wrong.
    pub fn rotary(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        heads: HeadSpec,
        rows: usize,
        args: &Rotary,
    ) -> Result<()> {
        let op = self.op("rotary");
        let head_dim = heads.head_dim;
        let vector = vector(self.dtype);
        if head_dim == 0 || !head_dim.is_multiple_of(2 * vector) {
            return Err(op.refusal(
                format!(
                    "heads of {head_dim} {} values; {vector} of each half are loaded at once",
                    self.dtype
                ),
                format!("choose model.hidden / model.heads as a multiple of {}", 2 * vector),
            ));
        }
        op.aligned(&[("table", args.table), ("qkv", args.qkv)])?;
        let columns = op.count("columns of qkv", heads.qkv_columns(), 0, "model.heads")?;
        let rotated = heads.heads + heads.kv_heads;
        let pairs = rotated * (head_dim / 2 / vector);
        let Some((blocks, rows)) = self.walk().blocks(op, rows, pairs)? else { return Ok(()) };
        let arguments = Arguments::new()
            .with(args.table)
            .with(args.positions)
            .with(args.qkv)
            .with(rows)
            .with(columns)
            .with(rotated as i32)
            .with(head_dim as i32)
            .with(if args.inverse { -1.0f32 } else { 1.0 });
        driver.launch(&launch(self.rotary, blocks, stream), &arguments)
    }

    /// Errors: rows that are no multiple of 16 bytes; an address that is none; more rows than the
    /// kernel counts; whatever the driver finds wrong.
    pub fn swiglu_forward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        rows: usize,
        ffn: usize,
        args: &SwiGluForward,
    ) -> Result<()> {
        let op = self.op("swiglu_forward");
        op.aligned(&[("inp", args.inp), ("out", args.out)])?;
        let Some((blocks, rows, ffn)) = self.swiglu_blocks(op, rows, ffn)? else { return Ok(()) };
        let arguments = Arguments::new().with(args.inp).with(args.out).with(rows).with(ffn);
        driver.launch(&launch(self.swiglu_forward, blocks, stream), &arguments)
    }

    /// Errors: as [`Pointwise::swiglu_forward`].
    pub fn swiglu_backward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        rows: usize,
        ffn: usize,
        args: &SwiGluBackward,
    ) -> Result<()> {
        let op = self.op("swiglu_backward");
        op.aligned(&[("inp", args.inp), ("d_out", args.d_out), ("d_inp", args.d_inp)])?;
        let Some((blocks, rows, ffn)) = self.swiglu_blocks(op, rows, ffn)? else { return Ok(()) };
        let arguments =
            Arguments::new().with(args.inp).with(args.d_out).with(args.d_inp).with(rows).with(ffn);
        driver.launch(&launch(self.swiglu_backward, blocks, stream), &arguments)
    }

    /// to += from, both activations. Errors: an address that is no multiple of 16 bytes; whatever
    /// the driver finds wrong.
    pub fn add(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        elements: u64,
        from: DevicePointer,
        to: DevicePointer,
    ) -> Result<()> {
        self.flat(driver, stream, ("add", self.add, vector(self.dtype)), elements, from, to)
    }

    /// to += from, both f32. Errors: as [`Pointwise::add`].
    pub fn add_f32(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        elements: u64,
        from: DevicePointer,
        to: DevicePointer,
    ) -> Result<()> {
        let kernel = ("add_f32", self.add_f32, vector(Dtype::F32));
        self.flat(driver, stream, kernel, elements, from, to)
    }

    /// to = from, f32 to bf16, to nearest, ties away from zero: as parameters are rounded.
    /// Errors: as [`Pointwise::add`].
    pub fn cast_to_bf16(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        elements: u64,
        from: DevicePointer,
        to: DevicePointer,
    ) -> Result<()> {
        let kernel = ("cast_to_bf16", self.cast_to_bf16, vector(Dtype::Bf16));
        self.flat(driver, stream, kernel, elements, from, to)
    }

    /// `kernel`: its name, itself, and how many elements a thread takes at once.
    fn flat(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        (name, kernel, vector): (&'static str, KernelId, usize),
        elements: u64,
        from: DevicePointer,
        to: DevicePointer,
    ) -> Result<()> {
        self.op(name).aligned(&[("from", from), ("to", to)])?;
        if elements == 0 {
            return Ok(());
        }
        // At least one block: its first threads take what does not fill a vector.
        let wanted = (elements / vector as u64).div_ceil(THREADS as u64).max(1);
        let blocks = wanted.min((self.multiprocessors * FLAT_BLOCKS) as u64) as u32;
        let arguments = Arguments::new().with(from).with(to).with(elements);
        driver.launch(&launch(kernel, blocks, stream), &arguments)
    }

    fn swiglu_blocks(&self, op: Rows, rows: usize, ffn: usize) -> Result<Option<(u32, i32, i32)>> {
        let vectors = op.vectors(self.dtype, ffn, "model.ffn")?;
        let ffn = op.count("columns", ffn, VECTOR_BYTES, "model.ffn")?;
        let blocks = self.walk().blocks(op, rows, vectors)?;
        Ok(blocks.map(|(blocks, rows)| (blocks, rows, ffn)))
    }

    fn walk(&self) -> Walk {
        let most_blocks = self.multiprocessors * ROW_BLOCKS;
        Walk { task_vectors: TASK_VECTORS, most_blocks }
    }

    fn op(&self, op: &'static str) -> Rows {
        Rows { op, device: self.device }
    }
}

fn launch(kernel: KernelId, blocks: u32, stream: StreamId) -> Launch {
    Launch::new(kernel, [blocks, 1, 1], [THREADS as u32, 1, 1]).on(stream)
}

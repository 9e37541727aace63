//! Launches kernels/embedding.cu: embedding lookup and the gradient of its table.
//!
//! [`Embedding`] knows the kernels for rows of one type and width; it launches them for any number
//! of tokens and any vocabulary. Nothing is allocated, and the backward pass needs no scratch.
//! Equal inputs give equal bits on machines with equally many multiprocessors.

use super::rows::{Rows, THREADS, WARP, Walk};
use super::{Arguments, DevicePointer, Driver, KernelId, Launch, StreamId};
use crate::backend;
use crate::config::Dtype;
use crate::error::Result;

/// Vectors of a row that a warp copies at once, and the blocks of a multiprocessor: COPIED and the
/// launch bounds of the kernels.
const COPIED_VECTORS: usize = 4 * WARP;
const FORWARD_BLOCKS: usize = 6;
const BACKWARD_BLOCKS: usize = 3;
/// Vectors of a row that a block of the backward pass adds up.
const GROUP_VECTORS: usize = WARP;
/// The largest second dimension of a grid.
const MAX_GROUPS: usize = 65535;
/// How far ahead of the last token the backward pass counts: two steps of the scan.
const SCANNED_AHEAD: usize = 2 * 4 * THREADS;

/// Addresses of [`Embedding::forward`]; a token outside the table ends the kernel with a trap.
pub type EmbeddingForward = backend::EmbeddingForward<DevicePointer>;
/// Addresses of [`Embedding::backward`]; tokens outside the table are left out.
pub type EmbeddingBackward = backend::EmbeddingBackward<DevicePointer>;

/// The kernels for rows of one type and width on one machine.
#[derive(Clone, Debug)]
pub struct Embedding {
    device: &'static str,
    columns: i32,
    /// Of a row.
    vectors: usize,
    multiprocessors: usize,
    forward: KernelId,
    backward: KernelId,
}

impl Embedding {
    /// Errors: rows that are no multiple of 16 bytes, or wider than a grid.
    pub fn new(driver: &mut dyn Driver, dtype: Dtype, columns: usize) -> Result<Self> {
        let op = Rows { op: "embedding", device: driver.device() };
        let vectors = op.vectors(dtype, columns, "model.hidden")?;
        let widest = MAX_GROUPS * GROUP_VECTORS;
        if vectors > widest {
            let most = widest * (columns / vectors);
            return Err(op.refusal(
                format!("rows of {columns} values; the kernel has at most {most}"),
                format!("choose model.hidden up to {most}"),
            ));
        }
        Ok(Embedding {
            device: op.device,
            columns: columns as i32,
            vectors,
            multiprocessors: driver.properties().multiprocessors as usize,
            forward: driver.kernel("embedding_forward")?,
            backward: driver.kernel(&format!("embedding_backward_{dtype}"))?,
        })
    }

    /// out[t] = table[tokens[t]]. Errors: an address of rows that is no multiple of 16 bytes; more
    /// rows than the kernel counts; whatever the driver finds wrong.
    pub fn forward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        rows: usize,
        vocab: usize,
        args: &EmbeddingForward,
    ) -> Result<()> {
        let op = self.op("embedding_forward");
        op.aligned(&[("table", args.table), ("out", args.out)])?;
        let vocab = op.count("tokens of the vocabulary", vocab, 0, "model.vocab")?;
        let most_blocks = self.multiprocessors * FORWARD_BLOCKS;
        let walk = Walk { task_vectors: COPIED_VECTORS, most_blocks };
        let Some((blocks, rows)) = walk.blocks(op, rows, self.vectors)? else { return Ok(()) };
        let arguments = Arguments::new()
            .with(args.tokens)
            .with(args.table)
            .with(args.out)
            .with(rows)
            .with(vocab)
            .with(self.vectors as i32);
        driver.launch(&launch(self.forward, [blocks, 1, 1], stream), &arguments)
    }

    /// d_table[tokens[t]] += d_out[t]. Errors: as [`Embedding::forward`].
    pub fn backward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        rows: usize,
        vocab: usize,
        args: &EmbeddingBackward,
    ) -> Result<()> {
        let op = self.op("embedding_backward");
        op.aligned(&[("tokens", args.tokens), ("d_out", args.d_out), ("d_table", args.d_table)])?;
        let counted_rows = op.count("tokens", rows, SCANNED_AHEAD, "train.micro_batch")?;
        let counted_vocab = op.count("tokens of the vocabulary", vocab, 0, "model.vocab")?;
        if rows == 0 || vocab == 0 {
            return Ok(());
        }
        let arguments = Arguments::new()
            .with(args.tokens)
            .with(args.d_out)
            .with(args.d_table)
            .with(counted_rows)
            .with(counted_vocab)
            .with(self.columns);
        let groups = self.vectors.div_ceil(GROUP_VECTORS);
        let grid = [self.id_sets(vocab, groups), groups as u32, 1];
        driver.launch(&launch(self.backward, grid, stream), &arguments)
    }

    /// In how many sets the ids are divided: the largest power of two with which all blocks are on
    /// the machine at once, and no more than there are ids.
    fn id_sets(&self, vocab: usize, groups: usize) -> u32 {
        let most = (self.multiprocessors * BACKWARD_BLOCKS / groups).min(vocab).max(1);
        1 << most.ilog2()
    }

    fn op(&self, op: &'static str) -> Rows {
        Rows { op, device: self.device }
    }
}

fn launch(kernel: KernelId, grid: [u32; 3], stream: StreamId) -> Launch {
    Launch::new(kernel, grid, [THREADS as u32, 1, 1]).on(stream)
}

//! What the launch layers of simple row kernels check alike: widths, addresses and counts.
//!
//! [`Rows`] names an op in errors. Kernels read and write 16 bytes at once and count in i32; what
//! does not fit is refused here, with the setting to change.

use super::DevicePointer;
use crate::config::Dtype;
use crate::error::{Error, Result};

pub(super) const VECTOR_BYTES: usize = 16;
pub(super) const WARP: usize = 32;
pub(super) const THREADS: usize = 256;
pub(super) const WARPS: usize = THREADS / WARP;

#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub op: &'static str,
    pub device: &'static str,
}

/// Values of a 16-byte vector.
pub(super) fn vector(dtype: Dtype) -> usize {
    VECTOR_BYTES / dtype.bytes()
}

impl Rows {
    /// Vectors of a row. Errors: it is no multiple of 16 bytes; `setting` is what chooses it.
    pub fn vectors(&self, dtype: Dtype, columns: usize, setting: &str) -> Result<usize> {
        let vector = vector(dtype);
        if columns == 0 || !columns.is_multiple_of(vector) {
            return Err(self.refusal(
                format!("rows of {columns} {dtype} values; {vector} are loaded at once"),
                format!("choose {setting} as a multiple of {vector}"),
            ));
        }
        Ok(columns / vector)
    }

    /// Errors: an address that 16 bytes cannot be loaded from.
    pub fn aligned(&self, addresses: &[(&str, DevicePointer)]) -> Result<()> {
        match addresses.iter().find(|(_, address)| address.0 % VECTOR_BYTES as u64 != 0) {
            None => Ok(()),
            Some((name, address)) => Err(self.refusal(
                format!("{name} at {:#x}; {VECTOR_BYTES} bytes are loaded at once", address.0),
                format!("let {name} begin at a multiple of {VECTOR_BYTES} bytes"),
            )),
        }
    }

    /// The count as a kernel takes it. Errors: counting to it in steps of `step` overflows an i32.
    pub fn count(&self, what: &str, count: usize, step: usize, setting: &str) -> Result<i32> {
        match count.checked_add(step).map(i32::try_from) {
            Some(Ok(_)) => Ok(count as i32),
            _ => Err(self.refusal(
                format!("{count} {what}; an i32 has to count them"),
                format!("choose a smaller {setting}"),
            )),
        }
    }

    pub fn refusal(&self, what: String, remedy: String) -> Error {
        Error::launch(self.op, self.device, what, remedy)
    }
}

/// How many blocks walk over the rows, where a warp takes `task_vectors` vectors of one at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    pub task_vectors: usize,
    /// As many as the machine holds.
    pub most_blocks: usize,
}

impl Walk {
    /// Blocks, and the number of rows as a kernel takes it; `None` where there is nothing to do.
    ///
    /// Errors: more tasks than an i32 counts.
    pub fn blocks(&self, op: Rows, rows: usize, row_vectors: usize) -> Result<Option<(u32, i32)>> {
        let tasks_of_row = row_vectors.div_ceil(self.task_vectors);
        let tasks = rows.saturating_mul(tasks_of_row);
        op.count("parts of rows", tasks, self.most_blocks * WARPS, "train.micro_batch")?;
        let blocks = tasks.div_ceil(WARPS).min(self.most_blocks) as u32;
        Ok((blocks > 0).then_some((blocks, rows as i32)))
    }
}

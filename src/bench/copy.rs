//! The ceiling of everything that moves bytes: a copy on the device, as its driver does it.

use super::report::Row;
use super::timing::{Copies, on_cpu, samples};
use crate::cuda::{Driver, StreamId};
use crate::error::Result;
use crate::predict::cost::Cost;

/// Bytes of f32 on a GPU: so many that L2 is no part of it. On the CPU machine, beyond a core's L2.
const GPU_BYTES: u64 = 1 << 30;
const CPU_BYTES: u64 = 16 << 20;

pub(super) fn row(driver: &mut dyn Driver, asked: Option<usize>) -> Result<Row> {
    let largest = if on_cpu(driver) { CPU_BYTES } else { GPU_BYTES };
    // Leaves room on a device that others use, too.
    let elements = (largest.min(driver.free_bytes()? / 4) / 4).max(1) as usize;
    let bytes = 4 * elements as u64;
    let cost = Cost::copy(4, elements);
    let copies = Copies::new(driver, cost.bytes, 2 * bytes, |buffers| {
        let from = buffers.normals("copied from", cost.dtype, elements)?;
        Ok((from, buffers.zeros("copied to", bytes)?))
    })?;
    let samples = samples(driver, asked);
    let timing = copies.time(driver, samples, |driver, &(from, to)| {
        driver.on_device(StreamId::MAIN, from, to, bytes)
    })?;
    copies.release(driver)?;
    Ok(Row::new(cost, &timing))
}

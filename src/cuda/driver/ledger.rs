//! Which memory a driver has given out.

use std::collections::BTreeMap;
use std::fmt;

use super::{Allocation, DevicePointer, MappedTensor, TensorMapSpec};
use crate::error::{Error, Result};

/// The live buffers of a driver.
#[derive(Default)]
pub struct Ledger {
    /// By address.
    buffers: BTreeMap<u64, Live>,
    /// Buffers so far.
    added: u64,
    removed: u64,
}

struct Live {
    bytes: u64,
    label: String,
    serial: u64,
    on_host: bool,
}

impl Ledger {
    pub fn add(&mut self, buffer: Allocation, label: &str) {
        self.insert(buffer, label, false);
    }

    /// One of [`Driver::allocate_host`].
    pub fn add_on_host(&mut self, buffer: Allocation, label: &str) {
        self.insert(buffer, label, true);
    }

    fn insert(&mut self, buffer: Allocation, label: &str, on_host: bool) {
        let (bytes, label, serial) = (buffer.bytes, label.to_string(), self.added);
        self.buffers.insert(buffer.address.0, Live { bytes, label, serial, on_host });
        self.added += 1;
    }

    /// Whether the buffer around the address lies in the host's memory.
    pub fn is_on_host(&self, address: DevicePointer) -> bool {
        self.buffer_at(address).is_some_and(|(_, buffer)| buffer.on_host)
    }

    /// Whether exactly this buffer was there.
    pub fn remove(&mut self, buffer: Allocation) -> bool {
        let found = self.buffers.get(&buffer.address.0).is_some_and(|it| it.bytes == buffer.bytes);
        let removed = found && self.buffers.remove(&buffer.address.0).is_some();
        self.removed += u64::from(removed);
        removed
    }

    /// Buffers that were released so far: as long as it stays, what was live is live.
    pub fn removed(&self) -> u64 {
        self.removed
    }

    pub fn addresses(&self) -> impl Iterator<Item = DevicePointer> + '_ {
        self.buffers.keys().map(|&address| DevicePointer(address))
    }

    /// Of the buffers in the device's memory.
    pub fn bytes(&self) -> u64 {
        let on_device = self.buffers.values().filter(|buffer| !buffer.on_host);
        on_device.map(|buffer| buffer.bytes).sum()
    }

    /// Whether the range lies in one buffer.
    pub fn holds(&self, from: DevicePointer, bytes: u64) -> bool {
        self.buffer_at(from).is_some_and(|(start, buffer)| {
            from.0.checked_add(bytes).is_some_and(|end| end <= start + buffer.bytes)
        })
    }

    /// The buffer with the nearest start at or below this address, and that start.
    fn buffer_at(&self, address: DevicePointer) -> Option<(u64, &Live)> {
        let (&start, buffer) = self.buffers.range(..=address.0).next_back()?;
        Some((start, buffer))
    }

    /// The tensor that a map of this spec is for. Errors: a rule of the spec, or the tensor does
    /// not lie in one buffer.
    pub fn tensor(&self, device: &str, spec: &TensorMapSpec) -> Result<MappedTensor> {
        let (address, bytes) = (spec.address, spec.extent_bytes()?);
        self.check(device, "map a tensor of", address, bytes)?;
        let serial = self.buffer_at(address).map_or(u64::MAX, |(_, buffer)| buffer.serial);
        Ok(MappedTensor { address, bytes, serial })
    }

    /// Whether the buffer that the tensor was mapped in is still there. An address says nothing:
    /// the next buffer may have it.
    pub fn has(&self, tensor: &MappedTensor) -> bool {
        let same = |(_, buffer): (u64, &Live)| buffer.serial == tensor.serial;
        self.buffer_at(tensor.address).is_some_and(same) && self.holds(tensor.address, tensor.bytes)
    }

    /// Errors: the range does not lie in one buffer; `action` is what was to be done with it.
    pub fn check(&self, device: &str, action: &str, from: DevicePointer, bytes: u64) -> Result<()> {
        if self.holds(from, bytes) {
            return Ok(());
        }
        let place = match self.buffer_at(from) {
            Some((start, Live { bytes, label, .. })) if from.0 < start + bytes => {
                format!("byte {} of `{label}`, which has {bytes}", from.0 - start)
            }
            _ => format!("{:#x}, in no buffer of this driver", from.0),
        };
        Err(Error::Device {
            device: device.to_string(),
            what: format!("{action} {bytes} bytes from {place}"),
            remedy: "check the offset and the number of elements".to_string(),
        })
    }
}

impl Ledger {
    /// Errors: a range that is not in one buffer of host memory.
    pub fn check_on_host(&self, device: &str, from: DevicePointer, bytes: u64) -> Result<()> {
        self.check(device, "access", from, bytes)?;
        if self.is_on_host(from) {
            return Ok(());
        }
        Err(Error::Device {
            device: device.to_string(),
            what: "bytes of the device's own memory are asked for".to_string(),
            remedy: "copy them with to_host, or allocate them with allocate_host".to_string(),
        })
    }

    /// Errors: a range that is not in one buffer, or two that overlap.
    pub fn check_copy(
        &self,
        device: &str,
        from: DevicePointer,
        to: DevicePointer,
        bytes: u64,
    ) -> Result<()> {
        self.check(device, "copy from: read", from, bytes)?;
        self.check(device, "copy to: write", to, bytes)?;
        if from.0 < to.0 + bytes && to.0 < from.0 + bytes {
            return Err(Error::Device {
                device: device.to_string(),
                what: format!("a copy of {bytes} bytes from {:#x} to {:#x} overlaps", from.0, to.0),
                remedy: "copy through a third buffer".to_string(),
            });
        }
        Ok(())
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} buffers, {} bytes", self.buffers.len(), self.bytes())
    }
}

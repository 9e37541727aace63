//! Small copies between the program and the device that nobody waits for: through pinned memory.
//!
//! What is sent is taken at once and copied in the order of the main stream. It goes through a ring
//! of sections, each of which is written again when its copies are known to have run: with room for
//! two steps, the program prepares one while the device is still busy with the one before. What is
//! read lies in one of two places until it is asked for.

use super::{Allocation, DevicePointer, Driver, EventId, StreamId};
use crate::backend::READINGS;
use crate::error::Result;

/// A step sends up to three arrays and a few numbers; these are two steps.
pub const SENT_SECTIONS: usize = 8;
/// Room for the few numbers.
const SENT_SCALARS_BYTES: usize = 4096;

/// Of the memory that a write which is not waited for passes through; `sent` as in
/// [`Transfers::new`].
pub fn section_bytes(sent: usize) -> usize {
    sent.next_multiple_of(256) + SENT_SCALARS_BYTES
}

/// Bytes of host memory that [`Transfers::new`] allocates.
pub fn transfer_bytes(sent: usize, read: usize) -> usize {
    SENT_SECTIONS * section_bytes(sent) + READINGS * read
}

/// What begins in a section begins at a multiple.
const ALIGNMENT: u64 = 16;

#[derive(Debug)]
pub struct Transfers {
    sections: Vec<Place>,
    /// The one that is written, and its bytes so far.
    section: usize,
    used: u64,
    readings: Vec<Place>,
    /// Readings begun so far.
    begun: usize,
}

/// Pinned memory that the device copies from or to.
#[derive(Debug)]
struct Place {
    memory: Allocation,
    /// After its last copy.
    copied: EventId,
    under_way: bool,
}

impl Place {
    fn new(driver: &mut dyn Driver, label: &str, bytes: u64) -> Result<Self> {
        let memory = driver.allocate_host(label, bytes)?;
        Ok(Place { memory, copied: driver.new_event()?, under_way: false })
    }

    fn wait(&mut self, driver: &mut dyn Driver) -> Result<()> {
        if self.under_way {
            driver.await_event(self.copied)?;
            self.under_way = false;
        }
        Ok(())
    }

    fn mark(&mut self, driver: &mut dyn Driver) -> Result<()> {
        self.under_way = true;
        driver.record(self.copied, StreamId::MAIN)
    }
}

impl Transfers {
    /// `sent`: bytes of the largest copy to the device that nobody waits for; `read`: of the
    /// largest reading. Allocates [`transfer_bytes`] of host
    /// memory.
    pub fn new(driver: &mut dyn Driver, sent: usize, read: usize) -> Result<Self> {
        let mut places = |label, count: usize, bytes: usize| -> Result<Vec<Place>> {
            (0..count).map(|_| Place::new(driver, label, bytes as u64)).collect()
        };
        let sections = places("what is sent, in host memory", SENT_SECTIONS, section_bytes(sent))?;
        let readings = places("what is read, in host memory", READINGS, read)?;
        Ok(Transfers { sections, section: 0, used: 0, readings, begun: 0 })
    }

    /// Copies to the device, after what is enqueued, and takes the bytes at once. Waits only for a
    /// section that was sent from several steps ago; or, where no section is as large, for the
    /// copy.
    pub fn send(&mut self, driver: &mut dyn Driver, bytes: &[u8], to: DevicePointer) -> Result<()> {
        let (count, size) = (bytes.len() as u64, self.sections[0].memory.bytes);
        if count > size {
            return driver.to_device(StreamId::MAIN, bytes, to);
        }
        if self.used + count > size {
            self.sections[self.section].mark(driver)?;
            self.section = (self.section + 1) % self.sections.len();
            self.used = 0;
            self.sections[self.section].wait(driver)?;
        }
        let from = self.sections[self.section].memory.address.offset(self.used);
        driver.host_bytes(from, count)?.copy_from_slice(bytes);
        self.used = (self.used + count).next_multiple_of(ALIGNMENT);
        driver.on_device(StreamId::MAIN, from, to, count)
    }

    /// Copies these ranges of device memory to one place, after what is enqueued; its number is for
    /// [`Transfers::finish_read`].
    pub fn begin_read(
        &mut self,
        driver: &mut dyn Driver,
        ranges: &[(DevicePointer, u64)],
    ) -> Result<usize> {
        let index = self.begun % self.readings.len();
        self.begun += 1;
        let place = &mut self.readings[index];
        assert!(!place.under_way, "more than {READINGS} readings at one time");
        let mut to = place.memory.address;
        for &(from, bytes) in ranges {
            driver.on_device(StreamId::MAIN, from, to, bytes)?;
            to = to.offset(bytes);
        }
        place.mark(driver)?;
        Ok(index)
    }

    /// What was copied there, as soon as it has been.
    pub fn finish_read(
        &mut self,
        driver: &mut dyn Driver,
        index: usize,
        bytes: &mut [u8],
    ) -> Result<()> {
        let place = &mut self.readings[index];
        place.wait(driver)?;
        let found = driver.host_bytes(place.memory.address, bytes.len() as u64)?;
        bytes.copy_from_slice(found);
        Ok(())
    }
}

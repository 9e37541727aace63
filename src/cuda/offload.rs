//! An update whose moments lie in host memory: they pass through the device in chunks.
//!
//! One stream brings a chunk in, the main stream updates it, a third one takes it back. There are
//! two slots on the device, so that the next chunk comes in, and the one before goes out, while one
//! is updated; host links carry both directions at once. The bits are those of moments on the
//! device.

use super::adamw::{AdamW, AdamWBuffers, FlatPart};
use super::{Allocation, DevicePointer, Driver, EventId, StreamId};
use crate::config::Dtype;
use crate::error::Result;

/// Chunks that are on the device at one time.
const SLOTS: usize = 2;

/// The slots and streams that every update of a device shares.
#[derive(Debug)]
pub struct Offload {
    /// Elements of a chunk.
    chunk: u64,
    slots: Vec<Slot>,
    incoming: StreamId,
    outgoing: StreamId,
    started: EventId,
}

/// Where the moments of one chunk are on the device.
#[derive(Debug)]
struct Slot {
    moments: [Allocation; 2],
    loaded: EventId,
    updated: EventId,
    stored: EventId,
}

impl Offload {
    /// `chunk`: elements, a multiple of 64. Allocates
    /// [`offload_bytes`](crate::backend::offload_bytes).
    pub fn new(driver: &mut dyn Driver, chunk: u64, moments: Dtype) -> Result<Self> {
        let bytes = chunk * moments.bytes() as u64;
        let slot = |driver: &mut dyn Driver| -> Result<Slot> {
            Ok(Slot {
                moments: [
                    driver.allocate("first moments of a chunk", bytes)?,
                    driver.allocate("second moments of a chunk", bytes)?,
                ],
                loaded: driver.new_event()?,
                updated: driver.new_event()?,
                stored: driver.new_event()?,
            })
        };
        Ok(Offload {
            chunk,
            slots: (0..SLOTS).map(|_| slot(driver)).collect::<Result<_>>()?,
            incoming: driver.new_stream()?,
            outgoing: driver.new_stream()?,
            started: driver.new_event()?,
        })
    }

    /// [`AdamW::launch`] on the main stream, with moments in host memory. What is enqueued on the
    /// main stream after it finds them updated.
    ///
    /// Errors: as [`AdamW::launch`].
    pub fn update(
        &self,
        driver: &mut dyn Driver,
        adamw: &AdamW,
        args: &AdamWBuffers,
    ) -> Result<()> {
        let part = adamw.part();
        // After the update before, whose copies out the main stream has waited for.
        driver.record(self.started, StreamId::MAIN)?;
        driver.wait(self.incoming, self.started)?;
        let chunks = part.elements.div_ceil(self.chunk);
        for index in 0..chunks {
            let slot = &self.slots[index as usize % SLOTS];
            if index >= SLOTS as u64 {
                driver.wait(self.incoming, slot.stored)?;
            }
            let range = index * self.chunk..part.elements.min((index + 1) * self.chunk);
            let bytes = (range.end - range.start) * part.moments.bytes() as u64;
            let on_host = host_moments(args, part, range.start);
            let on_device = slot.moments.map(|it| it.address);
            for (host, device) in on_host.into_iter().zip(on_device) {
                driver.on_device(self.incoming, host, device, bytes)?;
            }
            driver.record(slot.loaded, self.incoming)?;
            driver.wait(StreamId::MAIN, slot.loaded)?;
            let of_chunk = args.of_chunk(range.start, part, on_device);
            adamw.launch_range(driver, StreamId::MAIN, range, &of_chunk)?;
            driver.record(slot.updated, StreamId::MAIN)?;
            driver.wait(self.outgoing, slot.updated)?;
            for (host, device) in on_host.into_iter().zip(on_device) {
                driver.on_device(self.outgoing, device, host, bytes)?;
            }
            driver.record(slot.stored, self.outgoing)?;
        }
        // Copies out run in order: after the last one, all are done.
        match chunks.checked_sub(1) {
            Some(last) => driver.wait(StreamId::MAIN, self.slots[last as usize % SLOTS].stored),
            None => Ok(()),
        }
    }
}

fn host_moments(args: &AdamWBuffers, part: &FlatPart, at: u64) -> [DevicePointer; 2] {
    [args.moment1, args.moment2].map(|it| it.offset(at * part.moments.bytes() as u64))
}

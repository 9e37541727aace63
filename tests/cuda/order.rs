//! Whether work on several streams is ordered where it has to be, by vector clocks. simt runs work
//! at once, in the order in which it is enqueued, so that its bits say nothing of it.
//!
//! Two accesses to the same bytes, one of them a write, must be on one stream or have an event that
//! was waited for between them. A kernel is taken to write the whole of every buffer that it gets.

use std::collections::HashMap;
use std::ops::Range;

use isobath::cuda::{Allocation, Arguments, DevicePointer, EventId, Reach, StreamId};

/// Of each stream, how much of its work has happened.
type Clock = HashMap<u32, u64>;

struct Access {
    bytes: Range<u64>,
    writes: bool,
    stream: u32,
    at: u64,
}

#[derive(Default)]
pub struct Order {
    buffers: Vec<Range<u64>>,
    accesses: Vec<Access>,
    streams: HashMap<u32, Clock>,
    /// What the program has waited for: copies from and to its own memory return when they are
    /// done.
    host: Clock,
    events: HashMap<u32, Clock>,
    pub waits: u64,
    /// This wait, counted from 0, is left out.
    without: Option<u64>,
    /// What is not ordered.
    pub races: Vec<String>,
}

fn merge(into: &mut Clock, from: &Clock) {
    for (&stream, &at) in from {
        let known = into.entry(stream).or_default();
        *known = at.max(*known);
    }
}

impl Order {
    /// `without`: a wait to leave out, counted from 0.
    pub fn new(without: Option<u64>) -> Self {
        Order { without, ..Order::default() }
    }

    pub fn allocated(&mut self, buffer: Allocation) {
        self.buffers.push(buffer.address.0..buffer.address.0 + buffer.bytes);
    }

    pub fn launched(&mut self, stream: StreamId, arguments: &Arguments) {
        let buffers = arguments.reaches().filter_map(|reach| match reach {
            Reach::From(address) => self.buffers.iter().find(|it| it.contains(&address.0)).cloned(),
            _ => None,
        });
        let accesses: Vec<_> = buffers.map(|bytes| (bytes, true)).collect();
        self.happens(stream, accesses);
    }

    pub fn copied(
        &mut self,
        stream: StreamId,
        from: Option<DevicePointer>,
        to: Option<DevicePointer>,
        bytes: u64,
        returns_when_done: bool,
    ) {
        let range = |at: DevicePointer| at.0..at.0 + bytes;
        let read = from.map(|from| (range(from), false));
        let written = to.map(|to| (range(to), true));
        self.happens(stream, read.into_iter().chain(written).collect());
        if returns_when_done {
            merge(&mut self.host, &self.streams[&stream.0]);
        }
    }

    fn happens(&mut self, stream: StreamId, accesses: Vec<(Range<u64>, bool)>) {
        let clock = self.streams.entry(stream.0).or_default();
        merge(clock, &self.host);
        let at = clock.entry(stream.0).or_default();
        *at += 1;
        let at = *at;
        for (bytes, writes) in accesses {
            for before in &self.accesses {
                let meets = before.bytes.start < bytes.end && bytes.start < before.bytes.end;
                let known = clock.get(&before.stream).copied().unwrap_or(0);
                if meets && (writes || before.writes) && known < before.at {
                    self.races.push(format!(
                        "{bytes:#x?} on stream {} and {:#x?} on stream {}",
                        stream.0, before.bytes, before.stream
                    ));
                }
            }
            self.accesses.push(Access { bytes, writes, stream: stream.0, at });
        }
    }

    pub fn recorded(&mut self, event: EventId, stream: StreamId) {
        let clock = self.streams.entry(stream.0).or_default().clone();
        self.events.insert(event.0, clock);
    }

    /// The program reads or writes it by itself.
    pub fn touched_by_host(&mut self, at: DevicePointer, bytes: u64) {
        let bytes = at.0..at.0 + bytes;
        for before in &self.accesses {
            let meets = before.bytes.start < bytes.end && bytes.start < before.bytes.end;
            if meets && self.host.get(&before.stream).copied().unwrap_or(0) < before.at {
                let (other, stream) = (&before.bytes, before.stream);
                self.races
                    .push(format!("{bytes:#x?} by the host and {other:#x?} on stream {stream}"));
            }
        }
    }

    /// Counted as a wait, too.
    pub fn awaited(&mut self, event: EventId) {
        let left_out = self.without == Some(self.waits);
        self.waits += 1;
        if !left_out {
            merge(&mut self.host, &self.events[&event.0]);
        }
    }

    pub fn waited(&mut self, stream: StreamId, event: EventId) {
        let left_out = self.without == Some(self.waits);
        self.waits += 1;
        if !left_out {
            merge(self.streams.entry(stream.0).or_default(), &self.events[&event.0]);
        }
    }
}

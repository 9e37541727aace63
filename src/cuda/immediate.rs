//! A driver over a machine of this process: its memory is the host's, streams are in order, and
//! work runs at once, so that what a kernel does wrong is the error of its own launch.
//!
//! What the two machines without a GPU share: simt (host/), and the one for PTX in the tests. All
//! that a driver answers for (ids, ranges, capture, dependent launches) is here; a [`Machine`] only
//! has memory and runs kernels.

use std::ptr;
use std::time::Instant;

use super::driver::*;
use super::overlap::Overlap;
use crate::error::Result;
use crate::host_memory::{self, HostMemory};

/// Runs kernels on this CPU.
///
/// # Safety
///
/// What [`Machine::allocate`] returned is initialised memory of at least so many bytes until
/// [`Machine::free`], and no Rust reference points into it but in [`Machine::run`].
pub unsafe trait Machine {
    const DEVICE: &'static str;
    /// See [`Driver::process_bytes`].
    const PROCESS_BYTES: u64;

    /// The address of `bytes`, of which there is one at least, at a multiple of 256; `None`: there
    /// are not so many.
    fn allocate(&mut self, label: &str, bytes: u64) -> Option<u64>;
    /// `address` is of [`Machine::allocate`] and has not been freed.
    fn free(&mut self, address: u64);

    /// `None`: there is none of this name. Errors: it cannot be read.
    fn kernel(&mut self, name: &str) -> Result<Option<KernelId>>;
    fn kernel_names(&self) -> Vec<String>;
    /// `None`: the id is not of this machine.
    fn kernel_info(&self, kernel: KernelId) -> Option<&KernelInfo>;
    /// A map that the kernels read. `spec` keeps all rules.
    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<[u64; 16]>;
    /// To its end. Launch and arguments have been checked: there are as many as parameters, each of
    /// its parameter's size. Errors: whatever the kernel did wrong.
    fn run(&self, launch: &Launch, arguments: &Arguments) -> Result<()>;
}

/// What a captured stream was asked to do.
#[derive(Clone)]
enum Recorded {
    Launch(Launch, Arguments),
    Copy { from: DevicePointer, to: DevicePointer, bytes: u64 },
    Fill { to: DevicePointer, bytes: u64, value: u8 },
}

pub struct Immediate<M: Machine> {
    machine: M,
    properties: Properties,
    memory: Ledger,
    streams: u32,
    events: Vec<Option<Instant>>,
    capture: Capture,
    overlap: Overlap,
    recorded: Vec<Recorded>,
    /// `None`: released.
    graphs: Vec<Option<Vec<Recorded>>>,
}

impl<M: Machine> Immediate<M> {
    /// `name` is that of its [`Properties`]. The limits of a block and of a multiprocessor are
    /// those of an H100, memory is the host's.
    pub fn over(machine: M, name: &str, multiprocessors: u32) -> Self {
        let properties = Properties {
            name: name.to_string(),
            compute_capability: (9, 0),
            multiprocessors,
            memory_bytes: HostMemory::now().total.unwrap_or(0),
            l2_bytes: 0,
            shared_bytes_per_block: 232_448,
            shared_bytes_per_multiprocessor: 233_472,
            max_threads_per_block: 1024,
            max_threads_per_multiprocessor: 2048,
            clock_mhz: 0,
            driver_version: "none".to_string(),
        };
        Immediate {
            machine,
            properties,
            memory: Ledger::default(),
            streams: 1,
            events: vec![],
            capture: Capture::default(),
            overlap: Overlap::default(),
            recorded: vec![],
            graphs: vec![],
        }
    }

    pub(super) fn machine(&self) -> &M {
        &self.machine
    }

    /// For its settings only: what it has allocated is known to the ledger here.
    pub(super) fn machine_mut(&mut self) -> &mut M {
        &mut self.machine
    }

    fn check_stream(&self, stream: StreamId) -> Result<()> {
        if stream.0 < self.streams { Ok(()) } else { Err(foreign(M::DEVICE, "stream")) }
    }

    fn event(&self, event: EventId) -> Result<Option<Instant>> {
        let found = self.events.get(event.0 as usize).copied();
        found.ok_or_else(|| foreign(M::DEVICE, "event"))
    }

    /// Runs it, or records it if its stream is being captured.
    fn enqueue(&mut self, stream: StreamId, work: Recorded) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        if self.capture.records(M::DEVICE, stream)? {
            self.recorded.push(work);
            return Ok(());
        }
        self.execute(&work)
    }

    /// Checks again what it reaches, because a buffer may have been released since it was recorded.
    fn execute(&self, work: &Recorded) -> Result<()> {
        match work {
            Recorded::Launch(launch, arguments) => {
                check_arguments(
                    M::DEVICE,
                    self.kernel_info(launch.kernel)?,
                    arguments,
                    &self.memory,
                )?;
                self.machine.run(launch, arguments)
            }
            Recorded::Copy { from, to, bytes } => {
                self.memory.check(M::DEVICE, "copy", *from, *bytes)?;
                self.memory.check(M::DEVICE, "copy", *to, *bytes)?;
                // SAFETY: both ranges lie in live buffers of ours (just checked); they may
                // overlap. No kernel runs now: a launch returns when it has ended.
                unsafe { ptr::copy(from.0 as *const u8, to.0 as *mut u8, *bytes as usize) };
                Ok(())
            }
            Recorded::Fill { to, bytes, value } => {
                self.memory.check(M::DEVICE, "fill", *to, *bytes)?;
                // SAFETY: as above.
                unsafe { ptr::write_bytes(to.0 as *mut u8, *value, *bytes as usize) };
                Ok(())
            }
        }
    }
}

impl<M: Machine> Driver for Immediate<M> {
    fn device(&self) -> &'static str {
        M::DEVICE
    }

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.capture.forbid(M::DEVICE, "an allocation")?;
        let address = if bytes == 0 { None } else { self.machine.allocate(label, bytes) };
        let Some(address) = address else {
            return Err(no_memory(M::DEVICE, label, bytes, self.free_bytes()?));
        };
        let buffer = Allocation { address: DevicePointer(address), bytes };
        self.memory.add(buffer, label);
        Ok(buffer)
    }

    /// All memory of this machine is the host's; it is counted as a GPU's driver counts it.
    fn allocate_host(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        let buffer = self.allocate(label, bytes)?;
        self.fill(StreamId::MAIN, buffer.address, bytes, 0)?;
        self.memory.add_on_host(buffer, label);
        Ok(buffer)
    }

    fn allocated_bytes(&self) -> u64 {
        self.memory.bytes()
    }

    fn release(&mut self, buffer: Allocation) -> Result<()> {
        self.capture.forbid(M::DEVICE, "a release")?;
        if !self.memory.remove(buffer) {
            return Err(foreign(M::DEVICE, "buffer"));
        }
        self.machine.free(buffer.address.0);
        Ok(())
    }

    fn process_bytes(&self) -> u64 {
        M::PROCESS_BYTES
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(host_memory::available_bytes())
    }

    fn peak_bytes(&self) -> Option<u64> {
        host_memory::peak_of_process()
    }

    fn kernel(&mut self, name: &str) -> Result<KernelId> {
        let found = self.machine.kernel(name)?;
        found.ok_or_else(|| no_such_kernel(M::DEVICE, name, &self.kernel_names()))
    }

    fn kernel_info(&self, kernel: KernelId) -> Result<&KernelInfo> {
        self.machine.kernel_info(kernel).ok_or_else(|| foreign(M::DEVICE, "kernel"))
    }

    fn kernel_names(&self) -> Vec<String> {
        self.machine.kernel_names()
    }

    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap> {
        let tensor = self.memory.tensor(M::DEVICE, spec)?;
        Ok(TensorMap { opaque: self.machine.tensor_map(spec)?, tensor })
    }

    fn overlap(&mut self, on: bool) {
        self.overlap.turn(on);
    }

    fn launch(&mut self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let info = self.kernel_info(launch.kernel)?;
        let launch = &self.overlap.decide(&self.properties, info, launch);
        check_launch(M::DEVICE, &self.properties, info, launch)?;
        check_arguments(M::DEVICE, info, arguments, &self.memory)?;
        self.check_stream(launch.stream)?;
        let recorded = self.capture.records(M::DEVICE, launch.stream)?;
        self.overlap.launched(launch);
        if !recorded {
            return self.machine.run(launch, arguments);
        }
        self.recorded.push(Recorded::Launch(*launch, arguments.clone()));
        Ok(())
    }

    fn to_device(&mut self, stream: StreamId, from: &[u8], to: DevicePointer) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(M::DEVICE, "a copy from host memory")?;
        self.memory.check(M::DEVICE, "write", to, from.len() as u64)?;
        // SAFETY: the target lies in a live buffer of ours, which no Rust reference points into.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.0 as *mut u8, from.len()) };
        Ok(())
    }

    fn to_host(&mut self, stream: StreamId, from: DevicePointer, to: &mut [u8]) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(M::DEVICE, "a copy to host memory")?;
        self.memory.check(M::DEVICE, "read", from, to.len() as u64)?;
        // SAFETY: the source lies in a live buffer of ours, written whole when it was allocated.
        unsafe { ptr::copy_nonoverlapping(from.0 as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn host_bytes(&mut self, at: DevicePointer, bytes: u64) -> Result<&mut [u8]> {
        self.capture.forbid(M::DEVICE, "an access to host memory")?;
        self.memory.check_on_host(M::DEVICE, at, bytes)?;
        // SAFETY: the range lies in a live buffer of ours, written whole when it was allocated; no
        // other reference into it outlives the borrow of `self`, and no kernel runs.
        Ok(unsafe { std::slice::from_raw_parts_mut(at.0 as *mut u8, bytes as usize) })
    }

    fn on_device(
        &mut self,
        stream: StreamId,
        from: DevicePointer,
        to: DevicePointer,
        bytes: u64,
    ) -> Result<()> {
        self.memory.check_copy(M::DEVICE, from, to, bytes)?;
        self.enqueue(stream, Recorded::Copy { from, to, bytes })
    }

    fn fill(&mut self, stream: StreamId, to: DevicePointer, bytes: u64, value: u8) -> Result<()> {
        self.memory.check(M::DEVICE, "fill", to, bytes)?;
        self.enqueue(stream, Recorded::Fill { to, bytes, value })
    }

    fn new_stream(&mut self) -> Result<StreamId> {
        self.streams += 1;
        Ok(StreamId(self.streams - 1))
    }

    fn new_event(&mut self) -> Result<EventId> {
        self.events.push(None);
        Ok(EventId(self.events.len() as u32 - 1))
    }

    fn record(&mut self, event: EventId, stream: StreamId) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(M::DEVICE, "an event")?;
        self.event(event)?;
        self.events[event.0 as usize] = Some(Instant::now());
        Ok(())
    }

    /// Work runs at once: it is over already.
    fn wait(&mut self, stream: StreamId, event: EventId) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(M::DEVICE, "a wait")?;
        self.event(event).map(|_| ())
    }

    fn elapsed_ms(&mut self, from: EventId, to: EventId) -> Result<f64> {
        self.capture.forbid(M::DEVICE, "waiting for an event")?;
        let at = |event| self.event(event)?.ok_or_else(|| not_recorded(M::DEVICE));
        let (from, to) = (at(from)?, at(to)?);
        let milliseconds = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        Ok(if from <= to { milliseconds(from, to) } else { -milliseconds(to, from) })
    }

    /// As in [`Driver::wait`].
    fn await_event(&mut self, event: EventId) -> Result<()> {
        self.capture.forbid(M::DEVICE, "waiting for an event")?;
        self.event(event)?.map(|_| ()).ok_or_else(|| not_recorded(M::DEVICE))
    }

    fn synchronize(&mut self) -> Result<()> {
        self.capture.forbid(M::DEVICE, "waiting for the device")
    }

    fn begin_capture(&mut self, stream: StreamId) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.begin(M::DEVICE, stream)
    }

    fn end_capture(&mut self, stream: StreamId) -> Result<GraphId> {
        self.overlap.interrupted(stream);
        self.capture.end(M::DEVICE, stream)?;
        self.graphs.push(Some(std::mem::take(&mut self.recorded)));
        Ok(GraphId(self.graphs.len() as u32 - 1))
    }

    fn launch_graph(&mut self, graph: GraphId, stream: StreamId) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(M::DEVICE, "a graph")?;
        let Some(Some(work)) = self.graphs.get(graph.0 as usize) else {
            return Err(foreign(M::DEVICE, "graph"));
        };
        work.iter().try_for_each(|work| self.execute(work))
    }

    fn release_graph(&mut self, graph: GraphId) -> Result<()> {
        self.capture.forbid(M::DEVICE, "the release of a graph")?;
        let released = self.graphs.get_mut(graph.0 as usize).and_then(Option::take);
        released.map(|_| ()).ok_or_else(|| foreign(M::DEVICE, "graph"))
    }
}

impl<M: Machine> Drop for Immediate<M> {
    fn drop(&mut self) {
        for address in self.memory.addresses() {
            self.machine.free(address.0);
        }
    }
}

//! The driver whose machine is kernels/host: every kernel on this CPU, as device `simt`.
//!
//! Binds kernels/host/abi.h, either as it was linked into this program or from a shared library
//! (a changed kernel linked with the machine). Streams are in order, and work runs at once: what a
//! kernel does wrong is the error of its own launch, with every place named by file and line.

mod abi;
mod addresses;
mod options;

use std::cell::Cell;
use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::ptr;
use std::time::Instant;

use addresses::resolve_addresses;
pub(super) use options::number;
pub use options::{Asynchronous, Options, Order};

use super::driver::*;
use super::overlap::Overlap;
use crate::error::{Error, Result};
use crate::host_memory;

const DEVICE: &str = "simt";

struct Kernel {
    info: KernelInfo,
    name: CString,
}

/// What a captured stream was asked to do.
#[derive(Clone)]
enum Recorded {
    Launch(Launch, Arguments),
    Copy { from: DevicePointer, to: DevicePointer, bytes: u64 },
    Fill { to: DevicePointer, bytes: u64, value: u8 },
}

pub struct Host {
    machine: abi::Functions,
    options: Options,
    properties: Properties,
    kernels: Vec<Kernel>,
    memory: Ledger,
    streams: u32,
    events: Vec<Option<Instant>>,
    capture: Capture,
    overlap: Overlap,
    /// Launches so far that were dependent, recorded ones as often as they ran.
    dependent: Cell<u64>,
    recorded: Vec<Recorded>,
    /// `None`: released.
    graphs: Vec<Option<Vec<Recorded>>>,
}

/// Whether this program has the machine in it. Errors: why not.
pub fn present() -> Result<()> {
    match super::binaries::CXX {
        Ok(_) if cfg!(simt) => Ok(()),
        built => Err(Error::Device {
            device: DEVICE.to_string(),
            what: format!(
                "this build has no CPU machine for kernels: {}",
                built.err().unwrap_or("it was built without kernels/host")
            ),
            remedy: "install a C++20 compiler (g++ 12 or newer), or set CXX, and build again"
                .to_string(),
        }),
    }
}

impl Host {
    /// The machine in this program.
    pub fn new(options: Options) -> Result<Self> {
        present()?;
        #[cfg(simt)]
        return Ok(Self::with_machine(abi::Functions::linked(), options));
        #[cfg(not(simt))]
        unreachable!("present() is an error without cfg(simt); options {options:?}")
    }

    /// The machine and the kernels of a shared library, which stays loaded until the process ends:
    /// its workers do, too.
    pub fn load(library: &Path, options: Options) -> Result<Self> {
        let refuse = |error: libloading::Error| Error::Device {
            device: DEVICE.to_string(),
            what: match std::error::Error::source(&error) {
                // The linker's own words; the path is in them.
                Some(cause) => format!("cannot load it: {cause}"),
                None => format!("cannot load {}: {error}", library.display()),
            },
            remedy: "link the kernels and the whole machine into a shared library".to_string(),
        };
        // SAFETY: its initialisers only register kernels; it is never unloaded (`leak`), and its
        // functions are those of abi.h, which it was linked with.
        let machine = unsafe {
            let loaded = Box::leak(Box::new(libloading::Library::new(library).map_err(refuse)?));
            abi::Functions::of(loaded).map_err(refuse)?
        };
        Ok(Self::with_machine(machine, options))
    }

    fn with_machine(machine: abi::Functions, options: Options) -> Self {
        let properties = Properties {
            name: "simt (CPU)".to_string(),
            compute_capability: (9, 0),
            multiprocessors: options.multiprocessors,
            memory_bytes: host_memory::total_bytes(),
            l2_bytes: 0,
            shared_bytes_per_block: 232_448, // these four as an H100
            shared_bytes_per_multiprocessor: 233_472,
            max_threads_per_block: 1024,
            max_threads_per_multiprocessor: 2048,
            clock_mhz: 0,
            driver_version: "none".to_string(),
        };
        Host {
            kernels: kernels_of(&machine),
            machine,
            options,
            properties,
            memory: Ledger::default(),
            streams: 1,
            events: vec![],
            capture: Capture::default(),
            overlap: Overlap::default(),
            dependent: Cell::new(0),
            recorded: vec![],
            graphs: vec![],
        }
    }

    pub fn options(&self) -> Options {
        self.options
    }

    /// Another schedule for the launches from here on; the number of multiprocessors stays.
    pub fn set_options(&mut self, options: Options) {
        self.options = Options { multiprocessors: self.properties.multiprocessors, ..options };
    }

    /// Switches from one GPU thread to another so far, in the whole process.
    pub fn switches(&self) -> u64 {
        // SAFETY: takes and changes nothing.
        unsafe { (self.machine.switches)() }
    }

    /// Dependent launches that this driver ran so far.
    pub fn dependent_launches(&self) -> u64 {
        self.dependent.get()
    }

    fn find(&self, kernel: KernelId) -> Result<&Kernel> {
        self.kernels.get(kernel.0 as usize).ok_or_else(|| foreign(DEVICE, "kernel"))
    }

    fn check_stream(&self, stream: StreamId) -> Result<()> {
        if stream.0 < self.streams { Ok(()) } else { Err(foreign(DEVICE, "stream")) }
    }

    /// Runs it, or records it if its stream is being captured.
    fn enqueue(&mut self, stream: StreamId, work: Recorded) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        if self.capture.records(DEVICE, stream)? {
            self.recorded.push(work);
            return Ok(());
        }
        self.execute(&work)
    }

    fn execute(&self, work: &Recorded) -> Result<()> {
        match work {
            Recorded::Launch(launch, arguments) => {
                // Again, because a buffer may have been released since it was recorded.
                let info = &self.find(launch.kernel)?.info;
                check_arguments(DEVICE, info, arguments, &self.memory)?;
                self.run(launch, arguments)
            }
            Recorded::Copy { from, to, bytes } => {
                self.memory.check(DEVICE, "copy", *from, *bytes)?;
                self.memory.check(DEVICE, "copy", *to, *bytes)?;
                // SAFETY: both ranges lie in live buffers of ours (just checked); they may
                // overlap. No kernel runs now: a launch returns when it has ended.
                unsafe { ptr::copy(from.0 as *const u8, to.0 as *mut u8, *bytes as usize) };
                Ok(())
            }
            Recorded::Fill { to, bytes, value } => {
                self.memory.check(DEVICE, "fill", *to, *bytes)?;
                // SAFETY: as above.
                unsafe { ptr::write_bytes(to.0 as *mut u8, *value, *bytes as usize) };
                Ok(())
            }
        }
    }

    fn run(&self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let kernel = self.find(launch.kernel)?;
        self.dependent.set(self.dependent.get() + u64::from(launch.dependent));
        let shape = abi::Launch {
            grid: launch.grid,
            block: launch.block,
            cluster: launch.cluster,
            dynamic_shared_bytes: launch.dynamic_shared_bytes,
            cooperative: u32::from(launch.cooperative),
            dependent: u32::from(launch.dependent || self.options.dependent),
        };
        let pointers = arguments.pointers();
        let mut fault = ptr::null_mut();
        // SAFETY: the name is null-terminated; there are as many pointers as parameters, each to a
        // value of the parameter's size (check_arguments) that outlives the call; the machine
        // copies the values and writes one fault pointer.
        let failed = unsafe {
            (self.machine.launch)(
                kernel.name.as_ptr(),
                &shape,
                pointers.as_ptr(),
                &self.options.abi(),
                &mut fault,
            )
        };
        if failed == 0 {
            return Ok(());
        }
        Err(Error::Launch {
            kernel: kernel.info.name.clone(),
            device: DEVICE.to_string(),
            what: self.take_fault(fault),
            remedy: format!(
                "mend the kernel; the same schedule again: {}",
                self.options.variables()
            ),
        })
    }

    /// The text of a fault, its code addresses resolved; frees it.
    fn take_fault(&self, fault: *mut abi::Fault) -> String {
        if fault.is_null() {
            return "the machine gave no reason".to_string();
        }
        // SAFETY: the fault is ours, not null, and not used behind `fault_free`; its text is
        // null-terminated and lives as long as it.
        unsafe {
            let text = CStr::from_ptr((self.machine.fault_text)(fault)).to_string_lossy();
            let resolved = resolve_addresses(&text);
            (self.machine.fault_free)(fault);
            resolved
        }
    }
}

fn kernels_of(machine: &abi::Functions) -> Vec<Kernel> {
    let mut kernels = vec![];
    for index in 0.. {
        // SAFETY: the machine's kernels are static: registered before main and never removed. Their
        // strings are null-terminated, and there are `arguments` sizes.
        let Some(info) = (unsafe { (machine.kernel)(index).as_ref() }) else { break };
        let (name, sizes) = unsafe {
            let sizes = match info.arguments {
                0 => &[],
                count => std::slice::from_raw_parts(info.argument_bytes, count as usize),
            };
            (CStr::from_ptr(info.name).to_owned(), sizes)
        };
        let info = KernelInfo {
            name: name.to_string_lossy().into_owned(),
            parameter_bytes: Some(sizes.to_vec()),
            max_threads: info.max_threads,
            compiled_for: (9, 0),
            registers: None,
            local_bytes: 0,
            static_shared_bytes: None,
        };
        kernels.push(Kernel { info, name });
    }
    kernels
}

impl Driver for Host {
    fn device(&self) -> &'static str {
        DEVICE
    }

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.capture.forbid(DEVICE, "an allocation")?;
        let name = CString::new(label.replace('\0', " ")).expect("null bytes were replaced");
        let address = match bytes {
            0 => ptr::null_mut(),
            // SAFETY: the label is null-terminated and copied.
            _ => unsafe { (self.machine.allocate)(bytes, name.as_ptr()) },
        };
        if address.is_null() {
            return Err(no_memory(DEVICE, label, bytes, self.free_bytes()?));
        }
        let buffer = Allocation { address: DevicePointer(address as u64), bytes };
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
        self.capture.forbid(DEVICE, "a release")?;
        if !self.memory.remove(buffer) {
            return Err(foreign(DEVICE, "buffer"));
        }
        // SAFETY: the ledger had it, so it came from `allocate` and was not freed; no kernel runs.
        match unsafe { (self.machine.free)(buffer.address.0 as *mut c_void) } {
            0 => Ok(()),
            _ => Err(foreign(DEVICE, "buffer")),
        }
    }

    /// Program, workers and stacks of a training run of 0.5M parameters on two cores: 88 MiB RSS
    /// less 14 planned.
    fn process_bytes(&self) -> u64 {
        74 << 20
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(host_memory::available_bytes())
    }

    fn peak_bytes(&self) -> Option<u64> {
        host_memory::peak_of_process()
    }

    fn kernel(&mut self, name: &str) -> Result<KernelId> {
        match self.kernels.iter().position(|kernel| kernel.info.name == name) {
            Some(index) => Ok(KernelId(index as u32)),
            None => Err(no_such_kernel(DEVICE, name, &self.kernel_names())),
        }
    }

    fn kernel_info(&self, kernel: KernelId) -> Result<&KernelInfo> {
        Ok(&self.find(kernel)?.info)
    }

    fn kernel_names(&self) -> Vec<String> {
        self.kernels.iter().map(|kernel| kernel.info.name.clone()).collect()
    }

    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap> {
        let tensor = self.memory.tensor(DEVICE, spec)?;
        let mut opaque = [0u64; 16];
        // SAFETY: `Ledger::tensor` has checked that there are 1 to 5 dimensions, as many box
        // dimensions and one stride fewer; 128 bytes of the map are written.
        unsafe {
            (self.machine.tensor_map)(
                opaque.as_mut_ptr().cast(),
                spec.data_type as u32,
                spec.data_type.bytes() as u32,
                spec.dimensions.len() as u32,
                spec.address.0 as *mut c_void,
                spec.dimensions.as_ptr(),
                spec.stride_bytes.as_ptr(),
                spec.box_dimensions.as_ptr(),
                spec.swizzle.span_bytes().unwrap_or(0) as u32,
                u32::from(spec.fill == Fill::Nans),
            )
        };
        Ok(TensorMap { opaque, tensor })
    }

    fn overlap(&mut self, on: bool) {
        self.overlap.turn(on);
    }

    fn launch(&mut self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let info = &self.find(launch.kernel)?.info;
        let launch = &self.overlap.decide(&self.properties, info, launch);
        check_launch(DEVICE, &self.properties, info, launch)?;
        check_arguments(DEVICE, info, arguments, &self.memory)?;
        self.check_stream(launch.stream)?;
        let recorded = self.capture.records(DEVICE, launch.stream)?;
        self.overlap.launched(launch);
        if !recorded {
            return self.run(launch, arguments);
        }
        self.recorded.push(Recorded::Launch(*launch, arguments.clone()));
        Ok(())
    }

    fn to_device(&mut self, stream: StreamId, from: &[u8], to: DevicePointer) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(DEVICE, "a copy from host memory")?;
        self.memory.check(DEVICE, "write", to, from.len() as u64)?;
        // SAFETY: the target lies in a live buffer of ours, which no Rust reference points into.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.0 as *mut u8, from.len()) };
        Ok(())
    }

    fn to_host(&mut self, stream: StreamId, from: DevicePointer, to: &mut [u8]) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(DEVICE, "a copy to host memory")?;
        self.memory.check(DEVICE, "read", from, to.len() as u64)?;
        // SAFETY: the source lies in a live buffer of ours, written whole when it was allocated.
        unsafe { ptr::copy_nonoverlapping(from.0 as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn host_bytes(&mut self, at: DevicePointer, bytes: u64) -> Result<&mut [u8]> {
        self.capture.forbid(DEVICE, "an access to host memory")?;
        self.memory.check_on_host(DEVICE, at, bytes)?;
        // SAFETY: the range lies in a live buffer of ours, written whole when it was allocated; no other
        // reference into it outlives the borrow of `self`, and no kernel runs.
        Ok(unsafe { std::slice::from_raw_parts_mut(at.0 as *mut u8, bytes as usize) })
    }

    fn on_device(
        &mut self,
        stream: StreamId,
        from: DevicePointer,
        to: DevicePointer,
        bytes: u64,
    ) -> Result<()> {
        self.memory.check_copy(DEVICE, from, to, bytes)?;
        self.enqueue(stream, Recorded::Copy { from, to, bytes })
    }

    fn fill(&mut self, stream: StreamId, to: DevicePointer, bytes: u64, value: u8) -> Result<()> {
        self.memory.check(DEVICE, "fill", to, bytes)?;
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
        self.capture.forbid(DEVICE, "an event")?;
        let slot = self.events.get_mut(event.0 as usize).ok_or_else(|| foreign(DEVICE, "event"))?;
        *slot = Some(Instant::now());
        Ok(())
    }

    fn wait(&mut self, stream: StreamId, event: EventId) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(DEVICE, "a wait")?;
        match self.events.get(event.0 as usize) {
            Some(_) => Ok(()), // work runs at once: it is over already
            None => Err(foreign(DEVICE, "event")),
        }
    }

    fn elapsed_ms(&mut self, from: EventId, to: EventId) -> Result<f64> {
        self.capture.forbid(DEVICE, "waiting for an event")?;
        let at = |event: EventId| match self.events.get(event.0 as usize) {
            Some(Some(instant)) => Ok(*instant),
            Some(None) => Err(not_recorded(DEVICE)),
            None => Err(foreign(DEVICE, "event")),
        };
        let (from, to) = (at(from)?, at(to)?);
        let milliseconds = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        Ok(if from <= to { milliseconds(from, to) } else { -milliseconds(to, from) })
    }

    fn await_event(&mut self, event: EventId) -> Result<()> {
        self.capture.forbid(DEVICE, "waiting for an event")?;
        match self.events.get(event.0 as usize) {
            Some(Some(_)) => Ok(()), // work runs at once: it is over already
            Some(None) => Err(not_recorded(DEVICE)),
            None => Err(foreign(DEVICE, "event")),
        }
    }

    fn synchronize(&mut self) -> Result<()> {
        self.capture.forbid(DEVICE, "waiting for the device")
    }

    fn begin_capture(&mut self, stream: StreamId) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.begin(DEVICE, stream)
    }

    fn end_capture(&mut self, stream: StreamId) -> Result<GraphId> {
        self.overlap.interrupted(stream);
        self.capture.end(DEVICE, stream)?;
        self.graphs.push(Some(std::mem::take(&mut self.recorded)));
        Ok(GraphId(self.graphs.len() as u32 - 1))
    }

    fn launch_graph(&mut self, graph: GraphId, stream: StreamId) -> Result<()> {
        self.check_stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.forbid(DEVICE, "a graph")?;
        let Some(Some(work)) = self.graphs.get(graph.0 as usize) else {
            return Err(foreign(DEVICE, "graph"));
        };
        work.iter().try_for_each(|work| self.execute(work))
    }

    fn release_graph(&mut self, graph: GraphId) -> Result<()> {
        self.capture.forbid(DEVICE, "the release of a graph")?;
        let released = self.graphs.get_mut(graph.0 as usize).and_then(Option::take);
        released.map(|_| ()).ok_or_else(|| foreign(DEVICE, "graph"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for address in self.memory.addresses() {
            // SAFETY: the ledger's buffers came from `allocate` and were not freed; no kernel runs.
            unsafe { (self.machine.free)(address.0 as *mut c_void) };
        }
    }
}

//! What the CUDA backend asks of a machine: memory, kernels, launches, streams, events, graphs.
//!
//! [`Driver`] has two implementations: a GPU (nvidia/), and immediate.rs for the machines of this
//! process, which are the CPU machine (host/) and one for PTX in the tests. All rules that a
//! launch, an argument list or a tensor map must keep stand here, once, and are checked before any
//! machine sees them: what simt accepts, the GPU accepts. A driver owns what it allocates;
//! addresses outside that are refused. Kernels are part of this program and trusted: a launch that
//! passes these checks and still writes elsewhere is a bug that simt names.

mod arguments;
mod capture;
mod launch;
mod ledger;
mod tensor_map;

pub use arguments::{Argument, Arguments, Reach};
pub use capture::Capture;
pub use launch::{Launch, RESERVED_SHARED_BYTES, check_arguments, check_launch};
pub use ledger::Ledger;
pub use tensor_map::{
    Fill, L2Promotion, MappedTensor, Swizzle, TensorMap, TensorMapSpec, TensorType,
};

use crate::config::nearest;
use crate::error::{Error, Result};
use crate::sensors::Sensors;

/// An address in the device's memory; null is allowed as an argument of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct DevicePointer(pub u64);

impl DevicePointer {
    pub const NULL: Self = DevicePointer(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: u64) -> Self {
        DevicePointer(self.0 + bytes)
    }
}

/// A buffer of a driver, until [`Driver::release`]; aligned to 256 bytes, contents undefined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allocation {
    pub address: DevicePointer,
    pub bytes: u64,
}

/// Ids are places in a driver's own tables; one that it did not give is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KernelId(pub u32);

/// Work on one stream runs in order. [`StreamId::MAIN`] always exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamId(pub u32);

impl StreamId {
    pub const MAIN: Self = StreamId(0);
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EventId(pub u32);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GraphId(pub u32);

/// What a machine is and how much it holds.
#[derive(Clone, PartialEq, Debug, serde::Serialize)]
pub struct Properties {
    /// "NVIDIA H200", "simt (CPU)".
    pub name: String,
    pub compute_capability: (u32, u32),
    pub multiprocessors: u32,
    pub memory_bytes: u64,
    pub l2_bytes: u64,
    /// Static and dynamic shared memory of one block, at most.
    pub shared_bytes_per_block: u64,
    pub shared_bytes_per_multiprocessor: u64,
    pub max_threads_per_block: u32,
    pub max_threads_per_multiprocessor: u32,
    /// The highest clock of the multiprocessors; 0: not known.
    pub clock_mhz: u32,
    /// The CUDA version that the installed driver offers, "13.0".
    pub driver_version: String,
}

/// A kernel as it was compiled for this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KernelInfo {
    pub name: String,
    /// Bytes of each parameter; `None` where the driver cannot tell (CUDA before 12.4).
    pub parameter_bytes: Option<Vec<u32>>,
    /// Of a block: the launch bounds, or fewer where registers run out.
    pub max_threads: u32,
    /// The compute capability whose instructions its code has: that of the GPU, or less where it
    /// was compiled from PTX for older ones.
    pub compiled_for: (u32, u32),
    /// Registers of a thread; `None` on the CPU.
    pub registers: Option<u32>,
    /// Spilled bytes of a thread.
    pub local_bytes: u32,
    /// At least: a GPU's driver refuses what is too much. `None` on the CPU, where a variable is
    /// known once a block has come to its declaration; the machine adds them up then and holds them
    /// to the same limit.
    pub static_shared_bytes: Option<u32>,
}

/// One machine. Ids and addresses of one driver mean nothing to another.
///
/// Launches, fills and device copies are enqueued; on a GPU, their failures may come out of a
/// later call. Copies from and to host memory return when they are done. While a stream is being
/// captured, only launches, fills and device copies on it are allowed (see [`Capture`]).
pub trait Driver {
    /// "cuda" or "simt", as `--device` names it.
    fn device(&self) -> &'static str;
    fn properties(&self) -> &Properties;

    /// Errors: no memory; `label` names the buffer there and in faults.
    fn allocate(&mut self, label: &str, bytes: u64) -> Result<Allocation>;
    /// A buffer of zeros in the host's memory that never moves, for [`Driver::on_device`] to copy
    /// from and to while kernels run; everything else may reach it, too, but slowly. Errors: no
    /// memory.
    fn allocate_host(&mut self, label: &str, bytes: u64) -> Result<Allocation>;
    /// Of all live buffers in this machine's memory.
    fn allocated_bytes(&self) -> u64;
    /// After all work that uses it has run. Errors: not a live buffer of this driver.
    fn release(&mut self, buffer: Allocation) -> Result<()>;
    /// Bytes of this machine's memory that the process takes besides buffers and that
    /// [`Driver::free_bytes`] does not leave out by itself, as measured.
    fn process_bytes(&self) -> u64 {
        0
    }
    /// Bytes that the driver itself will take of [`Driver::free_bytes`] besides buffers; estimated.
    fn reserve_bytes(&self) -> u64 {
        0
    }
    /// Bytes that can still be allocated.
    fn free_bytes(&self) -> Result<u64>;
    /// The most bytes that the process had at one time, buffers and all else; `None` where nobody
    /// keeps count of that.
    fn peak_bytes(&self) -> Option<u64> {
        None
    }
    /// Bytes of a memory of the machine's own that nobody has taken now; `None` where it is the
    /// host's, of which other programs take and give back all the time.
    fn own_free_bytes(&self) -> Option<u64> {
        None
    }
    /// `None` where there are none to read.
    fn sensors(&self) -> Option<Sensors> {
        None
    }

    /// Whether what is enqueued runs later, while the program goes on.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Errors: no kernel of this name, and which there are.
    fn kernel(&mut self, name: &str) -> Result<KernelId>;
    fn kernel_info(&self, kernel: KernelId) -> Result<&KernelInfo>;
    /// All kernels of this build for this machine.
    fn kernel_names(&self) -> Vec<String>;

    /// Of use until the tensor's buffer is released. Errors: a rule of [`TensorMapSpec`], or a
    /// tensor that leaves its buffer.
    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap>;

    /// Whether launches from here on are dependent where that is allowed (see overlap.rs); at first
    /// they are not. All kernels must have the wait for it.
    fn overlap(&mut self, on: bool);
    /// Errors: a rule of [`check_launch`] or [`check_arguments`]; on machines of
    /// this process also whatever the kernel did wrong.
    fn launch(&mut self, launch: &Launch, arguments: &Arguments) -> Result<()>;

    fn to_device(&mut self, stream: StreamId, from: &[u8], to: DevicePointer) -> Result<()>;
    fn to_host(&mut self, stream: StreamId, from: DevicePointer, to: &mut [u8]) -> Result<()>;
    /// Bytes of a buffer of [`Driver::allocate_host`], to be read and written at once: copies from
    /// and to them that may still be under way are the caller's to wait for, see
    /// [`Driver::await_event`].
    fn host_bytes(&mut self, at: DevicePointer, bytes: u64) -> Result<&mut [u8]>;
    /// Errors: the ranges overlap.
    fn on_device(
        &mut self,
        stream: StreamId,
        from: DevicePointer,
        to: DevicePointer,
        bytes: u64,
    ) -> Result<()>;
    fn fill(&mut self, stream: StreamId, to: DevicePointer, bytes: u64, value: u8) -> Result<()>;

    fn new_stream(&mut self) -> Result<StreamId>;
    fn new_event(&mut self) -> Result<EventId>;
    fn record(&mut self, event: EventId, stream: StreamId) -> Result<()>;
    /// What is enqueued on `stream` from now on runs after `event`'s last record.
    fn wait(&mut self, stream: StreamId, event: EventId) -> Result<()>;
    /// Milliseconds from one recorded event to another; waits for both.
    fn elapsed_ms(&mut self, from: EventId, to: EventId) -> Result<f64>;
    /// Waits until what was enqueued before the event has run, and for nothing after it.
    fn await_event(&mut self, event: EventId) -> Result<()>;
    /// Returns when everything on all streams has run; errors are those of the work itself.
    fn synchronize(&mut self) -> Result<()>;

    /// From here on, work on `stream` is recorded and does not run.
    fn begin_capture(&mut self, stream: StreamId) -> Result<()>;
    fn end_capture(&mut self, stream: StreamId) -> Result<GraphId>;
    /// Everything that was recorded, with the arguments of that time.
    fn launch_graph(&mut self, graph: GraphId, stream: StreamId) -> Result<()>;
    /// The graph is not launched again.
    fn release_graph(&mut self, graph: GraphId) -> Result<()>;
}

impl dyn Driver + '_ {
    /// A new buffer with these values in it.
    pub fn upload<T: bytemuck::NoUninit>(
        &mut self,
        label: &str,
        values: &[T],
    ) -> Result<Allocation> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = self.allocate(label, bytes.len() as u64)?;
        self.to_device(StreamId::MAIN, bytes, buffer.address)?;
        Ok(buffer)
    }

    /// `count` values from `from` on, after everything before has run on the main stream.
    pub fn download<T: bytemuck::Pod>(
        &mut self,
        from: DevicePointer,
        count: usize,
    ) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); count];
        self.to_host(StreamId::MAIN, from, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

/// [`Driver::reserve_bytes`] of every GPU, in plans, too: graphs, kernels' code that is loaded when
/// it is first asked for, and what allocations are rounded up to (2 MiB each). Estimated, not
/// measured.
pub const GPU_RESERVE_BYTES: u64 = 512 << 20;

// ------------------------------------------------------------------ errors of both machines

/// What makes a training run smaller on the device, and leaves it the same.
pub const MEMORY_REMEDY: &str = "lower train.micro_batch (and raise train.grad_accumulation by as \
                                 much), raise train.recompute, set optimizer.offload to true, or \
                                 end what else uses the device's memory";

pub(in crate::cuda) fn no_memory(device: &str, label: &str, bytes: u64, free: u64) -> Error {
    let what = match bytes {
        0 => format!("`{label}` has no bytes"),
        _ => format!("no memory for the {bytes} bytes of `{label}`; {free} bytes are free"),
    };
    let remedy = match bytes {
        0 => "allocate at least one byte",
        _ => MEMORY_REMEDY,
    };
    Error::Device { device: device.to_string(), what, remedy: remedy.to_string() }
}

pub(in crate::cuda) fn not_recorded(device: &str) -> Error {
    Error::Device {
        device: device.to_string(),
        what: "this event was never recorded".to_string(),
        remedy: "record both events before asking for the time between them".to_string(),
    }
}

/// An id that another driver gave.
pub(in crate::cuda) fn foreign(device: &str, what: &str) -> Error {
    Error::Device {
        device: device.to_string(),
        what: format!("this {what} is of another driver"),
        remedy: format!("use a {what} that this driver gave"),
    }
}

/// There is no kernel `name`; the nearest names that there are.
pub(in crate::cuda) fn no_such_kernel(device: &str, name: &str, names: &[String]) -> Error {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    Error::Device {
        device: device.to_string(),
        what: format!("none of the {} kernels of this build is `{name}`", names.len()),
        remedy: nearest::some_of(name, &names, 5),
    }
}

//! The driver whose machine is an NVIDIA GPU, through cudarc's bindings of libcuda.
//!
//! libcuda is opened when it is first needed: the program builds, starts and explains itself where
//! it is missing. cudarc panics on a missing library or symbol, so both are looked for before. The
//! machine code of every kernel file comes with the program (binaries.rs); a file without code for
//! this GPU is an error only for those who ask for its kernels.

mod errors;
mod functions;
mod pending;
mod presence;
mod tensor_map;

use std::ffi::{CString, c_int, c_uint, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream};

pub use errors::remedy_of;
use errors::{is_kernel_fault, text_of};
use functions::{attributes_of, info_of, load_whole, names_in};
pub use pending::{Pending, suspects};
use presence::{absent, cannot_open, driver_version, has_function, properties_of};
pub use presence::{
    check_driver, check_gpu, check_index, kernels_present, library_present, present,
};

use super::GRAPHS;
use super::binaries;
use super::driver::*;
use super::nvml;
use super::overlap::Overlap;
use crate::error::{Error, Result};
use crate::host_memory;
use crate::sensors::Sensors;

const DEVICE: &str = "cuda";

/// Graphs can hold dependent launches from here on.
const OLDEST_WITH_OVERLAP: i32 = 12_030;

struct Module {
    file: &'static str,
    module: sys::CUmodule,
}

struct Kernel {
    info: KernelInfo,
    function: sys::CUfunction,
    /// Dynamic shared memory that was asked for so far.
    shared_bytes_allowed: u32,
}

/// What a captured stream was asked to do, as far as released buffers matter to it.
#[derive(Default)]
struct Captured {
    launches: Vec<(KernelId, Arguments)>,
    /// Of copies and fills.
    ranges: Vec<(DevicePointer, u64)>,
}

struct Graph {
    graph: CudaGraph,
    captured: Captured,
    /// [`Ledger::removed`] when all buffers of `captured` were last seen to be live.
    checked: u64,
}

struct Event {
    event: CudaEvent,
    recorded: Option<Recorded>,
}

/// Where an event was recorded.
#[derive(Clone, Copy)]
struct Recorded {
    stream: StreamId,
    /// [`Pending::count`] before it.
    launches: u64,
}

pub struct Nvidia {
    properties: Properties,
    kernels: Vec<Kernel>,
    /// Names that the modules list; empty where the driver cannot list them (CUDA before 12.4).
    names: Vec<String>,
    /// Kernel files without code for this GPU.
    unusable: Vec<&'static str>,
    pending: Pending,
    memory: Ledger,
    capture: Capture,
    captured: Captured,
    overlap: Overlap,
    /// Whether the driver has all that dependent launches need.
    can_overlap: bool,
    // In the order in which they are given back; the context goes last.
    /// `None`: released.
    graphs: Vec<Option<Graph>>,
    events: Vec<Event>,
    streams: Vec<Arc<CudaStream>>,
    modules: Vec<Module>,
    context: Arc<CudaContext>,
}

impl Nvidia {
    /// The `ordinal`-th GPU that CUDA_VISIBLE_DEVICES leaves. Errors: whatever is missing.
    pub fn open(ordinal: usize) -> Result<Self> {
        present()?;
        let driver_version = driver_version()?;
        check_driver(driver_version)?;
        let gpus = CudaContext::device_count().map_err(cannot_open)?;
        check_index(ordinal, gpus as usize)?;
        let context = CudaContext::new(ordinal).map_err(cannot_open)?;
        // SAFETY: no memory has been allocated; every order between streams is made by `wait`.
        unsafe { context.disable_event_tracking() };
        let properties = properties_of(&context, driver_version).map_err(cannot_open)?;
        check_gpu(&properties.name, properties.compute_capability)?;
        // The default stream cannot be captured.
        let stream = context.new_stream().map_err(cannot_open)?;
        let mut driver = Nvidia {
            properties,
            kernels: vec![],
            names: vec![],
            unusable: vec![],
            pending: Pending::default(),
            memory: Ledger::default(),
            capture: Capture::default(),
            captured: Captured::default(),
            overlap: Overlap::default(),
            can_overlap: driver_version >= OLDEST_WITH_OVERLAP,
            graphs: vec![],
            events: vec![],
            streams: vec![stream],
            modules: vec![],
            context,
        };
        for (file, fatbin) in binaries::FATBINS {
            driver.load(file, fatbin)?;
        }
        driver.names.sort();
        Ok(driver)
    }

    fn load(&mut self, file: &'static str, fatbin: &[u8]) -> Result<()> {
        // Bytes of the program are aligned to one byte, a fatbin wants eight.
        let mut aligned = vec![0u64; fatbin.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..fatbin.len()].copy_from_slice(fatbin);
        // SAFETY: a fatbin that nvcc wrote says itself how long it is; the driver copies it.
        let module = match unsafe { result::module::load_data(aligned.as_ptr().cast()) } {
            Ok(module) => module,
            Err(DriverError(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)) => {
                self.unusable.push(file);
                return Ok(());
            }
            Err(error) => return Err(self.cannot_load(file, error)),
        };
        self.modules.push(Module { file, module });
        if has_function("cuModuleEnumerateFunctions") && has_function("cuFuncGetName") {
            let names = names_in(module).map_err(|error| self.cannot_load(file, error))?;
            self.names.extend(names);
        }
        Ok(())
    }

    fn cannot_load(&self, file: &str, error: DriverError) -> Error {
        absent(
            format!(
                "cannot load the kernels of {file}.cu (compiled by nvcc {}, the driver offers \
                 CUDA {}): {}",
                binaries::NVCC.unwrap_or("unknown"),
                self.properties.driver_version,
                text_of(error)
            ),
            remedy_of(
                error.0,
                "update the driver, or build with an nvcc that is not newer than it",
            ),
        )
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| self.failed(error))
    }

    fn stream(&self, stream: StreamId) -> Result<&Arc<CudaStream>> {
        self.streams.get(stream.0 as usize).ok_or_else(|| foreign(DEVICE, "stream"))
    }

    fn find(&self, kernel: KernelId) -> Result<&Kernel> {
        self.kernels.get(kernel.0 as usize).ok_or_else(|| foreign(DEVICE, "kernel"))
    }

    fn event(&self, event: EventId) -> Result<&Event> {
        self.events.get(event.0 as usize).ok_or_else(|| foreign(DEVICE, "event"))
    }

    /// What an error of the driver means: mostly that a kernel that was launched before failed.
    fn failed(&self, error: DriverError) -> Error {
        if !is_kernel_fault(error.0) || self.pending.is_empty() {
            let remedy = "see dmesg and nvidia-smi; start the program again";
            return absent(text_of(error), remedy_of(error.0, remedy));
        }
        let pending = self.pending.latest_first().filter_map(|kernel| self.find(kernel).ok());
        let (kernel, hint) = suspects(pending.map(|kernel| kernel.info.name.as_str()));
        Error::Launch {
            kernel,
            device: DEVICE.to_string(),
            what: text_of(error) + &hint,
            remedy: format!(
                "run it with --device simt --race, or with {GRAPHS}=0 CUDA_LAUNCH_BLOCKING=1 to see \
                 which"
            ),
        }
    }

    /// A capture could not begin, or gave no graph.
    fn cannot_record(&self, error: DriverError) -> Error {
        if is_kernel_fault(error.0) {
            return self.failed(error);
        }
        absent(
            format!("cannot record a graph: {}", text_of(error)),
            remedy_of(error.0, format!("set {GRAPHS}=0 to launch kernel by kernel, and report it")),
        )
    }

    /// Asks for dynamic shared memory: above 48 KiB, with the static part, a kernel has to.
    fn allow_shared(&mut self, id: KernelId, bytes: u32) -> Result<()> {
        let device_error = {
            let kernel = self.find(id)?;
            if bytes <= kernel.shared_bytes_allowed {
                return Ok(());
            }
            // SAFETY: the function belongs to a module that lives as long as `self`.
            unsafe {
                result::function::set_function_attribute(
                    kernel.function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    bytes as c_int,
                )
            }
        };
        device_error.map_err(|error| self.refused(id, error))?;
        self.kernels[id.0 as usize].shared_bytes_allowed = bytes;
        Ok(())
    }

    /// The driver did not take a launch.
    fn refused(&self, kernel: KernelId, error: DriverError) -> Error {
        if is_kernel_fault(error.0) {
            return self.failed(error);
        }
        let remedy = match error.0 {
            CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE => {
                "launch as many blocks as fit at once, and let each take several tiles"
            }
            CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES => {
                "use fewer threads, or lower the kernel's registers by its launch bounds"
            }
            CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE => "use smaller clusters",
            _ => "check grid, block, cluster and shared memory",
        };
        Error::Launch {
            kernel: self.find(kernel).map(|it| it.info.name.clone()).unwrap_or_default(),
            device: DEVICE.to_string(),
            what: text_of(error),
            remedy: remedy_of(error.0, remedy),
        }
    }
}

/// Page-locked, of use in every context, and mapped for the device.
const PINNED: u32 = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;

fn no_host_memory(label: &str, bytes: u64, available: u64) -> Error {
    Error::Memory {
        device: format!("{DEVICE}'s host"),
        needed: bytes,
        available,
        table: format!("  {label}: {} MiB, page-locked", bytes >> 20),
        remedy: "set optimizer.moments to bf16, or optimizer.offload to false".to_string(),
    }
}

impl Driver for Nvidia {
    fn device(&self) -> &'static str {
        DEVICE
    }

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.capture.forbid(DEVICE, "an allocation")?;
        self.bind()?;
        if bytes == 0 {
            return Err(no_memory(DEVICE, label, 0, self.free_bytes()?));
        }
        // SAFETY: the context is bound; nobody takes the contents for values before they are
        // written.
        let address = match unsafe { result::malloc_sync(bytes as usize) } {
            Ok(address) => address,
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(no_memory(DEVICE, label, bytes, self.free_bytes()?));
            }
            Err(error) => return Err(self.failed(error)),
        };
        let buffer = Allocation { address: DevicePointer(address), bytes };
        self.memory.add(buffer, label);
        Ok(buffer)
    }

    fn allocate_host(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.capture.forbid(DEVICE, "an allocation")?;
        self.bind()?;
        let available = host_memory::available_bytes();
        if bytes == 0 {
            return Err(no_memory(DEVICE, label, 0, available));
        }
        if bytes > available {
            return Err(no_host_memory(label, bytes, available));
        }
        // SAFETY: the context is bound; the contents are written before anybody reads them.
        let allocated = unsafe { result::malloc_host(bytes as usize, PINNED) };
        let address = match allocated {
            Ok(address) => address,
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(no_host_memory(label, bytes, available));
            }
            Err(error) => return Err(self.failed(error)),
        };
        // SAFETY: `malloc_host` gave as many bytes, which nobody else knows yet.
        unsafe { ptr::write_bytes(address.cast::<u8>(), 0, bytes as usize) };
        // With unified addresses, which every GPU with these kernels has, the device knows it by
        // the same one.
        let buffer = Allocation { address: DevicePointer(address as u64), bytes };
        self.memory.add_on_host(buffer, label);
        Ok(buffer)
    }

    fn allocated_bytes(&self) -> u64 {
        self.memory.bytes()
    }

    fn release(&mut self, buffer: Allocation) -> Result<()> {
        self.capture.forbid(DEVICE, "a release")?;
        self.bind()?;
        let on_host = self.memory.is_on_host(buffer.address);
        if !self.memory.remove(buffer) {
            return Err(foreign(DEVICE, "buffer"));
        }
        if on_host {
            self.context.synchronize().map_err(|error| self.failed(error))?;
            // SAFETY: it came from `malloc_host` and was not freed; no work is left that uses it.
            return unsafe { result::free_host(buffer.address.0 as *mut c_void) }
                .map_err(|error| self.failed(error));
        }
        // SAFETY: the ledger had it, so it came from `malloc_sync` and was not freed; cuMemFree
        // waits for the work that uses it.
        unsafe { result::free_sync(buffer.address.0) }.map_err(|error| self.failed(error))
    }

    fn free_bytes(&self) -> Result<u64> {
        let (free, _) = self.context.mem_get_info().map_err(|error| self.failed(error))?;
        Ok(free as u64)
    }

    fn reserve_bytes(&self) -> u64 {
        GPU_RESERVE_BYTES
    }

    fn own_free_bytes(&self) -> Option<u64> {
        self.free_bytes().ok()
    }

    fn sensors(&self) -> Option<Sensors> {
        let uuid = self.context.uuid().ok()?;
        nvml::sensors(&nvml::uuid_text(uuid.bytes.map(|byte| byte as u8)))
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn kernel(&mut self, name: &str) -> Result<KernelId> {
        if let Some(index) = self.kernels.iter().position(|kernel| kernel.info.name == name) {
            return Ok(KernelId(index as u32));
        }
        self.bind()?;
        let symbol = CString::new(name).map_err(|_| no_such_kernel(DEVICE, name, &self.names))?;
        for Module { file, module } in &self.modules {
            // SAFETY: the module is loaded; the name is null-terminated.
            let function = match unsafe { result::module::get_function(*module, symbol.clone()) } {
                Ok(function) => function,
                Err(DriverError(CUresult::CUDA_ERROR_NOT_FOUND)) => continue,
                Err(error) => return Err(self.cannot_load(file, error)),
            };
            let info = load_whole(function).and_then(|()| info_of(name, function));
            let info = info.map_err(|error| self.cannot_load(file, error))?;
            self.kernels.push(Kernel { info, function, shared_bytes_allowed: 0 });
            return Ok(KernelId(self.kernels.len() as u32 - 1));
        }
        if self.unusable.is_empty() {
            return Err(no_such_kernel(DEVICE, name, &self.names));
        }
        let (major, minor) = self.properties.compute_capability;
        Err(absent(
            format!(
                "no kernel `{name}` for {} (compute capability {major}.{minor}); {}.cu has no code \
                 for it, this build is for {}",
                self.properties.name,
                self.unusable.join(".cu, "),
                binaries::ARCHITECTURES
            ),
            "use the kernels for sm_80, or build for this GPU's architecture",
        ))
    }

    fn kernel_info(&self, kernel: KernelId) -> Result<&KernelInfo> {
        Ok(&self.find(kernel)?.info)
    }

    fn kernel_names(&self) -> Vec<String> {
        self.names.clone()
    }

    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap> {
        let tensor = self.memory.tensor(DEVICE, spec)?;
        let (major, minor) = self.properties.compute_capability;
        if major < 9 {
            return Err(absent(
                format!(
                    "{} has compute capability {major}.{minor}, TMA needs 9.0",
                    self.properties.name
                ),
                "use the kernels for sm_80",
            ));
        }
        self.bind()?;
        let rank = spec.dimensions.len();
        let mut strides = [0; 5];
        strides[..rank - 1].copy_from_slice(spec.stride_bytes);
        let element_strides = [1; 5];
        let mut map = MaybeUninit::<sys::CUtensorMap>::uninit();
        // SAFETY: `Ledger::tensor` has checked that there are 1 to 5 dimensions and as many box
        // dimensions; the map is written whole on success, and only read then.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                tensor_map::data_type(spec.data_type),
                rank as u32,
                spec.address.0 as *mut _,
                spec.dimensions.as_ptr(),
                strides.as_ptr(),
                spec.box_dimensions.as_ptr(),
                element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                tensor_map::swizzle(spec.swizzle),
                tensor_map::l2_promotion(spec.l2_promotion),
                tensor_map::fill(spec.fill),
            )
            .result()
            .map(|()| map.assume_init())
        };
        match encoded {
            Ok(map) => Ok(TensorMap { opaque: map.opaque, tensor }),
            Err(error) => Err(Error::TensorMap {
                what: format!("{spec:?}: {}", text_of(error)),
                remedy: "keep the rules of cuTensorMapEncodeTiled".to_string(),
            }),
        }
    }

    fn overlap(&mut self, on: bool) {
        self.overlap.turn(on && self.can_overlap);
    }

    fn launch(&mut self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let info = &self.find(launch.kernel)?.info;
        let launch = &self.overlap.decide(&self.properties, info, launch);
        check_launch(DEVICE, &self.properties, info, launch)?;
        check_arguments(DEVICE, info, arguments, &self.memory)?;
        let stream = self.stream(launch.stream)?.cu_stream();
        let recorded = self.capture.records(DEVICE, launch.stream)?;
        self.bind()?;
        self.allow_shared(launch.kernel, launch.dynamic_shared_bytes)?;
        let mut attributes = attributes_of(launch);
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.dynamic_shared_bytes,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as c_uint,
        };
        let mut pointers = arguments.pointers();
        let function = self.find(launch.kernel)?.function;
        // SAFETY: function and stream are live and of this context; there is one pointer for each
        // parameter, to a value of its size (check_arguments); the driver copies the values, and
        // the attributes, before it returns.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), ptr::null_mut())
        };
        launched.result().map_err(|error| self.refused(launch.kernel, error))?;
        self.overlap.launched(launch);
        if recorded {
            self.captured.launches.push((launch.kernel, arguments.clone()));
        } else {
            self.pending.launched(launch.kernel, launch.stream);
        }
        Ok(())
    }

    fn to_device(&mut self, stream: StreamId, from: &[u8], to: DevicePointer) -> Result<()> {
        self.overlap.interrupted(stream);
        self.capture.forbid(DEVICE, "a copy from host memory")?;
        self.memory.check(DEVICE, "write", to, from.len() as u64)?;
        self.bind()?;
        let to_wait_for = self.stream(stream)?;
        // SAFETY: the target lies in a live buffer of ours; `from` outlives the copy, because the
        // stream is waited for.
        unsafe { result::memcpy_htod_async(to.0, from, to_wait_for.cu_stream()) }
            .and_then(|()| to_wait_for.synchronize())
            .map_err(|error| self.failed(error))?;
        self.pending.finished(stream);
        Ok(())
    }

    fn to_host(&mut self, stream: StreamId, from: DevicePointer, to: &mut [u8]) -> Result<()> {
        self.overlap.interrupted(stream);
        self.capture.forbid(DEVICE, "a copy to host memory")?;
        self.memory.check(DEVICE, "read", from, to.len() as u64)?;
        self.bind()?;
        let to_wait_for = self.stream(stream)?;
        // SAFETY: as in `to_device`.
        unsafe { result::memcpy_dtoh_async(to, from.0, to_wait_for.cu_stream()) }
            .and_then(|()| to_wait_for.synchronize())
            .map_err(|error| self.failed(error))?;
        self.pending.finished(stream);
        Ok(())
    }

    fn host_bytes(&mut self, at: DevicePointer, bytes: u64) -> Result<&mut [u8]> {
        self.capture.forbid(DEVICE, "an access to host memory")?;
        self.memory.check_on_host(DEVICE, at, bytes)?;
        // SAFETY: the range lies in a live buffer of host memory, which was written when it was
        // allocated; no other reference into it outlives the borrow of `self`, and the caller has
        // waited for copies.
        Ok(unsafe { std::slice::from_raw_parts_mut(at.0 as *mut u8, bytes as usize) })
    }

    fn on_device(
        &mut self,
        stream: StreamId,
        from: DevicePointer,
        to: DevicePointer,
        bytes: u64,
    ) -> Result<()> {
        self.overlap.interrupted(stream);
        self.memory.check_copy(DEVICE, from, to, bytes)?;
        if self.capture.records(DEVICE, stream)? {
            self.captured.ranges.extend([(from, bytes), (to, bytes)]);
        }
        self.bind()?;
        let stream = self.stream(stream)?.cu_stream();
        // SAFETY: both ranges lie in live buffers of ours and do not overlap. Where a buffer lies,
        // the driver tells from its unified address.
        unsafe { sys::cuMemcpyAsync(to.0, from.0, bytes as usize, stream) }
            .result()
            .map_err(|error| self.failed(error))
    }

    fn fill(&mut self, stream: StreamId, to: DevicePointer, bytes: u64, value: u8) -> Result<()> {
        self.overlap.interrupted(stream);
        self.memory.check(DEVICE, "fill", to, bytes)?;
        if self.capture.records(DEVICE, stream)? {
            self.captured.ranges.push((to, bytes));
        }
        self.bind()?;
        let stream = self.stream(stream)?.cu_stream();
        // SAFETY: the range lies in a live buffer of ours.
        unsafe { result::memset_d8_async(to.0, value, bytes as usize, stream) }
            .map_err(|error| self.failed(error))
    }

    fn new_stream(&mut self) -> Result<StreamId> {
        let stream = self.context.new_stream().map_err(|error| self.failed(error))?;
        self.streams.push(stream);
        Ok(StreamId(self.streams.len() as u32 - 1))
    }

    fn new_event(&mut self) -> Result<EventId> {
        let with_timing = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = self.context.new_event(with_timing).map_err(|error| self.failed(error))?;
        self.events.push(Event { event, recorded: None });
        Ok(EventId(self.events.len() as u32 - 1))
    }

    fn record(&mut self, event: EventId, stream: StreamId) -> Result<()> {
        self.overlap.interrupted(stream);
        self.capture.forbid(DEVICE, "an event")?;
        let recorded = self.event(event)?.event.record(self.stream(stream)?);
        recorded.map_err(|error| self.failed(error))?;
        let recorded = Recorded { stream, launches: self.pending.count() };
        self.events[event.0 as usize].recorded = Some(recorded);
        Ok(())
    }

    fn wait(&mut self, stream: StreamId, event: EventId) -> Result<()> {
        self.overlap.interrupted(stream);
        self.capture.forbid(DEVICE, "a wait")?;
        let waiting = self.stream(stream)?.wait(&self.event(event)?.event);
        waiting.map_err(|error| self.failed(error))
    }

    fn elapsed_ms(&mut self, from: EventId, to: EventId) -> Result<f64> {
        self.capture.forbid(DEVICE, "waiting for an event")?;
        let (from, to) = (self.event(from)?, self.event(to)?);
        if from.recorded.is_none() || to.recorded.is_none() {
            return Err(not_recorded(DEVICE));
        }
        let elapsed = from.event.elapsed_ms(&to.event).map_err(|error| self.failed(error))?;
        Ok(f64::from(elapsed))
    }

    fn await_event(&mut self, event: EventId) -> Result<()> {
        self.capture.forbid(DEVICE, "waiting for an event")?;
        let Event { event, recorded } = self.event(event)?;
        let Some(Recorded { stream, launches }) = *recorded else {
            return Err(not_recorded(DEVICE));
        };
        event.synchronize().map_err(|error| self.failed(error))?;
        self.pending.finished_before(stream, launches);
        Ok(())
    }

    fn synchronize(&mut self) -> Result<()> {
        self.capture.forbid(DEVICE, "waiting for the device")?;
        let done = self.context.synchronize().and_then(|()| self.context.check_err());
        done.map_err(|error| self.failed(error))?;
        self.pending.all_finished();
        Ok(())
    }

    fn begin_capture(&mut self, stream: StreamId) -> Result<()> {
        self.stream(stream)?;
        self.overlap.interrupted(stream);
        self.capture.begin(DEVICE, stream)?;
        self.captured = Captured::default();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let begun = self.stream(stream)?.begin_capture(mode);
        begun.map_err(|error| {
            self.capture = Capture::default();
            self.cannot_record(error)
        })
    }

    fn end_capture(&mut self, stream: StreamId) -> Result<GraphId> {
        self.overlap.interrupted(stream);
        self.capture.end(DEVICE, stream)?;
        let ended = self.stream(stream)?.end_capture(sys::CUgraphInstantiate_flags(0));
        let Some(graph) = ended.map_err(|error| self.cannot_record(error))? else {
            return Err(absent("the capture gave no graph", "record at least one launch"));
        };
        // Else the first launch would allocate what the graph takes on the device.
        graph.upload().map_err(|error| self.cannot_record(error))?;
        let captured = std::mem::take(&mut self.captured);
        self.graphs.push(Some(Graph { graph, captured, checked: self.memory.removed() }));
        Ok(GraphId(self.graphs.len() as u32 - 1))
    }

    fn launch_graph(&mut self, graph: GraphId, on: StreamId) -> Result<()> {
        self.overlap.interrupted(on);
        self.capture.forbid(DEVICE, "a graph")?;
        self.bind()?;
        let Some(Some(Graph { graph: recorded, captured, checked })) =
            self.graphs.get(graph.0 as usize)
        else {
            return Err(foreign(DEVICE, "graph"));
        };
        let removed = self.memory.removed();
        if *checked != removed {
            for (kernel, arguments) in &captured.launches {
                check_arguments(DEVICE, &self.find(*kernel)?.info, arguments, &self.memory)?;
            }
            for &(from, bytes) in &captured.ranges {
                self.memory.check(DEVICE, "copy or fill", from, bytes)?;
            }
        }
        let stream = self.stream(on)?.cu_stream();
        // SAFETY: the graph was instantiated in this context, was not released, and every buffer
        // that it uses is live (just checked, or none was released since).
        unsafe { result::graph::launch(recorded.cu_graph_exec(), stream) }
            .map_err(|error| self.failed(error))?;
        let kernels: Vec<KernelId> = captured.launches.iter().map(|(kernel, _)| *kernel).collect();
        kernels.into_iter().for_each(|kernel| self.pending.launched(kernel, on));
        self.graphs[graph.0 as usize].iter_mut().for_each(|graph| graph.checked = removed);
        Ok(())
    }

    fn release_graph(&mut self, graph: GraphId) -> Result<()> {
        self.capture.forbid(DEVICE, "the release of a graph")?;
        self.bind()?;
        // CUDA frees a graph that still runs when it has ended.
        let released = self.graphs.get_mut(graph.0 as usize).and_then(Option::take);
        released.map(|_| ()).ok_or_else(|| foreign(DEVICE, "graph"))
    }
}

impl Drop for Nvidia {
    /// Waits for all work, then gives back memory and modules. Errors have nowhere to go: after a
    /// kernel fault the context is gone, and with it everything in it.
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        self.graphs.clear();
        for address in self.memory.addresses() {
            let _ = match self.memory.is_on_host(address) {
                // SAFETY: the ledger's buffers on the host came from `malloc_host` and were not
                // freed; no work is left that could use them.
                true => unsafe { result::free_host(address.0 as *mut c_void) },
                // SAFETY: as above; the others came from `malloc_sync`.
                false => unsafe { result::free_sync(address.0) },
            };
        }
        for Module { module, .. } in &self.modules {
            // SAFETY: loaded in `open`, unloaded only here; graphs that hold its kernels are gone.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}

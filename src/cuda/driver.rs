//! What the CUDA backend asks of a machine: memory, kernels, launches, streams, events, graphs.
//!
//! [`Driver`] has two implementations, a GPU (nvidia.rs) and the CPU machine (host.rs). All rules
//! that a launch, an argument list or a tensor map must keep stand here, once, and are checked
//! before either machine sees them: what simt accepts, the GPU accepts. A driver owns what it
//! allocates; addresses outside that are refused. Kernels are part of this program and trusted:
//! a launch that passes these checks and still writes elsewhere is a bug that simt names.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;

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
    /// `None` on the CPU, where a variable is known once a block has come to its declaration; the
    /// machine adds them up then and holds them to the same limit.
    pub static_shared_bytes: Option<u32>,
}

/// Where and how a kernel runs. `Launch::new(kernel, [blocks, 1, 1], [threads, 1, 1])`, then what
/// differs from the ordinary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    pub kernel: KernelId,
    pub stream: StreamId,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks of a cluster.
    pub cluster: [u32; 3],
    pub dynamic_shared_bytes: u32,
    /// All blocks are resident at once, so that they may wait for each other.
    pub cooperative: bool,
    /// May begin before the kernel in front of it on the stream has ended, up to its
    /// grid_dependency_wait ("programmatic dependent launch"; compute capability 9.0). A driver sets it
    /// by itself where it may: see [`Driver::overlap`].
    pub dependent: bool,
}

impl Launch {
    pub fn new(kernel: KernelId, grid: [u32; 3], block: [u32; 3]) -> Self {
        Launch {
            kernel,
            stream: StreamId::MAIN,
            grid,
            block,
            cluster: [1; 3],
            dynamic_shared_bytes: 0,
            cooperative: false,
            dependent: false,
        }
    }

    pub fn on(self, stream: StreamId) -> Self {
        Launch { stream, ..self }
    }

    pub fn cluster(self, cluster: [u32; 3]) -> Self {
        Launch { cluster, ..self }
    }

    pub fn shared_bytes(self, dynamic_shared_bytes: u32) -> Self {
        Launch { dynamic_shared_bytes, ..self }
    }

    pub fn cooperative(self) -> Self {
        Launch { cooperative: true, ..self }
    }

    pub fn dependent(self) -> Self {
        Launch { dependent: true, ..self }
    }
}

// ------------------------------------------------------------------ the trait

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
    /// A buffer of zeros in the host's memory that never moves, for [`Driver::on_device`] to copy from
    /// and to while kernels run; everything else may reach it, too, but slowly. Errors: no memory.
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
    /// Bytes that can still be allocated.
    fn free_bytes(&self) -> Result<u64>;
    /// The most bytes of this machine's memory that were taken since it was opened, buffers and all
    /// else; `None` where that is not known.
    fn peak_bytes(&self) -> Option<u64> {
        None
    }
    /// `None` where there are none to read.
    fn sensors(&self) -> Option<Sensors> {
        None
    }

    /// Whether what is enqueued runs later, while the program goes on.
    fn runs_behind(&self) -> bool {
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
    /// Errors: a rule of [`check_launch`] or [`check_arguments`]; on simt also whatever the
    /// kernel did wrong.
    fn launch(&mut self, launch: &Launch, arguments: &Arguments) -> Result<()>;

    fn to_device(&mut self, stream: StreamId, from: &[u8], to: DevicePointer) -> Result<()>;
    fn to_host(&mut self, stream: StreamId, from: DevicePointer, to: &mut [u8]) -> Result<()>;
    /// Bytes of a buffer of [`Driver::allocate_host`], to be read and written at once: copies from and
    /// to them that may still be under way are the caller's to wait for, see [`Driver::await_event`].
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
    /// Waits until what was enqueued before the event has run, and for nothing behind it.
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

// ------------------------------------------------------------------ arguments

/// The largest argument, a tensor map, and the strictest alignment that CUDA's headers ask of it.
const SLOT_BYTES: usize = 128;

#[derive(Clone, Copy)]
#[repr(align(128))]
struct Slot([u8; SLOT_BYTES]);

/// What a kernel may reach of the device's memory through an argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    Nothing,
    /// The buffer with this address in it; null is none.
    From(DevicePointer),
    Tensor(MappedTensor),
}

/// A value that a kernel takes as one parameter.
pub trait Argument {
    /// As people write it: "u32".
    const KIND: &'static str;
    /// The value's bytes, as the kernel reads them.
    fn bytes(&self) -> &[u8];
    fn reach(&self) -> Reach {
        Reach::Nothing
    }
}

macro_rules! scalar_arguments {
    ($($kind:ident)+) => {
        $(impl Argument for $kind {
            const KIND: &'static str = stringify!($kind);
            fn bytes(&self) -> &[u8] {
                bytemuck::bytes_of(self)
            }
        })+
    };
}
scalar_arguments!(i32 u32 f32 i64 u64);

impl Argument for DevicePointer {
    const KIND: &'static str = "pointer";
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.0)
    }
    fn reach(&self) -> Reach {
        Reach::From(*self)
    }
}

impl Argument for Allocation {
    const KIND: &'static str = "pointer";
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.address.0)
    }
    fn reach(&self) -> Reach {
        Reach::From(self.address)
    }
}

impl Argument for TensorMap {
    const KIND: &'static str = "tensor map";
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.opaque)
    }
    fn reach(&self) -> Reach {
        Reach::Tensor(self.tensor)
    }
}

#[derive(Clone, Copy)]
struct Passed {
    kind: &'static str,
    bytes: u32,
    reach: Reach,
}

/// The arguments of a launch, in order, by value:
/// `Arguments::new().with(out.address).with(inp.address).with(columns)`.
#[derive(Clone, Default)]
pub struct Arguments {
    slots: Vec<Slot>,
    passed: Vec<Passed>,
}

impl Arguments {
    pub fn new() -> Self {
        Arguments::default()
    }

    pub fn with<A: Argument>(mut self, value: A) -> Self {
        let bytes = value.bytes();
        let mut slot = Slot([0; SLOT_BYTES]);
        slot.0[..bytes.len()].copy_from_slice(bytes);
        self.slots.push(slot);
        let (kind, reach) = (A::KIND, value.reach());
        self.passed.push(Passed { kind, bytes: bytes.len() as u32, reach });
        self
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// What a kernel may reach through each.
    pub fn reaches(&self) -> impl Iterator<Item = Reach> + '_ {
        self.passed.iter().map(|passed| passed.reach)
    }

    /// What both machines take: one pointer to each value, aligned to 128 bytes, to be read only
    /// and not after `self` is gone.
    pub fn pointers(&self) -> Vec<*mut c_void> {
        self.slots.iter().map(|slot| slot.0.as_ptr().cast_mut().cast()).collect()
    }
}

// ------------------------------------------------------------------ tensor maps

/// A CUtensorMap of either machine, what a kernel takes as `const __grid_constant__ TensorMap`, and
/// the tensor that it was made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorMap {
    pub(super) opaque: [u64; 16],
    pub(super) tensor: MappedTensor,
}

/// Bytes of one buffer, which may be released meanwhile: see [`Ledger::has`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MappedTensor {
    address: DevicePointer,
    bytes: u64,
    /// Of the buffer: no other one of the driver ever has the same.
    serial: u64,
}

/// The numbers are those of CUtensorMapDataType.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum TensorType {
    U8 = 0,
    U16 = 1,
    U32 = 2,
    I32 = 3,
    U64 = 4,
    I64 = 5,
    F16 = 6,
    F32 = 7,
    F64 = 8,
    Bf16 = 9,
}

impl TensorType {
    pub fn bytes(self) -> u64 {
        match self {
            TensorType::U8 => 1,
            TensorType::U16 | TensorType::F16 | TensorType::Bf16 => 2,
            TensorType::U32 | TensorType::I32 | TensorType::F32 => 4,
            TensorType::U64 | TensorType::I64 | TensorType::F64 => 8,
        }
    }

    fn is_float(self) -> bool {
        matches!(self, TensorType::F16 | TensorType::F32 | TensorType::F64 | TensorType::Bf16)
    }
}

/// How 16-byte chunks are permuted in shared memory; the numbers are those of CUtensorMapSwizzle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Swizzle {
    None = 0,
    Bytes32 = 1,
    Bytes64 = 2,
    Bytes128 = 3,
}

impl Swizzle {
    /// The widest row of a box; `None`: any.
    pub fn span_bytes(self) -> Option<u64> {
        match self {
            Swizzle::None => None,
            Swizzle::Bytes32 => Some(32),
            Swizzle::Bytes64 => Some(64),
            Swizzle::Bytes128 => Some(128),
        }
    }
}

/// What a load brings into L2 at least; the numbers are those of CUtensorMapL2promotion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum L2Promotion {
    None = 0,
    Bytes64 = 1,
    Bytes128 = 2,
    Bytes256 = 3,
}

/// What is read outside the tensor; the numbers are those of CUtensorMapFloatOOBfill.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Fill {
    Zeros = 0,
    Nans = 1,
}

/// A tensor in the device's memory and the box that one TMA instruction moves: the arguments of
/// cuTensorMapEncodeTiled, not interleaved, without element strides.
///
/// Dimensions are innermost first, in elements; the innermost is contiguous.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorMapSpec<'a> {
    pub data_type: TensorType,
    pub address: DevicePointer,
    /// 1 to 5 of them.
    pub dimensions: &'a [u64],
    /// From one element to the next of dimension 1, 2, ...: one fewer than dimensions.
    pub stride_bytes: &'a [u64],
    pub box_dimensions: &'a [u32],
    pub swizzle: Swizzle,
    pub l2_promotion: L2Promotion,
    pub fill: Fill,
}

impl<'a> TensorMapSpec<'a> {
    /// A row-major matrix and its boxes, [columns, rows] as everywhere here.
    pub fn matrix(
        data_type: TensorType,
        address: DevicePointer,
        dimensions: &'a [u64; 2],
        row_bytes: &'a [u64; 1],
        box_dimensions: &'a [u32; 2],
        swizzle: Swizzle,
    ) -> Self {
        TensorMapSpec {
            data_type,
            address,
            dimensions,
            stride_bytes: row_bytes,
            box_dimensions,
            swizzle,
            l2_promotion: L2Promotion::Bytes256,
            fill: Fill::Zeros,
        }
    }

    /// Bytes from the address to the end of the last element, if every rule holds.
    ///
    /// Source: the CUDA driver API's page of cuTensorMapEncodeTiled. Errors: the first rule that
    /// is broken.
    pub fn extent_bytes(&self) -> Result<u64> {
        let rank = self.dimensions.len();
        if !(1..=5).contains(&rank) {
            return broken(
                format!("a tensor map has 1 to 5 dimensions, this one has {rank}"),
                "merge dimensions that lie behind each other in memory",
            );
        }
        if self.stride_bytes.len() != rank - 1 {
            return broken(
                format!("{rank} dimensions need {} strides, got {:?}", rank - 1, self.stride_bytes),
                "give one stride for each dimension but the innermost",
            );
        }
        if self.box_dimensions.len() != rank {
            return broken(
                format!("{rank} dimensions need a box of {rank}, got {:?}", self.box_dimensions),
                "give the box one extent for each dimension",
            );
        }
        let DevicePointer(address) = self.address;
        if address == 0 || !address.is_multiple_of(16) {
            return broken(
                format!("the address {address:#x} is not a multiple of 16 bytes"),
                "begin the tensor at a multiple of 16 bytes in its buffer",
            );
        }
        for (index, &dimension) in self.dimensions.iter().enumerate() {
            if dimension == 0 || dimension > 1 << 32 {
                return broken(
                    format!("dimension {index} is {dimension}; 1 to 2^32 are allowed"),
                    "launch nothing for an empty tensor; split a larger one",
                );
            }
        }
        for (index, &stride) in self.stride_bytes.iter().enumerate() {
            if stride == 0 || !stride.is_multiple_of(16) {
                return broken(
                    format!("stride {index} is {stride} bytes, not a multiple of 16"),
                    "pad the rows to a multiple of 16 bytes",
                );
            }
            if stride >= 1 << 40 {
                return broken(
                    format!("stride {index} is {stride} bytes; it must be below 2^40"),
                    "split the tensor",
                );
            }
        }
        self.check_box()?;
        if self.fill == Fill::Nans && !self.data_type.is_float() {
            return broken(
                format!("{:?} has no NaN to fill with", self.data_type),
                "fill with zeros",
            );
        }
        let inner = u128::from(self.dimensions[0]) * u128::from(self.data_type.bytes());
        let outer = self.dimensions[1..].iter().zip(self.stride_bytes);
        let steps = outer.map(|(&count, &stride)| u128::from(count - 1) * u128::from(stride));
        let extent = inner + steps.sum::<u128>();
        match u64::try_from(extent) {
            Ok(extent) => Ok(extent),
            Err(_) => broken(
                format!("the tensor spans {extent} bytes"),
                "no memory is so large: check dimensions and strides",
            ),
        }
    }

    fn check_box(&self) -> Result<()> {
        for (index, &extent) in self.box_dimensions.iter().enumerate() {
            if extent == 0 || extent > 256 {
                return broken(
                    format!("box dimension {index} is {extent}; 1 to 256 are allowed"),
                    "move a larger tile with several boxes",
                );
            }
        }
        let row = u64::from(self.box_dimensions[0]) * self.data_type.bytes();
        if !row.is_multiple_of(16) {
            return broken(
                format!("a row of the box is {row} bytes, not a multiple of 16"),
                "widen the box; what lies outside the tensor is filled",
            );
        }
        match self.swizzle.span_bytes() {
            Some(span) if row > span => broken(
                format!("a row of the box is {row} bytes, the swizzle's span {span}"),
                "move a wider tile with several boxes, or with one dimension more",
            ),
            _ => Ok(()),
        }
    }
}

fn broken<T>(what: String, remedy: &str) -> Result<T> {
    Err(Error::TensorMap { what, remedy: remedy.to_string() })
}

// ------------------------------------------------------------------ launches

/// Blocks of a cluster that every GPU with clusters can run.
const MAX_CLUSTER_BLOCKS: u64 = 8;
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
/// Shared memory that the system takes for each resident block, from compute capability 8.0 on.
const RESERVED_SHARED_BYTES: u64 = 1024;

/// Whether this machine can run this launch of this kernel. Errors: the first rule that is broken.
///
/// A cooperative launch that passes may still not fit: registers are the driver's to count.
pub fn check_launch(
    device: &str,
    properties: &Properties,
    kernel: &KernelInfo,
    launch: &Launch,
) -> Result<()> {
    let refuse = |what: String, remedy: &str| -> Result<()> {
        Err(Error::Launch {
            kernel: kernel.name.clone(),
            device: device.to_string(),
            what,
            remedy: remedy.to_string(),
        })
    };
    let Launch { grid, block, cluster, .. } = *launch;
    let count = |extents: [u32; 3]| extents.iter().map(|&n| u128::from(n)).product::<u128>();
    let extents = [("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)];
    for (name, extents, most) in extents {
        if (0..3).any(|axis| extents[axis] == 0 || extents[axis] > most[axis]) {
            return refuse(
                format!("the {name} is {extents:?}; 1 to {most:?} are allowed"),
                "launch nothing for an empty tensor; let each thread do more for a larger one",
            );
        }
    }
    let most = kernel.max_threads.min(properties.max_threads_per_block);
    let threads = count(block);
    if threads > u128::from(most) {
        return refuse(
            format!("a block of {block:?} has {threads} threads, the kernel allows {most}"),
            "use fewer threads, or raise the numbers behind KERNEL(name, ...)",
        );
    }
    let blocks = count(cluster);
    if blocks == 0 || blocks > u128::from(MAX_CLUSTER_BLOCKS) {
        return refuse(
            format!("a cluster of {cluster:?} has {blocks} blocks; 1 to 8 are allowed"),
            "use smaller clusters",
        );
    }
    if (0..3).any(|axis| grid[axis] % cluster[axis] != 0) {
        return refuse(
            format!("the grid {grid:?} is not a multiple of the cluster {cluster:?}"),
            "round the grid up and let the blocks behind the end do nothing",
        );
    }
    let (major, minor) = properties.compute_capability;
    if major < 9 && (blocks > 1 || launch.dependent) {
        let feature = if blocks > 1 { "clusters" } else { "dependent launches" };
        return refuse(
            format!(
                "{feature} need compute capability 9.0, {} has {major}.{minor}",
                properties.name
            ),
            "choose the kernel for sm_80",
        );
    }
    let fixed = kernel.static_shared_bytes.unwrap_or(0);
    let dynamic = launch.dynamic_shared_bytes;
    let shared = u64::from(fixed) + u64::from(dynamic);
    if shared > properties.shared_bytes_per_block {
        return refuse(
            format!(
                "{dynamic} bytes of dynamic and {fixed} of static shared memory; a block of {} has \
                 at most {}",
                properties.name, properties.shared_bytes_per_block
            ),
            "use fewer stages or smaller tiles",
        );
    }
    if launch.cooperative {
        let by_threads = u128::from(properties.max_threads_per_multiprocessor) / threads;
        let of_each = u128::from(shared + RESERVED_SHARED_BYTES);
        let by_shared = u128::from(properties.shared_bytes_per_multiprocessor) / of_each;
        let resident = by_threads.min(by_shared) * u128::from(properties.multiprocessors);
        let wanted = count(grid);
        if wanted > resident {
            return refuse(
                format!("{wanted} blocks must be resident at once, at most {resident} can be"),
                "launch as many blocks as fit, and let each take several tiles",
            );
        }
    }
    Ok(())
}

/// Whether number, sizes and addresses of the arguments fit the kernel's parameters.
pub fn check_arguments(
    device: &str,
    kernel: &KernelInfo,
    arguments: &Arguments,
    memory: &Ledger,
) -> Result<()> {
    let refuse = |what: String, remedy: &str| -> Result<()> {
        Err(Error::Launch {
            kernel: kernel.name.clone(),
            device: device.to_string(),
            what,
            remedy: remedy.to_string(),
        })
    };
    if let Some(parameters) = &kernel.parameter_bytes {
        if parameters.len() != arguments.len() {
            return refuse(
                format!("{} parameters, {} arguments given", parameters.len(), arguments.len()),
                "pass the arguments of the kernel's signature, in its order",
            );
        }
        for (index, (passed, &bytes)) in arguments.passed.iter().zip(parameters).enumerate() {
            if passed.bytes != bytes {
                return refuse(
                    format!(
                        "argument {index} is a {} of {} bytes, the parameter has {bytes}",
                        passed.kind, passed.bytes
                    ),
                    "pass the arguments of the kernel's signature, in its order",
                );
            }
        }
    }
    for (index, passed) in arguments.passed.iter().enumerate() {
        match passed.reach {
            Reach::From(address) if address != DevicePointer::NULL && !memory.holds(address, 1) => {
                return refuse(
                    format!("argument {index} is {:#x}, in no buffer of this driver", address.0),
                    "pass an address of this driver's buffers that was not released",
                );
            }
            Reach::Tensor(tensor) if !memory.has(&tensor) => {
                return refuse(
                    format!(
                        "argument {index} maps a tensor of {} bytes at {:#x}, and its buffer was \
                         released, or is another driver's",
                        tensor.bytes, tensor.address.0
                    ),
                    "make a new map of a tensor in a buffer that is live",
                );
            }
            Reach::Nothing | Reach::From(_) | Reach::Tensor(_) => {}
        }
    }
    Ok(())
}

// ------------------------------------------------------------------ memory

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

// ------------------------------------------------------------------ capture

/// Which stream is being captured, and what is allowed meanwhile.
#[derive(Default, Debug)]
pub struct Capture {
    stream: Option<StreamId>,
}

impl Capture {
    /// Whether work on `stream` is recorded now. Errors: another stream is being captured.
    pub fn records(&self, device: &str, stream: StreamId) -> Result<bool> {
        match self.stream {
            None => Ok(false),
            Some(captured) if captured == stream => Ok(true),
            Some(_) => refuse_in_capture(device, "work on another stream"),
        }
    }

    /// Errors: a stream is being captured; `action` is what cannot be recorded.
    pub fn forbid(&self, device: &str, action: &str) -> Result<()> {
        match self.stream {
            None => Ok(()),
            Some(_) => refuse_in_capture(device, action),
        }
    }

    pub fn begin(&mut self, device: &str, stream: StreamId) -> Result<()> {
        self.forbid(device, "a second capture")?;
        self.stream = Some(stream);
        Ok(())
    }

    pub fn end(&mut self, device: &str, stream: StreamId) -> Result<()> {
        if self.stream != Some(stream) {
            return Err(Error::Device {
                device: device.to_string(),
                what: "this stream is not being captured".to_string(),
                remedy: "call begin_capture first, with the same stream".to_string(),
            });
        }
        self.stream = None;
        Ok(())
    }
}

fn refuse_in_capture<T>(device: &str, action: &str) -> Result<T> {
    Err(Error::Device {
        device: device.to_string(),
        what: format!("{action} cannot be recorded in a graph"),
        remedy: "do it before begin_capture or after end_capture".to_string(),
    })
}

// ------------------------------------------------------------------ names

pub(super) fn no_memory(device: &str, label: &str, bytes: u64, free: u64) -> Error {
    let what = match bytes {
        0 => format!("`{label}` has no bytes"),
        _ => format!("no memory for the {bytes} bytes of `{label}`; {free} bytes are free"),
    };
    let remedy = match bytes {
        0 => "allocate at least one byte",
        _ => "use a smaller batch or model, or end what else uses the device's memory",
    };
    Error::Device { device: device.to_string(), what, remedy: remedy.to_string() }
}

pub(super) fn not_recorded(device: &str) -> Error {
    Error::Device {
        device: device.to_string(),
        what: "this event was never recorded".to_string(),
        remedy: "record both events before asking for the time between them".to_string(),
    }
}

/// An id that another driver gave.
pub(super) fn foreign(device: &str, what: &str) -> Error {
    Error::Device {
        device: device.to_string(),
        what: format!("this {what} is of another driver"),
        remedy: format!("use a {what} that this driver gave"),
    }
}

/// There is no kernel `name`; the nearest names that there are.
pub fn no_such_kernel(device: &str, name: &str, names: &[String]) -> Error {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    Error::Device {
        device: device.to_string(),
        what: format!("none of the {} kernels of this build is `{name}`", names.len()),
        remedy: nearest::some_of(name, &names, 5),
    }
}

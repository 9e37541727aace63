//! A launch, and the rules that it and its arguments must keep.

use super::{Arguments, DevicePointer, KernelId, KernelInfo, Ledger, Properties, Reach, StreamId};
use crate::error::{Error, Result};

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
    /// May begin before the previous kernel on its stream has ended, and runs up to its
    /// grid_dependency_wait ("programmatic dependent launch"; compute capability 9.0). A driver
    /// sets it by itself where it may: see [`Driver::overlap`].
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

/// Blocks of a cluster that every GPU with clusters can run.
const MAX_CLUSTER_BLOCKS: u64 = 8;
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
/// Shared memory that the system takes for each resident block, from compute capability 8.0 on.
pub const RESERVED_SHARED_BYTES: u32 = 1024;

impl KernelInfo {
    fn refused(&self, device: &str, what: String, remedy: &str) -> Result<()> {
        Err(Error::Launch {
            kernel: self.name.clone(),
            device: device.to_string(),
            what,
            remedy: remedy.to_string(),
        })
    }
}

/// Whether this machine can run this launch of this kernel. Errors: the first rule that is broken.
///
/// A cooperative launch that passes may still not fit: registers are the driver's to count.
pub fn check_launch(
    device: &str,
    properties: &Properties,
    kernel: &KernelInfo,
    launch: &Launch,
) -> Result<()> {
    let refuse = |what: String, remedy: &str| kernel.refused(device, what, remedy);
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
            "use fewer threads, or raise the launch bounds in KERNEL(name, ...)",
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
            "round the grid up and let the blocks past the end do nothing",
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
        let of_each = u128::from(shared + u64::from(RESERVED_SHARED_BYTES));
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
    let refuse = |what: String, remedy: &str| kernel.refused(device, what, remedy);
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

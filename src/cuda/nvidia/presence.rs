//! What has to be there before a GPU can be used, and what is said where it is not.

use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::DEVICE;
use super::errors::text_of;
use crate::cuda::binaries;
use crate::cuda::driver::Properties;
use crate::error::{Error, Result};

/// cuTensorMapEncodeTiled and cuLaunchKernelEx are there from here on; what graphs need is older.
const OLDEST_DRIVER: i32 = 12_000;
const OLDEST_GPU: (u32, u32) = (8, 0);

pub(super) fn absent(what: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::Device { device: DEVICE.to_string(), what: what.into(), remedy: remedy.into() }
}

/// Whether a GPU can be asked for at all: a driver, and kernels in this build. Errors: what is
/// missing. Starts nothing.
pub fn present() -> Result<()> {
    library_present()?;
    kernels_present(binaries::FATBINS, binaries::NVCC)
}

/// Whether a build with these fatbins has kernels. Errors: why `nvcc` made none.
pub fn kernels_present(
    fatbins: &[(&str, &[u8])],
    nvcc: std::result::Result<&str, &str>,
) -> Result<()> {
    if !fatbins.is_empty() {
        return Ok(());
    }
    let why = nvcc.err().unwrap_or("it was built for no architecture");
    Err(absent(
        format!("this build has no kernels for GPUs: {why}"),
        "run tools/fetch-nvcc (or install the CUDA toolkit 13.0), touch build.rs, and build again",
    ))
}

/// Whether a driver that offers this CUDA version (13000 for 13.0) can be asked for all of it.
pub fn check_driver(version: i32) -> Result<()> {
    if version >= OLDEST_DRIVER {
        return Ok(());
    }
    Err(absent(
        format!("the driver offers CUDA {}", version_text(version)),
        "install a driver with CUDA 13.0 (580 or newer)",
    ))
}

/// Whether there is a GPU of this index among the `count` that CUDA_VISIBLE_DEVICES leaves.
pub fn check_index(ordinal: usize, count: usize) -> Result<()> {
    if ordinal < count {
        return Ok(());
    }
    Err(absent(
        format!("there is no GPU {ordinal}: {count} can be seen"),
        "check that nvidia-smi lists it and that CUDA_VISIBLE_DEVICES does not hide it",
    ))
}

/// Whether kernels were compiled for a GPU of this compute capability.
pub fn check_gpu(name: &str, capability: (u32, u32)) -> Result<()> {
    if capability >= OLDEST_GPU {
        return Ok(());
    }
    let (major, minor) = capability;
    Err(absent(
        format!("{name} has compute capability {major}.{minor}"),
        "use a GPU of compute capability 8.0 or newer (A100, RTX 30)",
    ))
}

/// Whether libcuda is installed.
pub fn library_present() -> Result<()> {
    // SAFETY: loads libcuda, whose initialisers touch nothing of ours, if it is there.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(absent(
        "no NVIDIA driver: libcuda.so was not found",
        "install the NVIDIA driver, or start the container with its GPUs (--gpus all)",
    ))
}

/// Whether the installed libcuda has a function; cudarc panics when it calls a missing one.
pub(super) fn has_function(name: &str) -> bool {
    // SAFETY: only called after `library_present`; the symbol is not called, nor kept.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_ok() }
}

/// 13000 for CUDA 13.0.
pub(super) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one integer; may be called before cuInit.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(cannot_open)?;
    Ok(version)
}

pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

pub(super) fn properties_of(
    context: &Arc<CudaContext>,
    driver_version: i32,
) -> Result<Properties, DriverError> {
    let attribute = |attribute| context.attribute(attribute).map(|value| value.max(0) as u32);
    let (major, minor) = context.compute_capability()?;
    Ok(Properties {
        name: context.name()?,
        compute_capability: (major as u32, minor as u32),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: context.total_mem()? as u64,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
        shared_bytes_per_block: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?
        .into(),
        shared_bytes_per_multiprocessor: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?
        .into(),
        max_threads_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        max_threads_per_multiprocessor: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR,
        )?,
        clock_mhz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)? / 1000,
        driver_version: version_text(driver_version),
    })
}

pub(super) fn cannot_open(error: DriverError) -> Error {
    let remedy = match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_INVALID_DEVICE => {
            "check that nvidia-smi lists the GPU and that CUDA_VISIBLE_DEVICES does not hide it"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "libcuda.so and the kernel module are of different versions: reboot, or reinstall"
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE | CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "another process has the GPU: see nvidia-smi"
        }
        _ => "check the driver with nvidia-smi",
    };
    absent(format!("cannot open the GPU: {}", text_of(error)), remedy)
}

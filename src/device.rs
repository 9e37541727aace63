//! Which devices there are, and which one a run uses.

use crate::config::{DeviceKind, Dtype};
use crate::cuda::{self, Cuda, Switches, host};
use crate::error::{Error, Result};

/// A device that models can be trained and run on here, now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    Cpu,
    Cuda,
    Simt,
}

impl Device {
    /// `auto` is a GPU where there is a driver and this build has kernels, else the CPU. Opens
    /// nothing. Errors: the device is not here, and why.
    pub fn choose(kind: DeviceKind) -> Result<Self> {
        let device = match kind {
            DeviceKind::Cpu => return Ok(Device::Cpu),
            DeviceKind::Auto if cuda::present(DeviceKind::Cuda).is_err() => return Ok(Device::Cpu),
            DeviceKind::Auto | DeviceKind::Cuda => Device::Cuda,
            DeviceKind::Simt => Device::Simt,
        };
        match cuda::present(device.kind()) {
            Ok(()) => Ok(device),
            Err(Error::Device { device, what, remedy }) => Err(Error::Device {
                device,
                what,
                remedy: format!("use --device cpu; or {remedy}"),
            }),
            Err(other) => Err(other),
        }
    }

    pub fn kind(self) -> DeviceKind {
        match self {
            Device::Cpu => DeviceKind::Cpu,
            Device::Cuda => DeviceKind::Cuda,
            Device::Simt => DeviceKind::Simt,
        }
    }

    /// What a model that is only read computes in; f32 on the CPU and bf16 elsewhere if nobody
    /// says. Errors: bf16 on the CPU.
    pub fn computes_in(self, asked: Option<Dtype>) -> Result<Dtype> {
        match (self, asked) {
            (Device::Cpu, Some(Dtype::Bf16)) => Err(Error::Usage {
                what: "--dtype bf16: the CPU computes in f32".to_string(),
                remedy: "leave --dtype out, or add --device simt".to_string(),
            }),
            (Device::Cpu, _) => Ok(Dtype::F32),
            (Device::Cuda | Device::Simt, asked) => Ok(asked.unwrap_or(Dtype::Bf16)),
        }
    }
}

/// The kernels' backend on the GPU, or on the CPU as SIMT_... says, with the environment's
/// [`Switches`]. Errors: why there is none.
pub fn open_kernels(kind: DeviceKind, dtype: Dtype) -> Result<Cuda> {
    let switches = Switches::from_env()?;
    let backend = Cuda::new(cuda::open(kind, host::Options::from_env()?)?, dtype, None)?;
    Ok(backend.with_switches(switches))
}

/// `work` on the backend of a device that computes in `dtype`; compiled once for each backend.
/// Returns early where there is none.
macro_rules! on_device {
    ($device:expr, $dtype:expr, |$backend:ident| $work:expr) => {
        match $device {
            $crate::device::Device::Cpu => {
                let $backend = $crate::cpu::Cpu::<f32>::new();
                $work
            }
            device @ ($crate::device::Device::Cuda | $crate::device::Device::Simt) => {
                let $backend = $crate::device::open_kernels(device.kind(), $dtype)?;
                $work
            }
        }
    };
}
pub(crate) use on_device;

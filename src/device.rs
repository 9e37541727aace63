//! Which devices there are, and which one a run uses.

use crate::config::{DeviceKind, Dtype};
use crate::error::{Error, Result};

/// A device that can be used here, now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    Cpu,
}

impl Device {
    /// `auto` is the best device there is.
    pub fn choose(kind: DeviceKind) -> Result<Self> {
        let missing = |device: &str, what: &str| {
            Err(Error::Device {
                device: device.to_string(),
                what: what.to_string(),
                remedy: "use --device cpu".to_string(),
            })
        };
        match kind {
            DeviceKind::Auto | DeviceKind::Cpu => Ok(Device::Cpu),
            DeviceKind::Cuda => missing("cuda", "this build has no CUDA kernels"),
            DeviceKind::Simt => missing("simt", "this build has no simulated CUDA device"),
        }
    }

    /// Refuses a type that the device does not compute in.
    pub fn check_dtype(self, dtype: Dtype) -> Result<()> {
        match (self, dtype) {
            (Device::Cpu, Dtype::F32) => Ok(()),
            (Device::Cpu, Dtype::Bf16) => Err(Error::Device {
                device: "cpu".to_string(),
                what: "dtype is bf16, and the CPU trains in f32".to_string(),
                remedy: "add --set dtype=f32".to_string(),
            }),
        }
    }
}

//! Which devices there are, and which one a run uses.

use crate::config::DeviceKind;
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

    pub fn kind(self) -> DeviceKind {
        match self {
            Device::Cpu => DeviceKind::Cpu,
        }
    }
}

//! Which devices there are, and which one a run uses.

use crate::config::DeviceKind;
use crate::cuda;
use crate::error::{Error, Result};

/// A device that models can be trained and run on here, now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    Cpu,
}

impl Device {
    /// `auto` is the best device there is. Errors: the device is not here, and why; or only its
    /// kernels are, which [`cuda::open`] gives.
    pub fn choose(kind: DeviceKind) -> Result<Self> {
        match kind {
            DeviceKind::Auto | DeviceKind::Cpu => Ok(Device::Cpu),
            DeviceKind::Cuda | DeviceKind::Simt => Err(match cuda::present(kind) {
                Ok(()) => Error::Device {
                    device: kind.to_string(),
                    what: "models do not run on it yet, only single kernels do".to_string(),
                    remedy: "use --device cpu; for kernels, see isobath bench".to_string(),
                },
                Err(Error::Device { device, what, remedy }) => {
                    Error::Device { device, what, remedy: format!("use --device cpu; or {remedy}") }
                }
                Err(other) => other,
            }),
        }
    }

    pub fn kind(self) -> DeviceKind {
        match self {
            Device::Cpu => DeviceKind::Cpu,
        }
    }
}

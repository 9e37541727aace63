//! The CUDA backend: kernels/ on a GPU, or on the CPU as device `simt`.
//!
//! [`Driver`] is the machine below; [`open`] gives the one that a person asked for.

pub mod adamw;
pub mod attention;
mod backend;
pub mod binaries;
pub mod conformance;
mod driver;
pub mod embedding;
mod family;
mod footprint;
mod fusions;
pub mod gemm;
pub mod halves;
pub mod host;
mod immediate;
pub mod loss;
pub mod norm;
pub mod nvidia;
pub mod nvml;
mod nvtx;
mod offload;
mod overlap;
pub mod peaks;
pub mod pointwise;
pub mod residual;
mod rows;
pub mod transfers;

pub use backend::Cuda;
pub use driver::*;
pub use family::Family;
pub use footprint::AbsentGpu;
pub use fusions::{Fusion, Fusions};
pub use immediate::{Immediate, Machine};
pub use overlap::Overlap;

use std::ffi::OsString;

use crate::config::DeviceKind;
use crate::error::{Error, Result};

/// The machine for kernels that `kind` names; `auto`: a GPU if there is one, else simt.
///
/// Errors: why it cannot be used here.
pub fn open(kind: DeviceKind, simt: host::Options) -> Result<Box<dyn Driver>> {
    let gpu = || Ok(Box::new(nvidia::Nvidia::open(0)?) as Box<dyn Driver>);
    let cpu = || Ok(Box::new(host::Host::new(simt)?) as Box<dyn Driver>);
    match kind {
        DeviceKind::Cuda => gpu(),
        DeviceKind::Simt => cpu(),
        DeviceKind::Auto if nvidia::present().is_ok() => gpu(),
        DeviceKind::Auto => cpu(),
        DeviceKind::Cpu => Err(Error::Device {
            device: kind.to_string(),
            what: "the device `cpu` has no kernels of its own".to_string(),
            remedy: "use --device simt to run CUDA kernels on the CPU".to_string(),
        }),
    }
}

/// How work is launched. Not part of a run's configuration: results are the same bits either way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Switches {
    /// Work that repeats is replayed as a graph; else every kernel is launched on its own, so that
    /// an error comes out of its own launch.
    pub graphs: bool,
    /// A kernel may begin while the previous one still runs.
    pub overlap: bool,
    /// A step is enqueued before the previous one is over; `None`: where launches are
    /// asynchronous.
    pub steps_ahead: Option<bool>,
}

/// The environment variables of [`Switches`], each 0 or 1.
pub const GRAPHS: &str = "ISOBATH_GRAPHS";
pub const OVERLAP: &str = "ISOBATH_OVERLAP";
pub const AHEAD: &str = "ISOBATH_AHEAD";

impl Switches {
    /// Errors name the variable.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// The same of any set of variables.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let switch = |name: &str| -> Result<Option<bool>> {
            let value = |text: OsString| Ok(host::number(name, &text.to_string_lossy(), 1)? == 1);
            variable(name).map(value).transpose()
        };
        Ok(Switches {
            graphs: switch(GRAPHS)?.unwrap_or(true),
            overlap: switch(OVERLAP)?.unwrap_or(true),
            steps_ahead: switch(AHEAD)?,
        })
    }
}

/// Whether `kind` can be asked for kernels here. Starts nothing. Errors: why not.
pub fn present(kind: DeviceKind) -> Result<()> {
    match kind {
        DeviceKind::Auto | DeviceKind::Cpu => Ok(()),
        DeviceKind::Cuda => nvidia::present(),
        DeviceKind::Simt => host::present(),
    }
}

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
pub mod gemm;
pub mod halves;
pub mod host;
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
mod transfers;

pub use backend::Cuda;
pub use driver::*;
pub use family::Family;
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

/// The environment variable that says whether work that repeats is replayed as a graph; 0: every
/// kernel is launched on its own, so that an error comes out of its own launch.
pub const GRAPHS: &str = "ISOBATH_GRAPHS";

/// Whether the environment wants graphs, for [`Cuda::with_graphs`]; where it says nothing, it does.
pub fn graphs_from_env() -> Result<bool> {
    graphs_from_variables(|name| std::env::var_os(name))
}

/// As [`graphs_from_env`], of any set of variables. Errors name the variable.
pub fn graphs_from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<bool> {
    Ok(switch(GRAPHS, variable)?.unwrap_or(true))
}

/// The environment variable that says whether a kernel may begin while the one in front of it still
/// runs; 0: each begins when that one has ended.
pub const OVERLAP: &str = "ISOBATH_OVERLAP";

/// Whether the environment wants that, for [`Cuda::with_overlap`]; where it says nothing, it does.
pub fn overlap_from_env() -> Result<bool> {
    overlap_from_variables(|name| std::env::var_os(name))
}

/// As [`overlap_from_env`], of any set of variables. Errors name the variable.
pub fn overlap_from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<bool> {
    Ok(switch(OVERLAP, variable)?.unwrap_or(true))
}

/// The environment variable that says whether a step is enqueued before the one in front of it is over;
/// where it says nothing, on devices that run by themselves.
pub const AHEAD: &str = "ISOBATH_AHEAD";

/// What the environment says of [`AHEAD`], for [`Cuda::with_steps_ahead`].
pub fn steps_ahead_from_env() -> Result<Option<bool>> {
    switch(AHEAD, |name| std::env::var_os(name))
}

/// 0 or 1; `None`: it is not set. Errors name the variable.
fn switch(name: &str, variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<bool>> {
    let value = |text: OsString| Ok(host::number(name, &text.to_string_lossy(), 1)? == 1);
    variable(name).map(value).transpose()
}

/// Whether `kind` can be asked for kernels here. Starts nothing. Errors: why not.
pub fn present(kind: DeviceKind) -> Result<()> {
    match kind {
        DeviceKind::Auto | DeviceKind::Cpu => Ok(()),
        DeviceKind::Cuda => nvidia::present(),
        DeviceKind::Simt => host::present(),
    }
}

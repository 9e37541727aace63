//! What build.rs made of kernels/: fatbins for GPUs, and what it was made with.
//!
//! Without nvcc there are none ([`NVCC`] says why), without g++ there is no device `simt`
//! ([`CXX`] says why); cfg(cuda_kernels) and cfg(simt) say the same to the compiler.

use crate::error::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The fatbin of kernels/`stem`.cu; the driver loads it as it is.
pub fn fatbin(stem: &str) -> Result<&'static [u8]> {
    if let Some((_, bytes)) = FATBINS.iter().find(|(name, _)| *name == stem) {
        return Ok(bytes);
    }
    let (what, remedy) = match NVCC {
        Err(why) => (why.to_string(), "run tools/fetch-nvcc, touch build.rs, and build again"),
        Ok(_) => (
            format!("kernels/{stem}.cu is not in this build for architectures {ARCHITECTURES}"),
            "build again without ISOBATH_ARCHITECTURES",
        ),
    };
    Err(Error::Device { device: "cuda".to_string(), what, remedy: remedy.to_string() })
}

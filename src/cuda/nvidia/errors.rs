//! What an error of libcuda says.

use std::ffi::CStr;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;

use crate::cuda::driver::MEMORY_REMEDY;

/// "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
pub(super) fn text_of(error: DriverError) -> String {
    let text = |text: Result<&CStr, DriverError>| {
        text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
    };
    format!("{}: {}", text(error.error_name()), text(error.error_string()))
}

/// What to do about an error of this kind: most have a remedy of what was being done, but no memory
/// is no memory, whoever asks for it.
pub fn remedy_of(error: CUresult, otherwise: impl Into<String>) -> String {
    match error {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => MEMORY_REMEDY.to_string(),
        _ => otherwise.into(),
    }
}

/// Errors that end the context: a kernel did something wrong while it ran.
pub(super) fn is_kernel_fault(error: CUresult) -> bool {
    matches!(
        error,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
    )
}

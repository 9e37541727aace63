//! Kernels of a loaded module, and what a launch of one asks for.

use std::ffi::{CStr, c_uint};
use std::ptr;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::presence::has_function;
use crate::cuda::driver::{KernelInfo, Launch, RESERVED_SHARED_BYTES};

pub(super) fn names_in(module: sys::CUmodule) -> Result<Vec<String>, DriverError> {
    let mut count: c_uint = 0;
    // SAFETY: the module is loaded; `functions` has room for `count` handles, and as many are
    // written; their names live as long as the module.
    unsafe {
        sys::cuModuleGetFunctionCount(&mut count, module).result()?;
        let mut functions = vec![ptr::null_mut(); count as usize];
        sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module).result()?;
        let name = |function: &sys::CUfunction| {
            let mut name = ptr::null();
            sys::cuFuncGetName(&mut name, *function).result()?;
            Ok(CStr::from_ptr(name).to_string_lossy().into_owned())
        };
        functions.iter().map(name).collect()
    }
}

/// Bytes of each parameter; `None` where the driver has no cuFuncGetParamInfo (CUDA 12.4).
pub(super) fn parameters_of(function: sys::CUfunction) -> Option<Vec<u32>> {
    if !has_function("cuFuncGetParamInfo") {
        return None;
    }
    let mut parameters = vec![];
    loop {
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: a live function; writes two numbers. After the last parameter it is an error.
        let found =
            unsafe { sys::cuFuncGetParamInfo(function, parameters.len(), &mut offset, &mut bytes) };
        if found.result().is_err() {
            return Some(parameters);
        }
        parameters.push(bytes as u32);
    }
}

/// Brings a kernel's code onto the device now, not at its first launch, where the driver can be
/// told to (cuFuncLoad, CUDA 12.4): it takes memory, too.
pub(super) fn load_whole(function: sys::CUfunction) -> Result<(), DriverError> {
    if !has_function("cuFuncLoad") {
        return Ok(());
    }
    // SAFETY: the function belongs to a loaded module.
    unsafe { sys::cuFuncLoad(function) }.result()
}

pub(super) fn info_of(name: &str, function: sys::CUfunction) -> Result<KernelInfo, DriverError> {
    use sys::CUfunction_attribute as Of;
    let attribute = |attribute| {
        // SAFETY: the function belongs to a loaded module.
        unsafe { result::function::get_function_attribute(function, attribute) }
            .map(|value| value.max(0) as u32)
    };
    let ptx_version = attribute(Of::CU_FUNC_ATTRIBUTE_PTX_VERSION)?;
    Ok(KernelInfo {
        name: name.to_string(),
        parameter_bytes: parameters_of(function),
        max_threads: attribute(Of::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        compiled_for: (ptx_version / 10, ptx_version % 10),
        registers: Some(attribute(Of::CU_FUNC_ATTRIBUTE_NUM_REGS)?),
        local_bytes: attribute(Of::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
        // What the system takes of a block's may be among it (code of CUDA 13 for 9.0 declares it).
        static_shared_bytes: Some(
            attribute(Of::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?
                .saturating_sub(RESERVED_SHARED_BYTES),
        ),
    })
}

/// What a launch asks for beyond grid and block.
pub(super) fn attributes_of(launch: &Launch) -> Vec<sys::CUlaunchAttribute> {
    use sys::CUlaunchAttributeID as Id;
    let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let mut attributes = vec![];
    if launch.cluster != [1; 3] {
        let [x, y, z] = launch.cluster;
        let cluster = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
        let value = sys::CUlaunchAttributeValue { clusterDim: cluster };
        attributes.push(attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value));
    }
    if launch.cooperative {
        let value = sys::CUlaunchAttributeValue { cooperative: 1 };
        attributes.push(attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, value));
    }
    if launch.dependent {
        let value = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
        let id = Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes.push(attribute(id, value));
    }
    attributes
}

//! kernels/host/abi.h: the machine's C interface.

use std::ffi::{c_char, c_int, c_void};

#[repr(C)]
pub struct KernelInfo {
    pub name: *const c_char,
    pub file: *const c_char,
    pub argument_bytes: *const u32,
    pub arguments: u32,
    pub max_threads: u32,
}

#[repr(C)]
pub struct Launch {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    pub dynamic_shared_bytes: u32,
    pub cooperative: u32,
    pub dependent: u32,
}

#[repr(C)]
pub struct Options {
    pub seed: u64,
    pub workers: u32,
    pub order: u32,
    pub asynchronous: u32,
    pub race: u32,
    pub watchdog_ms: u32,
}

#[repr(C)]
pub struct Fault {
    opaque: [u8; 0],
}

/// Declares the functions as linked symbols, and as a table that either they or the symbols
/// of a shared library fill.
macro_rules! functions {
    ($($field:ident = $symbol:ident($($argument:ident: $kind:ty),*) $(-> $result:ty)?;)+) => {
        #[derive(Clone, Copy)]
        pub struct Functions {
            $(pub $field: unsafe extern "C" fn($($argument: $kind),*) $(-> $result)?,)+
        }

        #[cfg(simt)]
        unsafe extern "C" {
            $(fn $symbol($($argument: $kind),*) $(-> $result)?;)+
        }

        impl Functions {
            #[cfg(simt)]
            pub fn linked() -> Self {
                Functions { $($field: $symbol,)+ }
            }

            /// # Safety
            /// The library's symbols are those of abi.h, and it is never unloaded.
            pub unsafe fn of(library: &libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: the caller's promise.
                unsafe {
                    Ok(Functions { $($field: *library.get(stringify!($symbol))?,)+ })
                }
            }
        }
    };
}

functions! {
    kernel = simt_kernel(index: u32) -> *const KernelInfo;
    launch = simt_launch(
        kernel: *const c_char, launch: *const Launch, arguments: *const *mut c_void,
        options: *const Options, fault: *mut *mut Fault
    ) -> c_int;
    fault_text = simt_fault_text(fault: *const Fault) -> *const c_char;
    fault_free = simt_fault_free(fault: *mut Fault);
    allocate = simt_allocate(bytes: u64, label: *const c_char) -> *mut c_void;
    free = simt_free(address: *mut c_void) -> c_int;
    tensor_map = simt_tensor_map(
        map: *mut c_void, data_type: u32, element_bytes: u32, rank: u32, address: *mut c_void,
        dimensions: *const u64, stride_bytes: *const u64, box_dimensions: *const u32,
        swizzle_bytes: u32, nan_fill: u32
    );
    switches = simt_switches() -> u64;
}

//! The machine kernels/host behind the driver of immediate.rs: every kernel on this CPU, as device
//! `simt`.
//!
//! Binds kernels/host/abi.h, either as it was linked into this program or from a shared library
//! (a changed kernel linked with the machine). What a kernel does wrong has every place named by
//! file and line.

mod abi;
mod addresses;
mod options;

use std::cell::Cell;
use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::ptr;

use addresses::resolve_addresses;
pub(super) use options::number;
pub use options::{Asynchronous, Options, Order};

use super::driver::*;
use super::immediate::{Immediate, Machine};
use crate::error::{Error, Result};

const DEVICE: &str = "simt";

struct Kernel {
    info: KernelInfo,
    name: CString,
}

/// kernels/host, and how it is to run.
pub struct Simt {
    functions: abi::Functions,
    options: Options,
    kernels: Vec<Kernel>,
    /// Launches so far that were dependent, recorded ones as often as they ran.
    dependent: Cell<u64>,
}

pub type Host = Immediate<Simt>;

/// Whether this program has the machine in it. Errors: why not.
pub fn present() -> Result<()> {
    match super::binaries::CXX {
        Ok(_) if cfg!(simt) => Ok(()),
        built => Err(Error::Device {
            device: DEVICE.to_string(),
            what: format!(
                "this build has no CPU machine for kernels: {}",
                built.err().unwrap_or("it was built without kernels/host")
            ),
            remedy: "install a C++20 compiler (g++ 12 or newer), or set CXX, and build again"
                .to_string(),
        }),
    }
}

impl Host {
    /// The machine in this program.
    pub fn new(options: Options) -> Result<Self> {
        present()?;
        #[cfg(simt)]
        return Ok(Self::with(abi::Functions::linked(), options));
        #[cfg(not(simt))]
        unreachable!("present() is an error without cfg(simt); options {options:?}")
    }

    /// The machine and the kernels of a shared library, which stays loaded until the process ends:
    /// its workers do, too.
    pub fn load(library: &Path, options: Options) -> Result<Self> {
        let refuse = |error: libloading::Error| Error::Device {
            device: DEVICE.to_string(),
            what: match std::error::Error::source(&error) {
                // The linker's own words; the path is in them.
                Some(cause) => format!("cannot load it: {cause}"),
                None => format!("cannot load {}: {error}", library.display()),
            },
            remedy: "link the kernels and the whole machine into a shared library".to_string(),
        };
        // SAFETY: its initialisers only register kernels; it is never unloaded (`leak`), and its
        // functions are those of abi.h, which it was linked with.
        let functions = unsafe {
            let loaded = Box::leak(Box::new(libloading::Library::new(library).map_err(refuse)?));
            abi::Functions::of(loaded).map_err(refuse)?
        };
        Ok(Self::with(functions, options))
    }

    fn with(functions: abi::Functions, options: Options) -> Self {
        let (kernels, dependent) = (kernels_of(&functions), Cell::new(0));
        let machine = Simt { functions, options, kernels, dependent };
        Immediate::over(machine, "simt (CPU)", options.multiprocessors)
    }

    pub fn options(&self) -> Options {
        self.machine().options
    }

    /// Another schedule for the launches from here on; the number of multiprocessors stays.
    pub fn set_options(&mut self, options: Options) {
        let multiprocessors = self.properties().multiprocessors;
        self.machine_mut().options = Options { multiprocessors, ..options };
    }

    /// Switches from one GPU thread to another so far, in the whole process.
    pub fn switches(&self) -> u64 {
        // SAFETY: takes and changes nothing.
        unsafe { (self.machine().functions.switches)() }
    }

    /// Dependent launches that this driver ran so far.
    pub fn dependent_launches(&self) -> u64 {
        self.machine().dependent.get()
    }
}

impl Simt {
    /// The text of a fault, its code addresses resolved; frees it.
    fn take_fault(&self, fault: *mut abi::Fault) -> String {
        if fault.is_null() {
            return "the machine gave no reason".to_string();
        }
        // SAFETY: the fault is ours, not null, and not used after `fault_free`; its text is
        // null-terminated and lives as long as it.
        unsafe {
            let text = CStr::from_ptr((self.functions.fault_text)(fault)).to_string_lossy();
            let resolved = resolve_addresses(&text);
            (self.functions.fault_free)(fault);
            resolved
        }
    }
}

// SAFETY: `allocate` hands on what simt's memory gives and fills (device_memory.cpp), until `free`;
// only kernels hold references into it.
unsafe impl Machine for Simt {
    const DEVICE: &'static str = DEVICE;
    /// Program, workers and stacks of a training run of 0.5M parameters on two cores: 88 MiB RSS
    /// less 14 planned.
    const PROCESS_BYTES: u64 = 74 << 20;

    fn allocate(&mut self, label: &str, bytes: u64) -> Option<u64> {
        let label = CString::new(label.replace('\0', " ")).expect("null bytes were replaced");
        // SAFETY: the label is null-terminated and copied; there are bytes.
        let address = unsafe { (self.functions.allocate)(bytes, label.as_ptr()) };
        (!address.is_null()).then_some(address as u64)
    }

    fn free(&mut self, address: u64) {
        // SAFETY: it came from `allocate` and was not freed; no kernel runs.
        let failed = unsafe { (self.functions.free)(address as *mut c_void) };
        debug_assert_eq!(failed, 0, "simt has given this buffer");
    }

    fn kernel(&mut self, name: &str) -> Result<Option<KernelId>> {
        let index = self.kernels.iter().position(|kernel| kernel.info.name == name);
        Ok(index.map(|index| KernelId(index as u32)))
    }

    fn kernel_names(&self) -> Vec<String> {
        self.kernels.iter().map(|kernel| kernel.info.name.clone()).collect()
    }

    fn kernel_info(&self, kernel: KernelId) -> Option<&KernelInfo> {
        self.kernels.get(kernel.0 as usize).map(|kernel| &kernel.info)
    }

    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<[u64; 16]> {
        let mut opaque = [0u64; 16];
        // SAFETY: the rules of `spec` say that there are 1 to 5 dimensions, as many box dimensions
        // and one stride fewer; 128 bytes of the map are written.
        unsafe {
            (self.functions.tensor_map)(
                opaque.as_mut_ptr().cast(),
                spec.data_type as u32,
                spec.data_type.bytes() as u32,
                spec.dimensions.len() as u32,
                spec.address.0 as *mut c_void,
                spec.dimensions.as_ptr(),
                spec.stride_bytes.as_ptr(),
                spec.box_dimensions.as_ptr(),
                spec.swizzle.span_bytes().unwrap_or(0) as u32,
                u32::from(spec.fill == Fill::Nans),
            )
        };
        Ok(opaque)
    }

    fn run(&self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let kernel = &self.kernels[launch.kernel.0 as usize];
        self.dependent.set(self.dependent.get() + u64::from(launch.dependent));
        let shape = abi::Launch {
            grid: launch.grid,
            block: launch.block,
            cluster: launch.cluster,
            dynamic_shared_bytes: launch.dynamic_shared_bytes,
            cooperative: u32::from(launch.cooperative),
            dependent: u32::from(launch.dependent || self.options.dependent),
        };
        let pointers = arguments.pointers();
        let mut fault = ptr::null_mut();
        // SAFETY: the name is null-terminated; there are as many pointers as parameters, each to a
        // value of the parameter's size (check_arguments) that outlives the call; the machine
        // copies the values and writes one fault pointer.
        let failed = unsafe {
            (self.functions.launch)(
                kernel.name.as_ptr(),
                &shape,
                pointers.as_ptr(),
                &self.options.abi(),
                &mut fault,
            )
        };
        if failed == 0 {
            return Ok(());
        }
        Err(Error::Launch {
            kernel: kernel.info.name.clone(),
            device: DEVICE.to_string(),
            what: self.take_fault(fault),
            remedy: format!(
                "mend the kernel; the same schedule again: {}",
                self.options.variables()
            ),
        })
    }
}

fn kernels_of(functions: &abi::Functions) -> Vec<Kernel> {
    let mut kernels = vec![];
    for index in 0.. {
        // SAFETY: the machine's kernels are static: registered before main and never removed.
        let Some(info) = (unsafe { (functions.kernel)(index).as_ref() }) else { break };
        // SAFETY: as above; the name is null-terminated, and there are `arguments` sizes.
        let (name, sizes) = unsafe {
            let sizes = match info.arguments {
                0 => &[],
                count => std::slice::from_raw_parts(info.argument_bytes, count as usize),
            };
            (CStr::from_ptr(info.name).to_owned(), sizes)
        };
        let info = KernelInfo {
            name: name.to_string_lossy().into_owned(),
            parameter_bytes: Some(sizes.to_vec()),
            max_threads: info.max_threads,
            compiled_for: (9, 0),
            registers: None,
            local_bytes: 0,
            static_shared_bytes: None,
        };
        kernels.push(Kernel { info, name });
    }
    kernels
}

//! Named ranges for profilers: NVTX 3, as its headers do it, without them.
//!
//! A profiler that wants ranges (nsys, ncu) names a library in NVTX_INJECTION64_PATH, or has it
//! loaded already. It is opened when the first range begins, asks for the tables below and fills in
//! its functions; without one, a range costs a look at a pointer. Nothing is linked.
//!
//! Source: nvtxDetail/nvtxTypes.h, nvtxImpl.h and nvtxInit.h of NVIDIA/NVTX. Every table begins and
//! ends with a null; entries are places of functions, numbered from 1.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::transmute;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix::Library;

const INJECTION: &str = "NVTX_INJECTION64_PATH";
const INITIALISE: &[u8] = b"InitializeInjectionNvtx2\0";
const NVTX_VERSION: u32 = 3;

// NvtxExportTableID
const CALLBACKS: u32 = 1;
const VERSION_INFO: u32 = 3;

/// Functions of each NvtxCallbackModule, from 1: core, CUDA, OpenCL, CUDA runtime, core 2, sync.
const FUNCTIONS: [usize; 6] = [15, 8, 14, 6, 15, 6];
const CORE: usize = 0;
const MOST: usize = 15;
// NvtxCallbackIdCore
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;

type Slot = AtomicPtr<c_void>;

/// Where the profiler puts its functions; entry 0 and everything after the last stay null.
static SLOTS: [[Slot; MOST + 1]; FUNCTIONS.len()] =
    [const { [const { AtomicPtr::new(ptr::null_mut()) }; MOST + 1] }; FUNCTIONS.len()];

/// The places of [`SLOTS`], as a table has them.
#[repr(transparent)]
struct Table([*const Slot; MOST + 2]);

// SAFETY: the pointers are to statics of atomics.
unsafe impl Sync for Table {}

static TABLES: [Table; FUNCTIONS.len()] = tables();

const fn tables() -> [Table; FUNCTIONS.len()] {
    let mut tables = [const { Table([ptr::null(); MOST + 2]) }; FUNCTIONS.len()];
    let mut module = 0;
    while module < FUNCTIONS.len() {
        let mut function = 1;
        while function <= FUNCTIONS[module] {
            tables[module].0[function] = &SLOTS[module][function];
            function += 1;
        }
        module += 1;
    }
    tables
}

/// NvtxExportTableCallbacks
#[repr(C)]
struct Callbacks {
    bytes: usize,
    function_table: extern "C" fn(c_uint, *mut *const *const Slot, *mut c_uint) -> c_int,
}

/// NvtxExportTableVersionInfo
#[repr(C)]
struct VersionInfo {
    bytes: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "C" fn(u32),
}

type ExportTable = extern "C" fn(u32) -> *const c_void;

extern "C" fn export_table(id: u32) -> *const c_void {
    static CALLBACK_TABLE: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), function_table };
    static VERSION_TABLE: VersionInfo = VersionInfo {
        bytes: size_of::<VersionInfo>(),
        version: NVTX_VERSION,
        reserved: 0,
        set_injection_version,
    };
    match id {
        CALLBACKS => ptr::from_ref(&CALLBACK_TABLE).cast(),
        VERSION_INFO => ptr::from_ref(&VERSION_TABLE).cast(),
        _ => ptr::null(),
    }
}

extern "C" fn set_injection_version(_: u32) {}

/// 1, and the table of a module with its number of entries, the first null among them; 0: there is
/// no such module.
extern "C" fn function_table(
    module: c_uint,
    table: *mut *const *const Slot,
    size: *mut c_uint,
) -> c_int {
    let Some(index) = (module as usize).checked_sub(1).filter(|it| *it < FUNCTIONS.len()) else {
        return 0;
    };
    // SAFETY: the profiler gives places for one value each, or null.
    unsafe {
        if let Some(size) = size.as_mut() {
            *size = FUNCTIONS[index] as c_uint + 1;
        }
        if let Some(table) = table.as_mut() {
            *table = TABLES[index].0.as_ptr();
        }
    }
    1
}

/// What a profiler gave.
struct Ranges {
    push: Push,
    pop: Pop,
}

type Push = extern "C" fn(*const c_char) -> c_int;
type Pop = extern "C" fn() -> c_int;

fn ranges() -> Option<&'static Ranges> {
    static RANGES: OnceLock<Option<Ranges>> = OnceLock::new();
    RANGES.get_or_init(injected).as_ref()
}

/// `None`: no profiler, or one that does not want ranges.
fn injected() -> Option<Ranges> {
    // SAFETY: the profiler's library is trusted by whoever named it; it is never unloaded; the
    // function's type is that of nvtxTypes.h, and so are the tables that it will ask for.
    let initialise = unsafe {
        let find = |library: &Library| {
            let found = library.get::<extern "C" fn(ExportTable) -> c_int>(INITIALISE);
            found.ok().map(|function| *function)
        };
        let loaded = find(&Library::this());
        let named = || {
            let library = Library::new(std::env::var_os(INJECTION)?).ok()?;
            find(Box::leak(Box::new(library)))
        };
        loaded.or_else(named)?
    };
    if initialise(export_table) == 0 {
        return None;
    }
    let function = |id: usize| {
        let address = SLOTS[CORE][id].load(Ordering::Acquire);
        (!address.is_null()).then_some(address)
    };
    let (push, pop) = (function(RANGE_PUSH_A)?, function(RANGE_POP)?);
    // SAFETY: not null, and of these types by nvtxTypes.h.
    Some(unsafe {
        Ranges {
            push: transmute::<*mut c_void, Push>(push),
            pop: transmute::<*mut c_void, Pop>(pop),
        }
    })
}

/// Begins a range of this thread.
pub fn push(name: &CStr) {
    if let Some(ranges) = ranges() {
        (ranges.push)(name.as_ptr());
    }
}

/// Ends the range that was begun last.
pub fn pop() {
    if let Some(ranges) = ranges() {
        (ranges.pop)();
    }
}

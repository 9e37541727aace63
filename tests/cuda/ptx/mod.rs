//! A second machine for kernels without a GPU: it runs the PTX that nvcc makes of them, on this
//! CPU.
//!
//! simt compiles the kernels with g++ and gives its own meaning to the wrappers of kernels/device.
//! This machine reads what nvcc wrote for the GPU: the wrappers' inline assembly as it stands
//! there, with its operands and their order, and everything else as the compiler has arranged it.
//! It was written from the PTX ISA and knows nothing of kernels/host, so that both must be right,
//! or wrong in the same way, for a test to pass on both. What comes behind PTX is not here: ptxas,
//! time, the order of memory.
//!
//! Races within a block are left to simt's detector.

mod arithmetic;
mod code;
mod copies;
mod cross;
mod instructions;
mod matrix;
mod memory;
mod run;
mod tensor;
mod tests;
mod text;
mod warp;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};

use isobath::cuda::binaries::FATBINS;
use isobath::cuda::{
    Arguments, Fill, Immediate, KernelId, KernelInfo, Launch, Machine, TensorMapSpec,
};
use isobath::{Error, Result};

const DEVICE: &str = "ptx";

/// By a hash of their text, taken apart once in a process.
type Files = BTreeMap<u64, Arc<Vec<code::Kernel>>>;
static FILES: LazyLock<Mutex<Files>> = LazyLock::new(Mutex::default);

/// In a file of kernels, by place.
#[derive(Clone)]
struct Kernel {
    file: Arc<Vec<code::Kernel>>,
    place: usize,
    info: KernelInfo,
}

impl Kernel {
    fn code(&self) -> &code::Kernel {
        &self.file[self.place]
    }
}

/// Name and text of each file.
pub type Texts = Vec<(String, String)>;

/// Whether this build has PTX. Errors: why not.
pub fn present() -> Result<()> {
    folder().map(|_| ())
}

/// Where build.rs has put it.
fn folder() -> Result<&'static Path> {
    let built = option_env!("ISOBATH_PTX").map(Path::new);
    let folder = built.ok_or_else(|| absent("this build has no nvcc".to_string()))?;
    match folder.is_dir() {
        true => Ok(folder),
        false => Err(absent(format!("{} is not on this machine", folder.display()))),
    }
}

fn absent(what: String) -> Error {
    let remedy = "run tools/fetch-nvcc, touch build.rs, and build again".to_string();
    Error::Device { device: DEVICE.to_string(), what, remedy }
}

/// Of every file that has a fatbin.
fn texts(folder: &Path) -> std::io::Result<Texts> {
    let read = |stem: &str| std::fs::read_to_string(folder.join(format!("{stem}.ptx")));
    FATBINS.iter().map(|(stem, _)| Ok((stem.to_string(), read(stem)?))).collect()
}

/// Runs the PTX of this build, or other texts.
pub struct Interpreter {
    texts: Texts,
    /// Those that were asked for.
    kernels: Vec<Kernel>,
    memory: memory::Global,
    multiprocessors: u32,
    /// Of the next launch's schedule.
    seed: Cell<u64>,
    /// A launch that takes more instructions of warps does not end.
    limit: u64,
}

pub type Ptx = Immediate<Interpreter>;

/// For the kernels of this build. Every launch has a schedule of its own, that begins with `seed`.
pub fn open(multiprocessors: u32, seed: u64) -> Result<Ptx> {
    let texts = texts(folder()?).map_err(|error| absent(error.to_string()))?;
    Ok(with_texts(texts, multiprocessors, seed, 1 << 36))
}

/// For these files, each a name and its PTX. `limit`: instructions of warps, of one launch.
fn with_texts(texts: Texts, multiprocessors: u32, seed: u64, limit: u64) -> Ptx {
    let (kernels, memory, seed) = (vec![], memory::Global::default(), Cell::new(seed));
    let machine = Interpreter { texts, kernels, memory, multiprocessors, seed, limit };
    Immediate::over(machine, "PTX (CPU)", multiprocessors)
}

impl Interpreter {
    /// All kernels of a file, taken apart.
    fn file(&self, stem: &str, text: &str) -> Result<Arc<Vec<code::Kernel>>> {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let hash = hasher.finish();
        if let Some(file) = FILES.lock().expect("no test ends in here").get(&hash) {
            return Ok(file.clone());
        }
        let kernels = code::kernels(text).map_err(|what| Error::Device {
            device: DEVICE.to_string(),
            what: format!("{stem}.ptx: {what}"),
            remedy: "teach tests/cuda/ptx this instruction".to_string(),
        })?;
        let file = Arc::new(kernels);
        FILES.lock().expect("no test ends in here").insert(hash, file.clone());
        Ok(file)
    }
}

// SAFETY: `Global` gives whole buffers that are written, and keeps them until `free`; a run holds
// no reference into them.
unsafe impl Machine for Interpreter {
    const DEVICE: &'static str = DEVICE;
    const PROCESS_BYTES: u64 = 0;

    fn allocate(&mut self, label: &str, bytes: u64) -> Option<u64> {
        self.memory.allocate(bytes, label)
    }

    fn free(&mut self, address: u64) {
        self.memory.free(address);
    }

    fn kernel(&mut self, name: &str) -> Result<Option<KernelId>> {
        if let Some(place) = self.kernels.iter().position(|kernel| kernel.info.name == name) {
            return Ok(Some(KernelId(place as u32)));
        }
        let entry = format!(".entry {name}(");
        let Some((stem, text)) = self.texts.iter().find(|(_, text)| text.contains(&entry)) else {
            return Ok(None);
        };
        let file = self.file(stem, text)?;
        let place = file.iter().position(|kernel| kernel.name == name).expect("its entry is there");
        let code = &file[place];
        let info = KernelInfo {
            name: name.to_string(),
            parameter_bytes: Some(code.parameters.iter().map(|&(_, bytes)| bytes).collect()),
            max_threads: code.max_threads,
            compiled_for: (9, 0),
            registers: None,
            local_bytes: 0,
            static_shared_bytes: Some(code.static_shared_bytes()),
        };
        self.kernels.push(Kernel { file: file.clone(), place, info });
        Ok(Some(KernelId(self.kernels.len() as u32 - 1)))
    }

    fn kernel_names(&self) -> Vec<String> {
        let names = |text: &str| -> Vec<String> {
            let entries = text.split(".visible .entry ").skip(1);
            entries.filter_map(|it| Some(it.split_once('(')?.0.to_string())).collect()
        };
        self.texts.iter().flat_map(|(_, text)| names(text)).collect()
    }

    fn kernel_info(&self, kernel: KernelId) -> Option<&KernelInfo> {
        self.kernels.get(kernel.0 as usize).map(|kernel| &kernel.info)
    }

    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<[u64; 16]> {
        let map = tensor::Map {
            element_bytes: spec.data_type.bytes() as u32,
            kind: spec.data_type as u32,
            address: spec.address.0,
            dimensions: spec.dimensions.to_vec(),
            stride_bytes: spec.stride_bytes.to_vec(),
            box_dimensions: spec.box_dimensions.to_vec(),
            swizzle_bytes: spec.swizzle.span_bytes().unwrap_or(0) as u32,
            nan_fill: spec.fill == Fill::Nans,
        };
        map.check()
            .map_err(|what| Error::TensorMap { what, remedy: "mend the map".to_string() })?;
        Ok(map.encode())
    }

    fn run(&self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let kernel = &self.kernels[launch.kernel.0 as usize];
        let code = kernel.code();
        let mut parameters = vec![0; code.parameter_bytes as usize];
        for (&(at, bytes), from) in code.parameters.iter().zip(arguments.pointers()) {
            // SAFETY: each value has its parameter's size and outlives this call.
            let from = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes as usize) };
            parameters[at as usize..][..bytes as usize].copy_from_slice(from);
        }
        let shape = run::Shape {
            grid: launch.grid,
            block: launch.block,
            cluster: launch.cluster,
            dynamic_shared_bytes: launch.dynamic_shared_bytes,
            resident: match launch.cooperative {
                true => launch.grid.iter().product(),
                false => self.multiprocessors,
            },
            limit: self.limit,
        };
        let seed = self.seed.get();
        self.seed.set(seed + 1);
        run::run(code, &self.memory, &parameters, shape, seed).map_err(|what| Error::Launch {
            kernel: kernel.info.name.clone(),
            device: DEVICE.to_string(),
            what,
            remedy: format!("mend the kernel; the schedule's seed is {seed}"),
        })
    }
}

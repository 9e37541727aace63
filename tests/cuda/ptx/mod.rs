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
//! Streams are in order and work runs at once; ids are trusted to be its own. Races within a block
//! are left to simt's detector.

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
use std::time::Instant;

use isobath::cuda::binaries::FATBINS;
use isobath::cuda::{
    Allocation, Arguments, Capture, DevicePointer, Driver, EventId, Fill, GraphId, KernelId,
    KernelInfo, Launch, Ledger, Properties, StreamId, TensorMap, TensorMapSpec, check_arguments,
    check_launch,
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

#[derive(Clone)]
enum Recorded {
    Launch(Launch, Arguments),
    Copy { from: DevicePointer, to: DevicePointer, bytes: u64 },
    Fill { to: DevicePointer, bytes: u64, value: u8 },
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

pub struct Ptx {
    texts: Texts,
    /// Those that were asked for.
    kernels: Vec<Kernel>,
    properties: Properties,
    memory: memory::Global,
    ledger: Ledger,
    streams: u32,
    events: Vec<Option<Instant>>,
    capture: Capture,
    recorded: Vec<Recorded>,
    graphs: Vec<Option<Vec<Recorded>>>,
    /// Of the next launch's schedule.
    seed: Cell<u64>,
    /// A launch that takes more instructions of warps does not end.
    pub limit: u64,
}

impl Ptx {
    /// For the kernels of this build. Every launch has a schedule of its own, that begins with
    /// `seed`.
    pub fn open(multiprocessors: u32, seed: u64) -> Result<Self> {
        let texts = texts(folder()?).map_err(|error| absent(error.to_string()))?;
        Ok(Self::of(texts, multiprocessors, seed))
    }

    /// For these files, each a name and its PTX.
    pub fn of(texts: Texts, multiprocessors: u32, seed: u64) -> Self {
        Ptx {
            texts,
            kernels: vec![],
            properties: Properties {
                name: "PTX (CPU)".to_string(),
                compute_capability: (9, 0),
                multiprocessors,
                memory_bytes: 1 << 34,
                l2_bytes: 0,
                shared_bytes_per_block: 232_448,
                shared_bytes_per_multiprocessor: 233_472,
                max_threads_per_block: 1024,
                max_threads_per_multiprocessor: 2048,
                clock_mhz: 0,
                driver_version: "none".to_string(),
            },
            memory: memory::Global::default(),
            ledger: Ledger::default(),
            streams: 1,
            events: vec![],
            capture: Capture::default(),
            recorded: vec![],
            graphs: vec![],
            seed: Cell::new(seed),
            limit: 1 << 36,
        }
    }

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

    fn enqueue(&mut self, stream: StreamId, work: Recorded) -> Result<()> {
        match self.capture.records(DEVICE, stream)? {
            true => self.recorded.push(work),
            false => self.execute(&work)?,
        }
        Ok(())
    }

    fn execute(&self, work: &Recorded) -> Result<()> {
        let failed = |what: String| Error::Device {
            device: DEVICE.to_string(),
            what,
            remedy: "mend the copy".to_string(),
        };
        match work {
            Recorded::Launch(launch, arguments) => self.run(launch, arguments),
            Recorded::Copy { from, to, bytes } => {
                let mut values = vec![0; *bytes as usize];
                self.memory.read(from.0, &mut values).map_err(failed)?;
                self.memory.write(to.0, &values).map_err(failed)
            }
            Recorded::Fill { to, bytes, value } => {
                self.memory.write(to.0, &vec![*value; *bytes as usize]).map_err(failed)
            }
        }
    }

    fn run(&self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let kernel = &self.kernels[launch.kernel.0 as usize];
        check_arguments(DEVICE, &kernel.info, arguments, &self.ledger)?;
        let code = kernel.code();
        let mut parameters = vec![0; code.parameter_bytes as usize];
        for (&(at, bytes), from) in code.parameters.iter().zip(arguments.pointers()) {
            // SAFETY: each value has its parameter's size (check_arguments) and outlives this call.
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
                false => self.properties.multiprocessors,
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

impl Driver for Ptx {
    fn device(&self) -> &'static str {
        DEVICE
    }

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.capture.forbid(DEVICE, "an allocation")?;
        if bytes == 0 {
            return Err(absent(format!("`{label}` has no bytes")));
        }
        let address = DevicePointer(self.memory.allocate(bytes, label));
        let buffer = Allocation { address, bytes };
        self.ledger.add(buffer, label);
        Ok(buffer)
    }

    fn allocate_host(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        let buffer = self.allocate(label, bytes)?;
        self.fill(StreamId::MAIN, buffer.address, bytes, 0)?;
        self.ledger.add_on_host(buffer, label);
        Ok(buffer)
    }

    fn allocated_bytes(&self) -> u64 {
        self.ledger.bytes()
    }

    fn release(&mut self, buffer: Allocation) -> Result<()> {
        assert!(self.ledger.remove(buffer), "a buffer of another driver");
        self.memory.free(buffer.address.0);
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(self.properties.memory_bytes - self.allocated_bytes())
    }

    fn kernel(&mut self, name: &str) -> Result<KernelId> {
        if let Some(place) = self.kernels.iter().position(|kernel| kernel.info.name == name) {
            return Ok(KernelId(place as u32));
        }
        let entry = format!(".entry {name}(");
        let Some((stem, text)) = self.texts.iter().find(|(_, text)| text.contains(&entry)) else {
            return Err(isobath::cuda::no_such_kernel(DEVICE, name, &self.kernel_names()));
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
        Ok(KernelId(self.kernels.len() as u32 - 1))
    }

    fn kernel_info(&self, kernel: KernelId) -> Result<&KernelInfo> {
        Ok(&self.kernels[kernel.0 as usize].info)
    }

    fn kernel_names(&self) -> Vec<String> {
        let names = |text: &str| -> Vec<String> {
            let entries = text.split(".visible .entry ").skip(1);
            entries.filter_map(|it| Some(it.split_once('(')?.0.to_string())).collect()
        };
        self.texts.iter().flat_map(|(_, text)| names(text)).collect()
    }

    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap> {
        let tensor = self.ledger.tensor(DEVICE, spec)?;
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
        Ok(TensorMap { opaque: map.encode(), tensor })
    }

    fn overlap(&mut self, _: bool) {}

    fn launch(&mut self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let info = &self.kernels[launch.kernel.0 as usize].info;
        check_launch(DEVICE, &self.properties, info, launch)?;
        check_arguments(DEVICE, info, arguments, &self.ledger)?;
        self.enqueue(launch.stream, Recorded::Launch(*launch, arguments.clone()))
    }

    fn to_device(&mut self, _: StreamId, from: &[u8], to: DevicePointer) -> Result<()> {
        self.ledger.check(DEVICE, "write", to, from.len() as u64)?;
        self.memory.write(to.0, from).expect("it lies in a buffer");
        Ok(())
    }

    fn to_host(&mut self, _: StreamId, from: DevicePointer, to: &mut [u8]) -> Result<()> {
        self.ledger.check(DEVICE, "read", from, to.len() as u64)?;
        self.memory.read(from.0, to).expect("it lies in a buffer");
        Ok(())
    }

    fn host_bytes(&mut self, at: DevicePointer, bytes: u64) -> Result<&mut [u8]> {
        self.ledger.check_on_host(DEVICE, at, bytes)?;
        // SAFETY: the range lies in a live buffer of ours; no other reference into it outlives the
        // borrow of `self`, and no kernel runs.
        Ok(unsafe { std::slice::from_raw_parts_mut(at.0 as *mut u8, bytes as usize) })
    }

    fn on_device(
        &mut self,
        stream: StreamId,
        from: DevicePointer,
        to: DevicePointer,
        bytes: u64,
    ) -> Result<()> {
        self.ledger.check_copy(DEVICE, from, to, bytes)?;
        self.enqueue(stream, Recorded::Copy { from, to, bytes })
    }

    fn fill(&mut self, stream: StreamId, to: DevicePointer, bytes: u64, value: u8) -> Result<()> {
        self.ledger.check(DEVICE, "fill", to, bytes)?;
        self.enqueue(stream, Recorded::Fill { to, bytes, value })
    }

    fn new_stream(&mut self) -> Result<StreamId> {
        self.streams += 1;
        Ok(StreamId(self.streams - 1))
    }

    fn new_event(&mut self) -> Result<EventId> {
        self.events.push(None);
        Ok(EventId(self.events.len() as u32 - 1))
    }

    fn record(&mut self, event: EventId, _: StreamId) -> Result<()> {
        self.events[event.0 as usize] = Some(Instant::now());
        Ok(())
    }

    fn wait(&mut self, _: StreamId, _: EventId) -> Result<()> {
        Ok(())
    }

    fn elapsed_ms(&mut self, from: EventId, to: EventId) -> Result<f64> {
        let at = |event: EventId| self.events[event.0 as usize].expect("it was recorded");
        Ok((at(to) - at(from)).as_secs_f64() * 1e3)
    }

    fn await_event(&mut self, _: EventId) -> Result<()> {
        Ok(())
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn begin_capture(&mut self, stream: StreamId) -> Result<()> {
        self.capture.begin(DEVICE, stream)
    }

    fn end_capture(&mut self, stream: StreamId) -> Result<GraphId> {
        self.capture.end(DEVICE, stream)?;
        self.graphs.push(Some(std::mem::take(&mut self.recorded)));
        Ok(GraphId(self.graphs.len() as u32 - 1))
    }

    fn launch_graph(&mut self, graph: GraphId, _: StreamId) -> Result<()> {
        let work = self.graphs[graph.0 as usize].as_ref().expect("it was not released");
        work.iter().try_for_each(|work| self.execute(work))
    }

    fn release_graph(&mut self, graph: GraphId) -> Result<()> {
        self.graphs[graph.0 as usize] = None;
        Ok(())
    }
}

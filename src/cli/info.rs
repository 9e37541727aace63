//! `isobath info`: this build, the devices it can use here, and what it brings along.

use std::fmt;
use std::path::Path;
use std::thread;

use clap::Args;
use isobath::Error;
use isobath::config::{DeviceKind, preset_names};
use isobath::cuda::binaries::{ARCHITECTURES, CODE, CXX, FATBINS, NVCC};
use isobath::cuda::nvidia::{self, Nvidia};
use isobath::cuda::{self, Driver, Properties};
use isobath::host_memory::{self, HostMemory};
use isobath::version::Program;
use serde::Serialize;

use super::output;

#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: InfoArgs) -> anyhow::Result<()> {
    let info = Info::collect();
    if args.json { output::print_json(&info) } else { output::print(&info.to_string()) }
}

#[derive(Serialize)]
struct Info {
    #[serde(flatten)]
    program: Program,
    build: Build,
    devices: Devices,
    presets: Vec<&'static str>,
    /// Texts inside the program, as `data.train` names them.
    texts: &'static [&'static str],
}

#[derive(Serialize)]
struct Build {
    /// "release" or "debug"
    profile: &'static str,
    /// "x86_64-linux"
    target: String,
    /// Cargo features that are on.
    features: Vec<&'static str>,
    kernels: Kernels,
}

/// What build.rs made of kernels/.
#[derive(Serialize)]
struct Kernels {
    /// Version and place; `None`: devices.cuda says why not.
    nvcc: Option<&'static str>,
    /// ISOBATH_ARCHITECTURES
    architectures: &'static str,
    gpu: Vec<KernelFile>,
    /// Version and place of the compiler of device simt; `None`: devices.simt says why not.
    cxx: Option<&'static str>,
}

#[derive(Serialize)]
struct KernelFile {
    /// "norm"
    name: &'static str,
    /// "sm_80 sm_90a compute_80"; compute_ is PTX.
    code: &'static str,
    bytes: usize,
}

#[derive(Serialize)]
struct Devices {
    cpu: Cpu,
    cuda: Machine,
    simt: Machine,
}

#[derive(Serialize)]
struct Cpu {
    available: bool,
    /// `None` where the operating system does not say.
    model: Option<String>,
    /// Threads that this process may run at once.
    cores: Option<usize>,
    vector_extensions: Vec<&'static str>,
    /// Of this process, where a control group limits it.
    memory_bytes: Option<u64>,
    free_memory_bytes: Option<u64>,
}

/// A machine for kernels.
#[derive(Serialize)]
struct Machine {
    available: bool,
    /// What is missing; `None` where nothing is.
    why: Option<String>,
    remedy: Option<String>,
    gpu: Option<Gpu>,
}

#[derive(Serialize)]
struct Gpu {
    /// "NVIDIA H200"
    name: String,
    /// "9.0"
    compute_capability: String,
    multiprocessors: u32,
    memory_bytes: u64,
    /// The CUDA version that the driver offers.
    driver: String,
}

impl Info {
    fn collect() -> Self {
        Info {
            program: Program::this(),
            build: Build {
                profile: if cfg!(debug_assertions) { "debug" } else { "release" },
                target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
                features: if cfg!(feature = "require-cuda") {
                    vec!["require-cuda"]
                } else {
                    vec![]
                },
                kernels: Kernels::of_this_build(),
            },
            devices: Devices { cpu: Cpu::find(), cuda: Machine::cuda(), simt: Machine::simt() },
            presets: preset_names(),
            texts: &["bundled:austen"],
        }
    }
}

impl Kernels {
    fn of_this_build() -> Self {
        let file = |&(name, bytes): &(&'static str, &'static [u8])| {
            let code = CODE.iter().find(|(stem, _)| *stem == name).map_or("", |(_, code)| *code);
            KernelFile { name, code, bytes: bytes.len() }
        };
        Kernels {
            nvcc: NVCC.ok(),
            architectures: ARCHITECTURES,
            gpu: FATBINS.iter().map(file).collect(),
            cxx: CXX.ok(),
        }
    }
}

impl Machine {
    /// Opens the first GPU: only the driver knows whether it works.
    fn cuda() -> Self {
        let built = nvidia::kernels_present(FATBINS, NVCC);
        match Nvidia::open(0) {
            Ok(gpu) => Machine { gpu: Some(Gpu::of(gpu.properties())), ..Machine::lacking([]) },
            Err(error) => Machine::lacking(built.err().into_iter().chain([error])),
        }
    }

    fn simt() -> Self {
        Machine::lacking(cuda::present(DeviceKind::Simt).err())
    }

    /// What is missing, all of it; what is told twice is said once.
    fn lacking(errors: impl IntoIterator<Item = Error>) -> Self {
        let (mut whys, mut remedies) = (vec![], vec![]);
        for error in errors {
            let (why, remedy) = match error {
                Error::Device { what, remedy, .. } => (what, Some(remedy)),
                other => (other.to_string(), None),
            };
            if !whys.contains(&why) {
                whys.push(why);
                remedies.extend(remedy);
            }
        }
        let told = |parts: Vec<String>| (!parts.is_empty()).then(|| parts.join("; "));
        Machine { available: whys.is_empty(), why: told(whys), remedy: told(remedies), gpu: None }
    }
}

impl Gpu {
    fn of(properties: &Properties) -> Self {
        let (major, minor) = properties.compute_capability;
        Gpu {
            name: properties.name.clone(),
            compute_capability: format!("{major}.{minor}"),
            multiprocessors: properties.multiprocessors,
            memory_bytes: properties.memory_bytes,
            driver: properties.driver_version.clone(),
        }
    }
}

impl Cpu {
    fn find() -> Self {
        let memory = HostMemory::now();
        Cpu {
            available: true,
            model: host_memory::field(Path::new("/proc/cpuinfo"), "model name"),
            cores: thread::available_parallelism().ok().map(usize::from),
            vector_extensions: vector_extensions(),
            memory_bytes: memory.total,
            free_memory_bytes: memory.available,
        }
    }
}

/// Found at run time, not at compile time.
#[cfg(target_arch = "x86_64")]
fn vector_extensions() -> Vec<&'static str> {
    [
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::is_x86_feature_detected!("avx512bw")),
        ("avx512bf16", std::is_x86_feature_detected!("avx512bf16")),
    ]
    .into_iter()
    .filter_map(|(name, found)| found.then_some(name))
    .collect()
}

#[cfg(target_arch = "aarch64")]
fn vector_extensions() -> Vec<&'static str> {
    [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
        ("sve", std::arch::is_aarch64_feature_detected!("sve")),
    ]
    .into_iter()
    .filter_map(|(name, found)| found.then_some(name))
    .collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn vector_extensions() -> Vec<&'static str> {
    vec![]
}

/// The lines that people read.
impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Build { profile, target, features, kernels } = &self.build;
        writeln!(f, "isobath {}, {profile} build for {target}", self.program.version)?;
        if let Some(commit) = self.program.commit_words() {
            writeln!(f, "commit    {commit}")?;
        }
        writeln!(f, "features  {}", listed(features))?;
        let cpu = &self.devices.cpu;
        writeln!(
            f,
            "cpu       {}; {} cores; {}; memory {}, free {}",
            cpu.model.as_deref().unwrap_or("model unknown"),
            cpu.cores.map_or("unknown number of".to_string(), |cores| cores.to_string()),
            listed(&cpu.vector_extensions),
            gibibytes(cpu.memory_bytes),
            gibibytes(cpu.free_memory_bytes),
        )?;
        writeln!(f, "cuda      {}", self.devices.cuda)?;
        writeln!(f, "simt      {}", self.devices.simt)?;
        match kernels.nvcc {
            Some(nvcc) => writeln!(f, "nvcc      {nvcc}, for {}", kernels.architectures)?,
            None => writeln!(f, "nvcc      none in this build")?,
        }
        for file in &kernels.gpu {
            writeln!(f, "          {:18} {}, {} bytes", file.name, file.code, file.bytes)?;
        }
        writeln!(f, "c++       {}", kernels.cxx.unwrap_or("none in this build"))?;
        writeln!(f, "presets   {}", listed(&self.presets))?;
        writeln!(f, "texts     {}", listed(self.texts))
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.why, &self.gpu) {
            (Some(why), _) => {
                write!(f, "not available: {why}")?;
                self.remedy.iter().try_for_each(|it| write!(f, "\n          remedy: {it}"))
            }
            (None, None) => f.write_str("available"),
            (None, Some(gpu)) => {
                let Gpu { name, compute_capability, multiprocessors, memory_bytes, driver } = gpu;
                write!(
                    f,
                    "{name}, compute capability {compute_capability}, {multiprocessors} \
                     multiprocessors, memory {}, driver for CUDA {driver}",
                    gibibytes(Some(*memory_bytes))
                )
            }
        }
    }
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() { "none".to_string() } else { names.join(" ") }
}

fn gibibytes(bytes: Option<u64>) -> String {
    match bytes {
        Some(bytes) => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
        None => "unknown".to_string(),
    }
}

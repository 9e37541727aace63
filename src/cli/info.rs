//! `isobath info`: this build, the devices it can use here, and what it brings along.

use std::fmt;
use std::thread;

use clap::Args;
use isobath::config::preset_names;
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
    version: &'static str,
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
    features: &'static [&'static str],
}

#[derive(Serialize)]
struct Devices {
    cpu: Cpu,
    cuda: Absent,
    simt: Absent,
}

#[derive(Serialize)]
struct Cpu {
    available: bool,
    /// `None` where the operating system does not say.
    model: Option<String>,
    /// Threads that this process may run at once.
    cores: Option<usize>,
    vector_extensions: Vec<&'static str>,
    memory_bytes: Option<u64>,
    free_memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Absent {
    available: bool,
    why: &'static str,
}

const NOT_BUILT: Absent = Absent { available: false, why: "not in this build" };

impl Info {
    fn collect() -> Self {
        Info {
            version: env!("CARGO_PKG_VERSION"),
            build: Build {
                profile: if cfg!(debug_assertions) { "debug" } else { "release" },
                target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
                features: &[],
            },
            devices: Devices { cpu: Cpu::find(), cuda: NOT_BUILT, simt: NOT_BUILT },
            presets: preset_names(),
            texts: &["bundled:austen"],
        }
    }
}

impl Cpu {
    fn find() -> Self {
        Cpu {
            available: true,
            model: kernel_field("/proc/cpuinfo", "model name"),
            cores: thread::available_parallelism().ok().map(usize::from),
            vector_extensions: vector_extensions(),
            memory_bytes: memory("MemTotal"),
            free_memory_bytes: memory("MemAvailable"),
        }
    }
}

/// The first `name : value` line of a file of the Linux kernel; `None` on other systems.
fn kernel_field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(field, _)| field.trim() == name)?;
    Some(value.trim().to_string())
}

/// Bytes, from a line such as "MemTotal:  16384 kB".
fn memory(field: &str) -> Option<u64> {
    let text = kernel_field("/proc/meminfo", field)?;
    let kibibytes: u64 = text.strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1 << 10)
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
        let Build { profile, target, features } = &self.build;
        writeln!(f, "isobath {}, {profile} build for {target}", self.version)?;
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
        writeln!(f, "cuda      {}", self.devices.cuda.why)?;
        writeln!(f, "simt      {}", self.devices.simt.why)?;
        writeln!(f, "presets   {}", listed(&self.presets))?;
        writeln!(f, "texts     {}", listed(self.texts))
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

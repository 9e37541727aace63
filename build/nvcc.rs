//! Fatbins: finds nvcc, compiles every kernel file for the architectures of the build, and fails
//! where ptxas says that a kernel spills.
//!
//! ISOBATH_ARCHITECTURES (default "80,90a") names the machine code to make; PTX for other GPUs is
//! made for the lowest one without a suffix. NVCC_CCBIN names nvcc's host compiler.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use crate::jobs::{self, Job, Kept};
use crate::sources::Sources;
use crate::{Stop, ptxas, warn};

pub const REMEDY: &str =
    "run tools/fetch-nvcc, or install the CUDA toolkit and name its nvcc in NVCC";

/// What tools/fetch-nvcc fills, below the project's root.
const FETCHED: &str = ".cuda/toolkit/nvidia/cu13/bin";
/// The first with C++20 and sm_90a.
const OLDEST: u32 = 12;
const FLAGS: [&str; 5] = ["-fatbin", "-std=c++20", "-O3", "-lineinfo", "-Xptxas=-v,-warn-spills"];
/// Flags that nvcc takes from its environment.
const READ_BY_NVCC: [&str; 2] = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"];

pub struct Built {
    /// "13.0.88 at /usr/local/cuda/bin/nvcc"
    pub nvcc: String,
    pub fatbins: Vec<Fatbin>,
}

pub struct Fatbin {
    pub stem: String,
    pub path: PathBuf,
    /// "sm_80 sm_90a compute_80"
    pub code: String,
}

impl Fatbin {
    fn source(&self) -> String {
        format!("kernels/{}.cu", self.stem)
    }
}

pub fn build(root: &Path, out: &Path, sources: &Sources) -> Result<Built, Stop> {
    let variables = ["NVCC", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "ISOBATH_ARCHITECTURES"];
    for name in variables.iter().chain(&READ_BY_NVCC) {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let architectures = architectures().map_err(Stop::Error)?;
    let nvcc = find(root).map_err(Stop::Absent)?;
    if sources.kernels.is_empty() {
        return Err(Stop::Absent("kernels/ holds no .cu file".to_string()));
    }
    let folder = out.join("cuda");
    fs::create_dir_all(&folder)
        .map_err(|error| Stop::Error(format!("{}: {error}", folder.display())))?;

    let (mut fatbins, mut jobs) = (vec![], vec![]);
    for kernel in &sources.kernels {
        let targets = targets(&kernel.architectures_of(&architectures));
        let code = targets.iter().map(|(_, code)| code.as_str()).collect::<Vec<_>>().join(" ");
        let stem = kernel.file.stem.clone();
        let path = folder.join(format!("{stem}.fatbin"));
        let fatbin = Fatbin { stem, path, code };
        if targets.is_empty() {
            let text = architectures_text();
            warn(&format!("{} is for none of ISOBATH_ARCHITECTURES={text}", fatbin.source()));
            continue;
        }
        let kept = kept(&folder, &fatbin.stem, &targets);
        let command = |output: &Path, kept: &Path| {
            nvcc.command(root, &kernel.file.path, &targets, output, kept)
        };
        let anywhere = command(Path::new("anywhere"), Path::new("anywhere"));
        let mut key = vec![format!("{anywhere:?}"), nvcc.identity.clone()];
        key.extend(READ_BY_NVCC.map(|name| format!("{:?}", env::var_os(name))));
        jobs.push(Job {
            source: fatbin.source(),
            command: command(&fatbin.path, &kept.folder),
            output: fatbin.path.clone(),
            kept: Some(kept),
            fingerprint: sources.fingerprint(&kernel.file, &key),
        });
        fatbins.push(fatbin);
    }
    let said = jobs::run(jobs).map_err(|message| refused(&message))?;
    judge(&fatbins, &said).map_err(Stop::Error)?;
    println!("cargo::rustc-env=ISOBATH_PTX={}", folder.display());
    Ok(Built { nvcc: format!("{} at {}", nvcc.version, nvcc.path.display()), fatbins })
}

/// What the compilers said: objections of ptxas.rs, or warnings.
fn judge(fatbins: &[Fatbin], said: &[String]) -> Result<(), String> {
    let mut objections = vec![];
    for (fatbin, said) in fatbins.iter().zip(said) {
        let functions = fatbin.code.matches("sm_").count();
        let file = fatbin.source();
        objections.extend(ptxas::objections(&file, said, functions, ptxas::EXCEPTIONS));
    }
    if !objections.is_empty() {
        return Err(format!(
            "ptxas makes slow code of these kernels:\n  {}\nremedy: fewer live values or a smaller \
             tile; or an entry, with its reason, in EXCEPTIONS of build/ptxas.rs",
            objections.join("\n  ")
        ));
    }
    for (fatbin, said) in fatbins.iter().zip(said) {
        for line in said.lines().filter(|line| line.contains("warning")) {
            warn(&format!("{}: {line}", fatbin.source()));
        }
    }
    Ok(())
}

/// A compiler that misses its own host compiler is as good as none; anything else is an error.
fn refused(message: &str) -> Stop {
    if message.contains("Failed to preprocess host compiler properties") {
        return Stop::Absent(
            "nvcc finds no C++ compiler of its own: install g++, or name one in NVCC_CCBIN"
                .to_string(),
        );
    }
    let remedy = if message.contains("unsupported GNU version") {
        "this nvcc does not know your g++: name an older one in NVCC_CCBIN (NVCC_CCBIN=g++-14), or \
         take the nvcc of tools/fetch-nvcc"
    } else if message.contains(".target") {
        "a kernel file for one architecture says so in its name, as gemm_sm90.cu does, or in its \
         header: // Architectures: sm_90a"
    } else {
        "correct the file, or build without GPU kernels: NVCC=none"
    };
    Stop::Error(format!("{message}\nremedy: {remedy}"))
}

// ---------------------------------------------------------------- architectures

/// The list of the build as it was written.
pub fn architectures_text() -> String {
    env::var("ISOBATH_ARCHITECTURES").unwrap_or("80,90a".to_string())
}

fn architectures() -> Result<Vec<String>, String> {
    let text = architectures_text();
    let mut names = vec![];
    for name in text.split(',').map(str::trim) {
        let digits = name.trim_end_matches(['a', 'f']);
        if digits.parse::<u32>().is_ok_and(|number| number >= 80) && name.len() - digits.len() <= 1
        {
            names.push(name.to_string());
        } else {
            return Err(format!(
                "ISOBATH_ARCHITECTURES={text}: `{name}` is no architecture from 80 on\n\
                 remedy: numbers separated by commas, as in ISOBATH_ARCHITECTURES=80,90a"
            ));
        }
    }
    Ok(names)
}

/// Pairs of what nvcc calls arch and code: machine code for each, then PTX. PTX of an architecture
/// with a suffix runs nowhere else.
fn targets(architectures: &[&str]) -> Vec<(String, String)> {
    let machine =
        architectures.iter().map(|name| (format!("compute_{name}"), format!("sm_{name}")));
    let portable = architectures.iter().filter_map(|name| name.parse::<u32>().ok()).min();
    let ptx = portable.map(|number| (format!("compute_{number}"), format!("compute_{number}")));
    machine.chain(ptx).collect()
}

/// The PTX from which the machine code of the newest architecture is made: tests run it.
fn kept(folder: &Path, stem: &str, targets: &[(String, String)]) -> Kept {
    let number = |compute: &str| -> u32 {
        let digits = compute.trim_matches(|it: char| !it.is_ascii_digit());
        digits.parse().unwrap_or_default()
    };
    let made = targets.iter().map(|(compute, _)| compute.as_str());
    let compute = made.max_by_key(|compute| number(compute)).unwrap_or_default();
    Kept {
        folder: folder.join(format!("{stem}.kept")),
        // A file that is compiled for one architecture has no name of it.
        names: [format!("{stem}.{compute}.ptx"), format!("{stem}.ptx")],
        output: folder.join(format!("{stem}.ptx")),
    }
}

// ---------------------------------------------------------------- finding nvcc

struct Nvcc {
    path: PathBuf,
    /// "13.0.88"
    version: String,
    /// All that it says of itself.
    identity: String,
}

impl Nvcc {
    fn command(
        &self,
        root: &Path,
        file: &Path,
        targets: &[(String, String)],
        output: &Path,
        kept: &Path,
    ) -> Command {
        let mut command = Command::new(&self.path);
        command.args(FLAGS).arg("-I").arg(root.join("kernels"));
        if let Some(compiler) = env::var_os("NVCC_CCBIN") {
            command.arg("-ccbin").arg(compiler);
        }
        for (compute, code) in targets {
            command.arg(format!("-gencode=arch={compute},code={code}"));
        }
        command.arg("--keep").arg("--keep-dir").arg(kept);
        command.arg("-o").arg(output).arg(file);
        command
    }
}

/// NVCC alone decides if it is set; else the first place that has an nvcc that runs.
fn find(root: &Path) -> Result<Nvcc, String> {
    if let Some(path) = env::var_os("NVCC") {
        return probe(Path::new(&path)).map_err(|why| format!("NVCC={}: {why}", path.display()));
    }
    let mut places: Vec<(String, PathBuf)> = vec![];
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = env::var_os(name) {
            places.push((format!("{name}={}", home.display()), Path::new(&home).join("bin")));
        }
    }
    let search = env::var_os("PATH").unwrap_or_default();
    places.extend(env::split_paths(&search).map(|folder| ("PATH".to_string(), folder)));
    places.push(("/usr/local/cuda".to_string(), PathBuf::from("/usr/local/cuda/bin")));
    places.push((FETCHED.to_string(), root.join(FETCHED)));

    let mut searched: Vec<String> = vec![];
    for (place, folder) in places {
        let path = folder.join(format!("nvcc{}", env::consts::EXE_SUFFIX));
        let place = if path.is_file() {
            match probe(&path) {
                Ok(nvcc) => return Ok(nvcc),
                Err(why) => format!("{} ({why})", path.display()),
            }
        } else {
            place
        };
        if !searched.contains(&place) {
            searched.push(place);
        }
    }
    Err(format!("no nvcc (looked at NVCC, CUDA_HOME, CUDA_PATH; in {})", searched.join(", ")))
}

fn probe(path: &Path) -> Result<Nvcc, String> {
    let done = Command::new(path).arg("--version").output();
    let done = done.map_err(|error| format!("cannot be run: {error}"))?;
    if !done.status.success() {
        return Err(format!(
            "`--version` fails ({}): {}",
            done.status,
            String::from_utf8_lossy(&done.stderr).trim()
        ));
    }
    let identity = String::from_utf8_lossy(&done.stdout).into_owned();
    // "Cuda compilation tools, release 13.0, V13.0.88"
    let version = identity.split_once(", V").and_then(|(_, rest)| rest.split_whitespace().next());
    let version = version.ok_or("`--version` does not print what nvcc prints")?.to_string();
    let major = version.split('.').next().and_then(|major| major.parse().ok());
    if major.is_none_or(|major: u32| major < OLDEST) {
        return Err(format!("nvcc {version} is too old: {OLDEST}.0 or newer is needed"));
    }
    Ok(Nvcc { path: path.to_path_buf(), version, identity })
}

//! Compiles kernels/ twice: with nvcc into fatbins for GPUs, with g++ into the CPU machine `simt`.
//!
//! Either compiler may be missing; then that device is missing, a warning says why, and so does
//! `isobath info`. The feature `require-cuda` makes a missing nvcc an error. To try a build without
//! one of them, name a program that does not exist: NVCC=none, CXX=none.
//!
//! For the crate: cfg(cuda_kernels), cfg(simt), OUT_DIR/kernels.rs (see src/cuda/binaries.rs). For
//! its tests, where there is simt: ISOBATH_SIMT_MACHINE (the machine's static library),
//! ISOBATH_SIMT_COMPILE (command and flags for a host kernel) and ISOBATH_SIMT_HOOKS (the flags of
//! the race-checked variant), both separated by \x1f; where there is nvcc: ISOBATH_PTX, the folder with
//! the PTX of every file.
//! What else it says is in build/commit.rs.
//! ISOBATH_KERNEL_CACHE names a folder in which builds of several profiles share compiled kernels.
//! A compiler that is installed after a build is seen after `touch build.rs`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, process};

#[path = "build/commit.rs"]
mod commit;
#[path = "build/host.rs"]
mod host;
#[path = "build/jobs.rs"]
mod jobs;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/ptxas.rs"]
mod ptxas;
#[path = "build/sources.rs"]
mod sources;

use sources::Sources;

/// Why a device is not in this build.
enum Stop {
    /// It cannot be here: a warning, the rest is built.
    Absent(String),
    /// It should be here: the build fails.
    Error(String),
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    println!("cargo::rustc-check-cfg=cfg(cuda_kernels)");
    println!("cargo::rustc-check-cfg=cfg(simt)");
    if let Err(message) = build() {
        eprintln!("error: {message}");
        process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    commit::tell(&root);
    let sources = Sources::read(&root)?;
    let docs_only = env::var_os("DOCS_RS").map(|_| "this is a build of the documentation");

    let cuda = match docs_only {
        None => nvcc::build(&root, &out, &sources),
        Some(why) => Err(Stop::Absent(why.to_string())),
    };
    let (nvcc, fatbins) = match cuda {
        Ok(built) => {
            println!("cargo::rustc-cfg=cuda_kernels");
            (Ok(built.nvcc), built.fatbins)
        }
        Err(Stop::Absent(why)) if env::var_os("CARGO_FEATURE_REQUIRE_CUDA").is_none() => {
            warn(&format!("no GPU kernels in this build: {why}"));
            (Err(why), vec![])
        }
        Err(Stop::Absent(why)) => {
            return Err(format!("feature require-cuda, but {why}\nremedy: {}", nvcc::REMEDY));
        }
        Err(Stop::Error(message)) => return Err(message),
    };
    let simt = match docs_only {
        None => host::build(&root, &out, &sources),
        Some(why) => Err(Stop::Absent(why.to_string())),
    };
    let cxx = match simt {
        Ok(cxx) => {
            println!("cargo::rustc-cfg=simt");
            Ok(cxx)
        }
        Err(Stop::Absent(why)) => {
            warn(&format!("no device `simt` in this build: {why}"));
            Err(why)
        }
        Err(Stop::Error(message)) => return Err(message),
    };
    write_kernels_rs(&out.join("kernels.rs"), &fatbins, &nvcc, &cxx)
}

/// The constants that src/cuda/binaries.rs includes.
fn write_kernels_rs(
    path: &Path,
    fatbins: &[nvcc::Fatbin],
    nvcc: &Result<String, String>,
    cxx: &Result<String, String>,
) -> Result<(), String> {
    let mut files = String::new();
    let mut code = String::new();
    for fatbin in fatbins {
        let stem = &fatbin.stem;
        writeln!(files, "    ({stem:?}, include_bytes!({:?})),", fatbin.path).unwrap();
        writeln!(code, "    ({stem:?}, {:?}),", fatbin.code).unwrap();
    }
    let architectures = nvcc::architectures_text();
    let text = format!(
        "/// One fatbin per kernel file: its stem and its bytes. Empty without nvcc.\n\
         pub const FATBINS: &[(&str, &[u8])] = &[\n{files}];\n\
         /// What is in each of them: its stem, and such as \"sm_80 sm_90a compute_80\", where\n\
         /// compute_ is PTX for GPUs that are not named.\n\
         pub const CODE: &[(&str, &str)] = &[\n{code}];\n\
         /// ISOBATH_ARCHITECTURES of the build.\n\
         pub const ARCHITECTURES: &str = {architectures:?};\n\
         /// Version and place of nvcc, or why there are no fatbins.\n\
         pub const NVCC: Result<&str, &str> = {nvcc:?};\n\
         /// Version and place of the compiler of the device `simt`, or why there is none.\n\
         pub const CXX: Result<&str, &str> = {cxx:?};\n"
    );
    // The same text keeps its date, so that nothing is compiled again for it.
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}; build.rs is run by cargo"))
}

/// Cargo shows one line.
fn warn(message: &str) {
    println!("cargo::warning={}", message.replace('\n', " "));
}

//! The device `simt`: the machine of kernels/host and every kernel file, compiled for the CPU.
//!
//! A kernel file is included into a generated unit, in an anonymous namespace, and compiled twice:
//! plain, and with a call before each access, which g++'s -fsanitize=thread inserts and the
//! machine's hooks.cpp answers (libtsan is never linked). Three static libraries come of it:
//! isobath_simt_plain and isobath_simt_hooked, whose registration objects nobody refers to and
//! which are linked whole, and isobath_simt_machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use crate::jobs::{self, Job};
use crate::sources::{SourceFile, Sources};
use crate::{Stop, variable, warn};

/// The accesses of a kernel become calls, and so do pointers that are less aligned than their type
/// asks; its function entries do not. A vector stays in one piece, so that its load is one call, and
/// each variable has a place of its own on the stack, so that none is taken for another.
const HOOKS: [&str; 5] = [
    "-fsanitize=thread,alignment",
    "-fno-tree-sra",
    "--param",
    "tsan-instrument-func-entry-exit=0",
    "-fstack-reuse=none",
];

/// Compiles only where the three libraries can be compiled.
const PROBE: &str = "#include <version>\n\
    #if defined(__clang__) || !defined(__SANITIZE_THREAD__) || __cplusplus < 202002L\n\
    #error the device simt needs g++ with C++20\n\
    #endif\n";

/// Version and place of the compiler.
pub fn build(root: &Path, out: &Path, sources: &Sources) -> Result<String, Stop> {
    let target = ["ARCH", "OS"].map(|what| variable(&format!("CARGO_CFG_TARGET_{what}")));
    if target != [Ok("x86_64".to_string()), Ok("linux".to_string())] {
        return Err(Stop::Absent("it runs on x86-64 Linux only".to_string()));
    }
    let folder = out.join("simt");
    for folder in [&folder, &folder.join("plain"), &folder.join("hooked"), &folder.join("machine")]
    {
        fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
    }
    let compiler = Compiler::find(root, &folder).map_err(Stop::Absent)?;
    if sources.machine.is_empty() {
        return Err(Stop::Absent("kernels/host holds no .cpp file".to_string()));
    }
    if sources.kernels.is_empty() {
        return Err(Stop::Absent("kernels/ holds no .cu file".to_string()));
    }

    let (mut jobs, mut plain, mut hooked, mut machine) = (vec![], vec![], vec![], vec![]);
    for file in &sources.machine {
        let source = format!("kernels/host/{}.cpp", file.stem);
        let output = folder.join("machine").join(format!("{}.o", file.stem));
        jobs.push(compiler.job(sources, file, source, &file.path, &output, &["-O3"]));
        machine.push(output);
    }
    for kernel in &sources.kernels {
        let file = &kernel.file;
        let unit = unit(&folder, &file.stem)?;
        for (variant, flags, objects) in
            [("plain", &[][..], &mut plain), ("hooked", &HOOKS[..], &mut hooked)]
        {
            let output = folder.join(variant).join(format!("{}.o", file.stem));
            let source = format!("kernels/{}.cu ({variant}, on the CPU)", file.stem);
            jobs.push(compiler.job(sources, file, source, &unit, &output, flags));
            objects.push(output);
        }
    }
    let said = jobs::run(jobs).map_err(|message| {
        Stop::Error(format!("{message}\nremedy: correct the file, or build without simt: CXX=none"))
    })?;
    for line in said.iter().flat_map(|said| said.lines()).filter(|line| line.contains("warning:")) {
        warn(line);
    }

    // Kernels first: they refer to the machine.
    println!("cargo::rustc-link-search=native={}", folder.display());
    for (name, objects, modifier) in [
        ("isobath_simt_plain", &plain, ":+whole-archive"),
        ("isobath_simt_hooked", &hooked, ":+whole-archive"),
        ("isobath_simt_machine", &machine, ""),
    ] {
        let archive = cc::Build::new().out_dir(&folder).try_create_archive(name, objects);
        archive.map_err(|error| Stop::Error(format!("{name} cannot be archived: {error}")))?;
        println!("cargo::rustc-link-lib=static{modifier}={name}");
    }
    println!("cargo::rustc-link-lib=dylib=stdc++");

    let machine = folder.join("libisobath_simt_machine.a");
    println!("cargo::rustc-env=ISOBATH_SIMT_MACHINE={}", machine.display());
    println!("cargo::rustc-env=ISOBATH_SIMT_COMPILE={}", compiler.line.join("\x1f"));
    println!("cargo::rustc-env=ISOBATH_SIMT_HOOKS={}", HOOKS.join("\x1f"));
    Ok(compiler.name)
}

fn failed(path: &Path, error: &std::io::Error) -> Stop {
    Stop::Error(format!("{}: {error}", path.display()))
}

/// OUT_DIR/simt/<stem>.cpp. Its own names are nobody else's, so that both variants fit in one
/// program.
fn unit(folder: &Path, stem: &str) -> Result<PathBuf, Stop> {
    let path = folder.join(format!("{stem}.cpp"));
    let text = format!("#include \"isobath.cuh\"\nnamespace {{\n#include \"{stem}.cu\"\n}}\n");
    fs::write(&path, text).map_err(|error| failed(&path, &error))?;
    Ok(path)
}

/// Where PATH has a program that was named without a folder.
fn located(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.to_path_buf();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(program));
    found.into_iter().find(|path| path.is_file()).unwrap_or(program.to_path_buf())
}

struct Compiler {
    /// "g++ (Debian 12.2.0-14) 12.2.0 at /usr/bin/c++"
    name: String,
    /// Program and flags of a kernel without hooks.
    line: Vec<String>,
}

impl Compiler {
    /// What the cc crate chooses (CXX, CXXFLAGS), if it can do what is needed.
    fn find(root: &Path, folder: &Path) -> Result<Self, String> {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").opt_level(2).debug(false).pic(true).cargo_warnings(false);
        for flag in ["-g1", "-Wno-unknown-pragmas", "-Wno-psabi"] {
            build.flag(flag);
        }
        // The paths in faults are those of the repository: kernels/norm.cu.
        build.flag(format!("-ffile-prefix-map={}/=", root.display()));
        build.include(root.join("kernels"));
        let tool = build.try_get_compiler().map_err(|error| error.to_string())?;
        let program = located(tool.path()).display().to_string();
        let command = tool.to_command();
        let mut line = vec![command.get_program().to_string_lossy().into_owned()];
        line.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));

        let probe = folder.join("probe.cpp");
        fs::write(&probe, PROBE).map_err(|error| format!("{}: {error}", probe.display()))?;
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).args(HOOKS).arg("-c").arg(&probe);
        command.arg("-o").arg(folder.join("probe.o")).stdin(Stdio::null());
        let done =
            command.output().map_err(|error| format!("no C++ compiler: {program}: {error}"))?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            let first = said.lines().find(|line| line.contains("error")).unwrap_or(said.trim());
            return Err(format!("{program} is not fit for it: {first}"));
        }
        let version = Command::new(&line[0]).arg("--version").output();
        let version = version.map_err(|error| format!("{program} --version: {error}"))?;
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        let version = version.lines().next().unwrap_or("unknown version").to_string();
        Ok(Compiler { name: format!("{version} at {program}"), line })
    }

    /// `file` is what the object depends on, beside the headers; `unit` what is compiled.
    fn job(
        &self,
        sources: &Sources,
        file: &SourceFile,
        source: String,
        unit: &Path,
        output: &Path,
        flags: &[&str],
    ) -> Job {
        let mut command = Command::new(&self.line[0]);
        command.args(&self.line[1..]).args(flags).arg("-c").arg(unit).arg("-o").arg(output);
        let key = [self.name.clone(), self.line[1..].join(" "), flags.join(" ")];
        let fingerprint = sources.fingerprint(file, &key);
        Job { source, command, output: output.to_path_buf(), kept: None, fingerprint }
    }
}

//! Kernels of a test, linked with the CPU machine into a shared library that `Host::load` takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What [`compile`] needs and does not find: a build with simt, on the machine that built it.
/// Prints the reason.
pub fn is_missing() -> bool {
    match option_env!("ISOBATH_SIMT_MACHINE") {
        None => println!("skipped: this build has no simt"),
        Some(machine) if !Path::new(machine).exists() => {
            println!("skipped: kernels of a test are compiled only where these tests were built");
        }
        Some(_) => return false,
    }
    true
}

/// How a kernel file is compiled: as it is, or with a call before each access, for race mode.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Variant {
    Plain,
    Hooked,
}

/// Compiles kernel files (name and text), plain and hooked, and links them with the whole machine
/// to `folder`/`name`.so. Panics with the compiler's messages.
///
/// A process can load two or three of these: each takes some of the little thread-local storage
/// that the system keeps for libraries. Put what belongs together into one.
pub fn compile(folder: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
    compile_variants(folder, name, files, &[Variant::Plain, Variant::Hooked])
}

/// The same of these variants only: without `Hooked` the library has no race mode, without `Plain`
/// nothing else.
pub fn compile_variants(
    folder: &Path,
    name: &str,
    files: &[(&str, &str)],
    variants: &[Variant],
) -> PathBuf {
    let variable = |value: Option<&'static str>| value.expect("only where nothing `is_missing`");
    let split = |value: &'static str| value.split('\x1f').collect::<Vec<_>>();
    let compiler = split(variable(option_env!("ISOBATH_SIMT_COMPILE")));
    let hooks = split(variable(option_env!("ISOBATH_SIMT_HOOKS")));

    let mut objects = vec![];
    for (file, text) in files {
        let at = |suffix: &str| folder.join(format!("{file}{suffix}"));
        fs::write(at(".cu"), text).unwrap();
        let unit = format!(
            "#include <cstdlib>\n#include \"isobath.cuh\"\nnamespace {{\n#include \"{file}.cu\"\n}}\n"
        );
        fs::write(at(".cpp"), unit).unwrap();
        for variant in variants {
            let (suffix, flags) = match variant {
                Variant::Plain => (".plain.o", &[][..]),
                Variant::Hooked => (".hooked.o", &hooks[..]),
            };
            let mut command = Command::new(compiler[0]);
            command.args(&compiler[1..]).args(flags).current_dir(env!("CARGO_MANIFEST_DIR"));
            run(command.arg("-c").arg(at(".cpp")).arg("-o").arg(at(suffix)));
            objects.push(at(suffix));
        }
    }
    let library = folder.join(format!("{name}.so"));
    let mut link = Command::new(compiler[0]);
    link.arg("-shared").arg("-pthread").arg("-o").arg(&library).args(&objects);
    link.arg("-Wl,--whole-archive").arg(variable(option_env!("ISOBATH_SIMT_MACHINE")));
    run(link.arg("-Wl,--no-whole-archive"));
    library
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{said}");
}

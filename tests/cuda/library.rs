//! Kernels of a test, linked with the CPU machine into a shared library that `Host::load` takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether this build has what [`compile`] needs.
pub const AVAILABLE: bool = option_env!("ISOBATH_SIMT_MACHINE").is_some();

/// Compiles a kernel file's text, plain and hooked, and links it with the whole machine to
/// `folder`/`name`.so. Panics with the compiler's messages.
pub fn compile(folder: &Path, name: &str, kernel_file: &str) -> PathBuf {
    let variable = |value: Option<&'static str>| value.expect("only where `AVAILABLE`");
    let split = |value: &'static str| value.split('\x1f').collect::<Vec<_>>();
    let compiler = split(variable(option_env!("ISOBATH_SIMT_COMPILE")));
    let hooks = split(variable(option_env!("ISOBATH_SIMT_HOOKS")));

    let at = |suffix: &str| folder.join(format!("{name}{suffix}"));
    fs::write(at(".cu"), kernel_file).unwrap();
    let unit = format!("#include \"isobath.cuh\"\nnamespace {{\n#include \"{name}.cu\"\n}}\n");
    fs::write(at(".cpp"), unit).unwrap();
    let mut objects = vec![];
    for (variant, flags) in [(".plain.o", &[][..]), (".hooked.o", &hooks[..])] {
        let mut command = Command::new(compiler[0]);
        command.args(&compiler[1..]).args(flags).current_dir(env!("CARGO_MANIFEST_DIR"));
        run(command.arg("-I").arg(folder).arg("-c").arg(at(".cpp")).arg("-o").arg(at(variant)));
        objects.push(at(variant));
    }
    let mut link = Command::new(compiler[0]);
    link.arg("-shared").arg("-pthread").arg("-o").arg(at(".so")).args(&objects);
    link.arg("-Wl,--whole-archive").arg(variable(option_env!("ISOBATH_SIMT_MACHINE")));
    run(link.arg("-Wl,--no-whole-archive"));
    at(".so")
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{said}");
}

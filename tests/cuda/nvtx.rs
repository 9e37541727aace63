//! src/cuda/nvtx.rs with a profiler that is made up, on simt: what it is given, and which ranges it
//! sees of a run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::library;
use crate::support::{isobath, text_file, tiny_run};

/// Writes the ranges to the file NVTX_LOG, an inner one further in; first what is wrong with the
/// tables. Names and numbers are those of NVIDIA/NVTX's nvtxTypes.h.
const PROFILER: &str = r#"
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

typedef void (*Function)();
typedef Function** FunctionTable;
struct Callbacks {
    size_t struct_size;
    int (*GetModuleFunctionTable)(int module, FunctionTable* out_table, unsigned* out_size);
};
struct VersionInfo {
    size_t struct_size;
    uint32_t version, reserved0;
    void (*SetInjectionNvtxVersion)(uint32_t version);
};

static int depth = 0;

static void say(const char* text) {
    FILE* log = fopen(getenv("NVTX_LOG"), "a");
    for (int i = 0; i < depth; i++) fputs("  ", log);
    fprintf(log, "%s\n", text);
    fclose(log);
}
static int push(const char* name) {
    say(name);
    return depth++;
}
static int pop() { return --depth; }

extern "C" int InitializeInjectionNvtx2(const void* (*get)(uint32_t)) {
    auto callbacks = static_cast<const Callbacks*>(get(1));
    auto version = static_cast<const VersionInfo*>(get(3));
    if (!callbacks || callbacks->struct_size != sizeof(Callbacks)) say("no callbacks");
    if (!version || version->struct_size != sizeof(VersionInfo)) say("no version");
    if (version->version != 3 || get(2) || get(4)) say("another version, or more tables");
    version->SetInjectionNvtxVersion(3);
    const unsigned sizes[] = {0, 16, 9, 15, 7, 16, 7};
    FunctionTable table = nullptr;
    unsigned size = 0;
    for (int module = 1; module <= 6; module++) {
        if (!callbacks->GetModuleFunctionTable(module, &table, &size)) say("a module is missing");
        if (size != sizes[module] || table[0] || table[size]) say("a table of another size");
        for (unsigned i = 1; i < size; i++) {
            if (!table[i] || *table[i]) say("an entry that is not empty");
        }
    }
    if (callbacks->GetModuleFunctionTable(0, &table, &size)) say("module 0");
    if (callbacks->GetModuleFunctionTable(7, &table, &size)) say("module 7");
    callbacks->GetModuleFunctionTable(1, &table, nullptr);
    if (getenv("NVTX_REFUSES")) return 0;
    *table[9] = reinterpret_cast<Function>(push);   // RangePushA
    *table[11] = reinterpret_cast<Function>(pop);   // RangePop
    return 1;
}
"#;

/// By the compiler of this build.
fn compile(folder: &Path) -> PathBuf {
    let compiler = option_env!("ISOBATH_SIMT_COMPILE").unwrap_or_default();
    let [text, library] = ["profiler.cpp", "profiler.so"].map(|name| folder.join(name));
    fs::write(&text, PROFILER).unwrap();
    let mut command = Command::new(compiler.split('\x1f').next().unwrap());
    let output =
        command.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&text).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// What the profiler saw of a run of this command, which must succeed.
fn seen(profiler: &Path, command: &mut Command) -> String {
    let log = profiler.with_extension("log");
    fs::write(&log, "").unwrap();
    command.env("NVTX_INJECTION64_PATH", profiler).env("NVTX_LOG", &log);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::read_to_string(log).unwrap()
}

/// Lines of text, as often as said.
fn times(count: usize, lines: &str) -> String {
    lines.repeat(count)
}

#[test]
fn a_profiler_sees_steps_micro_batches_passes_updates_and_evaluations() {
    if library::is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let profiler = compile(folder.path());
    let text = text_file(folder.path(), 6000);
    let sets = [
        "device=simt",
        "model.hidden=64",
        "model.heads=2",
        "model.kv_heads=1",
        "train.sample_every=0",
        "train.steps=2",
        "train.grad_accumulation=2",
        "train.eval_every=1",
        "train.eval_tokens=64",
        "optimizer.warmup=1",
    ];
    let train = |graphs: &str| {
        let out = folder.path().join(graphs);
        let mut command = isobath();
        command.args(tiny_run(&text, &out, &sets)).env("ISOBATH_GRAPHS", graphs);
        seen(&profiler, &mut command)
    };
    let passes = "forward\nbackward\n";
    let indented = "    forward\n    backward\n";

    // Prompts, single tokens; two places of micro-batches; evaluations: once each, when recorded.
    let recorded = format!("forward\nforward\n{}forward\n", times(2, passes));
    let step = format!("step\n{}  update\n", times(2, "  micro-batch\n"));
    let replayed = train("1");
    let found = replayed.strip_prefix(&recorded).unwrap_or_else(|| panic!("{replayed}"));
    let all = found.split_inclusive("step\n").collect::<Vec<_>>();
    assert_eq!(all.len(), 3, "two steps in:\n{replayed}");
    assert!(found.starts_with(&format!("{step}evaluation\n")), "{replayed}");

    let step = format!("step\n{}  update\n", times(2, &format!("  micro-batch\n{indented}")));
    let launched = train("0");
    assert!(launched.starts_with(&format!("{step}evaluation\n  forward\n")), "{launched}");
    assert_eq!(launched.matches(&step).count(), 2, "{launched}");
}

#[test]
fn a_profiler_that_refuses_or_is_missing_is_no_error() {
    if library::is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let profiler = compile(folder.path());
    let bench = || {
        let mut command = isobath();
        command.args(["bench", "step", "--device", "simt", "--samples", "1"]);
        command
    };
    assert_eq!(seen(&profiler, bench().env("NVTX_REFUSES", "1")), "");
    let missing = folder.path().join("nothing.so");
    assert_eq!(seen(&missing, &mut bench()), "");
}

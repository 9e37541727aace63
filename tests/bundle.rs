//! tools/bundle refuses what would not run elsewhere, and tools/run-all, the `run` of a bundle,
//! goes on after failures, keeps its time and says what happened. Its programs are shell scripts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{python_is_missing, source};

// ------------------------------------------------------------------ run

/// Trains as told: a metrics.jsonl whose loss falls from 4.
const TRAIN: &str = r#"
while [ "$1" != --out ]; do shift; done
mkdir -p "$2/checkpoints"
printf '{"step":1,"loss":4.0}\n{"step":2,"loss":3.0}\n' > "$2/metrics.jsonl"
"#;

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A bundle whose program is `isobath`, a shell script. Of its test modules gemm fails, with one of
/// its three tests that passes, and another that passes alone; faults skips everything, and loss
/// prints nothing.
fn bundle(folder: &Path, isobath: &str) {
    for (file, name) in [("run-all", "run"), ("stages.py", "stages.py")] {
        fs::copy(source().join("tools").join(file), folder.join(name)).unwrap();
    }
    fs::write(folder.join("COMMIT"), "0123abc\n").unwrap();
    script(&folder.join("isobath"), isobath);
    let tests = r#"
if [ "$1" = --list ]; then
  echo "cuda::norm::rows: test"; echo "cuda::gemm::tails: test"; echo "cuda::gemm::tiles: test"
  echo "cuda::gemm::splits: test"; echo "cuda::faults::race: test"; echo "cuda::loss::rows: test"
elif [ "$1" = cuda::gemm:: ]; then
  echo "test cuda::gemm::tiles ... ok"; echo "test cuda::gemm::tails ... FAILED"
  echo "test result: FAILED. $ISOBATH_TEST_MACHINES $ISOBATH_PROGRAM $ISOBATH_SOURCE"; exit 101
elif [ "$*" = "cuda::gemm::tails --exact --nocapture" ]; then
  echo "test cuda::gemm::tails ... ok"; echo "test result: ok. 1 passed; 0 failed"
elif [ "$1" = cuda::gemm::splits ]; then
  echo "test result: FAILED. alone, too"; exit 101
elif [ "$1" = cuda::faults:: ]; then
  echo "skipped: no compiler"; echo "test result: ok. 1 passed; 0 failed"
elif [ "$1" = cuda::norm:: ]; then
  echo "skipped: no simt: ISOBATH_TEST_MACHINES is cuda"; echo "test result: ok. 1 passed; 0 failed"
fi
"#;
    script(&folder.join("isobath-tests"), tests);
}

/// Runs it in `folder`, where it also finds programs; the summary lies in `results`.
fn run_into(folder: &Path, results: &str, arguments: &[&str]) -> (Output, Value) {
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("python3");
    command.env("PATH", path).env("PYTHONDONTWRITEBYTECODE", "1");
    let output = command.arg(folder.join("run")).args(arguments).output().unwrap();
    let summary = fs::read(folder.join(results).join("summary.json"));
    (output, summary.map_or(Value::Null, |text| serde_json::from_slice(&text).unwrap()))
}

fn run(folder: &Path, arguments: &[&str]) -> (Output, Value) {
    run_into(folder, "results", arguments)
}

fn stage<'a>(summary: &'a Value, name: &str) -> &'a Value {
    let stages = summary["stages"].as_array().unwrap();
    let found = stages.iter().find(|stage| stage["stage"] == name);
    found.unwrap_or_else(|| panic!("no stage {name} in {summary:#}"))
}

fn names(summary: &Value) -> Vec<&str> {
    let stages = summary["stages"].as_array().unwrap();
    stages.iter().map(|it| it["stage"].as_str().unwrap()).collect()
}

#[track_caller]
fn assert_stages(summary: &Value, expected: &[(&str, &str, &str)]) {
    for (name, status, why) in expected {
        let stage = stage(summary, name);
        assert_eq!(stage["status"], *status, "{stage:#}");
        let found = stage["why"].as_str().unwrap_or_default();
        assert!(found.contains(why), "{stage:#}");
    }
    let counts = summary["counts"].as_object().unwrap();
    let counted: u64 = counts.values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(counted, summary["stages"].as_array().unwrap().len() as u64);
}

/// A machine that loses its GPU to one case of conformance, and fails all benches.
fn isobath_that_fails() -> String {
    format!(
        "case $1 in\n\
         info) echo '{{\"version\": \"1\"}}';;\n\
         conformance)\n\
           if [ \"$6\" = wgmma_b ]; then echo '{{\"passed\": 7, \"not_reached\": []}}'; exit; fi\n\
           echo '{{\"passed\": 3, \"not_reached\": [\"wgmma_b\", \"wgmma_c\"]}}'\n\
           echo 'error: 1 cases failed' >&2; exit 1;;\n\
         train) {TRAIN};;\n\
         bench) echo \"overlap $ISOBATH_OVERLAP\" >&2; kill -SEGV $$;;\n\
         esac"
    )
}

#[test]
fn a_bundle_goes_on_after_failures() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    bundle(folder.path(), &isobath_that_fails());
    let (output, summary) = run(folder.path(), &["--device", "simt"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!((&summary["finished"], &summary["commit"]), (&true.into(), &"0123abc".into()));
    let expected = [
        ("info", "ok", ""),
        ("conformance", "failed", "error: 1 cases failed"),
        ("conformance from wgmma_b", "ok", ""),
        ("test cuda::gemm", "failed", "test result: FAILED. simt"),
        ("test cuda::gemm::tails", "ok", ""),
        ("test cuda::gemm::splits", "failed", "alone, too"),
        ("test cuda::norm", "ok", ""),
        ("test cuda::faults", "skipped", "1 of 1 skipped: no compiler"),
        ("test cuda::loss", "failed", "no result of tests"),
        ("train simt", "ok", ""),
        ("train cpu", "ok", ""),
        ("train compared", "ok", "after 2 steps: loss 3.0000 on simt"),
        ("bench norm", "failed", "signal 11"),
        ("bench step", "failed", "signal 11"),
        ("bench step without overlap", "failed", "signal 11"),
    ];
    assert_stages(&summary, &expected);
    // The rest of the cases comes at once; tests one by one wait for the modules, and one that has
    // passed beside others does not run again.
    let order = names(&summary);
    assert_eq!(order[..3], ["info", "conformance", "conformance from wgmma_b"]);
    let at = |name| order.iter().position(|it| *it == name).unwrap();
    assert!(at("test cuda::norm") < at("test cuda::gemm::splits"));
    assert!(at("test cuda::gemm::tails") < at("train simt"));
    assert!(at("train compared") < at("bench step"));
    assert!(!order.contains(&"test cuda::gemm::tiles"));
    assert!(at("bench step without overlap") < at("bench attention"));
    assert!(at("bench attention") < at("bench gemm"));

    // The tests were told where everything is; JSON is kept as such, and the losses.
    let results = folder.path().join("results");
    let here = folder.path().canonicalize().unwrap().display().to_string();
    let why = stage(&summary, "test cuda::gemm")["why"].as_str().unwrap();
    assert!(why.contains(&format!("{here}/isobath {here}")), "{why}");
    let json = |file: &str| -> Value {
        serde_json::from_slice(&fs::read(results.join(file)).unwrap()).unwrap()
    };
    assert_eq!(json("info.json")["version"], "1");
    assert_eq!(json("conformance.json")["passed"], 3);
    assert_eq!(json("conformance-from-wgmma_b.json")["passed"], 7);
    let losses = serde_json::json!([[1, 4.0, 4.0], [2, 3.0, 3.0]]);
    assert_eq!(json("train-compared.json")["losses"], losses);
    let trained = results.join("train-simt");
    assert!(trained.join("metrics.jsonl").exists() && !trained.join("checkpoints").exists());

    // One of the benches runs twice, in two environments.
    let said = |file: &str| fs::read_to_string(results.join(file)).unwrap();
    assert!(said("bench-step.log").ends_with("overlap \n"));
    assert!(said("bench-step-without-overlap.log").ends_with("overlap 0\n"));

    // The line for the rest does the same.
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("run --part 2 --device simt --seconds "), "{said}");

    // Results are never overwritten.
    let (output, _) = run(folder.path(), &["--device", "simt"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not empty; move it away"));
}

#[test]
fn the_second_part_of_a_bundle_has_a_folder_of_its_own() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    bundle(folder.path(), &isobath_that_fails());
    let arguments = ["--device", "simt", "--part", "2"];
    let (output, summary) = run_into(folder.path(), "results-2", &arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let expected = [
        ("bench tune", "failed", "signal 11"),
        ("bench table", "failed", "signal 11"),
        // Not in this folder.
        ("peers products", "failed", "products.py"),
        ("peers training", "failed", "training.py"),
        ("peers norm", "failed", "kernels.py"),
        ("memcheck conformance", "skipped", "is for GPUs"),
    ];
    assert_stages(&summary, &expected);
    let expected = ["bench tune", "bench table", "peers products", "peers training"];
    assert_eq!(names(&summary)[..4], expected);
    // The table is there though the tuner has timed nothing, and the stages after it read it.
    assert_eq!(fs::read(folder.path().join("results-2/tuned.toml")).unwrap(), b"");
    for name in ["bench tune", "bench table", "peers products"] {
        let command = stage(&summary, name)["command"].to_string();
        assert!(command.contains("tuned.toml"), "{command}");
    }
    assert!(!folder.path().join("results").exists());
}

/// What goes on for as long as it is told ends by itself before its time is over.
#[test]
fn stages_of_a_bundle_are_told_what_is_left() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    bundle(folder.path(), "");
    let stages = ["bench tune", "bench table", "bench step", "peers products", "peers training"];
    let only: Vec<&str> = stages.iter().flat_map(|name| ["--only", name]).collect();
    let run = |results: &str, seconds: &str| {
        let arguments = [&["--seconds", seconds, "--results"], &[results][..], &only].concat();
        run_into(folder.path(), results, &arguments).1
    };
    let told = |summary: &Value, name: &str| {
        let command = stage(summary, name)["command"].as_array().unwrap().clone();
        let at = command.iter().position(|it| it == "--seconds")?;
        Some(command[at + 1].as_str().unwrap().parse::<f64>().unwrap())
    };
    let results = |name: &str| folder.path().join(name).display().to_string();
    let long = run(&results("long"), "1000");
    let short = run(&results("short"), "40");
    for (name, seconds) in [("bench tune", 90.0), ("bench table", 60.0), ("peers training", 100.0)]
    {
        assert_eq!(told(&long, name), Some(seconds), "{name}");
        let left = told(&short, name).unwrap();
        assert!((15.0..=25.0).contains(&left), "{name}: {left} of 40 s");
    }
    assert_eq!(told(&short, "bench step"), None);
    // A bench of a second or two need not have 30 samples.
    let command = stage(&long, "bench step")["command"].to_string();
    assert!(command.ends_with(r#""--samples","10"]"#), "{command}");
    // What is left is not worth a start.
    let none = run(&results("none"), "16");
    assert!(stage(&none, "bench tune")["why"].as_str().unwrap().contains("no time is left"));
    assert_eq!(stage(&none, "bench step")["status"], "ok");
}

/// On a GPU there is no time for tests that never touch it; what is left out has none that do.
#[test]
fn a_bundle_leaves_out_what_tests_simt_alone() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    bundle(folder.path(), "");
    let (_, summary) = run(folder.path(), &["--only", "test "]);
    let expected = [
        ("test cuda::faults", "skipped", "of the CPU machine alone"),
        ("test cuda::norm", "ok", ""),
    ];
    assert_stages(&summary, &expected);
    let stages = fs::read_to_string(source().join("tools/stages.py")).unwrap();
    let list = stages.lines().find(|line| line.starts_with("OF_SIMT = ")).unwrap();
    let modules: Vec<&str> = list.split('"').filter_map(|it| it.strip_prefix("cuda::")).collect();
    assert!(modules.contains(&"faults"), "{list}");
    for module in modules {
        // A file, or a folder of them.
        let module = source().join("tests/cuda").join(module);
        let files = match fs::read_dir(&module) {
            Ok(folder) => folder.map(|entry| entry.unwrap().path()).collect(),
            Err(_) => vec![module.with_extension("rs")],
        };
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for gpu in ["on_every_machine", "on_each_machine", "machines()", "Nvidia"] {
                assert!(!text.contains(gpu), "{} has {gpu}", file.display());
            }
        }
    }
}

/// A question that the driver may answer with an error is none of a kernel's.
#[test]
fn memcheck_of_a_bundle_looks_at_kernels() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    bundle(folder.path(), "");
    script(&folder.path().join("compute-sanitizer"), "echo $* >&2");
    let (output, summary) = run(folder.path(), &["--only", "memcheck", "--only", "racecheck"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = |file: &str| fs::read_to_string(folder.path().join("results").join(file)).unwrap();
    assert_eq!(names(&summary).len(), 4);
    for run in ["conformance", "train"] {
        assert!(said(&format!("memcheck-{run}.log")).contains("--report-api-errors no "));
        let other = said(&format!("racecheck-{run}.log"));
        assert!(other.contains("--tool racecheck") && !other.contains("api-errors"), "{other}");
    }
}

/// A stage that hangs, with a child that would outlive it, is ended; the rest is skipped and says
/// so.
#[test]
fn a_bundle_keeps_its_time() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    bundle(folder.path(), "[ $1 = info ] || { touch began; sleep 60 & sleep 60; }");
    let start = Instant::now();
    let (output, summary) = run(
        folder.path(),
        &["--seconds", "9", "--only", "info", "--only", "conf", "--only", "bench"],
    );
    assert!(start.elapsed() < Duration::from_secs(22), "{:?}", start.elapsed());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(folder.path().join("began").exists());
    // Part of the time is left for the first bench.
    assert_eq!(stage(&summary, "conformance")["status"], "timeout");
    assert_eq!(stage(&summary, "bench step")["status"], "timeout");
    let skipped = stage(&summary, "bench gemm");
    assert_eq!(skipped["status"], "skipped");
    assert!(skipped["why"].as_str().unwrap().contains("no time is left of 9 s"), "{skipped}");
}

// ------------------------------------------------------------------ tools/bundle

/// What a check of tools/bundle says; "" where it refuses nothing.
fn check(call: &str) -> String {
    let script = format!(
        "import importlib.machinery, importlib.util, sys\n\
         sys.dont_write_bytecode = True\n\
         loader = importlib.machinery.SourceFileLoader('bundle', sys.argv[1])\n\
         spec = importlib.util.spec_from_loader('bundle', loader)\n\
         bundle = importlib.util.module_from_spec(spec)\n\
         loader.exec_module(bundle)\n\
         try:\n    bundle.{call}\n\
         except bundle.Refused as refused:\n    print(refused)\n"
    );
    let tool = source().join("tools").join("bundle");
    let output = Command::new("python3").arg("-c").arg(script).arg(tool).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn what_would_not_run_elsewhere_is_refused() {
    if python_is_missing() {
        return;
    }
    let info = |nvcc: &str, architectures: &str| {
        format!(
            "check_kernels({{'build': {{'kernels': {{'nvcc': {nvcc}, \
             'architectures': '{architectures}'}}}}, 'devices': {{'cuda': {{'why': 'no nvcc'}}}}}})"
        )
    };
    let refused = [
        ("check_symbols('isobath', 'Name: GLIBC_2.38  Flags')".to_string(), "GLIBC_2.38"),
        ("check_symbols('isobath', 'Name: GLIBCXX_3.4.31  Flags')".to_string(), "GLIBCXX_3.4.31"),
        ("check_libraries('x', '(NEEDED)  Shared library: [libcuda.so.1]')".into(), "libcuda"),
        (info("None", "80,90a"), "no nvcc"),
        (info("'13.0'", "90a"), "without sm_80"),
        ("built(['{\"executable\": null}'])".to_string(), "no bin"),
    ];
    for (call, part) in refused {
        let said = check(&call);
        assert!(said.contains(part) && said.contains("remedy: "), "{call}: {said:?}");
    }
    let fine = [
        "check_symbols('isobath', 'Name: GLIBC_2.36  Flags\\nName: GLIBC_2.4  Flags')".to_string(),
        "check_libraries('x', '(NEEDED)  Shared library: [libc.so.6]')".to_string(),
        info("'13.0'", "80,90a"),
    ];
    for call in fine {
        assert_eq!(check(&call), "", "{call}");
    }
}

/// The tests of a bundle run where the paths of the machine that built them mean nothing: only
/// tests/support.rs knows these, and lets the environment name others. What never leaves that
/// machine may: the compiler of tests (tests/cuda/library.rs) and the build's own tests.
#[test]
fn no_test_of_a_bundle_needs_a_path_of_the_machine_that_built_it() {
    let mut folders = vec![source().join("tests")];
    let mut read = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let allowed =
                ["support.rs", "build.rs", "library.rs"].iter().any(|it| path.ends_with(it));
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !allowed {
                let text = fs::read_to_string(&path).unwrap();
                for name in ["MANIFEST_DIR", "BIN_EXE_isobath"] {
                    let variable = format!("(\"CARGO_{name}\")");
                    assert!(!text.contains(&variable), "{}: CARGO_{name}", path.display());
                }
                read += 1;
            }
        }
    }
    assert!(read > 20, "{read} files");
}

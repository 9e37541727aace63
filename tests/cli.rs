//! The real binary: what it prints where, and how it ends.

use std::fs;
use std::process::{Output, Stdio};

use isobath::cuda::binaries;
use isobath::host_memory::HostMemory;
use serde_json::Value;

use crate::config::PAPER;
use crate::support;

fn isobath(arguments: &[&str]) -> Output {
    support::isobath().args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Succeeds with one JSON object on stdout and nothing on stderr.
#[track_caller]
fn json(arguments: &[&str]) -> Value {
    let output = isobath(arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "");
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value.is_object(), "{value}");
    value
}

/// Fails with this code, says nothing on stdout and all of `parts` on stderr.
#[track_caller]
fn assert_fails(arguments: &[&str], code: i32, parts: &[&str]) {
    let output = isobath(arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    assert!(message.starts_with("error: "), "{arguments:?}: {message}");
    for part in parts {
        assert!(message.contains(part), "{arguments:?}: no {part:?} in: {message}");
    }
}

#[test]
fn plan_prints_the_parameters_of_every_preset() {
    for (name, parameters, non_embedding) in PAPER {
        let plan = json(&["plan", "--preset", name, "--json"]);
        assert_eq!(plan["parameters"], parameters, "{name}");
        assert_eq!(plan["non_embedding_parameters"], non_embedding, "{name}");
    }
    let demo = json(&["plan", "--preset", "demo", "--json"]);
    assert_eq!(demo, json(&["plan", "--json"]));
    assert_eq!(demo["vocab"], 4096);
}

#[test]
fn plan_says_how_it_counts() {
    let plan = json(&["plan", "--preset", "130m", "--json"]);
    // N_matmul: all but the embedding lookup and 25 gains of 768
    assert_eq!(plan["matmul_parameters"], 134_105_856u64 - 32_000 * 768 - 25 * 768);
    assert_eq!(plan["flops_per_token"], 6 * 109_510_656u64 + 6 * 12 * 256 * 768);
    assert_eq!(plan["tokens_per_step"], 131_072);
    // And the gradient's norm, scalars and scratch.
    let moments = 8 * plan["stored_elements"].as_u64().unwrap();
    let besides = plan["bytes"]["moments"].as_u64().unwrap() - moments;
    assert!((8192..16_384).contains(&besides), "{besides} bytes");
    let formula = plan["flops_formula"].as_str().unwrap();
    assert!(formula.contains("6*N_matmul + 6*L*S*C"), "{formula}");

    let people = isobath(&["plan", "--preset", "130m"]);
    let table = text(&people.stdout);
    assert_eq!(people.status.code(), Some(0));
    for part in ["134,105,856", "671,219,712", formula, "511.6", "1023.2"] {
        assert!(table.contains(part), "no {part:?} in:\n{table}");
    }
}

#[test]
fn plan_takes_file_preset_set_and_device_in_this_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    fs::write(&path, "preset = \"60m\"\nname = \"mine\"\n[train]\nsteps = 20000\n").unwrap();
    let path = path.to_str().unwrap();
    let plan = json(&["plan", path, "--json"]);
    assert_eq!((&plan["name"], &plan["parameters"]), (&"mine".into(), &58_073_600.into()));
    assert_eq!((&plan["steps"], &plan["device"]), (&20_000.into(), &"auto".into()));
    let plan = json(&[
        "plan",
        path,
        "--preset",
        "71m",
        "--set",
        "train.steps=5",
        "--device",
        "cpu",
        "--json",
    ]);
    assert_eq!((&plan["name"], &plan["parameters"]), (&"mine".into(), &70_578_688.into()));
    assert_eq!((&plan["steps"], &plan["device"]), (&5.into(), &"cpu".into()));
}

#[test]
fn info_shows_this_build_and_machine() {
    let info = json(&["info", "--json"]);
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(info["commit"], serde_json::json!(isobath::version::Program::this().commit));
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    assert_eq!(info["build"]["profile"], profile);
    assert_eq!(info["devices"]["cpu"]["available"], true);
    let cores = std::thread::available_parallelism().unwrap().get();
    assert_eq!(info["devices"]["cpu"]["cores"], cores);
    let presets = info["presets"].as_array().unwrap();
    assert_eq!(presets.len(), 16);
    assert!(presets.contains(&"350m".into()) && presets.contains(&"demo".into()));
    assert_eq!(info["texts"], serde_json::json!(["bundled:austen"]));
    let features: &[&str] = if cfg!(feature = "require-cuda") { &["require-cuda"] } else { &[] };
    assert_eq!(info["build"]["features"], serde_json::json!(features));

    let people = isobath(&["info"]);
    for part in [env!("CARGO_PKG_VERSION"), profile, "cpu ", "cuda ", "simt ", "350m", "austen"] {
        assert!(text(&people.stdout).contains(part), "no {part:?} in {}", text(&people.stdout));
    }
}

#[test]
fn info_lists_the_kernels_and_says_what_a_machine_lacks() {
    let info = json(&["info", "--json"]);
    let people = isobath(&["info"]);
    let people = text(&people.stdout);
    let kernels = &info["build"]["kernels"];
    assert_eq!(kernels["nvcc"].as_str(), binaries::NVCC.ok());
    assert_eq!(kernels["cxx"].as_str(), binaries::CXX.ok());
    assert_eq!(kernels["architectures"], binaries::ARCHITECTURES);
    let files = kernels["gpu"].as_array().unwrap();
    assert_eq!(files.len(), binaries::FATBINS.len());
    for (file, (stem, bytes)) in files.iter().zip(binaries::FATBINS) {
        assert_eq!((&file["name"], &file["bytes"]), (&(*stem).into(), &bytes.len().into()));
        let code = file["code"].as_str().unwrap();
        assert!(code.contains("sm_"), "{stem}: {code}");
        assert!(people.contains(stem) && people.contains(code), "{stem}: {code}: {people}");
    }

    for (name, built) in [("cuda", binaries::NVCC), ("simt", binaries::CXX)] {
        let device = &info["devices"][name];
        if device["available"] == true {
            assert!(built.is_ok() && device["why"].is_null(), "{device}");
            continue;
        }
        let why = device["why"].as_str().unwrap();
        assert!(!device["remedy"].as_str().unwrap().is_empty());
        assert!(people.contains(why), "{why}: {people}");
        if let Err(reason) = built {
            assert!(why.contains(reason), "{reason} is not in {why}");
        }
    }
    assert_eq!(info["devices"]["simt"]["available"], binaries::CXX.is_ok());
}

#[cfg(target_os = "linux")]
#[test]
fn info_agrees_with_the_kernel_about_memory() {
    let info = json(&["info", "--json"]);
    let total = info["devices"]["cpu"]["memory_bytes"].as_u64().unwrap();
    assert_eq!(Some(total), HostMemory::now().total);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let kib: u64 = line.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    // Less, where a container is limited.
    assert!(total <= kib << 10, "{total}: {meminfo}");
}

#[test]
fn wrong_input_ends_with_2_and_a_remedy() {
    assert_fails(
        &["plan", "--set", "model.hiden=3"],
        2,
        &["unknown key `model.hiden`; nearest: `model.hidden`", "remedy: [model] has"],
    );
    assert_fails(&["plan", "--set", "model.heads=3"], 2, &["model.heads = 3", "remedy"]);
    assert_fails(&["plan", "--preset", "13m", "--json"], 2, &["unknown preset `13m`", "`130m`"]);
    assert_fails(&["plan", "no/such.toml"], 2, &["no/such.toml", "check the path"]);
    assert_fails(&["plan", "--device", "gpu"], 2, &["'gpu'", "cuda", "h200"]);
    assert_fails(&["train", "--device", "h200"], 2, &["'h200'", "cuda"]);
    let odd = ["plan", "--preset", "40m", "--device", "h200"];
    assert_fails(&odd, 2, &["no kernel for a head dim of 52", "remedy"]);
    assert_fails(&["plann"], 2, &["plan"]);
    assert_fails(&["info", "--jsn"], 2, &["--json"]);
}

#[test]
fn no_command_is_wrong_usage() {
    let output = isobath(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("Usage: isobath"), "{}", text(&output.stderr));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_with_1() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output =
        support::isobath().arg("info").stdout(full).stderr(Stdio::piped()).output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("stdout") && message.contains("No space left"), "{message}");
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let folder = tempfile::tempdir().unwrap();
    let (text_file, shards) = (folder.path().join("a.txt"), folder.path().join("shards"));
    fs::write(&text_file, "A short text.").unwrap();
    let (text_file, shards) = (text_file.to_str().unwrap(), shards.to_str().unwrap());
    let prepare = ["data", "prepare", text_file, "--tokenizer", "bytes", "--out", shards, "--json"];
    assert_eq!(isobath(&prepare).status.code(), Some(0));
    let inspect = ["data", "inspect", shards];
    for arguments in [&["info"][..], &["plan", "--json"], &["--help"], &inspect] {
        let output = support::isobath()
            .args(arguments)
            .stdout(writer.try_clone().unwrap())
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "", "{arguments:?}");
    }
}

#[test]
fn help_lists_every_command_and_each_has_help() {
    let help = isobath(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for command in ["train", "eval", "generate", "data", "plan", "info"] {
        let line = format!("\n  {command} ");
        assert!(text(&help.stdout).contains(&line), "{}", text(&help.stdout));
        let own = isobath(&[command, "--help"]);
        assert_eq!(own.status.code(), Some(0), "{command}");
        let usage = format!("Usage: isobath {command}");
        assert!(text(&own.stdout).contains(&usage), "{command}: {}", text(&own.stdout));
    }
    let version = isobath(&["--version"]);
    assert_eq!(text(&version.stdout), format!("isobath {}\n", env!("CARGO_PKG_VERSION")));
}

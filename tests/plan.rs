//! src/plan.rs and src/engine/plan.rs: the memory table against what a run really takes.

use std::fs;
use std::process::Stdio;

use serde_json::Value;
use tempfile::tempdir;

use crate::support::isobath;

fn plan(arguments: &[&str]) -> Value {
    let output = isobath().arg("plan").args(arguments).arg("--json").output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_memory_table_adds_up_and_recomputing_makes_it_smaller() {
    for preset in ["demo", "130m", "1b"] {
        let plan_with = |set: &str| plan(&["--preset", preset, "--set", set])["bytes"].take();
        let bytes = plan_with("train.recompute=none");
        let get = |name: &str| bytes[name].as_u64().unwrap();
        let rows = ["parameters", "working_copy", "gradients", "moments", "activations", "batches"];
        let all = rows.iter().chain(&["sampling", "process"]).map(|row| get(row));
        assert_eq!(all.sum::<u64>(), get("total"), "{preset}: {bytes}");
        let tensors = bytes["tensors"].as_array().unwrap();
        let live: u64 = tensors.iter().map(|line| line["live_bytes"].as_u64().unwrap()).sum();
        assert!(live <= get("activations"), "{preset}");
        assert!(live as f64 > 0.8 * get("activations") as f64, "{preset}: {live}");
        let mut more = get("activations");
        for level in ["norms", "attention", "block"] {
            let bytes = plan_with(&format!("train.recompute={level}"));
            let less = bytes["activations"].as_u64().unwrap();
            assert!(less < more, "{preset}: {level} takes {less} bytes, a weaker one {more}");
            more = less;
        }
    }
    // Activations of bf16 take half; the process's memory is not the device's.
    let [f32, bf16] = ["f32", "bf16"].map(|dtype| {
        let dtype = format!("dtype={dtype}");
        plan(&["--preset", "130m", "--device", "cuda", "--set", &dtype])["bytes"].take()
    });
    let share = bf16["activations"].as_f64().unwrap() / f32["activations"].as_f64().unwrap();
    assert!((0.5..0.6).contains(&share), "{share}");
    assert_eq!((&bf16["process"], &bf16["gradients"]), (&0.into(), &f32["gradients"]));
    let gradients = bf16["gradients"].as_u64().unwrap();
    assert_eq!((&bf16["working_copy"], &f32["working_copy"]), (&(gradients / 2).into(), &0.into()));
}

/// Bytes of the logits that training holds at one time.
fn logits_bytes(arguments: &[&str]) -> u64 {
    let bytes = plan(arguments)["bytes"].take();
    let lines = bytes["tensors"].as_array().unwrap();
    let line = lines.iter().find(|line| line["name"] == "logits").unwrap();
    line["bytes"].as_u64().unwrap()
}

#[test]
fn a_machine_for_bf16_holds_more_logits_at_one_time_in_whole_tiles() {
    let of = |vocab: u64, dtype: &str| {
        let sets = [format!("model.vocab={vocab}"), format!("dtype={dtype}")];
        let common = ["--preset", "130m", "--device", "cuda", "--set", &sets[0], "--set", &sets[1]];
        logits_bytes(&common)
    };
    for (vocab, f32, bf16) in
        [(32_000_u64, 512_u64, 4096_u64), (50_257, 256, 2560), (128_256, 128, 1024)]
    {
        let stored = u64::next_multiple_of(vocab, 8);
        assert_eq!(of(vocab, "f32"), (f32 * stored * 4).next_multiple_of(256), "{vocab}");
        assert_eq!(of(vocab, "bf16"), (bf16 * stored * 2).next_multiple_of(256), "{vocab}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_takes_the_memory_that_the_plan_says() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("run");
    let arguments = [
        "--preset",
        "20m",
        "--device",
        "cpu",
        "--set",
        "dtype=f32",
        "--set",
        "data.train=bundled:austen",
        "--set",
        "data.held_out=0.001",
        "--set",
        "data.tokenizer=train:1024",
        "--set",
        "model.vocab=32000",
        "--set",
        "train.micro_batch=4",
        "--set",
        "train.grad_accumulation=1",
        "--set",
        "train.steps=2",
        "--set",
        "optimizer.warmup=1",
    ];
    let planned = plan(&arguments)["bytes"]["total"].as_u64().unwrap();
    let mut child = isobath()
        .arg("train")
        .args(arguments)
        .arg("--out")
        .arg(&out)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = kib.map_or(peak, |kib| kib << 10);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{message}");
    let share = peak as f64 / planned as f64;
    assert!((0.9..=1.1).contains(&share), "{} of {} MiB", peak >> 20, planned >> 20);
    // Both commands print the one table.
    let shown = isobath().arg("plan").args(arguments).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let table = &shown[shown.find("memory ").unwrap()..];
    assert!(message.contains(table.trim_end()), "{table}\nis not in\n{message}");
}

//! src/plan.rs, src/engine/plan.rs and src/predict/machine_plan.rs: the memory table
//! against what a run really takes; plans for machines that are not here.

use std::fs;
use std::process::Stdio;

use isobath::config::{Config, Placement, Recompute};
use isobath::cuda::AbsentGpu;
use isobath::cuda::peaks::H200;
use isobath::engine;
use isobath::plan::plan_of_gpu;
use serde_json::Value;
use tempfile::tempdir;

use crate::support::{isobath, text_file, tiny_run};

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
        let rest = ["sampling", "scratch", "process", "reserve"];
        let all = rows.iter().chain(&rest).map(|row| get(row));
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

#[test]
fn every_level_takes_less_memory_than_the_weaker_ones_in_every_placement() {
    for &placement in Placement::ALL {
        let mut more = usize::MAX;
        for &level in Recompute::ALL {
            let mut config = Config::preset("130m").unwrap();
            config.model.placement = placement;
            config.train.recompute = level;
            let gpu = AbsentGpu { dtype: config.dtype, multiprocessors: 132 };
            let less = engine::Plan::new(&config, &gpu).unwrap().arena_bytes();
            assert!(less < more, "{placement}: {level} takes {less} bytes, a weaker one {more}");
            more = less;
        }
    }
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

/// The sum of one number of every element of a list.
fn sum(list: &Value, of: impl Fn(&Value) -> f64) -> f64 {
    list.as_array().unwrap().iter().map(of).sum()
}

#[test]
fn a_plan_for_a_machine_that_is_not_here_says_what_fits_and_how_long_it_takes() {
    let arguments = ["--preset", "130m", "--device", "h200"];
    let on_h200 = plan(&arguments);
    let usable = on_h200["usable_bytes"].as_u64().unwrap();
    assert_eq!(usable, (139 << 30) - (512 << 20), "all but the driver's context");
    // What the driver takes after that is a row, of which training knows, too.
    assert_eq!(on_h200["bytes"]["reserve"], 512 << 20);
    let predicted = &on_h200["predicted"];
    for (name, estimate) in predicted["estimates"].as_object().unwrap() {
        let families = sum(&predicted["families"], |it| it["milliseconds"][name].as_f64().unwrap());
        let all = estimate["milliseconds"].as_f64().unwrap();
        assert!((families / all - 1.0).abs() < 1e-9, "{families} of {all} ms, {name}");
    }
    for what in ["bytes", "flops"] {
        assert_eq!(sum(&predicted["families"], |it| it[what].as_f64().unwrap()), predicted[what]);
    }

    let mut slower = 0.0;
    let names: Vec<&str> = on_h200["levels"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["recompute"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["none", "norms", "attention", "block"]);
    for level in on_h200["levels"].as_array().unwrap() {
        // By planning for any GPU, as `isobath train` does it.
        let recompute = format!("train.recompute={}", level["recompute"].as_str().unwrap());
        let bytes = |rows: Option<u64>| {
            let rows = rows.map(|rows| format!("train.micro_batch={rows}"));
            let mut arguments = vec!["--preset", "130m", "--device", "cuda", "--set", &recompute];
            arguments.extend(rows.iter().flat_map(|rows| ["--set", rows]));
            plan(&arguments)["bytes"].take()
        };
        let as_configured = bytes(None);
        assert_eq!(level["activation_bytes"], as_configured["activations"], "{level}");
        assert_eq!(level["total_bytes"], as_configured["total"], "{level}");
        let largest = level["largest_micro_batch"].as_u64().unwrap();
        assert!(bytes(Some(largest))["total"].as_u64().unwrap() <= usable, "{level}");
        assert!(bytes(Some(largest + 1))["total"].as_u64().unwrap() > usable, "{level}");
        check_most_tokens_per_second(level, &recompute, largest);
        let milliseconds = level["milliseconds"]["datasheet"].as_f64().unwrap();
        assert!(milliseconds > slower, "{level}: a weaker one takes {slower} ms");
        slower = milliseconds;
    }
    let of_none = &on_h200["levels"][0]["milliseconds"]["datasheet"];
    assert_eq!(of_none, &predicted["estimates"]["datasheet"]["milliseconds"]);
    check_formats(&on_h200, usable);

    // Where nothing but the machine's name differs, so does nothing else of the plan.
    let mut on_gpu = plan(&["--preset", "130m", "--device", "cuda"]);
    for (key, value) in on_gpu.as_object_mut().unwrap() {
        assert_eq!(&on_h200[key], value, "{key}");
    }
    let shown = isobath().arg("plan").args(arguments).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let largest = format!("{} x 256 tokens", on_h200["levels"][3]["largest_micro_batch"]);
    for part in [
        "on one NVIDIA H200, and what is expected; predicted, not measured",
        "MFU = (6*N_matmul + 6*L*S*C",
        "* tokens/s / 989.5e12",
        "in 141824.0 MiB of memory (139 GiB, as seen on a rented NVIDIA H200",
        "assumed, not measured",
        "graphs and code (estimated)                    512.0",
        "tokens/s: with that one, upper bounds",
        "expected: estimated, confirmed by no GPU",
        &largest,
        "bf16+16          bf16    false               12.00",
    ] {
        assert!(shown.contains(part), "no {part:?} in:\n{shown}");
    }
}

/// What a prediction for that micro-batch says.
fn check_most_tokens_per_second(level: &Value, recompute: &str, rows: u64) {
    let rows = format!("train.micro_batch={rows}");
    let arguments = ["bench", "--predict", "--preset", "130m", "--json"];
    let sets = ["--set", recompute, "--set", &rows];
    let output = isobath().args(arguments).args(sets).output().unwrap();
    let predicted: Value = serde_json::from_slice(&output.stdout).unwrap();
    let estimates = predicted["estimates"].as_object().unwrap();
    let found = level["most_tokens_per_second"].as_object().unwrap();
    assert_eq!((estimates.len(), found.len()), (3, 3), "{level}");
    for (name, estimate) in estimates {
        assert_eq!(found[name], estimate["tokens_per_second"], "{name} of {level}");
    }
}

/// Each way to store optimizer state, as `isobath plan` has it for any GPU.
fn check_formats(on_h200: &Value, usable: u64) {
    let formats = on_h200["formats"].as_array().unwrap();
    let names: Vec<(&str, &str, bool)> = formats
        .iter()
        .map(|it| {
            let name = |key: &str| it[key].as_str().unwrap();
            (name("master"), name("moments"), it["offload"].as_bool().unwrap())
        })
        .collect();
    let halves = "bf16+16";
    let expected = [false, true].map(|offload| {
        [("f32", "f32"), ("f32", "bf16"), (halves, "f32"), (halves, "bf16")]
            .map(|(master, moments)| (master, moments, offload))
    });
    assert_eq!(names, expected.concat());
    let stored = on_h200["stored_elements"].as_u64().unwrap();
    for (it, (master, moments, offload)) in formats.iter().zip(names) {
        let bytes = |rows: Option<u64>| {
            let sets = [
                format!("optimizer.master={master}"),
                format!("optimizer.moments={moments}"),
                format!("optimizer.offload={offload}"),
            ];
            let rows = rows.map(|rows| format!("train.micro_batch={rows}"));
            let mut arguments = vec!["--preset", "130m", "--device", "cuda"];
            arguments.extend(sets.iter().chain(&rows).flat_map(|set| ["--set", set]));
            plan(&arguments)["bytes"].take()
        };
        let as_configured = bytes(None);
        let get = |row: &str| as_configured[row].as_u64().unwrap();
        // 25 gains of 768 in f32, if the parameters are not.
        let parameters = if master == halves { 2 * stored + 4 * 25 * 768 } else { 4 * stored };
        assert_eq!((get("parameters"), get("working_copy")), (parameters, 2 * stored), "{it}");
        let element_bytes = if moments == "bf16" { 2 } else { 4 };
        let both = 2 * element_bytes * stored;
        // On the device, or on the host: then two chunks of 2^22 elements of both are on the
        // device.
        let (on_device, on_host) = match offload {
            false => (both, 0),
            true => ((4 * element_bytes) << 22, both),
        };
        // The rest: the norm, scalars, scratch and tables of ranges.
        let besides = get("moments") - on_device;
        assert!((8192..16_384).contains(&besides), "{besides} bytes: {it}");
        assert_eq!(get("host_moments"), on_host, "{it}");
        let rows = ["parameters", "working_copy", "gradients", "moments"];
        assert_eq!(it["state_bytes"], rows.map(get).iter().sum::<u64>(), "{it}");
        assert_eq!(it["host_bytes"], on_host, "{it}");
        let rest = ["activations", "batches", "sampling", "scratch", "process", "reserve"];
        let total = rows.iter().chain(&rest).map(|row| get(row)).sum::<u64>();
        assert_eq!((&it["total_bytes"], get("total")), (&total.into(), total), "{it}");
        let largest = it["largest_micro_batch"].as_u64().unwrap();
        assert!(bytes(Some(largest))["total"].as_u64().unwrap() <= usable, "{it}");
        assert!(bytes(Some(largest + 1))["total"].as_u64().unwrap() > usable, "{it}");
    }
    let number = |at: usize, what: &str| formats[at][what].as_u64().unwrap();
    let time = |at: usize| formats[at]["milliseconds"]["datasheet"].as_f64().unwrap();
    // 18, 14, 16 and 12 bytes of a parameter; then 10 and 8, but over the host link.
    for (less, more) in [(1, 0), (2, 0), (3, 1), (3, 2), (1, 2), (4, 3), (6, 4)] {
        assert!(number(less, "total_bytes") < number(more, "total_bytes"), "{less}, {more}");
        let rows = |at| number(at, "largest_micro_batch");
        assert!(rows(less) > rows(more), "{less}, {more}");
        assert_eq!(time(less) < time(more), less < 4, "{less}, {more}");
    }
    assert!(time(5) < time(4) && time(5) > time(0), "half as much over the link");
    assert_eq!(formats[0]["milliseconds"], on_h200["levels"][0]["milliseconds"]);
}

/// The memory that issue 8 asks for: 7B trains on one H200, 1B at 64K tokens per micro-batch
/// without recomputation. With the preset's own optimizer state, f32 and all on the device.
#[test]
fn the_largest_presets_fit_into_one_h200() {
    let usable = H200.memory_bytes - (512 << 20);
    for sequence in [256, 1024, 2048] {
        let total = |preset: &str, rows: usize, recompute: Recompute| {
            let mut config = Config::preset(preset).unwrap();
            (config.data.sequence, config.train.micro_batch) = (sequence, rows);
            config.model.max_sequence = config.model.max_sequence.max(sequence);
            config.train.recompute = recompute;
            plan_of_gpu(&config, H200.multiprocessors).unwrap().memory().total
        };
        let of_7b = total("7b", 1, Recompute::Block);
        assert!(of_7b <= usable, "7b, S = {sequence}: {} of {} MiB", of_7b >> 20, usable >> 20);
        let of_1b = total("1b", (64 << 10) / sequence, Recompute::None);
        assert!(of_1b <= usable, "1b, S = {sequence}: {} of {} MiB", of_1b >> 20, usable >> 20);
    }
}

#[test]
fn what_the_cpu_cannot_store_is_planned_for_a_machine_that_can() {
    let narrow = ["--device", "cpu", "--set", "dtype=f32", "--set", "optimizer.moments=bf16"];
    let planned = plan(&narrow);
    let stored = planned["stored_elements"].as_u64().unwrap();
    let besides = planned["bytes"]["moments"].as_u64().unwrap() - 4 * stored;
    assert!((8192..16_384).contains(&besides), "{besides} bytes");
    assert_eq!(planned["bytes"]["process"], 0);
    let refused = isobath().args(["plan", "--set", "optimizer.master=bf16+16"]).output().unwrap();
    let message = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(message.contains("optimizer.master = bf16+16: with dtype = f32"), "{message}");
}

#[test]
fn a_plan_for_a_smaller_machine_says_that_nothing_fits() {
    let on_h100 = plan(&["--preset", "7b", "--device", "h100"]);
    assert_eq!(on_h100["predicted"]["machine"], "NVIDIA H100 80GB HBM3");
    // Nobody measured one.
    let estimates = on_h100["predicted"]["estimates"].as_object().unwrap();
    let names: Vec<&String> = estimates.keys().collect();
    assert_eq!(names, ["datasheet", "expected"]);
    assert_eq!(sum(&on_h100["levels"], |it| it["largest_micro_batch"].as_f64().unwrap()), 0.0);
    let shown = isobath().args(["plan", "--preset", "7b", "--device", "h100"]).output().unwrap();
    assert!(String::from_utf8(shown.stdout).unwrap().contains("not one row fits"));
}

/// `model` of the arguments counts for nothing: the folder's is trained.
#[test]
fn a_run_from_a_folder_is_planned_with_the_folders_model() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 4000);
    let first = folder.path().join("first");
    let sets = ["train.steps=1", "model.layers=3", "train.sample_every=0"];
    let trained = isobath().args(tiny_run(&text, &first, &sets)).output().unwrap();
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));

    let from = format!("train.init_from={first:?}");
    let sizes =
        |report: &Value| ["vocab", "parameters", "flops_per_token"].map(|it| report[it].clone());
    let sequence = ["--preset", "20m", "--device", "cpu", "--set", "data.sequence=32"];
    let planned = plan(&[&sequence[..], &["--set", "dtype=f32", "--set", &from]].concat());
    let saved = first.join("run.toml").display().to_string();
    let of_first = isobath().args(["plan", &saved, "--json"]).output().unwrap();
    assert_eq!(sizes(&planned), sizes(&serde_json::from_slice(&of_first.stdout).unwrap()));
    assert_ne!(planned["parameters"], plan(&sequence)["parameters"]);

    // A run that started from it needs it no longer.
    let second = folder.path().join("second");
    let sets = ["train.steps=1", "train.sample_every=0", "dtype=f32", &from];
    let trained = isobath().args(tiny_run(&text, &second, &sets)).output().unwrap();
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    fs::remove_dir_all(&first).unwrap();
    let saved = second.join("run.toml").display().to_string();
    assert_eq!(sizes(&plan(&[&saved])), sizes(&planned));

    let missing = isobath().args(["plan", "--set", "train.init_from=nowhere"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("nowhere"));
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

//! The program on device simt: training, checkpoints that go from one device to another, evaluation
//! and text, and what is refused.

use std::path::{Path, PathBuf};
use std::process::Output;

use isobath::cuda::host;
use serde_json::Value;
use tempfile::{TempDir, tempdir};

use crate::support::{isobath, json_lines, metrics, text_file, tiny_run};

/// Sizes that kernels exist for.
const SIZES: [&str; 4] =
    ["model.hidden=64", "model.heads=2", "model.kv_heads=1", "train.sample_tokens=0"];

pub struct Case {
    folder: TempDir,
    text: PathBuf,
}

impl Case {
    /// `None` where this build has no simt.
    pub fn new() -> Option<Self> {
        if let Err(error) = host::present() {
            println!("skipped: no simt: {error}");
            return None;
        }
        let folder = tempdir().unwrap();
        let text = text_file(folder.path(), 6000);
        Some(Case { folder, text })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Trains, or goes on, and returns the run's folder.
    fn train(&self, name: &str, device: &str, sets: &[&str]) -> PathBuf {
        self.train_in(name, device, sets, &[])
    }

    /// The same, with variables in the environment.
    pub fn train_in(
        &self,
        name: &str,
        device: &str,
        sets: &[&str],
        variables: &[(&str, &str)],
    ) -> PathBuf {
        succeeds(self.run(name, device, sets, variables));
        self.path(name)
    }

    /// The line that says why it fails, with this exit status.
    pub fn fails_in(
        &self,
        name: &str,
        device: &str,
        sets: &[&str],
        variables: &[(&str, &str)],
        code: i32,
    ) -> String {
        let output = self.run(name, device, sets, variables);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{message}");
        message.lines().find(|line| line.starts_with("error: ")).unwrap_or(&message).to_string()
    }

    fn run(&self, name: &str, device: &str, sets: &[&str], variables: &[(&str, &str)]) -> Output {
        let out = self.path(name);
        let device = format!("device={device}");
        let sets = [&SIZES[..], sets, &[device.as_str()]].concat();
        let mut arguments = tiny_run(&self.text, &out, &sets);
        if out.exists() {
            arguments.push("--resume".to_string());
        }
        isobath().args(arguments).envs(variables.iter().copied()).output().unwrap()
    }

    /// `data.train` of a shard with many documents whose fourth 64 KiB are damaged.
    pub fn damaged_shard(&self) -> String {
        let lines: Vec<String> = crate::data::AUSTEN.as_bytes()[..300_000]
            .chunks(1000)
            .map(|text| serde_json::json!({ "text": String::from_utf8_lossy(text) }).to_string())
            .collect();
        let text = self.path("documents.jsonl");
        std::fs::write(&text, lines.join("\n")).unwrap();
        let mut command = isobath();
        command.args(["data", "prepare", "--tokenizer", "bytes", "--out"]);
        succeeds(command.arg(self.path("shards")).arg(&text).output().unwrap());
        let shard = self.path("shards/shard-00000.tok");
        let mut contents = std::fs::read(&shard).unwrap();
        contents[200_000] ^= 1;
        std::fs::write(&shard, contents).unwrap();
        format!("data.train={shard:?}")
    }

    fn eval(&self, model: &Path, arguments: &[&str]) -> Value {
        let mut command = isobath();
        command.arg("eval").arg(model).arg("--json").args(arguments);
        command.arg("--data").arg(&self.text).args(["--sequence", "32"]);
        serde_json::from_str(&succeeds(command.output().unwrap())).unwrap()
    }
}

#[track_caller]
fn succeeds(output: Output) -> String {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{message}");
    String::from_utf8(output.stdout).unwrap()
}

fn losses(run: &Path) -> Vec<f64> {
    metrics(run).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
}

#[track_caller]
fn assert_near(found: f64, expected: f64, tolerance: f64) {
    let error = (found - expected).abs() / expected;
    assert!(error < tolerance, "{found} for {expected}: {error:e} of {tolerance:e}");
}

#[test]
fn a_checkpoint_goes_on_wherever_it_was_written() {
    let Some(case) = Case::new() else { return };
    let whole = losses(&case.train("cpu", "cpu", &["dtype=f32", "train.steps=4"]));
    let steps = |steps: u64| format!("train.steps={steps}");
    for (first, second) in [("cpu", "simt"), ("simt", "cpu")] {
        let name = format!("{first}-{second}");
        case.train(&name, first, &["dtype=f32", &steps(2)]);
        let run = case.train(&name, second, &["dtype=f32", &steps(4)]);
        let found = losses(&run);
        assert_eq!(found.len(), 4);
        for (found, expected) in found.into_iter().zip(&whole) {
            assert_near(found, *expected, 1e-5);
        }
    }
    // bf16 matmuls go on from f32 masters, and back.
    let run = case.train("mixed", "simt", &["dtype=bf16", &steps(2)]);
    case.train("mixed", "cpu", &["dtype=f32", &steps(4)]);
    for (found, expected) in losses(&run).into_iter().zip(&whole) {
        assert_near(found, *expected, 3e-3);
    }
}

/// Losses and gradient norms of every step.
pub fn steps(run: &Path) -> Vec<(Option<f64>, Option<f64>)> {
    let values = |line: &Value| (line["loss"].as_f64(), line["grad_norm"].as_f64());
    metrics(run).iter().map(values).collect()
}

/// What a checkpoint says of parameters and moments.
pub fn state(run: &Path, step: u64) -> [Vec<u8>; 2] {
    let folder = isobath::rundir::checkpoint_folder(run, step);
    ["trainer.safetensors", "model.safetensors"]
        .map(|file| std::fs::read(folder.join(file)).unwrap())
}

#[test]
fn a_resumed_run_has_the_bits_of_one_in_one_go() {
    let Some(case) = Case::new() else { return };
    let formats = [
        ["optimizer.moments=f32", "optimizer.master=f32", "optimizer.offload=false"],
        ["optimizer.moments=f32", "optimizer.master=bf16+16", "optimizer.offload=false"],
        ["optimizer.moments=bf16", "optimizer.master=bf16+16", "optimizer.offload=true"],
    ];
    for (index, format) in formats.into_iter().enumerate() {
        let train = |name: &str, set: &str| {
            let sets = [&["dtype=bf16", "train.grad_accumulation=2", set][..], &format].concat();
            case.train(&format!("{name}-{index}"), "simt", &sets)
        };
        let whole = train("whole", "train.steps=4");
        train("parts", "train.steps=2");
        let parts = train("parts", "train.steps=4");
        // The first part has evaluated at its end; the rest is the same.
        assert_eq!(steps(&whole), steps(&parts), "{format:?}");
        assert!(state(&whole, 4) == state(&parts, 4), "{format:?}");
    }
    // Parameters in halves are f32 parameters: the same losses, the same checkpoint.
    let [of_f32, of_halves] = ["whole-0", "whole-1"].map(|name| case.path(name));
    assert_eq!(steps(&of_f32), steps(&of_halves));
    assert!(state(&of_f32, 4) == state(&of_halves, 4));
    // Also where they become halves on the way.
    let train = |set: &str, master: &str| {
        let sets = ["dtype=bf16", "train.grad_accumulation=2", master, set];
        case.train("changed", "simt", &sets)
    };
    train("train.steps=1", "optimizer.master=f32");
    train("train.steps=2", "optimizer.master=bf16+16");
    let changed = train("train.steps=4", "optimizer.master=f32");
    assert_eq!(steps(&of_f32), steps(&changed));
    assert!(state(&of_f32, 4) == state(&changed, 4));
}

/// Checkpoints are the same whatever the optimizer's state is stored as.
#[test]
fn a_run_goes_on_with_state_of_another_type() {
    let Some(case) = Case::new() else { return };
    let sets = |moments, steps| ["dtype=bf16", moments, steps];
    let [wide, narrow] = ["optimizer.moments=f32", "optimizer.moments=bf16"];
    let whole = losses(&case.train("wide", "simt", &sets(wide, "train.steps=6")));
    for (name, first, second) in [("narrowed", wide, narrow), ("widened", narrow, wide)] {
        case.train(name, "simt", &sets(first, "train.steps=3"));
        let found = losses(&case.train(name, "simt", &sets(second, "train.steps=6")));
        assert_ne!(found, whole, "{name}: moments were never narrow");
        assert_eq!(found.len(), 6);
        for (found, expected) in found.into_iter().zip(&whole) {
            assert_near(found, *expected, 3e-3);
        }
    }
}

#[test]
fn evaluation_and_text_are_those_of_the_cpu() {
    let Some(case) = Case::new() else { return };
    let run = case.train("run", "cpu", &["dtype=f32", "train.steps=6"]);
    let cpu = case.eval(&run, &["--device", "cpu"]);
    let f32 = case.eval(&run, &["--device", "simt", "--dtype", "f32"]);
    let bf16 = case.eval(&run, &["--device", "simt"]);
    let loss = |report: &Value| report["loss"].as_f64().unwrap();
    assert_near(loss(&f32), loss(&cpu), 1e-6);
    assert_near(loss(&bf16), loss(&cpu), 3e-3);
    assert_ne!(loss(&bf16), loss(&f32), "bf16 is the default on simt");

    let text = |device: &[&str]| {
        let mut command = isobath();
        command.arg("generate").arg(&run).args(["--prompt", "It was", "--tokens", "12"]);
        succeeds(command.args(["--temperature", "0"]).args(device).output().unwrap())
    };
    let cpu = text(&["--device", "cpu"]);
    assert_eq!(text(&["--device", "simt", "--dtype", "f32"]), cpu);
    assert!(text(&["--device", "simt"]).starts_with("It was"));
}

/// Half a million parameters: the loss falls as on the CPU.
#[test]
fn thirty_steps_of_a_small_model_learn_as_on_the_cpu() {
    let Some(case) = Case::new() else { return };
    let text = text_file(case.folder.path(), 200_000);
    let train = |device: &str, dtype: &str| {
        let out = case.path(device);
        let keys = [format!("device={device}"), format!("dtype={dtype}")];
        let mut sets = vec![
            "model.hidden=128",
            "model.heads=4",
            "model.kv_heads=2",
            "model.ffn=352",
            "model.max_sequence=64",
            "data.tokenizer=train:512",
            "data.sequence=64",
            "data.held_out=0.01",
            "train.micro_batch=8",
            "train.steps=30",
            "train.sample_tokens=0",
            "optimizer.lr=2e-3",
        ];
        sets.extend(keys.iter().map(String::as_str));
        succeeds(isobath().args(tiny_run(&text, &out, &sets)).output().unwrap());
        let lines = json_lines(&out.join("metrics.jsonl"));
        let held_out = lines.last().unwrap()["val_loss"].as_f64().unwrap();
        (losses(&out), held_out)
    };
    let (cpu, cpu_held_out) = train("cpu", "f32");
    let (simt, held_out) = train("simt", "bf16");
    assert!(cpu[29] < cpu[0] - 1.0, "{cpu:?}");
    for (found, expected) in simt.iter().zip(&cpu) {
        assert_near(*found, *expected, 5e-3);
    }
    assert_near(held_out, cpu_held_out, 5e-3);
}

#[test]
fn what_a_device_cannot_do_is_refused() {
    let Some(case) = Case::new() else { return };
    let run = case.train("run", "cpu", &["dtype=f32", "train.steps=1"]);
    let mut command = isobath();
    command.arg("eval").arg(&run).args(["--device", "cpu", "--dtype", "bf16"]);
    let output = command.arg("--data").arg(&case.text).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("--device simt"), "{message}");

    // Variables with values that do not exist, and what they are to be.
    for (variable, value, right) in [
        ("SIMT_ORDER", "sideways", "fifo"),
        ("ISOBATH_GRAPHS", "few", "from 0 to 1"),
        ("ISOBATH_OVERLAP", "much", "from 0 to 1"),
        ("ISOBATH_AHEAD", "2", "from 0 to 1"),
    ] {
        let mut command = isobath();
        command.args(["generate", "--prompt", "a", "--device", "simt"]).arg(&run);
        let output = command.env(variable, value).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(variable) && message.contains(right), "{message}");
    }
}

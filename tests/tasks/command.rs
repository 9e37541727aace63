//! `isobath data task` and `isobath eval --task` through the real program.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;
use tempfile::{TempDir, tempdir};

use super::mmlu;
use crate::support::{isobath, json_lines, text_file, tiny_run};

struct Case {
    folder: TempDir,
    run: String,
    text: String,
}

impl Case {
    /// A tiny model, trained for a few steps on a few thousand bytes.
    fn new() -> Self {
        let folder = tempdir().unwrap();
        let text = text_file(folder.path(), 30_000);
        let run = folder.path().join("run");
        succeed(&tiny_run(&text, &run, &["model.max_sequence=128"]));
        Case { run: run.display().to_string(), text: text.display().to_string(), folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

#[track_caller]
fn output(arguments: &[impl AsRef<std::ffi::OsStr>]) -> Output {
    isobath().args(arguments).output().unwrap()
}

#[track_caller]
fn succeed(arguments: &[impl AsRef<std::ffi::OsStr>]) -> String {
    let output = output(arguments);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(arguments)).unwrap()
}

#[track_caller]
fn fail(arguments: &[&str], parts: &[&str]) {
    let output = output(arguments);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn a_task_is_drawn_from_text_and_scored() {
    let case = Case::new();
    let (task, samples) = (case.path("task.jsonl"), case.path("samples.jsonl"));
    let lengths = ["--questions", "20", "--context", "60", "--continuation", "24"];
    let drawn = [&["data", "task", &case.text, "--out", &task, "--json"][..], &lengths].concat();
    let report = json(&drawn);
    assert_eq!((&report["questions"], &report["choices"]), (&20.into(), &4.into()));
    assert_eq!(report["text_bytes"], fs::metadata(&case.text).unwrap().len());
    assert_eq!(json_lines(Path::new(&task)).len(), 20);

    let eval = ["eval", &case.run, "--task", &task, "--device", "cpu"];
    let report = json(&[&eval[..], &["--samples", &samples, "--json"]].concat());
    assert_eq!((&report["questions"], &report["chance"]), (&20.into(), &0.25.into()));
    assert_eq!((&report["style"], &report["shots"]), (&"texts".into(), &0.into()));
    assert_eq!((&report["window"], &report["truncated"]), (&128.into(), &0.into()));
    assert_eq!(report["subjects"][0]["name"], "task");
    let samples = json_lines(Path::new(&samples));
    assert_eq!(samples.len(), 20);
    for name in ["acc", "acc_norm", "acc_bytes"] {
        let right = samples.iter().filter(|sample| sample[name] == true).count() as f64;
        assert_eq!(report[name]["mean"], right / 20.0, "{name}");
        let error = (right * (20.0 - right) / 20.0 / 19.0 / 20.0).sqrt();
        let found = report[name]["standard_error"].as_f64().unwrap();
        assert!((found - error).abs() < 1e-12, "{name}: {found}, expected {error}");
    }
    for sample in &samples {
        let values = sample["log_likelihoods"].as_array().unwrap();
        assert_eq!(values.len(), 4);
        // Some 24 bytes at about ln 256 each, by a model that has hardly learnt anything.
        for value in values.iter().map(|value| value.as_f64().unwrap()) {
            assert!((-200.0..-24.0).contains(&value), "{value}");
        }
    }
    // Another batch, the same answers; for people, the same figures.
    let again = json(&[&eval[..], &["--batch", "3", "--json"]].concat());
    assert_eq!(again["acc_norm"], report["acc_norm"]);
    let people = succeed(&eval);
    let acc = format!(
        "acc            {:.4} \u{b1} {:.4}",
        report["acc"]["mean"].as_f64().unwrap(),
        report["acc"]["standard_error"].as_f64().unwrap()
    );
    for part in [&acc, "acc_norm", "chance         0.2500", "questions      20, 0 examples"] {
        assert!(people.contains(part), "no {part:?} in:\n{people}");
    }
    // A smaller window cuts on the left.
    let cut = json(&[&eval[..], &["--sequence", "40", "--json"]].concat());
    assert_eq!((&cut["window"], &cut["truncated"]), (&40.into(), &20.into()));
}

#[test]
fn mmlus_folder_is_scored_by_subject() {
    let case = Case::new();
    mmlu(case.folder.path());
    let folder = case.path("test");
    let eval = ["eval", &case.run, "--task", &folder, "--device", "cpu"];
    let report = json(&[&eval[..], &["--shots", "2", "--json"]].concat());
    assert_eq!((&report["style"], &report["questions"]), (&"letters".into(), &5.into()));
    let names: Vec<&Value> =
        report["subjects"].as_array().unwrap().iter().map(|subject| &subject["name"]).collect();
    assert_eq!(names, ["anatomy", "world_facts"]);
    assert_eq!(report["truncated"], 5, "two examples are longer than 128 bytes");
    let people = succeed(&eval);
    for part in ["world_facts", "anatomy", "letters of the choices", "subject"] {
        assert!(people.contains(part), "no {part:?} in:\n{people}");
    }
    let one = case.path("dev/anatomy_dev.csv");
    let other = json(&[&eval[..], &["--shots", "1", "--shots-from", &one, "--json"]].concat());
    assert_eq!(other["shots"], 1);
}

#[test]
fn wrong_usage_and_wrong_tasks_are_named() {
    let case = Case::new();
    let run = case.run.as_str();
    fail(&["eval", run], &["--data <FILE>", "--task <FILE>"]);
    fail(&["eval", run, "--data", "a.txt", "--task", "b.jsonl"], &["--data", "cannot be used"]);
    fail(&["eval", run, "--data", "a.txt", "--shots", "1"], &["--shots", "cannot be used"]);
    fail(&["eval", run, "--task", "no.jsonl"], &["no.jsonl", "check the path"]);
    fail(&["eval", run, "--task", &case.text], &["neither .jsonl nor .csv"]);
    let task = case.path("task.jsonl");
    let line = r#"{"question": "Q", "choices": ["a", "b"], "answer": 0}"#;
    fs::write(&task, format!("{line}\n{}\n", line.replace("\"answer\": 0", "\"answer\": 2")))
        .unwrap();
    fail(&["eval", run, "--task", &task], &["task.jsonl: line 2", "choice 3 of 2", "remedy"]);
    fs::write(&task, line).unwrap();
    fail(&["eval", run, "--task", &task, "--shots", "1"], &["1 examples", "--shots-from"]);
    fail(&["eval", run, "--task", &task, "--sequence", "129"], &["129", "at most 128"]);
    fail(&["eval", run, "--task", &task, "--style", "numbers"], &["numbers", "letters"]);
    fail(&["eval", run, "--task", &task, "--sequence", "1"], &["line 1", "2 tokens; the model"]);
    fail(&["eval", "no-model", "--task", &task], &["no-model"]);

    let draw = |out: &str, more: &[&str], parts: &[&str]| {
        fail(&[&["data", "task", &case.text, "--out", out], more].concat(), parts);
    };
    let out = case.path("out.jsonl");
    draw(&case.path("out.json"), &[], &["out.json", ".jsonl"]);
    draw(&out, &["--questions", "100000"], &["of 100000 questions were drawn"]);
    draw(&out, &["--choices", "1"], &["1 choices"]);
    draw(&out, &["--held-out", "1.5"], &["1.5"]);
    assert!(!Path::new(&out).exists());
    fail(&["data", "task", "no.txt", "--out", &out], &["no.txt", "check the path"]);
}

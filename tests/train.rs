//! src/train: the loop, through the library and through the real program with real signals.

mod fine_tuning;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use isobath::checkpoint::latest;
use isobath::config::{Config, NormKind, Placement, Rows};
use isobath::cpu::Cpu;
use isobath::engine::Plan;
use isobath::rundir::checkpoint_folder;
use isobath::train::{Console, Interrupt, Outcome, Run, train};
use tempfile::tempdir;

use crate::data::AUSTEN;
use crate::support::{isobath, json_lines, metrics, run_config, small_model, text_file, tiny_run};

fn run(config: &Config, folder: &Path, resume: bool) -> Outcome {
    let run = Run { config: config.clone(), folder: folder.to_path_buf(), resume };
    train(run, Interrupt::none(), &mut Console::quiet()).unwrap()
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        match path.is_dir() {
            true => copy_folder(&path, &to),
            false => fs::copy(&path, &to).map(|_| ()).unwrap(),
        }
    }
}

/// Weights, moments and exported model of a step are the same bytes.
#[track_caller]
fn assert_same_state(a: &Path, b: &Path, step: u64) {
    for file in ["trainer.safetensors", "model.safetensors", "config.json"] {
        let [a, b] = [a, b].map(|run| fs::read(checkpoint_folder(run, step).join(file)).unwrap());
        assert!(a == b, "{file} of step {step} differs");
    }
}

#[test]
fn eight_steps_equal_four_and_four_in_every_bit() {
    for rows in [Rows::Packed, Rows::Document] {
        let folder = tempdir().unwrap();
        let [whole, halves] = ["whole", "halves"].map(|name| folder.path().join(name));
        let text = folder.path().join("text.jsonl");
        let documents: String = (0..60)
            .map(|i| &AUSTEN[i * 300..i * 300 + 5 * (i % 17 + 1)])
            .map(|text| format!("{}\n", serde_json::json!({ "text": text })))
            .collect();
        fs::write(&text, documents).unwrap();
        let mut config = run_config(&small_model());
        config.model.vocab = 0;
        config.data.train = vec![text.display().to_string()];
        config.data.rows = rows;
        config.data.held_out = 0.2;
        config.train.grad_accumulation = 2;
        config.train.eval_every = 2;
        config.train.sample_every = 4;
        config.checkpoint.every = 4;

        let outcome = run(&config, &whole, false);
        assert_eq!((outcome.step, outcome.interrupted), (8, false));
        // As if the process had died before the last checkpoint.
        copy_folder(&whole, &halves);
        fs::remove_dir_all(checkpoint_folder(&halves, 8)).unwrap();
        let outcome = run(&config, &halves, true);
        assert_eq!((outcome.step, outcome.interrupted), (8, false));

        assert_same_state(&whole, &halves, 8);
        let steps = metrics(&whole);
        assert_eq!(steps, metrics(&halves), "{rows}");
        assert_eq!(steps.iter().map(|s| s["step"].as_u64().unwrap()).max(), Some(8));
        assert!(steps[3]["val_loss"].is_f64() && steps[7]["val_loss"].is_f64());
        let samples = |run: &Path| json_lines(&run.join("samples.jsonl"));
        assert_eq!(samples(&whole).len(), 2);
        assert_eq!(samples(&whole), samples(&halves));
        // The half that a step from the wrong moments would not reach.
        assert_ne!(steps[7]["loss"], steps[3]["loss"]);
    }
}

#[test]
fn samples_have_as_many_tokens_as_are_asked_for() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 4000);
    let mut config = run_config(&small_model());
    config.model.vocab = 0;
    config.data.train = vec![text.display().to_string()];
    (config.train.steps, config.train.sample_every) = (2, 1);
    for (tokens, samples) in [(12, 2), (0, 0)] {
        let out = folder.path().join(format!("run-{tokens}"));
        config.train.sample_tokens = tokens;
        let mut sized = config.clone();
        sized.model.vocab = 256;
        let plan = Plan::new(&sized, &Cpu::<f32>::new()).unwrap();
        assert_eq!(plan.memory().sampling > 0, samples > 0, "what has no samples plans for none");
        let outcome = run(&config, &out, false);
        let lines = json_lines(&out.join("samples.jsonl"));
        assert_eq!((lines.len(), outcome.sample.is_some()), (samples, samples > 0));
        // A byte each; what is no UTF-8 yet takes three.
        for line in lines {
            let length = line["text"].as_str().unwrap().len();
            assert!((1..=3 * tokens).contains(&length), "{line}");
        }
    }
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 4000);
    let mut config = run_config(&small_model());
    config.model.vocab = 0;
    config.data.train = vec![text.display().to_string()];
    let out = folder.path().join("run");
    run(&config, &out, false);
    let manifest = checkpoint_folder(&out, 8).join("MANIFEST.json");
    let before = (metrics(&out), fs::metadata(&manifest).unwrap().modified().unwrap());
    let outcome = run(&config, &out, true);
    assert_eq!((outcome.step, outcome.checkpoint), (8, checkpoint_folder(&out, 8)));
    assert_eq!((metrics(&out), fs::metadata(&manifest).unwrap().modified().unwrap()), before);
}

#[test]
fn a_repeated_text_is_learnt_by_heart_with_every_norm() {
    let folder = tempdir().unwrap();
    let text = folder.path().join("text.txt");
    // One row: 33 tokens with the last target.
    fs::write(&text, "It is a truth universally known...").unwrap();
    for norm in [NormKind::Rms, NormKind::Layer] {
        for placement in [Placement::Pre, Placement::Lns] {
            let mut config = run_config(&small_model());
            (config.model.vocab, config.model.norm) = (0, norm);
            (config.model.placement, config.model.layers) = (placement, 3);
            config.data.train = vec![text.display().to_string()];
            config.data.held_out = 0.0;
            config.train.steps = 120;
            (config.optimizer.lr, config.optimizer.weight_decay) = (1e-2, 0.0);
            let out = folder.path().join(format!("{norm}-{placement}"));
            let outcome = run(&config, &out, false);
            assert!(outcome.evaluation.is_none(), "nothing was held out");
            let losses: Vec<f64> =
                metrics(&out).iter().map(|step| step["loss"].as_f64().unwrap()).collect();
            let (first, last) = (losses[0], losses[119]);
            assert!(first > 4.0 && last < 0.1, "{norm}, {placement}: {first} to {last}");
        }
    }
}

#[test]
fn a_model_with_more_ids_than_its_tokenizer_is_sampled_and_saved() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 4000);
    let mut config = run_config(&small_model());
    config.model.vocab = 5000; // the tokenizer has 257
    config.data.train = vec![text.display().to_string()];
    config.train.steps = 2;
    let outcome = run(&config, &folder.path().join("run"), false);
    assert!(outcome.sample.is_some());
    assert_eq!(latest(&outcome.folder).unwrap().verified.unwrap().step(), 2);
}

/// A process that is stopped if the test fails.
struct Running {
    child: Option<Child>,
    out: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
        }
    }
}

impl Running {
    fn start(arguments: &[String], out: &Path) -> Self {
        let mut command = isobath();
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
        Running { child: Some(command.spawn().unwrap()), out: out.to_path_buf() }
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    #[track_caller]
    fn wait_for(&mut self, what: &str, happened: impl Fn(&Path) -> bool) {
        let started = Instant::now();
        while !happened(&self.out) {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "ended before {what}: {ended:?}");
            assert!(started.elapsed() < Duration::from_secs(60), "{what} did not happen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Reads stderr up to a line that holds `part`.
    #[track_caller]
    fn wait_for_line(&mut self, part: &str) {
        let stderr = self.child.as_mut().unwrap().stderr.take().unwrap();
        let mut stderr = BufReader::with_capacity(1, stderr);
        let mut line = String::new();
        while !line.contains(part) {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "no line with {part:?}");
        }
        self.child.as_mut().unwrap().stderr = Some(stderr.into_inner());
    }

    fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    fn end(mut self) -> (Option<i32>, String) {
        let Output { status, stderr, .. } = self.child.take().unwrap().wait_with_output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    }
}

fn lines(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

#[track_caller]
fn assert_succeeds(arguments: &[String]) -> String {
    let output = isobath().args(arguments).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{message}");
    message
}

#[test]
fn a_signal_ends_the_step_and_saves_and_the_run_goes_on_as_if_nothing_had_been() {
    for signal in ["-INT", "-TERM"] {
        let folder = tempdir().unwrap();
        let text = text_file(folder.path(), 20_000);
        let [out, whole] = ["run", "whole"].map(|name| folder.path().join(name));
        let long = tiny_run(&text, &out, &["train.steps=1000000"]);
        let mut running = Running::start(&long, &out);
        running.wait_for("the third step", |out| lines(out) >= 3);
        running.signal(signal);
        let (code, message) = running.end();
        assert_eq!(code, Some(0), "{message}");
        let again = format!("continue with --resume --out {}", out.display());
        assert!(message.contains("stopped after step") && message.contains(&again), "{message}");

        let step = latest(&out).unwrap().verified.unwrap().step();
        assert_eq!(lines(&out) as u64, step, "the metrics end with the saved step");
        let steps = format!("train.steps={}", step + 3);
        let mut resumed = tiny_run(&text, &out, &[&steps]);
        resumed.push("--resume".to_string());
        let message = assert_succeeds(&resumed);
        assert!(message.contains(&format!("resuming after step {step}")), "{message}");
        assert_succeeds(&tiny_run(&text, &whole, &[&steps]));
        assert_eq!(metrics(&out), metrics(&whole));
        assert_same_state(&out, &whole, step + 3);
    }
}

#[test]
fn an_interrupted_evaluation_is_made_up_for() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 1_600_000);
    let [out, whole] = ["run", "whole"].map(|name| folder.path().join(name));
    let sets = ["train.steps=1", "data.held_out=0.5"];
    let mut running = Running::start(&tiny_run(&text, &out, &sets), &out);
    running.wait_for_line("step 1/1"); // the evaluation follows
    running.signal("-INT");
    let (code, message) = running.end();
    assert_eq!(code, Some(0), "{message}");
    assert!(message.contains("stopped after step 1 of 1"), "{message}");
    assert_eq!(lines(&out), 0, "the step's line waits for its evaluation");
    assert_eq!(latest(&out).unwrap().verified.unwrap().step(), 1);

    let resume = ["train", "--resume", "--out", out.to_str().unwrap()].map(String::from);
    let message = assert_succeeds(&resume);
    assert!(message.contains("held-out text:"), "{message}");
    assert_succeeds(&tiny_run(&text, &whole, &sets));
    assert_eq!(metrics(&out), metrics(&whole));
    assert!(metrics(&out)[0]["val_loss"].is_f64());
    assert_same_state(&out, &whole, 1);
    let message = assert_succeeds(&resume);
    assert!(!message.contains("held-out text:"), "nothing is pending any more: {message}");
}

/// A step of several seconds.
const SLOW: [&str; 3] =
    ["train.steps=1000", "train.micro_batch=500", "train.grad_accumulation=100"];

#[test]
fn a_second_signal_ends_at_once() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 20_000);
    let out = folder.path().join("run");
    let mut running = Running::start(&tiny_run(&text, &out, &SLOW), &out);
    running.wait_for("the first step", |out| out.join("samples.jsonl").exists());
    running.signal("-INT");
    std::thread::sleep(Duration::from_millis(100));
    running.signal("-INT");
    let (code, message) = running.end();
    assert_eq!(code, Some(130), "{message}");
    // Nothing was saved, so the run begins anew.
    let mut resumed = tiny_run(&text, &out, &["train.steps=1"]);
    resumed.push("--resume".to_string());
    assert!(assert_succeeds(&resumed).contains("starting at step 0"));
}

#[test]
fn a_second_process_is_refused_and_the_first_goes_on() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 20_000);
    let out = folder.path().join("run");
    let arguments = tiny_run(&text, &out, &["train.steps=1000000"]);
    let mut running = Running::start(&arguments, &out);
    running.wait_for("the first step", |out| lines(out) >= 1);
    let resume = ["train", "--resume", "--out", out.to_str().unwrap()].map(String::from);
    for second in [&arguments[..], &resume] {
        let output = isobath().args(second).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(&format!("(pid {})", running.pid())), "{message}");
    }
    let before = lines(&out);
    running.wait_for("another step", |out| lines(out) > before + 2);
    running.signal("-TERM");
    let (code, message) = running.end();
    assert_eq!(code, Some(0), "{message}");
    assert_eq!(latest(&out).unwrap().verified.unwrap().step(), lines(&out) as u64);
}

#[test]
fn the_first_values_are_a_checkpoint_where_that_is_asked() {
    let folder = tempdir().unwrap();
    let mut config = run_config(&small_model());
    config.model.placement = Placement::Pre; // nothing is folded
    config.model.vocab = 0;
    config.data.train = vec![text_file(folder.path(), 6000).display().to_string()];
    config.train.steps = 4;
    config.checkpoint.initial = true;
    let out = folder.path().join("run");
    run(&config, &out, false);
    let step_0 = checkpoint_folder(&out, 0);
    let (_, table, found) = isobath::hf::load_for_inference(&step_0).unwrap();
    let expected = isobath::model::init::initial_parameters(&table, config.seed);
    assert!(found == expected, "other values than those that were drawn");
    let (_, _, last) = isobath::hf::load_for_inference(&checkpoint_folder(&out, 4)).unwrap();
    assert!(last != expected, "nothing was learnt");
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 20_000);
    let out = folder.path().join("run");
    let sets =
        ["optimizer.lr=1e38", "optimizer.clip=0", "optimizer.warmup=0", "checkpoint.every=1"];
    let output = isobath().args(tiny_run(&text, &out, &sets)).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    let step = latest(&out).unwrap().verified.unwrap().step();
    assert!((1..8).contains(&step), "{message}");
    assert_eq!(lines(&out) as u64, step);
    let rows = format!("at step {} (batch rows {}..{})", step + 1, 2 * step, 2 * step + 2);
    assert!(message.contains(&rows) && message.contains("no checkpoint of it"), "{message}");
    assert!(message.contains("loss is ") || message.contains("norm is "), "{message}");
    assert!(message.contains("lower optimizer.lr"), "{message}");
    assert!(!checkpoint_folder(&out, step + 1).exists());
}

#[test]
fn a_weight_that_is_not_a_number_stops_at_the_first_step() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 20_000);
    let [good, out] = ["good", "run"].map(|name| folder.path().join(name));
    assert_succeeds(&tiny_run(&text, &good, &["train.steps=1"]));
    let weights = checkpoint_folder(&good, 1).join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    // Somebody else's folder: nothing but the weights tells that they are wrong.
    for ours in ["MANIFEST.json", "trainer.json"] {
        fs::remove_file(checkpoint_folder(&good, 1).join(ours)).unwrap();
    }
    let mut arguments = tiny_run(&text, &out, &[]);
    arguments.extend(["--init".into(), checkpoint_folder(&good, 1).display().to_string()]);
    let output = isobath().args(&arguments).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("loss is NaN at step 1 (batch rows 0..2)"), "{message}");
    assert_eq!(lines(&out), 0);
    assert!(latest(&out).unwrap().verified.is_none());
}

#[test]
fn a_person_is_told_how_fast_it_is_after_the_first_steps() {
    let folder = tempdir().unwrap();
    let text = text_file(folder.path(), 4000);
    let out = folder.path().join("run");
    let said = |steps: &str, resume: &[&str]| {
        let mut arguments = tiny_run(&text, &out, &[steps]);
        arguments.extend(resume.iter().map(ToString::to_string));
        let output = isobath().args(arguments).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let message = said("train.steps=8", &[]);
    let step = |number: &str| message.lines().find(|line| line.starts_with(number)).unwrap();
    assert!(step("step 1/8: loss ").ends_with(", warming up"), "{message}");
    let last = step("step 8/8: loss ");
    assert!(last.ends_with(", 0 s left") && last.contains(" tokens/s, "), "{message}");
    for part in [
        " tokens/s: median of 5 steps after the first 3; half of them ",
        "memory: ",
        " MiB planned, ",
        "throughput  ",
    ] {
        assert!(message.contains(part), "no {part:?} in:\n{message}");
    }
    // Three more steps are all warm-up.
    let message = said("train.steps=11", &["--resume"]);
    assert!(message.contains("step 11/11: loss ") && message.contains("warming up"), "{message}");
    assert!(!message.contains("tokens/s") && !message.contains("throughput  "), "{message}");
}

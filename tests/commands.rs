//! Wrong input through the real program: message, exit code, and what is on disk afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use isobath::rundir::checkpoint_folder;
use tempfile::{TempDir, tempdir};

use crate::data::files;
use crate::support::{isobath, metrics, text_file, tiny_run};

/// Fails with this code and says all of `parts`; nothing on stdout.
#[track_caller]
fn assert_fails(arguments: &[impl AsRef<std::ffi::OsStr>], code: i32, parts: &[&str]) {
    let output = isobath().args(arguments).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    for part in parts.iter().chain(&["error: "]) {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[track_caller]
fn assert_succeeds(arguments: &[impl AsRef<std::ffi::OsStr>]) -> String {
    let output = isobath().args(arguments).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{message}");
    message
}

struct Case {
    folder: TempDir,
    out: PathBuf,
}

impl Case {
    fn new() -> Self {
        let folder = tempdir().unwrap();
        let out = folder.path().join("run");
        Case { folder, out }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new run is refused and leaves no folder behind.
    #[track_caller]
    fn assert_refused(&self, text: &Path, sets: &[&str], parts: &[&str]) {
        assert_fails(&tiny_run(text, &self.out, sets), 2, parts);
        assert!(!self.out.exists(), "left behind: {:?}", files(&self.out));
    }
}

#[test]
fn training_text_that_cannot_be_used_is_named_and_leaves_no_run() {
    let case = Case::new();
    let good = text_file(case.folder.path(), 4000);
    let write = |name: &str, contents: &[u8]| {
        fs::write(case.path(name), contents).unwrap();
        case.path(name)
    };
    case.assert_refused(&case.path("no.txt"), &[], &["no.txt", "check the path"]);
    case.assert_refused(&write("empty.txt", b""), &[], &["empty.txt", "empty"]);
    case.assert_refused(&write("bad.txt", b"abc\xff\xfe"), &[], &["bad.txt", "byte 3", "iconv"]);
    let short = write("short.txt", b"Too short.");
    case.assert_refused(&short, &[], &["one row of 32", "smaller data.sequence"]);
    case.assert_refused(&good, &["data.tokenizer=no.json"], &["no.json"]);
    case.assert_refused(&good, &["data.valid=no.txt"], &["no.txt"]);
    case.assert_refused(&good, &["model.heads=0"], &["model.heads = 0"]);
    case.assert_refused(&good, &["model.heads=3"], &["not a multiple", "set it to 2 or 4"]);
    case.assert_refused(&good, &["data.sequence=65"], &["data.sequence = 65", "at most 64"]);
    case.assert_refused(&good, &["train.init_from=nowhere"], &["nowhere"]);
    if isobath::cuda::nvidia::present().is_err() {
        case.assert_refused(&good, &["device=cuda"], &["cuda", "use --device cpu"]);
    }
    // Heads of 8 values: no kernel has them.
    let parts = ["simt", "head dim of 8", "32, 48, 64, 96, 128", "model.heads"];
    if isobath::cuda::host::present().is_ok() {
        case.assert_refused(&good, &["device=simt"], &parts);
    }
    case.assert_refused(&good, &["device=tpu"], &["tpu", "cuda"]);
    // Only the tokens themselves tell that they are too many for the model.
    let small = case.path("small");
    let parts = ["the text has token", "the model has 100", "set model.vocab"];
    assert_fails(&tiny_run(&good, &small, &["model.vocab=100"]), 2, &parts);
    // The same run then begins as if nothing had been.
    assert_succeeds(&tiny_run(&good, &case.out, &["train.steps=1"]));
    assert_eq!(metrics(&case.out).len(), 1);
}

#[test]
fn shards_that_are_damaged_or_of_another_tokenizer_are_refused() {
    let case = Case::new();
    let text = text_file(case.folder.path(), 4000);
    let shards = case.path("shards");
    let prepare = |tokenizer: &str, out: &Path| {
        let [text, out] = [&text, out].map(|path| path.to_str().unwrap().to_string());
        let arguments = ["data", "prepare", &text, "--tokenizer", tokenizer, "--out", &out];
        assert!(isobath().args(arguments).output().unwrap().status.success());
    };
    prepare("bytes", &shards);
    let shard = shards.join("shard-00000.tok");
    let whole = fs::read(&shard).unwrap();

    let tokenizer = case.path("tokenizer.json").display().to_string();
    let train =
        ["data", "tokenizer", text.to_str().unwrap(), "--vocab", "300", "--out", &tokenizer];
    assert!(isobath().args(train).output().unwrap().status.success());
    let other = format!("data.tokenizer={tokenizer}");
    case.assert_refused(&shards, &[&other], &["tokenizer", "remedy"]);
    case.assert_refused(&shards, &["data.tokenizer=train:300"], &["tokenized already"]);

    fs::write(&shard, &whole[..whole.len() - 100]).unwrap();
    case.assert_refused(&shards, &[], &["shard-00000.tok", "remedy"]);
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 4;
    fs::write(&shard, &flipped).unwrap();
    let arguments = tiny_run(&shards, &case.out, &[]);
    assert_fails(&arguments, 2, &["shard-00000.tok", "remedy"]);
    assert!(!checkpoint_folder(&case.out, 8).exists());
    assert_eq!(fs::read(&shard).unwrap(), flipped, "nobody touches the user's files");

    fs::write(&shard, &whole).unwrap();
    let resume = case.out.exists().then_some("--resume".to_string());
    assert_succeeds(&arguments.into_iter().chain(resume).collect::<Vec<_>>());
    assert_eq!(metrics(&case.out).len(), 8);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_with_a_warning() {
    let case = Case::new();
    let text = text_file(case.folder.path(), 4000);
    assert_succeeds(&tiny_run(&text, &case.out, &["checkpoint.every=4"]));
    let expected = metrics(&case.out);
    let resume = ["train", "--resume", "--out", case.out.to_str().unwrap()];
    let weights = checkpoint_folder(&case.out, 8).join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, &bytes).unwrap();
    let message = assert_succeeds(&resume);
    for part in ["warning: passing over step 8", "sha256", "resuming after step 4"] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
    assert_eq!(metrics(&case.out), expected, "the steps after it are trained again");

    // Not one good checkpoint left: that is for a person to decide, and nothing is touched.
    for step in [4, 8] {
        fs::remove_file(checkpoint_folder(&case.out, step).join("MANIFEST.json")).unwrap();
    }
    let parts = ["passing over step 8", "passing over step 4", "has no MANIFEST.json", "remedy"];
    assert_fails(&resume, 2, &parts);
    assert_eq!(metrics(&case.out), expected);
    assert_eq!(crate::support::json_lines(&case.out.join("metrics.jsonl.old")).len(), 4);
    assert!(weights.exists());
}

#[test]
fn a_run_is_neither_overwritten_nor_resumed_from_nowhere() {
    let case = Case::new();
    let text = text_file(case.folder.path(), 4000);
    let arguments = tiny_run(&text, &case.out, &["train.steps=2"]);
    assert_succeeds(&arguments);
    let before = fs::read(case.out.join("metrics.jsonl")).unwrap();
    assert_fails(&arguments, 2, &["already holds a run", "step 2", "--resume"]);
    assert_eq!(fs::read(case.out.join("metrics.jsonl")).unwrap(), before);
    let nowhere = case.path("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    assert_fails(&["train", "--resume", "--out", nowhere], 2, &["nowhere"]);
    assert!(!Path::new(nowhere).exists());
    let wider = ["train", "--resume", "--out", case.out.to_str().unwrap(), "--set"];
    let sets = ["model.hidden=32", "data.sequence=16", "seed=9"];
    for set in sets {
        let arguments = [&wider[..], &[set, "--set", "train.steps=3"]].concat();
        assert_fails(&arguments, 2, &["remedy"]);
    }
    let left = fs::read_to_string(case.out.join("run.toml")).unwrap();
    assert!(left.contains("hidden = 16"), "a refused resume changes no settings: {left}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let case = Case::new();
    let text = text_file(case.folder.path(), 4000);
    assert_fails(&tiny_run(&text, Path::new("/proc/run"), &[]), 2, &["/proc/run", "remedy"]);
    let file = case.path("file");
    fs::write(&file, "mine").unwrap();
    let inside = file.join("run");
    let output = isobath().args(tiny_run(&text, &inside, &[])).output().unwrap();
    assert_ne!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stderr).unwrap().contains(inside.to_str().unwrap()));
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn models_and_texts_that_are_not_there_are_named() {
    let case = Case::new();
    let text = text_file(case.folder.path(), 4000);
    assert_succeeds(&tiny_run(&text, &case.out, &["train.steps=1"]));
    let (run, text) = (case.out.to_str().unwrap(), text.to_str().unwrap());
    assert_fails(&["eval", "no-model", "--data", text], 2, &["no-model", "config.json"]);
    assert_fails(&["generate", "no-model", "--prompt", "x"], 2, &["no-model", "config.json"]);
    assert_fails(&["eval", run, "--data", "no.txt"], 2, &["no.txt", "check the path"]);
    assert_fails(&["eval", run], 2, &["--data"]);
    assert_fails(&["eval", run, "--data", text, "--batch", "0"], 2, &["--batch"]);
    assert_fails(&["eval", run, "--data", text, "--sequence", "0"], 2, &["--sequence"]);
    assert_fails(&["eval", run, "--data", text, "--sequence", "65"], 2, &["65", "at most 64"]);
    assert_fails(&["eval", run, "--data", text, "--device", "cuda"], 2, &["--device cpu"]);
    assert_fails(&["eval", run, "--data", text, "--fast"], 2, &["--fast"]);
    assert_fails(&["train", "--fast"], 2, &["--fast"]);
    let generate = |more: &[&str], parts: &[&str]| {
        let arguments = [&["generate", run, "--prompt", "x"][..], more].concat();
        assert_fails(&arguments, 2, parts);
    };
    generate(&["--temperature", "nan"], &["--temperature is NaN"]);
    generate(&["--top-p", "0"], &["--top-p is 0"]);
    generate(&["--tokens", "0"], &["--tokens 0"]);
    let long = "x".repeat(64);
    assert_fails(&["generate", run, "--prompt", &long], 2, &["64 tokens", "at most 64"]);
    let endless = ["generate", run, "--prompt", "x", "--tokens", "18446744073709551615"];
    let message = assert_succeeds(&endless);
    assert!(message.contains("tokens/s"), "{message}");
}

//! Checkpoints and the run folder: state comes back bit by bit, every kind of damage is noticed
//! and told, and nothing that was saved is lost by a kill, a full disk or a read-only folder.
//!
//! What needs a process of its own (kill -9, limits, mounts) starts this binary again with one
//! ignored test, a `child_...`; it finds its run folder in an environment variable.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use isobath::checkpoint::{self, Saved, Snapshot, TrainerState, Verified};
use isobath::config::*;
use isobath::cpu::Cpu;
use isobath::data::loader::LoaderState;
use isobath::engine::{self, Plan, StepOutcome, Trainer};
use isobath::flat::{CHUNK_ELEMENTS, FlatBuffer, ReadFlat};
use isobath::hf;
use isobath::host_memory;
use isobath::model::parameters::ParameterTable;
use isobath::rundir::{RunDir, checkpoint_folder, checkpoint_steps};
use isobath::{Error, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::hf::{assert_same_bits, noise, random_parameters, small_model, small_tokenizer};
use crate::support::{run_config, set_state};

const FOLDER: &str = "ISOBATH_TEST_RUN";

fn config() -> Config {
    let mut config = run_config(&small_model());
    config.data.sequence = 64;
    config.checkpoint.every = 10;
    config
}

/// Everything a snapshot borrows; each step has other numbers.
struct Training {
    config: Config,
    table: ParameterTable,
    parameters: Vec<f32>,
    moment1: Vec<f32>,
    moment2: Vec<f32>,
    state: TrainerState,
}

impl Training {
    fn at(step: u64) -> Self {
        let config = config();
        let table = ParameterTable::new(&config.model);
        let elements = table.stored_elements();
        Training {
            parameters: random_parameters(&table, step),
            moment1: noise(elements, step + 1000),
            moment2: noise(elements, step + 2000).iter().map(|v| v * v * 1e-42).collect(),
            state: TrainerState {
                step,
                tokens: step * 128,
                loader: LoaderState {
                    row: 3 * step,
                    rows_per_epoch: 7,
                    sequence: 64,
                    seed: u64::MAX - 1,
                    source: u64::MAX,
                },
                elapsed_seconds: 0.1 + 0.2,
                pending: None,
            },
            config,
            table,
        }
    }

    fn save(&self, run: &RunDir) -> Result<Saved> {
        self.save_from(run, &mut |buffer, first, out| {
            let values = match buffer {
                FlatBuffer::Parameters => &self.parameters,
                FlatBuffer::Moment1 => &self.moment1,
                FlatBuffer::Moment2 => &self.moment2,
            };
            out.copy_from_slice(&values[first..first + out.len()]);
            Ok(())
        })
    }

    fn save_from(&self, run: &RunDir, read: &mut ReadFlat) -> Result<Saved> {
        let snapshot = Snapshot {
            config: &self.config,
            table: &self.table,
            state: &self.state,
            tokenizer: &small_tokenizer(),
            dtype: Dtype::F32,
        };
        checkpoint::save(run, &snapshot, read)
    }
}

/// A run with checkpoints of the given steps.
fn run_with(steps: &[u64]) -> (TempDir, RunDir) {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(&folder.path().join("run")).unwrap();
    run.write_config("name = \"test\"\n").unwrap();
    for step in steps {
        Training::at(*step).save(&run).unwrap();
    }
    (folder, run)
}

/// The newest checkpoint must be of `step`, and every bit of it as it was saved.
#[track_caller]
fn assert_latest(run: &Path, step: u64) {
    let latest = checkpoint::latest(run).unwrap();
    let verified = latest.verified.unwrap_or_else(|| panic!("none verifies: {:?}", latest.damaged));
    assert_eq!(verified.step(), step, "passed over: {:?}", latest.damaged);
    let saved = Training::at(step);
    let ([parameters, moment1, moment2], state) = load(&verified, &saved.table).unwrap();
    assert_same_bits("parameters", &parameters, &saved.parameters);
    assert_same_bits("moment1", &moment1, &saved.moment1);
    assert_same_bits("moment2", &moment2, &saved.moment2);
    assert_eq!(state, saved.state);
}

/// The flat buffers, whole, and the rest of the state.
fn load(verified: &Verified, table: &ParameterTable) -> Result<([Vec<f32>; 3], TrainerState)> {
    let mut buffers = [(); 3].map(|()| Vec::new());
    let state = verified.load_each(table, |buffer, first, values| {
        let into = &mut buffers[buffer as usize];
        assert_eq!(into.len(), first, "chunks in order");
        into.extend_from_slice(values);
        Ok(())
    })?;
    Ok((buffers, state))
}

/// The size still holds: only the hash tells.
fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(path, bytes).unwrap();
}

#[track_caller]
fn assert_contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|n| n.into_string().unwrap()).collect();
    names.sort();
    names
}

fn child(test: &str, run: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("checkpoint::{test}"), "--ignored", "--nocapture"]);
    command.env(FOLDER, run);
    command
}

/// The child's run folder; none when a person runs the ignored tests.
fn child_run() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

#[test]
fn state_comes_back_bit_by_bit() {
    let (_folder, run) = run_with(&[7]);
    assert_latest(run.path(), 7);
    let verified = checkpoint::latest(&run).unwrap().verified.unwrap();
    let saved = serde_json::to_value(config()).unwrap();
    assert_eq!(verified.config().unwrap(), saved, "configuration");
    assert_eq!(
        names(verified.folder()),
        [
            "MANIFEST.json",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "trainer.json",
            "trainer.safetensors"
        ]
    );
    assert_eq!(names(&run.checkpoints()), ["step-00000007"], "nothing temporary stays");
    assert_eq!(*hf::load(verified.folder()).unwrap().config(), config().model);
}

#[test]
fn six_steps_equal_three_and_three() {
    let mut training = Training::at(3);
    training.config.data.sequence = 16;
    let config = training.config.clone();
    let new_trainer = || {
        let cpu = Cpu::<f32>::new();
        Trainer::new(Plan::new(&config, &cpu).unwrap(), &config, cpu).unwrap()
    };
    let take = |trainer: &mut Trainer<Cpu<f32>>, step: u64| -> StepOutcome {
        let ids = |shift: u64| (0..32).map(move |i| ((i * 7 + step * 13 + shift) % 70) as i32);
        let (tokens, targets): (Vec<i32>, Vec<i32>) = (ids(0).collect(), ids(1).collect());
        let rows = engine::Rows::new(&tokens, &targets);
        let outcome = trainer.accumulate([rows].into_iter()).unwrap();
        trainer.update(&config.optimizer, step, 1e-2).unwrap();
        outcome
    };

    let mut whole = new_trainer();
    whole.set_parameters(&training.parameters).unwrap();
    let expected: Vec<StepOutcome> = (1..=6).map(|step| take(&mut whole, step)).collect();
    assert_ne!(expected[0].loss, expected[5].loss, "nothing was learnt");

    let (_folder, run) = run_with(&[]);
    let mut first = new_trainer();
    first.set_parameters(&training.parameters).unwrap();
    let mut outcomes: Vec<StepOutcome> = (1..=3).map(|step| take(&mut first, step)).collect();
    [training.parameters, training.moment1, training.moment2] = first.state().unwrap();
    training.save(&run).unwrap();
    drop(first);

    let verified = checkpoint::latest(&run).unwrap().verified.unwrap();
    let (buffers, state) = load(&verified, &training.table).unwrap();
    let mut second = new_trainer();
    set_state(&mut second, &buffers);
    outcomes.extend((state.step + 1..=6).map(|step| take(&mut second, step)));

    assert_eq!(outcomes, expected, "losses and gradient norms");
    let [found, wanted] = [second.state().unwrap(), whole.state().unwrap()];
    for (i, what) in ["parameters", "moment1", "moment2"].into_iter().enumerate() {
        assert_same_bits(what, &found[i], &wanted[i]);
    }
}

#[cfg(unix)]
#[test]
fn files_have_ordinary_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let (folder, run) = run_with(&[1]);
    let plain = folder.path().join("plain");
    fs::write(&plain, "").unwrap(); // 0644 under the usual umask
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let step = checkpoint_folder(run.path(), 1);
    for name in names(&step) {
        assert_eq!(mode(&step.join(&name)), mode(&plain), "{name}");
    }
}

#[test]
fn one_flipped_bit_in_any_file_is_found_and_the_older_checkpoint_used() {
    let (_folder, run) = run_with(&[1, 2]);
    let newest = checkpoint_folder(run.path(), 2);
    for name in names(&newest) {
        let path = newest.join(&name);
        let whole = fs::read(&path).unwrap();
        for at in [0, whole.len() / 3, whole.len() / 2, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(&path, &damaged).unwrap();
            let latest = checkpoint::latest(&run).unwrap();
            assert_eq!(latest.verified.unwrap().step(), 1, "{name} byte {at}");
            assert_eq!(latest.damaged.len(), 1);
            assert_eq!(latest.damaged[0].step, 2);
            let message = latest.damaged[0].reason.to_string();
            assert_contains(&message, &["step-00000002", &name, "remedy: "]);
        }
        fs::write(&path, whole).unwrap();
    }
    assert_latest(run.path(), 2);
}

#[test]
fn every_bit_of_the_manifest_counts() {
    let (_folder, run) = run_with(&[1]);
    let folder = checkpoint_folder(run.path(), 1);
    let path = folder.join("MANIFEST.json");
    let whole = fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    for bit in 0..whole.len() * 8 {
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &damaged).unwrap();
        let error = checkpoint::verify(&folder).expect_err("a flipped bit");
        assert_contains(&error.to_string(), &["MANIFEST.json"]);
        damaged[bit / 8] ^= 1 << (bit % 8);
    }
    fs::write(&path, &whole).unwrap();
    assert_latest(run.path(), 1);
}

#[test]
fn missing_truncated_swapped_and_renamed_are_told_apart() {
    let damage = |what: &dyn Fn(&RunDir, &Path)| {
        let (_folder, run) = run_with(&[1, 2]);
        what(&run, &checkpoint_folder(run.path(), 2));
        assert_latest(run.path(), 1);
        let damaged = checkpoint::latest(&run).unwrap().damaged.remove(0);
        assert_eq!(damaged.reason.exit_code(), 2);
        assert!(matches!(damaged.reason, Error::Checkpoint { .. }));
        damaged.reason.to_string()
    };
    let message = damage(&|_, newest| fs::remove_file(newest.join("MANIFEST.json")).unwrap());
    assert_contains(&message, &["step-00000002", "has no MANIFEST.json", "not finished"]);

    let message = damage(&|_, newest| fs::write(newest.join("MANIFEST.json"), "").unwrap());
    assert_contains(&message, &["MANIFEST.json cannot be read"]);

    for name in ["model.safetensors", "trainer.safetensors", "trainer.json", "tokenizer.json"] {
        let message = damage(&|_, newest| fs::remove_file(newest.join(name)).unwrap());
        assert_contains(&message, &[&format!("{name} is missing")]);
        let message = damage(&|_, newest| {
            let path = newest.join(name);
            let whole = fs::read(&path).unwrap();
            fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        });
        assert_contains(&message, &[&format!("{name} is damaged"), "bytes"]);
    }

    let message = damage(&|run, newest| {
        let older = checkpoint_folder(run.path(), 1).join("trainer.safetensors");
        fs::copy(older, newest.join("trainer.safetensors")).unwrap();
    });
    assert_contains(&message, &["trainer.safetensors is damaged", "sha256"]);

    let message = damage(&|run, newest| {
        fs::remove_dir_all(newest).unwrap();
        fs::rename(checkpoint_folder(run.path(), 1), newest).unwrap();
        Training::at(1).save(run).unwrap();
    });
    assert_contains(&message, &["is of step 1", "renamed"]);
}

#[test]
fn a_run_without_a_good_checkpoint_says_so() {
    let (_folder, run) = run_with(&[]);
    let latest = checkpoint::latest(&run).unwrap();
    assert!(latest.verified.is_none() && latest.damaged.is_empty());
    let message = checkpoint::model_folder(run.path()).unwrap_err().to_string();
    assert_contains(&message, &["has no checkpoint yet"]);

    Training::at(3).save(&run).unwrap();
    let folder = checkpoint_folder(run.path(), 3);
    assert_eq!(checkpoint::model_folder(run.path()).unwrap(), folder);
    assert_eq!(checkpoint::model_folder(&folder).unwrap(), folder);
    fs::write(folder.join("trainer.json"), "{}").unwrap();
    let message = checkpoint::model_folder(run.path()).unwrap_err().to_string();
    assert_contains(&message, &["trainer.json is damaged"]);
}

#[test]
fn a_models_folder_is_verified_without_the_trainers_state() {
    let (_folder, run) = run_with(&[1, 2]);
    let [older, newest] = [1, 2].map(|step| checkpoint_folder(run.path(), step));
    flip_a_bit(&newest.join("trainer.safetensors"));
    assert_eq!(checkpoint::model_folder(run.path()).unwrap(), newest);
    assert_eq!(checkpoint::model_folder(&newest).unwrap(), newest);
    assert_latest(run.path(), 1); // --resume reads all

    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        flip_a_bit(&newest.join(name));
        assert_eq!(checkpoint::model_folder(run.path()).unwrap(), older, "{name}");
        let message = checkpoint::model_folder(&newest).unwrap_err().to_string();
        assert_contains(&message, &[&format!("{name} is damaged"), "sha256", "remedy: "]);
        flip_a_bit(&newest.join(name));
    }
    fs::remove_file(newest.join("trainer.safetensors")).unwrap();
    assert_eq!(checkpoint::model_folder(run.path()).unwrap(), older, "not a whole checkpoint");
}

#[test]
fn state_of_another_model_is_not_loaded() {
    let (_folder, run) = run_with(&[1]);
    let verified = checkpoint::latest(&run).unwrap().verified.unwrap();
    let changes: [fn(&mut ModelConfig); 3] = [
        |model| model.layers = 4,
        |model| model.placement = Placement::Pre, // equal sizes, other meaning
        |model| model.kv_heads = 4,
    ];
    for change in changes {
        let mut model = small_model();
        change(&mut model);
        let error = load(&verified, &ParameterTable::new(&model)).unwrap_err();
        assert_contains(&error.to_string(), &["other model settings", "run.toml", "--init"]);
    }
}

#[test]
fn a_device_that_fails_while_it_is_read_leaves_the_earlier_checkpoint() {
    let (_folder, run) = run_with(&[1]);
    let training = Training::at(2);
    for fails in FlatBuffer::ALL {
        let error = training.save_from(&run, &mut |buffer, _, _| match buffer == fails {
            true => Err(Error::Usage { what: "gone".into(), remedy: "none".into() }),
            false => Ok(()),
        });
        let error = error.unwrap_err();
        assert!(matches!(error, Error::NotSaved { .. }), "{error}");
        assert_contains(&error.to_string(), &["step-00000002", "gone", "not saved"]);
        assert_eq!(names(&run.checkpoints()), ["step-00000001"], "{fails:?}");
        assert_latest(run.path(), 1);
    }
}

/// 7 and 14 million parameters: 120 and 220 MB of files.
#[cfg(target_os = "linux")]
#[test]
fn saving_and_loading_take_the_same_host_memory_whatever_the_model() {
    let peaks = [1, 2].map(|scale| {
        let folder = tempfile::tempdir().unwrap();
        let mut child = child("child_saves_a_large_model", &folder.path().join("run"));
        let output = child.env("ISOBATH_TEST_SCALE", scale.to_string()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let printed = String::from_utf8(output.stdout).unwrap();
        let number = |name: &str| -> usize {
            let found = printed.lines().find_map(|line| line.strip_prefix(name));
            found.unwrap_or_else(|| panic!("no {name} in {printed}")).trim().parse().unwrap()
        };
        let elements = number("elements ");
        assert!(elements > scale * 6_000_000, "{elements} elements");
        assert!(number("asked ") <= CHUNK_ELEMENTS, "more than a chunk at one time");
        number("peak ")
    });
    let mib = peaks.map(|bytes| bytes >> 20);
    // Two chunks of 4 MiB, buffers of files, stacks of threads; a whole buffer of the smaller has
    // 28 MiB.
    assert!(mib.iter().all(|mib| *mib < 24), "{mib:?} MiB");
    assert!(peaks[1].abs_diff(peaks[0]) < 4 << 20, "twice the model: {mib:?} MiB");
}

/// The values are made up where they are asked for: whatever memory is taken, saving takes.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "child process of other tests"]
fn child_saves_a_large_model() {
    let Some(folder) = child_run() else { return };
    let scale: usize = std::env::var("ISOBATH_TEST_SCALE").unwrap().parse().unwrap();
    let mut config = config();
    config.model.vocab = scale * 6000;
    (config.model.hidden, config.model.ffn) = (512, 512);
    let table = ParameterTable::new(&config.model);
    let run = RunDir::create(&folder).unwrap();
    run.write_config("name = \"test\"\n").unwrap();
    let mut training = Training { config, table, ..Training::at(1) };
    training.state.step = 1;
    let value = |buffer: FlatBuffer, at: usize| (at + buffer as usize) as f32;
    let before = host_memory::peak_of_process().unwrap();
    let mut asked = 0;
    training
        .save_from(&run, &mut |buffer, first, out| {
            asked = asked.max(out.len());
            out.iter_mut().enumerate().for_each(|(i, out)| *out = value(buffer, first + i));
            Ok(())
        })
        .unwrap();
    let verified = checkpoint::latest(&run).unwrap().verified.unwrap();
    let mut seen = 0;
    let loaded = verified.load_each(&training.table, |buffer, first, values| {
        asked = asked.max(values.len());
        seen += values.len();
        let mut values = values.iter().enumerate();
        assert!(values.all(|(i, found)| *found == value(buffer, first + i)), "{buffer:?}");
        Ok(())
    });
    assert_eq!(loaded.unwrap(), training.state);
    let elements = training.table.stored_elements();
    assert_eq!(seen, 3 * elements);
    println!("elements {elements}\nasked {asked}");
    println!("peak {}", host_memory::peak_of_process().unwrap() - before);
}

/// What versions before this one wrote: the position and the pending line as any JSON, and
/// three fields that nothing needs.
#[test]
fn the_loaders_position_and_the_pending_line_are_read_or_refused() {
    let state = |loader: Value, pending: Value| -> serde_json::Result<TrainerState> {
        serde_json::from_value(json!({
            "step": 3, "updates": 3, "tokens": 384, "seed": 7, "loader": loader,
            "elapsed_seconds": 1.5, "best_valid_loss": 2.5, "extra": pending
        }))
    };
    let loader = json!({"row": 6, "rows_per_epoch": 7, "seed": 7, "sequence": 64, "source": 9});
    let pending = json!({"grad_norm": 1.0, "loss": 2.0, "lr": 0.1, "mfu": null, "step": 3,
                      "tokens": 384, "tokens_per_second": 10.0});
    assert_eq!(state(loader.clone(), Value::Null).unwrap().pending, None);
    let read = state(loader.clone(), pending.clone()).unwrap();
    assert_eq!((read.loader.row, read.pending.map(|line| line.loss)), (6, Some(2.0)));
    let written = serde_json::to_value(read).unwrap();
    let expected = json!({
        "step": 3, "tokens": 384, "loader": loader, "elapsed_seconds": 1.5, "extra": pending
    });
    assert_eq!(written, expected);
    for (loader, pending, part) in [
        (Value::Null, Value::Null, "LoaderState"),
        (json!({"row": 6}), Value::Null, "rows_per_epoch"),
        (loader, json!({"step": 3}), "tokens"),
    ] {
        let message = state(loader, pending).unwrap_err().to_string();
        assert!(message.contains(part), "{part} is not in: {message}");
    }
}

#[test]
fn saving_a_step_again_replaces_it() {
    let (_folder, run) = run_with(&[1, 2]);
    let path = checkpoint_folder(run.path(), 2).join("model.safetensors");
    fs::write(&path, "damaged").unwrap();
    assert_eq!(checkpoint::latest(&run).unwrap().verified.unwrap().step(), 1);
    Training::at(2).save(&run).unwrap();
    assert_latest(run.path(), 2);
    assert_eq!(names(&run.checkpoints()), ["step-00000001", "step-00000002"]);
}

#[test]
fn the_first_values_stay_where_they_were_asked_for() {
    for (initial, expected) in [(true, &[0, 3][..]), (false, &[3])] {
        let (_folder, run) = run_with(&[0, 1, 2, 3]);
        let keep = CheckpointConfig { every: 1, keep_last: 1, keep_every: 0, initial };
        checkpoint::retain(&run, &keep, None).unwrap();
        assert_eq!(checkpoint_steps(run.path()).unwrap(), expected, "initial {initial}");
    }
}

#[test]
fn retention_keeps_the_last_and_every_nth() {
    let all: Vec<u64> = (1..=8).collect();
    let cases: [(usize, u64, &[u64]); 7] = [
        (0, 0, &all),
        (0, 4, &all),
        (1, 0, &[8]),
        (3, 0, &[6, 7, 8]),
        (1, 3, &[3, 6, 8]),
        (2, 4, &[4, 7, 8]),
        (9, 0, &all),
    ];
    for (keep_last, keep_every, expected) in cases {
        let (_folder, run) = run_with(&all);
        let keep = CheckpointConfig { every: 1, keep_last, keep_every, initial: false };
        let deleted = checkpoint::retain(&run, &keep, None).unwrap();
        let left = checkpoint_steps(run.path()).unwrap();
        assert_eq!(left, expected, "keep_last {keep_last}, keep_every {keep_every}");
        let gone: Vec<u64> = all.iter().copied().filter(|s| !expected.contains(s)).collect();
        assert_eq!(deleted, gone);
        assert_eq!(names(&run.checkpoints()).len(), expected.len(), "nothing half-deleted stays");
        assert_latest(run.path(), 8);
    }
}

#[test]
fn retention_never_deletes_the_newest_that_can_be_loaded() {
    let (_folder, run) = run_with(&[1, 2, 3, 4, 5]);
    let damage =
        |step: u64, name: &str| flip_a_bit(&checkpoint_folder(run.path(), step).join(name));
    damage(5, "trainer.safetensors");
    damage(4, "model.safetensors");
    fs::remove_file(checkpoint_folder(run.path(), 2).join("MANIFEST.json")).unwrap();
    let keep = CheckpointConfig { every: 1, keep_last: 1, keep_every: 0, initial: false };
    assert_eq!(checkpoint::retain(&run, &keep, None).unwrap(), [1, 4]);
    // 2 is unfinished: not ours to delete; 3 is the newest that holds
    assert_eq!(checkpoint_steps(run.path()).unwrap(), [2, 3, 5]);
    assert_latest(run.path(), 3);

    damage(3, "trainer.json");
    assert_eq!(
        checkpoint::retain(&run, &keep, None).unwrap(),
        [0u64; 0],
        "none holds: none is deleted"
    );
    assert_eq!(checkpoint_steps(run.path()).unwrap(), [2, 3, 5]);
}

#[test]
fn retention_does_not_read_what_was_just_saved() {
    let keep = CheckpointConfig { every: 1, keep_last: 1, keep_every: 0, initial: false };
    let (_folder, run) = run_with(&[1, 2]);
    let saved = Training::at(3).save(&run).unwrap();
    // nobody else writes here, so only a test can damage it: what is not read is not noticed
    flip_a_bit(&saved.folder().join("trainer.safetensors"));
    assert_eq!(checkpoint::retain(&run, &keep, Some(&saved)).unwrap(), [1, 2]);
    assert_eq!(checkpoint_steps(run.path()).unwrap(), [3]);

    // a newer folder, and any other that this process did not write, is read
    let (_folder, run) = run_with(&[1, 2, 4]);
    let saved = Training::at(3).save(&run).unwrap();
    flip_a_bit(&checkpoint_folder(run.path(), 4).join("trainer.safetensors"));
    assert_eq!(checkpoint::retain(&run, &keep, Some(&saved)).unwrap(), [1, 2]);
    assert_eq!(checkpoint_steps(run.path()).unwrap(), [3, 4]);
    assert_latest(run.path(), 3);

    // gone meanwhile: the newest of the others is read, and stays
    fs::remove_dir_all(checkpoint_folder(run.path(), 4)).unwrap();
    for step in [1, 2] {
        Training::at(step).save(&run).unwrap();
    }
    fs::remove_file(saved.folder().join("MANIFEST.json")).unwrap();
    assert_eq!(checkpoint::retain(&run, &keep, Some(&saved)).unwrap(), [1]);
    assert_latest(run.path(), 2);
}

#[test]
fn leftovers_of_a_killed_process_are_removed_at_the_next_start() {
    let (_folder, run) = run_with(&[1, 2]);
    let (path, checkpoints) = (run.path().to_path_buf(), run.checkpoints());
    drop(run);
    for name in [".tmp-step-00000003", ".deleted-step-00000001"] {
        fs::create_dir(checkpoints.join(name)).unwrap();
        fs::write(checkpoints.join(name).join("model.safetensors"), "half").unwrap();
    }
    for name in [".tmp-run.toml", ".tmp-run.toml-Ab0", ".tmp-metrics.jsonl-Ab0"] {
        fs::write(path.join(name), "half").unwrap();
    }
    fs::write(path.join(".tmp-runs"), "of somebody else").unwrap();
    // killed between the two renames of a replacement: the old one is the only one
    fs::rename(checkpoints.join("step-00000002"), checkpoints.join(".replaced-step-00000002"))
        .unwrap();
    // killed after both renames: the old one is superfluous
    fs::create_dir(checkpoints.join(".replaced-step-00000001")).unwrap();
    assert_eq!(checkpoint::latest(&path).unwrap().verified.unwrap().step(), 1);

    let run = RunDir::resume(&path).unwrap();
    assert_eq!(names(&checkpoints), ["step-00000001", "step-00000002"]);
    assert_eq!(names(&path), [".lock", ".tmp-runs", "checkpoints", "run.toml"]);
    assert_latest(run.path(), 2);
}

#[test]
fn a_run_folder_has_one_writer() {
    let (_folder, run) = run_with(&[1]);
    let before = names(&run.checkpoints());
    let pid = std::process::id().to_string();
    for refused in [RunDir::resume(run.path()), RunDir::create(run.path())] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert_contains(&error.to_string(), &[&format!("pid {pid}"), "--out", "remedy: "]);
    }
    let output = child("child_resumes", run.path()).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_contains(&printed, &["refused: ", &format!("another process (pid {pid}) is training")]);
    assert_eq!(names(&run.checkpoints()), before);

    let path = run.path().to_path_buf();
    drop(run);
    let output = child("child_resumes", &path).output().unwrap();
    assert_contains(&String::from_utf8_lossy(&output.stdout), &["resumed"]);
}

#[test]
#[ignore = "child process of other tests"]
fn child_resumes() {
    let Some(run) = child_run() else { return };
    match RunDir::resume(&run) {
        Ok(_) => println!("resumed"),
        Err(e) => println!("refused: {e}"),
    }
}

#[test]
fn a_new_run_does_not_touch_an_old_one() {
    let (folder, run) = run_with(&[1, 12]);
    let path = run.path().to_path_buf();
    drop(run);
    let error = RunDir::create(&path).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert_contains(&error.to_string(), &["already holds a run", "step 12", "--resume", "--out"]);
    assert_latest(&path, 12);

    let empty = folder.path().join("empty");
    let error = RunDir::resume(&empty).unwrap_err();
    assert_contains(&error.to_string(), &["no run to resume", "run.toml", "without --resume"]);
    assert!(!empty.exists(), "a refused resume leaves nothing");

    // a process that died before it wrote run.toml is no run
    drop(RunDir::create(&empty).unwrap());
    let run = RunDir::create(&empty).unwrap();
    run.write_config("seed = 1\n").unwrap();
    run.write_config("seed = 2\n").unwrap();
    assert_eq!(fs::read_to_string(empty.join("run.toml")).unwrap(), "seed = 2\n");
    assert_eq!(names(&empty), [".lock", "checkpoints", "run.toml"]);
}

#[test]
fn metrics_go_back_to_the_checkpoint_and_lose_no_line() {
    let (_folder, run) = run_with(&[]);
    assert_eq!(run.cut_metrics(0).unwrap(), 0);
    let line = |step: u64| json!({"step": step, "loss": 1.0 / step as f64});
    let mut log = run.metrics().unwrap();
    for step in 1..=5 {
        log.append(&line(step)).unwrap();
    }
    log.sync().unwrap();
    let path = run.path().join("metrics.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{whole}{{\"step\": 6, \"lo")).unwrap(); // torn by a crash

    assert_eq!(run.cut_metrics(5).unwrap(), 1);
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    assert_eq!(run.cut_metrics(5).unwrap(), 0);
    assert_eq!(run.cut_metrics(3).unwrap(), 2);
    let mut log = run.metrics().unwrap();
    for step in 4..=5 {
        log.append(&line(step)).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), whole, "3 + 2 steps equal 5 steps");
    let old = fs::read_to_string(run.path().join("metrics.jsonl.old")).unwrap();
    assert_eq!(old, format!("{{\"step\": 6, \"lo\n{}\n{}\n", line(4), line(5)));
}

/// A limit on file sizes stands for a full disk: it stops a write in the middle of a file on
/// every system and for every user.
#[cfg(unix)]
#[test]
fn a_save_that_runs_out_of_space_loses_nothing() {
    let (_folder, run) = run_with(&[1]);
    let path = run.path().to_path_buf();
    let folder = checkpoint_folder(&path, 1);
    let sizes: BTreeMap<String, u64> = names(&folder)
        .into_iter()
        .map(|name| (name.clone(), fs::metadata(folder.join(name)).unwrap().len()))
        .collect();
    let written: u64 = sizes.values().sum::<u64>() - sizes["MANIFEST.json"];
    drop(run);
    let blocks = |bytes: u64| bytes / 512;
    let cases = [
        (1, "config.json"),
        (blocks(sizes["model.safetensors"]) / 2, "model.safetensors"),
        (blocks(sizes["trainer.safetensors"]) - 1, "trainer.safetensors"),
    ];
    for (limit, file) in cases {
        let limited = child("child_saves_step_2", &path);
        let output = Command::new("sh")
            .arg("-c")
            .arg(format!("ulimit -f {limit}; trap '' XFSZ; exec \"$0\" \"$@\""))
            .arg(limited.get_program())
            .args(limited.get_args())
            .env(FOLDER, &path)
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        let temporary = format!(".tmp-step-00000002/{file}: ");
        let needed = format!("it needs {written} bytes");
        assert_contains(&printed, &["exit code 1: checkpoint ", "step-00000002: not saved"]);
        assert_contains(&printed, &["earlier ones are as they were", &needed, &temporary]);
        assert_contains(&printed, &["remedy: free some space"]);
        assert_eq!(names(&path.join("checkpoints")), ["step-00000001"], "limit {limit}");
        assert_latest(&path, 1);
    }
    let output = child("child_saves_step_2", &path).output().unwrap();
    assert_contains(&String::from_utf8_lossy(&output.stdout), &["saved"]);
    assert_latest(&path, 2);
}

#[test]
#[ignore = "child process of other tests"]
fn child_saves_step_2() {
    let Some(run) = child_run() else { return };
    let run = RunDir::resume(&run).unwrap();
    match Training::at(2).save(&run) {
        Ok(_) => println!("saved"),
        Err(e) => println!("exit code {}: {e}", e.exit_code()),
    }
}

/// Runs a child in a mount namespace of its own, after a shell command that mounts; false where
/// that is not allowed.
#[cfg(target_os = "linux")]
fn run_in_namespace(mount: &str, test: &str, folder: &Path) -> bool {
    let in_namespace = |script: String, child: &Command| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        command.arg(child.get_program()).args(child.get_args()).env(FOLDER, folder).output()
    };
    let child = child(test, folder);
    if !in_namespace(mount.to_string(), &child).is_ok_and(|output| output.status.success()) {
        println!("skipped: mounting is not allowed here");
        return false;
    }
    let output = in_namespace(format!("{mount} && exec \"$0\" \"$@\""), &child).unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}\n{errors}");
    assert_contains(&printed, &["1 passed"]);
    true
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mount = format!("mount -t tmpfs -o size=2m none {}", folder.path().display());
    run_in_namespace(&mount, "child_fills_its_disk", folder.path());
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "child process of other tests"]
fn child_fills_its_disk() {
    let Some(folder) = child_run() else { return };
    let run = RunDir::create(&folder.join("run")).unwrap();
    run.write_config("name = \"test\"\n").unwrap();
    let mut saved = 0;
    let error = loop {
        match Training::at(saved + 1).save(&run) {
            Ok(_) => saved += 1,
            Err(e) => break e,
        }
    };
    assert!(saved > 0, "2 MiB hold at least one checkpoint");
    let message = error.to_string();
    assert_contains(&message, &["not saved", "No space left on device", "free some space"]);
    assert_eq!(error.exit_code(), 1);
    assert_eq!(names(&run.checkpoints()).len() as u64, saved);
    assert_latest(run.path(), saved);
    let keep = CheckpointConfig { every: 1, keep_last: 1, keep_every: 0, initial: false };
    checkpoint::retain(&run, &keep, None).unwrap();
    if saved > 1 {
        Training::at(saved + 1).save(&run).unwrap();
        assert_latest(run.path(), saved + 1);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_read_only_run_folder_loses_nothing() {
    // refused to every user, root included
    let error = RunDir::create(Path::new("/sys/isobath-run")).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert_contains(&error.to_string(), &["create /sys/isobath-run: ", "remedy: "]);

    let (folder, run) = run_with(&[]);
    let file = folder.path().join("file");
    fs::write(&file, "contents").unwrap();
    let error = RunDir::create(&file.join("run")).unwrap_err();
    assert_contains(&error.to_string(), &["file/run: "]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "contents");

    fs::remove_dir(run.checkpoints()).unwrap();
    std::os::unix::fs::symlink("/sys", run.checkpoints()).unwrap();
    let error = Training::at(1).save(&run).unwrap_err();
    let temporary = run.checkpoints().join(".tmp-step-00000001").display().to_string();
    assert_contains(&error.to_string(), &["step-00000001: not saved", &temporary, "remedy: "]);
    assert!(matches!(error, Error::NotSaved { .. }));

    let (_folder, run) = run_with(&[1]);
    let path = run.path().to_path_buf();
    drop(run);
    let outer = path.display();
    let inner = format!("{outer}/checkpoints");
    let mount = format!("mount --bind {outer} {outer} && mount --bind {inner} {inner}");
    run_in_namespace(&mount, "child_has_a_read_only_run", &path);
    assert_latest(&path, 1);
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "child process of other tests"]
fn child_has_a_read_only_run() {
    let Some(path) = child_run() else { return };
    let make_read_only = |folder: &Path| {
        let mut mount = Command::new("mount");
        assert!(mount.args(["-o", "remount,ro,bind"]).arg(folder).status().unwrap().success());
    };
    let run = RunDir::resume(&path).unwrap();
    make_read_only(&run.checkpoints()); // as when a disk is remounted after an error

    let error = Training::at(2).save(&run).unwrap_err();
    let message = error.to_string();
    assert_contains(&message, &["step-00000002: not saved", "Read-only file system"]);
    assert_contains(&message, &["remedy: choose a folder on a writable file system"]);
    assert_latest(&path, 1);
    let keep = CheckpointConfig { every: 1, keep_last: 1, keep_every: 0, initial: false };
    assert_eq!(checkpoint::retain(&run, &keep, None).unwrap(), [0u64; 0]);
    drop(run);
    make_read_only(&path);
    let message = RunDir::resume(&path).unwrap_err().to_string();
    assert_contains(&message, &["lock ", "/.lock: Read-only file system", "remedy: choose"]);
    assert_latest(&path, 1);
}

/// Kills a save, or lets the system refuse, at its first, second, third ... system call of a kind.
/// The step is saved a second time, so there is something to lose at every one of them.
#[cfg(target_os = "linux")]
#[test]
fn a_save_may_die_or_fail_at_any_system_call() {
    let (_folder, run) = run_with(&[2]);
    let path = run.path().to_path_buf();
    drop(run);
    let traced = |expression: &str, trace: &Path| {
        let saver = child("child_saves_step_2", &path);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-e", expression, "-o"]).arg(trace).arg(saver.get_program());
        // strace counts the calls of each thread for itself: fewer threads, more calls in one
        strace.args(saver.get_args()).env(FOLDER, &path).env("RAYON_NUM_THREADS", "1").output()
    };
    let trace = path.join("trace");
    if !traced("trace=rename", &trace).is_ok_and(|output| output.status.success()) {
        println!("skipped: strace is not here, or tracing is not allowed");
        return;
    }
    for (call, at_least) in
        [("write", 6), ("fsync", 6), ("mkdir", 1), ("rename", 2), ("unlinkat", 8)]
    {
        for fault in ["signal=SIGKILL", "error=ENOSPC"] {
            let mut injected = 0;
            loop {
                let when = injected + 1;
                traced(&format!("inject={call}:{fault}:when={when}"), &trace).unwrap();
                let trace = String::from_utf8_lossy(&fs::read(&trace).unwrap()).into_owned();
                if !trace.contains("(INJECTED)") && !trace.contains("killed by SIGKILL") {
                    break;
                }
                injected = when;
                let run = RunDir::resume(&path).unwrap();
                assert_latest(&path, 2);
                assert_eq!(names(&run.checkpoints()), ["step-00000002"], "{call} {when}: {fault}");
            }
            assert!(injected >= at_least, "only {injected} of {call}: {fault}");
        }
    }
}

/// Kills a process that saves and deletes without pause, at 40 different moments.
#[cfg(unix)]
#[test]
fn a_kill_at_any_moment_loses_nothing() {
    let (_folder, run) = run_with(&[1]);
    let path = run.path().to_path_buf();
    drop(run);
    let (mut newest, mut interrupted) = (1, 0);
    for kill in 0..40 {
        let mut saver = child("child_saves_in_a_loop", &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(saver.stdout.take().unwrap()).lines();
        let saved = |line: String| line.split_once("saved ").map(|(_, step)| step.parse().unwrap());
        newest = lines.by_ref().find_map(|line| saved(line.unwrap())).expect("one save");
        std::thread::sleep(Duration::from_micros(731 * kill));
        saver.kill().unwrap();
        saver.wait().unwrap();
        // what was reported before the kill must be there, or something newer
        newest = lines.map_while(|line| line.ok()).filter_map(saved).fold(newest, u64::max);
        let left = names(&path.join("checkpoints"));
        interrupted += u32::from(left.iter().any(|name| name.starts_with('.')));
        let latest = checkpoint::latest(&path).unwrap();
        assert!(latest.damaged.is_empty(), "kill {kill}: {:?}", latest.damaged);
        let step = latest.verified.expect("a checkpoint").step();
        assert!(step >= newest, "kill {kill}: {step} is left, {newest} was saved");
        assert_latest(&path, step);
    }
    assert!(newest > 40, "each process saved at least once, not {newest}");
    assert!(interrupted > 10, "only {interrupted} of 40 kills came amid a save or a deletion");
    let run = RunDir::resume(&path).unwrap();
    assert!(names(&run.checkpoints()).iter().all(|name| name.starts_with("step-")));
}

#[cfg(unix)]
#[test]
#[ignore = "child process of other tests"]
fn child_saves_in_a_loop() {
    let Some(path) = child_run() else { return };
    let run = RunDir::resume(&path).unwrap();
    let first = checkpoint::latest(&run).unwrap().verified.unwrap().step() + 1;
    let keep = CheckpointConfig { every: 1, keep_last: 1, keep_every: 0, initial: false };
    println!();
    for step in first.. {
        Training::at(step).save(&run).unwrap();
        println!("saved {step}");
        checkpoint::retain(&run, &keep, None).unwrap();
    }
}

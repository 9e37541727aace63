//! A run's folder: who may write into it, what lies where, and how folders appear and disappear.
//!
//! A [`RunDir`] holds the lock of the folder for as long as it lives, so whoever has one is the
//! only writer; the operating system drops the lock when the process ends, in whatever way. A
//! checkpoint folder gets its name by one rename and loses it by one rename, so a half-written or
//! half-deleted one never bears a valid name. What is inside a checkpoint is not known here.
//!
//! ```text
//! run.toml               the resolved configuration
//! metrics.jsonl          one line per step; metrics.jsonl.old: lines that a resume cut off
//! sessions.jsonl         one line per process that trained here: program, commit, device
//! throughput.jsonl       one line per process that trained here to its end: how fast it was
//! samples.jsonl          printed samples; samples.jsonl.old: those that a resume cut off
//! data/                  shards of a text too large for memory
//! checkpoints/step-00000200/
//! .lock                  held while a process trains here; contains its pid
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::durable::{TEMPORARY, remove_if_present, replace, sync_folder};
use crate::error::{Error, Result};

pub const CONFIG: &str = "run.toml";
pub const METRICS: &str = "metrics.jsonl";
pub const SAMPLES: &str = "samples.jsonl";
pub const SESSIONS: &str = "sessions.jsonl";
pub const THROUGHPUT: &str = "throughput.jsonl";
pub const CUT_METRICS: &str = "metrics.jsonl.old";
pub const CUT_SAMPLES: &str = "samples.jsonl.old";
pub const CHECKPOINTS: &str = "checkpoints";
const LOCK: &str = ".lock";

const STEP: &str = "step-";
/// Prefixes of what is not, or no longer, a checkpoint.
const DELETED: &str = ".deleted-";
const REPLACED: &str = ".replaced-";

/// Whether this file is what a run has written down of itself, and not one that it was started
/// with.
pub fn is_of_run(file: &Path) -> bool {
    let folder = file.parent().unwrap_or(Path::new(""));
    file.file_name().is_some_and(|name| name == CONFIG) && folder.join(METRICS).exists()
}

/// A run folder that this process alone writes to.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Locked; the operating system unlocks it if the process dies.
    lock: File,
    /// Whether `create` made the folder.
    fresh: bool,
}

impl Drop for RunDir {
    /// Closing would do, were it not for processes that are just being started from another
    /// thread and still share the open file.
    ///
    /// A folder made for a run that never began, because its input was refused, goes as well; only
    /// what is empty is removed.
    fn drop(&mut self) {
        if self.fresh
            && !self.path.join(CONFIG).exists()
            && fs::remove_dir(self.checkpoints()).is_ok()
            && fs::remove_file(self.path.join(LOCK)).is_ok()
        {
            let _ = fs::remove_dir(&self.path);
        }
        let _ = self.lock.unlock();
    }
}

impl AsRef<Path> for RunDir {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

impl RunDir {
    /// For a new run: makes the folder, and refuses one that already holds a run.
    pub fn create(path: &Path) -> Result<Self> {
        let fresh = !path.exists();
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let mut run = RunDir::lock(path)?;
        run.fresh = fresh;
        let steps = checkpoint_steps(path)?;
        if !steps.is_empty() || path.join(CONFIG).exists() || path.join(METRICS).exists() {
            let newest = match steps.last() {
                Some(step) => format!("its newest checkpoint is of step {step}"),
                None => "it has no checkpoint yet".to_string(),
            };
            return Err(Error::Usage {
                what: format!("{} already holds a run; {newest}", path.display()),
                remedy: "continue it with --resume, or choose another folder with --out".into(),
            });
        }
        run.prepare()
    }

    /// For `--resume`: the folder must hold a run. Leftovers of an interrupted save are removed.
    pub fn resume(path: &Path) -> Result<Self> {
        RunDir::check_exists(path)?;
        RunDir::lock(path)?.prepare()
    }

    /// Refuses a folder without a run.
    pub fn check_exists(path: &Path) -> Result<()> {
        if path.join(CONFIG).exists() {
            return Ok(());
        }
        Err(Error::Usage {
            what: format!("there is no run to resume: {} has no {CONFIG}", path.display()),
            remedy: "start the run without --resume, or check --out".into(),
        })
    }

    fn lock(path: &Path) -> Result<Self> {
        let lock_path = path.join(LOCK);
        let mut options = OpenOptions::new();
        let mut lock = options
            .create(true)
            .truncate(false) // another process's pid stays readable
            .read(true)
            .write(true)
            .open(&lock_path)
            .map_err(Error::io("lock", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = lock.read_to_string(&mut holder); // only words for the message
                let holder = match holder.trim() {
                    "" => "unknown".to_string(),
                    pid => pid.to_string(),
                };
                return Err(Error::Locked { path: path.to_path_buf(), holder });
            }
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", &lock_path)(e)),
        }
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(Error::io("lock", &lock_path))?;
        Ok(RunDir { path: path.to_path_buf(), lock, fresh: false })
    }

    /// Nobody else writes here, so whatever is temporary was left by a process that died.
    fn prepare(self) -> Result<Self> {
        let checkpoints = self.checkpoints();
        if !checkpoints.exists() {
            fs::create_dir(&checkpoints).map_err(Error::io("create", &checkpoints))?;
            sync_folder(&self.path)?;
        }
        // Only names that we write: the folder may hold other people's files.
        for name in names(&self.path)? {
            let of = name.strip_prefix(TEMPORARY).unwrap_or_default();
            let suffix = [CONFIG, METRICS, SAMPLES].iter().find_map(|ours| of.strip_prefix(ours));
            if suffix.is_some_and(|suffix| suffix.is_empty() || suffix.starts_with('-')) {
                remove_if_present(&self.path.join(&name))?;
            }
        }
        for name in names(&checkpoints)? {
            let path = checkpoints.join(&name);
            let ours = |prefix| name.strip_prefix(prefix).filter(|rest| step_of(rest).is_some());
            if ours(TEMPORARY).or(ours(DELETED)).is_some() {
                remove_if_present(&path)?;
            } else if let Some(original) = ours(REPLACED) {
                // died between the two renames of `publish_checkpoint`, or after both
                let original = checkpoints.join(original);
                match original.exists() {
                    true => remove_if_present(&path)?,
                    false => rename(&path, &original)?,
                }
            }
        }
        sync_folder(&checkpoints)?;
        sync_folder(&self.path)?;
        Ok(self)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }

    /// Saves the resolved configuration, as a whole or not at all.
    pub fn write_config(&self, toml: &str) -> Result<()> {
        replace(&self.path.join(CONFIG), toml.as_bytes())
    }

    /// An empty folder without a valid name, for [`RunDir::publish_checkpoint`].
    pub(crate) fn temporary_checkpoint(&self, step: u64) -> Result<PathBuf> {
        let checkpoints = self.checkpoints();
        fs::create_dir_all(&checkpoints).map_err(Error::io("create", &checkpoints))?;
        let path = checkpoints.join(format!("{TEMPORARY}{}", folder_name(step)));
        remove_if_present(&path)?;
        fs::create_dir(&path).map_err(Error::io("create", &path))?;
        Ok(path)
    }

    /// Gives a finished folder its name. A checkpoint of the same step is replaced.
    pub(crate) fn publish_checkpoint(&self, temporary: &Path, step: u64) -> Result<PathBuf> {
        sync_folder(temporary)?;
        let checkpoints = self.checkpoints();
        let path = checkpoint_folder(&self.path, step);
        let replaced = checkpoints.join(format!("{REPLACED}{}", folder_name(step)));
        if path.exists() {
            remove_if_present(&replaced)?;
            rename(&path, &replaced)?;
        }
        if let Err(e) = rename(temporary, &path) {
            if replaced.exists() {
                rename(&replaced, &path)?;
            }
            return Err(e);
        }
        sync_folder(&checkpoints)?;
        let _ = remove_if_present(&replaced); // what stays is removed at the next start
        Ok(path)
    }

    /// Deletes a checkpoint; its name is gone before its files are.
    pub(crate) fn delete_checkpoint(&self, step: u64) -> Result<()> {
        let deleted = self.checkpoints().join(format!("{DELETED}{}", folder_name(step)));
        remove_if_present(&deleted)?;
        rename(&checkpoint_folder(&self.path, step), &deleted)?;
        sync_folder(&self.checkpoints())?;
        remove_if_present(&deleted)
    }

    /// Opens metrics.jsonl for new lines.
    pub fn metrics(&self) -> Result<LineLog> {
        self.log(METRICS)
    }

    /// Opens samples.jsonl for new lines.
    pub fn samples(&self) -> Result<LineLog> {
        self.log(SAMPLES)
    }

    /// Opens sessions.jsonl for a new line.
    pub fn sessions(&self) -> Result<LineLog> {
        self.log(SESSIONS)
    }

    /// Opens throughput.jsonl for a new line.
    pub fn throughput(&self) -> Result<LineLog> {
        self.log(THROUGHPUT)
    }

    fn log(&self, name: &str) -> Result<LineLog> {
        let path = self.path.join(name);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        Ok(LineLog { file: file.map_err(Error::io("open", &path))?, path })
    }

    /// Takes the run's metrics and samples back to a checkpoint: lines of later steps, and lines
    /// that a crash left torn, go to metrics.jsonl.old and samples.jsonl.old. Returns how many
    /// lines of metrics.
    pub fn cut_metrics(&self, step: u64) -> Result<usize> {
        self.cut(SAMPLES, CUT_SAMPLES, step)?;
        self.cut(METRICS, CUT_METRICS, step)
    }

    fn cut(&self, name: &str, old_name: &str, step: u64) -> Result<usize> {
        let path = self.path.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(e) => return Err(Error::io("read", &path)(e)),
        };
        let stays = |line: &[u8]| match serde_json::from_slice::<Value>(line) {
            Ok(Value::Object(fields)) => {
                line.ends_with(b"\n")
                    && fields.get("step").and_then(Value::as_u64).is_none_or(|s| s <= step)
            }
            _ => false,
        };
        let (kept, cut): (Vec<&[u8]>, Vec<&[u8]>) =
            text.split_inclusive(|byte| *byte == b'\n').partition(|line| stays(line));
        if cut.is_empty() {
            return Ok(0);
        }
        let old_path = self.path.join(old_name);
        let mut old = cut.concat();
        if !old.ends_with(b"\n") {
            old.push(b'\n');
        }
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&old_path)
            .and_then(|mut file| file.write_all(&old).and_then(|()| file.sync_all()))
            .map_err(Error::io("write", &old_path))?;
        replace(&path, &kept.concat())?;
        Ok(cut.len())
    }
}

/// metrics.jsonl, open for appending.
#[derive(Debug)]
pub struct LineLog {
    file: File,
    path: PathBuf,
}

impl LineLog {
    /// Appends one JSON object as one line, in one write.
    pub fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let written = serde_json::to_vec(line).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            self.file.write_all(&line)
        });
        written.map_err(Error::io("write", &self.path))
    }

    /// Returns when all lines are on disk. Called before a checkpoint is saved, so that no
    /// checkpoint is ahead of its metrics.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

/// Where a run keeps the checkpoint of a step, whether it exists or not.
pub fn checkpoint_folder(run: &Path, step: u64) -> PathBuf {
    run.join(CHECKPOINTS).join(folder_name(step))
}

/// The steps for which a run has a folder, in order; nothing is said about their contents.
pub fn checkpoint_steps(run: &Path) -> Result<Vec<u64>> {
    steps_in(&run.join(CHECKPOINTS), "")
}

/// The steps of which a folder has something, named like a checkpoint with `suffix` added, in
/// order; none if there is no such folder.
pub(crate) fn steps_in(folder: &Path, suffix: &str) -> Result<Vec<u64>> {
    let names = names(folder)?;
    let step = |name: &String| step_of(name.strip_suffix(suffix)?);
    let mut steps: Vec<u64> = names.iter().filter_map(step).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// The run that a checkpoint's folder lies in, and its step; `None` for a folder of no run.
pub fn run_and_step(checkpoint: &Path) -> Option<(PathBuf, u64)> {
    let folder = checkpoint.canonicalize().ok()?;
    let step = step_of(&folder.file_name()?.to_string_lossy())?;
    let checkpoints = folder.parent()?;
    let run = checkpoints.parent()?;
    (checkpoints.file_name()? == CHECKPOINTS).then(|| (run.to_path_buf(), step))
}

/// The step whose checkpoint has this name; none if it is no checkpoint's.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix(STEP)?.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}

/// "step-00000200": of the checkpoint, and of what else is kept for a step.
pub(crate) fn folder_name(step: u64) -> String {
    format!("{STEP}{step:08}")
}

/// Names in a folder; none if there is no such folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("read", folder)(e)),
    };
    entries
        .map(|entry| Ok(entry.map_err(Error::io("read", folder))?.file_name()))
        .map(|name| name.map(|name| name.to_string_lossy().into_owned()))
        .collect()
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename", from))
}

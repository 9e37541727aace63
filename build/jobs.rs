//! Compilations: run in parallel, and only where something changed.
//!
//! Beside each output lie `.key`, the fingerprint of what it was made from, and `.log`, what the
//! compiler said; so a skipped job says again what it said when it ran. Cargo has another folder for
//! each profile and for clippy: with ISOBATH_KERNEL_CACHE, a folder, they share what is compiled.

use std::collections::VecDeque;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::{env, fs, thread};

pub struct Job {
    /// For messages: "kernels/norm.cu".
    pub source: String,
    pub command: Command,
    /// The file that the command writes.
    pub output: PathBuf,
    /// A file that the command leaves on its way.
    pub kept: Option<Kept>,
    /// Everything the outputs depend on; not where they lie.
    pub fingerprint: u64,
}

/// One of the files that a command writes into a folder of its own, which is removed after it.
pub struct Kept {
    pub folder: PathBuf,
    /// Its name: the first of these that is there.
    pub names: [String; 2],
    pub output: PathBuf,
}

impl Job {
    fn outputs(&self) -> Vec<PathBuf> {
        let kept = self.kept.iter().map(|kept| kept.output.clone());
        std::iter::once(self.output.clone()).chain(kept).collect()
    }
}

/// Names the folder that builds share.
const CACHE: &str = "ISOBATH_KERNEL_CACHE";

/// What the compilers said, in the order of the jobs; or all of what those said that failed.
pub fn run(jobs: Vec<Job>) -> Result<Vec<String>, String> {
    println!("cargo::rerun-if-env-changed={CACHE}");
    let count = jobs.len();
    let queue = Mutex::new(jobs.into_iter().enumerate().collect::<VecDeque<_>>());
    let results = Mutex::new(vec![None; count]);
    thread::scope(|scope| {
        for _ in 0..threads().min(count) {
            scope.spawn(|| {
                loop {
                    let Some((index, job)) = queue.lock().unwrap().pop_front() else { break };
                    let result = run_one(job);
                    results.lock().unwrap()[index] = Some(result);
                }
            });
        }
    });
    let (mut said, mut failures) = (vec![], vec![]);
    for result in results.into_inner().unwrap() {
        match result.expect("every job ran") {
            Ok(text) => said.push(text),
            Err(message) => failures.push(message),
        }
    }
    if failures.is_empty() { Ok(said) } else { Err(failures.join("\n")) }
}

fn run_one(job: Job) -> Result<String, String> {
    let outputs = job.outputs();
    let Job { source, mut command, output, kept, fingerprint } = job;
    let (key, log) = (beside(&output, "key"), beside(&output, "log"));
    let fingerprint = format!("{fingerprint:016x}\n");
    if outputs.iter().all(|output| output.exists())
        && fs::read_to_string(&key).is_ok_and(|old| old == fingerprint)
        && let Ok(said) = fs::read_to_string(&log)
    {
        return Ok(said);
    }
    // Without its key, an output that is only half written is made again.
    let _ = fs::remove_file(&key);
    let shared = Shared::new(&fingerprint)?;
    let said = match shared.as_ref().and_then(|shared| shared.take(&outputs)) {
        Some(said) => said,
        None => {
            let said = match &kept {
                Some(kept) => kept.around(|| compile(&source, &mut command))?,
                None => compile(&source, &mut command)?,
            };
            shared.map_or(Ok(()), |shared| shared.give(&outputs, &said))?;
            said
        }
    };
    write(&log, &said)?;
    write(&key, &fingerprint)?;
    Ok(said)
}

fn compile(source: &str, command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).output();
    let done = done.map_err(|error| format!("{program} cannot be run: {error}"))?;
    let mut said = String::from_utf8_lossy(&done.stderr).into_owned();
    said.push_str(&String::from_utf8_lossy(&done.stdout));
    match done.status.success() {
        true => Ok(said),
        false => Err(format!("{source} does not compile ({}):\n{command:?}\n{said}", done.status)),
    }
}

impl Kept {
    fn around(&self, compile: impl FnOnce() -> Result<String, String>) -> Result<String, String> {
        let failed = |error| format!("{}: {error}", self.folder.display());
        let _ = fs::remove_dir_all(&self.folder);
        fs::create_dir_all(&self.folder).map_err(failed)?;
        let said = compile();
        let mut places = self.names.iter().map(|name| self.folder.join(name));
        let kept = match places.find(|place| place.exists()) {
            _ if said.is_err() => Ok(()),
            Some(place) => fs::rename(place, &self.output).map_err(failed),
            None => Err(format!(
                "{}: the compiler left no {} there",
                self.folder.display(),
                self.names[0]
            )),
        };
        fs::remove_dir_all(&self.folder).map_err(failed)?;
        kept.and(said)
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// What a job made, and what the compiler said, in the folder that builds share.
struct Shared {
    folder: PathBuf,
    fingerprint: String,
}

impl Shared {
    /// None where nobody names a folder.
    fn new(fingerprint: &str) -> Result<Option<Self>, String> {
        let Some(folder) = env::var_os(CACHE).map(PathBuf::from) else { return Ok(None) };
        let failed = |error| format!("{CACHE}={}: {error}", folder.display());
        fs::create_dir_all(&folder).map_err(failed)?;
        Ok(Some(Shared { folder, fingerprint: fingerprint.trim_end().to_string() }))
    }

    fn place(&self, output: &Path) -> PathBuf {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        self.folder.join(format!("{}-{name}", self.fingerprint))
    }

    /// The log, beside the first of them, is there only when all of them are whole.
    fn take(&self, outputs: &[PathBuf]) -> Option<String> {
        let said = fs::read_to_string(beside(&self.place(&outputs[0]), "log")).ok()?;
        for output in outputs {
            fs::copy(self.place(output), output).ok()?;
        }
        Some(said)
    }

    fn give(&self, outputs: &[PathBuf], said: &str) -> Result<(), String> {
        // Renamed, so that another build never reads half of it.
        let give = |place: &Path, write: &dyn Fn(&Path) -> std::io::Result<()>| {
            let failed = |error| format!("{}: {error}", place.display());
            let unfinished = beside(place, &std::process::id().to_string());
            write(&unfinished).map_err(failed)?;
            fs::rename(&unfinished, place).map_err(failed)
        };
        for output in outputs {
            give(&self.place(output), &|to| fs::copy(output, to).map(|_| ()))?;
        }
        give(&beside(&self.place(&outputs[0]), "log"), &|to| fs::write(to, said))
    }
}

fn beside(output: &Path, extension: &str) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    PathBuf::from(name)
}

/// No more than the machine has, nor than cargo's `--jobs`.
fn threads() -> usize {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok());
    jobs.unwrap_or(cores).clamp(1, cores)
}

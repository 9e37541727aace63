//! Compilations: run in parallel, and only where something changed.
//!
//! Beside each output lie `.key`, the fingerprint of what it was made from, and `.log`, what the
//! compiler said; so a skipped job says again what it said when it ran.

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
    /// Everything the output depends on.
    pub fingerprint: u64,
}

/// What the compilers said, in the order of the jobs; or all of what those said that failed.
pub fn run(jobs: Vec<Job>) -> Result<Vec<String>, String> {
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
    let Job { source, mut command, output, fingerprint } = job;
    let (key, log) = (beside(&output, "key"), beside(&output, "log"));
    let fingerprint = format!("{fingerprint:016x}\n");
    if output.exists()
        && fs::read_to_string(&key).is_ok_and(|old| old == fingerprint)
        && let Ok(said) = fs::read_to_string(&log)
    {
        return Ok(said);
    }
    // Without its key, an output that is only half written is made again.
    let _ = fs::remove_file(&key);
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).output();
    let done = done.map_err(|error| format!("{program} cannot be run: {error}"))?;
    let mut said = String::from_utf8_lossy(&done.stderr).into_owned();
    said.push_str(&String::from_utf8_lossy(&done.stdout));
    if !done.status.success() {
        return Err(format!("{source} does not compile ({}):\n{command:?}\n{said}", done.status));
    }
    let written = |path: &Path, text: &str| {
        fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
    };
    written(&log, &said)?;
    written(&key, &fingerprint)?;
    Ok(said)
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

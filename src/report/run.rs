//! A run's folder, read for the report: what it was told, what it recorded, what was measured in
//! it.
//!
//! Nothing is locked and nothing is written, so a run that still trains can be read; a last line
//! that it is just writing is left out. The configuration is kept as the table that it is: runs of
//! other versions of this program have other keys.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Table;

use crate::config::Config;
use crate::depth::{DepthReport, reports_of_run};
use crate::error::{Error, Result};
use crate::metrics::{Evaluation, Lines, SessionRecord, StepRecord, read_lines, training_seconds};
use crate::model::parameters::ParameterTable;
use crate::rundir::{CONFIG, METRICS, SESSIONS, THROUGHPUT};
use crate::throughput::Throughput;

#[derive(Clone, Debug)]
pub struct Run {
    /// The folder's name, with as much of the path as tells it from the others.
    pub name: String,
    pub folder: PathBuf,
    /// run.toml as it stands.
    pub toml: String,
    pub config: Table,
    /// At least one; `step` ascends.
    pub steps: Vec<StepRecord>,
    /// One for each step: seconds of training up to its end, evaluations left out.
    pub seconds: Vec<f64>,
    /// Whether the last line of the metrics was not whole.
    pub torn: bool,
    /// None for runs of versions that did not record them.
    pub sessions: Vec<SessionRecord>,
    /// Of the sessions that came to their end; none for runs of versions that did not record it.
    pub throughput: Vec<Throughput>,
    /// One for each checkpoint that was measured, in the order of training.
    pub depth: Vec<DepthReport>,
    /// `None` where this version cannot read the configuration.
    pub parameters: Option<u64>,
}

impl Run {
    /// Errors: no run.toml, or one that is not TOML; no metrics, none yet, or a line that is none.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG);
        let toml = fs::read_to_string(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::Usage {
                what: format!("{} holds no run: it has no {CONFIG}", folder.display()),
                remedy: "name folders that `isobath train` wrote, such as runs/demo".into(),
            },
            _ => Error::io("read", &path)(error),
        })?;
        let config: Table = toml.parse().map_err(|error: toml::de::Error| Error::Data {
            path: path.clone(),
            what: format!("not TOML: {}", error.message()),
            remedy: format!("restore it, or leave {} out", folder.display()),
        })?;
        let path = folder.join(METRICS);
        let Lines { records: steps, torn } = read_lines::<StepRecord>(&path)?;
        if steps.is_empty() {
            return Err(Error::Data {
                path,
                what: "there is no step in it".into(),
                remedy: format!("train the run first, or leave {} out", folder.display()),
            });
        }
        let [sessions, throughput] = [SESSIONS, THROUGHPUT].map(|name| folder.join(name));
        let parameters = Config::from_toml(&toml).ok().filter(|c| c.validate_shape().is_ok());
        Ok(Run {
            name: String::new(),
            folder: folder.to_path_buf(),
            parameters: parameters.map(|c| ParameterTable::new(&c.model).parameters() as u64),
            toml,
            config,
            seconds: training_seconds(&steps),
            steps,
            torn,
            sessions: lines_if_there(&sessions)?,
            throughput: lines_if_there(&throughput)?,
            depth: reports_of_run(folder)?,
        })
    }

    /// The value of a dotted key of the configuration, as TOML writes it, a string without quotes.
    pub fn setting(&self, key: &str) -> Option<String> {
        let (table, key) = match key.split_once('.') {
            Some((table, key)) => (self.config.get(table)?.as_table()?, key),
            None => (&self.config, key),
        };
        let value = table.get(key)?;
        Some(value.as_str().map_or_else(|| value.to_string(), str::to_string))
    }

    pub fn last(&self) -> &StepRecord {
        &self.steps[self.steps.len() - 1]
    }

    /// Steps that were followed by an evaluation.
    pub fn evaluations(&self) -> impl Iterator<Item = (&StepRecord, &Evaluation)> {
        self.steps.iter().filter_map(|step| Some((step, step.evaluation.as_ref()?)))
    }
}

/// Nothing of a file that is not there.
fn lines_if_there<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if path.exists() { Ok(read_lines(path)?.records) } else { Ok(Vec::new()) }
}

/// Reads all runs. A folder that is no run but holds some stands for those.
///
/// Errors: those of [`Run::read`]; a folder named twice.
pub fn read_runs(folders: &[PathBuf]) -> Result<Vec<Run>> {
    let mut all: Vec<PathBuf> = Vec::new();
    for folder in folders {
        let inner = if folder.join(CONFIG).exists() { Vec::new() } else { inner_runs(folder)? };
        match inner.is_empty() {
            true => all.push(folder.clone()),
            false => all.extend(inner),
        }
    }
    let mut runs = all.iter().map(|folder| Run::read(folder)).collect::<Result<Vec<_>>>()?;
    for (n, folder) in all.iter().enumerate() {
        let real = |folder: &PathBuf| folder.canonicalize().unwrap_or_else(|_| folder.clone());
        if all[..n].iter().any(|other| real(other) == real(folder)) {
            return Err(Error::Usage {
                what: format!("{} is named twice", folder.display()),
                remedy: "name every run once".into(),
            });
        }
        runs[n].name = distinct_name(folder, &all);
    }
    Ok(runs)
}

/// Folders in `folder` that hold a run, by name.
fn inner_runs(folder: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if path.join(CONFIG).exists() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The last parts of the path, as many as no other path ends with.
fn distinct_name(folder: &Path, all: &[PathBuf]) -> String {
    let real = |folder: &Path| folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    let folder = real(folder);
    let others: Vec<PathBuf> = all.iter().map(|f| real(f)).filter(|f| *f != folder).collect();
    let parts: Vec<_> = folder.components().collect();
    let tails = (1..=parts.len()).map(|n| parts[parts.len() - n..].iter().collect::<PathBuf>());
    let unique = tails.into_iter().find(|tail| !others.iter().any(|other| other.ends_with(tail)));
    unique.unwrap_or(folder.clone()).display().to_string()
}

//! Where a report is kept: RUN/depth/step-00000200.json, or wherever the user says.

use std::fs;
use std::path::{Path, PathBuf};

use super::DepthReport;
use crate::durable::replace;
use crate::error::{Error, Result};
use crate::rundir;

/// In a run's folder.
const FOLDER: &str = "depth";
/// The figure of all checkpoints.
const OVER_TRAINING: &str = "variance-over-training.svg";
/// Stem of the files of a model that is no run's.
const FOREIGN: &str = "depth";

/// A folder, and the stem that the names of a report's files begin with.
#[derive(Clone, PartialEq, Debug)]
pub struct ReportFiles {
    pub folder: PathBuf,
    pub stem: String,
}

impl ReportFiles {
    /// In `out`, or in the run that the model belongs to; `None`: neither.
    pub fn of(report: &DepthReport, out: Option<&Path>) -> Option<Self> {
        let run = rundir::run_and_step(&report.model);
        let folder = match (out, &run) {
            (Some(out), _) => out.to_path_buf(),
            (None, Some((run, _))) => run.join(FOLDER),
            (None, None) => return None,
        };
        let stem = run.map_or(FOREIGN.to_string(), |(_, step)| rundir::folder_name(step));
        Some(ReportFiles { folder, stem })
    }

    pub fn json(&self) -> PathBuf {
        self.folder.join(format!("{}.json", self.stem))
    }

    pub fn figure(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}-{name}.svg", self.stem))
    }

    /// Writes the figure of all checkpoints.
    pub fn write_over_training(&self, svg: &str) -> Result<PathBuf> {
        let path = self.folder.join(OVER_TRAINING);
        replace(&path, svg.as_bytes()).map(|()| path)
    }

    /// Writes the JSON and the figures (name and SVG), each as a whole or not at all. What an
    /// earlier report of the same tokens has measured besides stays in the JSON. Returns the paths.
    ///
    /// Errors: an earlier report of other tokens that would lose a measurement.
    pub fn write(
        &self,
        report: &DepthReport,
        figures: &[(&'static str, String)],
    ) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        let report = &match self.json().exists() {
            true => self.with_earlier(report, read(&self.json())?)?,
            false => report.clone(),
        };
        let json = serde_json::to_vec_pretty(report).map_err(std::io::Error::from);
        let mut files = vec![(self.json(), json.map_err(Error::io("write", self.json()))?)];
        files.extend(figures.iter().map(|(name, svg)| (self.figure(name), svg.clone().into())));
        for (path, contents) in &files {
            replace(path, contents)?;
        }
        Ok(files.into_iter().map(|(path, _)| path).collect())
    }

    /// `new` with what only `earlier` has measured.
    fn with_earlier(&self, new: &DepthReport, earlier: DepthReport) -> Result<DepthReport> {
        let mut all = new.clone();
        all.variance = new.variance.clone().or(earlier.variance);
        all.angular = new.angular.clone().or(earlier.angular);
        all.skipped = new.skipped.clone().or(earlier.skipped);
        all.gradient_norm = new.gradient_norm.clone().or(earlier.gradient_norm);
        all.jacobian = new.jacobian.clone().or(earlier.jacobian);
        all.linear = new.linear.clone().or(earlier.linear);
        all.task = new.task.clone().or(earlier.task);
        let of = |report: &DepthReport| (report.data.clone(), report.tokens, report.sequence);
        let earlier = (earlier.data, earlier.tokens, earlier.sequence);
        if all == *new || of(new) == earlier {
            return Ok(all);
        }
        Err(Error::Usage {
            what: format!(
                "{} has measurements of other tokens ({} of {} in windows of {}), which this report \
                 lacks",
                self.json().display(),
                earlier.1,
                earlier.0.join(", "),
                earlier.2
            ),
            remedy: "measure the same tokens, write elsewhere with --out, or remove the file"
                .to_string(),
        })
    }
}

fn read(path: &Path) -> Result<DepthReport> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|e| Error::Data {
        path: path.to_path_buf(),
        what: format!("is no report of isobath depth: {e}"),
        remedy: "measure again, or remove the file".to_string(),
    })
}

/// The reports that a run has, by step.
pub fn reports_of_run(run: &Path) -> Result<Vec<DepthReport>> {
    let folder = run.join(FOLDER);
    let mut reports = Vec::new();
    for step in rundir::steps_in(&folder, ".json")? {
        let path = folder.join(format!("{}.json", rundir::folder_name(step)));
        reports.push(read(&path)?);
    }
    Ok(reports)
}

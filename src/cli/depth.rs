//! `isobath depth`: what each layer of a model contributes.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::ProgressBar;
use isobath::Error;
use isobath::depth::{
    DepthReport, Measure, ReportFiles, Request, TaskRequest, figures, measure,
    variance_over_training,
};
use isobath::rundir::{checkpoint_folder, checkpoint_steps};
use serde::Serialize;

use super::model::ModelArgs;
use super::{one_of, output};

#[derive(Args, Debug)]
pub struct DepthArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text or shards to read: a file, a folder of shards, or bundled:austen; may be repeated
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// JSON field of .jsonl files that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Tokens to read at most, from the beginning; 0: all
    #[arg(long, default_value = "65536")]
    tokens: u64,
    /// Tokens in a window [default: the model's longest, at most 2048]
    #[arg(long, value_name = "TOKENS")]
    sequence: Option<NonZeroUsize>,
    /// Windows at once
    #[arg(long, value_name = "ROWS", default_value = "8")]
    batch: NonZeroUsize,
    /// What to measure [default: everything]
    #[arg(long, value_delimiter = ',', value_parser = one_of::<Measure>(Measure::NAMES))]
    measure: Vec<Measure>,
    /// Tokens whose Jacobians are taken, one vector-Jacobian product for every feature
    #[arg(long, value_name = "TOKENS", default_value = "4")]
    jacobian_tokens: NonZeroUsize,
    /// These are among the first TOKENS of their windows; the cost grows with this
    #[arg(long, value_name = "TOKENS", default_value = "32")]
    jacobian_context: NonZeroUsize,
    /// Multiple-choice questions to ask without each layer, as in `isobath eval --task`
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// Questions of the task shown with their answers before each one
    #[arg(long, value_name = "K", default_value = "0", requires = "task")]
    shots: usize,
    /// Where to write JSON and figures [default: RUN/depth for a run's model, else nowhere]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Measure each checkpoint that a run has kept
    #[arg(long)]
    every_checkpoint: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl DepthArgs {
    /// Cannot fail: clap's types have refused what is wrong.
    fn request(&self, model: &Path) -> Request {
        let all = || Measure::NAMES.iter().filter_map(|name| name.parse().ok()).collect();
        Request {
            model: model.to_path_buf(),
            data: self.data.clone(),
            field: self.field.clone(),
            tokens: self.tokens,
            sequence: self.sequence.map(usize::from),
            batch: self.batch.into(),
            measures: if self.measure.is_empty() { all() } else { self.measure.clone() },
            jacobian_tokens: self.jacobian_tokens.into(),
            jacobian_context: self.jacobian_context.into(),
            task: self.task.clone().map(|path| TaskRequest { path, shots: self.shots }),
            device: self.model.device,
            dtype: self.model.dtype,
        }
    }

    /// The model, or the run's checkpoints.
    fn models(&self) -> Result<Vec<PathBuf>, Error> {
        let model = &self.model.model;
        if !self.every_checkpoint {
            return Ok(vec![model.clone()]);
        }
        let steps = checkpoint_steps(model)?;
        if steps.is_empty() {
            return Err(Error::Usage {
                what: format!("--every-checkpoint: {} has no checkpoints", model.display()),
                remedy: "name the folder of a run".to_string(),
            });
        }
        Ok(steps.into_iter().map(|step| checkpoint_folder(model, step)).collect())
    }
}

/// What `--every-checkpoint --json` prints.
#[derive(Serialize)]
struct Checkpoints {
    checkpoints: Vec<DepthReport>,
}

pub fn run(args: DepthArgs) -> anyhow::Result<()> {
    let mut reports = Vec::new();
    let mut written = None;
    for model in args.models()? {
        let report = measured(&args.request(&model))?;
        if let Some(files) = ReportFiles::of(&report, args.out.as_deref()) {
            let paths = files.write(&report, &figures(&report))?;
            eprintln!("wrote {} and {} figures", paths[0].display(), paths.len() - 1);
            written = Some(files);
        }
        if !args.json {
            output::print(&table(&report))?;
        }
        reports.push(report);
    }
    if let (Some(files), Some(svg)) = (written, variance_over_training(&reports)) {
        eprintln!("wrote {}", files.write_over_training(&svg)?.display());
    }
    match (args.json, args.every_checkpoint) {
        (false, _) => Ok(()),
        (true, false) => output::print_json(&reports[0]),
        (true, true) => output::print_json(&Checkpoints { checkpoints: reports }),
    }
}

fn measured(request: &Request) -> Result<DepthReport, Error> {
    let bar = ProgressBar::new(0); // hidden where stderr is no terminal
    let report = measure(request, |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(report)
}

/// One line for a layer, one column for a measurement.
fn table(report: &DepthReport) -> String {
    let mut columns: Vec<(&str, Vec<String>)> = Vec::new();
    let layers = 1..=report.layers;
    columns.push(("layer", layers.map(|layer| layer.to_string()).collect()));
    let fixed = |values: &mut dyn Iterator<Item = f64>| values.map(|v| format!("{v:.4}")).collect();
    let signed =
        |values: &mut dyn Iterator<Item = f64>| values.map(|v| format!("{v:+.4}")).collect();
    if let Some(variance) = &report.variance {
        columns.push(("variance", fixed(&mut variance[1..].iter().copied())));
    }
    if let Some(angular) = &report.angular {
        columns.push(("angle", fixed(&mut angular.distance[0].iter().copied())));
    }
    if let Some(skipped) = &report.skipped {
        columns.push(("skipped", signed(&mut skipped.iter().map(|s| s.loss_increase))));
    }
    if let Some(norms) = &report.gradient_norm {
        columns.push(("gradient", norms.iter().map(|norm| format!("{norm:.3e}")).collect()));
    }
    if let Some(jacobian) = report.jacobian.as_ref().map(|jacobian| &jacobian.blocks) {
        columns.push(("J diagonal", fixed(&mut jacobian.iter().map(|j| j.diagonal_mean))));
        columns.push(("J off", fixed(&mut jacobian.iter().map(|j| j.off_diagonal_norm))));
        columns.push(("|J-I|/|I|", fixed(&mut jacobian.iter().map(|j| j.relative_distance))));
    }
    if let Some(linear) = report.linear.as_ref().map(|linear| &linear.blocks) {
        columns.push(("linear", signed(&mut linear.iter().map(|l| l.loss_increase))));
        columns.push(("explained", fixed(&mut linear.iter().map(|l| l.explained))));
    }
    if let Some(task) = &report.task {
        let points = task.change.iter().map(|change| format!("{change:+.2}"));
        columns.push(("accuracy", points.collect()));
    }
    let placement = report.placement.as_deref().map_or(String::new(), |p| format!(", {p}"));
    let mut text = format!(
        "{}: {} layers of {} features{placement}\nloss {:.6}, perplexity {:.4} over {} tokens in \
         windows of {}\n",
        report.model.display(),
        report.layers,
        report.hidden,
        report.loss,
        report.perplexity,
        report.tokens,
        report.sequence
    );
    if let Some(variance) = &report.variance {
        text.push_str(&format!("variance of the embedding {:.4}\n", variance[0]));
    }
    if let Some(task) = &report.task {
        let error = task.standard_error.map_or(String::new(), |e| format!(" \u{b1} {e:.4}"));
        text.push_str(&format!(
            "accuracy {:.4}{error} on {} questions; below, its change in points without a layer\n",
            task.accuracy, task.questions
        ));
    }
    text.push('\n');
    let width = |(name, cells): &(&str, Vec<String>)| {
        cells.iter().map(String::len).chain([name.len()]).max().unwrap_or(0)
    };
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.zip(&columns).map(|(cell, column)| format!("{cell:>0$}", width(column)));
        cells.collect::<Vec<_>>().join("  ") + "\n"
    };
    text.push_str(&line(&mut columns.iter().map(|(name, _)| *name)));
    for layer in 0..report.layers {
        text.push_str(&line(&mut columns.iter().map(|(_, cells)| cells[layer].as_str())));
    }
    text
}

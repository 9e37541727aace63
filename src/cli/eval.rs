//! `isobath eval`: the loss of a model on a text, or its accuracy on a multiple-choice task.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;
use isobath::evaluate::{self, evaluate};
use isobath::tasks::{self, Estimate, Style};

use super::model::ModelArgs;
use super::{one_of, output};

#[derive(Args, Debug)]
#[group(id = "what", required = true, multiple = true, args = ["data", "task"])]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text or shards to predict: a file, a folder of shards, or bundled:austen; may be repeated
    #[arg(long, value_name = "FILE")]
    data: Vec<String>,
    /// JSON field of .jsonl files that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Multiple-choice questions: .jsonl, .csv in MMLU's layout, or a folder of either
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    task: Option<PathBuf>,
    /// Questions shown with their answers before each one: from dev/ beside MMLU's test/, else the
    /// first ones, which are then not scored
    #[arg(long, value_name = "K", default_value = "0", conflicts_with = "data")]
    shots: usize,
    /// Take these questions from another file or folder
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    shots_from: Option<PathBuf>,
    /// Score the texts of the choices, or letters after a list of them [default: letters for .csv]
    #[arg(long, value_parser = one_of::<Style>(Style::NAMES), conflicts_with = "data")]
    style: Option<Style>,
    /// Write how each question was answered, one JSON object a line
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    samples: Option<PathBuf>,
    /// Tokens in a window [default: the model's longest; with --data at most 2048]
    #[arg(long, value_name = "TOKENS")]
    sequence: Option<NonZeroUsize>,
    /// Windows at once
    #[arg(long, value_name = "ROWS", default_value = "8")]
    batch: NonZeroUsize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    let bar = ProgressBar::new(0); // hidden where stderr is no terminal
    let progress = |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    };
    let (sequence, batch) = (args.sequence.map(usize::from), args.batch.into());
    let ModelArgs { model, device, dtype } = args.model;
    let Some(task) = args.task else {
        let (data, field) = (args.data, args.field);
        let request = evaluate::Request { model, data, field, sequence, batch, device, dtype };
        let report = evaluate(&request, progress)?;
        bar.finish_and_clear();
        return if args.json { output::print_json(&report) } else { print_loss(&report) };
    };
    let request = tasks::Request {
        model,
        task,
        style: args.style,
        shots: args.shots,
        shots_from: args.shots_from,
        window: sequence,
        batch,
        device,
        dtype,
    };
    let report = tasks::evaluate(&request, progress)?;
    bar.finish_and_clear();
    if let Some(path) = &args.samples {
        let lines = report.score.samples.iter().map(serde_json::to_string);
        let lines = lines.collect::<Result<Vec<_>, _>>()?;
        output::save(path, (lines.join("\n") + "\n").as_bytes())?;
    }
    if args.json { output::print_json(&report) } else { print_score(&report) }
}

fn print_loss(report: &evaluate::Report) -> anyhow::Result<()> {
    output::print(&format!(
        "loss           {:.6}\nperplexity     {:.4}\nbits per byte  {:.4}\n\
         tokens         {} predicted, {} bytes of text, windows of {}\n",
        report.loss,
        report.perplexity,
        report.bits_per_byte,
        report.tokens,
        report.text_bytes,
        report.sequence
    ))
}

fn print_score(report: &tasks::Report) -> anyhow::Result<()> {
    let tasks::Report { score, shots, style, truncated, window, .. } = report;
    let mut text = format!(
        "acc            {}, by log-likelihood\n\
         acc_norm       {}, by log-likelihood / characters\n\
         acc_bytes      {}, by log-likelihood / bytes\n\
         chance         {:.4}\n\
         questions      {}, {shots} examples before each, {style} of the choices scored\n",
        with_error(score.acc),
        with_error(score.acc_norm),
        with_error(score.acc_bytes),
        score.chance,
        score.questions,
    );
    if *truncated > 0 {
        text += &format!("cut            {truncated} questions on their left to {window} tokens\n");
    }
    if score.subjects.len() > 1 {
        let longest = score.subjects.iter().map(|subject| subject.name.chars().count()).max();
        let width = longest.unwrap_or(0).max("subject".len());
        text += &format!("\n{:width$}  questions  acc              acc_norm\n", "subject");
        for subject in &score.subjects {
            let (acc, acc_norm) = (with_error(subject.acc), with_error(subject.acc_norm));
            let (name, questions) = (&subject.name, subject.questions);
            text += &format!("{name:width$}  {questions:9}  {acc:15}  {acc_norm}\n");
        }
    }
    output::print(&text)
}

fn with_error(Estimate { mean, standard_error }: Estimate) -> String {
    match standard_error {
        Some(error) => format!("{mean:.4} \u{b1} {error:.4}"),
        None => format!("{mean:.4}"),
    }
}

//! `isobath train`: a training run, new or resumed.

use std::path::PathBuf;

use clap::Args;
use isobath::Result;
use isobath::rundir::{self, RunDir};
use isobath::train::{Console, Interrupt, Outcome, Run, default_folder, train};

use super::config::ConfigArgs;

#[derive(Args, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Folder of this run [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Continue the run from its newest checkpoint, with the configuration that it saved
    #[arg(long)]
    resume: bool,
    /// Start from the weights of a Hugging Face LLaMA folder; short for --set train.init_from=...
    #[arg(long, value_name = "FOLDER", conflicts_with = "resume")]
    init: Option<PathBuf>,
}

impl TrainArgs {
    /// Errors: those of [`Config::resolve`].
    fn resolve(mut self) -> Result<Run> {
        if self.resume && self.config.values.file.is_none() {
            // A run is resumed with the configuration that it saved; --set may still change it.
            let folder = match &self.out {
                Some(out) => out.clone(),
                None => default_folder(&self.config.clone().resolve()?.name),
            };
            RunDir::check_exists(&folder)?;
            self.config.values.preset = None;
            self.config.values.file = Some(folder.join(rundir::CONFIG));
            self.out = Some(folder);
        }
        let mut config = self.config.resolve()?;
        if self.init.is_some() {
            config.train.init_from = self.init;
        }
        let folder = self.out.unwrap_or_else(|| default_folder(&config.name));
        Ok(Run { config, folder, resume: self.resume })
    }
}

pub fn run(args: TrainArgs) -> anyhow::Result<()> {
    let run = args.resolve()?;
    let outcome = train(run, Interrupt::listen()?, &mut Console::new())?;
    describe(&outcome);
    Ok(())
}

/// Tells a person how it went and where everything is.
fn describe(outcome: &Outcome) {
    let folder = outcome.folder.display();
    let Outcome { step, steps, seconds, .. } = outcome;
    if outcome.interrupted {
        eprintln!("stopped after step {step} of {steps}; continue with --resume --out {folder}");
    } else {
        eprintln!("trained {steps} steps in {seconds:.0} s");
    }
    if let Some(throughput) = &outcome.throughput {
        eprintln!("{throughput}");
    }
    if let Some(sample) = &outcome.sample {
        eprintln!("\na sample (what follows the bar is the model's):\n");
        eprintln!("{}|{}\n", sample.prompt, sample.text);
    }
    if let Some(evaluation) = &outcome.evaluation {
        eprintln!(
            "held-out text: {:.4} bits per byte, loss {:.4}, perplexity {:.2}",
            evaluation.val_bits_per_byte, evaluation.val_loss, evaluation.val_perplexity
        );
    }
    let checkpoint = outcome.checkpoint.display();
    eprintln!("checkpoint  {checkpoint} (a Hugging Face LLaMA folder)");
    eprintln!("metrics     {folder}/{}", rundir::METRICS);
    if outcome.throughput.is_some() {
        eprintln!("throughput  {folder}/{}", rundir::THROUGHPUT);
    }
    eprintln!("samples     {folder}/{}", rundir::SAMPLES);
    eprintln!("settings    {folder}/{}", rundir::CONFIG);
    let program = std::env::args().next().unwrap_or_else(|| "isobath".to_string());
    let start = if outcome.answers { "--ask \"Who are you?\"" } else { "--prompt \"It was\"" };
    eprintln!("try         {program} generate {folder} {start}");
}

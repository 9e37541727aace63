//! `isobath train`: the arguments of a training run.

use std::path::{Path, PathBuf};

use clap::Args;
use isobath::Result;
use isobath::config::Config;

use super::config::ConfigArgs;

/// Where runs lie when `--out` is not given.
const RUNS: &str = "runs";

#[derive(Args, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Folder of this run [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Continue the run from its newest checkpoint; without RUN.toml and --preset, with the
    /// configuration that the run saved
    #[arg(long)]
    resume: bool,
    /// Start from the weights of a Hugging Face LLaMA folder; short for --set train.init_from=...
    #[arg(long, value_name = "FOLDER", conflicts_with = "resume")]
    init: Option<PathBuf>,
}

/// What `train` was asked for, checked as far as that goes without data and device.
#[derive(Clone, PartialEq, Debug)]
pub struct TrainRequest {
    pub config: Config,
    /// The folder of this run.
    pub out: PathBuf,
    pub resume: bool,
}

impl TrainArgs {
    /// Errors: those of [`Config::resolve`] and [`Config::validate`].
    pub fn validate(mut self) -> Result<TrainRequest> {
        if let (true, Some(out), None, None) =
            (self.resume, &self.out, &self.config.preset, &self.config.file)
        {
            self.config.file = Some(out.join("run.toml"));
        }
        let mut config = self.config.resolve()?;
        if self.init.is_some() {
            config.train.init_from = self.init;
        }
        config.validate()?;
        let out = self.out.unwrap_or_else(|| Path::new(RUNS).join(&config.name));
        Ok(TrainRequest { config, out, resume: self.resume })
    }
}

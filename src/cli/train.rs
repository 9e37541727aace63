//! `isobath train`: the arguments of a training run.

use std::path::PathBuf;

use clap::Args;
use isobath::Result;
use isobath::rundir;
use isobath::train::{Run, default_folder};

use super::config::ConfigArgs;

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

impl TrainArgs {
    /// What to train, checked as far as that goes without data and device.
    ///
    /// Errors: those of [`ConfigArgs::resolve`] and of the configuration's rules.
    pub fn validate(mut self) -> Result<Run> {
        let mut config = self.config.resolve()?;
        let folder = self.out.unwrap_or_else(|| default_folder(&config.name));
        if self.resume && self.config.file.is_none() && self.config.preset.is_none() {
            self.config.file = Some(folder.join(rundir::CONFIG));
            config = self.config.resolve()?;
        }
        if self.init.is_some() {
            config.train.init_from = self.init;
        }
        config.validate()?;
        Ok(Run { config, folder, resume: self.resume })
    }
}

//! The arguments that make a configuration, shared by the commands that train or plan.

use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use isobath::config::{Config, DeviceKind};
use isobath::rundir::is_of_run;

/// All but the device.
#[derive(Args, Clone, Debug)]
pub struct ValueArgs {
    /// Configuration file
    #[arg(value_name = "RUN.toml")]
    pub file: Option<PathBuf>,
    /// Base values, which the file overrides: demo, or a model of the paper (see `isobath info`)
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// A value that overrides the file, for instance model.layers=12; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct ConfigArgs {
    #[command(flatten)]
    pub values: ValueArgs,
    /// Where to compute; short for --set device=...
    #[arg(long, value_parser = PossibleValuesParser::new(DeviceKind::NAMES))]
    pub device: Option<String>,
}

impl ValueArgs {
    /// The configuration, with the right types but not validated; `device` is above all values.
    pub fn resolve(&self, device: Option<&str>) -> isobath::Result<Config> {
        let mut sets = self.sets.clone();
        sets.extend(device.map(|device| format!("device={device}")));
        Config::resolve(self.preset.as_deref(), self.file.as_deref(), &sets)
    }

    /// Whether they are those that a run has written down, with what it found in the folder that it
    /// started from.
    pub fn are_of_run(&self) -> bool {
        let from_elsewhere = self.sets.iter().any(|set| set.starts_with("train.init_from"));
        self.file.as_deref().is_some_and(is_of_run) && !from_elsewhere
    }
}

impl ConfigArgs {
    /// The configuration, with the right types but not validated.
    pub fn resolve(&self) -> isobath::Result<Config> {
        self.values.resolve(self.device.as_deref())
    }
}

//! The arguments that `eval` and `generate` share: which model, and where it computes.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use isobath::config::DeviceKind;

#[derive(Args, Debug)]
pub struct ModelArgs {
    /// Hugging Face LLaMA folder: a checkpoint of a run, or any other
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Where to compute
    #[arg(long, default_value = "auto", value_parser = device_parser())]
    pub device: DeviceKind,
}

fn device_parser() -> impl TypedValueParser<Value = DeviceKind> {
    PossibleValuesParser::new(DeviceKind::NAMES).try_map(|name| name.parse::<DeviceKind>())
}

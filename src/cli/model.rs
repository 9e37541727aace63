//! The arguments that `eval` and `generate` share: which model, and where it computes.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use isobath::config::{DeviceKind, Dtype};

#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A run, a checkpoint, or any Hugging Face LLaMA folder
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Where to compute
    #[arg(long, default_value = "auto", value_parser = device_parser())]
    pub device: DeviceKind,
    /// Matmul operands and activations [default: f32 on the CPU, else bf16]
    #[arg(long, value_parser = dtype_parser())]
    pub dtype: Option<Dtype>,
}

fn device_parser() -> impl TypedValueParser<Value = DeviceKind> {
    PossibleValuesParser::new(DeviceKind::NAMES).try_map(|name| name.parse::<DeviceKind>())
}

fn dtype_parser() -> impl TypedValueParser<Value = Dtype> {
    PossibleValuesParser::new(Dtype::NAMES).try_map(|name| name.parse::<Dtype>())
}

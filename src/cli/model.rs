//! The arguments that `eval` and `generate` share: which model, and where it computes.

use std::path::PathBuf;

use clap::Args;
use isobath::config::{DeviceKind, Dtype};

use super::one_of;

#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A run, a checkpoint, or any Hugging Face LLaMA folder
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Where to compute
    #[arg(long, default_value = "auto", value_parser = one_of::<DeviceKind>(DeviceKind::NAMES))]
    pub device: DeviceKind,
    /// Matmul operands and activations [default: f32 on the CPU, else bf16]
    #[arg(long, value_parser = one_of::<Dtype>(Dtype::NAMES))]
    pub dtype: Option<Dtype>,
}

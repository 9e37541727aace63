//! `isobath generate`: the arguments of text generation.

use std::path::PathBuf;

use clap::Args;
use isobath::config::DeviceKind;
use isobath::generate::Sampling;
use isobath::{Error, Result};

use super::model::ModelArgs;

#[derive(Args, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens to add
    #[arg(long, value_name = "N", default_value = "200")]
    tokens: usize,
    /// 0 takes the likeliest token; below 1 prefers likely ones more than the model does
    #[arg(long, value_name = "T", default_value = "0.8")]
    temperature: f64,
    /// Choose among the K likeliest tokens; 0: among all
    #[arg(long, value_name = "K", default_value = "0")]
    top_k: usize,
    /// Choose among the likeliest tokens that share this probability; 1: among all
    #[arg(long, value_name = "P", default_value = "1.0")]
    top_p: f64,
    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
}

/// What `generate` was asked for, checked.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateRequest {
    pub model: PathBuf,
    pub device: DeviceKind,
    pub prompt: String,
    /// At least 1.
    pub tokens: usize,
    pub sampling: Sampling,
}

impl GenerateArgs {
    /// Errors: a temperature or probability that is none; no tokens.
    pub fn validate(self) -> Result<GenerateRequest> {
        let GenerateArgs { temperature, top_k, top_p, seed, tokens, .. } = self;
        let sampling = Sampling { temperature, top_k, top_p, seed };
        sampling.validate()?;
        if tokens == 0 {
            return Err(Error::Usage {
                what: "--tokens is 0: nothing to generate".into(),
                remedy: "ask for 1 or more".into(),
            });
        }
        let (model, device) = (self.model.model, self.model.device);
        Ok(GenerateRequest { model, device, prompt: self.prompt, tokens, sampling })
    }
}

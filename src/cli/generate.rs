//! `isobath generate`: the arguments of text generation.

use std::path::PathBuf;

use clap::Args;
use isobath::config::DeviceKind;
use isobath::{Error, Result};

use super::model::ModelArgs;

#[derive(Args, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
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

/// What `generate` was asked for: temperature is finite and at least 0, `top_p` in (0, 1].
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateRequest {
    pub model: PathBuf,
    pub device: DeviceKind,
    pub prompt: String,
    pub tokens: usize,
    pub temperature: f64,
    pub top_k: usize,
    pub top_p: f64,
    pub seed: u64,
}

impl GenerateArgs {
    /// Errors: a temperature or probability that is none, no tokens.
    pub fn validate(self) -> Result<GenerateRequest> {
        let (temperature, top_p) = (self.temperature, self.top_p);
        let wrong = |what: String, remedy: &str| Error::Usage { what, remedy: remedy.into() };
        if self.tokens == 0 {
            return Err(wrong("--tokens 0: nothing to generate".into(), "ask for 1 or more"));
        }
        if !(temperature.is_finite() && temperature >= 0.0) {
            let what = format!("--temperature {temperature}: has to be at least 0 and finite");
            return Err(wrong(what, "use 0 for the likeliest tokens, 1 for the model's own choice"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            let what = format!("--top-p {top_p}: has to be above 0 and up to 1");
            return Err(wrong(what, "use 1 to choose among all tokens"));
        }
        Ok(GenerateRequest {
            model: self.model.model,
            device: self.model.device,
            prompt: self.prompt,
            tokens: self.tokens,
            temperature,
            top_k: self.top_k,
            top_p,
            seed: self.seed,
        })
    }
}

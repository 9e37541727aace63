//! `isobath generate`: text from a model, shown as it comes.

use clap::Args;
use isobath::data::supervised::ask;
use isobath::generate::{Generated, Request, Sampling, generate_text};
use isobath::{Error, Result};

use super::model::ModelArgs;
use super::output;

#[derive(Args, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Tokens to add at most
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

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// Text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Question to answer, in the turn format that `data.format = "supervised"` trains on
    #[arg(long, value_name = "QUESTION", allow_hyphen_values = true)]
    ask: Option<String>,
}

impl GenerateArgs {
    /// Errors: a temperature or probability that is none, no tokens.
    fn request(self) -> Result<Request> {
        if self.tokens == 0 {
            let what = "--tokens 0: nothing to generate".to_string();
            return Err(Error::Usage { what, remedy: "ask for 1 or more".to_string() });
        }
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
        };
        sampling.validate()?;
        Ok(Request {
            model: self.model.model,
            prompt: match self.prompt.ask {
                Some(question) => ask(&question),
                None => self.prompt.prompt.unwrap_or_default(),
            },
            tokens: self.tokens,
            sampling,
            device: self.model.device,
            dtype: self.model.dtype,
        })
    }
}

pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let request = args.request()?;
    let mut failure = None;
    let outcome = generate_text(&request, |text| match output::print(text) {
        Ok(()) => true,
        Err(error) => {
            failure = Some(error);
            false
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let outcome = outcome?;
    output::print("\n")?;
    let Generated { tokens, stopped, tokens_per_second } = outcome;
    eprintln!("{tokens} tokens, {tokens_per_second:.0} tokens/s; {stopped}");
    Ok(())
}

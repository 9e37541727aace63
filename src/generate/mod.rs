//! Text from a model: a prompt in, tokens out, one by one.

mod sampling;

use std::path::PathBuf;
use std::time::Instant;

pub use sampling::Sampling;

use crate::backend::Backend;
use crate::config::{DeviceKind, Dtype};
use crate::data::tokenizer::Tokenizer;
use crate::device::{Device, on_device};
use crate::engine::{Decoder, DecoderPlan, Parameters};
use crate::error::{Error, Result};
use crate::loaded::LoadedModel;

/// Continues `prompt` by at most `count` tokens and gives each to `show` as it comes; stops at the
/// end of the text or of the context, or when `show` returns false. Only tokens that `tokenizer`
/// has are chosen: a model may have room for more. Returns the new tokens.
pub fn generate(
    decoder: &mut Decoder,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    tokenizer: &Tokenizer,
    backend: &mut impl Backend,
    mut show: impl FnMut(u32) -> Result<bool>,
) -> Result<Vec<u32>> {
    decoder.clear();
    let mut tokens = Vec::new();
    let mut next = prompt.to_vec();
    while tokens.len() < count && decoder.room() >= next.len() {
        let logits = decoder.push(&next, backend)?;
        let known = &logits[..tokenizer.vocab().min(logits.len())];
        let token = sampling.choose(known, tokens.len() as u64);
        if Some(token) == tokenizer.end_of_text() {
            break;
        }
        tokens.push(token);
        if !show(token)? {
            break;
        }
        next = vec![token];
    }
    Ok(tokens)
}

/// What to continue, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// A run, a checkpoint, or any Hugging Face LLaMA folder.
    pub model: PathBuf,
    pub prompt: String,
    /// Most tokens to add.
    pub tokens: usize,
    pub sampling: Sampling,
    pub device: DeviceKind,
    /// f32 on the CPU and bf16 elsewhere by default.
    pub dtype: Option<Dtype>,
}

/// How a text ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    pub tokens: usize,
    /// For people.
    pub stopped: &'static str,
    pub tokens_per_second: f64,
}

/// Reads a model and continues the prompt; `show` gets the prompt, then each piece of text once it
/// is certain, and may end it by returning false.
pub fn generate_text(request: &Request, show: impl FnMut(&str) -> bool) -> Result<Generated> {
    let model = LoadedModel::open(&request.model)?;
    let device = Device::choose(request.device)?;
    let dtype = device.computes_in(request.dtype)?;
    on_device!(device, dtype, |backend| generate_on(backend, request, &model, show))
}

fn generate_on<B: Backend>(
    mut backend: B,
    request: &Request,
    model: &LoadedModel,
    mut show: impl FnMut(&str) -> bool,
) -> Result<Generated> {
    let LoadedModel { config, table, parameters, tokenizer, .. } = model;
    let mut prompt = tokenizer.encode(&request.prompt)?;
    if prompt.is_empty() {
        // An empty prompt is the beginning of a document.
        prompt.push(tokenizer.end_of_text().unwrap_or(0));
    }
    if prompt.len() >= config.max_sequence {
        return Err(Error::Usage {
            what: format!(
                "the prompt has {} tokens, the model reads at most {}",
                prompt.len(),
                config.max_sequence
            ),
            remedy: "use a shorter prompt".to_string(),
        });
    }
    let context = config.max_sequence.min(prompt.len().saturating_add(request.tokens));
    let parameters = Parameters::upload(table, parameters, &mut backend)?;
    let plan = DecoderPlan::new(config, table, context, |kind| backend.element_bytes(kind))?;
    let mut decoder = plan.allocate(&parameters, &mut backend)?;
    let mut stream = tokenizer.stream();
    let mut stopped_by_reader = !show(&request.prompt);
    let count = if stopped_by_reader { 0 } else { request.tokens };
    let started = Instant::now();
    let tokens = generate(
        &mut decoder,
        &prompt,
        count,
        &request.sampling,
        tokenizer,
        &mut backend,
        |token| {
            let text = stream.push(token)?;
            stopped_by_reader = !text.is_empty() && !show(&text);
            Ok(!stopped_by_reader)
        },
    )?;
    show(&stream.finish()?);
    let stopped = if tokens.len() == request.tokens {
        "token limit reached"
    } else if stopped_by_reader {
        "output closed"
    } else if decoder.room() == 0 {
        "the end of the model's longest sequence"
    } else {
        "the model ended the text"
    };
    let tokens_per_second = tokens.len() as f64 / started.elapsed().as_secs_f64();
    Ok(Generated { tokens: tokens.len(), stopped, tokens_per_second })
}

//! What a run trains and evaluates on: text or supervised examples.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::{Config, Format, Rows};
use crate::data::batch::Batch;
use crate::data::corpus::Corpus;
use crate::data::examples::{self, ExampleRows, Examples};
use crate::data::loader::{Loader, LoaderOptions, LoaderState, RowSource};
use crate::data::source::TokenSource;
use crate::data::supervised;
use crate::data::tokenizer::Tokenizer;
use crate::data::windows::Windows;
use crate::{Error, Result};

/// Tokens of held-out text that a sample begins with.
const PROMPT_TOKENS: usize = 16;

/// All that a run reads.
pub enum Dataset {
    Text(Box<Corpus>),
    Supervised(Box<Supervised>),
}

/// Training and held-out examples, and the tokenizer of both.
pub struct Supervised {
    pub tokenizer: Tokenizer,
    pub train: ExampleRows,
    pub valid: Option<ExampleRows>,
    /// A prompt of the held-out examples, or of those that are trained on if nothing is held out.
    prompt: Vec<u32>,
}

/// What an evaluation reads.
pub struct HeldOut<'a> {
    pub batches: Box<dyn Iterator<Item = Result<Batch>> + 'a>,
    /// Bytes of the text that is predicted, for bits per byte.
    pub text_bytes: u64,
}

impl Dataset {
    /// Resolves `config.data`. Large text is prepared into `cache_dir`.
    ///
    /// Errors: those of [`Corpus::open`]; for supervised examples those of [`supervised::read`] and
    /// [`ExampleRows::new`], a tokenizer that would have to be trained, and shards.
    pub fn open(config: &Config, cache_dir: &Path, progress: bool) -> Result<Self> {
        match config.data.format {
            Format::Text => {
                let corpus = Corpus::open(&config.data, cache_dir, progress)?;
                Ok(Dataset::Text(Box::new(corpus)))
            }
            Format::Supervised => Ok(Dataset::Supervised(Box::new(Supervised::open(config)?))),
        }
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        match self {
            Dataset::Text(corpus) => &corpus.tokenizer,
            Dataset::Supervised(examples) => &examples.tokenizer,
        }
    }

    /// What a loader for training begins with; `state`: where another one stood.
    ///
    /// Errors: those of [`Loader::new`] and [`Loader::restore`].
    pub fn loader(&self, options: LoaderOptions, state: Option<&LoaderState>) -> Result<Loader> {
        let source = match self {
            Dataset::Text(corpus) => RowSource::from(&corpus.train),
            Dataset::Supervised(examples) => RowSource::Examples(examples.train.clone()),
        };
        match state {
            None => Loader::new(source, options),
            Some(state) => Loader::restore(source, options, state),
        }
    }

    /// Whether there is something to evaluate on.
    pub fn holds_out(&self) -> bool {
        match self {
            Dataset::Text(corpus) => corpus.valid.tokens() >= 2,
            Dataset::Supervised(examples) => examples.valid.is_some(),
        }
    }

    /// What is held out, from its beginning, in batches of the run's size: about `most_tokens`
    /// predictions; 0: all.
    ///
    /// Errors: nothing is held out; a damaged shard.
    pub fn held_out(&self, config: &Config, most_tokens: u64) -> Result<HeldOut<'_>> {
        let (sequence, micro_batch) = (config.data.sequence, config.train.micro_batch);
        let documents = config.data.packs_documents();
        match self {
            Dataset::Text(corpus) => {
                let windows = Windows::new(&corpus.valid, sequence, micro_batch, most_tokens)?
                    .of_documents(documents);
                let text_bytes = match windows.text_bytes() {
                    Some(bytes) => bytes,
                    None => {
                        let predicted = windows.predicted_tokens();
                        predicted_bytes(&corpus.valid, predicted, &corpus.tokenizer)?
                    }
                };
                Ok(HeldOut { batches: Box::new(windows), text_bytes })
            }
            Dataset::Supervised(examples) => {
                let Some(valid) = &examples.valid else {
                    return Err(Error::Config {
                        what: "no examples are held out".into(),
                        remedy: "set data.held_out or data.valid".into(),
                    });
                };
                let rows = valid.first(most_tokens);
                let text_bytes = examples.tokenizer.text_bytes(&rows.predicted_tokens())?;
                let batches = examples::batches(rows, micro_batch, documents).map(Ok);
                Ok(HeldOut { batches: Box::new(batches), text_bytes })
            }
        }
    }

    /// What a sample continues, at most `most` tokens: the beginning of the held-out text, or a
    /// held-out prompt; of what is trained on if nothing is held out.
    pub fn prompt(&self, most: usize) -> Result<Vec<u32>> {
        match self {
            Dataset::Text(corpus) => {
                let source = if corpus.valid.tokens() > 0 { &corpus.valid } else { &corpus.train };
                let mut tokens = Vec::new();
                let count = source.tokens().min(PROMPT_TOKENS.min(most) as u64);
                source.read(0..count, &mut tokens)?;
                Ok(tokens)
            }
            Dataset::Supervised(examples) => {
                let prompt = &examples.prompt;
                Ok(prompt[prompt.len().saturating_sub(most)..].to_vec())
            }
        }
    }
}

/// How much there is, for people.
impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dataset::Text(corpus) => {
                let Corpus { train, valid, .. } = &**corpus;
                write!(f, "{} training tokens, {} held out", train.tokens(), valid.tokens())
            }
            Dataset::Supervised(examples) => {
                let Supervised { train, valid, .. } = &**examples;
                let held_out = valid.as_ref().map_or(0, ExampleRows::examples);
                write!(
                    f,
                    "{} training examples of {} tokens in {} rows, {held_out} held out",
                    train.examples(),
                    train.tokens(),
                    train.rows()
                )?;
                let parts = || [Some(train), valid.as_ref()].into_iter().flatten();
                let cut: usize = parts().map(ExampleRows::cut).sum();
                let left_out: usize = parts().map(ExampleRows::left_out).sum();
                if cut + left_out > 0 {
                    write!(
                        f,
                        "; longer than a row: {cut} lose their end, {left_out} are left out"
                    )?;
                }
                Ok(())
            }
        }
    }
}

impl Supervised {
    fn open(config: &Config) -> Result<Self> {
        let data = &config.data;
        if data.tokenizer.starts_with("train:") {
            return Err(Error::Config {
                what: format!(
                    "data.tokenizer is {}, but prompts and answers train none",
                    data.tokenizer
                ),
                remedy: "start from a model (--init), whose tokenizer is then used, or set \
                         data.tokenizer to a tokenizer.json"
                    .into(),
            });
        }
        let tokenizer = Tokenizer::open(&data.tokenizer)?;
        let pad = tokenizer.end_of_text().unwrap_or(0);
        let rows = |examples, packed, origin: &Path| {
            ExampleRows::new(examples, data.sequence, packed, config.seed, pad, origin)
        };
        let (mut train, origin) = read(&data.train, &tokenizer)?;
        let (valid, valid_origin) = match data.valid.as_slice() {
            [] => (train.split_off(data.held_out), origin.clone()),
            files => read(files, &tokenizer)?,
        };
        let shown = if valid.is_empty() { &train } else { &valid };
        let prompt = first_prompt(shown);
        let packed = data.rows == Rows::Packed;
        let train = rows(train, packed, &origin)?;
        let valid = match valid.is_empty() {
            true => None,
            false => Some(rows(valid, packed, &valid_origin)?),
        };
        Ok(Supervised { tokenizer, train, valid, prompt })
    }
}

/// Examples of files, and the first file.
fn read(files: &[String], tokenizer: &Tokenizer) -> Result<(Examples, PathBuf)> {
    let first = PathBuf::from(files.first().map_or("", String::as_str));
    Ok((supervised::read(files, tokenizer)?, first))
}

/// What stands before the first answer.
fn first_prompt(examples: &Examples) -> Vec<u32> {
    if examples.is_empty() {
        return vec![];
    }
    let (tokens, predicted) = examples.get(0);
    let prompt = predicted.iter().take_while(|predicted| !**predicted).count();
    tokens[..prompt.max(1)].to_vec()
}

/// Bytes of text after the first `predicted` predictions of a source.
fn predicted_bytes(source: &TokenSource, predicted: u64, tokenizer: &Tokenizer) -> Result<u64> {
    let mut tokens = Vec::new();
    source.read(0..predicted + 1, &mut tokens)?;
    tokenizer.text_bytes(&tokens)
}

//! What a run trains and evaluates on, resolved from its configuration.
//!
//! Small text is tokenized in memory, large text once into a cache of shards, shards are opened as
//! they are. Held-out text is cut off before anything is tokenized, so that a tokenizer trained
//! here has not seen it.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::config::DataConfig;
use crate::data::prepare::{Encoded, TOKENIZER_FILE, encode_stream, save_tokenizer, write_piece};
use crate::data::progress::Progress;
use crate::data::shard::{self, DEFAULT_SHARD_BYTES, EXTENSION, ShardWriter};
use crate::data::source::TokenSource;
use crate::data::text::{self, Piece};
use crate::data::tokenizer::{self, Tokenizer};
use crate::{Error, Result};

/// The bundled text: Jane Austen's novels, public domain.
const BUNDLED: &str = "bundled:austen";
const AUSTEN: &str = include_str!("../../assets/austen.txt");

/// Bytes of text up to which it is tokenized in memory.
const IN_MEMORY_BYTES: u64 = 64 << 20;

/// Bytes of the training text that a tokenizer is trained on at most.
const TOKENIZER_TEXT_BYTES: u64 = 1 << 30;

/// Changes when the same text would give other shards.
const CACHE_VERSION: u32 = 1;

/// Training and held-out tokens, and the tokenizer of both.
pub struct Corpus {
    pub tokenizer: Tokenizer,
    pub train: TokenSource,
    /// No tokens if `held_out` is 0 and `valid` is empty. [`TokenSource::text_bytes`] is exact.
    pub valid: TokenSource,
}

/// What a list of specs names.
enum Input {
    Bundled,
    Text(Vec<PathBuf>),
    Shards(Vec<PathBuf>),
}

/// A document, or the part of it on one side of the held-out boundary.
struct Document {
    text: String,
    /// Whether the document's end is in it.
    ends: bool,
}

impl Corpus {
    /// Resolves `config`. Large text is prepared into `cache_dir` once and found there again as
    /// long as its path, size and time and the tokenizer stay the same.
    ///
    /// Errors: specs that name nothing, or text and shards together; unreadable text; `train:N`
    /// with shards; shards of another tokenizer; `held_out` outside 0..1.
    pub fn open(config: &DataConfig, cache_dir: &Path, progress: bool) -> Result<Self> {
        Self::open_with(config, cache_dir, progress, IN_MEMORY_BYTES)
    }

    /// As [`Self::open`], with another limit for text that is tokenized in memory.
    pub fn open_with(
        config: &DataConfig,
        cache_dir: &Path,
        progress: bool,
        in_memory_bytes: u64,
    ) -> Result<Self> {
        check_share(config.held_out)?;
        let Some(train) = Input::parse("train", &config.train)? else {
            return Err(Error::Config {
                what: "data.train is empty".into(),
                remedy: format!("name text files, shards, or {BUNDLED}"),
            });
        };
        let valid = Input::parse("valid", &config.valid)?;
        let held_out = if valid.is_none() { config.held_out } else { 0.0 };
        let cache = Cache { dir: cache_dir, field: &config.field, progress };

        let (tokenizer, train, rest) = match train {
            Input::Shards(paths) => {
                let tokenizer = match trained_vocab(&config.tokenizer)? {
                    None => Tokenizer::open(&config.tokenizer)?,
                    Some(_) => return Err(trained_for_shards(&config.tokenizer, &paths)),
                };
                let source = open_shards(&paths, &tokenizer)?;
                let (train, rest) = split_source(&source, held_out, &tokenizer)?;
                (tokenizer, train, rest)
            }
            Input::Text(paths) if estimate(&paths)? > in_memory_bytes => {
                cache.open(&paths, &config.tokenizer, None, held_out)?
            }
            Input::Text(_) | Input::Bundled => {
                let documents = train.read(&config.field)?;
                let (documents, rest) = split_documents(documents, held_out);
                let tokenizer = match trained_vocab(&config.tokenizer)? {
                    None => Tokenizer::open(&config.tokenizer)?,
                    Some(vocab) => Tokenizer::train(
                        documents.iter().map(|document| document.text.as_str()),
                        vocab,
                    )?,
                };
                let train = encode_documents(documents, &tokenizer)?;
                let rest = encode_documents(rest, &tokenizer)?;
                (tokenizer, train, rest)
            }
        };
        let valid = match valid {
            None => rest,
            Some(Input::Shards(paths)) => open_shards(&paths, &tokenizer)?,
            Some(Input::Text(paths)) if estimate(&paths)? > in_memory_bytes => {
                cache.open(&paths, &config.tokenizer, Some(&tokenizer), 0.0)?.1
            }
            Some(input) => encode_documents(input.read(&config.field)?, &tokenizer)?,
        };
        Ok(Corpus { tokenizer, train, valid })
    }
}

impl Input {
    /// `None` for an empty list. `key` is named in messages.
    fn parse(key: &str, specs: &[String]) -> Result<Option<Self>> {
        if specs.is_empty() {
            return Ok(None);
        }
        if specs == [BUNDLED] {
            return Ok(Some(Input::Bundled));
        }
        let (mut texts, mut shards) = (vec![], vec![]);
        for spec in specs {
            let path = PathBuf::from(spec);
            if text::is_text(&path) {
                texts.push(path);
            } else if path.is_dir() || path.extension().is_some_and(|found| found == EXTENSION) {
                shards.push(path);
            } else {
                return Err(Error::Config {
                    what: format!("data.{key}: {spec} is neither text, nor shards, nor {BUNDLED}"),
                    remedy: "give .txt or .jsonl files (also .gz, .zst), .tok files, or a folder \
                             of .tok files"
                        .into(),
                });
            }
        }
        match (texts.is_empty(), shards.is_empty()) {
            (true, _) => Ok(Some(Input::Shards(shards))),
            (_, true) => Ok(Some(Input::Text(texts))),
            (false, false) => Err(Error::Config {
                what: format!("data.{key} names text and shards together"),
                remedy: "turn the text into shards with `isobath data prepare`".into(),
            }),
        }
    }

    /// All documents, in memory.
    fn read(&self, field: &str) -> Result<Vec<Document>> {
        let mut documents = vec![];
        match self {
            Input::Bundled => documents.push(Document { text: AUSTEN.into(), ends: true }),
            Input::Shards(_) => {}
            Input::Text(paths) => {
                for path in paths {
                    text::read(
                        path,
                        field,
                        |_| None,
                        &AtomicU64::new(0),
                        |piece| {
                            documents.push(Document { text: piece.text, ends: true });
                            Ok(())
                        },
                    )?;
                }
            }
        }
        Ok(documents)
    }
}

/// The documents of text, or of its last `held_out` share, which a run with that `data.held_out`
/// does not train on; all in memory.
///
/// Errors: those of [`Corpus::open`], and shards, which hold no text.
pub fn read_texts(specs: &[String], field: &str, held_out: f64) -> Result<Vec<String>> {
    check_share(held_out)?;
    let documents = match Input::parse("train", specs)? {
        None => vec![],
        Some(Input::Shards(paths)) => {
            return Err(Error::Data {
                path: paths[0].clone(),
                what: "shards hold tokens, not text".into(),
                remedy: "give the text that they were made of".into(),
            });
        }
        Some(input) => input.read(field)?,
    };
    let documents = match held_out {
        0.0 => documents,
        share => split_documents(documents, share).1,
    };
    Ok(documents.into_iter().map(|document| document.text).collect())
}

fn check_share(held_out: f64) -> Result<()> {
    match (0.0..1.0).contains(&held_out) {
        true => Ok(()),
        false => Err(Error::Config {
            what: format!("data.held_out is {held_out}, a share from 0 to below 1"),
            remedy: "set it to 0.1, or to 0 to hold nothing out".into(),
        }),
    }
}

/// N of `train:N`.
fn trained_vocab(spec: &str) -> Result<Option<usize>> {
    let Some(vocab) = spec.strip_prefix("train:") else { return Ok(None) };
    match vocab.parse() {
        Ok(vocab) => Ok(Some(vocab)),
        Err(_) => Err(Error::Config {
            what: format!("data.tokenizer: {spec} has no number of entries"),
            remedy: "write for example train:4096".into(),
        }),
    }
}

fn trained_for_shards(spec: &str, paths: &[PathBuf]) -> Error {
    let folder = match &paths[0] {
        path if path.is_dir() => path.as_path(),
        path => path.parent().unwrap_or(Path::new(".")),
    };
    Error::Config {
        what: format!("data.tokenizer is {spec}, but shards are tokenized already"),
        remedy: format!("set it to {}", folder.join(TOKENIZER_FILE).display()),
    }
}

fn estimate(paths: &[PathBuf]) -> Result<u64> {
    paths.iter().map(|path| text::estimate_bytes(path)).sum()
}

fn open_shards(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<TokenSource> {
    let mut shards = vec![];
    for path in paths {
        shards.extend(shard::open_all(path)?);
    }
    TokenSource::from_shards(shards, tokenizer)
}

/// Byte of the text at which the held-out part begins.
fn boundary(text_bytes: u64, held_out: f64) -> u64 {
    ((1.0 - held_out) * text_bytes as f64) as u64
}

fn split_documents(documents: Vec<Document>, held_out: f64) -> (Vec<Document>, Vec<Document>) {
    let total: usize = documents.iter().map(|document| document.text.len()).sum();
    let mut left = boundary(total as u64, held_out) as usize;
    let (mut train, mut valid) = (vec![], vec![]);
    for mut document in documents {
        if left >= document.text.len() {
            left -= document.text.len();
            train.push(document);
            continue;
        }
        let rest = document.text.split_off(document.text.floor_char_boundary(left));
        if !document.text.is_empty() {
            train.push(Document { text: document.text, ends: false });
        }
        valid.push(Document { text: rest, ends: document.ends });
        left = 0;
    }
    (train, valid)
}

fn encode_documents(documents: Vec<Document>, tokenizer: &Tokenizer) -> Result<TokenSource> {
    let encoded = documents
        .into_par_iter()
        .map(|document| {
            let mut ids = tokenizer.encode_long(&document.text)?;
            ids.extend(tokenizer.end_of_text().filter(|_| document.ends));
            Ok((ids, document.text.len() as u64))
        })
        .collect::<Result<_>>()?;
    TokenSource::from_documents(encoded, tokenizer)
}

/// The last share of the tokens, from the end of a document if there is one within a tenth of it.
fn split_source(
    source: &TokenSource,
    held_out: f64,
    tokenizer: &Tokenizer,
) -> Result<(TokenSource, TokenSource)> {
    let share = boundary(source.tokens(), held_out);
    let near = (source.tokens() - share) / 10;
    let at = source.boundary_near(share, near)?.unwrap_or(share);
    Ok((source.slice(0..at, tokenizer)?, source.slice(at..source.tokens(), tokenizer)?))
}

/// Large text, prepared once.
struct Cache<'a> {
    dir: &'a Path,
    field: &'a str,
    progress: bool,
}

impl Cache<'_> {
    /// Tokenizer, training part and held-out part of `paths`, from the cache if they are there.
    fn open(
        &self,
        paths: &[PathBuf],
        spec: &str,
        ready: Option<&Tokenizer>,
        held_out: f64,
    ) -> Result<(Tokenizer, TokenSource, TokenSource)> {
        let vocab = if ready.is_none() { trained_vocab(spec)? } else { None };
        let tokenizer = match (ready, vocab) {
            (Some(ready), _) => {
                Some(Tokenizer::from_json(ready.json().as_bytes(), ready.origin())?)
            }
            (None, None) => Some(Tokenizer::open(spec)?),
            (None, Some(_)) => None,
        };
        let mut key = Sha256::new();
        key.update(CACHE_VERSION.to_le_bytes());
        key.update(held_out.to_le_bytes());
        for path in paths {
            let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
            let absolute = path.canonicalize().map_err(Error::io("open", path))?;
            let modified = metadata.modified().map_err(Error::io("open", path))?;
            key.update(format!("{absolute:?} {} {modified:?}\n", metadata.len()));
        }
        key.update(format!("{} {vocab:?}\n", self.field));
        key.update(tokenizer.as_ref().map_or([0; 32], Tokenizer::fingerprint));
        let folder = self.dir.join(shard::short(&key.finalize().into()));
        if !folder.exists() {
            // Written beside its place and renamed when complete: a folder that exists is whole.
            std::fs::create_dir_all(self.dir).map_err(Error::io("create", self.dir))?;
            let unfinished = tempfile::Builder::new()
                .prefix(".unfinished-")
                .tempdir_in(self.dir)
                .map_err(Error::io("create a folder in", self.dir))?;
            self.fill(unfinished.path(), paths, tokenizer, vocab, held_out)?;
            match std::fs::rename(unfinished.path(), &folder) {
                Err(_) if folder.exists() => {} // another process was faster
                renamed => renamed.map_err(Error::io("rename", &folder))?,
            }
        }
        let tokenizer = Tokenizer::open(&folder.join(TOKENIZER_FILE).to_string_lossy())?;
        let train = open_shards(&[folder.join("train")], &tokenizer)?;
        let valid = match folder.join("valid") {
            valid if valid.exists() => open_shards(&[valid], &tokenizer)?,
            _ => TokenSource::from_documents(vec![], &tokenizer)?,
        };
        Ok((tokenizer, train, valid))
    }

    fn fill(
        &self,
        folder: &Path,
        paths: &[PathBuf],
        tokenizer: Option<Tokenizer>,
        vocab: Option<usize>,
        held_out: f64,
    ) -> Result<()> {
        let file_bytes = text::total_bytes(paths)?;
        let read = |cut: &dyn Fn(&str) -> Option<usize>,
                    progress: &Progress,
                    each: &mut dyn FnMut(Piece) -> Result<()>| {
            for path in paths {
                text::read(path, self.field, cut, &progress.done, &mut *each)?;
            }
            Ok(())
        };
        // The boundary is a place in the text, which has to be measured before it is known.
        let mut text_bytes = 0;
        let progress = Progress::new("reading", file_bytes, self.progress);
        read(&|text| cut_anywhere(text), &progress, &mut |piece| {
            text_bytes += piece.text.len() as u64;
            progress.show();
            Ok(())
        })?;
        progress.finish();
        let boundary = boundary(text_bytes, held_out);

        let tokenizer = match (tokenizer, vocab) {
            (Some(tokenizer), _) => tokenizer,
            (None, vocab) => self.train_tokenizer(
                vocab.unwrap_or_default(),
                boundary.min(TOKENIZER_TEXT_BYTES),
                paths,
            )?,
        };
        save_tokenizer(&tokenizer, folder)?;
        let progress = Progress::new("tokenizing", file_bytes, self.progress);
        let mut train =
            ShardWriter::create(folder.join("train"), "train", &tokenizer, DEFAULT_SHARD_BYTES)?;
        let mut valid: Option<ShardWriter> = None;
        let mut at = 0; // bytes of text written
        encode_stream(
            &tokenizer,
            |each| {
                let mut split = Splitter { left: boundary };
                read(&|text| tokenizer.cut(text), &progress, &mut |piece| split.split(piece, each))
            },
            |piece: Encoded| {
                let held_out = at >= boundary;
                at += piece.text_bytes;
                progress.show();
                if !held_out {
                    return write_piece(&mut train, &piece, &tokenizer).map(|_| ());
                }
                if valid.is_none() {
                    train.end_document()?;
                    let folder = folder.join("valid");
                    let writer =
                        ShardWriter::create(folder, "valid", &tokenizer, DEFAULT_SHARD_BYTES)?;
                    valid = Some(writer);
                }
                match &mut valid {
                    Some(valid) => write_piece(valid, &piece, &tokenizer).map(|_| ()),
                    None => Ok(()),
                }
            },
        )?;
        train.finish()?;
        if let Some(valid) = valid {
            valid.finish()?;
        }
        progress.finish();
        Ok(())
    }

    /// Trains on the first `bytes` of the text.
    fn train_tokenizer(&self, vocab: usize, bytes: u64, paths: &[PathBuf]) -> Result<Tokenizer> {
        train_on_files(paths, self.field, vocab, Some(bytes), self.progress)
    }
}

/// Trains a tokenizer on text files, streaming; on their first `bytes` of text if given, and then
/// the rest is not read.
///
/// Errors: those of [`text::read`] and of [`Tokenizer::train`].
pub fn train_on_files(
    paths: &[PathBuf],
    field: &str,
    vocab: usize,
    bytes: Option<u64>,
    progress: bool,
) -> Result<Tokenizer> {
    tokenizer::check_trainable(vocab)?;
    let progress = Progress::new("reading", text::total_bytes(paths)?, progress);
    let (sender, texts) = std::sync::mpsc::sync_channel::<String>(64);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let sender = sender;
            let mut left = bytes.unwrap_or(u64::MAX);
            for path in paths {
                if left == 0 {
                    break;
                }
                text::read_until(
                    path,
                    field,
                    tokenizer::cut_between_words,
                    &progress.done,
                    |mut piece| {
                        progress.show();
                        let kept = left.min(piece.text.len() as u64);
                        left -= kept;
                        piece.text.truncate(piece.text.floor_char_boundary(kept as usize));
                        if !piece.text.is_empty() && sender.send(piece.text).is_err() {
                            left = 0; // the trainer has failed, and says why itself
                        }
                        Ok(if left == 0 {
                            ControlFlow::Break(())
                        } else {
                            ControlFlow::Continue(())
                        })
                    },
                )?;
            }
            Ok(())
        });
        let trained = Tokenizer::train(texts, vocab);
        let read = match reader.join() {
            Ok(read) => read,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        progress.finish();
        read.and(trained)
    })
}

/// Cuts one stream of pieces in two at a byte of the text.
struct Splitter {
    /// Bytes before the boundary.
    left: u64,
}

impl Splitter {
    fn split(&mut self, mut piece: Piece, each: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
        let length = piece.text.len() as u64;
        if self.left >= length || self.left == 0 {
            self.left = self.left.saturating_sub(length);
            return each(piece);
        }
        let rest = piece.text.split_off(piece.text.ceil_char_boundary(self.left as usize));
        self.left = 0;
        each(Piece { text: piece.text, ends_document: piece.ends_document && rest.is_empty() })?;
        if rest.is_empty() {
            return Ok(());
        }
        each(Piece { text: rest, ends_document: piece.ends_document })
    }
}

fn cut_anywhere(text: &str) -> Option<usize> {
    (!text.is_empty()).then_some(text.len())
}

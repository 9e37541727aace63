//! Text files into shards, streaming, on all cores, in constant memory.
//!
//! One thread reads and cuts, all cores encode, the caller's thread writes; the shards are the same
//! whatever the number of cores. The tokenizer is saved beside the shards. If anything fails,
//! nothing is left behind.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Instant;

use rayon::prelude::*;

use crate::data::progress::Progress;
use crate::data::shard::{DEFAULT_SHARD_BYTES, ShardWriter, short};
use crate::data::text::{self, Piece, TextCounts};
use crate::data::tokenizer::{PIECE_BYTES, Tokenizer};
use crate::durable::replace;
use crate::{Error, Result};

/// Pieces that one core encodes between two waits for the others.
const PIECES_PER_CORE: usize = 16;

/// Name of the tokenizer that is saved beside shards.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// What to read and where to write.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// .txt and .jsonl files, plain, .gz or .zst; their order is kept.
    pub inputs: Vec<PathBuf>,
    /// The JSON field of .jsonl files that holds the text.
    pub field: String,
    pub folder: PathBuf,
    /// Shards are called NAME-00000.tok, ...
    pub name: String,
    /// Bytes of ids in a shard.
    pub shard_bytes: u64,
    /// Whether progress is shown on stderr.
    pub progress: bool,
}

impl PrepareOptions {
    pub fn new(inputs: Vec<PathBuf>, folder: impl Into<PathBuf>) -> Self {
        PrepareOptions {
            inputs,
            field: "text".into(),
            folder: folder.into(),
            name: "shard".into(),
            shard_bytes: DEFAULT_SHARD_BYTES,
            progress: false,
        }
    }
}

/// What was written.
#[derive(Clone, PartialEq, Debug, serde::Serialize)]
pub struct Prepared {
    pub shards: Vec<PathBuf>,
    pub tokens: u64,
    pub documents: u64,
    /// .jsonl lines without text, which are left out.
    pub empty_documents: u64,
    pub text_bytes: u64,
    /// Size of the files read.
    pub input_bytes: u64,
    pub seconds: f64,
}

/// Turns text files into shards; an end-of-text token follows each document if there is one.
///
/// Errors: those of reading (see [`text::read`]), of writing (see [`ShardWriter`]), and a folder
/// that holds another tokenizer.
pub fn prepare(options: &PrepareOptions, tokenizer: &Tokenizer) -> Result<Prepared> {
    let start = Instant::now();
    let input_bytes = text::total_bytes(&options.inputs)?;
    save_tokenizer(tokenizer, &options.folder)?;
    let mut writer =
        ShardWriter::create(&options.folder, &options.name, tokenizer, options.shard_bytes)?;
    let mut tokens = 0;
    let progress = Progress::new("tokenizing", input_bytes, options.progress);
    let read = |each: &mut Emit<'_>| {
        let mut counts = TextCounts::default();
        for path in &options.inputs {
            let cut = |text: &str| tokenizer.cut(text);
            counts += text::read(path, &options.field, cut, &progress.done, &mut *each)?;
        }
        Ok(counts)
    };
    let counts = encode_stream(tokenizer, read, |piece| {
        tokens += write_piece(&mut writer, &piece, tokenizer)?;
        progress.show();
        Ok(())
    })?;
    let shards = writer.finish()?;
    progress.finish();
    Ok(Prepared {
        shards,
        tokens,
        documents: counts.documents,
        empty_documents: counts.empty_documents,
        text_bytes: counts.text_bytes,
        input_bytes,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Writes one piece, and the end of its document; returns the number of tokens.
pub(crate) fn write_piece(
    writer: &mut ShardWriter,
    piece: &Encoded,
    tokenizer: &Tokenizer,
) -> Result<u64> {
    writer.push(&piece.ids, piece.text_bytes)?;
    let mut tokens = piece.ids.len() as u64;
    if piece.ends_document {
        if let Some(end_of_text) = tokenizer.end_of_text() {
            writer.push(&[end_of_text], 0)?;
            tokens += 1;
        }
        writer.end_document()?;
    }
    Ok(tokens)
}

/// Saves `tokenizer` as tokenizer.json.
///
/// Errors: another tokenizer that is there already.
pub fn save_tokenizer(tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let path = folder.join(TOKENIZER_FILE);
    if path.exists() {
        let there = Tokenizer::open(&path.to_string_lossy())?;
        if there.fingerprint() == tokenizer.fingerprint() {
            return Ok(());
        }
        return Err(Error::Data {
            path,
            what: format!(
                "the folder holds another tokenizer ({}, not {})",
                short(&there.fingerprint()),
                short(&tokenizer.fingerprint())
            ),
            remedy: "choose another folder: shards of two tokenizers do not go together".into(),
        });
    }
    replace(&path, tokenizer.json().as_bytes())
}

/// A piece that has been encoded.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub ids: Vec<u32>,
    pub text_bytes: u64,
    pub ends_document: bool,
}

/// Takes the pieces of a reader.
pub(crate) type Emit<'a> = dyn FnMut(Piece) -> Result<()> + 'a;

/// Encodes what `read` emits on all cores and gives it to `write` in the same order. A bounded
/// number of pieces is in memory.
pub(crate) fn encode_stream<T: Send>(
    tokenizer: &Tokenizer,
    read: impl FnOnce(&mut Emit<'_>) -> Result<T> + Send,
    mut write: impl FnMut(Encoded) -> Result<()>,
) -> Result<T> {
    struct Job {
        context: String,
        piece: Piece,
    }
    let batch_bytes = PIECE_BYTES * PIECES_PER_CORE * rayon::current_num_threads();
    let (sender, batches) = sync_channel::<Vec<Job>>(1);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut batch = Batcher { jobs: vec![], bytes: 0, most: batch_bytes, sender };
            let mut context = String::new();
            let counts = read(&mut |piece: Piece| {
                let next = match piece.ends_document {
                    true => String::new(),
                    false => tokenizer.context(&piece.text).to_string(),
                };
                let bytes = piece.text.len();
                let job = Job { context: std::mem::replace(&mut context, next), piece };
                batch.push(job, bytes)
            })?;
            batch.flush()?;
            Ok(counts)
        });
        let mut written = Ok(());
        'batches: for batch in &batches {
            let encoded: Vec<Result<Encoded>> = batch
                .into_par_iter()
                .map(|Job { context, piece }| {
                    Ok(Encoded {
                        ids: tokenizer.encode_after(&context, &piece.text)?,
                        text_bytes: piece.text.len() as u64,
                        ends_document: piece.ends_document,
                    })
                })
                .collect();
            for piece in encoded {
                written = piece.and_then(&mut write);
                if written.is_err() {
                    break 'batches;
                }
            }
        }
        drop(batches); // a reader that still has pieces stops at the next one
        let read = match reader.join() {
            Ok(read) => read,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        written.and(read)
    })
}

struct Batcher<J> {
    jobs: Vec<J>,
    bytes: usize,
    most: usize,
    sender: SyncSender<Vec<J>>,
}

impl<J> Batcher<J> {
    fn push(&mut self, job: J, bytes: usize) -> Result<()> {
        self.jobs.push(job);
        self.bytes += bytes;
        // Documents of a few bytes cost memory too: count them.
        if self.bytes >= self.most || self.jobs.len() >= 1 << 16 { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.bytes = 0;
        self.sender.send(std::mem::take(&mut self.jobs)).map_err(|_| Error::Internal {
            what: "reading was stopped, because what was read could not be written".into(),
            remedy: "report this: the error of the writer should stand here".into(),
        })
    }
}

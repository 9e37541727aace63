//! `isobath data`: train a tokenizer, turn text into shards, look into shards, make a task of text.
//!
//! Arguments in, a report out: on stdout, as text or with `--json` as one object. Progress goes to
//! stderr. The work itself is done in `isobath::data`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use isobath::data::corpus::{read_texts, train_on_files};
use isobath::data::prepare::{PrepareOptions, TOKENIZER_FILE, prepare};
use isobath::data::shard::{self, Shard, short};
use isobath::data::tokenizer::Tokenizer;
use isobath::tasks::{DrawOptions, draw, json_lines};

use super::output::{save, say};

#[derive(Debug, clap::Subcommand)]
pub enum DataCommand {
    /// Train a byte-level BPE tokenizer on text files
    Tokenizer {
        /// .txt or .jsonl files, plain, .gz or .zst
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Entries, the 256 bytes and <|endoftext|> included
        #[arg(long, default_value_t = 32_000)]
        vocab: usize,
        /// Where to write it
        #[arg(long, default_value = TOKENIZER_FILE)]
        out: PathBuf,
        /// JSON field of .jsonl files that holds the text
        #[arg(long, default_value = "text")]
        field: String,
        /// Train only on this many MiB from the beginning of the text
        #[arg(long)]
        limit_mib: Option<u64>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Turn text files into shards of tokens
    Prepare {
        /// .txt or .jsonl files, plain, .gz or .zst
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// A tokenizer.json, or `bytes`
        #[arg(long)]
        tokenizer: String,
        /// Folder for the shards
        #[arg(long)]
        out: PathBuf,
        /// Shards are called NAME-00000.tok, NAME-00001.tok, ...
        #[arg(long, default_value = "shard")]
        name: String,
        /// JSON field of .jsonl files that holds the text
        #[arg(long, default_value = "text")]
        field: String,
        /// Size of a shard
        #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..))]
        shard_mib: u64,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show headers, counts and decoded rows of shards
    Inspect {
        /// .tok files, or folders of them
        #[arg(required = true)]
        paths: Vec<PathBuf>,
        /// A tokenizer.json, or `bytes`; otherwise the tokenizer.json beside the shard
        #[arg(long)]
        tokenizer: Option<String>,
        /// Rows to decode
        #[arg(long, default_value_t = 3)]
        rows: u64,
        /// Tokens in a decoded row
        #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
        sequence: u64,
        /// Check every block of every shard
        #[arg(long)]
        verify: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make a multiple-choice task from text: which of several continuations follows?
    Task {
        /// .txt or .jsonl files, plain, .gz or .zst, or bundled:austen
        #[arg(required = true, value_name = "TEXT")]
        texts: Vec<String>,
        /// Where to write it
        #[arg(long, value_name = "FILE.jsonl")]
        out: PathBuf,
        /// Draw only from this share at the end of the text: what a run with this data.held_out
        /// holds out
        #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
        held_out: f64,
        /// Questions to draw
        #[arg(long, default_value_t = DrawOptions::default().questions)]
        questions: usize,
        /// Choices of a question
        #[arg(long, default_value_t = DrawOptions::default().choices)]
        choices: usize,
        /// Characters before the choices, at most
        #[arg(long, value_name = "CHARACTERS", default_value_t = DrawOptions::default().context)]
        context: usize,
        /// Characters of a choice, at most
        #[arg(
            long,
            value_name = "CHARACTERS",
            default_value_t = DrawOptions::default().continuation
        )]
        continuation: usize,
        /// The same seed draws the same questions
        #[arg(long, default_value_t = DrawOptions::default().seed)]
        seed: u64,
        /// JSON field of .jsonl files that holds the text
        #[arg(long, default_value = "text")]
        field: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Does what `command` says; errors carry the remedy.
pub fn run(command: DataCommand) -> anyhow::Result<()> {
    match command {
        DataCommand::Tokenizer { files, vocab, out, field, limit_mib, json } => {
            let bytes = limit_mib.map(|mib| mib.saturating_mul(1 << 20));
            let tokenizer = train_on_files(&files, &field, vocab, bytes, true)?;
            save(&out, tokenizer.json().as_bytes())?;
            let report = serde_json::json!({
                "tokenizer": out,
                "vocab": tokenizer.vocab(),
                "fingerprint": hex(&tokenizer.fingerprint()),
            });
            match json {
                true => say!("{report}")?,
                false => say!(
                    "{}: {} entries, fingerprint {}",
                    out.display(),
                    tokenizer.vocab(),
                    short(&tokenizer.fingerprint())
                )?,
            }
            if tokenizer.vocab() < vocab {
                eprintln!("the text is too small for {vocab} entries: no pair occurs twice");
            }
            Ok(())
        }
        DataCommand::Prepare { files, tokenizer, out, name, field, shard_mib, json } => {
            let tokenizer = Tokenizer::open(&tokenizer)?;
            let options = PrepareOptions {
                inputs: files,
                field,
                folder: out,
                name,
                shard_bytes: shard_mib.saturating_mul(1 << 20),
                progress: true,
            };
            let prepared = prepare(&options, &tokenizer)?;
            if json {
                say!("{}", serde_json::to_string(&prepared)?)?;
                return Ok(());
            }
            say!(
                "{} shards in {}: {} tokens of {} documents, {:.3} bytes per token, {:.1} MB/s of text",
                prepared.shards.len(),
                options.folder.display(),
                prepared.tokens,
                prepared.documents,
                prepared.text_bytes as f64 / prepared.tokens.max(1) as f64,
                prepared.text_bytes as f64 / prepared.seconds / 1e6,
            )?;
            if prepared.empty_documents > 0 {
                say!("{} lines without text were left out", prepared.empty_documents)?;
            }
            if tokenizer.end_of_text().is_none() {
                eprintln!("the tokenizer has no end-of-text token: documents follow without one");
            }
            Ok(())
        }
        DataCommand::Inspect { paths, tokenizer, rows, sequence, verify, json } => {
            let mut shards = vec![];
            for path in &paths {
                shards.extend(shard::open_all(path)?);
            }
            let mut reports = vec![];
            for shard in &shards {
                reports.push(inspect(shard, tokenizer.as_deref(), rows, sequence, verify, json)?);
            }
            if json {
                say!("{}", serde_json::json!({ "shards": reports }))?;
            }
            Ok(())
        }
        DataCommand::Task {
            texts,
            out,
            held_out,
            questions,
            choices,
            context,
            continuation,
            seed,
            field,
            json,
        } => {
            let documents = read_texts(&texts, &field, held_out)?;
            let options = DrawOptions { questions, choices, context, continuation, seed };
            write_task(&documents, &options, &out, json)
        }
    }
}

/// Draws a task and writes it whole.
fn write_task(
    documents: &[String],
    options: &DrawOptions,
    out: &Path,
    json: bool,
) -> anyhow::Result<()> {
    if out.extension().is_none_or(|extension| extension != "jsonl") {
        return Err(isobath::Error::Usage {
            what: format!("--out {} is no name of a .jsonl file", out.display()),
            remedy: "end it in .jsonl: `eval --task` tells by the name what is in a file".into(),
        }
        .into());
    }
    let questions = draw(documents, options)?;
    save(out, json_lines(&questions).as_bytes())?;
    let bytes: usize = documents.iter().map(String::len).sum();
    match json {
        true => say!(
            "{}",
            serde_json::json!({
                "task": out,
                "questions": questions.len(),
                "choices": options.choices,
                "seed": options.seed,
                "text_bytes": bytes,
            })
        ),
        false => say!(
            "{}: {} questions of {} choices from {bytes} bytes of text",
            out.display(),
            questions.len(),
            options.choices
        ),
    }
}

/// Prints the report of one shard unless `json`, and returns it.
fn inspect(
    shard: &Shard,
    tokenizer: Option<&str>,
    rows: u64,
    sequence: u64,
    verify: bool,
    json: bool,
) -> anyhow::Result<serde_json::Value> {
    if verify {
        shard.verify()?;
    }
    let beside = shard.path().parent().unwrap_or(Path::new("")).join(TOKENIZER_FILE);
    let tokenizer = match tokenizer {
        Some(spec) => Some(Tokenizer::open(spec)?),
        None if beside.exists() => Some(Tokenizer::open(&beside.to_string_lossy())?),
        None => None,
    };
    let mut texts = vec![];
    if let Some(tokenizer) = &tokenizer {
        shard.check_tokenizer(tokenizer)?;
        for row in 0..rows.min(shard.len().div_ceil(sequence)) {
            let start = row * sequence;
            let mut ids = vec![];
            shard.read(start..shard.len().min(start + sequence), &mut ids)?;
            texts.push(tokenizer.decode(&ids).context("decode a row")?);
        }
    }
    let (part, parts) = shard.part();
    if !json {
        say!("{}", shard.path().display())?;
        say!("  version      {}, part {} of {parts}", shard.version(), part + 1)?;
        say!("  tokens       {} (u{})", shard.len(), 8 * shard.id_bytes())?;
        say!(
            "  documents    {}{}",
            shard.documents(),
            if shard.continues() { ", the first begins in the preceding shard" } else { "" }
        )?;
        say!(
            "  text         {} bytes, {:.3} per token",
            shard.text_bytes(),
            shard.text_bytes() as f64 / shard.len().max(1) as f64
        )?;
        say!("  tokenizer    {}, vocabulary {}", short(&shard.fingerprint()), shard.vocab())?;
        say!("  checksums    {}", if verify { "all right" } else { "not checked (--verify)" })?;
        for (row, text) in texts.iter().enumerate() {
            say!("  row {row:<8} {text:?}")?;
        }
        if tokenizer.is_none() && rows > 0 {
            eprintln!("no tokenizer.json beside the shard: give --tokenizer to see rows");
        }
    }
    Ok(serde_json::json!({
        "path": shard.path(),
        "version": shard.version(),
        "part": part,
        "parts": parts,
        "id_bytes": shard.id_bytes(),
        "tokens": shard.len(),
        "documents": shard.documents(),
        "continues": shard.continues(),
        "text_bytes": shard.text_bytes(),
        "vocab": shard.vocab(),
        "tokenizer": hex(&shard.fingerprint()),
        "verified": verify,
        "rows": texts,
    }))
}

fn hex(fingerprint: &[u8; 32]) -> String {
    fingerprint.iter().map(|byte| format!("{byte:02x}")).collect()
}

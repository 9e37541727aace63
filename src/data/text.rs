//! Documents from text files, streaming: .txt (one document each) and .jsonl (one a line), plain,
//! .gz or .zst.
//!
//! Documents come in pieces, cut where the caller says, so that memory is bounded by a piece for
//! .txt and by a line for .jsonl. Text is passed on byte for byte: nothing is trimmed or replaced,
//! and what is no UTF-8 is an error that says where.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow::{self, Break, Continue};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

use super::zstandard::Frames;
use crate::{Error, Result};

/// Bytes that are read at once.
const READ_BYTES: usize = 256 << 10;

/// Bytes of the longest .jsonl line; one line is held in memory.
const LONGEST_LINE_BYTES: usize = 256 << 20;

/// A part of a document.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    pub text: String,
    /// Whether the document ends here.
    pub ends_document: bool,
}

/// What was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TextCounts {
    pub documents: u64,
    /// .jsonl lines whose text is empty; they are no documents.
    pub empty_documents: u64,
    pub text_bytes: u64,
}

impl std::ops::AddAssign for TextCounts {
    fn add_assign(&mut self, other: Self) {
        self.documents += other.documents;
        self.empty_documents += other.empty_documents;
        self.text_bytes += other.text_bytes;
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Plain,
    JsonLines,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstandard,
}

fn kind(path: &Path) -> Option<(Format, Compression)> {
    let name = path.file_name()?.to_str()?;
    let (name, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "zst")) => (stem, Compression::Zstandard),
        _ => (name, Compression::None),
    };
    match name.rsplit_once('.') {
        Some((_, "txt")) => Some((Format::Plain, compression)),
        Some((_, "jsonl")) => Some((Format::JsonLines, compression)),
        _ => None,
    }
}

/// Whether the name of `path` says that it holds text.
pub fn is_text(path: &Path) -> bool {
    kind(path).is_some()
}

/// An estimate of the bytes of text in `path`, from its size alone.
///
/// Errors: a missing or empty file.
pub fn estimate_bytes(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
    if metadata.len() == 0 {
        return Err(bad(path, "is empty", "leave it out, or give a file with text in it"));
    }
    match kind(path) {
        Some((_, Compression::None)) => Ok(metadata.len()),
        _ => Ok(metadata.len() * 4),
    }
}

/// Reads the documents of `path` in order.
///
/// - `field`: the JSON field of .jsonl lines that holds the text.
/// - `cut`: where a text may be cut so that its first part goes on its own; `None`: not yet.
/// - `read_bytes` grows by the bytes read from the file, for a progress bar.
/// - `each` gets the pieces; its error ends the reading and is returned.
///
/// Errors: a missing or empty file, another kind of file, damaged compression, invalid UTF-8
/// (with the byte's place), a line that is no JSON or has no text in `field` (with its number).
pub fn read(
    path: &Path,
    field: &str,
    cut: impl Fn(&str) -> Option<usize>,
    read_bytes: &AtomicU64,
    mut each: impl FnMut(Piece) -> Result<()>,
) -> Result<TextCounts> {
    read_until(path, field, cut, read_bytes, |piece| each(piece).map(Continue))
}

/// As [`read`], until `each` breaks: what comes after is neither read nor checked.
pub fn read_until(
    path: &Path,
    field: &str,
    cut: impl Fn(&str) -> Option<usize>,
    read_bytes: &AtomicU64,
    mut each: impl FnMut(Piece) -> Result<ControlFlow<()>>,
) -> Result<TextCounts> {
    let Some((format, compression)) = kind(path) else {
        return Err(bad(
            path,
            "is no text file that can be read here",
            "give .txt or .jsonl files, plain or compressed (.gz, .zst)",
        ));
    };
    let mut input = open(path, compression, read_bytes)?;
    let mut found = TextCounts::default();
    let mut emit = |text: &str, ends_document: bool| {
        found.text_bytes += text.len() as u64;
        found.documents += u64::from(ends_document);
        each(Piece { text: text.to_string(), ends_document })
    };
    let empty_documents = match format {
        Format::Plain => {
            read_plain(path, &mut input, cut, &mut emit)?;
            0
        }
        Format::JsonLines => read_lines(path, &mut input, field, cut, &mut emit)?,
    };
    if found.text_bytes == 0 {
        return Err(bad(path, "holds no text", "leave it out, or give a file with text in it"));
    }
    Ok(TextCounts { empty_documents, ..found })
}

/// Gives each line of a .jsonl file, plain or compressed, with its number from 1; empty lines are
/// passed over. The error of `each` ends the reading and is returned.
///
/// Errors: as [`read`]; another kind of file.
pub fn read_objects(path: &Path, mut each: impl FnMut(u64, Value) -> Result<()>) -> Result<()> {
    let Some((Format::JsonLines, compression)) = kind(path) else {
        return Err(bad(
            path,
            "is no .jsonl file",
            "give .jsonl files, plain or compressed (.gz, .zst)",
        ));
    };
    let read_bytes = AtomicU64::new(0);
    let mut input = open(path, compression, &read_bytes)?;
    for_each_object(path, &mut input, |number, object| each(number, object).map(Continue))
}

/// The text of a file that is not empty.
fn open<'a>(
    path: &Path,
    compression: Compression,
    read_bytes: &'a AtomicU64,
) -> Result<Box<dyn Read + 'a>> {
    estimate_bytes(path)?;
    let file = File::open(path).map_err(Error::io("open", path))?;
    let counted = BufReader::with_capacity(READ_BYTES, Counted { file, read_bytes });
    Ok(match compression {
        Compression::None => Box::new(counted),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(counted)),
        Compression::Zstandard => Box::new(Frames::new(counted)),
    })
}

fn read_plain(
    path: &Path,
    input: &mut dyn Read,
    cut: impl Fn(&str) -> Option<usize>,
    emit: &mut impl FnMut(&str, bool) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let mut pending = String::new();
    let mut bytes = vec![];
    let mut offset = 0u64; // of bytes[0] in the text
    loop {
        let read = Read::take(&mut *input, READ_BYTES as u64).read_to_end(&mut bytes);
        let ended = read.map_err(|error| unreadable(path, error))? == 0;
        let valid = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            Err(error) if error.error_len().is_none() && !ended => {
                std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(error) => return Err(not_utf8(path, offset + error.valid_up_to() as u64)),
        };
        pending.push_str(valid);
        let used = valid.len();
        bytes.drain(..used);
        offset += used as u64;
        let mut start = 0;
        while let Some(length) = cut(&pending[start..]) {
            if emit(&pending[start..start + length], false)?.is_break() {
                return Ok(());
            }
            start += length;
        }
        pending.drain(..start);
        if ended {
            if offset > 0 {
                let _last = emit(&pending, true)?;
            }
            return Ok(());
        }
    }
}

/// Returns the number of lines whose text is empty.
fn read_lines(
    path: &Path,
    input: &mut dyn Read,
    field: &str,
    cut: impl Fn(&str) -> Option<usize>,
    emit: &mut impl FnMut(&str, bool) -> Result<ControlFlow<()>>,
) -> Result<u64> {
    let mut empty_documents = 0;
    for_each_object(path, input, |number, object| {
        let Some(text) = object.get(field).and_then(Value::as_str) else {
            let names: Vec<&str> =
                object.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
            return Err(bad(
                path,
                &format!("line {number} has no text in the field `{field}`"),
                &format!("name the field that holds the text; this line has: {}", names.join(", ")),
            ));
        };
        if text.is_empty() {
            empty_documents += 1;
            return Ok(Continue(()));
        }
        let mut start = 0;
        while let Some(length) = cut(&text[start..]) {
            if emit(&text[start..start + length], false)?.is_break() {
                return Ok(Break(()));
            }
            start += length;
        }
        emit(&text[start..], true)
    })?;
    Ok(empty_documents)
}

/// Each line of JSON with its number, until `each` breaks.
fn for_each_object(
    path: &Path,
    input: &mut dyn Read,
    mut each: impl FnMut(u64, Value) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let mut input = BufReader::with_capacity(READ_BYTES, input);
    let mut line = vec![];
    let mut offset = 0;
    for number in 1u64.. {
        line.clear();
        let read = input.by_ref().take(LONGEST_LINE_BYTES as u64).read_until(b'\n', &mut line);
        let read = read.map_err(|error| unreadable(path, error))?;
        if read == 0 {
            break;
        }
        if read == LONGEST_LINE_BYTES && !line.ends_with(b"\n") {
            return Err(bad(
                path,
                &format!("line {number} is longer than {} MiB", LONGEST_LINE_BYTES >> 20),
                "check that each line is one JSON object, or give the text as .txt",
            ));
        }
        let text = std::str::from_utf8(&line)
            .map_err(|error| not_utf8(path, offset + error.valid_up_to() as u64))?;
        offset += read as u64;
        if text.trim().is_empty() {
            continue;
        }
        let object: Value = serde_json::from_str(text).map_err(|error| {
            bad(
                path,
                &format!("line {number} is no JSON: {error}"),
                "give one JSON object a line, such as {\"text\": \"...\"}",
            )
        })?;
        if each(number, object)?.is_break() {
            break;
        }
    }
    Ok(())
}

struct Counted<'a> {
    file: File,
    read_bytes: &'a AtomicU64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.read_bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

pub(super) fn bad(path: &Path, what: &str, remedy: &str) -> Error {
    Error::Data { path: path.to_path_buf(), what: what.into(), remedy: remedy.into() }
}

fn not_utf8(path: &Path, offset: u64) -> Error {
    bad(
        path,
        &format!("the text is no UTF-8 at byte {offset}"),
        "convert the file to UTF-8 (for example with iconv); nothing was written",
    )
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    use std::io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof};
    match error.kind() {
        UnexpectedEof | InvalidData | InvalidInput | Other => bad(
            path,
            &format!("the compressed text is cut short or damaged: {error}"),
            "copy the file again from where it came",
        ),
        _ => Error::io("read", path)(error),
    }
}

/// Sizes of `paths`, summed, for a progress bar.
pub(crate) fn total_bytes(paths: &[PathBuf]) -> Result<u64> {
    let sizes = paths.iter().map(|path| {
        estimate_bytes(path)?;
        Ok(std::fs::metadata(path).map_err(Error::io("open", path))?.len())
    });
    sizes.sum()
}

//! Reading text files as a stream, and stopping it.

use std::io::Write;
use std::ops::ControlFlow::{Break, Continue};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use isobath::data::corpus::train_on_files;
use isobath::data::text::read_until;

use super::{AUSTEN, assert_message, write_file};

const DOCUMENT_BYTES: usize = 100_000;
const DOCUMENTS: usize = 60;

/// The same text in every kind of file: 6 MB, which ends in what no reader accepts.
fn long_files_with_a_bad_end(folder: &Path) -> Vec<PathBuf> {
    let text: String = AUSTEN.chars().filter(char::is_ascii).take(DOCUMENT_BYTES).collect();
    let mut plain = text.repeat(DOCUMENTS).into_bytes();
    plain.push(0xff);
    let line = serde_json::json!({ "text": text }).to_string() + "\n";
    let lines = line.repeat(DOCUMENTS) + "no JSON\n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let compressed = gzip.finish().unwrap();
    vec![
        write_file(folder, "long.txt", &plain),
        write_file(folder, "long.jsonl", lines.as_bytes()),
        write_file(folder, "long.txt.gz", &compressed),
    ]
}

#[test]
fn reading_ends_where_it_is_told_to() {
    let folder = tempfile::tempdir().unwrap();
    for path in long_files_with_a_bad_end(folder.path()) {
        let read_bytes = AtomicU64::new(0);
        let read = |most: usize| {
            let mut bytes = 0;
            let cut = |text: &str| (text.len() >= 10_000).then_some(10_000);
            read_until(&path, "text", cut, &read_bytes, |piece| {
                bytes += piece.text.len();
                Ok(if bytes >= most { Break(()) } else { Continue(()) })
            })
        };
        let counts = read(130_000).unwrap();
        assert_eq!(counts.text_bytes, 130_000, "{}", path.display());
        let (read_bytes, whole) =
            (read_bytes.load(Ordering::Relaxed), std::fs::metadata(&path).unwrap().len());
        assert!(read_bytes <= whole / 4, "{}: {read_bytes} of {whole} bytes", path.display());
        assert!(read(usize::MAX).is_err(), "{}: the end is bad", path.display());
    }
}

#[test]
fn a_tokenizer_reads_no_further_than_it_trains() {
    let folder = tempfile::tempdir().unwrap();
    for path in long_files_with_a_bad_end(folder.path()) {
        let train = |bytes| train_on_files(std::slice::from_ref(&path), "text", 300, bytes, false);
        let tokenizer = train(Some(150_000)).unwrap();
        assert_eq!(tokenizer.vocab(), 300);
        let path = path.display().to_string();
        assert_message(train(None).map(|_| ()), &[&path, "remedy: "]);
    }
}

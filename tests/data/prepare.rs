//! Text files into shards: nothing lost, nothing left behind, whatever the input.

use std::io::Write;
use std::path::{Path, PathBuf};

use isobath::data::prepare::{PrepareOptions, Prepared, prepare};
use isobath::data::{Shard, Tokenizer, shard};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::{AUSTEN, assert_message, files, write_file};

fn run(inputs: &[PathBuf], folder: &Path, tokenizer: &Tokenizer) -> isobath::Result<Prepared> {
    prepare(&PrepareOptions::new(inputs.to_vec(), folder), tokenizer)
}

fn texts(shard: &Shard, tokenizer: &Tokenizer) -> Vec<String> {
    (0..shard.documents())
        .map(|document| {
            let mut tokens = vec![];
            shard.read(shard.document(document).unwrap(), &mut tokens).unwrap();
            assert_eq!(tokens.pop(), tokenizer.end_of_text(), "document {document} ends");
            tokenizer.decode(&tokens).unwrap()
        })
        .collect()
}

#[test]
fn a_long_text_is_one_document_with_the_tokens_of_one_call() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::train([&AUSTEN[..200_000]], 600).unwrap();
    let input = write_file(folder.path(), "austen.txt", AUSTEN.as_bytes());
    let out = folder.path().join("out");
    let prepared = run(&[input], &out, &tokenizer).unwrap();
    let shard = Shard::open(&prepared.shards[0]).unwrap();
    let plain: tokenizers::Tokenizer = tokenizer.json().parse().unwrap();
    let mut expected = plain.encode_fast(AUSTEN, false).unwrap().get_ids().to_vec();
    expected.push(0);
    let mut tokens = vec![];
    shard.read(0..shard.len(), &mut tokens).unwrap();
    assert!(tokens == expected);
    assert_eq!((prepared.documents, shard.documents()), (1, 1));
    assert_eq!(
        (prepared.text_bytes, shard.text_bytes()),
        (AUSTEN.len() as u64, AUSTEN.len() as u64)
    );
    assert_eq!(prepared.tokens, shard.len());
    assert_eq!(files(&out), ["shard-00000.tok", "tokenizer.json"]);
    shard
        .check_tokenizer(&Tokenizer::open(out.join("tokenizer.json").to_str().unwrap()).unwrap())
        .unwrap();
}

#[test]
fn every_format_and_compression_gives_the_same_documents() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = Tokenizer::bytes().unwrap();
    let documents =
        ["first\nline", "zweites \u{e4}\u{1f642}", "  spaces kept  \n", &AUSTEN[..150_000]];
    let lines: String = documents
        .iter()
        .map(|text| serde_json::json!({"id": 1, "body": text}).to_string() + "\n")
        .collect();
    let lines = format!("{lines}\n{}\n", serde_json::json!({"body": ""}));
    let gzip = |contents: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(contents).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |contents: &[u8]| compress_to_vec(contents, CompressionLevel::Fastest);
    let inputs = [
        ("a.jsonl", lines.clone().into_bytes()),
        ("a.jsonl.gz", gzip(lines.as_bytes())),
        ("a.jsonl.zst", zstd(lines.as_bytes())),
        // Members and frames that follow one another are one text.
        ("two.txt.gz", [gzip(b"one "), gzip(b"text")].concat()),
        ("two.txt.zst", [zstd(b"one "), zstd(b"text")].concat()),
    ];
    for (name, contents) in inputs {
        let input = write_file(folder.path(), name, &contents);
        let out = folder.path().join(format!("out-{name}"));
        let mut options = PrepareOptions::new(vec![input], &out);
        options.field = "body".into();
        let prepared = prepare(&options, &bytes).unwrap();
        let found = texts(&Shard::open(&prepared.shards[0]).unwrap(), &bytes);
        if name.starts_with('a') {
            assert_eq!(found, documents, "{name}");
            assert_eq!(prepared.empty_documents, 1, "{name}");
        } else {
            assert_eq!(found, ["one text"], "{name}");
        }
    }
}

#[test]
fn shards_end_at_the_size_asked_for_and_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = Tokenizer::bytes().unwrap();
    let input = write_file(folder.path(), "a.txt", &AUSTEN.as_bytes()[..300_000]);
    let mut options = PrepareOptions::new(vec![input], folder.path().join("out"));
    options.shard_bytes = 100_000;
    let prepared = prepare(&options, &bytes).unwrap();
    assert_eq!(prepared.shards.len(), 7, "300001 tokens of 2 bytes in shards of 50000 tokens");
    let mut text = String::new();
    for shard in shard::open_all(&options.folder).unwrap() {
        let mut tokens = vec![];
        shard.read(0..shard.len(), &mut tokens).unwrap();
        assert!(shard.len() <= 50_000);
        text += &bytes.decode(&tokens).unwrap();
    }
    assert!(text == format!("{}<|endoftext|>", &AUSTEN[..300_000]));
}

/// Prepares a good file and then `name`; the error must name it, and nothing may be left or
/// touched.
fn refused(name: &str, contents: Option<&[u8]>, parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let bytes = Tokenizer::bytes().unwrap();
    let good = write_file(folder.path(), "good.txt", &AUSTEN.as_bytes()[..400_000]);
    let out = folder.path().join("out");
    run(std::slice::from_ref(&good), &out, &bytes).unwrap();
    let before = std::fs::read(out.join("shard-00000.tok")).unwrap();
    let bad = match contents {
        Some(contents) => write_file(folder.path(), name, contents),
        None => folder.path().join(name),
    };
    let mut options = PrepareOptions::new(vec![good, bad], &out);
    options.name = "second".into();
    options.shard_bytes = 100_000;
    let mut parts = parts.to_vec();
    parts.push(name);
    assert_message(prepare(&options, &bytes), &parts);
    assert_eq!(files(&out), ["shard-00000.tok", "tokenizer.json"], "{name}");
    assert!(std::fs::read(out.join("shard-00000.tok")).unwrap() == before);
}

#[test]
fn a_missing_file_is_named_and_nothing_is_lost() {
    refused("missing.txt", None, &["open", "check the path"]);
}

#[test]
fn an_empty_file_is_named_and_nothing_is_lost() {
    refused("empty.txt", Some(b""), &["is empty"]);
    refused("blank.jsonl", Some(b"\n\n"), &["holds no text"]);
}

#[test]
fn invalid_utf8_is_named_with_its_place_and_nothing_is_lost() {
    let mut text = AUSTEN.as_bytes()[..700_000].to_vec();
    text[600_001] = 0xFF;
    refused("latin1.txt", Some(&text), &["no UTF-8 at byte 600001"]);
    refused(
        "cut.txt",
        Some("ends in a half \u{e4}".as_bytes().split_last().unwrap().1),
        &["byte 15"],
    );
    refused(
        "bad.jsonl",
        Some(b"{\"text\": \"a\"}\n{\"text\": \"\xFF\"}\n"),
        &["no UTF-8 at byte 24"],
    );
}

#[test]
fn lines_that_are_no_json_or_have_no_text_are_named_with_their_number() {
    refused("a.jsonl", Some(b"{\"text\": \"a\"}\n{\"text\": \n"), &["line 2 is no JSON"]);
    refused(
        "b.jsonl",
        Some(b"{\"text\": \"a\"}\n\n{\"body\": \"b\", \"id\": 3}\n"),
        &["line 3 has no text in the field `text`", "body, id"],
    );
    refused("c.jsonl", Some(b"{\"text\": 5}\n"), &["line 1 has no text"]);
}

#[test]
fn compressed_text_that_is_cut_short_is_refused() {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(&AUSTEN.as_bytes()[..500_000]).unwrap();
    let gzip = encoder.finish().unwrap();
    refused("cut.txt.gz", Some(&gzip[..gzip.len() / 2]), &["cut short or damaged"]);
    refused("no.txt.gz", Some(b"plain text, no gzip"), &["cut short or damaged"]);
}

/// By zstd 1.5: a frame of 12,000 bytes with its checksum, a skippable one, the next 12,000 bytes
/// without a checksum, and an empty frame; of `AUSTEN`'s beginning.
const FRAMES: &[u8] = include_bytes!("files/frames.txt.zst");
/// Where the first frame ends, and the second.
const FRAME_ENDS: [usize; 2] = [5168, 5181];

#[test]
fn frames_of_zstandard_are_one_text() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = Tokenizer::bytes().unwrap();
    let input = write_file(folder.path(), "frames.txt.zst", FRAMES);
    let prepared = prepare(&PrepareOptions::new(vec![input], folder.path()), &bytes).unwrap();
    let found = texts(&Shard::open(&prepared.shards[0]).unwrap(), &bytes);
    assert_eq!(found, [&AUSTEN[..24_000]]);
}

#[test]
fn frames_of_zstandard_that_are_cut_short_or_damaged_are_refused() {
    let [first, second] = FRAME_ENDS;
    for cut in [3, first / 2, first - 2, first + 2, second - 2, second + 100, FRAMES.len() - 1] {
        refused("cut.txt.zst", Some(&FRAMES[..cut]), &["cut short or damaged"]);
    }
    let changed = |at: usize| {
        let mut frames = FRAMES.to_vec();
        frames[at] ^= 1;
        frames
    };
    refused("sum.txt.zst", Some(&changed(first - 1)), &["a frame's checksum is not that of"]);
    refused("magic.txt.zst", Some(&changed(second)), &["cut short or damaged"]);
    refused("no.txt.zst", Some(b"plain text, no frame"), &["cut short or damaged"]);
}

#[test]
fn other_kinds_of_files_are_refused() {
    refused("table.csv", Some(b"a,b"), &["no text file", ".jsonl"]);
}

#[test]
fn a_folder_of_another_tokenizer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let input = write_file(folder.path(), "a.txt", b"some text");
    let out = folder.path().join("out");
    run(std::slice::from_ref(&input), &out, &Tokenizer::bytes().unwrap()).unwrap();
    let other = Tokenizer::train([AUSTEN], 300).unwrap();
    assert_message(run(&[input], &out, &other), &["another tokenizer"]);
}

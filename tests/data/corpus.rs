//! A configuration resolved into training and held-out tokens.

use std::path::Path;

use isobath::config::{Attention, DataConfig, Format, Rows};
use isobath::data::prepare::{PrepareOptions, prepare};
use isobath::data::{Corpus, TokenSource, Tokenizer};

use super::{AUSTEN, assert_message, files, write_file};

fn config(train: &[&str], tokenizer: &str) -> DataConfig {
    DataConfig {
        train: train.iter().map(|spec| spec.to_string()).collect(),
        valid: vec![],
        held_out: 0.1,
        tokenizer: tokenizer.into(),
        format: Format::Text,
        field: "text".into(),
        rows: Rows::Packed,
        attention: Attention::Row,
        sequence: 64,
    }
}

fn text(source: &TokenSource, tokenizer: &Tokenizer) -> String {
    let mut tokens = vec![];
    source.read(0..source.tokens(), &mut tokens).unwrap();
    tokenizer.decode(&tokens).unwrap()
}

fn open(config: &DataConfig, cache: &Path) -> isobath::Result<Corpus> {
    Corpus::open(config, cache, false)
}

#[test]
fn the_bundled_text_is_cut_at_nine_tenths_before_anything_else() {
    let cache = tempfile::tempdir().unwrap();
    let corpus = open(&config(&["bundled:austen"], "train:1024"), cache.path()).unwrap();
    let cut = AUSTEN.len() * 9 / 10;
    let (train, valid) = AUSTEN.split_at(cut);
    assert!(text(&corpus.train, &corpus.tokenizer) == train);
    assert!(text(&corpus.valid, &corpus.tokenizer) == format!("{valid}<|endoftext|>"));
    assert_eq!(corpus.train.text_bytes(), cut as u64);
    assert_eq!(corpus.valid.text_bytes(), valid.len() as u64);
    let trained = Tokenizer::train([train], 1024).unwrap();
    assert_eq!(corpus.tokenizer.fingerprint(), trained.fingerprint(), "trained on that part only");
    assert!(files(cache.path()).is_empty());
}

#[test]
fn large_text_is_prepared_once_and_is_what_memory_would_hold() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let first = write_file(folder.path(), "a.txt", &AUSTEN.as_bytes()[..700_000]);
    let second = write_file(folder.path(), "b.txt", &AUSTEN.as_bytes()[700_000..900_000]);
    let config = config(&[first.to_str().unwrap(), second.to_str().unwrap()], "train:500");
    let memory = open(&config, &cache).unwrap();
    assert!(!cache.exists());
    let large = Corpus::open_with(&config, &cache, false, 1000).unwrap();
    assert_eq!(large.tokenizer.fingerprint(), memory.tokenizer.fingerprint());
    for (large, memory) in [(&large.train, &memory.train), (&large.valid, &memory.valid)] {
        assert_eq!(large.tokens(), memory.tokens());
        assert_eq!(large.documents(), memory.documents());
        assert_eq!(large.text_bytes(), memory.text_bytes());
    }
    assert!(text(&large.train, &large.tokenizer) == text(&memory.train, &memory.tokenizer));
    assert!(text(&large.valid, &large.tokenizer) == text(&memory.valid, &memory.tokenizer));
    let made = files(&cache);
    assert_eq!(made.len(), 1, "one folder, nothing unfinished: {made:?}");
    let marker = cache.join(&made[0]).join("marker");
    std::fs::write(&marker, "").unwrap();
    Corpus::open_with(&config, &cache, false, 1000).unwrap();
    assert!(marker.exists() && files(&cache) == made, "found again");
    write_file(folder.path(), "b.txt", b"a file that has changed since then");
    Corpus::open_with(&config, &cache, false, 1000).unwrap();
    assert_eq!(files(&cache).len(), 2, "prepared anew");
}

#[test]
fn shards_are_held_out_from_a_document_end_if_one_is_near() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..200)
        .map(|i| serde_json::json!({"text": &AUSTEN[i * 500..][..400]}).to_string() + "\n")
        .collect();
    let input = write_file(folder.path(), "a.jsonl", lines.as_bytes());
    let out = folder.path().join("out");
    prepare(&PrepareOptions::new(vec![input], &out), &Tokenizer::bytes().unwrap()).unwrap();
    let corpus = open(&config(&[out.to_str().unwrap()], "bytes"), folder.path()).unwrap();
    assert_eq!((corpus.train.documents(), corpus.valid.documents()), (180, 20));
    assert_eq!((corpus.train.text_bytes(), corpus.valid.text_bytes()), (72_000, 8_000));
    assert_eq!(corpus.valid.tokens(), 20 * 401);
}

#[test]
fn shards_of_one_document_are_cut_within_it_with_exact_text_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let input = write_file(folder.path(), "a.txt", &AUSTEN.as_bytes()[..500_000]);
    let out = folder.path().join("out");
    let tokenizer = Tokenizer::train([AUSTEN], 500).unwrap();
    prepare(&PrepareOptions::new(vec![input], &out), &tokenizer).unwrap();
    let spec = out.join("tokenizer.json");
    let corpus =
        open(&config(&[out.to_str().unwrap()], spec.to_str().unwrap()), folder.path()).unwrap();
    let train = text(&corpus.train, &tokenizer);
    assert_eq!(corpus.train.text_bytes(), train.len() as u64);
    assert_eq!(corpus.valid.text_bytes(), 500_000 - train.len() as u64);
    assert!(AUSTEN.starts_with(&train));
}

#[test]
fn held_out_files_are_used_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let train = write_file(folder.path(), "a.txt", &AUSTEN.as_bytes()[..50_000]);
    let valid = write_file(folder.path(), "b.txt", b"what is held out");
    let mut config = config(&[train.to_str().unwrap()], "bytes");
    config.valid = vec![valid.to_str().unwrap().into()];
    let corpus = open(&config, folder.path()).unwrap();
    assert_eq!(text(&corpus.valid, &corpus.tokenizer), "what is held out<|endoftext|>");
    assert_eq!((corpus.train.tokens(), corpus.valid.text_bytes()), (50_001, 16));
    config.valid = vec![];
    config.held_out = 0.0;
    let corpus = open(&config, folder.path()).unwrap();
    assert_eq!((corpus.train.tokens(), corpus.valid.tokens()), (50_001, 0));
}

#[test]
fn the_boundary_is_never_inside_a_character() {
    let folder = tempfile::tempdir().unwrap();
    for count in 1..40 {
        let input = write_file(folder.path(), "a.txt", "🙂".repeat(count).as_bytes());
        let spec = [input.to_str().unwrap()];
        for in_memory in [0, u64::MAX] {
            let cache = folder.path().join("cache");
            let config = DataConfig { held_out: 0.3, ..config(&spec, "bytes") };
            let Ok(corpus) = Corpus::open_with(&config, &cache, false, in_memory) else {
                assert_eq!(count, 1, "one character cannot be divided");
                continue;
            };
            let both =
                text(&corpus.train, &corpus.tokenizer) + &text(&corpus.valid, &corpus.tokenizer);
            assert_eq!(both.replace("<|endoftext|>", ""), "🙂".repeat(count));
        }
    }
}

#[test]
fn specs_that_cannot_work_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |config: DataConfig, parts: &[&str]| {
        assert_message(open(&config, folder.path()).map(|_| ()), parts);
    };
    let path = write_file(folder.path(), "a.txt", b"some text");
    let input = path.to_str().unwrap();
    refused(config(&[], "bytes"), &["data.train is empty"]);
    refused(config(&["nowhere.txt"], "bytes"), &["nowhere.txt", "check the path"]);
    refused(config(&["bundled:dickens"], "bytes"), &["bundled:dickens"]);
    refused(config(&[input, "a.tok"], "bytes"), &["text and shards together"]);
    refused(config(&[input], "train:many"), &["train:many"]);
    refused(config(&["some/a.tok"], "train:300"), &["tokenized already", "some/tokenizer.json"]);
    refused(config(&[folder.path().to_str().unwrap()], "bytes"), &["holds no shards"]);
    refused(DataConfig { held_out: 1.0, ..config(&[input], "bytes") }, &["data.held_out is 1"]);
    let out = folder.path().join("out");
    prepare(&PrepareOptions::new(vec![path.clone()], &out), &Tokenizer::bytes().unwrap()).unwrap();
    let other = write_file(
        folder.path(),
        "other.json",
        Tokenizer::train([AUSTEN], 300).unwrap().json().as_bytes(),
    );
    refused(
        config(&[out.to_str().unwrap()], other.to_str().unwrap()),
        &["shard-00000.tok", "was made with the tokenizer", "other.json"],
    );
}

//! From text to batches; one module for each file of src/data.

mod corpus;
mod examples;
mod loader;
mod packing;
mod prepare;
mod shard;
mod supervised;
mod text;
mod tokenizer;
mod windows;

use std::path::{Path, PathBuf};

use isobath::data::tokenizer::Tokenizer;
use isobath::data::{Shard, ShardWriter};

pub const AUSTEN: &str = include_str!("../assets/austen.txt");

/// Some tokens of every size of document, 0 and 1 included; ids below 256.
pub fn documents(count: u64) -> Vec<Vec<u32>> {
    (0..count)
        .map(|i| {
            let random = isobath::random::Philox::new(5, i);
            let length = u64::from(random.at(0)[0]) % 40;
            (0..length).map(|token| random.at(1 + token)[0] % 256).collect()
        })
        .collect()
}

/// Writes `documents` as shards of the byte tokenizer and opens them.
pub fn write(folder: &Path, documents: &[Vec<u32>], shard_bytes: u64) -> Vec<Shard> {
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut writer = ShardWriter::create(folder, "shard", &tokenizer, shard_bytes).unwrap();
    for document in documents {
        writer.push(document, document.len() as u64).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish().unwrap().iter().map(|path| Shard::open(path).unwrap()).collect()
}

/// Names of the files in `folder`, sorted.
pub fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub fn write_file(folder: &Path, name: &str, contents: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, contents).unwrap();
    path
}

/// The message of an error, which must hold all of `parts`.
#[track_caller]
pub fn assert_message<T>(result: isobath::Result<T>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("an error was expected that says {parts:?}"),
        Err(error) => error.to_string(),
    };
    for part in parts.iter().chain(&["remedy:"]) {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

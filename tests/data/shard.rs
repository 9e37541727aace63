//! Shards on disk: what is written is read, and nothing damaged is.

use isobath::data::shard::{self, Shard};
use isobath::data::{ShardWriter, Tokenizer};

use super::{assert_message, documents, files, write};

#[test]
fn tokens_documents_and_text_bytes_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let documents = documents(500);
    let shard = &write(folder.path(), &documents, 1 << 20)[0];
    let full: Vec<&Vec<u32>> = documents.iter().filter(|tokens| !tokens.is_empty()).collect();
    assert_eq!(shard.documents(), full.len() as u64, "empty documents are not recorded");
    assert_eq!((shard.vocab(), shard.id_bytes(), shard.part()), (257, 2, (0, 1)));
    for (i, expected) in full.iter().enumerate() {
        let mut tokens = vec![];
        shard.read(shard.document(i as u64).unwrap(), &mut tokens).unwrap();
        assert_eq!(&tokens, *expected, "document {i}");
    }
    assert_eq!(shard.len(), documents.iter().map(Vec::len).sum::<usize>() as u64);
    assert_eq!(shard.text_bytes(), shard.len());
    assert_eq!(files(folder.path()), ["shard-00000.tok"]);
}

#[test]
fn large_vocabularies_take_four_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut layout: serde_json::Value =
        serde_json::from_str(Tokenizer::bytes().unwrap().json()).unwrap();
    layout["model"]["vocab"]["many"] = 70_000.into();
    let large = Tokenizer::from_json(layout.to_string().as_bytes(), "large".as_ref()).unwrap();
    assert_eq!(large.vocab(), 70_001);
    let mut writer = ShardWriter::create(folder.path(), "large", &large, 1 << 20).unwrap();
    writer.push(&[1, 70_000, 65_536], 6).unwrap();
    assert_message(writer.push(&[70_001], 1), &["token 70001", "vocabulary of 70001"]);
    let shard = Shard::open(&writer.finish().unwrap()[0]).unwrap();
    let mut tokens = vec![];
    shard.read(0..3, &mut tokens).unwrap();
    assert_eq!((tokens, shard.id_bytes()), (vec![1, 70_000, 65_536], 4));
}

#[test]
fn every_flipped_bit_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), &documents(20), 1 << 20)[0].path().to_path_buf();
    let good = std::fs::read(&path).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, bad).unwrap();
        let found = Shard::open(&path).and_then(|shard| shard.verify());
        assert!(found.is_err(), "bit {} of byte {}", bit % 8, bit / 8);
    }
}

#[test]
fn a_damaged_block_is_refused_where_it_is_read_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..200_000).map(|i| i * 7 % 256).collect();
    let path = write(folder.path(), &[tokens], 1 << 20)[0].path().to_path_buf();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[128 + 2 * 65536 + 5] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    let shard = Shard::open(&path).unwrap();
    let mut out = vec![];
    shard.read(0..65_536, &mut out).unwrap();
    assert_eq!(out.len(), 65_536);
    let damaged = ["block 2", "is damaged", "shard-00000.tok"];
    assert_message(shard.read(65_530..65_540, &mut out), &damaged);
    assert_eq!(out.len(), 65_536, "nothing of a damaged block is handed out");
    assert_message(shard.verify(), &damaged);
}

#[test]
fn a_shard_cut_short_is_refused_with_both_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), &documents(200), 1 << 20)[0].path().to_path_buf();
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, &good[..good.len() - 1]).unwrap();
    let (short, whole) = (good.len() - 1, good.len());
    assert_message(
        Shard::open(&path),
        &["cut short", &format!("{short} bytes"), &format!("says {whole}")],
    );
    std::fs::write(&path, &good[..50]).unwrap();
    assert_message(Shard::open(&path), &["cut short"]);
    std::fs::write(&path, b"").unwrap();
    assert_message(Shard::open(&path), &["is empty"]);
    std::fs::write(&path, b"some text that is no shard").unwrap();
    assert_message(Shard::open(&path), &["not a shard"]);
    std::fs::write(&path, [&good[..], b"x"].concat()).unwrap();
    assert_message(Shard::open(&path), &["too long"]);
}

#[test]
fn a_tokenizer_that_did_not_make_the_shard_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let shard = write(folder.path(), &documents(5), 1 << 20).remove(0);
    let other = Tokenizer::train(["some other text, some other tokens"], 300).unwrap();
    let [made, given] =
        [shard.fingerprint(), other.fingerprint()].map(|print| shard::short(&print));
    assert_message(shard.check_tokenizer(&other), &[&made, &given, "train:300"]);
    shard.check_tokenizer(&Tokenizer::bytes().unwrap()).unwrap();
}

#[test]
fn a_missing_part_of_a_set_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let shards = write(folder.path(), &documents(200), 1000);
    assert!(shards.len() > 3);
    assert_eq!(shard::open_all(folder.path()).unwrap().len(), shards.len());
    let last = shards.len() - 1;
    for missing in [last, 1, 0] {
        let path = shards[missing].path();
        std::fs::rename(path, path.with_extension("away")).unwrap();
        assert_message(shard::open_all(folder.path()), &["is missing here"]);
        std::fs::rename(path.with_extension("away"), path).unwrap();
    }
}

#[test]
fn an_unfinished_writer_leaves_nothing_and_a_second_one_overwrites_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut writer = ShardWriter::create(folder.path(), "shard", &tokenizer, 100).unwrap();
    writer.push(&[7; 500], 500).unwrap();
    assert!(!files(folder.path()).contains(&"shard-00000.tok".to_string()));
    drop(writer);
    assert!(files(folder.path()).is_empty());
    write(folder.path(), &documents(5), 1 << 20);
    assert_message(
        ShardWriter::create(folder.path(), "shard", &tokenizer, 100),
        &["shard-00000.tok", "there already"],
    );
}

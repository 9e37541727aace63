//! Rows and batches: every token once, in an order that a few integers restore.

use isobath::config::Rows;
use isobath::data::shuffle::Permutation;
use isobath::data::{
    Batch, Loader, LoaderOptions, LoaderState, Prefetch, Shard, TokenSource, Tokenizer,
};
use isobath::tensor::IGNORE_INDEX;

use super::{assert_message, documents, write};

fn options(rows: Rows, sequence: usize, micro_batch: usize) -> LoaderOptions {
    LoaderOptions { rows, documents: false, sequence, micro_batch, seed: 11 }
}

fn bytes() -> Tokenizer {
    Tokenizer::bytes().unwrap()
}

#[test]
fn a_permutation_reaches_every_index_once_and_differs_by_epoch() {
    for n in [1, 2, 3, 5, 16, 17, 1000, 4097] {
        let mut seen: Vec<u64> = (0..n).map(|i| Permutation::new(n, 1, 0).at(i)).collect();
        let order = seen.clone();
        seen.sort_unstable();
        assert!(seen.iter().copied().eq(0..n), "n = {n}");
        if n >= 1000 {
            let fixed = (0..n).filter(|&i| order[i as usize] == i).count();
            assert!(fixed < 10, "{fixed} of {n} stay in place");
            for (seed, epoch) in [(1, 1), (2, 0)] {
                let other = Permutation::new(n, seed, epoch);
                let same = (0..n).filter(|&i| other.at(i) == order[i as usize]).count();
                assert!(same < 10, "{same} of {n} agree with seed {seed}, epoch {epoch}");
            }
        }
    }
    let huge = Permutation::new(u64::MAX, 1, 0);
    assert_ne!(huge.at(u64::MAX - 1), huge.at(0));
}

/// The 24 orders of four elements, over many seeds.
#[test]
fn small_permutations_are_all_as_likely() {
    let mut counts = std::collections::BTreeMap::new();
    let trials = 24_000;
    for seed in 0..trials {
        let order: Vec<u64> = (0..4).map(|i| Permutation::new(4, seed, 0).at(i)).collect();
        *counts.entry(order).or_insert(0) += 1;
    }
    let chi: f64 =
        counts.values().map(|&count: &i32| f64::from(count - 1000).powi(2) / 1000.0).sum();
    // 23 degrees of freedom: above 64.7 once in 100,000 times.
    assert!(counts.len() == 24 && chi < 64.7, "{} orders, chi-squared {chi:.1}", counts.len());
}

#[test]
fn packed_rows_predict_every_token_but_the_first_once() {
    let sequence = 7;
    for extra in 0..7 {
        let tokens: Vec<u32> = (0..7 * 13 + 1 + extra).collect::<Vec<u32>>();
        let tokens: Vec<u32> = tokens.iter().map(|t| t % 256).collect();
        let source = TokenSource::from_tokens(tokens.clone(), &bytes()).unwrap();
        let mut loader = Loader::new(&source, options(Rows::Packed, sequence, 1)).unwrap();
        assert_eq!(loader.rows_per_epoch(), 13);
        let mut predicted = vec![0; 13];
        for _ in 0..13 {
            let batch = loader.next_batch().unwrap();
            let row = batch.tokens[0] as usize / sequence;
            predicted[row] += 1;
            let start = row * sequence;
            let stream: Vec<i32> =
                tokens[start..=start + sequence].iter().map(|&t| t as i32).collect();
            assert_eq!(batch.tokens, stream[..sequence], "row {row} [S]");
            assert_eq!(batch.targets, stream[1..], "row {row} [S]");
            assert_eq!(batch.predicted, sequence);
        }
        assert_eq!(predicted, [1; 13]);
    }
}

#[test]
fn document_rows_hold_one_document_and_do_not_predict_padding() {
    let documents: Vec<Vec<u32>> = documents(60).into_iter().filter(|d| !d.is_empty()).collect();
    let sequence = 16;
    let source = TokenSource::from_documents(
        documents.iter().map(|tokens| (tokens.clone(), 0)).collect(),
        &bytes(),
    )
    .unwrap();
    let count = documents.len();
    let mut loader = Loader::new(&source, options(Rows::Document, sequence, count)).unwrap();
    let batch = loader.next_batch().unwrap();
    let mut found: Vec<Vec<u32>> = vec![];
    let mut predicted = 0;
    for row in 0..count {
        let inputs = &batch.tokens[row * sequence..][..sequence];
        let targets = &batch.targets[row * sequence..][..sequence];
        let length = targets.iter().take_while(|&&target| target != IGNORE_INDEX).count();
        assert!(targets[length..].iter().all(|&target| target == IGNORE_INDEX));
        assert!(
            inputs.iter().skip(length + 1).all(|&token| token == 256),
            "padding is the end token"
        );
        predicted += length;
        let whole = inputs[..1].iter().chain(&targets[..length]);
        found.push(whole.map(|&token| token as u32).collect());
        assert_eq!(inputs[1..length.max(1)], targets[..length.max(1) - 1]);
    }
    assert_eq!(batch.predicted, predicted);
    let mut expected: Vec<Vec<u32>> =
        documents.iter().map(|d| d[..d.len().min(sequence + 1)].to_vec()).collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// Documents of 0 to many tokens, in memory and in shards that cut them: the starts are those of
/// the documents themselves, counted from the beginning of each row.
#[test]
fn packed_rows_say_where_their_documents_begin() {
    let documents: Vec<Vec<u32>> = documents(80).into_iter().filter(|d| !d.is_empty()).collect();
    let of_memory = TokenSource::from_documents(
        documents.iter().map(|tokens| (tokens.clone(), 0)).collect(),
        &bytes(),
    )
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &documents, 600);
    let shards = isobath::data::shard::open_all(folder.path()).unwrap();
    let of_shards = TokenSource::from_shards(shards, &bytes()).unwrap();
    for source in [of_memory, of_shards] {
        // Where the document of each token of the stream begins.
        let mut begins = vec![];
        for index in 0..source.documents() {
            let document = source.document(index).unwrap();
            begins.extend(document.clone().map(|_| document.start));
        }
        assert_eq!(begins.len() as u64, source.tokens());
        let sequence = 21;
        let options = LoaderOptions { documents: true, ..options(Rows::Packed, sequence, 1) };
        let mut loader = Loader::new(&source, options).unwrap();
        let mut rows_of_many = 0;
        for row in 0..loader.rows_per_epoch() {
            let batch = loader.next_batch().unwrap();
            let first = Permutation::new(loader.rows_per_epoch(), 11, 0).at(row) * sequence as u64;
            let expected: Vec<i32> = (first..first + sequence as u64)
                .map(|token| begins[token as usize].saturating_sub(first) as i32)
                .collect();
            assert_eq!(batch.document_starts.unwrap(), expected, "row {row}");
            rows_of_many += usize::from(expected[0] != expected[sequence - 1]);
        }
        assert!(rows_of_many > 5, "{rows_of_many} rows with several documents");
    }
}

fn batches(loader: &mut Loader, count: usize) -> Vec<Batch> {
    (0..count).map(|_| loader.next_batch().unwrap()).collect()
}

#[test]
fn a_restored_loader_goes_on_exactly_across_epochs() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &documents(100), 600);
    for rows in [Rows::Packed, Rows::Document] {
        let open = || {
            let shards = isobath::data::shard::open_all(folder.path()).unwrap();
            TokenSource::from_shards(shards, &bytes()).unwrap()
        };
        let options = options(rows, 9, 4);
        let mut loader = Loader::new(&open(), options).unwrap();
        let per_epoch = loader.rows_per_epoch() as usize;
        batches(&mut loader, per_epoch / 4);
        let saved = serde_json::to_string(&loader.state()).unwrap();
        let expected = batches(&mut loader, per_epoch);
        let state: LoaderState = serde_json::from_str(&saved).unwrap();
        let mut restored = Loader::restore(&open(), options, &state).unwrap();
        assert_eq!(batches(&mut restored, per_epoch), expected);
        assert_eq!(restored.state(), loader.state());
        // Other micro-batches see the same rows in the same order.
        let halves = LoaderOptions { micro_batch: 2, ..options };
        let mut restored = Loader::restore(&open(), halves, &state).unwrap();
        let first = batches(&mut restored, 2);
        assert_eq!([&first[0].tokens[..], &first[1].tokens[..]].concat(), expected[0].tokens);
    }
}

#[test]
fn a_state_of_other_data_is_refused() {
    let source = TokenSource::from_tokens((0..200).collect(), &bytes()).unwrap();
    let other = TokenSource::from_tokens((1..201).collect(), &bytes()).unwrap();
    let options = options(Rows::Packed, 8, 2);
    let state = Loader::new(&source, options).unwrap().state();
    let refused = |source, options, what| {
        assert_message(
            Loader::restore(source, options, &state),
            &["the saved position belongs to other data", what],
        );
    };
    refused(&other, options, "its tokens differ");
    refused(&source, LoaderOptions { sequence: 9, ..options }, "its sequence differ");
    refused(&source, LoaderOptions { seed: 12, ..options }, "its seed differ");
    refused(&source, LoaderOptions { rows: Rows::Document, ..options }, "its rows differ");
}

#[test]
fn a_sequence_longer_than_the_data_is_refused_with_both_numbers() {
    let source = TokenSource::from_tokens((0..100).collect(), &bytes()).unwrap();
    assert_message(
        Loader::new(&source, options(Rows::Packed, 100, 1)),
        &["100 tokens", "one row of 100", "needs 101"],
    );
    let mut fits = Loader::new(&source, options(Rows::Packed, 99, 1)).unwrap();
    assert_eq!(fits.next_batch().unwrap().predicted, 99);
    let empty = TokenSource::from_documents(vec![], &bytes()).unwrap();
    assert_message(Loader::new(&empty, options(Rows::Document, 8, 1)), &["0 tokens"]);
    assert_message(Loader::new(&source, options(Rows::Packed, 0, 1)), &["at least 1"]);
}

#[test]
fn documents_that_go_on_in_the_next_shard_stay_whole() {
    let documents: Vec<Vec<u32>> = documents(120).into_iter().filter(|d| !d.is_empty()).collect();
    let tokenizer = bytes();
    let memory = TokenSource::from_documents(
        documents.iter().map(|d| (d.clone(), d.len() as u64)).collect(),
        &tokenizer,
    )
    .unwrap();
    for shard_bytes in [2, 14, 30, 100, 1 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let shards = write(folder.path(), &documents, shard_bytes);
        let source = TokenSource::from_shards(shards, &tokenizer).unwrap();
        assert_eq!(source.documents(), documents.len() as u64, "shards of {shard_bytes} bytes");
        for i in 0..source.documents() {
            let range = source.document(i).unwrap();
            assert_eq!(range, memory.document(i).unwrap(), "document {i}, shards of {shard_bytes}");
            let mut tokens = vec![];
            source.read(range, &mut tokens).unwrap();
            assert_eq!(tokens, documents[i as usize]);
        }
        for at in [0, 1, 17, source.tokens() / 2, source.tokens()] {
            for (slice, range) in [(0..at, 0..at), (at..source.tokens(), at..source.tokens())] {
                let (a, b) = (
                    source.slice(slice, &tokenizer).unwrap(),
                    memory.slice(range, &tokenizer).unwrap(),
                );
                assert_eq!(
                    (a.tokens(), a.documents(), a.text_bytes()),
                    (b.tokens(), b.documents(), b.text_bytes())
                );
                assert_eq!(a.text_bytes(), a.tokens());
                for i in 0..a.documents() {
                    assert_eq!(a.document(i).unwrap(), b.document(i).unwrap());
                }
            }
        }
    }
}

#[test]
fn prefetch_gives_the_same_batches_and_the_state_of_those_handed_out() {
    let source = TokenSource::from_tokens((0..5000).map(|i| i % 256).collect(), &bytes()).unwrap();
    let options = options(Rows::Packed, 16, 3);
    let mut plain = Loader::new(&source, options).unwrap();
    let mut ahead = Prefetch::new(Loader::new(&source, options).unwrap(), 8).unwrap();
    assert_eq!(ahead.state(), plain.state());
    for _ in 0..300 {
        assert_eq!(ahead.next_batch().unwrap(), plain.next_batch().unwrap());
        assert_eq!(ahead.state(), plain.state());
    }
}

#[test]
fn prefetch_passes_the_error_of_a_damaged_shard_on() {
    let folder = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..100_000).map(|i| i % 256).collect();
    let path = write(folder.path(), &[tokens], 1 << 20)[0].path().to_path_buf();
    let mut contents = std::fs::read(&path).unwrap();
    contents[128 + 70_000] ^= 1;
    std::fs::write(&path, contents).unwrap();
    let source = TokenSource::from_shards(vec![Shard::open(&path).unwrap()], &bytes()).unwrap();
    let loader = Loader::new(&source, options(Rows::Packed, 1000, 4)).unwrap();
    let mut ahead = Prefetch::new(loader, 2).unwrap();
    let (mut handed_out, mut error) = (0, None);
    for _ in 0..100 {
        match ahead.next_batch() {
            Ok(_) => handed_out += 1,
            Err(found) => {
                error = Some(found.to_string());
                break;
            }
        }
    }
    assert!(error.unwrap().contains("block 1 of the shard is damaged"));
    assert_eq!(ahead.state().row, handed_out * 4);
    for _ in 0..2 {
        let after = ahead.next_batch();
        assert_eq!(after.as_ref().unwrap_err().exit_code(), 1, "no input is to blame for this one");
        assert_message(after, &["after the loader's error"]);
    }
}

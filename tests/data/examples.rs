//! Rows of examples: what is read, predicted and attended to.

use std::collections::BTreeMap;
use std::path::Path;

use isobath::config::Rows;
use isobath::data::{Batch, Example, ExampleRows, Examples, Loader, LoaderOptions, RowSource};
use isobath::random::Philox;
use isobath::tensor::IGNORE_INDEX;

use super::assert_message;

const S: usize = 16;

/// `count` examples of up to `longest` tokens; the ids of each are its own and ascend.
fn examples(count: u32, longest: u32) -> Examples {
    let mut examples = Examples::default();
    for index in 0..count {
        let random = Philox::new(9, u64::from(index)).at(0);
        let length = 2 + random[0] % (longest - 1);
        let prompt = random[1] % (length - 1);
        let ids: Vec<u32> = (0..length).map(|at| index * 100 + at).collect();
        let mut example = Example::default();
        example.read(&ids[..=prompt as usize]);
        example.predict(&ids[prompt as usize + 1..]);
        examples.push(example);
    }
    examples
}

fn rows(examples: Examples, packed: bool) -> isobath::Result<ExampleRows> {
    ExampleRows::new(examples, S, packed, 3, 7777, Path::new("chat.jsonl"))
}

/// The batches of one epoch, a row each.
fn epoch(rows: &ExampleRows, kind: Rows, seed: u64) -> Vec<Batch> {
    let documents = kind == Rows::Packed;
    let options = LoaderOptions { rows: kind, documents, sequence: S, micro_batch: 1, seed };
    let mut loader = Loader::new(RowSource::Examples(rows.clone()), options).unwrap();
    (0..rows.rows()).map(|_| loader.next_batch().unwrap()).collect()
}

#[test]
fn an_epoch_predicts_every_answer_once_and_reads_each_example_from_its_own_start() {
    for (kind, packed) in [(Rows::Packed, true), (Rows::Document, false)] {
        let examples = examples(60, S as u32 + 1);
        let expected: BTreeMap<u32, u32> = (0..examples.len())
            .flat_map(|index| {
                let (ids, predicted) = examples.get(index);
                let pairs: Vec<(u32, u32)> = ids.windows(2).map(|two| (two[0], two[1])).collect();
                let marks = predicted[1..].to_vec();
                pairs.into_iter().zip(marks).filter(|(_, mark)| *mark).map(|(pair, _)| pair)
            })
            .collect();
        let rows = rows(examples, packed).unwrap();
        assert_eq!((rows.examples(), rows.cut(), rows.left_out()), (60, 0, 0));
        assert!(!packed && rows.rows() == 60 || packed && rows.rows() < 50, "{}", rows.rows());
        let mut found = BTreeMap::new();
        for batch in epoch(&rows, kind, 5) {
            assert_eq!(batch.document_starts.is_some(), packed);
            let starts = batch.document_starts.clone().unwrap_or(vec![0; S]);
            let mut predicted = 0;
            for (at, &start) in starts.iter().enumerate() {
                let (token, target) = (batch.tokens[at] as u32, batch.targets[at]);
                if token == 7777 {
                    assert_eq!(target, IGNORE_INDEX);
                    continue;
                }
                // Ids count from the beginning of their example.
                assert_eq!((token % 100) as i32, at as i32 - start, "{batch:?}");
                if target != IGNORE_INDEX {
                    predicted += 1;
                    assert_eq!(found.insert(token, target as u32), None, "{token} twice");
                }
            }
            assert_eq!(batch.predicted, predicted);
        }
        assert_eq!(found, expected, "{kind}");
        let all: Vec<u32> = rows.predicted_tokens();
        assert_eq!(all.len(), expected.len());
    }
}

#[test]
fn padding_is_a_document_of_its_own() {
    let rows = rows(examples(1, 5), true).unwrap();
    let batch = &epoch(&rows, Rows::Packed, 1)[0];
    let read = rows.tokens() as usize;
    let starts = batch.document_starts.as_ref().unwrap();
    assert!(starts[..read].iter().all(|&start| start == 0));
    assert!(starts[read..].iter().all(|&start| start == read as i32));
}

#[test]
fn examples_longer_than_a_row_lose_their_end_or_are_left_out_and_counted() {
    let mut long = Examples::default();
    for prompt in [S - 1, S, S + 1] {
        let mut example = Example::default();
        example.read(&vec![1; prompt]);
        example.predict(&[2, 2]);
        long.push(example);
    }
    // A row of S reads S tokens and predicts the one after them.
    let rows = rows(long.clone(), true).unwrap();
    assert_eq!((rows.rows(), rows.cut(), rows.left_out()), (2, 1, 1));
    assert_eq!(rows.predicted_tokens(), [2, 2, 2]);
    let mut hopeless = long.split_off(0.34);
    assert_eq!((long.len(), hopeless.len()), (2, 1));
    hopeless.push(Example { tokens: vec![1], predicted: vec![true] });
    assert_message(
        ExampleRows::new(hopeless, S, true, 1, 0, Path::new("chat.jsonl")),
        &["chat.jsonl", "none of the 2 examples has an answer within 16 tokens", "data.sequence"],
    );
}

#[test]
fn a_saved_position_belongs_to_its_examples() {
    let options =
        LoaderOptions { rows: Rows::Packed, documents: true, sequence: S, micro_batch: 2, seed: 5 };
    let source = |count| RowSource::Examples(rows(examples(count, 9), true).unwrap());
    let mut first = Loader::new(source(40), options).unwrap();
    (0..30).for_each(|_| drop(first.next_batch().unwrap()));
    let mut second = Loader::restore(source(40), options, &first.state()).unwrap();
    for _ in 0..30 {
        assert_eq!(first.next_batch().unwrap(), second.next_batch().unwrap());
    }
    assert_message(
        Loader::restore(source(41), options, &first.state()),
        &["chat.jsonl", "the saved position belongs to other data"],
    );
}

//! Evaluation windows: all tokens but the first, once, in order.

use isobath::data::{TokenSource, Tokenizer, Windows};
use isobath::tensor::IGNORE_INDEX;

use super::assert_message;

#[test]
fn windows_predict_every_token_but_the_first_in_order() {
    let tokenizer = Tokenizer::bytes().unwrap();
    for count in [2u32, 8, 9, 10, 16, 17, 100, 101] {
        let tokens: Vec<u32> = (0..count).collect();
        let source = TokenSource::from_tokens(tokens.clone(), &tokenizer).unwrap();
        let windows = Windows::new(&source, 8, 3, 0).unwrap();
        assert_eq!(windows.predicted_tokens(), u64::from(count) - 1);
        assert_eq!(windows.text_bytes(), Some(u64::from(count)));
        let expected_batches = windows.batches();
        let batches: Vec<_> = windows.map(Result::unwrap).collect();
        assert_eq!(batches.len() as u64, expected_batches);
        let mut predicted = vec![];
        for batch in &batches {
            assert_eq!((batch.tokens.len(), batch.targets.len()), (24, 24), "[B,S] throughout");
            let before = predicted.len();
            for (&token, &target) in batch.tokens.iter().zip(&batch.targets) {
                if target != IGNORE_INDEX {
                    assert_eq!(token + 1, target);
                    predicted.push(target as u32);
                }
            }
            assert_eq!(batch.predicted, predicted.len() - before);
        }
        assert_eq!(predicted, tokens[1..]);
    }
}

#[test]
fn a_limit_reads_the_beginning_only() {
    let source =
        TokenSource::from_tokens((0..100).collect(), &Tokenizer::bytes().unwrap()).unwrap();
    let windows = Windows::new(&source, 8, 2, 21).unwrap();
    assert_eq!((windows.predicted_tokens(), windows.text_bytes()), (21, None));
    assert_eq!(windows.map(|batch| batch.unwrap().predicted).sum::<usize>(), 21);
}

/// What pads a window is a document of its own.
#[test]
fn windows_say_where_documents_begin() {
    let documents = [5, 1, 9, 4].map(|count| (vec![7; count], 0));
    let source =
        TokenSource::from_documents(documents.to_vec(), &Tokenizer::bytes().unwrap()).unwrap();
    let windows = Windows::new(&source, 8, 2, 0).unwrap().of_documents(true);
    let starts: Vec<i32> =
        windows.flat_map(|batch| batch.unwrap().document_starts.unwrap()).collect();
    let expected =
        [[0, 0, 0, 0, 0, 5, 6, 6], [0, 0, 0, 0, 0, 0, 0, 7], [0, 0, 2, 2, 2, 2, 2, 2], [0; 8]];
    assert_eq!(starts, expected.concat());
}

#[test]
fn one_token_leaves_nothing_to_predict() {
    let source = TokenSource::from_tokens(vec![5], &Tokenizer::bytes().unwrap()).unwrap();
    assert_message(Windows::new(&source, 8, 2, 0).map(|_| ()), &["1 tokens", "nothing to predict"]);
}

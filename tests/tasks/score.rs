//! src/tasks/score.rs: accuracies and standard errors by hand, against losses that are known.

use isobath::cpu::Cpu;
use isobath::data::tokenizer::Tokenizer;
use isobath::engine::{Evaluator, Rows};
use isobath::model::parameters::ParameterTable;
use isobath::tasks::{Estimate, Prompts, Score, Task, score};
use isobath::tensor::IGNORE_INDEX;
use serde_json::json;
use tempfile::tempdir;

use super::{bytes, mmlu, task};
use crate::data::assert_message;
use crate::support::small_model;

/// Losses that depend on the predicted byte alone; what is not predicted gets nonsense.
fn by_target(loss: impl Fn(u8) -> f32) -> impl FnMut(Rows) -> isobath::Result<Vec<f32>> {
    move |rows| {
        let losses = rows.targets.iter().map(|&target| match target {
            IGNORE_INDEX => f32::NAN,
            id => loss(id as u8),
        });
        Ok(losses.collect())
    }
}

fn scored(task: &Task, shots: usize, loss: impl Fn(u8) -> f32) -> Score {
    score(&bytes(task, None, shots, 400), 3, &mut by_target(loss), |_, _| {}).unwrap()
}

/// One question a line: its choices, and the index of the right one.
fn choices(questions: &[(&[&str], usize)]) -> Task {
    let lines = questions.iter().map(|(choices, answer)| {
        format!("{}\n", json!({ "context": "c", "choices": choices, "answer": answer }))
    });
    task("a.jsonl", &lines.collect::<String>()).unwrap()
}

#[test]
fn the_three_accuracies_divide_by_nothing_by_characters_and_by_bytes() {
    // A space costs 1, a letter 0.5, each byte of é 0.2.
    let loss = |byte: u8| match byte {
        b' ' => 1.0,
        b'a'..=b'z' => 0.5,
        _ => 0.2,
    };
    //                  sum   / characters / bytes
    // a                -1.5  -1.5         -1.5
    // bbbb             -3.0  -0.75        -0.75
    // éé               -1.8  -0.9         -0.45
    let all: &[&str] = &["a", "bbbb", "éé"];
    let found = scored(&choices(&[(all, 0), (all, 1), (all, 2)]), 0, loss);
    for (index, sample) in found.samples.iter().enumerate() {
        let expected = [1.5, 3.0, 1.8].map(|nats: f64| -nats);
        for (found, expected) in sample.log_likelihoods.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found}, expected {expected}");
        }
        let right = (sample.acc, sample.acc_norm, sample.acc_bytes);
        assert_eq!(right, (index == 0, index == 1, index == 2));
        assert_eq!((sample.subject.as_str(), sample.line), ("a", index as u64 + 1));
    }
    for accuracy in [found.acc, found.acc_norm, found.acc_bytes] {
        assert_eq!(accuracy.mean, 1.0 / 3.0);
    }
    assert_eq!((found.questions, found.chance), (3, 1.0 / 3.0));
}

#[test]
fn of_equal_choices_the_first_is_taken() {
    let task = choices(&[(&["ab", "ba", "xx"], 0), (&["ab", "ba", "xx"], 1), (&["x", "x"], 1)]);
    let found = scored(&task, 0, |byte| if byte == b'x' { 2.0 } else { 1.0 });
    assert_eq!(
        found.samples.iter().map(|sample| sample.acc).collect::<Vec<_>>(),
        [true, false, false]
    );
}

#[track_caller]
fn assert_estimate(found: Estimate, mean: f64, standard_error: Option<f64>) {
    assert!((found.mean - mean).abs() < 1e-12, "{found:?}, expected {mean}");
    match (found.standard_error, standard_error) {
        (Some(found), Some(expected)) => {
            assert!((found - expected).abs() < 1e-12, "{found}, expected {expected}");
        }
        (found, expected) => assert_eq!(found, expected),
    }
}

#[test]
fn the_standard_error_is_the_samples_deviation_over_root_n() {
    let loss = |byte: u8| if byte == b'r' { 0.0 } else { 1.0 };
    let right: (&[&str], usize) = (&["r", "w"], 0);
    let wrong: (&[&str], usize) = (&["r", "w"], 1);
    // 3 of 4: deviations .25 .25 .25 -.75; their squares add up to 0.75; sqrt(0.75 / 3 / 4).
    let found = scored(&choices(&[right, wrong, right, right]), 0, loss);
    assert_estimate(found.acc, 0.75, Some(0.25));
    assert_estimate(found.subjects[0].acc, 0.75, Some(0.25));
    assert_estimate(scored(&choices(&[right, right]), 0, loss).acc, 1.0, Some(0.0));
    assert_estimate(scored(&choices(&[right]), 0, loss).acc, 1.0, None);
}

#[test]
fn subjects_are_weighted_by_size_and_their_variances_pooled() {
    let folder = tempdir().unwrap();
    mmlu(folder.path());
    // The letter A is always chosen: right in one of two questions, and in one of three.
    let loss = |byte: u8| if byte == b'A' { 0.0 } else { 1.0 };
    let found = scored(&Task::open(folder.path()).unwrap(), 0, loss);
    let [anatomy, facts] = found.subjects.as_slice() else { panic!("{found:?}") };
    assert_estimate(anatomy.acc, 0.5, Some((0.5f64 / 2.0).sqrt()));
    assert_estimate(facts.acc, 1.0 / 3.0, Some((1.0f64 / 3.0 / 3.0).sqrt()));
    // Variances 1/2 and 1/3: (1 * 1/2 + 2 * 1/3) / (5 - 2) = 7/18, over 5.
    assert_estimate(found.acc, 0.4, Some((7.0f64 / 18.0 / 5.0).sqrt()));
    assert_eq!((found.questions, anatomy.questions, facts.questions), (5, 2, 3));
    // Of one question there is no variance, so there is none of all.
    let one = scored(&Task::open(&folder.path().join("test")).unwrap(), 1, loss);
    assert_eq!(one.questions, 5, "dev/ has the examples");
    std::fs::remove_dir_all(folder.path().join("dev")).unwrap();
    let one = scored(&Task::open(folder.path()).unwrap(), 1, loss);
    assert_eq!((one.questions, one.acc.standard_error), (3, None));
}

#[test]
fn chance_is_the_mean_over_questions() {
    let task = choices(&[(&["a", "b"], 0), (&["a", "b", "c", "d"], 0)]);
    assert_eq!(scored(&task, 0, |_| 1.0).chance, 0.375);
}

#[test]
fn rows_predict_the_continuation_and_nothing_else() {
    let task = choices(&[(&["long choice", "b"], 0), (&["c", "d"], 1)]);
    let prompts = bytes(&task, None, 0, 100);
    let (mut calls, mut seen) = (vec![], vec![]);
    let mut losses = |rows: Rows| {
        assert_eq!(
            (rows.tokens.len(), rows.targets.len()),
            (3 * prompts.sequence(), 3 * prompts.sequence())
        );
        for row in 0..3 {
            let at = row * prompts.sequence()..(row + 1) * prompts.sequence();
            let (tokens, targets) = (&rows.tokens[at.clone()], &rows.targets[at]);
            let scored: Vec<u8> =
                targets.iter().filter(|&&t| t != IGNORE_INDEX).map(|&t| t as u8).collect();
            if scored.is_empty() {
                assert!(tokens.iter().all(|&token| token == prompts.padding));
                continue;
            }
            // Each target is the next token; the first one stands after the context.
            for (place, &target) in targets.iter().enumerate() {
                let next = tokens.get(place + 1).copied();
                let last = place + 1 == scored.len();
                assert!(target == IGNORE_INDEX || last || next == Some(target), "{row}, {place}");
            }
            assert_eq!(targets[0], i32::from(b' '));
            assert_eq!(tokens[0], i32::from(b'c'));
            seen.push(String::from_utf8(scored).unwrap());
        }
        Ok(vec![1.0; rows.tokens.len()])
    };
    let found = score(&prompts, 3, &mut losses, |done, of| calls.push((done, of))).unwrap();
    assert_eq!(calls, [(3, 4), (4, 4)]);
    assert_eq!(seen, [" long choice", " b", " c", " d"]);
    assert_eq!(found.samples[0].log_likelihoods, [-12.0, -2.0]);
}

#[test]
fn a_model_in_batches_gives_what_it_gives_row_by_row() {
    let mut config = small_model();
    config.vocab = 257;
    let table = ParameterTable::new(&config);
    let parameters = isobath::model::init::initial_parameters(&table, 3);
    let evaluator =
        |size| Evaluator::new(&config, &table, &parameters, size, Cpu::<f32>::new()).unwrap();
    let task = choices(&[(&["to be", "not to be, that is"], 0), (&["or", "and", "é"], 1)]);
    let prompts = bytes(&task, None, 0, config.max_sequence);
    let mut expected = vec![];
    for candidate in prompts.candidates() {
        let inputs = candidate.tokens.len() - 1;
        let rows = Rows::new(&candidate.tokens[..inputs], &candidate.tokens[1..]);
        let mut alone = evaluator([1, inputs]);
        let losses = alone.losses(rows).unwrap();
        let scored = &losses[inputs - candidate.scored..];
        expected.push(-scored.iter().map(|&loss| f64::from(loss)).sum::<f64>());
    }
    for batch in [1, 2, 5, 8] {
        let mut together = evaluator([batch, prompts.sequence()]);
        let mut losses = |rows: Rows| together.losses(rows).map(<[f32]>::to_vec);
        let found = score(&prompts, batch, &mut losses, |_, _| {}).unwrap();
        let all = found.samples.iter().flat_map(|sample| &sample.log_likelihoods);
        for (found, expected) in all.zip(&expected) {
            assert!((found / expected - 1.0).abs() < 1e-5, "{batch}: {found} and {expected}");
        }
    }
}

#[test]
fn a_likelihood_that_is_no_number_is_an_error() {
    let prompts = bytes(&choices(&[(&["a", "b"], 0), (&["a", "x"], 0)]), None, 0, 9);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut losses = by_target(|byte| if byte == b'x' { bad } else { 1.0 });
        let found = score(&prompts, 8, &mut losses, |_, _| {});
        assert_message(found, &["a.jsonl", "line 2", "earlier checkpoint"]);
    }
    let mut failing = |_: Rows| Tokenizer::open("no-tokenizer.json").map(|_| Vec::<f32>::new());
    assert_message(score(&prompts, 8, &mut failing, |_, _| {}), &["no-tokenizer.json"]);
}

#[test]
fn one_set_of_prompts_serves_many_models() {
    let task = choices(&[(&["a", "b"], 0), (&["a", "b"], 1)]);
    let prompts: Prompts = bytes(&task, None, 0, 9);
    for (favoured, right) in [(b'a', [true, false]), (b'b', [false, true])] {
        let mut losses = by_target(|byte| if byte == favoured { 0.5 } else { 1.0 });
        let found = score(&prompts, 2, &mut losses, |_, _| {}).unwrap();
        assert_eq!(found.samples.iter().map(|sample| sample.acc).collect::<Vec<_>>(), right);
    }
}

//! src/tasks/draw.rs: tasks that are made of text.

use std::collections::HashSet;

use isobath::data::corpus::read_texts;
use isobath::tasks::{DrawOptions, draw, json_lines};

use super::{bytes, task};
use crate::data::{AUSTEN, assert_message, write_file};

fn options(questions: usize) -> DrawOptions {
    DrawOptions { questions, ..DrawOptions::default() }
}

#[test]
fn the_right_choice_follows_its_context_and_no_other_does() {
    let documents = [AUSTEN[..150_000].to_string(), AUSTEN[200_000..260_000].to_string()];
    let options = options(400);
    let questions = draw(&documents, &options).unwrap();
    assert_eq!(questions.len(), 400);
    let mut answers = [0; 4];
    let mut from_second = 0;
    for question in &questions {
        answers[question.answer] += 1;
        let passage = format!("{} {}", question.context, question.choices[question.answer]);
        let document = documents.iter().position(|text| text.contains(&passage));
        from_second += document.unwrap_or_else(|| panic!("not in the text: {passage}"));
        let distinct: HashSet<&String> = question.choices.iter().collect();
        assert_eq!(distinct.len(), 4, "{question:?}");
        for (index, choice) in question.choices.iter().enumerate() {
            let length = choice.chars().count();
            assert!((30..=60).contains(&length), "{choice}");
            assert_eq!(choice.trim(), choice);
            assert!(!choice.contains("\n\n"), "{choice}");
            let found = documents.iter().any(|text| text.contains(&format!(" {choice}")));
            assert!(found, "not in the text: {choice}");
            let joined = format!("{} {choice}", question.context);
            let follows = documents.iter().any(|text| text.contains(&joined));
            assert_eq!(follows, index == question.answer, "{question:?}");
        }
        let length = question.context.chars().count();
        assert!((120..=240).contains(&length), "{length}");
        assert!(question.context.starts_with(|c: char| !c.is_whitespace()));
        let begins = documents.iter().any(|text| {
            text.match_indices(&question.context)
                .any(|(at, _)| text[..at].chars().next_back().is_none_or(char::is_whitespace))
        });
        assert!(begins, "begins within a word: {}", question.context);
    }
    // Of 400, a quarter each, and 60 of 210 thousand bytes' share: within four standard deviations.
    assert!(answers.iter().all(|count| (65..=135).contains(count)), "{answers:?}");
    assert!((78..=150).contains(&from_second), "{from_second}");
    let contexts: HashSet<&String> = questions.iter().map(|question| &question.context).collect();
    assert_eq!(contexts.len(), 400);
}

#[test]
fn the_seed_decides_and_more_questions_begin_with_the_same() {
    let documents = [AUSTEN[..100_000].to_string()];
    let first = draw(&documents, &options(50)).unwrap();
    assert_eq!(draw(&documents, &options(50)).unwrap(), first);
    assert_eq!(draw(&documents, &options(80)).unwrap()[..50], first);
    let other = draw(&documents, &DrawOptions { seed: 2, ..options(50) }).unwrap();
    assert!(first.iter().zip(&other).filter(|(a, b)| a == b).count() < 3);
}

#[test]
fn what_is_written_is_read_back() {
    let documents = ["é ß « quoted \"words\" » \\ and so on, ".repeat(3) + &AUSTEN[..20_000]];
    let questions = draw(&documents, &DrawOptions { choices: 3, ..options(30) }).unwrap();
    let read = task("drawn.jsonl", &json_lines(&questions)).unwrap();
    for (index, (read, drawn)) in read.subjects[0].questions.iter().zip(&questions).enumerate() {
        let mut read = read.clone();
        assert_eq!(std::mem::take(&mut read.line), index as u64 + 1);
        assert_eq!(&read, drawn);
    }
    // The rows that a model reads are the text itself.
    let prompts = bytes(&read, None, 0, 2000);
    for prompt in &prompts.questions {
        let tokens = &prompt.choices[prompt.answer].tokens;
        let row: Vec<u8> = tokens.iter().map(|&id| id as u8).collect();
        let row = String::from_utf8(row).unwrap();
        assert!(documents[0].contains(&row), "{row}");
    }
}

#[test]
fn text_that_is_too_short_and_options_that_ask_nothing_are_named() {
    let refused = |text: &str, options: DrawOptions, parts: &[&str]| {
        assert_message(draw(&[text.to_string()], &options), parts);
    };
    refused("", options(1), &["too short", "0 of 1 questions"]);
    refused("Only a few words here.", options(1), &["0 of 1 questions", "give more text"]);
    refused(&"word ".repeat(2000), options(5), &["too uniform", "0 of 5"]);
    let few = AUSTEN[..3000].to_string();
    refused(&few, options(5000), &["of 5000 questions"]);
    assert_message(draw(&[], &options(1)), &["0 of 1 questions"]);
    refused(&few, options(0), &["0 questions", "at least one"]);
    refused(&few, DrawOptions { choices: 1, ..options(1) }, &["1 choices"]);
    refused(&few, DrawOptions { context: 0, ..options(1) }, &["after 0"]);
    refused(&few, DrawOptions { continuation: 0, ..options(1) }, &["0 characters"]);
}

#[test]
fn the_held_out_share_is_what_a_run_holds_out() {
    let bundled = ["bundled:austen".to_string()];
    assert_eq!(read_texts(&bundled, "text", 0.0).unwrap(), [AUSTEN]);
    let held_out = read_texts(&bundled, "text", 0.1).unwrap();
    let from = AUSTEN.floor_char_boundary((0.9 * AUSTEN.len() as f64) as usize);
    assert_eq!(held_out, [&AUSTEN[from..]]);

    let folder = tempfile::tempdir().unwrap();
    let lines = "{\"text\": \"abcdefgh\"}\n{\"text\": \"ij\"}\n";
    let path = [write_file(folder.path(), "a.jsonl", lines.as_bytes()).display().to_string()];
    assert_eq!(read_texts(&path, "text", 0.5).unwrap(), ["fgh", "ij"]);
    assert_message(read_texts(&path, "txt", 0.0), &["`txt`", "text"]);
    assert_message(read_texts(&path, "text", 1.0), &["held_out is 1"]);
    let shards = folder.path().display().to_string();
    assert_message(read_texts(&[shards], "text", 0.0), &["tokens, not text"]);
}

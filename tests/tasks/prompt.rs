//! src/tasks/prompt.rs and question.rs: the text that is read, and which tokens of it are scored.

use std::path::Path;

use isobath::data::tokenizer::Tokenizer;
use isobath::tasks::{Prompts, Style, Task};
use serde_json::json;
use tempfile::tempdir;

use super::{bytes, mmlu, task};
use crate::data::assert_message;

/// What is read and what is scored of every choice, as text; the byte tokenizer's ids are its
/// bytes.
fn texts(prompts: &Prompts) -> Vec<(String, String)> {
    let text = |ids: &[i32]| {
        let name =
            |&id: &i32| if id == 256 { "<end>".into() } else { (id as u8 as char).to_string() };
        ids.iter().map(name).collect::<Vec<String>>().concat()
    };
    let candidates = prompts.candidates().map(|candidate| {
        let (context, scored) =
            candidate.tokens.split_at(candidate.tokens.len() - candidate.scored);
        (text(context), text(scored))
    });
    candidates.collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|&(context, scored)| (context.into(), scored.into())).collect()
}

#[test]
fn texts_of_choices_follow_the_question_or_the_context() {
    let lines = r#"{"question": "Why?", "choices": ["so", "not so"], "answer": 0}
        {"context": "A fact.", "question": "Why?", "choices": ["so", "not"], "answer": 1}
        {"context": "It is", "choices": ["red", "blue"], "answer": 1}
        {"sentence": "The _ ran off.", "option1": "cat", "option2": "dog", "answer": "1"}"#;
    let prompts = bytes(&task("a.jsonl", lines).unwrap(), None, 0, 100);
    let expected = [
        ("Question: Why?\nAnswer:", " so"),
        ("Question: Why?\nAnswer:", " not so"),
        ("A fact.\nQuestion: Why?\nAnswer:", " so"),
        ("A fact.\nQuestion: Why?\nAnswer:", " not"),
        ("It is", " red"),
        ("It is", " blue"),
        ("The cat", " ran off."),
        ("The dog", " ran off."),
    ];
    assert_eq!(texts(&prompts), pairs(&expected));
    let answers: Vec<usize> = prompts.questions.iter().map(|question| question.answer).collect();
    assert_eq!(answers, [0, 1, 1, 0]);
    // Lengths are those of the choices as the file has them.
    let lengths: Vec<usize> = prompts.candidates().map(|candidate| candidate.bytes).collect();
    assert_eq!(lengths, [2, 6, 2, 3, 3, 4, 7, 7]);
}

#[test]
fn letters_follow_the_list_of_choices() {
    let lines = r#"{"question": "Why?", "choices": ["so", "not", "who knows"], "answer": 2}
        {"context": "A fact.", "question": "Why?", "choices": ["so", "not"], "answer": 0}
        {"context": "It is", "choices": ["red", "blue"], "answer": 0}"#;
    let prompts = bytes(&task("a.jsonl", lines).unwrap(), Some(Style::Letters), 0, 100);
    let first = "Why?\nA. so\nB. not\nC. who knows\nAnswer:";
    let expected = [
        (first, " A"),
        (first, " B"),
        (first, " C"),
        ("A fact.\nWhy?\nA. so\nB. not\nAnswer:", " A"),
        ("A fact.\nWhy?\nA. so\nB. not\nAnswer:", " B"),
        ("It is\nA. red\nB. blue\nAnswer:", " A"),
        ("It is\nA. red\nB. blue\nAnswer:", " B"),
    ];
    assert_eq!(texts(&prompts), pairs(&expected));
    assert!(prompts.candidates().all(|choice| (choice.characters, choice.bytes) == (1, 1)));
}

#[test]
fn mmlu_has_a_line_about_its_subject_and_examples_with_answers() {
    let folder = tempdir().unwrap();
    mmlu(folder.path());
    let task = Task::open(folder.path()).unwrap();
    let prompts = bytes(&task, None, 2, 1000);
    let list = "\nA. one\nB. two\nC. three\nD. four\nAnswer:";
    let expected = format!(
        "The following are multiple choice questions (with answers) about world facts.\n\n\
         E1{list} B\n\nE2{list} A\n\nQ1{list}"
    );
    let all = texts(&prompts);
    assert_eq!(all.len(), 20);
    assert_eq!(all[8..12], pairs(&[" A", " B", " C", " D"].map(|letter| (&*expected, letter))));
    assert_eq!(prompts.subjects, ["anatomy", "world_facts"]);
    let subjects: Vec<usize> = prompts.questions.iter().map(|question| question.subject).collect();
    assert_eq!(subjects, [0, 0, 1, 1, 1]);

    let prompts = bytes(&task, Some(Style::Texts), 1, 1000);
    let expected = "The following are questions (with answers) about anatomy.\n\n\
                    Question: E3\nAnswer: four\n\nQuestion: Q4\nAnswer:";
    assert_eq!(texts(&prompts)[1], (expected.to_string(), " two".to_string()));
    let three = Prompts::new(&task, &Tokenizer::bytes().unwrap(), None, 3, 1000);
    assert_message(three, &["anatomy_test.csv", "3 examples", "2 to take them from", "--shots"]);
}

#[test]
fn a_task_without_examples_gives_its_first_questions_and_does_not_score_them() {
    let lines = r#"{"context": "One", "choices": ["a", "b"], "answer": 1}
        {"sentence": "Two _ or.", "option1": "x", "option2": "y", "answer": "2"}
        {"question": "Three", "choices": ["e", "f"], "answer": 0}"#;
    let task = task("a.jsonl", lines).unwrap();
    let prompts = bytes(&task, None, 2, 1000);
    let before = "One b\n\nTwo y or.\n\nQuestion: Three\nAnswer:";
    assert_eq!(texts(&prompts), pairs(&[(before, " e"), (before, " f")]));
    assert_eq!((prompts.questions.len(), prompts.questions[0].line), (1, 3));
    let all = Prompts::new(&task, &Tokenizer::bytes().unwrap(), None, 3, 1000);
    assert_message(all, &["3 examples", "3 questions in all", "--shots-from"]);
}

#[test]
fn white_space_at_the_end_of_the_context_is_scored_with_the_choice() {
    let lines = r#"{"context": "It is \t\u001d ", "choices": ["red", "b"], "answer": 0}
        {"context": " \n", "choices": ["red", "b"], "answer": 0}"#;
    let prompts = bytes(&task("a.jsonl", lines).unwrap(), None, 0, 100);
    let expected = [
        ("It is", " \t\u{1d}  red"),
        ("It is", " \t\u{1d}  b"),
        // Nothing is left before it: the end-of-text token stands there.
        ("<end>", " \n red"),
        ("<end>", " \n b"),
    ];
    assert_eq!(texts(&prompts), pairs(&expected));
    assert_eq!(prompts.questions[0].choices[0].characters, 3);
}

/// BPE without pre-tokenization, so that tokens lie across the end of the context.
fn merging(start: bool) -> Tokenizer {
    let processor = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [6], "tokens": ["<s>"]}},
    });
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{"id": 6, "content": "<s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": if start { processor } else { json!(null) },
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "byte_fallback": false, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "vocab": {"a": 0, "b": 1, "c": 2, " ": 3, "a ": 4, " c": 5}, "merges": ["a  ", "  c"]},
    });
    let json = json.to_string().replace(r#"["a  ","  c"]"#, r#"[["a"," "],[" ","c"]]"#);
    Tokenizer::from_json(json.as_bytes(), Path::new("tokenizer.json")).unwrap()
}

#[test]
fn a_token_across_the_boundary_is_neither_read_nor_scored() {
    // "ba" is b,a and "ba bb" is b,"a ",b,b: two tokens are the context's, and what is left is b,b.
    let lines = r#"{"context": "ba", "choices": ["bb", "c"], "answer": 0}"#;
    let prompts =
        Prompts::new(&task("a.jsonl", lines).unwrap(), &merging(false), None, 0, 9).unwrap();
    let [first, second] = prompts.questions[0].choices.as_slice() else { panic!() };
    assert_eq!((first.tokens.as_slice(), first.scored), (&[1, 0, 1, 1][..], 2));
    assert_eq!((second.tokens.as_slice(), second.scored), (&[1, 0, 2][..], 1));
}

#[test]
fn a_tokenizer_that_starts_texts_starts_these() {
    assert_eq!(merging(false).start_of_text().unwrap(), None);
    assert_eq!(Tokenizer::bytes().unwrap().start_of_text().unwrap(), None);
    let tokenizer = merging(true);
    assert_eq!(tokenizer.start_of_text().unwrap(), Some(6));
    assert_eq!(tokenizer.encode("ab").unwrap(), [0, 1], "encode itself leaves it out");
    let lines = r#"{"context": "b", "choices": ["b", "c"], "answer": 0}
        {"context": " ", "choices": ["b", "c"], "answer": 0}"#;
    let task = task("a.jsonl", lines).unwrap();
    let prompts = Prompts::new(&task, &tokenizer, None, 0, 9).unwrap();
    let rows: Vec<_> = prompts.candidates().map(|c| (c.tokens.clone(), c.scored)).collect();
    let expected =
        [(vec![6, 1, 3, 1], 2), (vec![6, 1, 5], 1), (vec![6, 3, 3, 1], 3), (vec![6, 3, 5], 2)];
    assert_eq!(rows, expected);
    // Without one, and without an end-of-text token, nothing can stand there.
    let none = Prompts::new(&task, &merging(false), None, 0, 9);
    assert_message(none, &["a.jsonl: line 2", "no token to begin with"]);
}

#[test]
fn long_rows_lose_tokens_on_their_left_and_are_counted() {
    let lines = r#"{"context": "abcdef", "choices": ["x", "xyz"], "answer": 0}
        {"context": "ab", "choices": ["x", "y"], "answer": 0}"#;
    let task = task("a.jsonl", lines).unwrap();
    let prompts = bytes(&task, None, 0, 7);
    // The last token is only a target: a window of 7 reads rows of 8.
    let expected = [("abcdef", " x"), ("cdef", " xyz"), ("ab", " x"), ("ab", " y")];
    assert_eq!(texts(&prompts), pairs(&expected));
    assert_eq!((prompts.truncated, prompts.sequence()), (1, 7));
    let cut: Vec<bool> = prompts.questions.iter().map(|question| question.truncated).collect();
    assert_eq!(cut, [true, false]);
    assert_eq!(bytes(&task, None, 0, 9).truncated, 0);

    // A choice as long as the window still has one token before it.
    let prompts = bytes(&task, None, 0, 4);
    assert_eq!(texts(&prompts)[1], ("f".to_string(), " xyz".to_string()));
    let tokenizer = Tokenizer::bytes().unwrap();
    let shorter = Prompts::new(&task, &tokenizer, None, 0, 3);
    assert_message(shorter, &["a.jsonl: line 1", "choice 2 of 2 has 4 tokens", "at most 3"]);
    assert_message(Prompts::new(&task, &tokenizer, None, 0, 0), &["window of 0", "--sequence"]);
}

#[test]
fn questions_that_do_not_fit_the_style_are_named() {
    let refused = |text: &str, style, parts: &[&str]| {
        let task = task("a.jsonl", text).unwrap();
        let prompts = Prompts::new(&task, &Tokenizer::bytes().unwrap(), Some(style), 0, 100);
        assert_message(prompts, parts);
    };
    let gap = r#"{"sentence": "A _ it.", "option1": "a", "option2": "b", "answer": "1"}"#;
    refused(gap, Style::Letters, &["a.jsonl: line 1", "parts of a sentence", "--style texts"]);
    let many = json!({"question": "Q", "choices": vec!["x"; 27], "answer": 3}).to_string();
    refused(&format!("\n{many}"), Style::Letters, &["line 2", "more choices than letters"]);
    let empty = r#"{"question": "Q", "choices": ["x", " "], "answer": 0}"#;
    refused(empty, Style::Texts, &["line 1", "choice 2 of 2 is empty"]);
    let task = task("a.jsonl", empty).unwrap();
    assert_eq!(bytes(&task, Some(Style::Letters), 0, 100).questions.len(), 1);
}

//! src/tasks/file.rs and layouts.rs: every layout, and every line that is refused.

use std::fs;
use std::path::Path;

use isobath::tasks::{Question, Style, Task};
use tempfile::tempdir;

use super::{mmlu, task};
use crate::data::assert_message;

fn question(line: &str) -> Question {
    let task = task("task.jsonl", line).unwrap();
    assert_eq!((task.style, task.questions()), (Style::Texts, 1), "{line}");
    let question = task.subjects[0].questions[0].clone();
    assert_eq!(question.line, 1);
    Question { line: 0, ..question }
}

fn expected(context: &str, question: &str, choices: &[&str], answer: usize) -> Question {
    Question {
        context: context.into(),
        question: question.into(),
        choices: choices.iter().map(|choice| choice.to_string()).collect(),
        answer,
        ..Question::default()
    }
}

#[test]
fn the_answer_may_be_an_index_a_letter_or_the_text() {
    let both = expected("", "Two?", &["1", "2", "B"], 1);
    for answer in ["1", "\"1\"", "\"2\"", "\"B\""] {
        let line =
            format!(r#"{{"question": "Two?", "choices": ["1", "2", "B"], "answer": {answer}}}"#);
        let answer = match answer {
            "\"1\"" => 0, // the text of a choice goes before everything else
            "\"B\"" => 2,
            _ => 1,
        };
        assert_eq!(question(&line), Question { answer, ..both.clone() }, "{line}");
    }
    let letter = r#"{"question": "Two?", "choices": ["one", "two"], "answer": "B"}"#;
    assert_eq!(question(letter), expected("", "Two?", &["one", "two"], 1));
    let context = r#"{"context": "It was", "choices": ["a dog", "a cat"], "answer": 1, "id": 3}"#;
    assert_eq!(question(context), expected("It was", "", &["a dog", "a cat"], 1));
}

#[test]
fn the_layouts_of_the_usual_data_sets_are_known() {
    let lists = r#""choices": {"text": ["gold", "tin"], "label": ["A", "B"]}"#;
    let arc = format!(r#"{{"question": "Which?", {lists}, "answerKey": "B"}}"#);
    assert_eq!(question(&arc), expected("", "Which?", &["gold", "tin"], 1));
    let stem = r#"{"question": {"stem": "Which?", "choices": [{"text": "gold", "label": "1"},
        {"text": "tin", "label": "2"}]}, "answerKey": "1"}"#;
    assert_eq!(question(&stem.replace('\n', "")), expected("", "Which?", &["gold", "tin"], 0));
    let open = format!(r#"{{"question_stem": "A coin is", {lists}, "answerKey": " A"}}"#);
    assert_eq!(question(&open), expected("A coin is", "", &["gold", "tin"], 0));
    let piqa = r#"{"goal": "Dry it", "sol1": "sun", "sol2": "rain", "label": 0}"#;
    assert_eq!(question(piqa), expected("", "Dry it", &["sun", "rain"], 0));
    for yes in ["\"answer\": true", "\"label\": 1"] {
        let boolq = format!(r#"{{"question": "is it", "passage": "It is.", {yes}}}"#);
        assert_eq!(question(&boolq), expected("It is.", "is it?", &["no", "yes"], 1));
    }
    let hellaswag = r#"{"activity_label": "Tea", "ctx_a": "A pot. [header] How", "ctx_b": "HE pours",
        "endings": [" a cup [title] of  it", "[substeps] [open"], "label": "1"}"#;
    assert_eq!(
        question(&hellaswag.replace('\n', "")),
        expected("Tea: A pot. How He pours", "", &["a cup. of it", " [open"], 1)
    );
    let winogrande = r#"{"sentence": "The cat saw the _ and ran. ", "option1": "dog",
        "option2": "fish", "answer": "2"}"#;
    let whole = expected("", "", &["The cat saw the dog", "The cat saw the fish"], 1);
    let ending = Some("and ran.".to_string());
    assert_eq!(question(&winogrande.replace('\n', "")), Question { ending, ..whole });
}

#[test]
fn mmlus_folder_is_one_task_of_several_subjects() {
    let folder = tempdir().unwrap();
    mmlu(folder.path());
    for path in [folder.path().to_path_buf(), folder.path().join("test")] {
        let task = Task::open(&path).unwrap();
        assert_eq!((task.style, task.questions()), (Style::Letters, 5));
        let [anatomy, facts] = task.subjects.as_slice() else { panic!("{task:?}") };
        assert_eq!((anatomy.name.as_str(), facts.name.as_str()), ("anatomy", "world_facts"));
        assert_eq!(facts.topic.as_deref(), Some("world facts"));
        let third = Question { line: 3, ..expected("", "Q3", &["one", "two", "three", "four"], 3) };
        assert_eq!(facts.questions[2], third);
        let examples: Vec<&str> = facts.examples.iter().map(|e| e.question.as_str()).collect();
        assert_eq!(examples, ["E1", "E2"]);
    }
    // A file alone finds its examples, too.
    let one = Task::open(&folder.path().join("test/anatomy_test.csv")).unwrap();
    assert_eq!((one.questions(), one.subjects[0].examples.len()), (2, 2));
    fs::remove_dir_all(folder.path().join("dev")).unwrap();
    let alone = Task::open(folder.path()).unwrap();
    assert!(alone.subjects.iter().all(|subject| subject.examples.is_empty()));
}

#[test]
fn a_row_of_csv_may_span_lines_and_is_counted_by_its_first() {
    let text = "\"What, \"\"then\"\",\nis it?  \",a,\"b,b\", c ,d,B\nNext?,a,b,c,d,A\n";
    let questions = task("x_val.csv", text).unwrap().subjects.remove(0).questions;
    let first = expected("", "What, \"then\",\nis it?", &["a", "b,b", " c ", "d"], 1);
    assert_eq!(questions[0], Question { line: 1, ..first });
    assert_eq!(questions[1].line, 3);
}

#[test]
fn examples_come_from_another_file_or_the_one_of_the_same_name() {
    let folder = tempdir().unwrap();
    mmlu(folder.path());
    let own = Task::open(&folder.path().join("test")).unwrap();
    let named = own.clone().with_examples_from(&folder.path().join("test")).unwrap();
    for (subject, own) in named.subjects.iter().zip(&own.subjects) {
        assert_eq!(subject.examples, own.questions);
    }
    let only = folder.path().join("test/anatomy_test.csv");
    let one = own.clone().with_examples_from(&only).unwrap();
    for subject in &one.subjects {
        assert_eq!(subject.examples, own.subjects[0].questions);
    }
    fs::write(folder.path().join("dev/third_dev.csv"), "Q,a,b,c,d,A\n").unwrap();
    fs::remove_file(folder.path().join("dev/anatomy_dev.csv")).unwrap();
    let lacking = own.with_examples_from(&folder.path().join("dev"));
    assert_message(lacking, &["dev", "no examples for the subject anatomy"]);
}

#[test]
fn lines_that_are_no_questions_are_named() {
    let good = r#"{"question": "Q", "choices": ["a", "b"], "answer": 0}"#;
    let refused = |line: &str, parts: &[&str]| {
        let parts = [&["task.jsonl: line 3: "], parts].concat();
        assert_message(task("task.jsonl", &format!("{good}\n\n{line}\n{good}")), &parts);
    };
    let general = r#"{"question": "...", "choices": ["...", "..."], "answer": 0}"#;
    refused("{\"question\":", &["no JSON", general]);
    refused("[1]", &["no JSON object", general]);
    refused(
        r#"{"text": "x", "choices": ["a", "b"]}"#,
        &["neither `question` nor", "choices, text"],
    );
    refused(r#"{"question": "Q", "answer": 0}"#, &["no field `choices`", "answer, question"]);
    refused(r#"{"question": "Q", "choices": "ab", "answer": 0}"#, &["`choices` is not a list"]);
    refused(
        r#"{"question": 7, "choices": ["a", "b"], "answer": 0}"#,
        &["`question` is not a text"],
    );
    refused(r#"{"question": "Q", "choices": ["a", 2], "answer": 0}"#, &["not a list of texts"]);
    refused(r#"{"question": "Q", "choices": ["a", "b"]}"#, &["no field `answer`"]);
    refused(r#"{"question": "Q", "choices": ["a", "b"], "answer": null}"#, &["no field `answer`"]);
    refused(r#"{"question": "Q", "choices": ["a", "b"], "answer": -1}"#, &["`answer` is -1"]);
    refused(
        r#"{"question": "Q", "choices": ["a", "b"], "answer": 2}"#,
        &["choice 3 of 2", "from 0"],
    );
    refused(r#"{"question": "Q", "choices": ["a", "b"], "answer": "C"}"#, &["choice 3 of 2"]);
    refused(r#"{"question": "Q", "choices": ["a", "b"], "answer": "c"}"#, &["`c` is none of"]);
    refused(r#"{"question": "Q", "choices": ["a"], "answer": 0}"#, &["1 choice", "at least two"]);
    let arc = r#"{"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "#;
    refused(&format!("{arc}\"answerKey\": \"C\"}}"), &["answerKey `C`", "A, B"]);
    let gap = |sentence: &str| {
        format!(r#"{{"sentence": "{sentence}", "option1": "a", "option2": "b", "answer": "1"}}"#)
    };
    refused(&gap("no gap"), &["no gap `_`"]);
    refused(&gap("at the _ "), &["nothing follows the gap"]);
    refused(r#"{"goal": "Q", "sol1": "a", "sol2": "b", "label": "x"}"#, &["`label` is \"x\""]);
}

#[test]
fn rows_that_are_no_questions_are_named() {
    let refused = |row: &str, parts: &[&str]| {
        let parts = [&["task.csv: line 3: "], parts].concat();
        assert_message(task("task.csv", &format!("\"Q\n\",a,b,c,d,A\n{row}\n")), &parts);
    };
    refused("Q,a,b,c,A", &["5 columns, not 6", "in quotes"]);
    refused("Q,a,b,c,d,e,A", &["7 columns"]);
    refused("question,A,B,C,D,answer", &["the answer `answer` is no letter", "column names"]);
    refused("Q,a,b,c,d,E", &["choice 5 of 4"]);
    refused("Q,a,b,c,d,", &["the answer `` is no letter"]);
}

#[test]
fn files_that_hold_no_task_are_named() {
    assert_message(task("empty.jsonl", ""), &["empty.jsonl", "holds no question"]);
    assert_message(task("blank.jsonl", "\n \n"), &["blank.jsonl", "holds no question"]);
    assert_message(task("empty.csv", ""), &["empty.csv", "holds no question"]);
    assert_message(task("task.txt", "Q"), &["task.txt", "neither .jsonl nor .csv"]);
    assert_message(Task::open(Path::new("none.jsonl")), &["none.jsonl", "check the path"]);
    let folder = tempdir().unwrap();
    assert_message(Task::open(folder.path()), &["holds no .jsonl and no .csv"]);
    fs::write(folder.path().join("a.csv"), "Q,a,b,c,d,A\n").unwrap();
    let line = r#"{"question": "Q", "choices": ["a", "b"], "answer": 0}"#;
    fs::write(folder.path().join("b.jsonl"), line).unwrap();
    assert_message(Task::open(folder.path()), &["together", "two folders"]);
    for name in ["latin.jsonl", "latin.csv"] {
        let path = folder.path().join(name);
        fs::write(&path, b"\xe9,a,b,c,d,A\n").unwrap();
        assert_message(Task::open(&path), &[name, "line 1", "UTF-8"]);
    }
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_first_question() {
    assert_eq!(
        task("x.csv", "\u{feff}Q,a,b,c,d,A\n").unwrap().subjects[0].questions[0].question,
        "Q"
    );
    let line = r#"{"question": "Q", "choices": ["a", "b"], "answer": 0}"#;
    assert_eq!(task("x.jsonl", &format!("\u{feff}{line}\r\n{line}")).unwrap().questions(), 2);
}

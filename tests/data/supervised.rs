//! Prompts and answers: what becomes of the layouts, and what is refused.

use isobath::data::supervised::{ask, read};
use isobath::data::{Examples, Tokenizer};
use tempfile::tempdir;

use super::{assert_message, write_file};

const END: u32 = 256;

/// Reads lines with the tokenizer whose ids are the bytes.
fn examples(lines: &str) -> isobath::Result<Examples> {
    let folder = tempdir().unwrap();
    let path = write_file(folder.path(), "chat.jsonl", lines.as_bytes());
    read(&[path], &Tokenizer::bytes().unwrap())
}

/// The text that is only read in round brackets, what is predicted in square ones, the end as `$`.
fn marked(examples: &Examples, index: usize) -> String {
    let (tokens, predicted) = examples.get(index);
    let mut text = String::new();
    let mut before = None;
    for (&token, &predicted) in tokens.iter().zip(predicted) {
        if before != Some(predicted) {
            text.push_str(match (before, predicted) {
                (None, false) => "(",
                (None, true) => "[",
                (_, false) => "](",
                (_, true) => ")[",
            });
            before = Some(predicted);
        }
        text.push(if token == END { '$' } else { char::from(token as u8) });
    }
    text.push(if before == Some(true) { ']' } else { ')' });
    text
}

#[test]
fn answers_and_their_ends_are_predicted_and_prompts_are_not() {
    let lines = r####"{"prompt": "2 + 2 =", "completion": " 4"}

{"instruction": "Add.", "input": "2, 2", "output": "4"}
{"instruction": "Name a novel.", "input": "", "output": "Emma"}
{"instruction": "Name a novel.", "output": "Emma", "source": "by hand"}
{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
"####
        .trim_end()
        .to_string()
        + r####" {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye."}, {"role": "user", "content": "unanswered"}]}
{"prompt": "", "completion": "all of it"}"####;
    let examples = examples(&lines).unwrap();
    let found: Vec<String> = (0..examples.len()).map(|index| marked(&examples, index)).collect();
    let user = "### User:\nName a novel.\n\n### Assistant:\n";
    assert_eq!(
        found,
        [
            "(2 + 2 =)[ 4$]".to_string(),
            "(### User:\nAdd.\n\n2, 2\n\n### Assistant:\n)[4$]".to_string(),
            format!("({user})[Emma$]"),
            format!("({user})[Emma$]"),
            "(### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n)[Yes?$]\
             (### User:\nBye\n\n### Assistant:\n)[Bye.$]"
                .to_string(),
            "[all of it$]".to_string(),
        ]
    );
    assert_eq!(ask("Name a novel."), user);
}

#[test]
fn lines_that_are_no_examples_are_refused_with_their_number_and_what_they_lack() {
    let good = r#"{"prompt": "a", "completion": "b"}"#;
    for (line, parts) in [
        ("{", &["line 2 is no JSON"][..]),
        ("[1]", &["line 2 is no JSON object", "messages"]),
        (r#"{"text": "x"}"#, &["line 2 is no example; it has: text", "data.format to text"]),
        (r#"{"prompt": "a"}"#, &["line 2 has no text in the field `completion`"]),
        (r#"{"prompt": "a", "completion": ""}"#, &["line 2 has an empty answer in `completion`"]),
        (
            r#"{"instruction": 3, "output": "b"}"#,
            &["line 2 has no text in the field `instruction`"],
        ),
        (r#"{"instruction": "a", "input": 3, "output": "b"}"#, &["the field `input`"]),
        (r#"{"messages": "hello"}"#, &["line 2 has no list in `messages`"]),
        (r#"{"messages": [{"role": "user"}]}"#, &["`role` or `content` of message 1"]),
        (
            r#"{"messages": [{"role": "tool", "content": "x"}]}"#,
            &["a message of the role \"tool\"", "system, user, assistant"],
        ),
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, &["no message of the assistant"]),
        (
            r#"{"messages": [{"role": "assistant", "content": ""}]}"#,
            &["an empty answer in message 1"],
        ),
    ] {
        let found = examples(&format!("{good}\n{line}\n"));
        assert_message(found, &[&["chat.jsonl"][..], parts].concat());
    }
    assert_message(examples("\n \n"), &["holds no examples"]);
    assert_message(examples(""), &["is empty"]);
    let text = write_file(tempdir().unwrap().path(), "chat.txt", b"x");
    assert_message(read(&[text], &Tokenizer::bytes().unwrap()), &["no .jsonl file"]);
}

#[test]
fn a_tokenizer_that_cannot_end_an_answer_is_refused() {
    let json = Tokenizer::bytes().unwrap().json().replace("<|endoftext|>", "<|other|>");
    let endless = Tokenizer::from_json(json.as_bytes(), "endless".as_ref()).unwrap();
    assert_eq!(endless.end_of_text(), None);
    assert_message(read(&["chat.jsonl"], &endless), &["no end-of-text token"]);
}

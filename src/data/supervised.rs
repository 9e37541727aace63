//! Prompts and answers from .jsonl files: what is read, and which of it is predicted.
//!
//! A line is one example, in one of three layouts that its fields tell apart:
//!
//! ```text
//! {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
//! {"instruction": "...", "input": "...", "output": "..."}      input may be missing or empty
//! {"prompt": "...", "completion": "..."}
//! ```
//!
//! The first two become turns, each a heading (`### User:`, `### Assistant:`, `### System:`), its
//! text and an empty line; the third is taken as it is, byte for byte. The answers, each with the
//! end-of-text token after it, are predicted; everything else is only read.

use std::path::Path;

use serde_json::{Map, Value};

use crate::data::examples::{Example, Examples};
use crate::data::text::{bad, read_objects};
use crate::data::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Roles of messages, and the headings that they become.
const ROLES: [(&str, &str); 3] =
    [("system", "### System:\n"), ("user", "### User:\n"), (ANSWERING, "### Assistant:\n")];
const ANSWERING: &str = "assistant";

/// After a turn that is not answered by the end-of-text token.
const BETWEEN_TURNS: &str = "\n\n";

/// A text that is only read, and the answer that follows it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Exchange {
    prompt: String,
    answer: String,
}

/// What a model that was trained on turns is given, so that it answers `question`.
pub fn ask(question: &str) -> String {
    let mut prompt = String::new();
    push_turn(&mut prompt, "user", question);
    prompt.push_str(heading(ANSWERING).unwrap_or_default());
    prompt
}

/// Reads all examples of `paths`, in order.
///
/// Errors: a tokenizer without an end-of-text token, so that no answer could end; another kind of
/// file, a line that is no example (with its number and what it lacks), a file without any.
pub fn read(paths: &[impl AsRef<Path>], tokenizer: &Tokenizer) -> Result<Examples> {
    let Some(end) = tokenizer.end_of_text() else {
        return Err(Error::Config {
            what: "the tokenizer has no end-of-text token: no answer could end".into(),
            remedy: "give a tokenizer.json with one, such as <|endoftext|> or </s>".into(),
        });
    };
    let mut examples = Examples::default();
    for path in paths.iter().map(AsRef::as_ref) {
        let before = examples.len();
        read_objects(path, |number, object| {
            let exchanges = exchanges(&object).map_err(|flaw| flaw.at(path, number))?;
            let mut example = Example::default();
            for Exchange { prompt, answer } in exchanges {
                let context = tokenizer.context(&prompt);
                example.read(&tokenizer.encode_long(&prompt)?);
                example.predict(&tokenizer.encode_after(context, &answer)?);
                example.predict(&[end]);
            }
            examples.push(example);
            Ok(())
        })?;
        if examples.len() == before {
            return Err(bad(path, "holds no examples", "leave it out, or give a file with some"));
        }
    }
    Ok(examples)
}

/// Why a line is no example.
struct Flaw {
    what: String,
    remedy: String,
}

impl Flaw {
    fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Flaw { what: what.into(), remedy: remedy.into() }
    }

    fn at(self, path: &Path, line: u64) -> Error {
        bad(path, &format!("line {line} {}", self.what), &self.remedy)
    }
}

/// At least one.
fn exchanges(line: &Value) -> Result<Vec<Exchange>, Flaw> {
    let Some(fields) = line.as_object() else {
        return Err(Flaw::new("is no JSON object", LAYOUTS));
    };
    if let Some(messages) = fields.get("messages") {
        return of_messages(messages);
    }
    if fields.contains_key("instruction") {
        let mut question = text(fields, "instruction")?.to_string();
        let input = if fields.contains_key("input") { text(fields, "input")? } else { "" };
        if !input.is_empty() {
            question = [&question, BETWEEN_TURNS, input].concat();
        }
        return Ok(vec![Exchange { prompt: ask(&question), answer: answer(fields, "output")? }]);
    }
    if fields.contains_key("prompt") {
        let prompt = text(fields, "prompt")?.to_string();
        return Ok(vec![Exchange { prompt, answer: answer(fields, "completion")? }]);
    }
    let names: Vec<&str> = fields.keys().map(String::as_str).collect();
    Err(Flaw::new(format!("is no example; it has: {}", names.join(", ")), LAYOUTS))
}

const LAYOUTS: &str = "give lines with `messages`, with `instruction` and `output`, or with `prompt` \
                       and `completion`; set data.format to text for text to be predicted whole";

/// Turns that no answer follows are left out.
fn of_messages(messages: &Value) -> Result<Vec<Exchange>, Flaw> {
    let remedy = "give `messages` as a list of objects with `role` and `content`";
    let Some(messages) = messages.as_array() else {
        return Err(Flaw::new("has no list in `messages`", remedy));
    };
    let mut found = vec![];
    let mut prompt = String::new();
    for (at, message) in messages.iter().enumerate() {
        let field = |name: &str| message.get(name).and_then(Value::as_str);
        let (Some(role), Some(content)) = (field("role"), field("content")) else {
            let what = format!("has no text in `role` or `content` of message {}", at + 1);
            return Err(Flaw::new(what, remedy));
        };
        let Some(heading) = heading(role) else {
            let what = format!("has a message of the role {role:?}");
            let roles = ROLES.map(|(role, _)| role).join(", ");
            return Err(Flaw::new(what, format!("the roles are {roles}; leave others out")));
        };
        if role != ANSWERING {
            push_turn(&mut prompt, role, content);
            continue;
        }
        if content.is_empty() {
            return Err(Flaw::new(format!("has an empty answer in message {}", at + 1), EMPTY));
        }
        prompt.push_str(heading);
        found.push(Exchange { prompt: std::mem::take(&mut prompt), answer: content.to_string() });
    }
    if found.is_empty() {
        return Err(Flaw::new("has no message of the assistant to learn from", "leave it out"));
    }
    Ok(found)
}

const EMPTY: &str = "leave the line out, or write the answer";

fn heading(role: &str) -> Option<&'static str> {
    ROLES.iter().find(|(known, _)| *known == role).map(|(_, heading)| *heading)
}

fn push_turn(prompt: &mut String, role: &str, content: &str) {
    prompt.extend([heading(role).unwrap_or_default(), content, BETWEEN_TURNS]);
}

fn text<'a>(fields: &'a Map<String, Value>, name: &str) -> Result<&'a str, Flaw> {
    fields.get(name).and_then(Value::as_str).ok_or_else(|| {
        Flaw::new(
            format!("has no text in the field `{name}`"),
            format!("give `{name}` as a string"),
        )
    })
}

fn answer(fields: &Map<String, Value>, name: &str) -> Result<String, Flaw> {
    match text(fields, name)? {
        "" => Err(Flaw::new(format!("has an empty answer in `{name}`"), EMPTY)),
        answer => Ok(answer.to_string()),
    }
}

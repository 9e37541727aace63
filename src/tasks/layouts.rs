//! JSON objects that hold a question, in the layouts that people have at hand.
//!
//! | told by | layout |
//! |---|---|
//! | `goal`, `sol1` | PIQA: goal, sol1, sol2, label |
//! | `sentence`, `option1` | WinoGrande: sentence with `_`, option1, option2, answer |
//! | `endings` | HellaSwag: activity_label, ctx_a, ctx_b, endings, label |
//! | `passage` | BoolQ: passage, question, and answer or label |
//! | `question_stem` | OpenBookQA: question_stem, choices {text, label}, answerKey |
//! | `answerKey` | ARC: question, choices {text, label}; or question {stem, choices [{text, label}]} |
//! | anything else | question and/or context, choices [text], answer |
//!
//! Each becomes a [`Question`] whose wording is that of its lm-evaluation-harness task. Only fields
//! are looked at here; whether the question makes sense is checked in `file`.

use serde_json::{Map, Value};

use super::question::{Flaw, Question, letter_index};

/// What a line of no particular layout has to look like.
const GENERAL: &str =
    r#"give {"question": "...", "choices": ["...", "..."], "answer": 0}, one object a line"#;

type Fields = Map<String, Value>;

/// The question in one line of a .jsonl file.
pub(super) fn question(line: &str) -> Result<Question, Flaw> {
    let object: Value =
        serde_json::from_str(line).map_err(|error| flaw(format!("no JSON: {error}"), GENERAL))?;
    let Value::Object(fields) = object else {
        return Err(flaw("no JSON object".into(), GENERAL));
    };
    let has = |name| fields.contains_key(name);
    if has("goal") && has("sol1") {
        piqa(&fields)
    } else if has("sentence") && has("option1") {
        winogrande(&fields)
    } else if has("endings") {
        hellaswag(&fields)
    } else if has("passage") {
        boolq(&fields)
    } else if has("question_stem") {
        openbookqa(&fields)
    } else if has("answerKey") {
        arc(&fields)
    } else {
        general(&fields)
    }
}

fn piqa(fields: &Fields) -> Result<Question, Flaw> {
    Ok(Question {
        question: text(fields, "goal")?,
        choices: vec![text(fields, "sol1")?, text(fields, "sol2")?],
        answer: index(fields, "label", 0)?,
        ..Question::default()
    })
}

/// The choices are the sentence up to its gap with an option in it; what follows is scored.
fn winogrande(fields: &Fields) -> Result<Question, Flaw> {
    let sentence = text(fields, "sentence")?;
    let Some((before, behind)) = sentence.split_once('_') else {
        return Err(flaw(
            "the field `sentence` has no gap `_`".into(),
            "mark where the options go with `_`",
        ));
    };
    let option = |name| Ok(format!("{before}{}", text(fields, name)?));
    Ok(Question {
        choices: vec![option("option1")?, option("option2")?],
        ending: Some(behind.trim().to_string()),
        answer: index(fields, "answer", 1)?,
        ..Question::default()
    })
}

fn hellaswag(fields: &Fields) -> Result<Question, Flaw> {
    let [activity, before, behind] =
        ["activity_label", "ctx_a", "ctx_b"].map(|name| text(fields, name));
    let context = format!("{}: {} {}", activity?, before?, capitalised(&behind?));
    Ok(Question {
        context: without_artifacts(&context),
        choices: texts(field(fields, "endings")?, "endings")?
            .iter()
            .map(|ending| without_artifacts(ending))
            .collect(),
        answer: index(fields, "label", 0)?,
        ..Question::default()
    })
}

fn boolq(fields: &Fields) -> Result<Question, Flaw> {
    let name = if fields.contains_key("answer") { "answer" } else { "label" };
    let answer = match field(fields, name)? {
        Value::Bool(yes) => usize::from(*yes),
        _ => index(fields, name, 0)?,
    };
    Ok(Question {
        context: text(fields, "passage")?,
        question: format!("{}?", text(fields, "question")?),
        choices: vec!["no".into(), "yes".into()],
        answer,
        ..Question::default()
    })
}

/// The choices continue the stem, without "Question:".
fn openbookqa(fields: &Fields) -> Result<Question, Flaw> {
    let (choices, answer) = labelled(field(fields, "choices")?, fields)?;
    let context = text(fields, "question_stem")?;
    Ok(Question { context, choices, answer, ..Question::default() })
}

fn arc(fields: &Fields) -> Result<Question, Flaw> {
    let (question, choices) = match field(fields, "question")? {
        Value::Object(inner) => (text(inner, "stem")?, field(inner, "choices")?),
        _ => (text(fields, "question")?, field(fields, "choices")?),
    };
    let (choices, answer) = labelled(choices, fields)?;
    Ok(Question { question, choices, answer, ..Question::default() })
}

fn general(fields: &Fields) -> Result<Question, Flaw> {
    let optional = |name| match fields.contains_key(name) {
        true => text(fields, name),
        false => Ok(String::new()),
    };
    let (context, question) = (optional("context")?, optional("question")?);
    if context.is_empty() && question.is_empty() {
        return Err(flaw(
            format!("neither `question` nor `context`; the fields are: {}", names(fields)),
            GENERAL,
        ));
    }
    let choices = texts(field(fields, "choices")?, "choices")?;
    let answer = match field(fields, "answer")? {
        Value::String(given) => named_choice(given, &choices)?,
        _ => index(fields, "answer", 0)?,
    };
    Ok(Question { context, question, choices, answer, ..Question::default() })
}

/// Index of the choice that `given` is the text or, failing that, the letter of.
fn named_choice(given: &str, choices: &[String]) -> Result<usize, Flaw> {
    let same = |choice: &String| choice == given;
    choices.iter().position(same).or_else(|| letter_index(given)).ok_or_else(|| {
        flaw(
            format!("the answer `{given}` is none of the choices"),
            "give the index of the right choice (from 0), its letter (from A) or its whole text",
        )
    })
}

/// Texts of choices, as {text: [...], label: [...]} or [{text, label}], and which of them
/// `answerKey` is the label of.
fn labelled(choices: &Value, fields: &Fields) -> Result<(Vec<String>, usize), Flaw> {
    let (choices, labels) = match choices {
        Value::Object(lists) => {
            (texts(field(lists, "text")?, "text")?, texts(field(lists, "label")?, "label")?)
        }
        Value::Array(pairs) => {
            let column = |name| -> Result<Vec<String>, Flaw> {
                let pairs = pairs.iter().map(Value::as_object);
                pairs.map(|pair| text(pair.unwrap_or(&Map::new()), name)).collect()
            };
            (column("text")?, column("label")?)
        }
        _ => return Err(not_a("choices", "{\"text\": [...], \"label\": [...]}")),
    };
    let key = text(fields, "answerKey")?;
    let key = key.trim_start();
    match labels.iter().take(choices.len()).position(|label| label == key) {
        Some(answer) => Ok((choices, answer)),
        None => Err(flaw(
            format!("the answerKey `{key}` is none of the labels {}", labels.join(", ")),
            "set answerKey to the label of the right choice",
        )),
    }
}

/// A number, or digits in quotes, counted from `first`.
fn index(fields: &Fields, name: &str, first: u64) -> Result<usize, Flaw> {
    let value = field(fields, name)?;
    let number = match value {
        Value::String(digits) => digits.parse().ok(),
        _ => value.as_u64(),
    };
    match number.and_then(|number| number.checked_sub(first)) {
        Some(index) => Ok(index as usize),
        None => Err(flaw(
            format!("the field `{name}` is {value}, no number of a choice"),
            &format!("number the choices from {first}"),
        )),
    }
}

fn field<'a>(fields: &'a Fields, name: &str) -> Result<&'a Value, Flaw> {
    fields.get(name).filter(|value| !value.is_null()).ok_or_else(|| {
        flaw(format!("no field `{name}`; the fields are: {}", names(fields)), GENERAL)
    })
}

fn text(fields: &Fields, name: &str) -> Result<String, Flaw> {
    let value = field(fields, name)?;
    value.as_str().map(str::to_string).ok_or_else(|| not_a(name, "a text"))
}

fn texts(value: &Value, name: &str) -> Result<Vec<String>, Flaw> {
    let list = value.as_array().ok_or_else(|| not_a(name, "a list of texts"))?;
    let texts = list.iter().map(|item| item.as_str().map(str::to_string));
    texts.collect::<Option<_>>().ok_or_else(|| not_a(name, "a list of texts"))
}

fn not_a(name: &str, expected: &str) -> Flaw {
    flaw(format!("the field `{name}` is not {expected}"), GENERAL)
}

fn flaw(what: String, remedy: &str) -> Flaw {
    Flaw { what, remedy: remedy.to_string() }
}

fn names(fields: &Fields) -> String {
    fields.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// The first character in upper case, the others in lower case.
fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    let first: String = characters.next().into_iter().flat_map(char::to_uppercase).collect();
    first + &characters.as_str().to_lowercase()
}

/// WikiHow's marks in HellaSwag, taken out as the harness does it.
fn without_artifacts(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        let inside = &rest[open..];
        let line = &inside[..inside.find('\n').unwrap_or(inside.len())];
        // A bracket that is not closed on its line is text.
        let end = line.find(']').map_or(open + 1, |close| open + close + 1);
        let kept_end = if line.contains(']') { open } else { open + 1 };
        kept.push_str(&rest[..kept_end]);
        rest = &rest[end..];
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}

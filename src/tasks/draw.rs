//! A task made of any text: which of several continuations follows?
//!
//! Each question is a passage of the text; the right choice is what follows it, the wrong ones
//! follow other passages of the same text. Context and choice meet at a single space between two
//! words, so that one after the other they are the text, character for character. Everything is
//! decided by the seed.

use std::collections::HashSet;
use std::ops::Range;

use serde_json::json;

use super::question::Question;
use crate::random::Philox;
use crate::{Error, Result};

/// Passages that are drawn for one question before the text is taken to be too short.
const MOST_DRAWS: u64 = 1000;

/// Where in a question's stream of the generator the place of the right choice comes from.
const ORDER: u64 = MOST_DRAWS;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DrawOptions {
    pub questions: usize,
    /// Choices of a question, the right one included; at least two.
    pub choices: usize,
    /// Characters of a context: at most so many, at least half, whole words.
    pub context: usize,
    /// Characters of a choice: as for the context, and without an empty line in it.
    pub continuation: usize,
    pub seed: u64,
}

impl Default for DrawOptions {
    fn default() -> Self {
        DrawOptions { questions: 500, choices: 4, context: 240, continuation: 60, seed: 1 }
    }
}

/// Draws questions from `documents`, no two of them at the same place. The same documents and
/// options give the same questions.
///
/// Errors: options that make no question; text that is too short, or too uniform, for them.
pub fn draw(documents: &[String], options: &DrawOptions) -> Result<Vec<Question>> {
    let DrawOptions { questions, choices, context, continuation, .. } = *options;
    if questions == 0 || choices < 2 || context == 0 || continuation == 0 {
        return Err(Error::Usage {
            what: format!(
                "{questions} questions of {choices} choices of {continuation} characters after \
                 {context}"
            ),
            remedy: "ask for at least one question, two choices, and one character of each".into(),
        });
    }
    let mut taken = HashSet::new();
    let drawn = (0..questions).map(|index| {
        question(documents, options, index as u64, &mut taken).ok_or_else(|| Error::Usage {
            what: format!(
                "the text is too short or too uniform: {index} of {questions} questions were drawn"
            ),
            remedy: "give more text, or ask for fewer questions, choices or characters".into(),
        })
    });
    drawn.collect()
}

/// One JSON object a line, as `eval --task` reads them.
pub fn json_lines(questions: &[Question]) -> String {
    let lines = questions.iter().map(|Question { context, choices, answer, .. }| {
        format!("{}\n", json!({ "context": context, "choices": choices, "answer": answer }))
    });
    lines.collect()
}

/// A place between two words, with the text on either side.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Passage<'a> {
    document: usize,
    /// Bytes of the document that context and continuation take.
    range: Range<usize>,
    context: &'a str,
    continuation: &'a str,
}

/// `taken`: where the right choices of earlier questions begin.
fn question(
    documents: &[String],
    options: &DrawOptions,
    index: u64,
    taken: &mut HashSet<(usize, usize)>,
) -> Option<Question> {
    let random = Philox::new(options.seed, index);
    let mut passages =
        (0..MOST_DRAWS).filter_map(|draw| passage(documents, options, random.uniform_f64(draw)));
    let right = passages.find(|found| taken.insert((found.document, found.range.end)))?;
    let mut choices = vec![right.continuation];
    while choices.len() < options.choices {
        let other = passages.next()?;
        let apart = other.document != right.document
            || other.range.end <= right.range.start
            || right.range.end <= other.range.start;
        if apart && !choices.contains(&other.continuation) {
            choices.push(other.continuation);
        }
    }
    let answer = (random.uniform_f64(ORDER) * options.choices as f64) as usize;
    choices[..=answer].rotate_left(1);
    Some(Question {
        context: right.context.to_string(),
        choices: choices.into_iter().map(str::to_string).collect(),
        answer,
        ..Question::default()
    })
}

/// The passage at the first single space after `share` (0 to below 1) of all bytes; `None` if
/// there is none in the document, or too little text around it.
fn passage<'a>(documents: &'a [String], options: &DrawOptions, share: f64) -> Option<Passage<'a>> {
    let all: usize = documents.iter().map(String::len).sum();
    let mut from = (share * all as f64) as usize;
    let document = documents.iter().position(|text| {
        let within = from < text.len();
        from -= if within { 0 } else { text.len() };
        within
    })?;
    let text = &documents[document];
    let space = single_space(text, from)?;
    let (before, behind) = (&text[..space], &text[space + 1..]);

    let (start, _) = before.char_indices().rev().take(options.context).last()?;
    let start = match text[..start].chars().next_back() {
        Some(character) if !character.is_whitespace() => {
            // In the middle of a word: that word stays out.
            start + before[start..].find(char::is_whitespace)?
        }
        _ => start,
    };
    let context = before[start..].trim_start();

    let limit = behind.char_indices().nth(options.continuation);
    let continuation = match limit {
        Some((end, character)) if !character.is_whitespace() => {
            &behind[..behind[..end].rfind(char::is_whitespace)?]
        }
        Some((end, _)) => &behind[..end],
        None => behind,
    };
    let continuation = continuation.trim_end();

    let enough = |text: &str, most: usize| 2 * text.chars().count() >= most;
    let fits = enough(context, options.context)
        && enough(continuation, options.continuation)
        && !continuation.contains("\n\n")
        && !continuation.contains("\r\n\r\n");
    let range = space - context.len()..space + 1 + continuation.len();
    fits.then_some(Passage { document, range, context, continuation })
}

/// The first space at or after byte `from` that stands alone between two words.
fn single_space(text: &str, from: usize) -> Option<usize> {
    let from = text.ceil_char_boundary(from);
    let mut spaces = text[from..].match_indices(' ').map(|(at, _)| from + at);
    let is_word = |character: Option<char>| character.is_some_and(|c| !c.is_whitespace());
    spaces.find(|&at| {
        is_word(text[..at].chars().next_back()) && is_word(text[at + 1..].chars().next())
    })
}
